"""What a ladder must not claim: rungs that do not add up, factors not named, certainty that is not there."""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from test_verdict import Tell, told  # noqa: F401

from packcli import sweepfile
from packcli.config import ArmSpec
from packcli.errors import ConfigError
from packcli.eval import stats
from packcli.report import ladder, render
from packcli.report.ladder import Ladder
from packcli.report.records import Report

SWEEP = """
name: demo
model: {config: {model_type: llama}, tokenizer: train, vocab_size: 300}
data: {source: chats.jsonl, max_length: 64}
train: {epochs: 2, lr: 1e-3, global_batch: 8}
eval: {tasks: [gsm8k]}
arms:
  wide: {extends: padding, batch_unit: documents, global_batch: 40}
  packed: {extends: wide, layout: pack, packer: best_fit}
  packed_apart: {extends: packed, loss: document}
  crossing: {extends: packed, positions: continue, attention: causal}
ladders:
  up: [padding, wide, packed, crossing]
  again: [padding, wide, packed, packed_apart]
matrix:
  arm: [padding, wide, packed, packed_apart, crossing]
  seed: [1, 2, 3, 4, 5]
"""
EFFECTS = {"padding": 0.0, "wide": -0.1, "packed": -0.1, "packed_apart": -0.08, "crossing": -0.3}


def scores(arm: str, seed: int) -> float | None:
    """Seeds shift all arms alike, and each arm a little by itself."""
    return 0.6 + seed / 20 + EFFECTS[arm] + 0.004 * math.sin(seed * (3 + list(EFFECTS).index(arm)))


@pytest.fixture
def climb(told: Tell) -> Any:  # noqa: F811
    def run(score: Any = scores, text: str = SWEEP) -> dict[str, Ladder]:
        made = told(score, text)
        report = Report(
            sweep="demo", baseline="padding", rows=tuple(made.rows), groups=made.groups, verdict=made.text
        )
        return {one.name: one for one in ladder.climb(made.plan, report)}

    return run


def test_rungs_do_not_add_up_to_the_whole(climb: Any) -> None:
    for found in climb().values():
        rungs = [rung.effect.delta for rung in found.rungs if rung.effect]
        assert len(rungs) == 3
        assert math.fsum(rungs) == pytest.approx(found.whole.delta, abs=1e-12)
        assert found.rungs[0].effect is None


def test_a_seed_that_one_rung_lacks_counts_in_another(climb: Any) -> None:
    found = climb(lambda arm, seed: None if (arm, seed) == ("packed", 3) else scores(arm, seed))["up"]
    assert found.seeds == ("1", "2", "4", "5")
    expected = [scores("wide", seed) for seed in (1, 2, 4, 5)]
    assert found.rungs[1].average == pytest.approx(math.fsum(expected) / 4)


def test_a_rung_is_paired_otherwise_than_by_seed(climb: Any) -> None:
    rung = climb()["up"].rungs[3]
    pairs = [[scores(arm, seed) for seed in range(1, 6)] for arm in ("packed", "crossing")]
    expected = stats.paired_difference(*pairs)
    assert rung.effect.delta == pytest.approx(expected.mean)
    assert rung.effect.interval == pytest.approx((expected.low, expected.high))
    assert rung.effect.p == pytest.approx(expected.p)


def test_rungs_that_ladders_share_are_corrected_for_twice(climb: Any) -> None:
    found = climb()
    effects = {
        (ladder_.rungs[place - 1].arm, rung.arm): rung.effect
        for ladder_ in found.values()
        for place, rung in enumerate(ladder_.rungs)
        if rung.effect
    }
    effects |= {(one.rungs[0].arm, one.rungs[-1].arm): one.whole for one in found.values()}
    assert len(effects) == 6  # of 8 that are printed
    adjusted = stats.holm([effect.p for effect in effects.values()])
    assert [effect.p_holm for effect in effects.values()] == pytest.approx(adjusted)
    assert found["up"].rungs[1].effect == found["again"].rungs[1].effect


def test_what_changes_is_not_said_or_said_of_the_wrong_rung(climb: Any) -> None:
    found = climb()
    changes = [rung.changes for rung in found["up"].rungs]
    assert changes[0] == ()
    assert changes[1] == ("batch: 8 documents -> 40 documents",)  # a row is a document here
    assert changes[2] == ("who shares a row: layout pad -> pack, packer none -> best_fit",)
    assert changes[3] == ("attention: document -> causal", "positions: reset -> continue")
    notes = " ".join(ladder.notes(list(found.values())))
    assert "more than one thing changes at `crossing`:" in notes


def test_a_field_of_an_arm_belongs_to_no_factor() -> None:
    listed = [name for fields in ladder._FACTORS.values() for name in fields]
    assert sorted([*listed, "batch_unit", "global_batch", "pad_to"]) == sorted(ArmSpec.model_fields)


def test_one_seed_gets_an_interval(climb: Any) -> None:
    found = climb(lambda arm, seed: scores(arm, seed) if seed == 1 else None)["up"]
    assert all(rung.effect.interval is None for rung in found.rungs[1:])
    assert "no interval for up" in " ".join(ladder.notes([found]))


def test_a_ladder_without_one_of_its_arms_is_told(climb: Any) -> None:
    text = SWEEP.replace("  seed:", "  train.lr: [1e-3, 2e-3]\n  seed:")
    found = climb(text=f"{text}exclude:\n- {{arm: crossing, train.lr: 2e-3}}\n")
    assert found["up"].setting == {"train.lr": "1e-3"}
    assert found["again"].setting == {"train.lr": "2e-3"}  # the later one


def test_an_arm_that_is_not_scored_yet_reads_as_zero(climb: Any) -> None:
    found = climb(lambda arm, seed: None if arm == "wide" else scores(arm, seed))["up"]
    assert found.seeds == ()
    assert found.whole is None
    assert [rung.average for rung in found.rungs] == [None] * 4
    console = Console(width=140, file=io.StringIO())
    console.print(render.drawn(ladder.sheets([found]), []))
    assert "0.0" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("ladders", "said"),
    [
        ("[padding, wide]", "mapping of a name"),
        ("{a: [padding]}", "two or more arms"),
        ("{a: [padding, padding]}", "two or more arms"),
        ("{a: [padding, nothing]}", "nothing is none of the arms"),
    ],
)
def test_a_ladder_of_no_arms_is_taken(ladders: str, said: str, tmp_path: Path) -> None:
    head, _, tail = SWEEP.partition("ladders:")
    file = tmp_path / "sweep.yaml"
    file.write_text(f"{head}ladders: {ladders}\n{tail[tail.index('matrix:') :]}")
    with pytest.raises(ConfigError) as caught:
        sweepfile.load(file)
    assert said in str(caught.value)
    assert "sweep.yaml:" in str(caught.value)


# Each arm at its best rate ---------------------------------------------------------------------------------

RATES = f"""{SWEEP.replace("  seed:", "  train.lr: [1e-3, 3e-3, 9e-3]" + chr(10) + "  seed:")}exclude:
- {{arm: [packed, packed_apart], train.lr: [1e-3, 9e-3]}}
"""


@pytest.fixture
def best(told: Tell) -> Any:  # noqa: F811
    """A ladder from padding to crossing: what each arm loses in validation at each rate is given."""

    def run(
        losses: dict[tuple[str, str], float | None],
        arms: str = "padding, wide, crossing",
        failed: Collection[tuple[str, str]] = (),
    ) -> Ladder:
        text = RATES.replace("  up: [", f"  best: {{arms: [{arms}], best: train.lr}}\n  up: [")
        made = told(scores, text)
        rows = []
        for row in made.rows:
            loss = losses.get((row.labels["arm"], row.labels["train.lr"]), 9.0)
            train = row.train.model_copy(update={"validation_loss": loss})
            better = 0.01 * ["1e-3", "3e-3", "9e-3"].index(row.labels["train.lr"])
            found = {"train": train, "average": row.average + better}
            if (row.labels["arm"], row.labels["train.lr"]) in failed:
                found = {"train": None, "average": None, "train_state": "failed", "state": "failed"}
            rows.append(row.model_copy(update=found))
        report = Report(sweep="demo", baseline="padding", rows=tuple(rows), groups=made.groups, verdict=made.text)
        (found,) = [one for one in ladder.climb(made.plan, report) if one.name == "best"]
        return found

    return run


CHOSEN = {("padding", "3e-3"): 1.0, ("wide", "9e-3"): 2.0, ("crossing", "3e-3"): 3.0}


def test_scores_choose_the_rate(best: Any) -> None:
    """The highest rate scores best in every arm; where the loss is lowest is another matter."""
    found = best(CHOSEN)
    assert [rung.at["train.lr"] for rung in found.rungs] == ["3e-3", "9e-3", "3e-3"]
    expected = [scores("padding", seed) + 0.01 for seed in range(1, 6)]
    assert found.rungs[0].average == pytest.approx(math.fsum(expected) / 5)
    assert found.setting == {}


def test_a_rate_that_changes_is_not_said(best: Any) -> None:
    found = best(CHOSEN)
    assert "train.lr: 3e-3 -> 9e-3" in found.rungs[1].changes
    notes = " ".join(ladder.notes([found]))
    assert "more than one thing changes at `wide`" in notes
    assert "best at an end of its grid: `wide`." in notes


def test_an_arm_at_an_unknown_best_rate_is_told_at_another(best: Any) -> None:
    found = best(CHOSEN | {("wide", "1e-3"): None})
    assert found.seeds == ()
    assert found.whole is None
    assert found.rungs[1].at == {}


def test_a_rate_at_which_all_diverged_takes_the_whole_ladder_along(best: Any) -> None:
    found = best(CHOSEN | {("wide", "1e-3"): None}, failed={("wide", "1e-3")})
    assert [rung.at["train.lr"] for rung in found.rungs] == ["3e-3", "9e-3", "3e-3"]
    assert found.rungs[1].failed == ("1e-3",)
    assert "not to be chosen, as every training failed there: `wide` at 1e-3." in ladder.notes([found])


def test_a_grid_of_one_value_asks_for_a_wider_one(best: Any) -> None:
    found = best({("padding", "9e-3"): 1.0, ("packed", "3e-3"): 1.0}, "padding, packed")
    assert [rung.at_end for rung in found.rungs] == [True, False]


@pytest.mark.parametrize(
    ("ladder_", "said"),
    [
        ("{arms: [padding, wide], best: data.max_length}", "none of the axes of the matrix: train.lr"),
        ("{arms: [padding, wide], best: seed}", "none of the axes of the matrix: train.lr"),
        ("{arms: [padding]}", "two or more arms"),
        ("{arms: [padding, wide], worst: train.lr}", "two or more arms"),
    ],
)
def test_a_ladder_over_no_axis_is_taken(ladder_: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(RATES.replace("  up: [", f"  best: {ladder_}\n  up: ["))
    with pytest.raises(ConfigError, match=said) as caught:
        sweepfile.load(file)
    assert "sweep.yaml:" in str(caught.value)


def test_a_list_in_exclude_drops_more_or_less_than_its_values(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(RATES)
    labels = [labels for labels, _ in sweepfile.load(file).cells]
    assert {label["train.lr"] for label in labels if label["arm"] == "packed"} == {"3e-3"}
    assert {label["train.lr"] for label in labels if label["arm"] == "wide"} == {"1e-3", "3e-3", "9e-3"}
    file.write_text(RATES.replace("train.lr: [1e-3, 9e-3]", "train.lr: [1e-3, 8e-3]"))
    with pytest.raises(ConfigError, match=r"has no value `0\.008`"):
        sweepfile.load(file)
