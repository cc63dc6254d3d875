"""A sweep file as typed cells: the matrix, `--only`, `--set`, all problems at once.

The file is multiplied out first and each cell validated after, so a matrix may set any key, and what is
hashed later is the validated model, never the YAML text.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from packcli.config import ARMS, HOLDS_SECRET, NAME_PATTERN, CellSpec, LadderSpec, SweepSpec
from packcli.errors import ConfigError
from packcli.yamlfile import MAX_DEPTH, KeyPath, Lines, Problems, parse, read

MAX_CELLS = 10_000
"""Of a sweep, unless --max-cells says otherwise."""
_MAX_COMPARISONS = 10_000_000
_SHOWN = 80
_SECTIONS = ("model", "data", "train", "eval", "estimate")
_TOP_KEYS = ("name", *_SECTIONS, "matrix", "include", "exclude", "arms", "baseline", "ladders")
# A sweep's directory lies beside these.
_TAKEN = ("store", "slurm")
# Where pydantic puts the branch of a union into an error's location: no part of a key.
_UNION_TAGS = frozenset({"literal['all-linear']", "tuple[str, ...]"})


class Value(NamedTuple):
    """A value of the matrix and its label: the text in the file (`1e-5`, not `1e-05`)."""

    value: Any
    label: str


def load(path: Path, sets: Sequence[str] = (), only: Sequence[str] = (), max_cells: int = MAX_CELLS) -> SweepSpec:
    """The sweep in `path` with `--set` applied and cells chosen by `--only`.

    `max_cells`: a matrix of more is refused before it is multiplied out.

    Raises:
        ConfigError: the file is missing, is not YAML, or has problems; all of them in one message.
    """
    if path.suffix in (".jsonl", ".json", ".parquet", ".arrow", ".csv"):
        raise ConfigError(f"`{path}` is data, not a sweep file", f"packcli sweep SWEEP --set data.source={path}")
    document, lines = parse(read(path, "sweep file", "give a path such as sweeps/tiny.yaml"), str(path))
    problems = Problems(str(path), lines)
    spec = _build(document, lines, problems, sets, max_cells)
    problems.raise_if_any()
    assert spec is not None
    return _select(spec, only)


@cache
def preset(name: str) -> dict[str, Any] | None:
    """The packaged model block of that name (`tiny`), or None: the same for every cell, not to be changed."""
    if not re.match(NAME_PATTERN, name):
        return None
    file = resources.files("packcli") / "presets" / f"{name}.yaml"
    return parse(file.read_text(), f"presets/{name}.yaml")[0] if file.is_file() else None


def _build(
    document: dict[str, Any],
    lines: Lines,
    problems: Problems,
    sets: Sequence[str],
    max_cells: int = MAX_CELLS,
) -> SweepSpec | None:
    for key in document:
        if key not in _TOP_KEYS:
            problems.unknown((str(key),), str(key), _TOP_KEYS)
    if not _shapes_fit(document, problems):
        return None
    _check_name(document.get("name"), problems)
    base = {section: dict(document.get(section) or {}) for section in _SECTIONS}
    axes_set = [*(document.get("matrix") or {}), *itertools.chain(*(document.get("include") or []))]
    fixed = _apply_sets(base, axes_set, sets, problems)
    arms = _arms(document.get("arms") or {}, problems)
    combinations = list(_combinations(document, lines, problems, max_cells))
    if len(combinations) > max_cells:
        problems.add(("matrix",), _too_many(len(combinations), max_cells))
        return None
    cells, sections = [], _Sections()
    for combination in combinations:
        values = {axis: item.value for axis, item in combination.items()}
        cell = _cell(base, values, fixed, arms, sections, problems)
        if cell is not None:
            cells.append(({axis: item.label for axis, item in combination.items()}, cell))
    repeated = Counter(" ".join(f"{axis}={label}" for axis, label in labels.items()) for labels, _ in cells)
    for name_, count in repeated.items():
        if count > 1:
            problems.add(("matrix",), f"{count} cells have the same labels: {name_}")
    axes: dict[str, dict[str, None]] = {}
    for labels, _ in cells:
        for axis, value in labels.items():
            axes.setdefault(axis, {})[value] = None
    baseline = document.get("baseline")
    arm_labels = tuple(axes.get("arm", {}))
    if baseline is None:
        baseline = next((arm for arm in ("padding", "padding_released") if arm in arm_labels), None)
    elif baseline not in arm_labels:
        problems.add(("baseline",), f"`baseline: {baseline}` is none of the arms {', '.join(arm_labels)}")
    ladders = _ladders(document.get("ladders"), axes, problems)
    problems.raise_if_any()
    return SweepSpec(
        name=str(document.get("name")),
        baseline=baseline,
        ladders=ladders,
        axes={axis: tuple(values) for axis, values in axes.items()},
        cells=tuple(cells),
    )


def _ladders(named: Any, axes: Mapping[str, Mapping[str, None]], problems: Problems) -> dict[str, LadderSpec]:
    """Sequences of arms, each two or more of the matrix."""
    if named is None:
        return {}
    if not isinstance(named, dict):
        problems.add(("ladders",), "`ladders` is a mapping of a name to a list of arms")
        return {}
    arms = list(axes.get("arm", ()))
    found = {}
    for name, rungs in named.items():
        where = ("ladders", str(name))
        best = rungs.get("best") if isinstance(rungs, dict) else None
        if isinstance(rungs, dict) and rungs.keys() <= {"arms", "best"}:
            rungs = rungs.get("arms")
        if not isinstance(rungs, list) or len(rungs) < 2 or len(set(map(str, rungs))) < len(rungs):
            list_ = "a list of two or more arms, none of them twice, or `{arms: [...], best: train.lr}`"
            problems.add(where, f"`ladders.{name}` is {list_}")
        elif unknown := [str(arm) for arm in rungs if str(arm) not in arms]:
            problems.add(where, f"`ladders.{name}`: {', '.join(unknown)} is none of the arms {', '.join(arms)}")
        elif best is not None and best not in (free := [axis for axis in axes if axis not in ("arm", "seed")]):
            problems.add(where, f"`best: {best}` is none of the axes of the matrix: {', '.join(free) or 'none'}")
        else:
            found[str(name)] = LadderSpec(arms=tuple(map(str, rungs)), best=best)
    return found


def _check_name(name: Any, problems: Problems) -> None:
    if not isinstance(name, str) or not re.fullmatch(NAME_PATTERN, name):
        problems.add(("name",), "`name` is required: letters, digits, `.`, `_`, `-`, at most 64")
    elif name in _TAKEN:
        problems.add(("name",), f"`name: {name}`: the run directory has its own `{name}/`; choose another")


def _shapes_fit(document: Mapping[str, Any], problems: Problems) -> bool:
    """Whether all that is walked before it is validated is a mapping or list where it has to be."""
    wrong: list[KeyPath] = []
    for section in (*_SECTIONS, "matrix", "arms"):
        if not _is_block(document.get(section) or {}):
            wrong.append((section,))
            problems.add((section,), f"`{section}` is a mapping of keys to values")
    for section in ("include", "exclude"):
        entries = document.get(section) or []
        if not isinstance(entries, list) or not all(map(_is_block, entries)):
            wrong.append((section,))
            problems.add((section,), f"`{section}` is a list of mappings, each from axes to values")
    if ("arms",) not in wrong:
        for name, fields in (document.get("arms") or {}).items():
            if not _is_block(fields or {}) or not isinstance((fields or {}).get("extends", ""), str):
                wrong.append(("arms", name))
                problems.add(("arms", name), f"`arms.{name}` is a mapping of an arm's fields, with `extends: ARM`")
    return not wrong


def _is_block(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def parse_set(item: str) -> tuple[str, Any]:
    """Key and value of a `--set KEY=VALUE`, the value read as YAML.

    Raises:
        ConfigError: it is no key=value, or more than one value.
    """
    key, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"`--set {item}` is not key=value", "for example --set train.lr=1e-5")
    given = parse(f"value: {text}", f"--set {key}")[0]
    if len(given) > 1:  # a line break in it, and more keys behind
        raise ConfigError(f"`--set {key}`: more than one value", "repeat --set for each key")
    return key, given["value"]


def _apply_sets(
    base: dict[str, Any], axes: Sequence[str], sets: Sequence[str], problems: Problems
) -> frozenset[str]:
    """Write each `--set` into `base`; the single keys set, because they take precedence over an arm's own."""
    fixed = set[str]()
    for item in sets:
        key, value = parse_set(item)
        keys = {*_keys_in(key, value)}
        for axis in axes:
            if any(_is_within(one, axis) or _is_within(axis, one) for one in keys):  # the axis would win
                named = "it" if axis == key else f"`{axis}`"
                raise ConfigError(
                    f"`--set {key}`: {named} is an axis of the matrix, or of `include`",
                    f"choose with --only {axis}=VALUE, or change the file",
                )
        if _check_path(key, ("--set",), problems):
            _set(base, key, value)
            fixed |= keys
    return frozenset(fixed)


def _keys_in(key: str, value: Any) -> Iterator[str]:
    """The single keys that are set where `key` is set to `value`, which may be a block of them."""
    if isinstance(value, dict) and value:
        for inner, held in value.items():
            yield from _keys_in(f"{key}.{inner}", held)
    else:
        yield key


def _is_within(key: str, block: str) -> bool:
    return key == block or key.startswith(f"{block}.")


def _arms(own: Mapping[str, Any], problems: Problems) -> dict[str, dict[str, Any]]:
    arms = dict(ARMS)
    for name, fields in own.items():
        fields = dict(fields or {})
        parent = fields.pop("extends", None)
        if parent is not None and parent not in arms:
            problems.add(("arms", name), f"arm `{name}` extends `{parent}`, which is none of {', '.join(arms)}")
            continue
        arms[name] = {**(arms[parent] if parent else {}), **fields}
    return arms


def _combinations(
    document: Mapping[str, Any], lines: Lines, problems: Problems, max_cells: int
) -> Iterator[dict[str, Value]]:
    """The product of the axes, less `exclude`, with `include` as GitHub Actions reads it."""
    matrix = document.get("matrix") or {}
    for axis, values in matrix.items():
        if not isinstance(values, list) or not values:
            problems.add(("matrix", axis), f"axis `{axis}` is a list of at least one value")
            return
        if axis not in ("arm", "seed"):
            _check_path(axis, ("matrix", axis), problems)
    if "arm" not in matrix and not any("arm" in entry for entry in document.get("include") or []):
        problems.add(("matrix",), f"`matrix.arm` is required: a list of {', '.join(ARMS)} or your own")
        return
    size = math.prod(len(values) for values in matrix.values())
    if size > max_cells:
        problems.add(("matrix",), _too_many(size, max_cells))
        return
    entries = len(document.get("include") or []) + len(document.get("exclude") or [])
    if size * entries > _MAX_COMPARISONS:
        problems.add(
            ("matrix",), f"{size:,} cells and {entries:,} entries of `include` and `exclude` are too many"
        )
        return
    axes = {
        axis: [_value(value, ("matrix", axis, str(index)), lines) for index, value in enumerate(values)]
        for axis, values in matrix.items()
    }
    _check_exclude(document.get("exclude") or [], axes, problems)
    cells = [
        cell
        for cell in (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
        if axes and not any(_excluded(cell, entry) for entry in document.get("exclude") or [])
    ]
    original = [dict(cell) for cell in cells]
    for index, entry in enumerate(document.get("include") or []):
        for axis in entry:
            if axis not in ("arm", "seed"):
                _check_path(axis, ("include", str(index), axis), problems)
        labelled = {axis: _value(value, ("include", str(index), axis), lines) for axis, value in entry.items()}
        shared = {axis: value for axis, value in entry.items() if axis in axes}
        fits = [cell for cell, before in zip(cells, original, strict=False) if _matches(before, shared)]
        for cell in fits:
            cell.update(labelled)
        if not fits:
            cells.append(labelled)
    if not cells:
        problems.add(("matrix",), "the matrix leaves no cell")
    yield from cells


def _too_many(cells: int, most: int) -> str:
    return f"the matrix has {cells:,} cells; at most {most:,} (--max-cells)"


def _check_exclude(entries: list[dict[str, Any]], axes: Mapping[str, list[Value]], problems: Problems) -> None:
    """An entry that can match nothing is a typo, and the cells it was to drop would run."""
    for index, entry in enumerate(entries):
        for axis, value in entry.items():
            path = ("exclude", str(index), str(axis))
            if axis not in axes:
                problems.unknown(path, str(axis), list(axes))
                continue
            known = [item.value for item in axes[axis]]
            for one in value if isinstance(value, list) and value not in known else [value]:
                if one not in known:
                    labels = ", ".join(item.label for item in axes[axis])
                    problems.add(path, f"`exclude`: axis `{axis}` has no value `{one}`; it has {labels}")


def _excluded(cell: Mapping[str, Value], entry: Mapping[str, Any]) -> bool:
    """Whether it has all these values; a list, where no value of the axis is one, means any of its own."""
    return all(
        axis in cell and (cell[axis].value == value or (isinstance(value, list) and cell[axis].value in value))
        for axis, value in entry.items()
    )


def _matches(cell: Mapping[str, Value], entry: Mapping[str, Any]) -> bool:
    return all(axis in cell and cell[axis].value == value for axis, value in entry.items())


def _value(value: Any, path: KeyPath, lines: Lines) -> Value:
    return Value(value, _label(value, path, lines))


def _label(value: Any, path: KeyPath, lines: Lines) -> str:
    """A value as typed; of a list `a+b`; of a block of data `source key=value`."""
    if isinstance(value, list):
        return "+".join(_label(item, (*path, str(index)), lines) for index, item in enumerate(value))
    if isinstance(value, dict) and "source" in value:
        texts = {key: _label(inner, (*path, str(key)), lines) for key, inner in value.items()}
        return " ".join([texts.pop("source"), *(f"{key}={text}" for key, text in texts.items())])
    return lines.texts.get(path, str(value))


def _cell(
    base: Mapping[str, Any],
    combination: Mapping[str, Any],
    fixed: frozenset[str],
    arms: Mapping[str, dict[str, Any]],
    sections: _Sections,
    problems: Problems,
) -> CellSpec | None:
    raw = _copied(base)
    # A block before the keys in it, wherever they stand: else it would undo what their labels say.
    for axis, value in sorted(combination.items(), key=lambda item: item[0].count(".")):
        if axis not in ("arm", "seed"):
            _set(raw, axis, value)
    for section in _SECTIONS:
        if not isinstance(raw[section], dict):
            problems.add(("matrix", section), f"`{section}` is a mapping of keys to values, not `{raw[section]}`")
            return None
    if "arm" not in combination:
        problems.add(("include",), "an entry of `include` that is a cell of its own needs an `arm`")
        return None
    arm = str(combination["arm"])
    if arm not in arms:
        near = difflib.get_close_matches(arm, arms, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(arms)}"
        problems.add(("matrix", "arm"), f"unknown arm `{arm}`; {hint}")
        return None
    raw["arm"] = dict(arms[arm])
    said = fixed.union(*(_keys_in(axis, value) for axis, value in combination.items()))
    for key in ("batch_unit", "global_batch"):
        if f"train.{key}" in said:
            raw["arm"][key] = None  # precedence: matrix or --set, then the arm, then train
    raw["seed"] = combination.get("seed", 0)
    name = raw["model"].get("name")
    if isinstance(name, str) and (block := preset(name)) is not None:
        raw["model"] = _merged(block, raw["model"])
    elif name is not None and raw["model"].get("config") is not None:
        problems.add(
            ("model", "config"), "`model.config` means random weights, `model.name` a checkpoint: give one"
        )
        return None
    try:
        return CellSpec.model_validate(sections.shared(raw))
    except ValidationError as error:
        _report(error, arm, combination, problems)
        return None


class _Sections:
    """Sections that cells have in common, validated once: of ten thousand cells most differ in one of them."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], BaseModel] = {}

    def shared(self, raw: dict[str, Any]) -> dict[str, Any]:
        """`raw` with its sections as models; one that is wrong stays as it is, for its cell to report."""
        found = dict(raw)
        for name in _SECTIONS:
            key = name, repr(raw[name])
            if key not in self._known:
                model = CellSpec.model_fields[name].annotation
                assert model is not None
                try:
                    self._known[key] = model.model_validate(raw[name])
                except ValidationError:
                    continue
            found[name] = self._known[key]
        return found


def _copied(base: Mapping[str, Any]) -> dict[str, Any]:
    """To set keys in: mappings are copied, to any depth, and all else is shared."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in base.items()}


def _merged(block: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A packaged block with one's own keys over it, down to single keys of nested mappings."""
    both = {key: _merged(block[key], own[key]) for key in own if isinstance(own[key], dict) and key in block}
    return {**block, **own, **both}


def _report(error: ValidationError, arm: str, combination: Mapping[str, Any], problems: Problems) -> None:
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"] if part not in _UNION_TAGS)
        if not path:  # of a cell as a whole: its arm does not fit the rest
            problems.add(("arms", arm) if arm not in ARMS else ("matrix", "arm"), _message(item))
            continue
        if path[:1] == ("arm",):
            path = ("arms", arm, *path[1:])
        axis = next((a for a in combination if path[: a.count(".") + 1] == tuple(a.split("."))), None)
        marked = ("matrix", axis) if axis and path[:1] != ("arms",) else path
        if item["type"] == "extra_forbidden":
            problems.unknown(marked, ".".join(path), _keys_at(item["loc"][:-1]))
        elif item["type"] == "missing":
            problems.add(marked, f"`{'.'.join(path)}` is required")
        else:
            message = _message(item)
            got = item["input"]
            shown = isinstance(got, str | int | float | bool) and item["type"] != HOLDS_SECRET
            value = f", not `{str(got)[:_SHOWN]}`" if shown else ""
            problems.add(marked, f"`{'.'.join(path)}`: {message}{value}")


def _message(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Value error, ")


def _keys_at(location: Sequence[int | str]) -> tuple[str, ...]:
    """Names of the keys allowed at a place in the schema."""
    model: type[BaseModel] = CellSpec
    for part in location:
        if isinstance(part, int):  # one of a list: its items have the keys
            continue
        field = model.model_fields.get(str(part))
        models = _models(field.annotation) if field else []
        if not models:
            return ()
        model = models[0]
    return tuple(model.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]


def _check_path(dotted: str, marked: tuple[str, ...], problems: Problems) -> bool:
    """Whether a dotted key of the matrix or `--set` is a key of the schema; says so when it is not."""
    parts = dotted.split(".")
    if len(parts) > MAX_DEPTH:
        problems.add(marked, f"a key of {len(parts):,} parts: nested too deeply")
        return False
    if parts[0] not in _SECTIONS:
        near = [f"{section}.{parts[0]}" for section in _SECTIONS if parts[0] in _keys_at((section,))]
        sections = ", ".join(_SECTIONS)
        hint = f"did you mean `{near[0]}`?" if near else f"a dotted key starts with one of {sections}"
        problems.add(marked, f"unknown key `{dotted}`; {hint}")
        return False
    for depth, part in enumerate(parts):
        keys = _keys_at(parts[:depth])
        if depth and keys and part not in keys:
            problems.unknown(marked, ".".join(parts[: depth + 1]), keys)
            return False
    return True


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for part in parents:
        inner = raw.get(part)
        raw[part] = dict(inner) if isinstance(inner, dict) else {}
        raw = raw[part]
    raw[last] = copy.deepcopy(value)


def _select(spec: SweepSpec, only: Sequence[str]) -> SweepSpec:
    """Cells that match every axis named by `--only`; the same axis twice means either value."""
    wanted: dict[str, set[str]] = {}
    for item in only:
        axis, equals, value = item.partition("=")
        if axis not in spec.axes or not equals:
            axes = ", ".join(spec.axes)
            raise ConfigError(
                f"`--only {item}`: no axis `{axis}` in this sweep", f"write axis=value; axes: {axes}"
            )
        if value not in spec.axes[axis]:
            raise ConfigError(
                f"`--only {item}`: `{axis}` has no value `{value}`", f"it has {', '.join(spec.axes[axis])}"
            )
        wanted.setdefault(axis, set()).add(value)
    cells = tuple(
        (labels, cell)
        for labels, cell in spec.cells
        if all(labels.get(axis) in values for axis, values in wanted.items())
    )
    if not cells:
        raise ConfigError("no cell matches all of --only", "drop one of them")
    return spec.model_copy(update={"cells": cells})
