"""YAML as plain data, with the line of every key, and problems that know where they are.

Knows nothing of what the keys mean: that is for `sweepfile.py` and `launch/profile.py`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from packcli.errors import ConfigError

KeyPath = tuple[str, ...]

_DOCS = "docs/sweep_file.md"
_MAX_VALUES = 100_000  # aliases of aliases multiply: a few lines of YAML can stand for billions of values
_FLOAT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")


class Lines(dict[KeyPath, int]):
    """The line (from 1) of every key by its path, and the text of every scalar as it was typed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[KeyPath, str] = {}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, except that `1e-5` is a number, as YAML 1.2 has it."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def parse(text: str, where: str, docs: str = _DOCS) -> tuple[dict[str, Any], Lines]:
    """YAML text as a dictionary, and the line (from 1) of every key by its path. `docs`: where keys are listed."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{where}: a mapping of keys to values is expected", f"see {docs}")
        lines = Lines()
        _walk(node, (), lines, where)
        return dict(_Loader(text).construct_document(node)), lines
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply, or within itself", "write it out without `*`") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(
            f"{where}{line}: not valid YAML: {problem}", "only plain YAML is read, no tags"
        ) from None


def _walk(node: yaml.Node, path: tuple[str, ...], lines: Lines, where: str) -> None:
    if len(lines) > _MAX_VALUES:
        raise ConfigError(f"{where}: more than {_MAX_VALUES:,} values", "use fewer aliases (`*`)")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*path, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                name = ".".join(inner)
                raise ConfigError(
                    f"{where}:{line}: duplicate key `{name}`, first on line {lines[inner]}", "keep one"
                )
            lines[inner] = line
            _walk(value, inner, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, str(index))] = value.start_mark.line + 1
            _walk(value, (*path, str(index)), lines, where)
    elif isinstance(node, yaml.ScalarNode):
        lines.texts[path] = node.value


def nearest(key: str, keys: Iterable[str]) -> str | None:
    """What a key that nobody knows may have been meant for."""
    return next(iter(difflib.get_close_matches(key, list(keys), n=1)), None)


class Problems:
    """All that is wrong with a file, each said once, with its line and the nearest key."""

    def __init__(self, where: str, lines: Lines, docs: str = _DOCS) -> None:
        self._where, self._lines, self._docs, self._found = where, lines, docs, dict[str, None]()

    def add(self, path: tuple[str, ...], message: str) -> None:
        known = path
        while known and known not in self._lines:
            known = known[:-1]
        line = f":{self._lines[known]}" if known else ""
        self._found[f"{self._where}{line}: {message}"] = None

    def unknown(self, path: tuple[str, ...], dotted: str, keys: Sequence[str]) -> None:
        """`path`: where it stands in the file; `keys`: what its last part could have been."""
        *parents, key = dotted.split(".")
        near = nearest(key, keys)
        hint = f"did you mean `{'.'.join([*parents, near])}`?" if near else f"known here: {', '.join(keys)}"
        self.add(path, f"unknown key `{dotted}`; {hint}")

    def raise_if_any(self) -> None:
        if self._found:
            raise ConfigError("\n".join(self._found), f"keys and values are described in {self._docs}")
