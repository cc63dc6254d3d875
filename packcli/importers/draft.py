"""The sweep that is being made of a trainer's file: its values with where each came from, and its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from packcli.importers.source import Entry, Source
from packcli.log import plain
from packcli.yamlfile import FLOAT

_SECTIONS = ("model", "data", "train", "eval")


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with quotes around text that packcli would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True)
class Assumed:
    """A value of the sweep that the file does not hold: a default of the trainer, or packcli's proposal."""

    key: str
    value: Any
    why: str


@dataclass(slots=True)
class Draft:
    """`values`, `origins`: by dotted key. `arms`: own ones of the matrix. `files`: to be written beside the sweep.

    `differences`: what packcli does otherwise on purpose, a sentence each.
    """

    source: Source
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    assumed: list[Assumed] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    matrix: dict[str, list[Any]] = field(default_factory=dict)
    baseline: str = "padding"
    files: dict[str, str] = field(default_factory=dict)

    def carry(self, key: str, to: str, value: Any) -> None:
        """A key of the file as it is."""
        self._put(to, value, f"{self.source.at(key)} {key}")
        self.source.mark(key, "carried", to=(to,))

    def change(self, key: str, to: str, value: Any, why: str, do: str = "") -> None:
        """A key of the file under a value or meaning of its own."""
        self._put(to, value, f"{self.source.at(key)} {key}: {why}")
        self.source.mark(key, "changed", to=(to,), why=why, do=do)

    def assume(self, to: str, value: Any, why: str) -> None:
        """A value that the file does not say."""
        self._put(to, value, f"not in the file: {why}")
        self.assumed.append(Assumed(to, value, why))

    def replace(self, to: str, value: Any, why: str) -> None:
        """Another value than the file says, for a reason of its own."""
        self._put(to, value, why)
        self.assumed = [item for item in self.assumed if item.key != to]
        self.assumed.append(Assumed(to, value, why))

    def remove(self, beginning: str) -> None:
        """Take out all keys that begin so."""
        for key in [key for key in self.values if key == beginning or key.startswith(f"{beginning}.")]:
            del self.values[key]
            self.assumed = [item for item in self.assumed if item.key != key]

    def drop(self, key: str, why: str, do: str) -> None:
        """A key that changes what is trained, and that packcli has nothing for; of no effect where it is off."""
        if self.source.off(key):
            self.source.mark(key, "no_effect", why="it is off")
        else:
            self.source.mark(key, "not_carried", why=why, do=do)

    def ignore(self, key: str, why: str) -> None:
        """A key without effect on what is trained."""
        self.source.mark(key, "no_effect", why=why)

    def pads(self, arm: str) -> None:
        """Ask a file that pads: what if it packed? At equal rows, and at equal documents a step."""
        self.baseline = arm
        self.matrix = {
            "train.batch_unit": ["rows", "documents"],
            "arm": [arm, "padding_free", "best_fit"],
            **self.matrix,
        }
        self.origins["train.batch_unit"] = "rows: as many rows a step, as when only packing is switched on"
        self.origins["train.batch_unit"] += "; documents: as many documents a step"
        del self.values["train.batch_unit"]

    def packs(self, arm: str) -> None:
        """Ask a file that packs: what if it padded, or packed as packcli would?"""
        self.matrix = {"arm": ["padding", arm, "best_fit"], **self.matrix}
        self.origins["arm"] = (
            "a step of `padding` holds as many rows, so fewer documents, and there are more steps; give it an arm "
            "of its own, {extends: padding, global_batch: N}, for as many documents a step"
        )

    def _put(self, to: str, value: Any, origin: str) -> None:
        self.values[to] = value
        self.origins[to] = origin

    def text(self, name: str, made_by: str, entries: list[Entry]) -> str:
        """The sweep file."""
        lines = [plain(f"# {made_by}"), f"name: {inline(name)}"]
        for section in _SECTIONS:
            own = {key: value for key, value in self.values.items() if key.split(".")[0] == section}
            if own:
                lines += [f"{section}:", *self._block(own, section, 1)]
        if self.arms:
            lines.append("arms:")
        lines += [f"  {arm}: {inline(fields)}" for arm, fields in self.arms.items()]
        lines.append(f"baseline: {self.baseline}")
        lines.append("matrix:")
        for axis, values in self.matrix.items():
            lines.append(f"  {axis}: {inline(values)}{_comment(self.origins.get(axis, ''))}")
        missing = [entry for entry in entries if entry.fate == "not_carried"]
        if missing:
            lines += ["", "# Not carried:"]
            # Shown and not obeyed: a line break in a key of theirs would begin a line of the sweep.
            lines += [plain(f"#   line {one.line}, {one.key}: {one.value}. {_sentence(one)}") for one in missing]
        return "\n".join([*lines, ""])

    def _block(self, own: dict[str, Any], parent: str, depth: int) -> list[str]:
        lines, done = list[str](), set[str]()
        for key, value in own.items():
            head, dot, _ = key.removeprefix(f"{parent}.").partition(".")
            inner = f"{parent}.{head}"
            indent = "  " * depth
            if not dot:
                lines.append(f"{indent}{head}: {inline(value)}{_comment(self.origins[key])}")
            elif inner not in done:
                done.add(inner)
                nested = {each: item for each, item in own.items() if each.startswith(f"{inner}.")}
                lines += [f"{indent}{head}:", *self._block(nested, inner, depth + 1)]
        return lines


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()


def _comment(text: str) -> str:
    return f"  # {plain(' '.join(text.split()))}" if text else ""


def _sentence(entry: Entry) -> str:
    return f"{entry.why}; {entry.do}" if entry.do else entry.why
