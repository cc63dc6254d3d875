"""A cluster profile (`slurm/*.yaml`): what each kind of job asks of SLURM. The keys: docs/slurm_profile.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from packcli.config import NAME_PATTERN, Spec
from packcli.errors import ConfigError
from packcli.launch.allowed import (
    Count,
    Directory,
    Environment,
    Features,
    Flag,
    GpuType,
    Hosts,
    Image,
    Interpreter,
    Memory,
    Mount,
    Name,
    Parameters,
    Parts,
    Scratch,
    ShellLine,
    Time,
    Whole,
    has_token,
    minutes,
)
from packcli.yamlfile import KeyPath, Lines, Problems, parse, read

StageName = Literal["parts", "prepare", "base", "train", "eval", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)

_DOCS = "docs/slurm_profile.md"
_TRAINING = ("base", "train")
_TIME_MIN: dict[StageName, int] = {
    "parts": 4 * 60, "prepare": 4 * 60, "base": 24 * 60, "train": 24 * 60, "eval": 4 * 60, "report": 30,
}  # fmt: skip


class StageSpec(Spec):
    """What one kind of job asks for; None: as the profile says for all, else as `Profile.resources` fills in."""

    partition: Name | None = None
    account: Name | None = None
    qos: Name | None = None
    time: Time | None = None
    nodes: Count | None = None
    gpus_per_node: Whole | None = None
    processes_per_node: Count | None = None
    cpus_per_task: Count | None = None
    mem: Memory | None = None
    exclusive: Flag | None = None
    constraint: Features | None = None
    exclude: Hosts | None = None
    array_cap: Count | None = None
    setup: tuple[ShellLine, ...] | None = None
    environment: Environment = Field(default_factory=dict)
    sbatch: Parameters = Field(default_factory=dict)


class StagesSpec(Spec):
    parts: StageSpec = StageSpec()
    prepare: StageSpec = StageSpec()
    base: StageSpec = StageSpec()
    train: StageSpec = StageSpec()
    eval: StageSpec = StageSpec()
    report: StageSpec = StageSpec()


class ContainerSpec(Spec):
    """What pyxis is asked for on srun."""

    image: Image
    mounts: tuple[Mount, ...] = ()
    workdir: Directory | None = None


class RequeueSpec(Spec):
    """When there is no further attempt at a stage.

    limit             it was stopped more often: by preemption, a time limit, the loss of a node.
    without_progress  so many attempts in a row got no further; a preempted one does not count.
    failures          it failed so often in a way that may pass: a hang, a killed rank, a bad node.
    """

    limit: Whole = 50
    without_progress: Count = 3
    failures: Count = 3


class Resources(Spec):
    """All that one kind of job asks for. `cpus_per_task`: a task is all of a job on one node."""

    partition: str | None
    account: str | None
    qos: str | None
    time_min: int
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    cpus_per_task: int | None
    mem: str | None
    exclusive: bool
    constraint: str | None
    exclude: str | None
    array_cap: int
    setup: tuple[str, ...]
    environment: dict[str, str]
    sbatch: dict[str, str | int | bool]


class Profile(StageSpec):
    """A profile as written: keys of a stage at the top are defaults of every stage. `name`: the file's."""

    name: str
    gpus_as: Literal["gpus_per_node", "gres"] = "gpus_per_node"
    gpu_type: GpuType | None = None
    container: ContainerSpec | None = None
    scratch: Scratch | None = None
    python: Interpreter | None = None
    signal_s: Annotated[int, Field(ge=1, le=65535, strict=True)] = 300
    array_max: Count = 1000
    prepare_parts: Parts = "auto"
    part_bytes: Count = 8 * 2**30
    requeue: RequeueSpec = RequeueSpec()
    burn_in: Flag = True
    stages: StagesSpec = StagesSpec()

    def resources(self, stage: StageName) -> Resources:
        """What a job of this stage asks for, every value filled in.

        What makes a job wide (nodes, GPUs, processes, whole nodes) is taken from the top by trainings alone.
        """
        own: StageSpec = getattr(self.stages, stage)
        top = self if stage in _TRAINING else StageSpec(gpus_per_node=min(1, self.gpus_per_node or 0))
        if stage in ("parts", "prepare", "report"):
            top = StageSpec()
        gpus = _first(own.gpus_per_node, top.gpus_per_node, 0)
        time = _first(own.time, self.time, None)
        plain = ("partition", "account", "qos", "cpus_per_task", "mem", "constraint", "exclude")
        return Resources(
            **{key: _first(getattr(own, key), getattr(self, key), None) for key in plain},
            time_min=minutes(time) if time else _TIME_MIN[stage],
            nodes=_first(own.nodes, top.nodes, 1),
            gpus_per_node=gpus,
            processes_per_node=_first(own.processes_per_node, top.processes_per_node, max(1, gpus)),
            exclusive=_first(own.exclusive, top.exclusive, False),
            array_cap=min(self.array_max, _first(own.array_cap, self.array_cap, self.array_max)),
            setup=_first(own.setup, self.setup, ()),
            environment={**self.environment, **own.environment},
            sbatch={**self.sbatch, **own.sbatch},
        )


def _first(own: Any, top: Any, otherwise: Any) -> Any:
    return next((value for value in (own, top) if value is not None), otherwise)


def load(path: Path) -> Profile:
    """The profile in `path`.

    Raises:
        ConfigError: the file is missing, is not YAML, or has problems; all of them in one message.
    """
    text = read(path, "profile", "give a path such as slurm/h100_4x8.yaml")
    if not re.match(NAME_PATTERN, path.stem):
        raise ConfigError(f"`{path}`: a profile goes by its file's name", "letters, digits, `.`, `_`, `-` only")
    document, lines = parse(text, str(path), _DOCS)
    problems = Problems(str(path), lines, _DOCS)
    if "name" in document:
        problems.add(("name",), "unknown key `name`; a profile goes by its file's name")
    try:
        profile = Profile.model_validate({**_as_typed(document, (), lines), "name": path.stem})
    except ValidationError as error:
        _report(error, problems)
        problems.raise_if_any()
        raise
    _check(profile, lines, problems)
    problems.raise_if_any()
    return profile


_TEXT_KEYS = frozenset({"partition", "account", "qos", "time", "mem", "constraint", "exclude", "gpu_type"})
_LISTS = {"setup": "lines: `setup: [module load cuda]`", "mounts": 'mounts: `mounts: ["/shared:/shared"]`'}
_BLOCKS: dict[str, type[Spec]] = {"stages": StagesSpec, "container": ContainerSpec, "requeue": RequeueSpec}


def _as_typed(value: Any, path: KeyPath, lines: Lines) -> Any:
    """`value` with text wherever a key takes text: YAML reads `24:00:00` as 86400, `010` as 8 and `on` as true."""
    mapping_of_text = path[-1:] in (("environment",), ("sbatch",))
    if isinstance(value, Mapping):
        items = ((key, _as_typed(inner, (*path, str(key)), lines)) for key, inner in value.items())
        return {key: inner for key, inner in items if inner is not None or mapping_of_text}
    if isinstance(value, list):
        return [_as_typed(inner, (*path, str(index)), lines) for index, inner in enumerate(value)]
    typed = lines.texts.get(path)
    if typed is None or isinstance(value, str):
        return value
    variable = path[-2:-1] == ("environment",)
    if value is None:
        return "" if variable and typed == "" else None
    if isinstance(value, bool):
        return typed if variable else value
    takes_text = variable or path[-2:-1] == ("sbatch",) or path[-1] in _TEXT_KEYS
    return typed if takes_text or ":" in typed else value


def _report(error: ValidationError, problems: Problems) -> None:
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"] if part != "[key]")
        dotted = _on_one_line(".".join(path))
        if item["type"] == "extra_forbidden":
            if path[0] in STAGES:
                problems.add(path, f"unknown key `{dotted}`; did you mean `stages.{dotted}`?")
            elif path[0] == "stages" and path[-1] in Profile.model_fields:
                problems.add(
                    path, f"unknown key `{dotted}`; `{path[-1]}` is one for all stages: put it at the top"
                )
            else:
                problems.unknown(path, dotted, _keys_at(path[:-1]))
        elif item["type"] in ("string_type", "invalid_key") and item["loc"][-1] == "[key]":
            problems.add(
                path[:-1], f"`{'.'.join(path[:-1])}`: YAML reads a key as `{item['input']}`; put it in quotes"
            )
        elif item["type"] == "missing":
            problems.add(path, f"`{dotted}` is required")
        elif item["type"] == "tuple_type":
            problems.add(path, f"`{dotted}` is a list of {_LISTS[path[-1]]}")
        else:
            message, got = item["msg"].removeprefix("Value error, "), item["input"]
            # What stands in these may be a secret that went to the wrong place.
            hidden = {"environment", "setup", "[key]"} & set(item["loc"]) or has_token(str(got))
            shown = isinstance(got, str | int | float) and not hidden
            problems.add(path, f"`{dotted}`: {message}" + (f", not `{_on_one_line(str(got))}`" if shown else ""))


def _keys_at(path: KeyPath) -> list[str]:
    match path:
        case ():
            return [key for key in Profile.model_fields if key != "name"]
        case (block,):
            return list(_BLOCKS[block].model_fields)
        case _:
            return list(StageSpec.model_fields)


def _on_one_line(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:100])


def _check(profile: Profile, lines: Lines, problems: Problems) -> None:
    """What no key says alone."""

    def where(stage: StageName, key: str) -> KeyPath:
        own = ("stages", stage, key)
        return own if own in lines else (key,)

    for stage in STAGES:
        asked = profile.resources(stage)
        # The report takes seconds and writes no checkpoint.
        if stage != "report" and profile.signal_s >= asked.time_min * 60:
            problems.add(
                where(stage, "time"),
                f"`signal_s: {profile.signal_s}` is not shorter than the {asked.time_min} min of `{stage}`: "
                "a job would be told to stop as it starts",
            )
        if asked.nodes > 1 and stage not in _TRAINING:
            problems.add(where(stage, "nodes"), f"`{stage}` is work for one node, not {asked.nodes}")
        if 0 < asked.gpus_per_node < asked.processes_per_node:
            problems.add(
                where(stage, "processes_per_node"),
                f"`{stage}` gets {asked.processes_per_node} processes but {asked.gpus_per_node} GPUs a node: "
                "two never share one",
            )
