"""What tests of training share: a small prepared store, its rows, a two-layer model, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from packcli import flops, stages
from packcli.config import ARMS, ArmSpec, ModelSpec, SourceSpec, TrainSpec
from packcli.data import index as indexes
from packcli.data.index import Index
from packcli.data.tokenizer import load_directory
from packcli.data.tokens import Tokens
from packcli.model import attention, load
from packcli.model.collate import Batch, collate
from packcli.model.trainee import Trainee
from packcli.plan import Batching, IndexOrder, TokenizerOrder, TokensOrder, TrainOrder
from packcli.store import Store
from packcli.train import distributed, loss, step

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
}
MAX_LENGTH = 192
CPU = torch.device("cpu")
BACKEND = attention.choose("auto", CPU, torch.float32)


def arm(name: str) -> ArmSpec:
    return ArmSpec.model_validate(ARMS[name])


class Data:
    """A small token store and its row indexes."""

    def __init__(self, root: Path, source: str, max_documents: int) -> None:
        self.store = Store(root)
        tokenizer = TokenizerOrder(
            sources=(SourceSpec(source=source),), max_documents=max_documents, template="chatml", vocab_size=600
        )
        self.order = TokensOrder(
            id="tokens",
            processes=1,
            sources=(SourceSpec(source=source),),
            fingerprints=(),
            max_documents=max_documents,
            on_error="fail",
            max_errors=1,
            train_on="assistant",
            template="chatml",
            tokenizer=tokenizer,
        )
        self.manifest = stages.prepare_tokens(self.order, self.store)
        self.tokens: Tokens = stages.open_tokens(self.store, self.manifest)
        self.tokenizer = load_directory(self.store.tokenizer("tokens"))

    def index(self, name: str, max_length: int = MAX_LENGTH, seed: int = 0, epochs: int = 1) -> Index:
        order = IndexOrder(
            id=f"{name}-{max_length}-{seed}" + (f"-{epochs}" if epochs > 1 else ""),
            tokens="tokens",
            max_length=max_length,
            validation=0.1,
            seed=seed,
            layout=arm(name).rows.model_copy(update={"repack_each_epoch": epochs > 1}),
            batching=Batching(global_batch=4, batch_unit="rows", micro_batch=2, ranks=1),
            epochs=epochs,
        )
        stages.prepare_index(order, self.store)
        return indexes.read(self.store.rows(order.id))

    def model(self, seed: int = 0) -> Trainee:
        spec = ModelSpec(config=LLAMA, tokenizer="train", vocab_size=600)
        return Trainee(load.load(spec, None, self.tokenizer, MAX_LENGTH, seed), BACKEND)

    def batch(self, name: str, rows: list[int], max_length: int = MAX_LENGTH) -> Batch:
        return collate(self.tokens, self.index(name, max_length), rows, arm(name), max_length, 0)

    def train_order(self, name: str, id_: str, **changes: object) -> TrainOrder:
        self.index(name)
        train = {"steps": 8, "lr": 1e-2, "global_batch": 4, "micro_batch": 2, "threads": 1, **changes}
        return TrainOrder(
            id=id_,
            tokens="tokens",
            index=f"{name}-{MAX_LENGTH}-0",
            base=None,
            model=ModelSpec(config=LLAMA, tokenizer="train", vocab_size=600),
            arm=arm(name),
            train=TrainSpec.model_validate(train),
            max_length=MAX_LENGTH,
            seed=0,
        )


def gradients(model: torch.nn.Module, parts: list[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Token-mean loss over all parts, and its gradient by parameter."""
    model.zero_grad()
    labels = sum(len(part.labels) for part in parts)
    total = sum(model(part) for part in parts) / labels
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(one: tuple[float, dict], other: tuple[float, dict], tolerance: float = 1e-5) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for name, reference in other[1].items():
        worst = (one[1][name] - reference).abs().max() / reference.abs().max()
        assert worst <= tolerance, f"{name}: {worst:.2e}"


def stop_after(step: int) -> Callable[[int, int, str], None]:
    """A note that ends the run as a kill would: nothing is cleaned up after the given step."""

    class Killed(BaseException):
        pass

    def note(done: int, total: int, remark: str) -> None:
        if done == step:
            raise Killed

    note.error = Killed  # type: ignore[attr-defined]
    return note


def one_step(store: Store, order: TrainOrder, chosen: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradient of one step, by all the processes there are; the gradient is rank 0's to read."""
    processes = distributed.start(group=distributed.needs_group(order.model.dtype))
    manifest = store.manifest("tokens", order.tokens)
    tokens, rows = stages.open_tokens(store, manifest), indexes.read(store.rows(order.index))
    tokenizer = load_directory(store.tokenizer(order.tokens))
    model = load.load(order.model, None, tokenizer, order.max_length, order.seed, empty=not processes.is_main)
    trainee = Trainee(model, attention.choose("auto", CPU, torch.float32))
    distributed.lay_out(trainee, order.train, order.model.dtype, order.max_length, processes)
    costs = step.costs(order, rows, flops.shape(model.config.to_dict()))
    weighting = loss.weighting(order.arm.loss, rows, indexes.Labels(tokens))
    objective = step.Objective(order, tokens, rows, weighting, costs, 0, processes)
    mean, _ = objective.backward(trainee, chosen)
    found = {}
    for name, parameter in trainee.model.named_parameters():
        assert parameter.grad is not None, name
        whole = parameter.grad
        found[name] = whole.full_tensor() if hasattr(whole, "full_tensor") else whole.clone()
    return mean, found
