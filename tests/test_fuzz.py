"""Whatever a file, a reply or an argument holds: a result, or one clear error. No traceback, no hang, no loss.

CI tries some hundreds of inputs, always the same. `make soak` (HYPOTHESIS_PROFILE=soak) tries new ones, many times
as many, and prints how many.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml
from conftest import REPO, chat_records
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_report import SWEEP as REPORTED
from test_report import Sweep
from test_sweepfile import SWEEP

from packcli import cli, sweepfile
from packcli.config import SourceSpec
from packcli.data import chat, conversations, sources, tokenized
from packcli.data import render as rendering
from packcli.data.shards import Maker
from packcli.errors import DataError, PackcliError
from packcli.eval.judge import replies, verdicts, wildbench
from packcli.importers import convert
from packcli.launch import profile
from packcli.report import ledger, render, status

T = TypeVar("T")
SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
TIMES = 100
TRIED: Counter[str] = Counter()


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES if SOAK else examples,
        derandomize=not SOAK,
        database=None,
        deadline=20_000,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if SOAK and reporter is not None and capture is not None:
        lines = [f"{name}: {count:,} inputs" for name, count in sorted(TRIED.items())]
        with capture.global_and_fixture_disabled():
            for line in ["", *lines, f"all: {TRIED.total():,} inputs, {request.session.testsfailed} failures"]:
                reporter.write_line(line)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory for files that are written anew for each input."""
    with tempfile.TemporaryDirectory(prefix="packcli-fuzz-") as directory:
        yield Path(directory)


def tried(what: str, call: Callable[[], T]) -> T | None:
    """What it gives; None where it refuses with one clear error. All else goes through, and fails the test."""
    TRIED[what] += 1
    try:
        return call()
    except PackcliError as error:
        refused = error
    assert refused.exit_code in (2, 3, 4), refused
    assert refused.cause.strip()
    assert refused.fix.strip(), refused.cause
    return None


def reason(what: str, call: Callable[[], T], kind: type[Exception] = chat.Rejected) -> T | str:
    """What it gives, or in a few words why it does not."""
    TRIED[what] += 1
    try:
        return call()
    except kind as error:
        why = str(error)
    assert 0 < len(why) < 300
    return why


# What there is to be tried -----------------------------------------------------------------------------

NAMES = (
    "messages", "conversations", "role", "content", "from", "value", "instruction", "input", "output", "response",
    "system", "prompt", "completion", "question", "answer", "input_ids", "labels", "attention_mask", "seq_lengths",
    "document_lengths", "position_ids", "assistant_masks", "user", "assistant", "gpt", "human",
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(NAMES),
    st.text(max_size=8),
    st.sampled_from(["9" * 21, "1e400", "-1", "true"]),
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "\ufdd0", "\ufdd1" + "0\ufdd2", "\ud800", "\x00"]
    ),
    st.lists(st.sampled_from(["<|im_end|>", "a ", "\n", "é", "\U0001f642", " "]), max_size=6).map("".join),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 300), st.integers(-(2**70), 2**70), st.floats(), TEXTS
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(st.integers(0, 40), max_size=6)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | TEXTS, "content": TEXTS}),
    max_size=5,
)
RECORDS = st.one_of(
    JSON,
    st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5),
    st.builds(lambda turns: {"messages": turns}, TURNS),
    st.builds(lambda turns: {"messages": [{"role": "user", "content": "q"}, *turns]}, TURNS),
)
SNIPPETS = (
    "!!python/object/apply:os.system ['true']", "!!set {a, b}", "!!binary aGk=", "!!int x", "!!bool x", "!own 1",
    "? [a, b]\n: c\n", "<<: *a\n", "&a ", "*a", '"\\U00110000"', '"\\ud800"', '"\\0"', "1" * 5000, "1e400", ".nan",
    "[" * 200, "{a: " * 200, "- " * 100, "2001-99-99", "1:99:99", "\x00", "\ufeff", "\t", "%YAML 9.9\n", "---\n",
    "=", "null", "~", "[]", "{}", "'", '"', ": ", "#", "0x", "train.lr", "-1", "999999999999999999999", "\r",
)  # fmt: skip


@st.composite
def mutated(draw: Any, originals: list[str]) -> bytes:
    """A text that is nearly right: pieces cut out, doubled, or something nasty put between; or just bytes."""
    if draw(st.integers(0, 9)) == 0:
        return bytes(
            draw(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: text.encode(errors="replace")))
        )
    text = draw(st.sampled_from(originals))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        stop = min(len(text), start + draw(st.integers(0, 30)))
        what = draw(st.integers(0, 3))
        if what == 0:
            text = text[:start] + text[stop:]
        elif what == 1:
            text = text[:stop] + text[start:]
        else:
            text = text[:start] + draw(st.sampled_from(SNIPPETS)) + text[start if what == 2 else stop :]
    raw = text.encode(errors="surrogatepass")
    return raw[: draw(st.integers(0, len(raw)))] if draw(st.integers(0, 9)) == 0 else raw


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """A document with one of its values replaced, or taken out."""
    found = json.loads(json.dumps(document))
    where, key = [found], 0
    container: Any = where
    while isinstance(container[key], dict | list) and container[key] and draw(st.integers(0, 4)):
        container = container[key]
        key = draw(st.sampled_from(sorted(container) if isinstance(container, dict) else range(len(container))))
    if draw(st.booleans()) and container is not where:
        del container[key]
    else:
        container[key] = draw(JSON)
    return where[0]


# YAML --------------------------------------------------------------------------------------------------

SHIPPED = [path.read_text() for path in sorted((REPO / "sweeps").glob("*.yaml"))]
PROFILES = [path.read_text() for path in sorted((REPO / "slurm").glob("*.yaml"))]
IMPORTED = [path.read_text() for path in sorted((REPO / "tests" / "imported").glob("*.y*ml"))]


@fuzz(30)
@given(mutated([SWEEP, *(text for text in SHIPPED if len(text) < 1500)]))
def test_a_sweep_of_any_bytes_is_a_sweep_or_one_error(place: Path, raw: bytes) -> None:
    (place / "sweep.yaml").write_bytes(raw)
    spec = tried("sweep, bytes", lambda: sweepfile.load(place / "sweep.yaml"))
    assert spec is None or spec.cells


@fuzz(60)
@given(changed(yaml.safe_load(SWEEP) | {"arms": {"mine": {"extends": "best_fit"}}, "include": [{"seed": 1}]}))
def test_a_sweep_of_any_values_is_a_sweep_or_one_error(place: Path, document: Any) -> None:
    (place / "sweep.yaml").write_text(json.dumps(document))
    spec = tried("sweep, values", lambda: sweepfile.load(place / "sweep.yaml"))
    if spec is not None:  # what is let through can be written down again, as ids need it
        assert type(spec).model_validate_json(spec.model_dump_json()) == spec


@fuzz(25)
@given(mutated(PROFILES))
def test_a_profile_of_any_bytes_is_a_profile_or_one_error(place: Path, raw: bytes) -> None:
    (place / "site.yaml").write_bytes(raw)
    tried("profile", lambda: profile.load(place / "site.yaml"))


@fuzz(30)
@given(mutated(IMPORTED), st.sampled_from([None, "trl", "axolotl", "llamafactory"]))
def test_no_key_of_a_trainers_file_is_lost_whatever_it_holds(place: Path, raw: bytes, trainer: Any) -> None:
    (place / "theirs.yaml").write_bytes(raw)
    imported = tried("importer, bytes", lambda: convert.convert(place / "theirs.yaml", trainer, 2))
    if imported is not None:
        assert_all_told(imported, yaml.load(raw.decode(), yaml.BaseLoader))


@fuzz(40)
@given(st.sampled_from(IMPORTED).flatmap(lambda text: changed(yaml.load(text, yaml.SafeLoader))))
def test_no_value_of_a_trainers_file_ends_in_a_traceback(place: Path, document: Any) -> None:
    (place / "theirs.yaml").write_text(json.dumps(document))
    imported = tried("importer, values", lambda: convert.convert(place / "theirs.yaml", None, 2))
    if imported is not None:
        assert_all_told(imported, document)


def assert_all_told(imported: convert.Imported, document: dict[str, Any]) -> None:
    told = [entry.key for entry in imported.entries]
    assert len(told) == len(set(told))
    for key in document.keys() - {"<<"}:  # what it brings in is told, not the key itself
        assert any(str(key) == one or one.startswith(f"{key}.") for one in told), key


@fuzz(60)
@given(
    st.one_of(
        st.text(max_size=30),
        st.builds(
            lambda key, value: f"{key}={value}",
            st.sampled_from(["train.lr", "data.source", "model.config", "model.config.a.b", "eval", "a", "", "."])
            | st.just("model.config" + ".a" * 5000),
            st.text(max_size=12) | st.sampled_from(SNIPPETS),
        ),
    ),
    st.none() | st.text(max_size=12) | st.sampled_from(["arm=padding", "arm=", "=", "seed=1"]),
)
def test_any_set_and_only_choose_cells_or_are_refused(place: Path, set_: str, only: str | None) -> None:
    (place / "sweep.yaml").write_text(SWEEP)
    chosen = [only] if only is not None else []
    tried("--set, --only", lambda: sweepfile.load(place / "sweep.yaml", [set_], chosen))


# Data --------------------------------------------------------------------------------------------------

LINES = st.one_of(
    RECORDS.map(lambda record: json.dumps(record).encode()),
    RECORDS.map(lambda record: json.dumps(record).encode()[:-1]),
    st.binary(max_size=20).map(lambda raw: raw.replace(b"\n", b"")),
    st.sampled_from(
        [b"", b" ", b"[" * 5000, b'{"a":' * 3000, b"1" * 6000, b"1e999", "é".encode("latin-1"), b"\x00"]
    ),
)


@fuzz(60)
@given(
    st.lists(LINES, max_size=6),
    st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow"]),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from(["utf-8", "utf-16", "bom"]),
)
def test_every_line_of_a_data_file_is_read_or_named(
    place: Path, lines: list[bytes], name: str, end: bytes, encoding: str
) -> None:
    raw = end.join(lines)
    raw = raw.decode("latin-1").encode("utf-16") if encoding == "utf-16" else raw
    (place / name).write_bytes(b"\xef\xbb\xbf" * (encoding == "bom") + raw)
    source = (SourceSpec(source=str(place / name)),)
    read = tried(
        "data file", lambda: [record for piece in sources.pieces(source, None) for record in sources.read(piece)]
    )
    tried("data file, as chats", lambda: list(conversations.everything(source, None)))
    if read is not None and name == "x.jsonl" and encoding != "utf-16":
        said = [number for number, line in enumerate(raw.split(b"\n"), 1) if not (line + b"\n").isspace()]
        assert [record.number for record in read] == said[: len(read)] == said


SCHEMAS: tuple[chat.Schema, ...] = (
    "messages", "conversations", "instruction", "prompt_completion", "question_answer",
)  # fmt: skip


@fuzz(80)
@given(RECORDS)
def test_any_record_is_a_conversation_or_says_why_not(record: Any) -> None:
    tried("record, its schema", lambda: chat.detect(record, "x.jsonl:1"))
    for schema in SCHEMAS:
        messages = reason("record", partial(chat.conversation, record, schema))
        if not isinstance(messages, str):
            assert {key for turn in messages for key in turn} == {"role", "content"}
            assert {turn["role"] for turn in messages} <= {"user", "assistant", "system"}
            reason("record, its hash", partial(chat.content_hash, messages))


@fuzz(80)
@given(
    JSON
    | st.dictionaries(
        st.sampled_from(NAMES[15:22]),
        JSON | st.lists(st.sampled_from([0, 1, 2, 3, -100, -1, 2**63, 10**17]), max_size=5),
        max_size=4,
    )
)
def test_any_tokenized_record_is_documents_or_says_why_not(record: Any) -> None:
    found = reason("tokenized record", lambda: tokenized.documents(record))
    if not isinstance(found, str):
        assert 0 < sum(len(document.ids) for document in found) <= len(record["input_ids"])


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    from conftest import write_lines
    from test_tokens import open_store, order_for

    root = tmp_path_factory.mktemp("maker")
    order = order_for(write_lines(root / "x.jsonl", chat_records(40, turns=2)))
    _, tokenizer, _ = open_store(order, root / "runs")
    return Maker(order, tokenizer)


@fuzz(60)
@given(st.lists(RECORDS, min_size=1, max_size=4))
def test_every_conversation_is_a_document_or_rejected_and_trained_on_as_it_says(
    maker: Maker, records: list[Any]
) -> None:
    TRIED["conversations, tokenized"] += len(records)
    source = SourceSpec(source=maker._order.sources[0].source)
    read = [sources.Record(0, number, record) for number, record in enumerate(records, 1)]
    shard = maker.make(source, lambda: read, "messages")
    assert shard.conversations == len(records) == shard.num_documents + len(shard.rejected)
    assert {*shard.record.tolist(), *(item["record"] for item in shard.rejected)} == {*range(1, len(records) + 1)}
    for document in range(shard.num_documents):
        start, stop = shard.offsets[document : document + 2]
        first, last = shard.span_offsets[document : document + 2]
        messages = chat.conversation(records[int(shard.record[document]) - 1], "messages")
        said = [turn["content"] + "<|im_end|>" for turn in messages if turn["role"] == "assistant"]
        ids = shard.ids[start:stop]
        assert [maker._tokenizer.decode(ids[a:b]) for a, b in shard.spans[first:last]] == said
        assert maker._tokenizer.decode(ids) == maker._tokenizer.apply_chat_template(messages, tokenize=False)


PIECES = (
    "{{ messages }}", "{{ m.content }}", "{{ m['role'] }}", "{% for m in messages %}", "{% endfor %}",
    "{% if m %}", "{% endif %}", "{{ raise_exception('no') }}", "{{ eos_token }}", "<|im_end|>",
    "{{ ''.__class__ }}",
    "{{ 1/0 }}", "{{ undefined.x.y }}", "{{ messages[9] }}", "{% set x = m.content | trim %}", "{{ x ~ 'a' }}",
    "{%", "}}", "{{",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ 'a' * 99999999999 }}", "{{ messages | tojson }}",
    "{{ range(10 ** 9) | list }}", "{{ " + "(" * 300 + "1" + ")" * 300 + " }}", "{{ " + "9" * 5000 + " }}",
    "{{ strftime_now(3) }}", "{{ messages.append(1) }}", "{% generation %}x{% endgeneration %}", "\n", "\ufdd1",
    "{% for i in range(3) %}" * 25 + "{% endfor %}" * 25, "{{ self }}", "{{ cycler }}", "{{ messages | xmlattr }}",
)  # fmt: skip


@fuzz(30)
@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), TURNS)
def test_any_template_renders_or_refuses(maker: Maker, template: str, turns: list[dict[str, str]]) -> None:
    from copy import copy

    tokenizer = copy(maker._tokenizer)
    tokenizer.chat_template = template or " "
    renderer = tried("template", lambda: rendering.Renderer(tokenizer))
    tried("template, its tokens", lambda: rendering.missing_tokens(template, tokenizer))
    messages = [turn for turn in turns if turn["role"] in ("user", "assistant")]
    if renderer is not None and messages:
        try:
            rendered = renderer.render(messages)
        except (chat.Rejected, rendering.NotTransparent, DataError):
            return
        assert all(0 <= start <= stop <= len(rendered.text) for start, stop in rendered.spans)


# A run directory ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Every stage done; what a test changes in it, it puts back."""
    sweep = Sweep(REPORTED, tmp_path_factory.mktemp("reported"))
    for cell in sweep.plan.cells:
        sweep.trained(cell)
        for task in cell.evals:
            sweep.scored(cell, task, 0.5)
    return sweep


@fuzz(40)
@given(st.data())
def test_a_manifest_of_any_content_is_read_or_named(reported: Sweep, data: st.DataObject) -> None:
    cell = reported.plan.cells[0]
    kind, id_ = data.draw(
        st.sampled_from([("index", cell.index), ("train", cell.train), ("eval", cell.evals["copy"])])
    )
    path = reported.store.manifest_file(kind, id_)  # type: ignore[arg-type]
    kept = path.read_bytes()
    new = data.draw(
        changed(json.loads(kept)).map(lambda document: json.dumps(document).encode()) | mutated([kept.decode()])
    )
    path.write_bytes(new)
    try:
        tried("manifest", lambda: reported.store.manifest(kind, id_))  # type: ignore[arg-type]
        report = tried("manifest, reported", reported.report)
        assert report is not None
        render.markdown(report)
        render.csv_text(report)
        json.loads(render.json_text(report))
        tried("manifest, status", lambda: status.collect(reported.plan, reported.store))
        tried("manifest, ledger", lambda: ledger.table(ledger.collect(reported.plan, reported.store)))
    finally:
        path.write_bytes(kept)


# Replies and benchmarks --------------------------------------------------------------------------------

FORMS: tuple[verdicts.Form, ...] = ("score", "choice", "rating")
SAYINGS = st.one_of(
    TEXTS,
    st.sampled_from(
        ["[[5]]", "[[5]] [[9]]", "[[10]][[10.0]]", "[[1e9]]", "[[11]]", "```json\n", "\n```", "\n" * 5000]
    ),
    st.sampled_from(
        ['{"strengths": "", "weaknesses": "", "score": ', '"7"}', '"score": 1e999}', '{"choice": "A++"}']
    ),
    JSON.map(json.dumps),
)


@fuzz(80)
@given(st.lists(SAYINGS, max_size=4).map("".join))
def test_a_judges_words_are_a_verdict_in_range_or_a_reason(text: str) -> None:
    for form in FORMS:
        value = reason("verdict", partial(verdicts.read, text, form), verdicts.UnusableError)
        if not isinstance(value, str):
            assert value in verdicts.CHOICES.values() if form == "choice" else 1 <= value <= 10


@fuzz(60)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps({"choices": [value], "usage": value}).encode()))
def test_a_judges_body_of_any_bytes_is_kept_and_read_the_same(body: bytes) -> None:
    TRIED["judge's body"] += 1
    reply = replies.from_body(body, key="k", question="q", part="", judge="j", latency_s=0.1, secret="sk-canary")
    again = replies.Reply.model_validate_json(reply.model_dump_json())
    assert again == reply
    assert min(reply.tokens) >= 0
    for form in FORMS:
        assert replies.verdict([reply], form) == replies.verdict([again], form)


@fuzz(60)
@given(
    st.lists(JSON | st.dictionaries(st.sampled_from(["session_id", "output", "primary_tag"]), JSON), max_size=3),
    st.booleans(),
)
def test_a_benchmark_file_of_any_content_is_read_or_refused(place: Path, rows: list[Any], listed: bool) -> None:
    lines = "\n".join(map(json.dumps, rows))
    (place / "answers.json").write_text(json.dumps(rows) if listed else lines)
    tried("answers to compare with", lambda: wildbench.answers(place / "answers.json"))
    tried("benchmark rows", lambda: wildbench.questions(rows))
    (place / "wildbench").mkdir(exist_ok=True)
    (place / "wildbench" / "test.jsonl").write_text(lines)
    tried("benchmark file", lambda: wildbench.load(place))


# The command line --------------------------------------------------------------------------------------

WORDS = st.one_of(
    st.sampled_from(
        ["status", "report", "verify", "import-config", "prepare", "sweep", "--json", "--only", "--set"]
    ),
    st.sampled_from(
        ["--runs", "--format", "--from", "--out", "--dry-run", "--part", "--max-cells", "--help", "--"]
    ),
    st.sampled_from(["sweep.yaml", ".", "/dev/null", "seed=0", "train.lr=1", "md", "3/2", "-1", "10" * 30]),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
)


@fuzz(20)
@given(st.lists(WORDS, max_size=5))
def test_any_command_line_ends_with_a_code_of_the_contract(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    if words[:1] == ["sweep"]:
        words = [*words, "--dry-run"]
    if words[:1] == ["prepare"]:
        words = [*words, "--plan", "--help"]
    (place / "sweep.yaml").write_text(SWEEP)
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["packcli", *words])
    TRIED["command line"] += 1
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code in (0, None, 2, 3, 4, 6), said.err
    assert "Traceback" not in said.err
    assert "\x1b" not in said.out + said.err
