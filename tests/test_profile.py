"""Cluster profiles: what would ask for the wrong thing, or carry text into a script, if it were read wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from packcli.errors import ConfigError
from packcli.launch import allowed, profile, scratch
from packcli.launch.profile import STAGES, ContainerSpec, Profile, RequeueSpec, StageSpec, StagesSpec

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted((ROOT / "slurm").glob("*.yaml"))
DOCS = ROOT / "docs" / "slurm_profile.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)

Load = Callable[[str], Profile]

TEXT_KEYS = ["partition", "account", "qos", "time", "mem", "constraint", "exclude"]
PLACES: list[dict[str, Any]] = [
    *[{key: "{}"} for key in TEXT_KEYS],
    *[{"stages": {"eval": {key: "{}"}}} for key in TEXT_KEYS],
    {"gpu_type": "{}"},
    {"gpus_as": "{}"},
    {"python": "{}"},
    {"scratch": "/local/{}"},
    {"sbatch": {"reservation": "{}"}},
    {"sbatch": {"{}": "1"}},
    {"environment": {"{}": "1"}},
    {"container": {"image": "{}"}},
    {"container": {"image": "a", "workdir": "/{}"}},
    {"container": {"image": "a", "mounts": ["/a:/{}"]}},
]
HOSTILE = [
    "a'b", 'a"b', "a\nb", "a\rb", "a\x00b", "$(id)", "${IFS}", "`id`", "a\\b", "a;id\n#SBATCH --uid=0", "é",
]  # fmt: skip


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def read(text: str) -> Profile:
        path = tmp_path / "site.yaml"
        path.write_text(text, encoding="utf-8")
        return profile.load(path)

    return read


def refused(load: Load, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert caught.value.fix
    return caught.value.cause


def placed(place: Any, text: str) -> Any:
    """`place` with `{}` replaced in its keys and values."""
    if isinstance(place, dict):
        return {placed(key, text): placed(value, text) for key, value in place.items()}
    if isinstance(place, list):
        return [placed(item, text) for item in place]
    return place.replace("{}", text)


# What jobs ask for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profile_trains_on_four_nodes_and_prepares_on_one(path: Path) -> None:
    read = profile.load(path)
    assert read.name == path.stem
    asked = {stage: read.resources(stage) for stage in STAGES}
    assert {stage: each.nodes for stage, each in asked.items()} == {
        "parts": 1, "prepare": 1, "base": 4, "train": 4, "eval": 1, "report": 1,
    }  # fmt: skip
    assert {stage: each.gpus_per_node for stage, each in asked.items()} == {
        "parts": 0, "prepare": 0, "base": 8, "train": 8, "eval": 1, "report": 0,
    }  # fmt: skip


def test_there_is_nothing_to_test() -> None:
    assert (len(SHIPPED), len(BLOCKS)) == (3, 5)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_a_shipped_profile_offers_in_comments_is_refused(path: Path, load: Load) -> None:
    """A user takes the `#` away from one of them."""
    _, text = path.read_text(encoding="utf-8").split("\n\n", 1)
    offered = re.sub(r"^( *)# (?=( *- )|\w+:( |$))", r"\1", text.replace("#   -", "# -"), flags=re.MULTILINE)
    read = load(offered)
    if path.stem == "local_cluster":
        assert offered == text
    else:
        assert (read.gpus_as, read.scratch, len(read.setup or ())) == ("gres", "$SLURM_TMPDIR", 1)
        assert {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME"} <= read.environment.keys()


@pytest.mark.parametrize("text", BLOCKS)
def test_example_in_the_docs_is_refused(text: str, load: Load) -> None:
    read = load(text)
    assert read.model_dump(exclude_defaults=True).keys() - {"name"} == yaml.safe_load(text).keys()


def test_a_key_is_missing_from_the_docs() -> None:
    models: list[type[BaseModel]] = [StageSpec, Profile, RequeueSpec, ContainerSpec, StagesSpec]
    keys = {key for model in models for key in model.model_fields} - {"name", "requeue"}
    text = DOCS.read_text(encoding="utf-8")
    assert {key for key in keys if not re.search(rf"[`.{{ ]{key}[`,}}.]", text)} == set()


def test_default_in_the_docs_is_not_the_one_in_force() -> None:
    rows = re.findall(r"^\| `([a-z_.]+)` \|.*\| `?([0-9a-z_]+)`?(?: \(.*\))? \|$", DOCS.read_text(), re.MULTILINE)
    told = {key: value for key, value in rows if value != "none"}
    defaults = {
        **Profile(name="x").model_dump(),
        **{f"requeue.{k}": v for k, v in RequeueSpec().model_dump().items()},
    }
    assert told == {key: str(defaults[key]).replace("True", "true") for key in told}
    assert len(told) == 9


def test_top_makes_other_jobs_than_trainings_wide(load: Load) -> None:
    read = load("nodes: 4\ngpus_per_node: 8\nprocesses_per_node: 4\nexclusive: true\n")
    for stage in STAGES:
        asked = read.resources(stage)
        wide = stage in ("base", "train")
        shape = (asked.nodes, asked.exclusive, asked.processes_per_node)
        assert shape == ((4, True, 4) if wide else (1, False, 1)), stage


def test_what_a_stage_says_itself_is_not_taken(load: Load) -> None:
    read = load(
        "nodes: 4\ngpus_per_node: 8\nsetup: [a]\nenvironment: {A: 1, B: 1}\nsbatch: {nice: 1}\n"
        "stages: {base: {nodes: 2, gpus_per_node: 4, exclusive: true, setup: [b], environment: {B: 2},"
        " sbatch: {hold: true}}, eval: {gpus_per_node: 0}}\n"
    )
    asked = read.resources("base")
    assert (asked.nodes, asked.gpus_per_node, asked.processes_per_node, asked.exclusive) == (2, 4, 4, True)
    assert asked.setup == ("b",)
    assert asked.environment == {"A": "1", "B": "2"}
    assert asked.sbatch == {"nice": "1", "hold": True}
    assert read.resources("eval").gpus_per_node == 0
    assert read.resources("train").setup == ("a",)


@pytest.mark.parametrize("stage", ["parts", "prepare", "eval", "report"])
def test_work_for_one_node_is_done_by_several_at_once(load: Load, stage: str) -> None:
    with pytest.raises(ConfigError, match=f"`{stage}` is work for one node, not 2"):
        load(f"stages: {{{stage}: {{nodes: 2}}}}\n")


def test_scoring_waits_for_a_gpu_where_there_is_none(load: Load) -> None:
    assert load("nodes: 2\n").resources("eval").gpus_per_node == 0


def test_more_elements_run_at_once_than_an_array_may_hold(load: Load) -> None:
    assert load("array_max: 10\narray_cap: 50\n").resources("train").array_cap == 10


def test_profile_changes_on_its_way_to_a_job() -> None:
    for path in SHIPPED:
        assert Profile.model_validate_json((read := profile.load(path)).model_dump_json()) == read


# What YAML makes of what was typed -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "minutes"),
    [
        ("90", 90), ("90:00", 90), ("90:01", 91), ("1:30:00", 90), ("24:00:00", 1440), ("2-0", 2880),
        ("2-12", 3600), ("2-12:30", 3630), ("2-12:30:01", 3631), ("1:00", 1), ("0100", 100), ("'1:30:00'", 90),
        ("100:59:59", 6060), ("1-23:59:59", 2880),
    ],
)  # fmt: skip
def test_time_is_not_what_was_typed(typed: str, minutes: int, load: Load) -> None:
    """YAML 1.1 reads `24:00:00` as 86400 and `0100` as 64."""
    train, eval_, base = (
        f"train: {{time: {typed}}}",
        f"eval:\n    time: {typed}",
        f"base: {{<<: {{time: {typed}}}}}",
    )
    read = load(f"signal_s: 1\nstages:\n  {train}\n  {eval_}\n  {base}\n")
    assert {read.resources(stage).time_min for stage in ("train", "eval", "base")} == {minutes}


@given(days=st.integers(0, 300), hours=st.integers(0, 23), minutes=st.integers(1, 59), seconds=st.integers(0, 59))
def test_forms_of_one_time_differ(days: int, hours: int, minutes: int, seconds: int) -> None:
    whole = allowed.minutes(f"{days}-{hours}:{minutes}:{seconds}")
    assert whole == allowed.minutes(f"{days * 24 + hours}:{minutes:02}:{seconds:02}")
    assert whole == allowed.minutes(f"{(days * 24 + hours) * 60 + minutes}:{seconds:02}")
    assert whole == (days * 24 + hours) * 60 + minutes + (seconds > 0)


@pytest.mark.parametrize(
    "typed",
    ["0", "0:59", "-5", "1h", "UNLIMITED", "1:2:3:4", "1-1:1:1:1", "1.5", "400-0", "9" * 18, "1e3", "true", "٣",
     "0:60", "25:99", "1:60:00", "1:00:60", "1-24", "1-25", "0-25:00", "1-1:60", "1-1:00:60"],
)  # fmt: skip
def test_time_that_means_nothing_is_submitted(typed: str, load: Load) -> None:
    assert "site.yaml:2: `time`" in refused(load, f"# first\ntime: {typed}\n")


def test_values_are_what_yaml_makes_of_them(load: Load) -> None:
    read = load(
        "partition: 0123\nmem: 010\nenvironment: {A: 010, B: on, C: 1_0, D: 1:30, E: , F: 2027-01-01}\n"
        "sbatch: {begin: 2027-01-01T08:00:00, switches: 2@1:00:00, nice: 010, contiguous: true}\n"
    )
    assert (read.partition, read.mem) == ("0123", "010")
    assert read.environment == {"A": "010", "B": "on", "C": "1_0", "D": "1:30", "E": "", "F": "2027-01-01"}
    assert read.sbatch == {
        "begin": "2027-01-01T08:00:00", "switches": "2@1:00:00", "nice": "010", "contiguous": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    ["nodes: 4:8", "nodes: yes", "nodes: 0", "nodes: 1.5", "gpus_per_node: -1", "exclusive: 1", "array_cap: 0",
     "signal_s: 0", "array_max: '5'", "prepare_parts: 0", "prepare_parts: true", "prepare_parts: many",
     "part_bytes: 0", "burn_in: maybe", "requeue: 5", "requeue: {failures: 0}", "environment: [A]",
     "setup: module", "stages: {eval: 5}", "environment: {A: null}", "sbatch: {contiguous: false}",
     "environment: {NO: 1}"],
)  # fmt: skip
def test_value_of_the_wrong_kind_is_taken(line: str, load: Load) -> None:
    key = line.partition(":")[0]
    assert re.search(rf"^\S*site.yaml:1: `{key}", refused(load, line + "\n"))


@pytest.mark.parametrize(
    "text",
    ["", "- a", "5", "a: [", "!!python/object:os.system {}", "&a {b: *a}", "1: 2", "? [a]\n: b",
     "nodes: 1\nnodes: 2", "stages: {eval: [1]}", "name: other"],
)  # fmt: skip
def test_file_that_is_no_profile_ends_in_a_traceback(text: str, load: Load) -> None:
    assert "site.yaml" in refused(load, text)


def test_missing_or_unreadable_file_ends_in_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"partition: caf\xe9")
    (tmp_path / "a b.yaml").write_text("nodes: 1")
    for name in ("none.yaml", ".", "latin.yaml", "a b.yaml"):
        with pytest.raises(ConfigError):
            profile.load(tmp_path / name)


# Mistakes ----------------------------------------------------------------------------------------------


def test_mistakes_are_told_one_by_one_or_without_their_place(load: Load) -> None:
    cause = refused(
        load,
        "partion: gpu\nstages:\n  evl: {}\n  eval:\n    tme: 5\n    gpus_as: gres\ntrain: {nodes: 4}\n"
        "container: {imag: a}\n",
    )
    for line in (
        "site.yaml:1: unknown key `partion`; did you mean `partition`?",
        "site.yaml:3: unknown key `stages.evl`; did you mean `stages.eval`?",
        "site.yaml:5: unknown key `stages.eval.tme`; did you mean `stages.eval.time`?",
        "site.yaml:6: unknown key `stages.eval.gpus_as`; `gpus_as` is one for all stages: put it at the top",
        "site.yaml:7: unknown key `train`; did you mean `stages.train`?",
        "site.yaml:8: unknown key `container.imag`; did you mean `container.image`?",
    ):
        assert line in cause


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("setup: module load cuda", "1: `setup` is a list of lines: `setup: [module load cuda]`"),
        (
            "stages:\n  eval:\n    setup: a",
            "3: `stages.eval.setup` is a list of lines: `setup: [module load cuda]`",
        ),
        ("container:\n  image: a\n  mounts: /a:/b", "3: `container.mounts` is a list of mounts: `mounts: ["),
    ],
)
def test_text_in_place_of_a_list_is_told_in_the_words_of_python(text: str, told: str, load: Load) -> None:
    assert f"site.yaml:{told}" in refused(load, text + "\n")


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "report"])
def test_job_is_told_to_stop_as_it_starts(stage: str, load: Load) -> None:
    cause = refused(load, f"stages:\n  {stage}:\n    time: 5\n")
    assert f"site.yaml:3: `signal_s: 300` is not shorter than the 5 min of `{stage}`" in cause
    assert load(f"signal_s: 299\nstages: {{{stage}: {{time: 5}}}}\n")


def test_two_processes_share_a_gpu(load: Load) -> None:
    assert "site.yaml:2: `train` gets 8 processes" in refused(load, "gpus_per_node: 4\nprocesses_per_node: 8\n")
    assert load("gpus_per_node: 0\nprocesses_per_node: 8\n").resources("train").processes_per_node == 8


# What must never reach a script --------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_hostile_text_reaches_a_script(place: Any, hostile: str, load: Load) -> None:
    cause = refused(load, yaml.safe_dump(placed(place, hostile)))
    assert len(cause.splitlines()) == cause.count("site.yaml:"), "the message itself is torn apart"


@pytest.mark.parametrize("place", [place for place in PLACES if "gpus_as" not in place], ids=str)
def test_harmless_text_is_refused(place: Any, load: Load) -> None:
    """The test above would pass for keys that take nothing."""
    harmless = "64" if re.search("'(mem|time)'", str(place)) else "a1"
    assert load(yaml.safe_dump(placed(place, harmless)))


@pytest.mark.parametrize(
    "line",
    ["sbatch: {reservation: '#x'}", "constraint: a b", "partition: a b", "partition: ''", "sbatch: {nice: ''}",
     "exclude: a*", "exclude: node[1-", "exclude: node1]", "exclude: node]1[", "exclude: 'node[[1]]'",
     "exclude: 'node[]'", "exclude: 'node[1-]'", "mem: 64 G", "mem: -1",
     "container: {image: a, mounts: [a]}", "container: {image: a, mounts: ['/a:/b,/c:/d']}",
     "container: {image: a, mounts: ['/a:b']}", "container: {image: --export}", "python: --version"],
)  # fmt: skip
def test_text_that_another_key_may_hold_is_taken(line: str, load: Load) -> None:
    refused(load, line + "\n")


@pytest.mark.parametrize("text", ["node1", "node[3,7-9]", "a[1-2]b[01-03].x,node-4"])
def test_list_of_hosts_is_refused(text: str, load: Load) -> None:
    assert load(yaml.safe_dump({"exclude": text})).exclude == text


@pytest.mark.parametrize("line", ["#SBATCH --uid=0", "  #SBATCH --uid=0", "# note", "a\nb", "a\rb", "a\x1bb", ""])
def test_setup_carries_parameters_past_the_checks(line: str, load: Load) -> None:
    """SLURM reads `#SBATCH` lines up to the first command."""
    refused(load, yaml.safe_dump({"setup": ["module load cuda", line]}))


def test_setup_is_not_the_users_own_shell(load: Load) -> None:
    line = """source "$HOME/env" && export A=$(cat 'x y') # `b`"""
    assert load(yaml.safe_dump({"setup": [line]})).setup == (line,)


SET_BY_PACKCLI = [
    "job-name", "output", "error", "array", "dependency", "comment", "signal", "requeue", "no-requeue",
    "open-mode", "nodes", "ntasks", "ntasks-per-node", "tasks-per-node", "wrap", "export", "parsable", "chdir",
    "uid", "gid", "mem", "gres", "gpus", "gpus-per-node", "time", "partition", "exclusive", "container-image",
    "no-kill", "kill-on-invalid-dep",
]  # fmt: skip


@pytest.mark.parametrize("name", SET_BY_PACKCLI)
def test_extra_parameter_overrides_one_of_ours(name: str, load: Load) -> None:
    cause = refused(load, f"sbatch: {{{name}: 1}}\n")
    found = re.search(r"use the key `(\w+)` of the profile|packcli sets it itself", cause)
    assert found
    assert found[1] is None or found[1] in Profile.model_fields


@pytest.mark.parametrize("name", ["outp", "jo", "arr", "depend", "nod", "exp", "gpus-per-n", "co"])
def test_extra_parameter_is_one_of_ours_by_its_beginning(name: str, load: Load) -> None:
    """sbatch takes any unambiguous beginning of a long option."""
    assert f"`sbatch.{name}`" in refused(load, f"sbatch: {{{name}: 1}}\n")


@pytest.mark.parametrize(
    "name",
    ["reservation", "nice", "mail-user", "mail-type", "licenses", "switches", "gres-flags", "mem-bind", "nodelist",
     "time-min", "begin", "hint", "tmp", "gpu-bind", "batch", "prefer"],
)  # fmt: skip
def test_extra_parameter_that_is_nobodys_is_refused(name: str, load: Load) -> None:
    assert load(f"sbatch: {{{name}: a}}\n").resources("train").sbatch == {name: "a"}


@pytest.mark.parametrize(
    "name",
    ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SBATCH_EXPORT",
     "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES", "1A", "A-B", "A B"],
)  # fmt: skip
def test_variable_of_ours_is_overridden(name: str, load: Load) -> None:
    assert f"site.yaml:2: `environment.{name}`" in refused(load, f"environment:\n  {name}: 1\n")


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "PGPASSWORD", "OPENAI_API_KEY",
     "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "hf_token", "HUGGING_FACE_HUB_TOKEN", "MYSQL_PWD",
     "GITHUB_TOKENS", "APIKEY"],
)  # fmt: skip
@pytest.mark.parametrize("stage", [None, "train"])
def test_secret_is_shared_or_shown(name: str, stage: str | None, load: Load) -> None:
    document: dict[str, Any] = {"environment": {name: "CANARY"}}
    cause = refused(load, yaml.safe_dump({"stages": {stage: document}} if stage else document))
    assert "export it before submitting" in cause
    assert "CANARY" not in cause


@pytest.mark.parametrize(
    "environment",
    [{"A": "$CANARY"}, {"A": "a\nCANARY"}, {"PIP_INDEX_URL": "https://me:CANARY@host/simple"}, {"A": ["CANARY"]}],
)
def test_value_of_a_variable_is_shown_or_taken(environment: Any, load: Load) -> None:
    assert "CANARY" not in refused(load, yaml.safe_dump({"environment": environment}))
    assert "CANARY" not in refused(load, yaml.safe_dump({"setup": [environment]}))


# Put together here: scanners for secrets read this file, too.
TOKENS = [
    "hf_" + "aB3" * 11 + "x", "ghp_" + "a1" * 18, "gho_" + "a1" * 18, "github_pat_" + "a1_" * 27,
    "sk-" + "aB3" * 16, "sk-proj-" + "aB3" * 16 + "-_x", "AKIA" + "A1B2" * 4, "xoxb-" + "1" * 12 + "-abc",
    "xoxp-" + "1" * 12 + "-abc",
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize(
    "place",
    [{"environment": {"A": "{}"}}, {"environment": {"A": "x={},$"}}, {"setup": ["true", "tool login {}"]},
     {"setup": ["A='{}'"]}, {"setup": ["{}\n"]}, {"sbatch": {"reservation": "{}"}},
     {"sbatch": {"reservation": "a:{}'"}}, {"stages": {"train": {"setup": ["tool --with={}"]}}}],
    ids=str,
)  # fmt: skip
def test_token_under_a_harmless_name_is_shared_or_shown(place: Any, token: str, load: Load) -> None:
    cause = refused(load, yaml.safe_dump(placed(place, token)))
    assert "this looks like a token; profiles are shared: export it before submitting" in cause
    assert token[:12] not in cause


@pytest.mark.parametrize("place", [{"partition": "a {}"}, {"nodes": "{}"}, {"setup": "{}"}], ids=str)
def test_token_in_the_wrong_place_is_shown(place: Any, load: Load) -> None:
    assert TOKENS[0] not in refused(load, yaml.safe_dump(placed(place, TOKENS[0])))


@pytest.mark.parametrize(
    "line",
    ["export HF_TOKEN=CANARY", "export WANDB_API_KEY=" + "0cafe" * 8, "true; MY_SECRET='CANARY' python",
     "A=1 hf_token=1", 'export "DB_PASSWORD=CANARY"', 'GITHUB_TOKEN="CANARY"', "APIKEY=$'CANARY'",
     "HF_TOKEN+=CANARY", "X_KEY=''CANARY"],
)  # fmt: skip
def test_secret_in_setup_is_shared_or_shown(line: str, load: Load) -> None:
    cause = refused(load, yaml.safe_dump({"setup": ["module load cuda", line]}))
    assert "`setup.1`: a value for `" in cause
    assert "export it before submitting" in cause
    assert "CANARY" not in cause
    assert "0cafe" not in cause


@pytest.mark.parametrize(
    "line",
    ["export HF_TOKEN=$(cat /run/token)", 'export HF_TOKEN="$OTHER"', "HF_TOKEN=`cat a`", "export HF_TOKEN=",
     "unset HF_TOKEN", "HF_TOKEN='' python", "export HF_TOKEN_PATH=/run/token",
     "export TOKENIZERS_PARALLELISM=false", "sort --key=2 a", "git checkout " + "0cafe" * 8,
     "cd /data/risk-models-of-the-year-2026x", "cd hf_cache/hf_transformers",
     "pip install sk-learn-compatible-estimators"],
)  # fmt: skip
def test_harmless_line_of_setup_is_taken_for_a_secret(line: str, load: Load) -> None:
    assert load(yaml.safe_dump({"setup": [line]})).setup == (line,)


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "NCCL_DEBUG", "MONKEY", "PWDX"],
)
def test_harmless_variable_is_taken_for_a_secret(name: str, load: Load) -> None:
    value = 'it\'s "plain" text; a=b'
    assert load(yaml.safe_dump({"environment": {name: value}})).environment == {name: value}


@pytest.mark.parametrize(
    "text", ["/local", "/local/$USER/x", "$TMPDIR", "${SLURM_TMPDIR}/a", "/a/$SLURM_JOB_ID.d", "/a/$USER-x"]
)
def test_scratch_that_every_node_can_expand_is_refused(text: str, load: Load) -> None:
    environ = {name: "/v" if "TMPDIR" in name else "v" for name in scratch.VARIABLES}
    assert scratch.expand(text, environ).is_absolute()
    assert load(yaml.safe_dump({"scratch": text})).scratch == text


@pytest.mark.parametrize(
    "text",
    ["/a/$HOME", "$USER/a", "a/b", "/a/..", "/a/../b", "$TMPDIRX", "${TMPDIR", "/a/$", "$(id)", "/a b", "~/a",
     "."],
)  # fmt: skip
def test_scratch_is_found_out_on_a_node_to_be_none(text: str, load: Load) -> None:
    assert "site.yaml:1: `scratch`" in refused(load, yaml.safe_dump({"scratch": text}))
