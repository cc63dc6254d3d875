"""What a report may and may not say. Plans are real; the manifests are written by hand, nothing is trained."""

from __future__ import annotations

import csv
import io
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from rich.console import Console

from packcli import cli, stages, sweepfile
from packcli.files import read_sealed, sha256_file, write_json
from packcli.plan import Cell, Kind, Plan, needed, plan
from packcli.report import render, rows, sheets, words
from packcli.report.records import Group, Report
from packcli.store import Manifest, Store

SWEEP = """
name: demo
model:
  config: {model_type: llama}
  tokenizer: train
  vocab_size: 300
data: {source: tiny, max_length: 64, validation: 0.1}
train: {epochs: 1, lr: 1e-3, global_batch: 8}
eval: {tasks: [copy, swap]}
matrix:
  arm: [padding, best_fit]
  seed: [1, 2, 3]
"""

LEDGER = {"documents_cut": 0, "tokens_truncated": 7, "tokens_kept": 3200}
TRAINED: dict[str, Any] = {"steps": 40, "tokens": 3200, "slots": 6400, "supervised": 900}
TRAINED |= {"final_loss": 1.5, "validation_loss": 1.25, "wall_s": 20.0, "cpu_s": 30.0}
RATES = {"useful": "tokens", "padded": "slots"}
TRAINED |= {"random_weights": True, "processes": 1, "threads": 1, "device": "cpu"}
SCORED = {"metric": "acc", "stderr": 0.05, "n": 100, "n_total": 100, "version": 1, "health": {}}


class Sweep:
    """A sweep whose stages are finished or failed by hand."""

    def __init__(self, text: str, directory: Path) -> None:
        file = directory / "sweep.yaml"
        file.write_text(text)
        spec = sweepfile.load(file)
        self.plan: Plan = plan(spec, {key: f"fingerprint of {key}" for key in needed(spec)})
        self.store = Store(directory / "runs")

    def finish(self, kind: Kind, id_: str, results: dict[str, Any]) -> None:
        manifest = Manifest(
            stage=kind, id=id_, version=1, spec={}, inputs={}, outputs={}, results=results, provenance={}
        )
        write_json(self.store.manifest_file(kind, id_), manifest.model_dump())

    def fail(self, kind: Kind, id_: str, cause: str) -> None:
        write_json(self.store.failure_file(kind, id_), {"cause": cause, "fix": "lower `train.lr`"})

    def trained(self, cell: Cell, **results: Any) -> None:
        """Rates, and the ledger of the one epoch, follow from the results: else no training could have them."""
        found = TRAINED | results
        rates = {f"{kind}_tokens_per_s": found[of] / found["wall_s"] for kind, of in RATES.items()}
        own = {"rows": 8 * found["steps"], "slots": found["slots"], "efficiency": found["tokens"] / found["slots"]}
        self.finish("index", cell.index, {"ledger": LEDGER | own})
        self.finish("train", cell.train, found | rates)

    def scored(self, cell: Cell, task: str, score: float, **results: Any) -> None:
        self.finish("eval", cell.evals[task], {"task": task, "score": score} | SCORED | results)

    def finish_with_files(self, eval_: str) -> None:
        """Let the manifest of a scored task vouch for the files beside it."""
        path = self.store.manifest_file("eval", eval_)
        kept = [file for file in path.parent.iterdir() if file != path]
        outputs = {file.name: {"sha256": sha256_file(file), "bytes": file.stat().st_size} for file in kept}
        write_json(path, read_sealed(path) | {"outputs": outputs})

    def cell(self, **labels: str) -> Cell:
        (found,) = [cell for cell in self.plan.cells if labels.items() <= cell.labels.items()]
        return found

    def report(self) -> Report:
        return rows.collect(self.plan, self.store)

    def group(self, arm: str) -> Group:
        (found,) = [group for group in self.report().groups if group.arm == arm]
        return found


Make = Callable[..., Sweep]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A sweep with every cell done; `scores(arm, seed)` is the score of both tasks."""

    def build(text: str = SWEEP, scores: Callable[[str, int], float] | None = None) -> Sweep:
        sweep = Sweep(text, tmp_path)
        for cell in sweep.plan.cells:
            fast = cell.labels["arm"] != "padding"
            seed = int(cell.labels["seed"])
            seconds = (10.0 if fast else 30.0) + seed / 10
            slots = 3300 if fast else 6400
            sweep.trained(cell, cpu_s=seconds, wall_s=seconds / 2, slots=slots, steps=20 if fast else 40)
            for task in cell.evals:
                sweep.scored(cell, task, scores(cell.labels["arm"], seed) if scores else 0.5 + seed / 100)
        return sweep

    return build


def shown(report: Report, width: int = 110) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render.table(report))
    return console.export_text()


def column(report: Report, title: str, *, everything: bool = False) -> dict[str, list[str]]:
    """What the sheet that begins so has under each name, arm by arm."""
    (sheet,) = [one for one in sheets.sheets(report, everything=everything) if one.title.startswith(title)]
    rows = [row for _, block in sheet.blocks for row in block]
    return {name: ["\n".join(row[n].lines) for row in rows] for n, name in enumerate(sheet.header)}


# Rows --------------------------------------------------------------------------------------------------

ROW_KEYS = {"labels", "state", "train", "eval", "average"}
TRAIN_KEYS = {"steps", "wall_s", "cpu_s", "useful_tokens_per_s", "padded_tokens_per_s"} | {
    *("mfu", "efficiency", "final_loss", "validation_loss")
}
GROUP_KEYS = {"labels", "n_seeds", "average", "stderr", "delta", "interval"}


def test_json_lacks_a_word_of_the_contract(make: Make) -> None:
    document = orjson.loads(render.json_text(make().report()))
    assert set(document) == {"sweep", "baseline", "rows", "groups", "verdict"}
    assert len(document["rows"]) == 6
    assert len(document["groups"]) == 2
    for row in document["rows"]:
        assert set(row) >= ROW_KEYS
        assert set(row["train"]) >= TRAIN_KEYS
        assert all(set(score) >= {"metric", "score", "stderr", "n"} for score in row["eval"].values())
    assert all(set(group) >= GROUP_KEYS for group in document["groups"])
    assert document["rows"][0]["labels"] == {"arm": "padding", "seed": "1"}
    assert document["rows"][0]["train"]["mfu"] is None  # no peak is known for a CPU
    assert document["rows"][0]["train"]["efficiency"] == 0.5
    assert document["groups"][0]["labels"] == {"arm": "padding"}


def test_a_hole_is_averaged_over(make: Make) -> None:
    sweep = make()
    hole = sweep.cell(arm="best_fit", seed="2")
    sweep.store.manifest_file("eval", hole.evals["swap"]).unlink()
    report = sweep.report()
    (row,) = [row for row in report.rows if row.cell == hole.id]
    assert row.average is None
    assert row.state == "pending"
    assert row.tasks == {"copy": "done", "swap": "pending"}
    group = sweep.group("best_fit")
    assert (group.n_seeds, group.n_cells, group.n_pairs) == (2, 3, 2)
    assert group.average == pytest.approx((0.51 + 0.53) / 2)
    assert (group.eval["copy"].n_seeds, group.eval["swap"].n_seeds) == (3, 2)
    text = shown(report)
    assert "2 of 3" in text
    assert "pending: arm=best_fit, seed=2" in text


def test_a_failed_cell_hides_its_cause_or_reads_as_zero(make: Make) -> None:
    sweep = make()
    for seed in "123":
        cell = sweep.cell(arm="best_fit", seed=seed)
        for id_ in cell.evals.values():
            sweep.store.manifest_file("eval", id_).unlink()
        sweep.store.manifest_file("train", cell.train).unlink()
        sweep.fail("train", cell.train, "step 12: loss nan in [document 3]")
    report = sweep.report()
    row = report.rows[-1]
    assert (row.state, row.train, row.eval, row.average) == ("failed", None, {}, None)
    assert set(row.tasks.values()) == {"failed"}  # no eval can run without its training
    assert [failure.cause for failure in row.failures] == ["step 12: loss nan in [document 3]"]
    for text in (shown(report, 200), render.markdown(report), render.csv_text(report)):
        assert "step 12: loss nan in [document 3]" in text
    assert column(report, "scores")["copy\nacc"][1] == "failed"
    assert column(report, "cost of training")["wall\ntime, s"][1] == "failed"
    assert "no finished training to set against `padding`" in report.verdict


def test_a_failed_task_hides_the_finished_training(make: Make) -> None:
    sweep = make()
    cell = sweep.cell(arm="best_fit", seed="1")
    sweep.store.manifest_file("eval", cell.evals["copy"]).unlink()
    sweep.fail("eval", cell.evals["copy"], "the file is missing")
    (row,) = [row for row in sweep.report().rows if row.cell == cell.id]
    assert row.state == "failed"
    assert row.train is not None
    assert set(row.eval) == {"swap"}
    assert [failure.stage for failure in row.failures] == ["eval copy"]


def test_a_torn_failure_file_stops_the_report(make: Make) -> None:
    sweep = make()
    cell = sweep.cell(arm="best_fit", seed="1")
    sweep.store.manifest_file("train", cell.train).unlink()
    sweep.store.failure_file("train", cell.train).write_text('{"cause": ')
    assert "cannot be read" in shown(sweep.report(), 200)


def test_a_sweep_that_has_not_started_has_no_report(tmp_path: Path) -> None:
    report = Sweep(SWEEP, tmp_path).report()
    assert {row.state for row in report.rows} == {"pending"}
    assert "pending" in shown(report)
    assert "6 of 6 cells are not done" in report.verdict


# Groups ------------------------------------------------------------------------------------------------


def test_delta_mixes_up_seeds(make: Make) -> None:
    """Unpaired, the large spread between seeds would drown a steady difference of 3 points."""
    gain = {1: 0.02, 2: 0.03, 3: 0.04}
    sweep = make(scores=lambda arm, seed: seed / 10 + (gain[seed] if arm == "best_fit" else 0))
    group = sweep.group("best_fit")
    margin = 4.302653 * 0.01 / math.sqrt(3)
    assert group.delta == pytest.approx(0.03)
    assert group.interval == pytest.approx((0.03 - margin, 0.03 + margin), rel=1e-5)
    assert sweep.group("padding").delta is None


def test_a_pair_is_made_over_different_labels(make: Make) -> None:
    text = SWEEP.replace("  seed:", "  train.lr: [1e-3, 2e-3]\n  seed:")
    text += "exclude: [{arm: padding, train.lr: 2e-3}]\n"
    report = make(text).report()
    pairs = {group.labels["train.lr"]: group.n_pairs for group in report.groups if group.arm == "best_fit"}
    assert pairs == {"1e-3": 3, "2e-3": 0}
    alone = report.groups[-1]
    assert (alone.delta, alone.interval, alone.speedup, alone.slot_ratio) == (None, None, None, None)
    assert "`train.lr=2e-3`: There is no `padding` cell here" in report.verdict


def test_one_pair_gets_an_interval(make: Make) -> None:
    text = SWEEP.replace("[1, 2, 3]", "[1]")
    group = make(text, scores=lambda arm, seed: 0.5 + 0.1 * (arm != "padding")).group("best_fit")
    assert group.delta == pytest.approx(0.1)
    assert (group.interval, group.detectable, group.stderr) == (None, None, None)
    assert group.stderr_items == pytest.approx(0.05 / math.sqrt(2))


def test_seeds_that_agree_to_the_item_make_a_difference_certain(make: Make) -> None:
    sweep = make(scores=lambda arm, seed: seed / 10 + 0.01 * (arm != "padding"))
    group = sweep.group("best_fit")
    assert (group.delta, group.interval, group.detectable) == (pytest.approx(0.01), None, None)
    assert "every seed gave the same, so no interval, `best_fit` +1.0" in sweep.report().verdict


def one_seed(make: Make, tasks: dict[str, tuple[list[float], list[float]]]) -> Sweep:
    """`tasks`: what each item earned with `padding` and with `best_fit`."""
    sweep = make(SWEEP.replace("seed: [1, 2, 3]", "seed: [1]"))
    for cell in sweep.plan.cells:
        for task, (padding, best_fit) in tasks.items():
            items = padding if cell.labels["arm"] == "padding" else best_fit
            sweep.scored(cell, task, sum(items) / len(items), n=len(items), n_total=len(items))
            write_json(sweep.store.items(cell.evals[task]), items)
            sweep.finish_with_files(cell.evals[task])
    return sweep


def test_hard_items_count_as_scatter_between_arms(make: Make) -> None:
    hard_or_easy = [0.0] * 50 + [1.0] * 50
    better = [1.0] * 4 + hard_or_easy[4:]
    group = one_seed(make, {"copy": (hard_or_easy, better), "swap": (hard_or_easy, hard_or_easy)}).group(
        "best_fit"
    )
    found = group.items["copy"]
    assert (found.delta, found.n_items, found.n_seeds) == (pytest.approx(0.04), 100, 1)
    # Four of a hundred differences are 1, so one has a standard deviation of 0.197.
    assert found.high - found.delta == pytest.approx(1.984 * 0.0197, rel=0.002)
    assert found.low > 0, "unpaired, the standard error of the difference would be 0.07"
    assert group.average_items is not None
    assert group.average_items.delta == pytest.approx(0.02)
    assert group.average_items.high - 0.02 == pytest.approx(1.984 * 0.0197 / 2, rel=0.002)
    assert group.interval is None, "one seed says nothing about the arm"


def test_an_interval_over_items_passes_for_one_over_seeds(make: Make) -> None:
    items = ([0.0, 1.0] * 50, [1.0, 1.0] * 30 + [0.0, 1.0] * 20)
    text = shown(one_seed(make, {"copy": items, "swap": items}).report(), 200)
    assert "([+23.6, +36.4])" in text
    assert "nothing about other seeds, and so nothing about the arm" in " ".join(text.split())
    assert "in one seed [of these very models, 95% over test items], `best_fit`" in " ".join(text.split())


def test_items_that_all_tell_the_same_make_a_difference_certain(make: Make) -> None:
    nothing = ([0.0] * 100, [0.0] * 100)
    sweep = one_seed(make, {"copy": nothing, "swap": nothing})
    group = sweep.group("best_fit")
    assert (group.delta, group.items["copy"].low, group.average_items) == (0.0, None, None)
    assert "[0.0, 0.0]" not in shown(sweep.report(), 200)


def scored_by_item(make: Make, given: dict[tuple[str, str, str], list[float] | None]) -> Sweep:
    """Two seeds; `given`: (arm, seed, task) -> what its items earned, None: not scored; else half of them."""
    sweep = make(SWEEP.replace("seed: [1, 2, 3]", "seed: [1, 2]"))
    for cell in sweep.plan.cells:
        for task, id_ in cell.evals.items():
            items = given.get((cell.labels["arm"], cell.labels["seed"], task), [0.0, 1.0] * 50)
            if items is None:
                sweep.store.manifest_file("eval", id_).unlink()
                continue
            sweep.scored(cell, task, sum(items) / len(items), n=len(items), n_total=len(items))
            write_json(sweep.store.items(id_), items)
            sweep.finish_with_files(id_)
    return sweep


def test_a_task_that_the_first_seed_lacks_has_no_difference(make: Make) -> None:
    group = scored_by_item(make, {("best_fit", "1", "copy"): None}).group("best_fit")
    assert group.items["copy"].n_seeds == 1
    assert group.items["swap"].n_seeds == 2


def test_bounds_over_items_are_of_other_models_than_the_difference(make: Make) -> None:
    """Seed 2 has one task only: it is in no average, and what it did there in no bound of one."""
    better = [1.0] * 90 + [0.0] * 10
    given = {("best_fit", "1", "copy"): [0.0, 1.0] * 49 + [1.0, 1.0], ("best_fit", "2", "swap"): None}
    group = scored_by_item(make, {**given, ("best_fit", "2", "copy"): better}).group("best_fit")
    assert (group.n_pairs, group.delta) == (1, pytest.approx(0.005))
    assert group.average_items is not None
    assert group.average_items.delta == pytest.approx(0.005)
    assert group.items["copy"].n_seeds == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0496, "0.0496"), (0.0504, "0.05"), (0.05, "0.05"), (0.049999, "0.049999"), (0.012, "0.012")],
)
def test_a_p_value_is_printed_on_the_other_side_of_the_line(value: float, text: str) -> None:
    assert words.p_value(value) == text
    assert words.p_value(0.0009) == "< 0.001"


def test_an_error_that_is_not_0_is_printed_as_0() -> None:
    assert (words.error(0.0004), words.error(0.0), words.error(0.0123)) == ("0.04", "0.0", "1.2")
    assert (words.loss_error(0.0004), words.loss_error(0.0123)) == ("0.0004", "0.012")
    assert (words.hours(0.0028), words.hours(16.0), words.hours(4.0)) == ("0.0028", "16.0", "4.00")
    assert (words.detectable(5.23), words.detectable(0.0523), words.detectable(None)) == ("> 100", "5.2", "-")


def test_validation_losses_of_unlike_documents_stand_side_by_side_unmarked(make: Make) -> None:
    sweep = make()
    for cell in sweep.plan.cells:
        if cell.labels["arm"] == "best_fit":
            path = sweep.store.manifest_file("train", cell.train)
            write_json(path, read_sealed(path) | {"spec": {"arm": {"validation_after_packing": True}}})
    losses = column(sweep.report(), "scores")["validation loss,\nnats/token"]
    assert [loss.endswith("(own rows)") for loss in losses] == [False, True]
    assert "it compares with no other arm's" in " ".join(shown(sweep.report(), 200).split())


def test_scores_by_two_protocols_stand_side_by_side_unmarked(make: Make) -> None:
    warning = "scored by different protocols or judges: copy, swap"
    assert warning not in shown(make().report(), 200)
    report = make(SWEEP + "  eval.limit: [50, 100]\n").report()
    assert warning in shown(report, 200)
    assert all(len(score.protocols) == 1 for group in report.groups for score in group.eval.values())


def test_verdicts_of_two_judges_stand_side_by_side_unmarked(make: Make) -> None:
    sweep = make()
    for cell in sweep.plan.cells:
        for host in ["a.example"] if cell.labels["arm"] == "padding" else ["b.example"]:
            stated = {"judge_host": host, "judge_says_it_is": ["gpt"]}
            sweep.scored(cell, "swap", 0.5 + int(cell.labels["seed"]) / 100, protocol=stated)
    assert "scored by different protocols or judges: swap" in shown(sweep.report(), 200)


def test_a_label_in_the_verdict_is_markup(make: Make) -> None:
    report = make().report().model_copy(update={"verdict": "Take `a_b|c<d>`, not <script>x</script> or a_b."})
    assert render.markdown(report).endswith("Take `a_b|c<d>`, not \\<script>x\\</script> or a\\_b.\n")


def test_speedup_has_a_part_that_is_not_printed(make: Make) -> None:
    """3 times faster, of which computing fewer slots is not quite 2: the rest is time a slot."""
    group = make().group("best_fit")
    assert group.speedup is not None
    assert group.speedup.cpu_per_slot is not None
    assert group.slot_ratio is not None
    assert group.speedup.cpu == pytest.approx(group.slot_ratio * group.speedup.cpu_per_slot)
    cost = column(make().report(), "cost of training", everything=True)
    assert cost["slots\na step"] == ["160", "165"]
    assert cost["fewer\nslots"] == ["baseline", "1.94x"]
    assert cost["CPU time a slot,\nbaseline's / its"] == ["baseline", "1.53x"]


def test_speedup_divides_seeds_only_one_arm_has(make: Make) -> None:
    sweep = make()
    sweep.store.manifest_file("train", sweep.cell(arm="padding", seed="3").train).unlink()
    speedup = sweep.group("best_fit").speedup
    assert speedup is not None
    assert speedup.n_pairs == 2
    assert speedup.cpu == pytest.approx((30.1 + 30.2) / (10.1 + 10.2))
    assert speedup.cpu_range == pytest.approx((30.2 / 10.2, 30.1 / 10.1))
    assert sweep.group("best_fit").slot_ratio == pytest.approx(6400 / 3300)


NOISE = {1: 0.02, 2: -0.03, 3: 0.02}


def test_a_bound_near_zero_is_rounded_onto_it() -> None:
    assert words.interval((0.0002, 0.03)) == "[+0.02, +3.0]"
    assert words.interval((-0.04, 0.0)) == "[-4.0, 0.0]"


def test_a_sweep_without_tasks_has_no_table_of_its_losses(make: Make) -> None:
    report = make(SWEEP.replace("[copy, swap]", "[]")).report()
    assert {row.state for row in report.rows} == {"done"}
    assert {row.average for row in report.rows} == {None}
    assert "validation loss" in shown(report)


# Formats -----------------------------------------------------------------------------------------------


def test_labels_with_brackets_vanish_or_crash(make: Make) -> None:
    text = SWEEP.replace("best_fit]", "'[x]', '[/y]', 'a|b']")
    text += "arms: {'[x]': {extends: best_fit}, '[/y]': {extends: greedy}, 'a|b': {extends: random}}\n"
    report = make(text).report()
    table, markdown = shown(report), render.markdown(report)
    assert all(label in table for label in ("[x]", "[/y]", "a|b"))
    assert all(label in markdown for label in ("[x]", "[/y]", "a\\|b"))
    for table_ in markdown.split("\n## ")[1:]:
        lines = [line for line in table_.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "[x]" in render.csv_text(report)


def test_case_49_a_partial_run_passes_for_a_full_one(make: Make) -> None:
    sweep = make()
    for cell in sweep.plan.cells:
        sweep.scored(cell, "swap", 0.5, n=20)
    report = sweep.report()
    assert report.rows[0].eval["swap"].partial
    assert not report.rows[0].eval["copy"].partial
    assert "swap\nacc\n(20/100)" in column(report, "scores")
    assert "swap acc (20/100)" in render.markdown(report)
    assert "`swap` n=20 of 100" in report.verdict
    assert "average\n(partial)" in column(report, "scores")
    assert "partial" not in shown(make().report())


def test_case_49_rows_that_could_not_be_scored_make_a_score_that_is_averaged_or_set_against_a_full_one(
    make: Make,
) -> None:
    """One seed of one arm was scored on a machine that lacks something, the others elsewhere."""
    sweep = make(scores=lambda arm, seed: 0.25 + (arm == "best_fit") / 8 + seed / 100)
    full = sweep.group("best_fit")
    for cell in sweep.plan.cells:
        write_json(sweep.store.items(cell.evals["swap"]), [0.0, 1.0] * 50)
        sweep.finish_with_files(cell.evals["swap"])
    lacking = sweep.cell(arm="best_fit", seed="2")
    left_out = {"rows": ["7"], "reason": "1 of 100 prompts needs a splitter", "fix": "fetch the splitter"}
    sweep.scored(lacking, "swap", 0.99, n=99, left_out=left_out)
    write_json(sweep.store.items(lacking.evals["swap"]), [1.0] * 99)
    sweep.finish_with_files(lacking.evals["swap"])
    report, group = sweep.report(), sweep.group("best_fit")
    (row,) = [row for row in report.rows if row.cell == lacking.id]
    assert (row.eval["swap"].n, row.eval["swap"].partial, row.eval["swap"].left_out) == (99, True, True)
    assert (row.average, group.n_seeds, group.left_out) == (None, 2, {"swap": "99/100"})
    assert group.eval["swap"].n_seeds == 2
    assert group.eval["swap"].score == pytest.approx(full.eval["swap"].score)  # the mean of seeds 1 and 3
    assert group.items["swap"].n_items == 100
    flat = " ".join(shown(report, 200).split())
    assert "partial, eval swap: 99 of 100 items scored: 1 of 100 prompts needs a splitter (fetch" in flat
    assert "these are in no average: `swap` 99/100" in report.verdict
    for cell in sweep.plan.cells:
        if cell.labels["arm"] == "best_fit":
            sweep.scored(cell, "swap", 0.99, n=99, left_out=left_out)
    assert "99.0" not in shown(sweep.report())
    scores = column(sweep.report(), "scores")
    assert scores["swap\nacc"][1] == "partial\n99/100"
    assert scores["average"][1] == "partial"


def test_formats_disagree_on_a_number(make: Make) -> None:
    sweep = make(scores=lambda arm, seed: 0.5 + (NOISE[seed] if arm == "best_fit" else seed / 50))
    report = sweep.report()
    document = orjson.loads(render.json_text(report))
    lines = list(csv.DictReader(io.StringIO(render.csv_text(report))))
    assert [line["kind"] for line in lines] == ["cell"] * 6 + ["group"] * 2
    for line, row in zip(lines[:6], document["rows"], strict=True):
        assert line["labels.seed"] == row["labels"]["seed"]
        assert float(line["average (fraction)"]) == row["average"]
        assert float(line["train.cpu_s"]) == row["train"]["cpu_s"]
        assert float(line["eval.copy.score (fraction)"]) == row["eval"]["copy"]["score"]
    best = document["groups"][1]
    assert float(lines[7]["delta (fraction)"]) == best["delta"]
    assert float(lines[7]["interval_high (fraction)"]) == best["interval"][1]
    for text in (render.markdown(report), shown(report)):
        flat = " ".join(text.split())
        assert f"{100 * best['average']:.1f} ± {100 * best['stderr']:.1f}" in flat
        assert f"{100 * best['delta']:+.1f}" in flat
        assert f"[{100 * best['interval'][0]:+.1f}, {100 * best['interval'][1]:+.1f}]" in flat
        assert f"{best['train']['cpu_s']:.1f}" in flat
        assert f"{best['speedup']['cpu']:.1f}x" in flat


def test_a_number_is_cut_off_at_110_columns(make: Make) -> None:
    tasks = [f"tiny_few_shot_{number}" for number in range(8)]
    text = SWEEP.replace("[copy, swap]", f"[{', '.join(tasks)}]")
    text = text.replace("[padding, best_fit]", "[padding, padding_free, random, greedy, best_fit]")
    report = make(text, scores=lambda arm, seed: 0.5 + (NOISE[seed] if arm != "padding" else seed / 50)).report()
    table = shown(report)
    assert "…" not in table
    assert max(len(line) for line in table.splitlines()) <= 110
    assert all(task in table for task in tasks)
    # Each task, the average and the validation loss of five arms; and the legend.
    assert table.count("±") == 5 * (len(tasks) + 2) + 1


def test_a_control_character_reaches_the_terminal(make: Make) -> None:
    sweep = make()
    cell = sweep.cell(arm="best_fit", seed="1")
    sweep.store.manifest_file("train", cell.train).unlink()
    sweep.fail("train", cell.train, "red \x1b[31m text")
    assert "\x1b" not in shown(sweep.report())


# Damage ------------------------------------------------------------------------------------------------


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0", b"9", 1))


@pytest.mark.parametrize("name", ["manifest.json", "results.json", "items.json"])
def test_a_damaged_file_is_averaged_over_or_ends_the_report(make: Make, name: str) -> None:
    sweep = make(scores=lambda arm, seed: 0.5 + seed / 100)
    for cell in sweep.plan.cells:
        for id_ in cell.evals.values():
            write_json(sweep.store.items(id_), [0.0, 1.0] * 50)
            write_json(sweep.store.results(id_), {"results": {}, "of": "lm-eval", "more": "x" * 80})
    lost = sweep.cell(arm="best_fit", seed="2").evals["swap"]
    sweep.finish_with_files(lost)
    torn(sweep.store.directory("eval", lost) / name)
    report = sweep.report()
    (row,) = [row for row in report.rows if row.damaged]
    assert row.labels == {"arm": "best_fit", "seed": "2"}
    assert str(sweep.store.directory("eval", lost) / name) in row.damaged[0]
    assert report.damaged() == list(row.damaged)
    assert (row.state, row.tasks["swap"], row.average, set(row.eval)) == ("failed", "failed", None, {"copy"})
    assert sweep.group("best_fit").eval["swap"].n_seeds == 2
    assert sweep.group("best_fit").n_seeds == 2
    assert f"{lost}/{name}" in shown(report, 400)


def test_results_that_were_changed_by_hand_stay_in_the_table(make: Make) -> None:
    sweep = make()
    lost = sweep.cell(arm="best_fit", seed="2").evals["swap"]
    write_json(sweep.store.results(lost), {"acc": 0.50})
    sweep.finish_with_files(lost)
    assert not sweep.report().damaged()
    changed(sweep.store.results(lost))
    assert "its bytes changed" in sweep.report().damaged()[0]


@pytest.mark.parametrize("score", [7.5, -1.01, "0.5", 0.95])
def test_a_score_that_none_can_be_or_that_was_not_written_is_averaged_over(make: Make, score: object) -> None:
    sweep = make(scores=lambda arm, seed: 0.5 + seed / 100)
    lost = sweep.cell(arm="best_fit", seed="2").evals["swap"]
    write_json(sweep.store.results(lost), {"results": {}, "packcli": {"score": 0.52}})
    sweep.finish_with_files(lost)
    path = sweep.store.manifest_file("eval", lost)
    manifest = read_sealed(path)
    write_json(path, manifest | {"results": manifest["results"] | {"score": score}})
    (row,) = [row for row in sweep.report().rows if row.damaged]
    assert (row.labels, row.tasks["swap"], row.average) == ({"arm": "best_fit", "seed": "2"}, "failed", None)
    assert str(score) in row.damaged[0]


@pytest.mark.parametrize("gone", [True, False], ids=["gone", "changed"])
def test_items_that_nobody_scored_make_an_interval(make: Make, gone: bool) -> None:
    sweep = one_seed(make, {"copy": ([0.0, 1.0] * 50, [1.0, 1.0] * 50)})
    path = sweep.store.items(sweep.cell(arm="best_fit").evals["copy"])
    path.unlink() if gone else write_json(path, [0.0] * 100)
    (row,) = [row for row in sweep.report().rows if row.damaged]
    assert (row.labels["arm"], row.tasks["copy"]) == ("best_fit", "failed")
    assert str(path) in row.damaged[0]


def test_a_manifest_without_what_a_report_needs_is_a_traceback(make: Make) -> None:
    sweep = make()
    cell = sweep.cell(arm="best_fit", seed="2")
    sweep.finish("eval", cell.evals["swap"], {"task": "swap", "score": "high"})
    sweep.finish("index", cell.index, {})
    sweep.finish("train", cell.train, {"steps": "many"})
    (row,) = [row for row in sweep.report().rows if row.damaged]
    assert len(row.damaged) == 3
    assert (row.train, row.ledger, row.average, row.train_state) == (None, None, None, "failed")


# Colours, bold and LaTeX -------------------------------------------------------------------------------


def styles(report: Report) -> dict[str, str]:
    """Of each text in the terminal that has a colour or is bold: how it is shown."""
    console = Console(width=200, file=io.StringIO(), force_terminal=True, color_system="standard")
    lines = console.render_lines(render.table(report), pad=False)
    return {part.text.strip(): str(part.style) for line in lines for part in line if part.style}


def test_a_difference_within_its_interval_is_bold(make: Make) -> None:
    def report(gain: float) -> Report:
        noise = {1: 0.01, 2: -0.01, 3: 0.005}
        return make(scores=lambda arm, seed: 0.5 + (gain + noise[seed] if arm == "best_fit" else 0)).report()

    for gain, style in ((0.2, "bold green"), (-0.2, "bold red"), (0.001, "green")):
        found = report(gain)
        shown_ = words.points(found.groups[1].delta or 0.0)
        assert styles(found)[shown_] == style
        assert (f"**{shown_}**" in render.markdown(found)) == ("bold" in style)
        number = shown_.replace("-", "$-$")
        assert (rf"\textbf{{{number}}}" in render.latex_text(found)) == ("bold" in style)


def test_a_setting_or_a_seed_becomes_a_row_among_arms(make: Make) -> None:
    text = SWEEP.replace("  seed:", "  train.lr: [1e-3, 2e-3]\n  seed:")
    (scores, *_) = sheets.sheets(make(text).report())
    assert [setting for setting, _ in scores.blocks] == ["train.lr=1e-3", "train.lr=2e-3"]
    assert [[row[0].text for row in rows] for _, rows in scores.blocks] == [["padding", "best_fit"]] * 2


def test_health_is_shown_unasked_or_not_when_asked(make: Make) -> None:
    sweep = make()
    for cell in sweep.plan.cells:
        rate = 0.25 if cell.labels["seed"] == "1" else 0.0
        sweep.scored(cell, "swap", 0.5, health={"no_answer": rate, "mean_tokens": 12.0})
    report = sweep.report()
    assert "no_answer" not in shown(report)
    health = column(report, "health", everything=True)
    assert health["swap\nno_answer, %"] == ["8.3", "8.3"]
    assert health["swap\nmean_tokens"] == ["12", "12"]


HOSTILE = ["'[x]'", "'*y'", "'50% & \\up_{a}'", "'~^#$<|>'", "'a`b'"]


def test_latex_takes_a_label_for_a_command(make: Make) -> None:
    names = ", ".join(HOSTILE)
    arms = ", ".join(f"{name}: {{extends: best_fit}}" for name in HOSTILE)
    text = SWEEP.replace("best_fit]", f"{names}]") + f"arms: {{{arms}}}\n"
    source = render.latex_text(make(text).report())
    for line in source.splitlines():
        if line.endswith(r"\\"):
            assert not line.startswith(("[", "*")), "would be read as options of the row before"
    assert latex_problems(source) == []
    for tabular in re.findall(r"\\begin\{tabular\}\{(l r*)\}(.*?)\\end", source.replace("{lr", "{l r"), re.S):
        cells = {len(re.findall(r"(?<!\\)&", line)) for line in tabular[1].splitlines() if "&" in line}
        assert cells == {len(tabular[0]) - 2}


def latex_problems(source: str) -> list[str]:
    """What would stop LaTeX: signs that mean something and are not escaped, groups that do not close."""
    body = "\n".join(line for line in source.splitlines() if not line.startswith("%"))
    plain = re.sub(r"\\[\\{}$&#_%]", "", body)
    found = [sign for sign in "#_^~" if sign in plain]
    depth = 0
    for sign in plain:
        depth += (sign == "{") - (sign == "}")
        if depth < 0:
            found.append("}")
            break
    ends = sorted(re.findall(r"\\end\{(\w+)\}", body))
    return (
        found
        + ["group"] * (depth != 0)
        + ["$"] * (plain.count("$") % 2)
        + ["environment" for _ in [0] if sorted(re.findall(r"\\begin\{(\w+)\}", body)) != ends]
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)")
def test_latex_does_not_compile(make: Make, tmp_path: Path) -> None:
    names = ", ".join(HOSTILE)
    arms = ", ".join(f"{name}: {{extends: best_fit}}" for name in HOSTILE)
    text = SWEEP.replace("best_fit]", f"{names}]") + f"arms: {{{arms}}}\n"
    (tmp_path / "report.tex").write_text(render.latex_text(make(text).report()))
    main = r"\documentclass{article}\usepackage{booktabs,graphicx}\begin{document}\input{report}\end{document}"
    (tmp_path / "main.tex").write_text(main)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


# The command -------------------------------------------------------------------------------------------


def test_a_damaged_file_ends_strict_as_if_all_were_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--strict` prints the table all the same, names the file, and exits 4; without it the exit status is 0."""
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(SWEEP.replace("[copy, swap]", "[tiny_copy]"))
    store = Store(Path("runs"))
    made = stages.make_plan(sweepfile.load(Path("sweep.yaml")), store)
    damaged = store.manifest_file("eval", made.cells[0].evals["tiny_copy"])
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"stage": "ev')

    def run(*flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["packcli", "report", "sweep.yaml", *flags])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, err = run()
    assert code == 0
    assert str(damaged) in "".join(out.split())
    code, out, err = run("--strict", "--json")
    assert code == 4
    assert orjson.loads(out)["rows"][0]["damaged"]
    assert err.startswith(f"error: {damaged}: damaged, or cut short\n\nhint: ")
    assert run("--strict", "--against", "paper", "--format", "latex")[0] == 4
