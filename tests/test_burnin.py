"""A broken node is named before it costs hours; a sound one changes nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Training
from training import CPU, LLAMA, MAX_LENGTH, arm

from packcli.config import ModelSpec, TrainSpec
from packcli.errors import NodeError, of_kind
from packcli.plan import TrainOrder
from packcli.train import burnin, transfers
from packcli.train.burnin import Device, Step
from packcli.train.rollcall import Nodes
from packcli.train.transfers import Transfers

HERE = Path(__file__).parent
FOUR = Nodes(("node0", "node1", "node2", "node3"), 8)
THREE = Nodes(("node0", "node1", "node2"), 1)


def order(**config: Any) -> TrainOrder:
    return TrainOrder(
        id="train",
        tokens="tokens",
        index="index",
        base=None,
        model=ModelSpec(config={**LLAMA, **config}, tokenizer="train", vocab_size=600),
        arm=arm("best_fit"),
        train=TrainSpec(steps=1, lr=1e-2, global_batch=4, micro_batch=2),
        max_length=MAX_LENGTH,
        seed=0,
    )


# What measurements mean: four nodes of eight GPUs, as nobody has here -----------------------------------------


def test_sound_nodes_that_differ_a_little_are_not_refused() -> None:
    steps = [Step(0.030 + 0.0005 * (rank % 7)) for rank in range(32)]
    assert burnin.slow_steps(steps, FOUR) == []
    tiny = [Step(0.0001 * (1 + 9 * (rank == 5))) for rank in range(32)]  # ten times nothing is still nothing
    assert burnin.slow_steps(tiny, FOUR) == []


def test_a_throttled_gpu_is_named_with_its_node_and_both_times() -> None:
    steps = [Step(0.102 if rank == 17 else 0.030) for rank in range(32)]
    [found] = burnin.slow_steps(steps, FOUR)
    assert found == (
        "node2 (rank 17) is 3.4x slower than the median of the others in one layer's step (0.102 s against 0.03 s)"
    )


def ring(num_nodes: int, seconds: dict[int, float], within: Sequence[float] = ()) -> list[Transfers]:
    """What ranks, one on each node, would measure where link k takes `seconds[k]`, the others 10 ms."""
    ends = transfers.links(num_nodes)
    return [
        Transfers(
            (1.0,),
            within[node] if within else 0.0,
            {str(k): seconds.get(k, 0.01) for k in range(len(ends)) if node in ends[k]},
        )
        for node in range(num_nodes)
    ]


def test_a_slow_link_is_named_by_both_ends_and_a_slow_node_by_both_its_links() -> None:
    def named(moved: list[Transfers]) -> list[str]:
        nodes = Nodes(tuple(f"node{k}" for k in range(len(moved))), 1)
        return [found.partition(" is ")[0] for found in burnin.slow_links(moved, nodes)]

    assert named(ring(4, {})) == []
    assert named(ring(4, {2: 0.1})) == ["the link between node2 and node3"]
    assert named(ring(4, {3: 0.1})) == ["the link between node3 and node0"]
    assert named(ring(3, {0: 0.1, 1: 0.1})) == [  # two of three are the odd ones: they share node1
        "the link between node0 and node1",
        "the link between node1 and node2",
    ]
    assert named(ring(2, {0: 9.0})) == []  # nothing to compare it with
    assert named(ring(4, {}, within=(0.01, 0.01, 0.2, 0.01))) == ["node2"]


def test_every_link_is_measured_once_and_no_node_serves_two_at_a_time() -> None:
    for num_nodes in range(2, 9):
        ends = transfers.links(num_nodes)
        for turn in range(3):
            busy = [n for k, pair in enumerate(ends) if transfers._turn(k, len(ends)) == turn for n in pair]
            assert len(busy) == len(set(busy)), (num_nodes, turn)
        assert all(transfers._turn(k, len(ends)) in range(3) for k in range(len(ends)))


def test_a_gpu_that_another_process_holds_is_named() -> None:
    free = [Device("host", "NVIDIA H100", 41.0 if rank == 9 else 79.0) for rank in range(32)]
    [found] = burnin.held(free, FOUR)
    assert found.startswith("node1 (rank 9): 41.0 GiB of the GPU's memory are free, 79.0 GiB on the others")
    assert burnin.held([Device("host", "cpu")] * 32, FOUR) == []


def test_of_two_answers_the_rarer_is_the_wrong_one() -> None:
    def said(*differences: float, nodes: Nodes = THREE) -> str:
        return " ".join(burnin.wrong(differences, 1e-4, nodes))

    assert said(0, 1e-6, 0) == ""
    assert said(0, 0.5, 0).startswith("node1 computes other results")
    assert said(0, 0.5, 0.5).startswith("node0 computes other results")
    assert said(0, float("nan"), 0).startswith("node1 computes other results")
    two = Nodes(("node0", "node1"), 1)
    assert said(0, 0.5, nodes=two).startswith("rank 0 on node0 and node1 compute different results")


def test_nodes_without_names_of_their_own_are_numbered_and_whole_nodes_named_without_ranks() -> None:
    assert Nodes.of(4, 2, ["host", "host"]).names == ("node 0", "node 1")
    assert Nodes.of(4, 2, None).names == ("node 0", "node 1")
    named = Nodes.of(6, 2, ["a", "b", "c"])
    assert named.where([2, 3, 5]) == "b and c (rank 5)"


def test_a_node_error_keeps_its_kind_on_the_way_to_the_user() -> None:
    assert isinstance(of_kind("node", "node2 is slow", ""), NodeError)
    assert NodeError.exit_code == 7


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 5, "tie_word_embeddings": True},
        {"model_type": "qwen3", "head_dim": 8, "max_window_layers": 2, "num_hidden_layers": 3},
        {"model_type": "gemma3_text", "head_dim": 8, "num_hidden_layers": 3, "sliding_window": 64},
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    ],
    ids=lambda config: config.get("model_type", "llama"),
)
def test_one_layer_of_a_deep_model_is_computed_and_the_same_each_time(config: dict[str, Any]) -> None:
    torch.manual_seed(3)
    seconds, (hidden, gradients) = burnin.layer_step(order(**config), CPU)
    _, again = burnin.layer_step(order(**config), CPU)
    assert seconds > 0
    assert hidden[0].shape == (MAX_LENGTH, LLAMA["hidden_size"])
    layer = sum(gradient.numel() for gradient in gradients)
    assert 2 * 32 * 64 < layer < 40_000  # no second layer, no embedding
    assert all(bool(gradient.any()) for gradient in gradients)
    for one, other in zip([*hidden, *gradients], [*again[0], *again[1]], strict=True):
        assert torch.equal(one, other)


# Several processes --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def run_ranks(
    tmp_path: Path, what: str, ranks: Sequence[int], world: int = 3, per_node: int = 1
) -> dict[int, dict[str, Any]]:
    """What each rank found; those that left no word are not in it."""
    file, out, port = tmp_path / "order.json", tmp_path / what, free_port()
    file.write_text(order().model_dump_json())
    shared = {"WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": per_node, "MASTER_PORT": port}
    shared |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    started = []
    for rank in ranks:
        environment = {**os.environ, **{key: str(value) for key, value in {**shared, "RANK": rank}.items()}}
        command = [sys.executable, str(HERE / "burnin_ranks.py"), what, str(file), str(out)]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=240)[1] for process in started]
    files = {rank: tmp_path / f"{what}.{rank}" for rank in ranks}
    found = {rank: json.loads(path.read_text()) for rank, path in files.items() if path.exists()}
    assert found, said
    return found


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Every fault of `burnin_ranks.py`, met by three nodes."""
    found = run_ranks(tmp_path_factory.mktemp("checked"), "check", range(3))
    assert set(found) == {0, 1, 2}
    return found


@pytest.mark.slow
def test_sound_nodes_pass_and_what_was_measured_has_names_and_units(checked: dict[int, dict[str, Any]]) -> None:
    record = checked[0]["none"]
    assert [node["node"] for node in record["nodes"]] == ["node0", "node1", "node2"]
    assert all(node["layer_step_s"] > 0 for node in record["nodes"])
    assert [found["bytes"] for found in record["all_reduce"]] == list(transfers.SIZES["cpu"])
    assert all(found["bus_gb_per_s"] > 0 for found in record["all_reduce"])
    assert [found["nodes"] for found in record["links"]] == [
        ["node0", "node1"],
        ["node1", "node2"],
        ["node2", "node0"],
    ]
    assert record["largest_difference"] == 0.0
    assert [node["node"] for node in checked[0]["no names"]["nodes"]] == ["node 0", "node 1", "node 2"]
    assert checked[0]["bfloat16"]["largest_difference"] == 0.0


@pytest.mark.slow
def test_no_random_number_is_different_after_it(checked: dict[int, dict[str, Any]]) -> None:
    assert all(found["random"] for found in checked.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("one output is wrong", "node1 computes other results"),
        ("one gradient is wrong", "node2 computes other results"),
        ("rank 0 is wrong", "node0 computes other results"),
        ("not finite", "node1: one layer's results are not finite"),
        ("step fails", "one layer's step failed on node2: CUDA error: an illegal memory access"),
        ("sending fails", "failed on node2: gloo/transport: no route to host"),
    ],
)
def test_every_rank_names_the_broken_node_in_the_same_words(
    fault: str, cause: str, checked: dict[int, dict[str, Any]]
) -> None:
    kind, said = checked[0][fault]
    assert kind == "node"
    assert cause in said
    assert all(found[fault] == [kind, said] for found in checked.values())


@pytest.mark.slow
def test_what_is_alike_on_all_nodes_is_blamed_on_none(checked: dict[int, dict[str, Any]]) -> None:
    assert checked[0]["nowhere finite"]["largest_difference"] is None
    assert all(found["step fails everywhere"][0] == "RuntimeError" for found in checked.values())


@pytest.mark.slow
def test_a_slow_cpu_is_warned_about_and_not_refused(checked: dict[int, dict[str, Any]]) -> None:
    [warning] = checked[0]["slow"]["warnings"]
    assert warning.startswith("node1 is ")


@pytest.mark.slow
def test_ranks_of_one_node_send_to_each_other_too(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, "sound", range(4), world=4, per_node=2)
    assert set(found) == {0, 1, 2, 3}
    record = found[3]["sound"]
    assert record["ranks"] == 4
    assert all(node["within_gb_per_s"] > 0 and len(node["devices"]) == 2 for node in record["nodes"])
    assert [link["nodes"] for link in record["links"]] == [["node 0", "node 1"]]
    assert record["links"][0]["gb_per_s"] > 0


@pytest.mark.slow
def test_a_node_that_never_comes_is_named_by_those_that_did(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, "roll", (0, 2))
    assert set(found) == {0, 2}
    assert all(one["roll"] == ["node", "node1 did not answer within 5 s"] for one in found.values())


@pytest.mark.slow
def test_the_first_node_is_named_when_it_never_comes(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, "roll", (1, 2))
    assert all(one["roll"][0] == "node" for one in found.values())
    assert all(
        one["roll"][1].startswith("node0 did not answer within 5 s at 127.0.0.1:") for one in found.values()
    )
    assert set(found) == {1, 2}


@pytest.mark.slow
def test_a_node_lost_in_the_middle_is_named_by_the_others(tmp_path: Path) -> None:
    found = run_ranks(tmp_path, "ended", range(3))
    assert set(found) == {0, 2}
    assert all(one["ended"] == ["node", "node1 did not answer within 5 s"] for one in found.values())


# A whole training ---------------------------------------------------------------------------------------------

NODE = """
import sys
from pathlib import Path
from packcli import log
from packcli.launch import ranks
from packcli.plan import TrainOrder
from packcli.store import Store

log.setup()
runs, order, node, endpoint, burn_in = sys.argv[1:]
group = ranks.Group(
    nodes=2, node=int(node), endpoint=endpoint, burn_in=burn_in == "yes", names=("node0", "node1")
)
ranks.run(TrainOrder.model_validate_json(order), Store(Path(runs)), group, ranks.Lines())
"""


def train_on_two(run: Training, burn_in: str) -> list[str]:
    """Both nodes' messages."""
    plan = json.loads((run.cwd / "runs" / "tiny_test" / "plan.json").read_bytes())
    [order] = plan["trains"].values()
    common = [json.dumps(order), f"127.0.0.1:{free_port()}"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", NODE, str(run.cwd / "runs"), common[0], str(node), common[1], burn_in],
            cwd=run.cwd,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in (0, 1)
    ]
    said = [process.communicate(timeout=240)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    return said


@pytest.mark.slow
def test_a_training_is_bitwise_the_same_with_and_without(
    tiny_sweep: Callable[..., Path], run_cli: Callable[..., Done], tmp_path: Path
) -> None:
    train = {"steps": 6, "global_batch": 8}
    config = {"config": {**LLAMA, "attention_dropout": 0.1}}
    run = Training(tiny_sweep(arms=["best_fit"], model=config, train=train), run_cli, tmp_path)
    said = train_on_two(run, "yes")
    assert "burn-in: 2 nodes, all-reduce " in said[0]
    found = run.manifest()
    assert [node["node"] for node in found["provenance"]["burn_in"]["nodes"]] == ["node0", "node1"]
    losses, weights = run.losses(), found["outputs"]["final/model.safetensors"]
    run.forget()
    train_on_two(run, "no")
    assert "burn_in" not in run.manifest()["provenance"]
    assert run.losses() == losses
    assert run.manifest()["outputs"]["final/model.safetensors"] == weights
