"""A causal language model and its loss as one module."""

from __future__ import annotations

from typing import Any, Literal

import torch

from packcli.model import attention, head
from packcli.model.attention import Backend, Segments
from packcli.model.collate import Batch


class Trainee(torch.nn.Module):
    """What a training step calls. One module, so that a sharded model still holds the head's weight, whole, while
    the loss uses it.

    `model`: a transformers causal model (`...ForCausalLM`) loaded with our attention.

    Raises:
        ConfigError: the model has a kind of attention that cannot be computed.
    """

    def __init__(self, model: Any, backend: Backend, kind: head.Kind = "own") -> None:
        super().__init__()
        self.model = model
        self.backend = backend
        self.kind: head.Kind = kind
        self.windows = attention.windows(model.config)

    def forward(self, batch: Batch, out: Literal["loss", "hidden", "logits"] = "loss") -> torch.Tensor:
        """loss: the weighted sum of cross entropies over the batch's labels, fp32, a scalar that always carries a
        gradient. hidden: [N, D], what the head is given. logits: [N, V] as the model itself makes them.
        """
        segments = Segments(batch.segments, self.backend, batch.input_ids.device, self.windows)
        if out == "logits":
            return self._run(self.model, batch, segments).logits[0]  # type: ignore[no-any-return]
        hidden = self._run(self.model.base_model, batch, segments).last_hidden_state[0]
        return hidden if out == "hidden" else head.loss(self.model, hidden, batch, self.kind)

    def _run(self, module: Any, batch: Batch, segments: Segments) -> Any:
        return module(
            input_ids=batch.input_ids, position_ids=batch.position_ids, segments=segments, use_cache=False
        )
