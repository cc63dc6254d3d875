"""A trainer's YAML file, and what becomes of each of its keys: exactly one thing, so that none is lost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from packcli.errors import ConfigError
from packcli.log import is_secret
from packcli.yamlfile import KeyPath, nearest, parse, read

Fate = Literal["carried", "changed", "not_carried", "no_effect"]
"""In the sweep as it was; in the sweep, meaning something else; not in the sweep, though it changes what is
trained; of no matter to what is trained."""

DOCS = "docs/coming_from.md"
_HIDDEN = "(hidden)"
_SHOWN = 60
_OFF: tuple[Any, ...] = (None, False, 0, "", "none", "no", "None", [], {})


@dataclass(frozen=True, slots=True)
class Entry:
    """What became of one key. `line`: in the file, from 1. `to`: keys of the sweep that hold it now.

    `why` and `do` are one line each: why it is not simply carried, and what one can do about it.
    """

    key: str
    line: int
    value: str
    fate: Fate
    to: tuple[str, ...] = ()
    why: str = ""
    do: str = ""


class Source:
    """The file as plain data with the lines of its keys, and the entries made of it so far.

    Raises:
        ConfigError: it is missing, or not a YAML mapping.
    """

    def __init__(self, path: Path) -> None:
        text = read(path, "trainer's file", f"give a trainer's YAML file; see {DOCS}")
        self.path = path
        self._document, self._lines = parse(text, str(path), DOCS)
        _check_words(self._document, str(path))
        self._entries: dict[KeyPath, Entry] = {}
        self._asked: set[str] = set()  # what a key that nobody knows may have been meant for
        self.unknown: list[str] = []
        """Keys that no importer asked for, each as a sentence; filled by `entries`."""

    @property
    def keys(self) -> frozenset[str]:
        """Of the first level; those without a value too."""
        return frozenset(map(str, self._document))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key (`datasets.0.path`); `default` where there is none, or it is empty."""
        self._asked.add(key)
        value: Any = self._document
        for part in key.split("."):
            if isinstance(value, dict):
                value = value.get(part)
            elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = None
        return default if value is None or value == "" else value

    def words(self, key: str) -> dict[str, Any]:
        """The mapping under a key, to be read key by key; empty where there is none.

        Elsewhere keys may be numbers, as in axolotl's `added_tokens_overrides`.

        Raises:
            ConfigError: one of its keys is no word.
        """
        found = self.get(key)
        if not isinstance(found, dict):
            return {}
        _check_words(found, f"{self.at(key)}: `{key}`")
        return found

    def at(self, key: str) -> str:
        """`file.yaml:12`, of a key that is there."""
        return f"{self.path.name}:{self._lines[tuple(key.split('.'))]}"

    def mark(
        self, key: str, fate: Fate, *, to: tuple[str, ...] = (), why: str = "", do: str = "", once: bool = True
    ) -> None:
        """Say what becomes of a key and all below it; nothing is said of one that is not in the file.

        `once`: False leaves what was said before; else saying two things is a bug.
        """
        if fate != "no_effect":
            self._asked.add(key)
        path = tuple(key.split("."))
        if path not in self._lines:
            return
        if path in self._entries:
            if once:
                raise RuntimeError(f"`{key}` is dealt with twice")
            return
        value = self.get(key)
        self._entries[path] = Entry(key, self._lines[path], self._shown(path, value), fate, to, why, do)

    def dealt_with(self, key: str) -> bool:
        """Whether it was said already what becomes of the key."""
        return tuple(key.split(".")) in self._entries

    def off(self, key: str) -> bool:
        """Whether the key is there and says that something is not used."""
        value = self.get(key)
        return tuple(key.split(".")) in self._lines and any(value is off or value == off for off in _OFF)

    def entries(self, unknown: str) -> list[Entry]:
        """Every key once, in the order of the file; `unknown`: what is said of one that nobody dealt with."""
        known = frozenset(key for key in self._asked if "." not in key)
        for path, value in _leaves(self._document, ()):
            if any(path[:depth] in self._entries for depth in range(1, len(path) + 1)):
                continue
            key, line, shown = ".".join(path), self._lines[path], self._shown(path, value)
            if value is None or value == "":
                self._entries[path] = Entry(key, line, shown, "no_effect", (), "it has no value", "")
                continue
            near = nearest(path[0], known - {path[0]})
            why = f"{unknown} (did you mean `{near}`?)" if near else unknown
            self.unknown.append(f"{self.path.name}:{line} {key}: {why}")
            do = "look up what it does; if it matters, say so by hand"
            self._entries[path] = Entry(key, line, shown, "not_carried", (), why, do)
        return sorted(self._entries.values(), key=lambda entry: (entry.line, entry.key))

    def _shown(self, path: KeyPath, value: Any) -> str:
        """A value on one line; never one that may be a password."""
        if any(map(is_secret, path)):
            return _HIDDEN
        text = self._lines.texts.get(path) or ("" if value is None else orjson.dumps(_showable(value)).decode())
        text = " ".join(text.split())
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _check_words(found: dict[Any, Any], where: str) -> None:
    for key in found:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: a key that is no word: `{key}`", "no trainer has such a key; take it out")


def _showable(value: Any) -> Any:
    """A value without what may be a password, its keys as words."""
    if isinstance(value, dict):
        return {str(key): _HIDDEN if is_secret(str(key)) else _showable(inner) for key, inner in value.items()}
    return [_showable(inner) for inner in value] if isinstance(value, list) else value


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    """Paths of all values with these, lists of plain values as one, and mappings of what are no words."""
    if isinstance(value, dict) and value and all(isinstance(key, str) for key in value):
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    elif path:
        yield path, value
