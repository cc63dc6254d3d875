"""Plan and ids: an id that moves throws finished work away, one that stays put passes off old work as new.

`tests/golden/ids.json` pins the ids of the shipped sweeps. When a change of ids is meant:
`python tests/test_plan.py --write`, and the diff shows reviewers what will run again.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from packcli import fingerprints, sweepfile, yamlfile
from packcli import plan as planning
from packcli.config import SourceSpec, SweepSpec
from packcli.data import sources
from packcli.errors import ConfigError
from packcli.files import digest, sha256_file
from packcli.fingerprints import FileHashes
from packcli.plan import Plan, closure, needed, plan, source_key
from packcli.store import Store

REPO = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden" / "ids.json"

SWEEP: dict[str, Any] = {
    "name": "example",
    "model": {"config": {"model_type": "llama", "hidden_size": 32}, "tokenizer": "train", "vocab_size": 300},
    "data": {"source": "chats.jsonl", "max_length": 64, "validation": 0.1},
    "train": {"epochs": 1, "lr": 0.001, "global_batch": 8},
    "eval": {"tasks": ["tiny_copy"]},
    "matrix": {"arm": ["padding", "greedy"], "seed": [0]},
}
BASE = {
    "data": {"source": "other.jsonl", "max_length": 64},
    "arm": "best_fit",
    "train": {"steps": 5, "lr": 0.001, "global_batch": 8},
}


def load(document: dict[str, Any]) -> SweepSpec:
    text = yaml.safe_dump(document, sort_keys=False)
    parsed, lines = yamlfile.parse(text, "sweep.yaml")
    problems = yamlfile.Problems("sweep.yaml", lines)
    spec = sweepfile._build(parsed, lines, problems, ())
    problems.raise_if_any()
    assert spec is not None
    return spec


def made(document: dict[str, Any], **fingerprints: str) -> Plan:
    """The plan under made-up fingerprints: those given, by key, and else the key itself."""
    spec = load(document)
    return plan(spec, {key: fingerprints.get(key, key) for key in needed(spec)})


def changed(dotted: str, value: Any) -> dict[str, Any]:
    document = copy.deepcopy(SWEEP)
    *parents, last = dotted.split(".")
    block = document
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    return document


def ids(document: dict[str, Any], **fingerprints: str) -> dict[str, list[str]]:
    """kind -> ids of the cells, in order."""
    cells = made(document, **fingerprints).cells
    return {
        "tokens": [cell.tokens for cell in cells],
        "index": [cell.index for cell in cells],
        "train": [cell.train for cell in cells],
        "eval": [id_ for cell in cells for id_ in cell.evals.values()],
    }


# Golden ------------------------------------------------------------------------------------------------


def golden_sweeps() -> list[Path]:
    """Shipped sweeps whose data packcli makes itself: what others hash is not in this repository."""
    found = []
    for path in sorted((REPO / "sweeps").glob("*.yaml")):
        cells = [cell for _, cell in sweepfile.load(path).cells]
        blocks = [cell.data for cell in cells] + [cell.model.base.data for cell in cells if cell.model.base]
        if all(sources.is_builtin(source) for data in blocks for source in data.sources):
            found.append(path)
    return found


def golden_ids(path: Path) -> dict[str, Any]:
    """tokens, index and train id of every cell by its labels, and of the shared base models.

    Fingerprints are made up, so that raising the corpus's VERSION or packaging a template anew moves no id here;
    eval ids are left out, because they hold lm-eval's version.
    """
    spec = sweepfile.load(path)
    made_up = plan(spec, {key: key for key in needed(spec)})
    cells = {
        " ".join(f"{axis}={value}" for axis, value in cell.labels.items()): [cell.tokens, cell.index, cell.train]
        for cell in made_up.cells
    }
    return {"cells": cells, "shared": list(made_up.shared)}


@pytest.mark.parametrize("path", golden_sweeps(), ids=lambda path: path.stem)
def test_no_id_of_a_shipped_sweep_moves_unnoticed(path: Path) -> None:
    expected = json.loads(GOLDEN.read_text())
    assert path.name in expected, f"new sweep: run `python tests/{Path(__file__).name} --write`"
    assert golden_ids(path) == expected[path.name], (
        "ids moved: every stage of this sweep would run again. Raise the stage's VERSION if its meaning changed; "
        f"if the new ids are meant, run `python tests/{Path(__file__).name} --write`"
    )


def test_golden_holds_no_sweep_that_is_gone() -> None:
    assert json.loads(GOLDEN.read_text()).keys() == {path.name for path in golden_sweeps()}


@pytest.mark.parametrize("kind", ["tokens", "index", "train", "eval"])
def test_raising_a_version_reruns_that_stage_and_all_that_build_on_it(
    monkeypatch: pytest.MonkeyPatch, kind: planning.Kind
) -> None:
    before = ids(SWEEP)
    monkeypatch.setitem(planning.VERSIONS, kind, planning.VERSIONS[kind] + 1)
    after = ids(SWEEP)
    order = ["tokens", "index", "train", "eval"]
    moved = [name for name in order if before[name] != after[name]]
    assert moved == order[order.index(kind) :]


# What ids depend on ------------------------------------------------------------------------------------


def test_a_plan_is_pure() -> None:
    document = changed("model.base", BASE)
    assert made(document) == made(document)
    assert made(document).model_dump_json() == made(document).model_dump_json()


def test_ids_do_not_depend_on_the_order_of_keys() -> None:
    backwards = {
        key: dict(reversed(value.items())) if isinstance(value, dict) and key != "matrix" else value
        for key, value in reversed(SWEEP.items())
    }
    assert ids(backwards) == ids(SWEEP)


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("name", "another"),
        ("baseline", "greedy"),
        ("train.threads", 2),
        ("train.micro_batch", 4),
        ("train.save_every", 7),
        ("train.keep_last", 3),
        ("train.batch_unit", "rows"),
        ("model.dtype", "float32"),
        ("data.source", ["chats.jsonl"]),
        ("train.lr", 1e-3),
        ("matrix.train.lr", None),
    ],
)
def test_what_does_not_change_an_output_changes_no_id(dotted: str, value: Any) -> None:
    document = changed(dotted, value)
    if dotted == "matrix.train.lr":  # as an axis it is labelled, and is the same run
        document = changed("matrix", {**SWEEP["matrix"], "train.lr": [0.001]})
    assert ids(document) == ids(SWEEP)


@pytest.mark.parametrize(
    ("dotted", "value", "first"),
    [
        ("data.mapping", {"question": "q"}, "tokens"),
        ("data.max_documents", 5, "tokens"),
        ("data.template", "plain", "tokens"),
        ("data.source", ["chats.jsonl", "more.jsonl"], "tokens"),
        ("model.vocab_size", 301, "tokens"),
        ("data.validation", 0.2, "tokens"),  # the trained tokenizer sees other documents
        ("data.max_length", 65, "index"),
        ("matrix.seed", [1], "index"),
        ("train.lr", 2e-3, "train"),
        ("train.epochs", 2, "train"),
        ("train.global_batch", 16, "train"),
        ("train.batch_unit", "tokens", "train"),
        ("train.schedule", "linear", "train"),
        ("train.warmup_ratio", 0.1, "train"),
        ("train.weight_decay", 0.1, "train"),
        ("train.betas", [0.9, 0.95], "train"),
        ("train.clip", None, "train"),
        ("model.dtype", "bfloat16", "train"),
        ("model.config.hidden_size", 64, "train"),
        ("model.base", BASE, "train"),
        ("eval.limit", 5, "eval"),
        ("eval.chat_template", False, "eval"),
    ],
)
def test_what_changes_an_output_changes_its_id_and_none_before_it(dotted: str, value: Any, first: str) -> None:
    before, after = ids(SWEEP), ids(changed(dotted, value))
    order = ["tokens", "index", "train", "eval"]
    for name in order:
        same = [old == new for old, new in zip(before[name], after[name], strict=True)]
        assert not any(same) if order.index(name) >= order.index(first) else all(same), name


def test_validation_moves_no_token_when_the_tokenizer_is_not_trained() -> None:
    named = changed("model", {"config": {"model_type": "llama"}, "tokenizer": "some/hub-id"})
    other = copy.deepcopy(named)
    other["data"]["validation"] = 0.2
    assert ids(named)["tokens"] == ids(other)["tokens"]
    assert ids(named)["index"] != ids(other)["index"]


@pytest.mark.parametrize("key", [source_key(SourceSpec(source="chats.jsonl")), "template:chatml"])
def test_a_changed_input_reruns_everything_that_read_it(key: str) -> None:
    before, after = ids(SWEEP), ids(SWEEP, **{key: "another"})
    assert all(not set(before[kind]) & set(after[kind]) for kind in before)


def own_arm(**fields: str) -> dict[str, Any]:
    document = copy.deepcopy(SWEEP)
    document["matrix"]["arm"] = ["greedy", "mine"]
    return {**document, "arms": {"mine": {"extends": "greedy", **fields}}}


def test_an_arm_by_another_name_is_the_same_work() -> None:
    cells = made(own_arm()).cells
    assert cells[0].train == cells[1].train
    assert cells[0].id == cells[1].id
    assert [cell.labels["arm"] for cell in cells] == ["greedy", "mine"]


def test_attention_changes_the_run_and_not_the_rows() -> None:
    one, other = made(own_arm(attention="document", positions="reset")).cells
    assert one.index == other.index
    assert one.train != other.train


def test_the_packer_changes_the_rows_and_not_the_tokens() -> None:
    one, other = made(own_arm(packer="best_fit")).cells
    assert one.tokens == other.tokens
    assert one.index != other.index


def test_the_batch_unit_changes_the_run_and_not_the_rows() -> None:
    one, other = made(own_arm(batch_unit="documents")).cells
    assert one.index == other.index
    assert one.train != other.train


def test_counting_rows_or_documents_is_one_run_where_a_row_is_a_document() -> None:
    document = copy.deepcopy(SWEEP)
    document["matrix"] = {
        "arm": ["padding", "padding_free", "greedy"],
        "train.batch_unit": ["rows", "documents", "tokens"],
    }
    plan_ = made(document)
    runs = {tuple(cell.labels.values()): cell.train for cell in plan_.cells}
    for arm in ("padding", "padding_free"):
        assert runs[arm, "rows"] == runs[arm, "documents"] != runs[arm, "tokens"]
    assert len({runs["greedy", unit] for unit in ("rows", "documents", "tokens")}) == 3
    assert len(plan_.trains) == 7
    assert {order.train.batch_unit for order in plan_.trains.values()} == {"rows", "documents", "tokens"}


def test_a_shared_base_is_trained_once_and_before_what_starts_from_it() -> None:
    document = changed("model.base", BASE)
    document["matrix"]["seed"] = [0, 1]
    plan_ = made(document)
    [base] = plan_.shared
    assert len(plan_.trains) == 5
    assert plan_.trains[base].random_weights
    assert {order.base for id_, order in plan_.trains.items() if id_ != base} == {base}
    assert not any(order.random_weights for id_, order in plan_.trains.items() if id_ != base)
    stages = plan_.stages()
    assert len(stages) == len(set(stages))
    for stage in stages:
        assert all(stages.index(upstream) < stages.index(stage) for upstream in plan_.inputs(*stage))
    assert set(closure(plan_, [("eval", id_) for id_ in plan_.evals])) == set(stages)


def test_the_base_is_tokenized_as_the_cell_is() -> None:
    plan_ = made(changed("model.base", BASE))
    recipes = {order.tokenizer.model_dump_json() for order in plan_.tokens.values()}
    assert len(plan_.tokens) == 2
    assert len(recipes) == 1


def test_a_plan_looks_up_what_needed_names_and_nothing_else() -> None:
    class Recording(dict[str, str]):
        used: set[str] = set()  # noqa: RUF012 - one instance only

        def __getitem__(self, key: str) -> str:
            self.used.add(key)
            return super().__getitem__(key)

    for document in (
        SWEEP,
        changed("model.base", BASE),
        changed("model", {"name": "some/hub-id", "revision": "v1"}),
    ):
        spec = load(document)
        fingerprints = Recording({key: key for key in needed(spec)})
        fingerprints.used.clear()
        plan(spec, fingerprints)
        assert fingerprints.used == set(fingerprints)


def test_a_revision_and_a_task_protocol_are_part_of_their_keys() -> None:
    spec = load(changed("model", {"name": "some/hub-id", "revision": "v1"}))
    keys = needed(spec)
    assert "model:some/hub-id@v1" in keys
    assert "tokenizer:some/hub-id@v1" in keys
    limited = needed(load(changed("eval.limit", 3)))
    assert {key for key in limited if key.startswith("task:")}.isdisjoint(keys)


def test_a_plan_survives_its_own_file() -> None:
    plan_ = made(changed("model.base", BASE))
    assert Plan.model_validate_json(plan_.model_dump_json()) == plan_


# What the files of a checkpoint change ------------------------------------------------------------------

TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "config.json", "merges.txt", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
)  # fmt: skip


def test_a_file_that_no_tokenizer_reads_tokenizes_nothing_again_and_each_that_it_reads_does(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "model"
    (directory / "additional_chat_templates").mkdir(parents=True)

    def fingerprint() -> str:
        return fingerprints.checkpoint(str(directory), FileHashes(Store(tmp_path)), weights=False)

    for name in TOKENIZER_FILES:
        (directory / name).write_text("1")
    before = fingerprint()
    assert before == digest([[name, sha256_file(directory / name)] for name in TOKENIZER_FILES]), (
        "as it always was"
    )
    for name in ("generation_config.json", "trainer_state.json", "model.safetensors.index.json"):
        (directory / name).write_text("1")
    assert fingerprint() == before
    seen = {before}
    for name in (*TOKENIZER_FILES, "additional_chat_templates/tool.jinja"):
        (directory / name).write_text("2")
        assert fingerprint() not in seen, name
        seen.add(fingerprint())


@pytest.mark.parametrize("weights", [False, True])
def test_a_link_to_nothing_in_a_checkpoint_is_named_and_no_traceback(tmp_path: Path, weights: bool) -> None:
    (tmp_path / "tokenizer.json").symlink_to("gone")
    with pytest.raises(ConfigError, match=r"tokenizer\.json` cannot be read: No such file"):
        fingerprints.checkpoint(str(tmp_path), FileHashes(Store(tmp_path)), weights=weights)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {Path(__file__).name} --write")
    golden = {path.name: golden_ids(path) for path in golden_sweeps()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    print(f"{GOLDEN}: {sum(len(sweep['cells']) for sweep in golden.values())} cells of {len(golden)} sweeps")
