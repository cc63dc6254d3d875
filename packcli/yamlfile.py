"""YAML as plain data, with the line of every key, and problems that know where they are.

Knows nothing of what the keys mean: that is for `sweepfile.py` and `launch/profile.py`. A file may come from
anybody: what its size, its depth, its aliases or its tags could do to a machine ends in an error here.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from packcli.errors import ConfigError

KeyPath = tuple[str, ...]

_DOCS = "docs/sweep_file.md"
_MAX_BYTES = 4 << 20
MAX_DEPTH = 64
"""Levels of keys; JSON, by which ids are made, has an end too."""
_MAX_SHOWN = 50
_MAX_VALUES = 100_000  # aliases of aliases multiply: a few lines of YAML can stand for billions of values
# No two of its parts can match the same digits: a number of a million that is none would take hours to refuse.
FLOAT = re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)[eE][-+]?\d+$")
"""Text that is a number here, and none to PyYAML: `1e5`."""
_MOST_SIXTIES = 10
"""Colons in a number of base 60 (`1:30`, YAML 1.1) that can have 63 bits or fewer."""
_MERGE, _INT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:int"
_KINDS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))


class Lines(dict[KeyPath, int]):
    """The line (from 1) of every key by its path, and the text of every scalar as it was typed."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[KeyPath, str] = {}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader for what JSON has, too: `1e-5` is a number, as YAML 1.2 has it, and a date is text."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            if (
                node.tag == _INT and str(node.value).count(":") > _MOST_SIXTIES
            ):  # PyYAML takes hours over a million
                raise OverflowError
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, ArithmeticError) as error:  # such as `!!bool x`, or 5,000 digits
            problem = f"no value can be made of this ({type(error).__name__})"
            raise ConstructorError(None, None, problem, node.start_mark) from None
        endless = isinstance(value, float) and not math.isfinite(value)
        if endless or (
            isinstance(value, int) and value.bit_length() > 63
        ):  # JSON, by which ids are made, has neither
            problem = "a number that is not finite, or has more than 63 bits"
            raise ConstructorError(None, None, problem, node.start_mark)
        return value


_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _KINDS
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, like) for tag, like in known if not tag.endswith(":timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


def read(path: Path, what: str, fix: str) -> str:
    """The text of a YAML file. `what` it is, as in "sweep file"; `fix`: what to do if it is not there.

    Raises:
        ConfigError: it is missing, cannot be read, is no UTF-8, or is far too large to be one.
    """
    expected = f"a {what} is YAML in UTF-8"
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no {what} `{path}`", fix) from None
    except OSError as error:
        raise ConfigError(f"cannot read `{path}`: {error.strerror}", expected) from None
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"`{path}` is larger than {_MAX_BYTES >> 20} MiB", expected)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: cannot read it: this is no UTF-8", expected) from None


def parse(text: str, where: str, docs: str = _DOCS) -> tuple[dict[str, Any], Lines]:
    """YAML text as a dictionary, and the line (from 1) of every key by its path. `docs`: where keys are listed.

    Raises:
        ConfigError: it is no mapping of plain values, holds tags, or stands for more than can be meant.
    """
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
    except (ValueError, OverflowError) as error:  # PyYAML's own scanner: an escape such as "\UFFFFFFFF"
        raise ConfigError(f"{where}: not valid YAML: {error}", "only plain YAML is read, no tags") from None


def _walk(node: yaml.Node, path: tuple[str, ...], lines: Lines, where: str) -> None:
    if len(lines) > _MAX_VALUES:
        raise ConfigError(f"{where}: more than {_MAX_VALUES:,} values", "use fewer aliases (`*`)")
    if len(path) > MAX_DEPTH:
        raise ConfigError(f"{where}: nested too deeply, or within itself", "write it out without `*`")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{where}:{line}: a key is a word, not a list or mapping", "write it as one word"
                )
            inner = (*path, _text(key, where))
            if inner in lines:
                name = ".".join(inner)
                raise ConfigError(
                    f"{where}:{line}: duplicate key `{name}`, first on line {lines[inner]}", "keep one"
                )
            lines[inner] = line
            _walk(value, inner, lines, where)
        for each in _merged(node):
            _merge(each, path, lines, where)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*path, str(index))] = value.start_mark.line + 1
            _walk(value, (*path, str(index)), lines, where)
    elif isinstance(node, yaml.ScalarNode):
        lines.texts[path] = _text(node, where)


def _merged(node: yaml.MappingNode) -> list[yaml.MappingNode]:
    """The mappings that `<<: *name` brings into one, those first that go before others."""
    found = list[yaml.Node]()
    for key, value in node.value:
        if key.tag == _MERGE:
            found += value.value if isinstance(value, yaml.SequenceNode) else [value]
    return [each for each in found if isinstance(each, yaml.MappingNode)]


def _merge(node: yaml.MappingNode, path: KeyPath, lines: Lines, where: str) -> None:
    """Lines of what `<<` brings in. All of it was walked before, under `<<` itself, so its size has an end."""
    for key, value in node.value:
        inner = (*path, _text(key, where))
        if key.tag != _MERGE and inner not in lines:  # a key of the mapping's own goes before a merged one
            lines[inner] = key.start_mark.line + 1
            _walk(value, inner, lines, where)
    for each in _merged(node):
        _merge(each, path, lines, where)


def _text(node: yaml.ScalarNode, where: str) -> str:
    """A scalar as typed; no file name or id can hold what is refused here."""
    text = str(node.value)
    if "\0" in text or not _is_unicode(text):
        problem = "a NUL or half of a surrogate pair, which no text holds"
        raise ConfigError(f"{where}:{node.start_mark.line + 1}: {problem}", "take the escape out")
    return text


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


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
            shown = [*self._found][:_MAX_SHOWN]
            more = len(self._found) - len(shown)
            shown += [f"{self._where}: and {more:,} more problems"] if more else []
            raise ConfigError("\n".join(shown), f"keys and values are described in {self._docs}")
