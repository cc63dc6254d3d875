"""What the verdict must not claim. Plans are real; what their cells are said to have done is made up."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packcli import sweepfile
from packcli.plan import Cell, Plan, needed, plan
from packcli.report import groups, verdict, words
from packcli.report.records import Group, Row, Score, Train

SWEEP = """
name: demo
model: {config: {model_type: llama}, tokenizer: train, vocab_size: 300}
data: {source: chats.jsonl, max_length: 64}
train: {epochs: 2, lr: 1e-3, global_batch: 8}
eval: {tasks: [gsm8k]}
matrix:
  arm: [padding, padding_free, best_fit]
  seed: [1, 2, 3, 4, 5]
"""
SCATTER = {1: 0.006, 2: -0.008, 3: 0.002, 4: 0.004, 5: -0.004}
LEDGER = {
    "tokens_kept": 1000,
    "tokens_truncated": 0,
    "tokens_dropped": 0,
    "documents_kept": 80,
    "documents_cut": 0,
}
TRAINED: dict[str, Any] = dict.fromkeys(Train.model_fields) | {
    **{"steps": 20, "cpu_s": 30.0, "wall_s": 15.0, "slots": 4000, "tokens": 2000, "documents": 160},
    **{"random_weights": False, "own_validation": False, "device": "cpu", "processes": 1, "threads": 1},
}
SCORED = {"metric": "acc", "stderr": 0.01, "n": 100, "n_total": 100, "partial": False, "left_out": False}
SCORED |= {"version": 1, "health": {}, "protocol": "0"}


def row(cell: Cell, score: float | None = None, ledger: dict[str, float] | None = None, **train: Any) -> Row:
    """A finished cell; without a score it only trained, and `steps=None` not even that."""
    done = train.get("steps", 1) is not None
    trained = Train(**(TRAINED | train)) if done else None
    scores = {} if score is None else {task: Score(score=score, **SCORED) for task in cell.evals}
    states = {"state": "done", "train_state": "done", "tasks": dict.fromkeys(cell.evals, "done")}
    if score is None and cell.evals:
        states = {"state": "pending", "train_state": "done" if done else "pending"}
        states["tasks"] = dict.fromkeys(cell.evals, "pending")
    known = {
        "labels": cell.labels,
        "cell": cell.id,
        "ids": {"train": cell.train},
        "eval": scores,
        "average": score,
    }
    known |= {"train": trained, "ledger": LEDGER | (ledger or {}) if done else None, **states}
    absent = {"failures": (), "probes": None, "physics": (), "damaged": ()}
    return Row(**{name: (known | absent)[name] for name in Row.model_fields})


class Told:
    """A report's verdict, made of what `tell` says of each cell."""

    def __init__(self, text: str, tell: Callable[[Cell], Row], directory: Path) -> None:
        file = directory / "sweep.yaml"
        file.write_text(text)
        spec = sweepfile.load(file)
        self.plan: Plan = plan(spec, {key: f"fingerprint of {key}" for key in needed(spec)})
        self.rows = [tell(cell) for cell in self.plan.cells]
        self.groups = groups.pool(self.rows, self.plan.baseline, lambda row, task: None)
        self.text = verdict.write(self.plan, self.rows, self.groups)

    def group(self, arm: str) -> Group:
        (found,) = [group for group in self.groups if group.arm == arm]
        return found


Tell = Callable[..., Told]


@pytest.fixture
def told(tmp_path: Path) -> Tell:
    """`told(scores, text, seconds=...)`: both are functions of (arm, seed); a score of None is not there."""

    def build(
        scores: Callable[[str, int], float | None],
        text: str = SWEEP,
        *,
        seconds: Callable[[str, int], float] = lambda arm, seed: 30.0 if arm == "padding" else 10.0 + seed / 100,
        more: Callable[[str], dict[str, Any]] = lambda arm: {},
    ) -> Told:
        def tell(cell: Cell) -> Row:
            arm, seed = cell.labels["arm"], int(cell.labels["seed"])
            time = seconds(arm, seed)
            return row(cell, scores(arm, seed), **{"cpu_s": time, "wall_s": time} | more(arm))

        return Told(text, tell, tmp_path)

    return build


def with_effect(**effects: float) -> Callable[[str, int], float]:
    """Scores with an effect of an arm, scatter of its own, and a far larger one of seeds that arms share."""

    def score(arm: str, seed: int) -> float:
        own = 0 if arm == "padding" else SCATTER[seed] * (1 if arm == "best_fit" else -1.2)
        return 0.4 + seed / 50 + own + effects.get(arm, 0.0)

    return score


def paragraphs(text: str) -> list[str]:
    return text.split("\n")


def sentences(paragraph: str) -> list[str]:
    return re.findall(r"[^.]+(?:\.\S[^.]*)*\.", paragraph)


# Which arm ---------------------------------------------------------------------------------------------


def test_an_arm_is_taken_for_scores_of_a_single_seed(told: Tell) -> None:
    one = SWEEP.replace("[1, 2, 3, 4, 5]", "[1]")
    text = told(with_effect(best_fit=0.2, padding_free=-0.2), one).text
    assert text.startswith("Not settled: one seed")
    assert "in one seed, `padding_free` -20.7 and `best_fit` +20.6" in text
    for claim in ("Take ", "shown to be higher", "shown to be lower", "Stay with"):
        assert claim not in text
    assert "`padding` took 3.0x (one seed) the CPU time" in text


def test_no_difference_shown_is_called_the_same_and_hides_what_could_be_lost(told: Tell) -> None:
    made = told(with_effect())
    group = made.group("best_fit")
    assert group.interval is not None
    assert group.detectable is not None
    assert group.interval[0] < 0 < group.interval[1]
    best = made.group("padding_free")
    assert best.detectable is not None
    # The faster of two for which no difference was shown, though by a hair.
    assert made.text.startswith("Take `padding_free` if a loss of ") or made.text.startswith(
        "Take `best_fit` if a loss of "
    )
    taken = made.group(made.text.split("`")[1])
    assert taken.interval is not None
    assert f"a loss of {-100 * taken.interval[0]:.1f} points would do" in made.text
    assert "no difference shown, `padding_free`" in made.text
    effects = sorted([group.detectable, best.detectable])
    size = f"{100 * effects[0]:.1f} to {100 * effects[1]:.1f} points, by arm,"
    assert f"a true difference of {size} is found 4 times in 5, a smaller one less often" in made.text
    for claim in ("the same", "equally", "as good", "shown to be higher", "shown to be lower"):
        assert claim not in made.text


def test_a_difference_goes_without_its_interval_or_stands_uncorrected(told: Tell) -> None:
    made = told(with_effect(best_fit=0.05))
    group = made.group("best_fit")
    assert group.p is not None
    assert group.p_holm is not None
    assert group.p_holm == pytest.approx(2 * group.p)
    assert made.text.startswith("Take `best_fit`: its average score is above `padding`'s.")
    pattern = r"shown to be higher, `best_fit` \+5\.0 \[\+4\.\d, \+5\.\d\] \(p (< )?0\.00\d* by Holm\)"
    assert re.search(pattern, made.text)
    assert "no difference shown, `padding_free`" in made.text


def test_an_interval_without_zero_is_claimed_though_many_were_looked_at(told: Tell) -> None:
    """Of 8 comparisons one has an interval just above 0, as chance alone makes them."""
    arms = ", ".join(["padding", "best_fit", *(f"a{n}" for n in range(7))])
    text = SWEEP.replace("[padding, padding_free, best_fit]", f"[{arms}]")
    text += "arms: {" + ", ".join(f"a{n}: {{extends: padding_free, loss: row}}" for n in range(7)) + "}\n"
    made = told(with_effect(best_fit=0.009), text)
    group = made.group("best_fit")
    assert group.interval is not None
    assert group.p is not None
    assert group.p_holm is not None
    assert group.interval[0] > 0
    assert group.p < 0.05 < group.p_holm
    assert "shown to be higher" not in made.text
    assert f"`best_fit` {words.points(0.009)} {words.interval(group.interval)} (p" in made.text
    assert f"(p {group.p:.2g} by itself, {group.p_holm:.2g} over 8 comparisons)" in made.text


def test_a_slower_or_lower_arm_is_taken(told: Tell) -> None:
    below = told(with_effect(best_fit=-0.05, padding_free=-0.06)).text
    assert below.startswith("Stay with `padding`: every other arm scored below it.")
    assert "shown to be lower, `padding_free` -6.0" in below
    slower = told(with_effect(), seconds=lambda arm, seed: 30.0 if arm == "padding" else 40.0).text
    assert slower.startswith("Stay with `padding`: no arm was shown to score above it or to cost less.")
    assert "`padding` itself was fastest; next was" in slower
    both = told(with_effect(best_fit=-0.05), seconds=lambda arm, seed: 10.0 if arm == "best_fit" else 30.0).text
    assert both.startswith(
        "Stay with `padding`: no arm was shown to score above it or, of those not shown to score"
    )
    assert "`best_fit` was fastest: `padding` took 3.0x" in both


def test_the_faster_arm_is_taken_over_the_better_one(told: Tell) -> None:
    times = {"padding": 30.0, "padding_free": 5.0, "best_fit": 60.0}
    text = told(with_effect(best_fit=0.05), seconds=lambda arm, seed: times[arm]).text
    assert text.startswith("Take `best_fit`: its average score is above")
    assert "`padding` took 0.50x (0.50x to 0.50x over 5 seeds) the CPU time of `best_fit`" in text
    assert "fastest was `padding_free` (6.0x)" in text


def test_an_arm_that_scores_alike_in_every_seed_counts_as_unknown(told: Tell) -> None:
    def scores(arm: str, seed: int) -> float:
        return with_effect()("padding" if arm == "padding_free" else arm, seed)

    text = told(scores, more=lambda arm: {"validation_loss": 1.5 if arm == "best_fit" else 1.25}).text
    assert text.startswith(
        "Take `padding_free`: it scored as `padding` did in each of 5 seeds, with a validation loss"
    )
    assert "0 in every seed, `padding_free`" in text
    steady = told(lambda arm, seed: seed / 50 + 0.01 * (arm != "padding")).text
    assert steady.startswith("Not settled: without scatter between seeds")
    assert "every seed gave the same, so no interval, `padding_free` +1.0 and `best_fit` +1.0" in steady


def test_models_that_cannot_do_the_task_at_all_are_called_alike(told: Tell) -> None:
    """Seen in a cut-down sweep: every model scored 0, and the fastest arm was taken for it."""
    losses = {"padding": 1.2, "padding_free": 1.3, "best_fit": 1.9}
    text = told(lambda arm, seed: 0.0, more=lambda arm: {"validation_loss": losses[arm]}).text
    assert text.startswith("Not settled: without scatter between seeds")
    assert "Take" not in text
    assert told(lambda arm, seed: 0.0).text.startswith("Not settled")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[padding, padding_free, best_fit]", "[padding_free, best_fit]"), "The sweep names no `baseline` arm"),
        (("[padding, padding_free, best_fit]", "[padding]"), "There is no arm besides `padding` here"),
    ],
)
def test_something_is_compared_with_nothing(told: Tell, change: tuple[str, str], says: str) -> None:
    text = told(with_effect(), SWEEP.replace(*change)).text
    assert text.startswith(says)
    assert text.endswith("so nothing is compared.")


def test_a_sweep_that_has_not_run_has_a_winner(told: Tell) -> None:
    text = told(lambda arm, seed: None, more=lambda arm: {"steps": None}).text
    scope, answer = paragraphs(text)
    assert scope == "15 of 15 cells are not done (15 pending)."
    assert answer.startswith("Not settled: no seed is scored in an arm and in the baseline.")
    assert "no finished training to set against `padding` yet" in answer
    assert "x " not in answer


def test_failed_cells_are_passed_over(told: Tell) -> None:
    made = told(lambda arm, seed: None if arm == "best_fit" and seed > 1 else with_effect()(arm, seed))
    assert paragraphs(made.text)[0].startswith("4 of 15 cells are not done (4 pending); what follows is about")
    assert made.group("best_fit").interval is None
    assert "in one seed, `best_fit` +0.6" in made.text
    assert "no difference shown, `padding_free`" in made.text
    assert "no difference shown, `padding_free` and" not in made.text


def test_a_sweep_without_tasks_claims_something_of_quality(told: Tell) -> None:
    text = told(lambda arm, seed: None, SWEEP.replace("[gsm8k]", "[]")).text
    assert text.startswith("By cost alone: nothing is evaluated")
    assert "verage score" not in text
    assert "was fastest" in text


# At what cost ------------------------------------------------------------------------------------------


def test_speed_within_the_spread_of_seeds_is_claimed(told: Tell) -> None:
    text = told(with_effect(), seconds=lambda arm, seed: 30.0 + (seed - 3 if arm == "padding" else 0)).text
    assert "no arm is clearly faster than `padding`" in text
    assert text.startswith("Stay with `padding`")


def test_times_of_unlike_machines_are_compared(told: Tell) -> None:
    text = told(with_effect(), more=lambda arm: {"threads": 8 if arm == "best_fit" else 1}).text
    assert "times are not compared" in text
    assert "faste" not in text
    assert text.startswith("Stay with `padding`")


def test_gpu_hours_are_of_one_gpu_or_of_an_unknown_one(told: Tell) -> None:
    one = {"device": "NVIDIA H100 80GB HBM3", "processes": 8}

    def seconds(arm: str, seed: int) -> float:
        return 7200.0 if arm == "padding" else 1800.0

    text = told(with_effect(), seconds=seconds, more=lambda arm: one).text
    assert "the wall time of" in text
    assert "16.0 GPU-hours a run against 4.00 (NVIDIA H100 80GB HBM3)" in text
    assert "CPU time" not in text


def test_the_mean_time_is_not_that_of_the_seeds_compared(told: Tell) -> None:
    """One seed of the baseline is missing: a mean over the other arm's five is no counterpart of four."""

    def tell(cell: Cell) -> Row:
        missing = cell.labels == {"arm": "padding", "seed": "5"}
        return row(cell, None if missing else 0.5, cpu_s=10.0, **({"steps": None} if missing else {}))

    assert "s a run against" not in told_by(told, tell)


def told_by(told: Tell, tell: Callable[[Cell], Row]) -> str:
    """`told` for cells that differ in more than arm and seed say."""
    made = told(with_effect())
    rows = [tell(cell) for cell in made.plan.cells]
    return verdict.write(made.plan, rows, groups.pool(rows, made.plan.baseline, lambda row, task: None))


def test_time_is_put_down_to_fewer_slots_alone(told: Tell) -> None:
    def more(arm: str) -> dict[str, Any]:
        return {"slots": 8000} if arm == "padding" else {}

    text = told(with_effect(), seconds=lambda arm, seed: 15.0 if arm == "padding" else 10.0, more=more).text
    assert "for 2.0x its slots (a slot took 1.33x as long in `" in text
    even = told(with_effect(), seconds=lambda arm, seed: 20.0 if arm == "padding" else 10.0, more=more).text
    assert "for 2.0x its slots; not clearly behind" in even


def test_the_budget_is_left_out_or_named_by_an_arm_to_which_it_means_nothing(told: Tell) -> None:
    assert "At 8 rows a step for 2 epochs, " in told(with_effect()).text
    by = SWEEP.replace("global_batch: 8", "global_batch: 8, batch_unit: documents")
    assert "At 8 documents a step for 2 epochs, " in told(with_effect(), by).text
    steps = SWEEP.replace("epochs: 2", "steps: 70")
    assert "At 8 rows a step for 70 steps, " in told(with_effect(), steps).text


# What confounds it -------------------------------------------------------------------------------------


def test_fewer_steps_larger_batches_and_lost_tokens_go_unmentioned(told: Tell) -> None:
    def more(arm: str) -> dict[str, Any]:
        if arm != "best_fit":
            return {}
        return {"steps": 10, "ledger": {"tokens_dropped": 30, "tokens_truncated": 20, "tokens_kept": 950}}

    text = told(with_effect(), more=more).text
    assert "The score of `best_fit` is not packing's own effect, for more than the layout differs" in text
    assert ": optimizer steps (`padding` 20, `best_fit` 10); " in text
    assert "documents a step (`padding` 8, `best_fit` 16); " in text
    assert "tokens truncated or dropped (`padding` 0.0%, `best_fit` 5.0%)" in text
    assert "more than the layout" not in told(with_effect()).text


def test_attention_across_and_another_loss_go_unmentioned(told: Tell) -> None:
    text = SWEEP.replace("[padding, padding_free, best_fit]", "[padding, random, longalign]")
    found = told(lambda arm, seed: with_effect()("best_fit" if arm != "padding" else arm, seed), text).text
    assert "attention across documents (in `random`)" in found
    assert "what the loss is a mean over (`padding` by token, `longalign` by document)" in found
    cut = told(with_effect(), more=lambda arm: {"ledger": {"documents_cut": 20 if arm == "best_fit" else 0}}).text
    assert "documents cut over rows (`padding` 0.0%, `best_fit` 25.0%)" in cut


def test_a_learning_rate_at_the_edge_of_its_grid_passes_for_the_best(told: Tell) -> None:
    text = SWEEP.replace("  seed:", "  train.lr: [4e-3, 1e-3, 2e-3]\n  seed:")
    losses = {
        "padding": {"1e-3": 1.3, "2e-3": 1.1, "4e-3": 1.2},
        "padding_free": {"1e-3": 1.0, "2e-3": 1.1, "4e-3": 1.2},
        "best_fit": {"1e-3": 1.3, "2e-3": 1.2, "4e-3": 1.1},
    }

    def tell(cell: Cell) -> Row:
        loss = losses[cell.labels["arm"]][cell.labels["train.lr"]]
        return row(cell, with_effect()(cell.labels["arm"], int(cell.labels["seed"])), validation_loss=loss)

    made = told(with_effect(), text)
    rows = [tell(cell) for cell in made.plan.cells]
    found = verdict.write(made.plan, rows, groups.pool(rows, made.plan.baseline, lambda row, task: None))
    *settings, edges = paragraphs(found)
    assert len(settings) == 3
    assert edges == (
        "At the edge of the learning rates tried (1e-3, 2e-3, 4e-3; by validation loss), and so maybe not at its "
        "best: `padding_free` at the lowest, 1e-3 and `best_fit` at the highest, 4e-3."
    )
    (high,) = [paragraph for paragraph in settings if paragraph.startswith("`train.lr=4e-3`: ")]
    assert (
        "how well the learning rate fits (`padding` does best at 2e-3, `padding_free` does best at 1e-3)" in high
    )
    assert "learning rate" not in told(with_effect()).text


def test_a_rate_is_best_by_seeds_that_the_others_lack(told: Tell) -> None:
    """Seed 1 is easy; the middle rate has no other yet."""
    text = SWEEP.replace("  seed:", "  train.lr: [1e-3, 2e-3, 4e-3]\n  seed:")
    made = told(with_effect(), text)
    rows = []
    for cell in made.plan.cells:
        rate, seed = cell.labels["train.lr"], int(cell.labels["seed"])
        loss = {"1e-3": 1.0, "2e-3": 1.1, "4e-3": 1.2}[rate] + seed
        late = rate == "2e-3" and seed > 1
        found = row(cell, with_effect()(cell.labels["arm"], seed), validation_loss=None if late else loss)
        rows.append(found.model_copy(update={"average": None}) if late else found)
    pooled = groups.pool(rows, made.plan.baseline, lambda row, task: None)
    (edges,) = [
        line for line in paragraphs(verdict.write(made.plan, rows, pooled)) if line.startswith("At the edge")
    ]
    assert "`best_fit` at the lowest, 1e-3" in edges


def test_another_order_or_peak_rate_goes_unmentioned(told: Tell) -> None:
    text = SWEEP.replace("best_fit]", "sorted]")
    found = told(with_effect(), text).text
    assert "the order of conversations (`padding` shuffled, `sorted` " in found


# Where the numbers come from ---------------------------------------------------------------------------


def test_a_toy_passes_for_a_finding_and_real_data_for_synthetic(told: Tell) -> None:
    tiny = SWEEP.replace("chats.jsonl", "tiny")
    text = told(with_effect(), tiny, more=lambda arm: {"random_weights": True}).text
    assert paragraphs(text)[0].startswith("Toy model on synthetic data: what holds here need not hold for a real")
    assert "random weights" in paragraphs(text)[0]
    assert "ynthetic" not in told(with_effect()).text
    assert "random" not in told(with_effect()).text


def test_numbers_that_cannot_be_true_go_into_a_verdict_without_a_word(told: Tell) -> None:
    def tell(cell: Cell) -> Row:
        wrong = ("an MFU of 4.1",) if cell.labels == {"arm": "best_fit", "seed": "2"} else ()
        return row(cell, 0.5).model_copy(update={"physics": wrong})

    found = told_by(told, tell)
    assert paragraphs(found)[0] == (
        "The numbers of some trainings cannot be true, nor what follows from them: arm=best_fit, seed=2."
    )


# Its shape ---------------------------------------------------------------------------------------------


def test_a_setting_takes_more_than_five_sentences_or_a_line_of_its_own_each(told: Tell) -> None:
    text = SWEEP.replace("[padding, padding_free, best_fit]", "[padding, padding_free, random, greedy, longalign]")
    text = text.replace("  seed:", "  train.batch_unit: [rows, documents]\n  seed:")

    def scores(arm: str, seed: int) -> float | None:
        effects = {"random": 0.05, "greedy": -0.05, "padding_free": 0.0}
        if arm == "longalign" and seed > 1:
            return None
        return with_effect()("best_fit" if arm != "padding" else arm, seed) + effects.get(arm, 0.0)

    _, *found = paragraphs(told(scores, text, more=lambda arm: {"steps": 5 if arm == "random" else 20}).text)
    assert len(found) == 2
    for paragraph in found:
        assert len(sentences(paragraph)) == 5
        assert len(paragraph) < 1300


def test_hundreds_of_settings_fill_hundreds_of_lines(told: Tell) -> None:
    many = ", ".join(str(8 * number) for number in range(1, 41))
    text = SWEEP.replace("  seed:", f"  train.global_batch: [{many}]\n  seed:")
    found = paragraphs(told(with_effect(best_fit=0.2), text).text)
    assert len(found) == 1 + verdict.MOST_SETTINGS
    assert found[0].startswith("Of 40 settings: `best_fit` in 40; the first 12 of them follow")


def test_a_label_is_taken_for_markup_or_control(told: Tell) -> None:
    text = SWEEP.replace("padding_free, best_fit", '"a\\u001b[31m"')
    text += 'arms: {"a\\u001b[31m": {extends: best_fit}}\n'
    assert (
        "\x1b"
        not in told(lambda arm, seed: with_effect()("best_fit" if arm != "padding" else arm, seed), text).text
    )


def test_the_scatter_of_these_tests_is_what_they_say() -> None:
    assert math.isclose(sum(SCATTER.values()), 0.0, abs_tol=1e-12)
