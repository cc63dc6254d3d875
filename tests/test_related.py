"""Who shares a row: what a comparison of related with unrelated samples would rest on if grouping went wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_index import FakeTokens, index_order
from test_plan import SWEEP, ids
from test_tokens import open_store, order_for, small_pieces

from packcli import grouping, packing, stages, sweepfile
from packcli.config import ARMS, ArmSpec
from packcli.data import alike, index, topics
from packcli.errors import ConfigError, DataError, MissingError
from packcli.grouping import Groups
from packcli.packing import Rows
from packcli.store import Store

WHOLE = ("next_fit_decreasing", "first_fit_decreasing", "shuffled_first_fit", "best_fit")


def silent(done: int, total: int, remark: str) -> None:
    pass


def rows_of(rows: Rows) -> list[list[int]]:
    return [part.tolist() for part in np.split(rows.document, rows.offsets[1:-1])] if rows.num_rows else []


def row_numbers(rows: Rows) -> Any:
    return np.repeat(np.arange(rows.num_rows), np.diff(rows.offsets))


# Groups -> rows ----------------------------------------------------------------------------------------


@st.composite
def documents(draw: st.DrawFn) -> tuple[Any, Any, int]:
    """(lengths, groups, max_length)."""
    max_length = draw(st.integers(4, 1300))
    pairs = draw(st.lists(st.tuples(st.integers(1, max_length), st.integers(0, 4)), min_size=1, max_size=40))
    lengths, group = np.array(pairs, np.int64).T
    return lengths, group, max_length


@given(documents(), st.sampled_from(WHOLE), st.booleans(), st.integers(0, 2))
def test_every_document_lies_once_and_whole_in_a_row_that_holds_it(
    drawn: tuple[Any, Any, int], packer: str, likeness: bool, seed: int
) -> None:
    lengths, group, max_length = drawn
    pack, rng = getattr(packing, packer), np.random.default_rng(seed)
    if likeness:
        rows = grouping.apart(lengths, group, np.eye(5, dtype=np.float32), max_length, rng)
    else:
        rows = grouping.together(lengths, group, max_length, pack, rng)
    assert sorted(rows.document.tolist()) == list(range(len(lengths)))
    assert not rows.start.any()
    assert np.array_equal(rows.stop, lengths[rows.document])
    assert rows.tokens().max() <= max_length
    assert (np.diff(rows.offsets) > 0).all()


@given(documents(), st.integers(0, 2))
def test_a_row_is_mixed_only_where_whole_rests_meet(drawn: tuple[Any, Any, int], seed: int) -> None:
    lengths, group, max_length = drawn
    made = grouping.together(lengths, group, max_length, packing.best_fit, np.random.default_rng(seed))
    mixed: dict[int, int] = {}
    for row in rows_of(made):
        if len(found := {int(group[number]) for number in row}) > 1:
            for one in found:
                mixed[one] = mixed.get(one, 0) + 1
    assert all(count == 1 for count in mixed.values()), "a group has one rest"
    for one in np.unique(group):
        if lengths[group == one].sum() <= max_length:
            assert len({n for n, row in enumerate(rows_of(made)) if one in group[row]}) == 1, "torn apart"


def planted(count: int = 6000, kinds: int = 12) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    return np.clip(rng.lognormal(5, 1, count), 8, 2048).astype(np.int64), rng.integers(0, kinds, count)


def test_related_rows_are_pure_and_nearly_as_few_as_the_packers() -> None:
    lengths, group = planted()
    plain = packing.best_fit(lengths, 2048, np.random.default_rng(0))
    made = grouping.together(lengths, group, 2048, packing.best_fit, np.random.default_rng(0))
    found = grouping.sharing(row_numbers(made), group[made.document])
    assert found["rows_pure"] > 0.9 * found["rows_shared"]
    assert made.num_rows <= 1.02 * plain.num_rows


def test_unrelated_documents_meet_less_than_by_chance_in_as_few_rows() -> None:
    lengths, group = planted(kinds=60)
    plain = packing.best_fit(lengths, 2048, np.random.default_rng(0))
    like = np.eye(60, dtype=np.float32)
    made = grouping.apart(lengths, group, like, 2048, np.random.default_rng(0))
    by_chance, found = (grouping.sharing(row_numbers(rows), group[rows.document]) for rows in (plain, made))
    assert found["pairs_within"] < 0.6 * by_chance["pairs_within"]
    assert made.num_rows <= 1.02 * plain.num_rows


def test_of_groups_that_are_not_the_same_the_less_like_share_a_row() -> None:
    group = np.repeat([0, 1, 2, 3], 50)
    like = np.array([[1, 0.9, 0, 0], [0.9, 1, 0, 0], [0, 0, 1, 0.9], [0, 0, 0.9, 1]], np.float32)
    made = grouping.apart(np.full(200, 5), group, like, 10, np.random.default_rng(0))
    pairs = [{int(group[number]) for number in row} for row in rows_of(made)]
    assert sum(pair in ({0, 1}, {2, 3}) or len(pair) == 1 for pair in pairs) < len(pairs) / 10


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(-1, 4)), min_size=1, max_size=40))
def test_meetings_are_counted_as_one_by_one(pairs: list[tuple[int, int]]) -> None:
    row, group = np.array(pairs, np.int64).T
    found = grouping.sharing(row, group)
    meetings = [(a, b) for n, a in enumerate(pairs) for b in pairs[:n]]
    together = [(a, b) for a, b in meetings if a[0] == b[0]]
    rows = {one: [g for r, g in pairs if r == one] for one, _ in pairs}

    def alike(*kinds: int) -> bool:
        return -1 not in kinds and len(set(kinds)) == 1

    assert (found["pairs"], found["groups"]) == (len(together), len({g for _, g in pairs if g >= 0}))
    assert found["without"] == sum(g < 0 for _, g in pairs)
    assert found["pairs_within"] == sum(alike(a[1], b[1]) for a, b in together)
    assert found["rows_shared"] == sum(len(held) > 1 for held in rows.values())
    assert found["rows_pure"] == sum(len(held) > 1 and alike(*held) for held in rows.values())
    if meetings:
        chance = sum(alike(a[1], b[1]) for a, b in meetings) / len(meetings)
        assert found["pairs_by_chance"] == pytest.approx(chance)


# The ledger --------------------------------------------------------------------------------------------


@given(documents(), st.sampled_from(["related", "unrelated", "near_duplicate"]), st.integers(1, 3), st.data())
def test_the_ledger_closes_however_documents_are_grouped(
    drawn: tuple[Any, Any, int], arm: str, epochs: int, data: st.DataObject
) -> None:
    lengths, group, max_length = drawn
    held = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    contents = [0 if out else 2**63 for out in held]
    found = [(int(n) + 3, [(1, int(n) + 3)], content) for n, content in zip(lengths, contents, strict=True)]
    fake, order = FakeTokens(found), index_order(arm, max_length)
    layout = order.layout.model_copy(update={"repack_each_epoch": epochs > 1})
    order = order.model_copy(update={"layout": layout, "epochs": epochs})
    groups = Groups(group, np.eye(5, dtype=np.float32) if arm == "unrelated" else None)
    if all(held):
        with pytest.raises(DataError, match="no document is left"):
            index.build(order, fake, len(found), 0, groups=groups)
        return
    built, _, ledger = index.build(order, fake, len(found), 0, groups=groups)
    index.check(ledger)
    kept = [number for number, out in enumerate(held) if not out]
    for epoch in range(epochs):
        assert sorted(built.epoch(epoch).rows.document.tolist()) == kept
    assert ledger["tokens_kept"] == sum(min(found[number][0], max_length) for number in kept)
    assert ledger["documents_cut"] == 0


def test_rows_by_what_documents_say_are_not_made_from_lengths_alone() -> None:
    fake = FakeTokens([(5, [(1, 5)], 2**63)])
    with pytest.raises(DataError, match="`group_by: similarity` depend on what documents say"):
        index.build(index_order("related", 8), fake, 1, 0)


# Documents -> groups -----------------------------------------------------------------------------------

SUBJECTS = ("sea ship wind sail wave", "oven flour salt bread sugar", "goal ball team match score")


def chats() -> list[dict[str, Any]]:
    """Conversations about three subjects, in turns; one of them does not say which."""
    rng = np.random.default_rng(3)
    found = []
    for number in range(90):
        words = SUBJECTS[number % 3].split()
        said = [" ".join(rng.choice(words, count)) for count in (40, 8)]
        found.append({"question": said[0], "answer": said[1], "subject": number % 3})
    del found[5]["subject"]
    return found


def stored(directory: Path, records: list[dict[str, Any]], **changes: Any) -> Any:
    file = directory / "chats.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    order = order_for(file, **changes)
    recipe = order.tokenizer.model_copy(update={"validation": 0.0})
    return order.model_copy(update={"tokenizer": recipe})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Any, int]:
    root = tmp_path_factory.mktemp("related")
    order = stored(root, chats(), fields=("subject", "absent"))
    with pytest.MonkeyPatch.context() as patch:
        small_pieces(patch, 8000)
        opened, _, results = open_store(order, root / "runs")
    assert results["shards"] > 2
    return Store(root / "runs"), opened, results["vocab_size"]


def order_by(group_by: str, seed: int = 0, max_length: int = 256) -> Any:
    order = index_order("best_fit", max_length, 0.0, seed)
    layout = order.layout.model_copy(update={"group_by": group_by})
    return order.model_copy(update={"tokens": "t0", "layout": layout})


def test_a_field_is_read_from_every_shard_and_what_lacks_it_is_a_group_of_its_own(prepared: Any) -> None:
    _, opened, vocabulary = prepared
    said, names = opened.field("subject")
    expected = [record.get("subject") for record in chats()]
    assert [names[code] for code in said] == [None if value is None else str(value) for value in expected]
    found = alike.groups(order_by("subject"), opened, vocabulary, silent)
    assert found is not None
    assert np.array_equal(found.of, said)
    assert set(opened.field("absent")[0].tolist()) == {0}


def test_a_mistyped_field_passes_for_perfect_grouping(prepared: Any) -> None:
    _, opened, vocabulary = prepared
    with pytest.raises(DataError, match="no record has a field `absent`"):
        alike.groups(order_by("absent"), opened, vocabulary, silent)


def test_a_field_that_was_not_kept_is_refused_with_the_line_to_add(prepared: Any) -> None:
    _, opened, vocabulary = prepared
    with pytest.raises(ConfigError, match="keeps no field `topic`") as error:
        alike.groups(order_by("topic"), opened, vocabulary, silent)
    assert "data.fields: [topic]" in (error.value.fix or "")


def test_similarity_finds_what_documents_are_about(prepared: Any) -> None:
    _, opened, vocabulary = prepared
    found = alike.groups(order_by("similarity"), opened, vocabulary, silent)
    assert found is not None
    subject = np.arange(90) % 3
    for cluster in np.unique(found.of):
        counts = np.bincount(subject[found.of == cluster])
        assert counts.max() == counts.sum()
    other = alike.groups(order_by("adversarial"), opened, vocabulary, silent)
    assert other is not None
    assert other.likeness is not None
    assert np.array_equal(other.of, found.of)
    assert np.allclose(np.diag(other.likeness), 1, atol=1e-4)


def test_near_duplicates_are_those_that_say_nearly_the_same(tmp_path: Path) -> None:
    rng, said = np.random.default_rng(3), []
    for number in range(60):
        letters = rng.choice(list("abcdefghijklmnop"), 200).tolist()
        said.append("".join(letters))
        if number % 3 == 0:
            letters[100] = "z"
            said.append("".join(letters))
    opened, _, results = open_store(
        stored(tmp_path, [{"question": one, "answer": "yes"} for one in said]), tmp_path
    )
    found = alike.groups(order_by("near_duplicates"), opened, results["vocab_size"], silent)
    assert found is not None
    for number, one in enumerate(said):
        nearly = [n for n, other in enumerate(said) if sum(a != b for a, b in zip(one, other, strict=True)) < 2]
        assert np.flatnonzero(found.of == found.of[number]).tolist() == nearly


@pytest.mark.parametrize("group_by", ["similarity", "near_duplicates"])
def test_groups_do_not_depend_on_how_the_store_is_cut_up(prepared: Any, tmp_path: Path, group_by: str) -> None:
    _, opened, vocabulary = prepared
    whole, _, _ = open_store(stored(tmp_path, chats()), tmp_path)
    found = [alike.groups(order_by(group_by), tokens, vocabulary, silent) for tokens in (opened, whole)]
    assert np.array_equal(found[0].of, found[1].of)  # type: ignore[union-attr]


def test_the_seed_alone_decides_groups_and_rows(prepared: Any) -> None:
    _, opened, vocabulary = prepared

    def rows(seed: int, group_by: str) -> list[int]:
        order = order_by(group_by, seed)
        groups = alike.groups(order, opened, vocabulary, silent)
        return index.build(order, opened, opened.num_documents, 0, groups=groups)[0].rows.document.tolist()

    for group_by in ("similarity", "adversarial", "near_duplicates", "subject"):
        assert rows(0, group_by) == rows(0, group_by)
        assert rows(0, group_by) != rows(1, group_by)


def test_prepare_says_who_shares_rows_by_every_field_and_by_its_own_groups(prepared: Any) -> None:
    store, _, _ = prepared
    plain, grouped = (
        stages.prepare_index(order_by(by, max_length=1024).model_copy(update={"id": by}), store).results
        for by in ("none", "similarity")
    )
    assert plain["sharing"].keys() == {"subject", "absent"}
    assert grouped["sharing"].keys() == {"subject", "absent", "similarity"}
    assert plain["sharing"]["subject"]["groups"] == 3
    assert plain["sharing"]["subject"]["without"] > 0
    assert (plain["sharing"]["absent"]["groups"], plain["sharing"]["absent"]["pairs_within"]) == (0, 0)
    found = grouped["sharing"]["subject"]
    assert found["pairs_within"] / found["pairs"] > 2 * found["pairs_by_chance"]
    assert plain["sharing"]["subject"]["pairs_by_chance"] == found["pairs_by_chance"]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_store_too_small_for_clusters_is_one_group(tmp_path: Path, length: int) -> None:
    said = [{"question": "a" * length, "answer": f"{number}"} for number in range(length)]
    opened, _, results = open_store(stored(tmp_path, said), tmp_path)
    for group_by in ("similarity", "adversarial", "near_duplicates"):
        found = alike.groups(order_by(group_by), opened, results["vocab_size"], silent)
        assert found is not None
        assert len(found.of) == length


def test_similarity_without_scikit_learn_says_what_to_type(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, opened, vocabulary = prepared
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(MissingError, match="scikit-learn") as error:
        alike.groups(order_by("similarity"), opened, vocabulary, silent)
    assert "packcli[related]" in (error.value.fix or "")


# Sweep files and ids -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({**ARMS["padding"], "group_by": "similarity"}, "needs `layout: pack`"),
        ({**ARMS["random"], "group_by": "topic"}, "a packer that keeps documents whole"),
        (
            {**ARMS["best_fit"], "packer": "first_fit_decreasing", "window": 100, "group_by": "topic"},
            "no `window`",
        ),
    ],
)
def test_grouping_where_it_means_nothing_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        ArmSpec.model_validate(changes)


def test_a_field_to_group_by_that_is_not_kept_is_refused_at_its_line(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    text = (
        "name: s\nmodel: {name: tiny}\ndata: {source: tiny, max_length: 64, fields: [task]}\n"
        "train: {epochs: 1, lr: 1e-3, global_batch: 4}\n"
        "arms:\n  mine: {extends: best_fit, group_by: topic}\nmatrix: {arm: [mine]}\n"
    )
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.yaml:6: `group_by: topic`.*add `data: {fields: \[task, topic\]}`"):
        sweepfile.load(file)
    file.write_text(text.replace("[task]", "[task, topic]"))
    assert sweepfile.load(file).cells[0][1].arm.group_by == "topic"


@pytest.mark.parametrize("fields", ["[similarity]", "[a, a]", "['a b']"])
def test_a_field_that_cannot_be_told_from_another_word_is_refused(tmp_path: Path, fields: str) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        f"name: s\nmodel: {{name: tiny}}\ndata: {{source: tiny, max_length: 64, fields: {fields}}}\n"
        "train: {epochs: 1, lr: 1e-3, global_batch: 4}\nmatrix: {arm: [best_fit]}\n"
    )
    with pytest.raises(ConfigError, match=r"s\.yaml:3: `data\.fields"):
        sweepfile.load(file)


def test_grouping_is_part_of_the_index_and_fields_of_the_tokens() -> None:
    def arms(*names: str, **data: Any) -> dict[str, Any]:
        return {**SWEEP, "data": {**SWEEP["data"], **data}, "matrix": {"arm": list(names), "seed": [0]}}

    plain, related, unrelated = (ids(arms(name)) for name in ("best_fit", "related", "unrelated"))
    assert plain["tokens"] == related["tokens"]
    assert len({plain["index"][0], related["index"][0], unrelated["index"][0]}) == 3
    kept = ids(arms("best_fit", fields=["topic"]))
    assert kept["tokens"] != plain["tokens"]
    assert ids(arms("best_fit", fields=[])) == plain


# The planted corpus ------------------------------------------------------------------------------------


def test_a_topic_never_says_two_values_of_one_name_and_items_ask_what_they_are_meant_to() -> None:
    values: dict[tuple[str, str], str] = {}
    for conversation in topics.conversations():
        turns = [message["content"] for message in conversation["messages"]]
        asked = [turn.split(": ") for turn in turns[::2]]
        assert {topic for topic, _ in asked} == {conversation["topic"]}
        assert len({name for _, name in asked}) == len(asked), "a conversation would tell what it asks"
        for (topic, name), answer in zip(asked, turns[1::2], strict=True):
            assert values.setdefault((topic, name), answer) == answer
    seen = {topic for topic, _ in values}
    known = topics.items("topics_recall", "test")
    asked_alone = [item["messages"][0]["content"].split(": ") for item in known]
    assert all(len(item["messages"]) == 1 for item in known)
    assert [values[topic, name] for topic, name in asked_alone] == [item["answer"] for item in known]
    new = {split: topics.items("topics_context", split) for split in ("tuning", "test")}
    held_out = [{item["messages"][0]["content"].split(": ")[0] for item in found} for found in new.values()]
    assert not (held_out[0] | held_out[1]) & seen
    assert not held_out[0] & held_out[1]
    for item in (*new["tuning"], *new["test"]):
        told = {message["content"] for message in item["messages"] if message["role"] == "assistant"}
        assert item["answer"] in told


@pytest.mark.soak
def test_related_rows_help_reading_and_hurt_knowing_without_a_mask(tmp_path: Path, run_cli: Any) -> None:
    masks = [("same_topic", "best_fit"), ("same_topic_crossing", "best_fit_crossing")]
    only = [word for pair in masks for arm in pair for word in ("--only", f"arm={arm}")]
    seeds = ["--only", "seed=0", "--only", "seed=2"]
    sweep = Path(__file__).parents[1] / "sweeps" / "related_tiny.yaml"
    done = run_cli("sweep", sweep, *only, *seeds, "--set", "eval.tasks=[topics]", "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr
    scores: dict[tuple[str, str], float] = {}
    for row in done.json()["rows"]:
        for task, found in row["eval"].items():
            place = row["labels"]["arm"], task
            scores[place] = scores.get(place, 0) + found["score"] / 2
    recall, context = (
        [scores[related, task] - scores[plain, task] for related, plain in masks]
        for task in ("topics_recall", "topics_context")
    )
    assert abs(recall[0]) < 0.05
    assert recall[1] < -0.05
    assert abs(context[0]) < 0.1
    assert context[1] > 0.1
