"""Where a prompt ends and its continuation starts, in tokens; the same for every engine."""

from __future__ import annotations

from typing import Any


def encode_pair(lm: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its continuation; takes the place of `_encode_pair` in lm-eval's models.

    lm-eval moves white space at the end of a prompt into the continuation. After a chat template that is the
    newline behind `assistant`, which no training on answers teaches a model to write: every greedy answer would
    count as wrong. Pairs whose prompt does not fit are noted in `lm.truncated`.
    """
    start = lm.tok_encode(context)
    whole = lm.tok_encode(context + continuation)
    if whole[: len(start)] != start:
        # A token lies across the border; a model that continues the prompt never gets to write it.
        whole = start + lm.tok_encode(continuation, add_special_tokens=False)
    # The last token is only predicted, never read; what does not fit is lost at the beginning.
    if len(whole) > lm.max_length + 1:
        lm.truncated.add((context, continuation))
    return start, whole[len(start) :]
