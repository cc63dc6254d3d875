"""What a trainer really computes, read off the model it trains: no trust in its labels, masks or reported numbers.

Nothing of packcli is imported here: this file also runs inside another trainer's environment (`bundle.py`).

The learning rate of an audited run is next to nothing, so the weights stay, and each step's gradient can be taken
apart. Of the output head it is, for token v and hidden states h_p of positions p,

    G[v] = sum_p w_p (softmax_p(v) - [v is the label at p]) h_p

A twin u of v has the same row in the head and is never a label, so G[u] - G[v] = sum of w_p h_p over exactly those
positions that were trained to predict v: which position predicts which token, and what it counts in the loss,
whatever became of labels, masks, shifts and divisions on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from packcli.audit.crafted import BEGIN, STOP, Document, vocabulary

TOLERANCE = 1e-3
"""Of a residual, relative: fp32 gradients summed over a step leave some 1e-6."""
LOOKED_INTO = 4
"""Forward passes of a run that are repeated with changed and with single documents."""


@dataclass
class Pass:
    """One forward pass: ids [B, S]; hidden [B, S, D]; owners: of each slot, (document, place in it) or None."""

    ids: torch.Tensor
    hidden: torch.Tensor
    owners: list[list[tuple[int, int] | None]]
    looked: dict[str, float]
    given: dict[str, str]


@dataclass
class Recorder:
    """Attached to a process before its trainer is made; `steps` grows by one record a step, ready for JSON."""

    made: list[Document]
    reference: Any
    steps: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)
    quiet: bool = False
    looks: int = 0

    def __post_init__(self) -> None:
        self.vocabulary = vocabulary(self.made)
        self.ids = {token: id_ for id_, token in enumerate(self.vocabulary)}
        self.half = len(self.vocabulary) // 2
        words = [(token, (d, p)) for d, one in enumerate(self.made) for p, token in enumerate(one.tokens)]
        self.places = {token: place for token, place in words if token[0] == "d"}
        self.body: Any = None

    # What the model is given ---------------------------------------------------------------------------------

    def saw(self, run: Callable[..., Any], body: Any, values: dict[str, Any], hidden: torch.Tensor) -> None:
        """A forward pass of the model's body in training."""
        self.body, ids = body, values["input_ids"]
        owners = [self._owners([self.vocabulary[id_] for id_ in row]) for row in ids.tolist()]
        looked: dict[str, float] = {}
        if self.looks < LOOKED_INTO and not _several():
            self.looks += 1
            with torch.no_grad():
                looked = self._look(lambda changed: run(body, **{**values, "input_ids": changed}), ids, owners)
                looked["alone"] = self._alone(ids, hidden, owners)
        given = {name: _described(value) for name, value in values.items() if value is not None}
        self.passes.append(Pass(ids.detach().clone(), hidden.detach().double(), owners, looked, given))

    def _owners(self, row: list[str]) -> list[tuple[int, int] | None]:
        """Words tell their place; a template's token is of its neighbour's document, if that has it there."""
        found = [self.places.get(token) for token in row]
        words = [slot for slot, owner in enumerate(found) if owner is not None]
        owners = list(found)
        for slot, token in enumerate(row):
            if found[slot] is None:
                left = next((s for s in reversed(words) if s < slot), None)
                right = next((s for s in words if s > slot), None)
                for near in (left, right) if token in (STOP, "<|end_of_text|>") else (right, left):
                    owner = self._beside(found, near, slot, token)
                    if owner is not None:
                        owners[slot] = owner
                        break
        return owners

    def _beside(
        self, found: list[tuple[int, int] | None], near: int | None, slot: int, token: str
    ) -> tuple[int, int] | None:
        owner = None if near is None else found[near]
        if owner is None or near is None:
            return None
        document, place = owner[0], owner[1] + slot - near
        tokens = self.made[document].tokens
        return (document, place) if 0 <= place < len(tokens) and tokens[place] == token else None

    def _look(
        self, run: Callable[[torch.Tensor], Any], ids: torch.Tensor, owners: list[list[tuple[int, int] | None]]
    ) -> dict[str, float]:
        """Exchange the words of each row's first document; how many tokens of other documents that moves."""
        changed, others = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
        for number, row in enumerate(owners):
            first = next((owner[0] for owner in row if owner is not None), None)
            for slot, owner in enumerate(row):
                if owner is not None and owner[0] != first:
                    others[number, slot] = True
                elif owner is not None and self.vocabulary[ids[number, slot]][0] == "d":
                    changed[number, slot] += self.half
        if not others.any():
            return {}
        before, after = (_hidden(run(some)).double() for some in (ids, changed))
        moved = (before - after).abs().amax(-1)[others] / before.abs().max()
        return {"others": int(others.sum()), "moved": int((moved > 1e-5).sum()), "by": float(moved.max())}

    def _alone(self, ids: torch.Tensor, hidden: torch.Tensor, owners: list[list[tuple[int, int] | None]]) -> float:
        """Largest relative distance between a document's hidden states here and when the model reads it alone."""
        worst = 0.0
        for row, start, stop in pieces(owners):
            alone = _hidden(self._read(ids[row, start:stop]))[0]
            worst = max(worst, float((alone - hidden[row, start:stop]).abs().max() / alone.abs().max()))
        return worst

    def _read(self, ids: torch.Tensor) -> Any:
        self.quiet = True
        try:
            return self.reference.model(input_ids=ids[None], use_cache=False)
        finally:
            self.quiet = False

    # What a step trains --------------------------------------------------------------------------------------

    def stepped(self, parameters: list[torch.Tensor]) -> None:
        """Just before the optimizer's step: the gradients are there, and whole."""
        if not self.passes:
            return  # a step without gradients, by which optimizers make their state for a checkpoint
        embedding = self.body.embed_tokens.weight
        head = next(p for p in parameters if p is not embedding and p.shape == embedding.shape)
        gradient, weight = (_whole(tensor).double() for tensor in (head.grad, head.detach()))
        # A step's pass without any token of ours, such as a dummy of a rank without rows, trains nothing.
        everyone = _gathered([(p.ids, p.hidden, p.owners) for p in self.passes])
        passes = [(rank, *one) for rank, own in enumerate(everyone) for one in own]
        pairs, unexplained = self._pairs(passes, gradient[self.half :] - gradient[: self.half], weight)
        record: dict[str, Any] = {
            "pairs": pairs,
            "unexplained": unexplained,
            "rows": [
                [rank, number, [[*owners[row][start], stop - start] for row_, start, stop in spans if row_ == row]]
                for number, (rank, ids, _, owners) in enumerate(passes)
                for spans in [pieces(owners)]
                for row in range(len(ids))
            ],
            "slots": sum(ids.numel() for _, ids, _, _ in passes),
            "looked": [p.looked for p in self.passes if p.looked],
            "given": self.passes[0].given if self.passes else {},
            "gradient": float(gradient.norm()),
        }
        if not self.steps and not _several():
            record["apart"] = self._apart(pairs, passes, [p for p in parameters if p.grad is not None])
        self.steps.append(record)
        self.passes = []

    def _pairs(
        self, passes: list[Any], difference: torch.Tensor, weight: torch.Tensor
    ) -> tuple[list[list[Any]], list[str]]:
        """[document, place, predicting document, its place, weight, cross entropy] of each trained token."""
        hidden = torch.cat([h.flatten(0, 1) for _, _, h, _ in passes])
        owners = [owner for _, _, _, rows in passes for row in rows for owner in row]
        ids = torch.cat([i.flatten() for _, i, _, _ in passes])
        last = torch.cat([(torch.arange(i.numel()) + 1) % i.shape[1] == 0 for _, i, _, _ in passes])
        sizes = difference.norm(dim=1)
        pairs: list[list[Any]] = []
        unexplained: list[str] = []
        for token in (sizes > TOLERANCE * sizes.max()).nonzero()[:, 0].tolist():
            after = [s for s in range(len(ids) - 1) if not last[s] and ids[s + 1] == token and owners[s + 1]]
            weights, rest = _solved(hidden[after], difference[token])
            targets = [owners[slot + 1] for slot in after]
            if rest > TOLERANCE and (place := self.places.get(self.vocabulary[token])) is not None:
                # Not from the token before it. A word stands once, so some one position was trained to say it.
                likeness = hidden @ difference[token] / hidden.norm(dim=1)
                after, targets = [int(likeness.argmax())], [place]
                weights, rest = _solved(hidden[after], difference[token])
            if rest > TOLERANCE:
                unexplained.append(self.vocabulary[token])
                continue
            for slot, target, counts in zip(after, targets, weights.tolist(), strict=True):
                if abs(counts) > TOLERANCE * float(weights.abs().max()):
                    logits = hidden[slot] @ weight.T
                    entropy = float(logits.logsumexp(0) - logits[token])
                    pairs.append([*target, *(owners[slot] or (-1, -1)), counts, entropy])
        return pairs, unexplained

    def _apart(self, pairs: list[list[Any]], passes: list[Any], parameters: list[torch.Tensor]) -> float:
        """Largest max |a - b| / max |b| of a parameter: the step's gradient, and that of its documents one by one.

        Each token has the weight it had in the step; only tokens predicted from within their document count.
        """
        counts = {(d, p): w for d, p, from_d, from_p, w, _ in pairs if (d, p - 1) == (from_d, from_p)}
        own = [p for p in self.reference.parameters() if p.requires_grad]
        total = torch.zeros(())
        for _, ids, _, owners in passes:
            for row, start, stop in pieces(owners):
                logits = self.reference.lm_head(_hidden(self._read(ids[row, start:stop]))[0]).double()
                for slot in range(start + 1, stop):
                    if (counted := counts.get(owners[row][slot])) is not None:
                        scores = logits[slot - start - 1]
                        total = total + counted * (scores.logsumexp(0) - scores[ids[row, slot]])
        if not total.requires_grad:
            return float("inf")  # nothing is trained from within its document
        expected = dict(zip(map(id, own), torch.autograd.grad(total, own), strict=True))
        # Same shapes in the same places: the trainer's parameters may come in another order.
        worst = 0.0
        for mine in own:
            near: list[Any] = [p for p in parameters if p.shape == mine.shape and torch.equal(p, mine)]
            gradient = expected[id(mine)]
            errors = [float((p.grad - gradient).abs().max() / gradient.abs().max()) for p in near]
            worst = max(worst, min(errors, default=float("inf")))
        return worst


def attach(recorder: Recorder) -> Callable[[], None]:
    """Have every Llama, every optimizer and transformers' `Trainer.log` here tell it; what ends that."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook
    from transformers import Trainer
    from transformers.models.llama.modeling_llama import LlamaModel

    plain, log = LlamaModel.forward, Trainer.log

    @functools.wraps(plain)
    def forward(self: Any, input_ids: Any = None, **values: Any) -> Any:
        out = plain(self, input_ids=input_ids, **values)
        if self.training and torch.is_grad_enabled() and not recorder.quiet:
            recorder.saw(plain, self, {"input_ids": input_ids, **values}, _hidden(out))
        return out

    @functools.wraps(log)
    def logged(self: Any, logs: dict[str, float], *args: Any, **values: Any) -> Any:
        if "loss" in logs:
            recorder.losses.append(float(logs["loss"]))
        return log(self, logs, *args, **values)

    def step(optimizer: Any, *_: Any) -> None:
        recorder.stepped([p for group in optimizer.param_groups for p in group["params"]])

    LlamaModel.forward, Trainer.log = forward, logged
    hook = register_optimizer_step_pre_hook(step)

    def detach() -> None:
        LlamaModel.forward, Trainer.log = plain, log
        hook.remove()

    return detach


def pieces(owners: list[list[tuple[int, int] | None]]) -> list[tuple[int, int, int]]:
    """(row, start, stop) of each run of slots that hold a document's tokens in order."""
    found = []
    for number, row in enumerate(owners):
        start: int | None = None
        for slot in range(len(row) + 1):
            owner = row[slot] if slot < len(row) else None
            before = row[slot - 1] if slot else None
            goes_on = owner is not None and before is not None and owner == (before[0], before[1] + 1)
            if start is not None and not goes_on:
                found.append((number, start, slot))
                start = None
            if start is None and owner is not None:
                start = slot
    return found


def _solved(states: torch.Tensor, difference: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Weights w with sum of w_p h_p = difference, by least squares; what is left of it, relative."""
    if not len(states) or len(states) > states.shape[1]:
        return torch.zeros(len(states)), 1.0
    # Documents that begin alike have the same states there; the cut-off shares their weight out evenly.
    weights = torch.linalg.lstsq(states.T, difference[:, None], rcond=1e-5, driver="gelsd").solution[:, 0]
    return weights, float((states.T @ weights - difference).norm() / difference.norm())


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _gathered(mine: Any) -> list[Any]:
    """What every rank has, by rank."""
    if not _several():
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def _hidden(out: Any) -> torch.Tensor:
    hidden = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    return hidden  # type: ignore[no-any-return]


def _whole(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().cpu()


def _described(value: Any) -> str:
    """A tensor that the model was given, in a few words: how often positions begin anew, a mask's shape."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    shape = "x".join(map(str, value.shape))
    if value.dtype in (torch.int64, torch.int32) and value.numel() > 1:
        return f"{shape} from {int(value.min())} to {int(value.max())}, {int((value == 0).sum())} zeros"
    return f"{shape} {str(value.dtype).removeprefix('torch.')}"


__all__ = ["BEGIN", "Pass", "Recorder", "attach", "pieces"]
