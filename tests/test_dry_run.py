"""`packcli sweep --dry-run`: what a user would be told wrong of a sweep's cost before paying for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Done, chat_records, write_lines

from packcli import batching, costs, estimate, flops, papersteps, rates, shapes, stages, sweepfile
from packcli.batching import Sizes
from packcli.config import EstimateSpec, TrainSpec
from packcli.data import fitted
from packcli.errors import ConfigError
from packcli.plan import Plan
from packcli.report import cautions, dryrun
from packcli.store import Store

REPO = Path(__file__).resolve().parents[1]
SWEEPS = REPO / "sweeps"
NEED_NO_DATA = (
    "llama3_8b",
    "llama3_70b",
    "llama3_8b_apart",
    "controls_8b",
    "long_context",
    "boundary_tokens",
    "attribution",
)
Run = Callable[..., Done]


def planned(name: str, store: Store, *sets: str) -> Plan:
    return stages.make_plan(sweepfile.load(SWEEPS / f"{name}.yaml", sets), store)


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Dry runs of shipped sweeps, each made once."""
    made: dict[str, dict[str, Any]] = {}

    def document(name: str) -> dict[str, Any]:
        if name not in made:
            store = Store(tmp_path_factory.mktemp("runs"))
            made[name] = dryrun.collect(planned(name, store), store)
        return made[name]

    return document


# The paper's sweeps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", papersteps.models())
def test_steps_and_hours_of_the_papers_cells_are_near_what_it_prints(
    documents: Callable[[str], dict[str, Any]], model: str
) -> None:
    cells = documents(model)["cells"]
    assert len(cells) == 12
    for cell in cells:
        source, arm = cell["labels"]["data.source"], cell["labels"]["arm"]
        printed = papersteps.expected_steps(source, model, arm)
        hours = printed / papersteps.steps_per_s(source, model, arm) / 3600
        found = cell["estimate"]
        assert found["steps"] == pytest.approx(printed, rel=0.03), (source, arm)
        assert found["hours"] == pytest.approx(hours, rel=0.15), (source, arm)
        assert found["gpu_hours"] == pytest.approx(32 * found["hours"])
        assert found["lengths"] == "fitted"


def test_the_papers_sweep_is_estimated_in_two_seconds_without_torch_and_without_a_network(tmp_path: Path) -> None:
    """CPU time: on a machine that others use too, the clock on the wall says nothing."""
    code = """
import resource, socket, sys
def refuse(*_):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = refuse
from packcli import cli
sys.argv = ["packcli", "sweep", *sys.argv[1:], "--dry-run", "--json"]
try:
    cli.main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, "torch" in sys.modules, file=sys.stderr)
"""
    words = [str(SWEEPS / "llama3_8b.yaml"), "--on", str(REPO / "slurm" / "a800_4x8.yaml")]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    seconds, torch = done.stderr.split()[-2:]
    assert torch == "False"
    assert float(seconds) < 2


def test_figures_from_fitted_lengths_are_never_shown_as_counted(run_cli: Run, tmp_path: Path) -> None:
    shown = run_cli("sweep", SWEEPS / "llama3_8b.yaml", "--dry-run", "--only", "data.source=tulu", cwd=tmp_path)
    text = " ".join(shown.stdout.split())
    assert "lengths FITTED to the paper's printed steps, not measured" in text
    assert "by fitted lengths" in text
    assert "counted from the prepared data" not in text


@pytest.mark.parametrize(
    "change",
    [
        "data.source=chats.jsonl",
        "data.template=chatml",
        "model.tokenizer=Qwen/Qwen2.5-0.5B",
        "data.source={source: tulu, turns: single}",
        "data.source=[tulu, wildchat]",
        "data.mapping={conversations: turns}",
    ],
)
def test_fitted_lengths_are_not_taken_for_data_they_were_not_fitted_to(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "chats.jsonl", chat_records(4))
    store = Store(tmp_path / "runs")
    plan = planned("controls_8b", store, change)
    order = plan.trains[plan.cells[0].train]
    assert costs.of(order, plan, store, plan.cells[0].estimate).estimate == estimate.Estimate()


@pytest.mark.parametrize("dataset", papersteps.datasets())
def test_a_sample_tells_what_the_whole_would(dataset: str) -> None:
    """Rows before the validation split are those the fit was made for, within 1%."""
    store = Store(Path("nowhere"))
    plan = planned("llama3_8b", store)
    for arm in papersteps.arms():
        [chosen] = [c for c in plan.cells if c.labels["data.source"] == dataset and c.labels["arm"] == arm]
        order = plan.trains[chosen.train]
        found = fitted.sample(plan.tokens[order.tokens], plan.indexes[order.index])
        assert found is not None
        rows = found.index.rows.num_rows * found.times / 0.9  # a tenth is held out
        allowed = papersteps.allowed_rows(dataset, "llama3_70b", arm)
        assert allowed is not None
        assert rows == pytest.approx(sum(allowed) / 2, rel=0.01), (dataset, arm)


def test_a_sample_of_less_than_one_conversation_is_one() -> None:
    plan = planned("llama3_8b", Store(Path("nowhere")))
    chosen = next(cell for cell in plan.cells if cell.labels["data.source"] == "tulu")
    order = plan.tokens[chosen.tokens]
    quarter = order.sources[0].model_copy(update={"weight": 0.25})
    order = order.model_copy(update={"max_documents": 1, "sources": (quarter,)})
    index = plan.indexes[chosen.index]
    layout = index.layout.model_copy(update={"validation_after_packing": False, "remainder": "keep"})
    found = fitted.sample(order, index.model_copy(update={"layout": layout, "validation": 0.0}))
    assert found is not None
    assert found.times == 1


# Steps of a sample --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["rows", "documents", "tokens"])
@pytest.mark.parametrize("budget", [{"epochs": 3}, {"steps": 17}, {"tokens": 250_000}])
def test_steps_of_a_sample_are_those_of_the_whole(unit: str, budget: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    tokens, documents = rng.integers(200, 900, 300), rng.integers(1, 5, 300)
    whole = Sizes(tokens, documents, np.array([0, 300]))
    batch = {"rows": 16, "documents": 40, "tokens": 9_000}[unit]
    train = TrainSpec.model_validate({"lr": 1e-5, "global_batch": batch, "batch_unit": unit, **budget})
    real = batching.run_steps(whole, train, "shuffled", seed=0)
    exact, drawn = estimate.visits(real, 300), estimate.visits_of_sample(whole, train, 1.0)
    assert drawn.steps == pytest.approx(exact.steps, abs=1)
    assert drawn.total(tokens) == pytest.approx(exact.total(tokens), rel=0.02)
    twice = estimate.visits_of_sample(whole, train, 2.0)
    if "epochs" in budget:
        assert twice.steps == pytest.approx(2 * exact.steps, abs=1)
    else:  # the budget is the same, however much data there is
        assert twice.total(tokens) == pytest.approx(drawn.total(tokens))


# Rates --------------------------------------------------------------------------------------------------


def on(gpu: str, **fields: Any) -> EstimateSpec:
    return EstimateSpec.model_validate({"cluster": {"gpu": gpu}, **fields})


def rate_of(model: str, spec: EstimateSpec) -> rates.SlotRate:
    found = rates.slot_rate(spec, shapes.packaged()[model])
    assert found is not None
    return found


@pytest.mark.parametrize("model", papersteps.models())
def test_the_papers_slot_rate_is_the_mean_of_the_step_rates_it_prints(model: str) -> None:
    printed = [
        papersteps.steps_per_s(data, model, arm) for data in papersteps.datasets() for arm in papersteps.arms()
    ]
    slots, gpus = papersteps.slots_per_step(model)
    name = {"llama3_8b": "meta-llama/Meta-Llama-3-8B", "llama3_70b": "meta-llama/Meta-Llama-3-70B"}[model]
    shape = shapes.packaged()[name]
    work = flops.training(shape, tokens=4096, squares=4096**2, supervised=4096) / 4096
    expected = float(np.mean(printed)) * slots / gpus * work / 312e12
    found = rate_of(name, on("A800-80GB"))
    assert found.mfu == pytest.approx(expected, rel=1e-3)
    assert found.as_full


def test_a_published_rate_is_counted_by_our_flops_and_not_by_its_sources() -> None:
    """torchtitan prints 47.26% for 2,546 tokens/s: attention over the full square."""
    found = rate_of("meta-llama/Llama-3.1-8B", on("A100-80GB"))
    assert found.mfu == pytest.approx(0.42, abs=0.005)
    assert "torchtitan" in found.text
    assert not found.as_full


def test_a_rate_given_goes_before_a_published_one() -> None:
    found = rate_of("meta-llama/Llama-3.1-8B", on("A800-80GB", slot_mfu=0.2))
    assert (found.mfu, found.as_full) == (0.2, False)


def test_no_rate_is_borrowed_from_another_chip_or_from_a_model_of_another_size() -> None:
    small = flops.Shape(hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=128, vocab=500)
    assert rates.slot_rate(on("A800-80GB"), small) is None
    assert rates.slot_rate(on("B200"), shapes.packaged()["meta-llama/Llama-3.1-8B"]) is None
    assert rates.slot_rate(EstimateSpec(slot_mfu=0.4), small) is None  # on what?
    h200 = rates.slot_rate(on("H200"), shapes.packaged()["meta-llama/Llama-3.1-8B"])
    assert h200 is not None
    assert "H100-80GB" in h200.text  # the same chip: and it says on what it was measured


def test_padding_to_the_longest_counts_full_rows_only_where_it_was_measured_so(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def hours(*sets: str) -> dict[str, float]:
        plan = planned("llama3_8b", store, *sets)
        cells = dryrun.collect(plan, store)["cells"]
        return {c["labels"]["arm"]: c["estimate"]["hours"] for c in cells if c["labels"]["data.source"] == "tulu"}

    paper, own = hours(), hours("estimate.slot_mfu=0.406")
    assert paper["random_released"] == pytest.approx(own["random_released"], rel=0.01)
    assert paper["padding_released"] > 3 * own["padding_released"]


# Where it runs ------------------------------------------------------------------------------------------


def test_hours_and_memory_are_those_of_the_cluster_that_is_named(run_cli: Run, tmp_path: Path) -> None:
    profile = tmp_path / "two.yaml"
    profile.write_text((REPO / "slurm" / "a800_4x8.yaml").read_text().replace("nodes: 4", "nodes: 2"))
    words = ("sweep", SWEEPS / "llama3_8b.yaml", "--dry-run", "--json", "--only", "data.source=tulu")
    here = run_cli(*words, cwd=tmp_path).json()["cells"][0]
    there = run_cli(*words, "--on", profile, cwd=tmp_path).json()["cells"][0]
    assert (here["memory"]["gpus"], there["memory"]["gpus"]) == (32, 16)
    assert there["estimate"]["hours"] == pytest.approx(2 * here["estimate"]["hours"])
    assert there["estimate"]["gpu_hours"] == pytest.approx(here["estimate"]["gpu_hours"])


# Warnings -----------------------------------------------------------------------------------------------


def cell(steps: int | None, *, lr: float = 1e-5, rows: float = 128.0, fits: str = "yes") -> dict[str, Any]:
    return {
        "estimate": {"steps": steps},
        "step": None if steps is None else {"lr": lr, "rows": rows},
        "memory": {"fits": fits, "gpus": 32, "total_bytes": 90 << 30, "capacity_bytes": 80 << 30},
    }


def rules(item: dict[str, Any], baseline: dict[str, Any] | None = None) -> list[str]:
    return [one["rule"] for one in cautions.of(item, baseline)]


def test_a_run_is_warned_of_by_the_rule_it_breaks_and_by_no_other() -> None:
    assert rules(cell(1000)) == []
    assert rules(cell(299)) == [cautions.FEW]
    assert rules(cell(1000), cell(2000)) == [cautions.FEWER]
    assert rules(cell(1001), cell(2000)) == []
    assert rules(cell(1000, lr=3e-5), cell(2000)) == []  # its learning rate follows what a step holds
    assert rules(cell(1000, rows=41.0)) == [cautions.IDLE]
    assert rules(cell(1000, rows=63.5)) == []
    assert rules(cell(1000, fits="no")) == [cautions.MEMORY]
    assert rules(cell(1000, fits="barely")) == [cautions.BARELY]
    assert rules(cell(None, fits="no")) == [cautions.MEMORY]
    assert rules(cell(None)) == []


def test_steps_that_hold_a_row_more_now_and_then_are_not_called_half_idle() -> None:
    assert rules(cell(1000, rows=32.003)) == []


def test_a_warning_is_said_once_with_the_rule_and_how_many_it_met(
    documents: Callable[[str], dict[str, Any]],
) -> None:
    document = documents("llama3_8b")
    [line] = cautions.lines([(" ".join(c["labels"].values()), c["warnings"]) for c in document["cells"]])
    assert line.startswith("warning: wildchat_gpt4 random_released 42 (728 steps against 1,96")
    assert "and 7 more: at most half the steps" in line
    assert document["cells"][0]["warnings"] == []


# The budget ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_nothing_runs_that_would_take_more_gpu_hours_than_allowed(
    run_cli: Run, tmp_path: Path, dry: list[str]
) -> None:
    words = ("sweep", SWEEPS / "llama3_8b.yaml", "--only", "arm=greedy_released", "--max-gpu-hours", "600", *dry)
    done = run_cli(*words, cwd=tmp_path)
    assert done.code == 2
    assert "more than --max-gpu-hours 600" in done.stderr
    assert not (tmp_path / "runs").exists()
    assert ("greedy_released" in done.stdout) == bool(dry)  # the table is what a user needs to choose


def test_a_sweep_within_its_budget_is_not_held_up(run_cli: Run, tmp_path: Path) -> None:
    words = ("sweep", SWEEPS / "llama3_8b.yaml", "--only", "arm=greedy_released", "--dry-run")
    assert run_cli(*words, "--max-gpu-hours", "1000", cwd=tmp_path).code == 0


def test_a_cost_nobody_knows_does_not_pass_for_one_that_is_allowed(run_cli: Run, tmp_path: Path) -> None:
    done = run_cli("sweep", SWEEPS / "single_turn.yaml", "--max-gpu-hours", "1000000", cwd=tmp_path)
    assert done.code == 2
    assert "is not known" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_what_is_done_costs_nothing_more(documents: Callable[[str], dict[str, Any]]) -> None:
    total = {"gpu_hours": 5000.0, "gpu_hours_left": 10.4}
    dryrun.check_budget({"total": total}, 20)
    with pytest.raises(ConfigError, match="more than --max-gpu-hours 5"):
        dryrun.check_budget({"total": total}, 5)


# Sweeps that ship ---------------------------------------------------------------------------------------


def test_every_shipped_sweep_says_what_it_asks_and_what_it_costs() -> None:
    for path in SWEEPS.glob("*.yaml"):
        if path.stem in ("tiny", "chat"):  # on a laptop, in minutes
            continue
        head = path.read_text().split("\nname:")[0]
        assert head.startswith("# Question: "), path
        assert head.count("\n# Cost: ") == 1, path


@pytest.mark.parametrize("name", NEED_NO_DATA)
def test_the_cost_in_a_sweeps_head_is_what_its_dry_run_prints(
    documents: Callable[[str], dict[str, Any]], name: str
) -> None:
    line = dryrun.cost_line(documents(name))
    assert line is not None
    assert f"\n# Cost: {line}\n" in (SWEEPS / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", [*NEED_NO_DATA, "single_turn"])
def test_shipped_sweeps_fit_the_cluster_they_name(documents: Callable[[str], dict[str, Any]], name: str) -> None:
    for item in documents(name)["cells"]:
        assert item["memory"]["fits"] == "yes", item["labels"]


def test_matched_steps_are_matched(documents: Callable[[str], dict[str, Any]]) -> None:
    """What controls_8b.yaml promises: the arms take equally many steps."""
    assert len({item["estimate"]["steps"] for item in documents("controls_8b")["cells"]}) == 1
