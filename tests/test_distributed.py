"""Several processes are one run: the same gradients, the same losses, whatever number of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import Data, assert_close, one_step

from packcli.files import read_jsonl
from packcli.plan import TrainOrder
from packcli.train import distributed

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def torchrun(tmp_path: Path, processes: int, job: dict[str, Any]) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--standalone"]
    done = subprocess.run(
        [*command, str(HERE / "ranks.py"), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-8000:]


def losses(data: Data, id_: str) -> list[float]:
    return [record["loss"] for record in read_jsonl(data.store.metrics(id_))]


def counts(data: Data, id_: str) -> list[list[int]]:
    keys = ("rows", "documents", "tokens", "supervised", "slots")
    return [[record[key] for key in keys] for record in read_jsonl(data.store.metrics(id_))]


def with_loss(order: TrainOrder, loss: str) -> TrainOrder:
    return order.model_copy(update={"arm": order.arm.model_copy(update={"loss": loss})})


def test_no_split_of_a_step_over_micro_batches_and_ranks_changes_its_gradient(tiny: Data, tmp_path: Path) -> None:
    """(micro-batch, accumulation, ranks) of (8,1,1), (1,8,1), (2,2,2); a partial step of 5 rows; every arm."""
    asked, wanted = [], []
    for arm in ("padding", "padding_free", "best_fit", "random"):
        for loss in ("token", "document", "row"):
            for count in (8, 5):
                rows = np.arange(count)
                whole = with_loss(tiny.train_order(arm, f"{arm}-{loss}", micro_batch=8), loss)
                reference = one_step(tiny.store, whole, rows)
                single = with_loss(tiny.train_order(arm, f"{arm}-{loss}", micro_batch=1), loss)
                assert_close(one_step(tiny.store, single, rows), reference)
                split = with_loss(tiny.train_order(arm, f"{arm}-{loss}", micro_batch=2), loss)
                asked.append({"order": split.model_dump(mode="json"), "rows": rows.tolist()})
                wanted.append(reference)
    torchrun(tmp_path, 2, {"runs": str(tiny.store.root), "gradients": asked})
    for number, reference in enumerate(wanted):
        assert_close(torch.load(tmp_path / f"gradient-{number}.pt", weights_only=True), reference)


def test_more_ranks_than_rows_do_not_change_the_gradient_nor_hang(tiny: Data, tmp_path: Path) -> None:
    order = tiny.train_order("best_fit", "few", micro_batch=1)
    reference = one_step(tiny.store, order, np.arange(3))
    asked = [{"order": order.model_dump(mode="json"), "rows": [0, 1, 2]}]
    torchrun(tmp_path, 4, {"runs": str(tiny.store.root), "gradients": asked, "per_node": 2})
    assert_close(torch.load(tmp_path / "gradient-0.pt", weights_only=True), reference)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "hybrid": {"sharding": "hybrid"},
}


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_case_24_more_ranks_take_the_same_rows_and_lose_the_same(tiny: Data, tmp_path: Path, world: int) -> None:
    """Also with activations recomputed, and with parameters sharded within pretended nodes of two."""
    orders = {}
    for ranks in (1, world):
        for name, settings in VARIANTS.items():
            for arm in ("padding", "best_fit", "padding_released", "random_released"):
                if name != "plain" and arm != "best_fit":
                    continue
                id_ = f"{world}-w{ranks}-{name}-{arm}"
                orders[ranks, name, arm] = tiny.train_order(arm, id_, ranks=2, micro_batch=1, **settings)
    for ranks in (1, world):
        chosen = [order.model_dump(mode="json") for key, order in orders.items() if key[0] == ranks]
        per_node = 2 if ranks == 4 else 0
        torchrun(tmp_path, ranks, {"runs": str(tiny.store.root), "train": chosen, "per_node": per_node})
    for (_ranks, name, arm), order in orders.items():
        reference = orders[1, "plain", arm].id
        assert losses(tiny, order.id) == pytest.approx(losses(tiny, reference), rel=1e-5), (order.id, name)
        assert counts(tiny, order.id) == counts(tiny, reference), order.id


def test_bfloat16_trains_alike_on_one_rank_and_two(tiny: Data, tmp_path: Path) -> None:
    orders = []
    for world in (1, 2):
        order = tiny.train_order("best_fit", f"bf16-{world}", optimizer_state="bfloat16")
        order = order.model_copy(update={"model": order.model.model_copy(update={"dtype": "bfloat16"})})
        orders.append(order)
        torchrun(tmp_path, world, {"runs": str(tiny.store.root), "train": [order.model_dump(mode="json")]})
    one, two = (losses(tiny, order.id) for order in orders)
    assert one == pytest.approx(two, rel=0.02)
    assert one[-1] < one[0]


def test_replicas_of_a_shard_round_otherwise_and_drift_apart(tiny: Data, tmp_path: Path) -> None:
    """Two nodes of one process: hybrid sharding keeps two replicas, which nothing ever compares again."""
    order = tiny.train_order("best_fit", "replicas", optimizer_state="bfloat16", sharding="hybrid", steps=3)
    order = order.model_copy(update={"model": order.model.model_copy(update={"dtype": "bfloat16"})})
    job = {"runs": str(tiny.store.root), "train": [order.model_dump(mode="json")], "per_node": 1, "rounded": True}
    torchrun(tmp_path, 2, job)
    one, two = (json.loads((tmp_path / f"rounded-{rank}.json").read_text()) for rank in range(2))
    assert len(one) > 3
    assert one == two


def test_whole_layers_pile_up_while_the_model_is_cut(tiny: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that was cut is let go of before the next one comes: all of a large model fit on no GPU."""
    order = tiny.train_order("padding", "cut")
    config = {**order.model.config, "num_hidden_layers": 6}
    order = order.model_copy(
        update={"model": order.model.model_copy(update={"config": config, "dtype": "bfloat16"})}
    )
    sent, made, most = distributed._sent, [], [0]

    def counted(tensor: torch.Tensor, processes: Any) -> torch.Tensor:
        fresh = sent(tensor, processes)
        made.append(weakref.ref(fresh))
        most[0] = max(most[0], sum(one() is not None for one in made))
        return fresh

    monkeypatch.setattr(distributed, "_sent", counted)
    try:
        one_step(tiny.store, order, np.arange(2))
    finally:
        distributed.finish()
    of_a_layer = 9
    assert len(made) >= 6 * of_a_layer
    assert most[0] <= 2 * of_a_layer, "whole layers stay although they were cut"
