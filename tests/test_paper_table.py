"""The paper's numbers as shipped, checked by their own arithmetic; and what a report sets beside them.

Our own numbers here are made up: nothing was trained.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from rich.console import Console

from packcli import papersteps, sweepfile
from packcli.files import write_json
from packcli.plan import Plan, needed, plan
from packcli.report import paper, render, rows
from packcli.report.records import Report
from packcli.store import Manifest, Store, records

SIX = paper.SCORES[:6]
BATCH = {"llama3_8b": 128, "llama3_70b": 64}


def printed() -> Iterator[tuple[str, str, str, dict[str, float]]]:
    for model in papersteps.models():
        for dataset in papersteps.datasets():
            for arm in ("padding", "random", "greedy"):
                yield model, dataset, arm, paper._printed(model, dataset, arm)


def marked(measure: str) -> set[tuple[str, str, str]]:
    return {(m, d, a) for m, d, a, _ in printed() if paper._marks(m, d, a, measure)}


# What is shipped ---------------------------------------------------------------------------------------


def test_a_cell_of_the_paper_is_missing() -> None:
    cells = list(printed())
    assert len(cells) == 24
    columns = {*paper.SCORES, "steps", "steps_per_s", "samples_per_s", "total_time_s"}
    assert all(set(values) == columns for *_, values in cells)


def test_a_score_was_mistyped() -> None:
    """All 24 printed averages are the mean of their six scores, to the last decimal that is printed."""
    for model, dataset, arm, values in printed():
        mean = sum(values[task] for task in SIX) / 6
        assert mean == pytest.approx(values["average"], abs=0.0051), (model, dataset, arm)


def test_a_rate_was_mistyped() -> None:
    """rows/s = steps/s x rows a step, as far as three decimals go, but for four cells whose columns disagree."""
    apart = set()
    for model, dataset, arm, values in printed():
        rate = values["samples_per_s"] / BATCH[model]
        assert 0.9 < rate / values["steps_per_s"] < 1.2
        if abs(rate / values["steps_per_s"] - 1) > 0.03:
            apart.add((model, dataset, arm))
    assert apart == marked("steps_per_s")
    assert apart == {("llama3_70b", d, a) for d in ("wildchat", "open_source_1m") for a in ("padding", "random")}


def test_a_time_was_mistyped() -> None:
    """Each printed time is about ten times below steps over steps/s; in 19 of 24 cells to within 2.5%."""
    below = {
        (model, dataset, arm): values["steps"] / values["steps_per_s"] / values["total_time_s"]
        for model, dataset, arm, values in printed()
    }
    assert all(8 < ratio < 11.5 for ratio in below.values())
    assert marked("total_time_s") == set(below), "every printed time is marked"
    exact = [key for key, ratio in below.items() if abs(ratio - 10) < 0.25]
    assert len(exact) == 19


def test_a_score_that_is_no_share_of_the_items_goes_unmarked() -> None:
    """26 cells: every padding baseline of WildChat and of Open-source 1M is there, and no 8B greedy cell."""
    found = [(cell, task) for task in SIX for cell in marked(task)]
    odd = [(m, d, a, task) for (m, d, a), task in found if paper.NO_FRACTION in paper._marks(m, d, a, task)]
    assert len(odd) == 26
    assert {(m, d) for m, d, a, _ in odd if a == "padding"} >= {
        (m, d) for m in papersteps.models() for d in ("wildchat", "open_source_1m")
    }
    assert not any(a == "greedy" for m, _, a, _ in odd if m == "llama3_8b")


def test_a_share_of_the_items_is_called_none() -> None:
    assert all(paper.is_fraction(round(100 * k / 164, 2), 164) for k in range(165))
    assert not paper.is_fraction(44.24, 164)


def test_a_change_that_the_scores_do_not_give_goes_unmarked() -> None:
    for change in paper._reference().changes:
        own, base = (paper._printed(change.model, change.dataset, arm) for arm in (change.arm, "padding"))
        given = own[change.task] - base[change.task]
        assert abs(given - float(change.printed)) > 0.015
        assert any(
            change.printed in mark for mark in paper._marks(change.model, change.dataset, change.arm, change.task)
        )


def test_steps_that_no_number_of_epochs_gives_go_unmarked() -> None:
    assert marked("steps") == {("llama3_8b", "tulu", "padding")}


# Beside ours -------------------------------------------------------------------------------------------

SWEEP = """
name: ours
model: {name: %s}
data: {template: llama3, max_length: 4096, validation: 0.1}
train: {epochs: 4, lr: 1e-5, global_batch: 128, micro_batch: 2}
eval: {tasks: [mmlu, gsm8k, math, bbh, ifeval, humaneval, wildbench]}
matrix:
  data.source: [%s]
  arm: [padding_released, greedy_released, best_fit]
  seed: [1, 2]
"""
LLAMA = "meta-llama/Meta-Llama-3-8B"


def finished(
    directory: Path, model: str = LLAMA, sets: str = "tulu", n: int = 100, text: str = SWEEP
) -> tuple[Plan, Report]:
    """A sweep with made-up results: padding scores 50 on everything, other arms 51 on mmlu and 49 on the rest."""
    file = directory / "sweep.yaml"
    file.write_text(text % (model, sets))
    spec = sweepfile.load(file)
    made, store = plan(spec, {key: f"of {key}" for key in needed(spec)}), Store(directory / "runs")

    def finish(kind: str, id_: str, results: dict[str, object]) -> None:
        manifest = Manifest(
            stage=kind,
            id=id_,
            version=1,
            spec={},
            inputs={},
            outputs=records(store.directory("eval", id_)) if kind == "eval" else {},
            results=results,
            provenance={},  # type: ignore[arg-type]
        )
        write_json(store.manifest_file(kind, id_), manifest.model_dump())  # type: ignore[arg-type]

    for cell in made.cells:
        padding = cell.labels["arm"] == "padding_released"
        steps = 9176 if padding else 1956
        finish("index", cell.index, {"ledger": {"rows": steps * 32, "slots": 100, "efficiency": 1.0}})
        trained = {"steps": steps, "wall_s": steps / 0.1, "tokens": 400, "slots": 400, "device": "cuda"}
        finish("train", cell.train, trained | {"processes": 1, "threads": 1})
        for task, id_ in cell.evals.items():
            right = 50 if padding else 51 if task == "mmlu" else 49
            score = {"metric": "acc", "score": right / 100, "n": n, "n_total": 100}
            write_json(store.items(id_), [1.0] * right + [0.0] * (100 - right))
            finish("eval", id_, {"task": task, **score})
    return made, rows.collect(made, store)


def numbers(found: paper.Against, arm: str) -> dict[str, paper.Number]:
    return {one.measure: one for one in found.numbers if one.labels["arm"] == arm}


def terminal(report: Report, against: paper.Against, width: int = 400) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(render.table(report, against))
    return console.export_text()


def test_a_number_stands_beside_another_cells(tmp_path: Path) -> None:
    made, report = finished(tmp_path)
    found = paper.compare(made, report)
    greedy, padding = numbers(found, "greedy_released"), numbers(found, "padding_released")
    assert not numbers(found, "best_fit"), "the paper has none"
    assert (greedy["mmlu"].paper, greedy["mmlu"].ours) == (0.6214, 0.51)
    assert greedy["mmlu"].difference == pytest.approx(-0.1114)
    assert greedy["mmlu"].paper_change == pytest.approx(-0.0012)
    assert greedy["mmlu"].our_change == pytest.approx(0.01)
    assert (padding["mmlu"].paper_change, padding["mmlu"].our_change) == (None, None)
    assert (greedy["average"].paper, greedy["average"].ours) == (0.4831, pytest.approx((0.51 + 5 * 0.49) / 6))
    assert (greedy["wildbench"].paper, greedy["wildbench"].ours) == (0.2073, 0.49)
    assert (padding["steps"].paper, padding["steps"].ours, padding["steps"].difference) == (9183, 9176, -7)
    assert greedy["speedup"].ours == pytest.approx(9176 / 1956)
    assert greedy["speedup"].paper == pytest.approx((9183 / 0.165) / (1956 / 0.147))
    assert padding["samples_per_s"].ours == pytest.approx(12.8)


def test_changes_against_another_baseline_pass_for_those_against_padding(tmp_path: Path) -> None:
    made, report = finished(tmp_path, text=SWEEP.replace("matrix:", "baseline: best_fit\nmatrix:"))
    greedy = numbers(paper.compare(made, report), "greedy_released")
    assert report.baseline == "best_fit"
    assert {one.our_change for one in greedy.values()} == {None}
    assert greedy["mmlu"].ours == 0.51
    assert greedy["speedup"].ours is None


def test_an_average_of_other_tasks_stands_beside_the_papers(tmp_path: Path) -> None:
    made, report = finished(tmp_path, text=SWEEP.replace("tasks: [", "tasks: [needle_4k, "))
    greedy = numbers(paper.compare(made, report), "greedy_released")
    assert (greedy["average"].ours, greedy["average"].our_change) == (None, None)
    assert greedy["mmlu"].ours == 0.51


def test_seconds_or_rates_of_unlike_machines_are_subtracted(tmp_path: Path) -> None:
    made, report = finished(tmp_path)
    found = paper.compare(made, report)
    for one in found.numbers:
        if one.measure in ("total_time_s", "steps_per_s", "samples_per_s"):
            assert one.difference is None
        if one.measure == "total_time_s":
            assert one.ours is None
    text = " ".join(terminal(report, found).split())
    assert paper.PRINTED_TIMES in text
    assert "11.3 times below what its step rate gives" in text
    assert "protocol and hardware are not ours: compare the direction" in text
    assert "9,183 steps is no multiple of 4 epochs" in text
    assert paper.NO_FRACTION in text


def test_directions_are_counted_over_cells_without_one(tmp_path: Path) -> None:
    """Greedy on TULU at 8B: mmlu fell, the other five and WildBench rose; ours does the opposite of each."""
    made, report = finished(tmp_path)
    assert "ours changes the paper's way in 0 of 7 scores" in " ".join(paper.compare(made, report).legend())


def test_a_part_of_the_items_is_set_against_the_paper(tmp_path: Path) -> None:
    made, report = finished(tmp_path, n=20)
    found = numbers(paper.compare(made, report), "greedy_released")
    assert all(found[task].ours is None and found[task].difference is None for task in paper.SCORES)
    assert any("part of the test items" in mark for mark in found["mmlu"].marks)


def test_other_runs_pass_for_the_papers(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    made, report = finished(tmp_path / "a", text=SWEEP.replace("epochs: 4", "epochs: 1"))
    assert "llama3_8b has 1 epochs, not 4" in " ".join(paper.compare(made, report).legend())
    for number, (model, sets) in enumerate([(f"{LLAMA}-Instruct", "tulu"), (LLAMA, "chats.jsonl")]):
        (tmp_path / str(number)).mkdir()
        made, report = finished(tmp_path / str(number), model, sets)
        found = paper.compare(made, report)
        assert found.numbers == ()
        (line,) = found.legend()
        assert "none of these cells has a counterpart" in line
        assert line in " ".join(terminal(report, found).split())


def test_a_format_leaves_the_paper_out(tmp_path: Path) -> None:
    made, report = finished(tmp_path)
    found = paper.compare(made, report)
    document = orjson.loads(render.json_text(report, found))
    assert len(document["against"]["numbers"]) == len(found.numbers) == 25
    assert "against" not in orjson.loads(render.json_text(report))
    lines = [
        line for line in csv.DictReader(io.StringIO(render.csv_text(report, found))) if line["kind"] == "paper"
    ]
    assert [float(line["paper"]) for line in lines] == [one.paper for one in found.numbers]
    for text in (render.markdown(report, found), render.latex_text(report, found), terminal(report, found)):
        assert "62.14" in text
