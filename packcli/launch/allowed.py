"""Which values of a profile may stand in a batch script, as types. Shell is written in `setup` alone.

Profiles are passed around, and what they hold ends up in `#SBATCH` lines and commands: a value is refused unless
it matches what its key needs.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from packcli.launch.scratch import VARIABLES

_MAX_TIME_MIN = 366 * 24 * 60
_TIME = re.compile(r"(?:([0-9]{1,7})-)?([0-9]{1,7})(?::([0-9]{1,7}))?(?::([0-9]{1,7}))?")

# What packcli gives to sbatch, by the key of a profile that decides it; "": packcli decides it alone.
_GIVEN = {
    "": "chdir clusters comment dependency error gid help input job-name jobid kill-on-invalid-dep no-kill "
    "open-mode output parsable quiet test-only uid usage verbose version wait wait-all-nodes workdir wrap",
    "account": "account",
    "array_cap": "array",
    "constraint": "constraint",
    "container": "container container-image container-mounts container-workdir",
    "cpus_per_task": "cpus-per-gpu cpus-per-task",
    "environment": "export export-file get-user-env",
    "exclude": "exclude",
    "exclusive": "exclusive",
    "gpus_as": "gres",
    "gpus_per_node": "gpus gpus-per-node gpus-per-socket gpus-per-task tres-per-task",
    "mem": "mem mem-per-cpu mem-per-gpu",
    "nodes": "nodes ntasks ntasks-per-core ntasks-per-socket",
    "partition": "partition",
    "processes_per_node": "ntasks-per-gpu ntasks-per-node tasks-per-node",
    "qos": "qos",
    "requeue": "no-requeue requeue",
    "signal_s": "signal",
    "time": "time",
}
_KEY_OF = {name: key for key, names in _GIVEN.items() for name in names.split()}
_RESERVED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK|ROLE_RANK|MASTER_\w*|TORCHELASTIC_\w*"
    r"|CUDA_VISIBLE_DEVICES|SLURM_\w*|SLURMD_\w*|SBATCH_\w*|SRUN_\w*)"
)
_SECRET = re.compile(
    r"(?!.*DISABLE).*(SECRET|PASSWORD|PASSWD|PASSPHRASE|(?<![A-Z])PWD|TOKEN|APIKEY|(?<![A-Z])KEY(_ID)?)S?",
    re.IGNORECASE,
)
_CREDENTIALS_IN_URL = re.compile(r"://[^/\s@]*:[^/\s@]*@")
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{20}|gh[opsru]_[A-Za-z0-9]{20}|github_pat_\w{20}"
    r"|sk-[A-Za-z0-9_-]*[A-Za-z0-9]{16}|A[KS]IA[A-Z0-9]{16}|xox[abeprs]-[A-Za-z0-9-]{10})"
)
# NAME=VALUE where VALUE does not begin with something to expand. Options such as `--key=2` are none of these.
_LITERAL = re.compile(r"""(?<![\w$-])(\w+)\+?=(?:\$?["'])*[^\s"'$`;&|)]""")


def _like(pattern: str, expected: str) -> AfterValidator:
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if compiled.fullmatch(value) is None:
            raise ValueError(f"{expected} expected")
        return value

    return AfterValidator(check)


def minutes(text: str) -> int:
    """A SLURM time in minutes, rounded up as SLURM does.

    Raises:
        ValueError: it is not of these forms, a smaller unit is full (`25:99`), or it is not between one minute
            and 366 days.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError("one of MIN, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS expected")
    days, *parts = (int(part) for part in found.groups() if part is not None)
    limits = (60, 60) if found[1] is None else (24, 60, 60)
    if any(part >= limit for part, limit in zip(parts, limits, strict=False)):
        raise ValueError("at most 23 hours behind days and 59 minutes or seconds behind a larger unit expected")
    if found[1] is None:
        days, parts = 0, [days, *parts]
        parts = {1: [0, *parts, 0], 2: [0, *parts], 3: parts}[len(parts)]
    hours, mins, seconds = (*parts, 0, 0)[:3]
    total_s = ((days * 24 + hours) * 60 + mins) * 60 + seconds
    if not 60 <= total_s <= _MAX_TIME_MIN * 60:
        raise ValueError("a time from one minute to 366 days expected")
    return -(-total_s // 60)


def _slurm_time(value: str) -> str:
    minutes(value)
    return value


def has_token(text: str) -> bool:
    """Whether something in `text` looks like a token of a well-known service."""
    return _TOKEN.search(text) is not None


def _without_token(value: Any) -> Any:
    if isinstance(value, str) and has_token(value):
        raise ValueError("this looks like a token; profiles are shared: export it before submitting")
    return value


def _shell_line(value: str) -> str:
    if not value or not value.isprintable():
        raise ValueError("one line of shell without control characters expected")
    if value.lstrip().startswith("#"):  # SLURM would read `#SBATCH` here, past every check above
        raise ValueError("a line of shell expected, not a comment; parameters of sbatch go under `sbatch`")
    secret = next((name for name in _LITERAL.findall(value) if _SECRET.fullmatch(name)), None)
    if secret is not None:
        raise ValueError(f"a value for `{secret}`; profiles are shared: export it before submitting")
    return value


def _variable(name: str) -> str:
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is None:
        raise ValueError("the name of an environment variable expected: letters, digits, `_`")
    if _RESERVED.fullmatch(name):
        raise ValueError("packcli or SLURM sets this variable; leave it out")
    if _SECRET.fullmatch(name):
        raise ValueError("profiles are shared, so no secrets here; export it before submitting, and jobs have it")
    return name


def _environment_value(value: str) -> str:
    if not value.isprintable():
        raise ValueError("one line of text without control characters expected")
    if "$" in value or "`" in value:
        raise ValueError("values are taken as they are, `$` is not expanded; write `export NAME=...` in `setup`")
    if _CREDENTIALS_IN_URL.search(value):
        raise ValueError("an address with a password; profiles are shared: export it before submitting")
    return value


def _parameter(name: str) -> str:
    if re.fullmatch(r"[a-z][a-z0-9-]*", name) is None:
        raise ValueError("the long name of an sbatch parameter without its dashes expected, such as `mail-type`")
    # sbatch takes any unambiguous beginning of a name: `outp` is `output`.
    ours = name if name in _KEY_OF else next((known for known in _KEY_OF if known.startswith(name)), None)
    if ours is not None:
        key = _KEY_OF[ours]
        instead = f"use the key `{key}` of the profile" if key else "packcli sets it itself"
        raise ValueError(f"sbatch's `{ours}` cannot be set here: {instead}")
    return name


def _parameter_value(value: Any) -> Any:
    if value is True:
        return value
    if not isinstance(value, str) or re.fullmatch(r"[A-Za-z0-9_.,:;=/@%+*&|()\[\]!<> -]+", value) is None:
        raise ValueError("a number, `true`, or text without quotes, `$` or line ends expected")
    return value


def _parts(value: Any) -> Any:
    if value != "auto" and (type(value) is not int or value < 1):
        raise ValueError("`auto` or a whole number from 1 expected")
    return value


def _no_way_up(value: str) -> str:
    if ".." in value.split("/"):
        raise ValueError("a directory without `..` expected")
    return value


_PATH = r"/[A-Za-z0-9_./+@=-]*"
_ONE = "|".join(VARIABLES)
_RANGE = r"[0-9]+(-[0-9]+)?"
_VARIABLE = rf"\$(({_ONE})(?!\w)|\{{({_ONE})\}})"
Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Name = Annotated[str, _like(r"[A-Za-z0-9_.,:@+-]+", "a name of letters, digits and `_ . , : @ + -`")]
Time = Annotated[str, AfterValidator(_slurm_time)]
Memory = Annotated[str, _like(r"[0-9]{1,12}([KMGT]B?)?", "a size such as `64G` (without a unit: MB; 0: all)")]
Features = Annotated[str, _like(r"[A-Za-z0-9_.:=&|()\[\]*,-]+", "features joined by `&` or `|`, without spaces,")]
Hosts = Annotated[
    str, _like(rf"([A-Za-z0-9_.,-]|\[{_RANGE}(,{_RANGE})*\])+", "a list of hosts such as `node[3,7-9]`")
]
_NoToken = BeforeValidator(_without_token)
Environment = dict[
    Annotated[str, AfterValidator(_variable)], Annotated[str, _NoToken, AfterValidator(_environment_value)]
]
# The last of several `BeforeValidator` runs first.
Parameters = dict[
    Annotated[str, AfterValidator(_parameter)], Annotated[str | bool, BeforeValidator(_parameter_value), _NoToken]
]
ShellLine = Annotated[str, _NoToken, AfterValidator(_shell_line)]
GpuType = Annotated[str, _like(r"[A-Za-z0-9_.-]+", "a name of letters, digits and `_ . -`")]
Image = Annotated[str, _like(r"[A-Za-z0-9_./][A-Za-z0-9_./:@#+=-]*", "an image's path or address")]
Mount = Annotated[str, _like(rf"{_PATH}:{_PATH}(:[a-z+]+)?", "SOURCE:TARGET[:FLAGS] with absolute paths")]
Directory = Annotated[str, _like(_PATH, "an absolute path")]
Interpreter = Annotated[str, _like(r"[A-Za-z0-9_./+][A-Za-z0-9_./+-]*", "an interpreter's path")]
Scratch = Annotated[
    str,
    _like(
        rf"(/|(?=\$\{{?(SLURM_)?TMPDIR))([A-Za-z0-9_./+-]|{_VARIABLE})*",
        f"an absolute directory (variables: {' '.join(f'${name}' for name in VARIABLES)})",
    ),
    AfterValidator(_no_way_up),
]
Parts = Annotated[int | Literal["auto"], BeforeValidator(_parts)]
