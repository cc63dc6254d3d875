"""What an engine answered, on disk as soon as it was said: a run that was killed asks only for the rest.

One file of JSON lines belongs to one eval id, so to one checkpoint and one protocol; lm-eval's own cache knows
neither and would hand the first checkpoint's answers to the next.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from packcli.errors import IntegrityError
from packcli.files import append_lines, digest, json_line, seal, unseal

Note = Callable[[int, int, str], None]
Request = tuple[str, dict[str, Any]]
"""A prompt and its generation settings, as lm-eval's `Instance.args` has them."""

_COMPARED_AT_ONCE = 256
"""Given answers that are compared between two writes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A generated answer: `num_tokens` with the token that ended it; None where an engine does not say."""

    text: str
    num_tokens: int | None = None
    ended: Literal["stop", "length"] | None = None


def texts(batches: Iterable[list[tuple[int, Answer]]], count: int) -> list[str]:
    """The texts of an engine's `answers` in the order of their requests."""
    found = {number: answer.text for batch in batches for number, answer in batch}
    return [found[number] for number in range(count)]


class Recorded:
    """An lm-eval model whose answers are kept in `path`; everything else is the model's own.

    A request is known by what it asks, and by how often that was asked before in the same call.

    Raises:
        IntegrityError: `path` holds the answers of another eval id, or a line of it is damaged. A torn last line
            is what a killed process leaves: it is dropped, and its request asked again.
    """

    def __init__(self, lm: Any, path: Path, eval_id: str, note: Note = lambda *_: None) -> None:
        """`note(done, total, what)` is told how many answers there are."""
        self._lm, self._path, self._note = lm, path, note
        self.num_asked = 0
        """Requests that went to the model; the others were on disk."""
        self._used: list[dict[str, Any]] = []
        self._records = _read(path, eval_id)
        if not path.exists():
            _append(path, [{"eval": eval_id}])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """As lm-eval asks: one text a request."""
        keys = _keys("generate_until", requests)
        missing = [number for number, key in enumerate(keys) if key not in self._records]
        self.num_asked += len(missing)
        done = len(keys) - len(missing)
        self._note(done, len(keys), "answers")
        for batch in self._lm.answers([requests[number].args for number in missing]):
            self._keep(
                [
                    {
                        "key": keys[missing[n]],
                        "text": said.text,
                        "num_tokens": said.num_tokens,
                        "ended": said.ended,
                    }
                    for n, said in batch
                ]
            )
            done += len(batch)
            self._note(done, len(keys), "answers")
        used = [self._records[key] for key in keys]
        self._used += used
        return [record["text"] for record in used]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """As lm-eval asks: (log likelihood of the continuation in nats, whether greedy decoding writes it)."""
        keys = _keys("loglikelihood", requests)
        missing = [number for number, key in enumerate(keys) if key not in self._records]
        # Longest first, choices of one question together: a model reads their common prompt once.
        missing.sort(key=lambda number: (-len(requests[number].args[0]), requests[number].args))
        self.num_asked += len(missing)
        done = len(keys) - len(missing)
        for batch in self._likelihoods([requests[number] for number in missing]):
            self._note(done, len(keys), "given answers compared")
            done += len(batch)
            self._keep(
                [
                    {
                        "key": keys[missing[n]],
                        # JSON has no infinity.
                        "loglikelihood": value if math.isfinite(value) else str(value),
                        "greedy": bool(greedy),
                        "truncated": requests[missing[n]].args in self._lm.truncated,
                    }
                    for n, (value, greedy) in batch
                ]
            )
        used = [self._records[key] for key in keys]
        self._lm.truncated.update(
            request.args for request, record in zip(requests, used, strict=True) if record["truncated"]
        )
        return [(float(record["loglikelihood"]), record["greedy"]) for record in used]

    def facts(self) -> dict[str, float]:
        """Of the answers generated: `cut`, the share that reached the length limit; `mean_tokens`.

        Without what the engine does not say; empty where given answers were compared.
        """
        found = {}
        ended = [record["ended"] for record in self._used if record.get("ended")]
        lengths = [record["num_tokens"] for record in self._used if record.get("num_tokens") is not None]
        if ended:
            found["cut"] = ended.count("length") / len(ended)
        if lengths:
            found["mean_tokens"] = sum(lengths) / len(lengths)
        return found

    def _likelihoods(self, requests: Sequence[Any]) -> Iterator[list[tuple[int, tuple[float, bool]]]]:
        """(number of the request, what `loglikelihood` says), some at a time."""
        if hasattr(self._lm, "likelihoods"):  # several processes, of which none is to wait for the others
            yield from self._lm.likelihoods(requests)
            return
        for start in range(0, len(requests), _COMPARED_AT_ONCE):
            yield list(enumerate(self._lm.loglikelihood(requests[start : start + _COMPARED_AT_ONCE]), start))

    def _keep(self, records: list[dict[str, Any]]) -> None:
        _append(self._path, records)
        self._records |= {record["key"]: record for record in records}


def _keys(kind: str, requests: Sequence[Any]) -> list[str]:
    asked: Counter[str] = Counter()
    keys = []
    for request in requests:
        content = digest([kind, *request.args])
        keys.append(f"{content}-{asked[content]}")
        asked[content] += 1
    return keys


def _read(path: Path, eval_id: str) -> dict[str, dict[str, Any]]:
    """Records by key; cuts a torn last line off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    if not whole:
        path.unlink()
        return {}
    first, *records = _parsed(whole, path)
    if first != {"eval": eval_id}:
        raise IntegrityError(
            f"{path} holds answers of {first.get('eval', 'an unknown evaluation')}, not of {eval_id}",
            "delete it and run again",
        )
    return {record["key"]: record for record in records}


def _parsed(lines: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            record = unseal(line, f"{path}:{number}")
        except IntegrityError:
            record = None
        if not isinstance(record, dict) or (number > 1 and "key" not in record):
            raise IntegrityError(f"{path}:{number}: no answer can be read here", "delete the file and run again")
        yield record


def _append(path: Path, records: Sequence[object]) -> None:
    """Add lines and wait until they are on disk."""
    append_lines(path, [seal(json_line(record)) for record in records])
