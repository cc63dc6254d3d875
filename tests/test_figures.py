"""Pictures of sweeps whose manifests and logs are written by hand: what they say is read back from the SVG."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import SWEEP, Sweep

from packcli.data import index as indexes
from packcli.errors import ConfigError
from packcli.files import json_line
from packcli.packing import Rows
from packcli.report import figures, gather, pictures
from packcli.report.records import Probed, Report

MORE = """
name: many
model: {config: {model_type: llama}, tokenizer: train, vocab_size: 300}
data: {source: tiny, max_length: 64}
train: {epochs: 1, lr: 1e-3, global_batch: 8}
matrix:
  data.source: [tiny, $x^2$.jsonl]
  arm: [padding, mine, _hidden]
  seed: [1]
arms: {mine: {extends: best_fit}, _hidden: {extends: best_fit, loss: document}}
"""


def write_log(sweep: Sweep, train: str, losses: list[float], tokens: int = 100) -> None:
    path = sweep.store.metrics(train)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"step": step + 1, "loss": loss, "tokens": tokens} for step, loss in enumerate(losses)]
    path.write_bytes(b"".join(map(json_line, lines)))


@pytest.fixture
def finished(tmp_path: Path) -> Callable[..., Sweep]:
    """Every cell trained: padding in 30 s and 40 steps, other arms in 10 s and 20 steps, half the slots."""

    def build(text: str = SWEEP, **results: Any) -> Sweep:
        sweep = Sweep(text, tmp_path)
        for cell in sweep.plan.cells:
            padded = cell.labels["arm"] == "padding"
            seconds, steps = (30.0, 40) if padded else (10.0, 20)
            made = {"steps": steps, "slots": 6400 if padded else 3200, "cpu_s": seconds, "wall_s": seconds}
            sweep.trained(cell, **made | results)
            losses = [float(cell.labels["seed"]) + 4.0 / (step + 1) for step in range(steps)]
            write_log(sweep, cell.train, losses)
        return sweep

    return build


def texts(file: Path) -> list[str]:
    """What an SVG says, in the order it is drawn."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text())


TRAINED = ("loss", "loss_tokens", "throughput", "efficiency", "speedup")


def test_picture_differs_from_run_to_run(finished: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = finished()
    first = figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path / "a")
    second = figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path / "b")
    assert [path.name for path in first] == [f"{name}.{suffix}" for name in TRAINED for suffix in ("svg", "png")]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_the_page_has_a_chart_that_no_file_has(finished: Callable[..., Sweep], tmp_path: Path) -> None:
    """Every kind of chart there is: scores over seeds, logs, rows and a whole ledger, probes."""
    sweep, report = everything(finished())
    made = pictures.pictures(sweep.plan, report, sweep.store, gather.Members(report.rows))
    (_, setting), (_, data) = made.settings[0], made.sets[0]
    written = figures.draw(sweep.plan, report, sweep.store, tmp_path)
    names = ["differences", *TRAINED, "crossing", "behind", "lengths", "ledger"]
    assert [path.stem for path in written[::2]] == [*setting, *data] == names
    for name, chart in (setting | data).items():
        said = "\n".join(texts(tmp_path / f"{name}.svg"))
        for word in (chart.title, chart.x_name, *re.split(r"\s+", chart.caption)):
            assert word in said.replace("&lt;", "<"), name
        assert "best_fit" in said, name


def everything(sweep: Sweep) -> tuple[Sweep, Report]:
    lengths, none = np.array([64, 64, 30]), np.zeros(3, np.int64)
    for cell in sweep.plan.cells:
        better = 0.1 + int(cell.labels["seed"]) / 100 if cell.labels["arm"] == "best_fit" else 0.0
        for task in cell.evals:
            sweep.scored(cell, task, 0.5 + better)
        ledger = sweep.store.manifest("index", cell.index).results["ledger"]
        parts = ("validation", "truncated", "dropped", "boundary", "padding")
        sweep.finish("index", cell.index, {"ledger": ledger | {f"tokens_{part}": 9 for part in parts}})
        found = Rows(np.arange(3), none, lengths, np.arange(4))
        made = indexes.Index(found, lengths, none, none + 1, none, np.array([0, 3]))
        indexes.write(sweep.store.rows(cell.index), made)
    report = sweep.report()
    probed = Probed(
        crossing={"random": 0.25}, even={"random": 0.5}, alone=2.0, behind={"related": 0.1}, mask=None, n=9
    )
    groups = tuple(group.model_copy(update={"probes": (probed,)}) for group in report.groups)
    return sweep, report.model_copy(update={"groups": groups})


def test_axis_lacks_its_name_or_unit(finished: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = finished()
    figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path)
    loss, tokens, rates, _, why = (texts(tmp_path / f"{name}.svg") for name in TRAINED)
    for word in ("optimizer steps", "loss, nats per supervised token", "padding", "best_fit"):
        assert word in loss
    assert "useful tokens" in tokens
    assert any("mean over 1/50 of its steps" in text for text in loss)
    for word in ("tokens per second", "useful: tokens of documents", "padded: all slots", "padding (30.0 s)"):
        assert word in rates
    assert any("cpu (1 process, 1 thread)" in text for text in rates)
    # 3 times the time in twice the rows, steps and slots.
    for word in ("padding / arm", "fewer rows", "fewer steps", "fewer slots", "less CPU time", "3.0x"):
        assert word in why
    assert why.count("2.0x") == 3


def test_numbers_of_a_log_axis_are_raw_mathematics(finished: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = finished()
    for cell in sweep.plan.cells:
        write_log(sweep, cell.train, [60.0 / (step + 1) for step in range(40)])
    figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path)
    for name in ("loss", "loss_tokens"):
        said = texts(tmp_path / f"{name}.svg")
        assert {"2", "5", "10", "20", "50"} <= set(said)
        assert "loss, nats per supervised token (log scale)" in said
        assert not [text for text in said if "$" in text]


def test_a_sentence_of_two_panels_is_said_twice(finished: Callable[..., Sweep], tmp_path: Path) -> None:
    """The settings' captions differ by a sentence in their middle."""
    sweep = finished(SWEEP.replace("arm: [padding", "train.lr: [1e-3, 2e-3]\n  arm: [padding"))
    for cell in sweep.plan.cells:
        seed, best = int(cell.labels["seed"]), cell.labels["arm"] == "best_fit"
        clear = cell.labels["train.lr"] != sweep.plan.cells[0].labels["train.lr"]
        for task in cell.evals:
            sweep.scored(cell, task, 0.5 + best * (0.2 + seed / 100 if clear else (seed - 2) / 10))
    report = sweep.report()
    found = pictures.pictures(sweep.plan, report, sweep.store, gather.Members(report.rows))
    captions = [own["differences"].caption for _, own in found.settings]
    assert len(set(captions)) == 2
    figures.draw(sweep.plan, report, sweep.store, tmp_path)
    said = " ".join(texts(tmp_path / "differences.svg"))
    for word in ("Filled: shown", "Hollow, solid:", "Not shown does not mean none."):
        assert said.count(word) == 1, word
    assert said.index("Not shown does not") > max(said.index("Filled: "), said.index("Hollow, solid:"))


@pytest.mark.parametrize("random", [True, False])
def test_random_weights_go_unlabelled(finished: Callable[..., Sweep], tmp_path: Path, random: bool) -> None:
    sweep = finished(random_weights=random)
    for path in figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path):
        if path.suffix == ".svg":
            assert any("from random weights" in text for text in texts(path)) == random


def test_arm_is_left_out_of_a_legend_or_setting_of_a_picture(
    finished: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = finished(MORE)
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda found, place: save({"loss": found["loss"]}, place))
    figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path)
    shown = [text.strip() for text in texts(tmp_path / "loss.svg")]
    for word in ("padding", "mine", "_hidden", "data.source=tiny", "data.source=$x^2$.jsonl"):
        assert word in shown, word


def test_cell_that_is_not_trained_is_drawn(finished: Callable[..., Sweep], tmp_path: Path) -> None:
    sweep = finished()
    for seed in ("1", "2", "3"):
        sweep.store.manifest_file("train", sweep.cell(arm="best_fit", seed=seed).train).unlink()
    written = figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path)
    assert {path.stem for path in written} == {*TRAINED} - {"speedup"}  # nothing to compare is left
    assert "best_fit" not in texts(tmp_path / "loss.svg")


def test_median_goes_beyond_the_shortest_seed() -> None:
    def curve(steps: int, loss: float) -> gather.Curve:
        x = np.arange(1.0, steps + 1)
        return x, loss + 0 * x

    x, loss = gather.median([curve(40, 1.0), curve(30, 2.0), curve(50, 9.0)])
    assert (x[0], x[-1]) == (1.0, 30.0)
    assert set(loss) == {2.0}


def test_nothing_to_draw_is_an_empty_picture(tmp_path: Path) -> None:
    sweep = Sweep(SWEEP, tmp_path)
    with pytest.raises(ConfigError, match="nothing to draw"):
        figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("content", [b"", b'{"step": 1}\n', b"[]\n"])
def test_damaged_log_is_a_bug_or_left_out_unsaid(finished: Callable[..., Sweep], content: bytes) -> None:
    sweep = finished()
    sweep.store.metrics(sweep.plan.cells[0].train).write_bytes(content)
    report = sweep.report()
    ((_, found),) = pictures.pictures(sweep.plan, report, sweep.store, gather.Members(report.rows)).settings
    for name in ("loss", "loss_tokens"):
        assert "Left out: 1 whose log cannot be read." in found[name].caption


def test_missing_matplotlib_is_a_traceback(
    finished: Callable[..., Sweep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = finished()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="matplotlib") as error:
        figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path / "pictures")
    assert error.value.fix == "pip install 'packcli[plot]'"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_directory_that_cannot_be_made_is_a_traceback(
    finished: Callable[..., Sweep], tmp_path: Path, below: str
) -> None:
    sweep = finished()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="figures cannot be written to") as error:
        figures.draw(sweep.plan, sweep.report(), sweep.store, tmp_path / "file" / below)
    assert error.value.fix


def test_command_prints_the_paths_among_its_results(
    tiny_sweep: Callable[..., Path], run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    path = tiny_sweep(arms=["padding"])
    done = run_cli("report", path, "--figures", "pictures", "--json", cwd=tmp_path)
    assert done.code == 2
    assert "nothing to draw" in done.stderr
    assert done.json()["sweep"] == "tiny_test"
