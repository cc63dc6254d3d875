"""Sources: records that would be lost, read twice or taken from the wrong place without anybody noticing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import chat_records, write_lines
from hypothesis import given
from hypothesis import strategies as st

from packcli.config import SourceSpec
from packcli.data import corpus, formats, sources
from packcli.errors import ConfigError, DataError
from packcli.files import sha256_file


def spec(source: Path | str, **keys: Any) -> SourceSpec:
    return SourceSpec(source=str(source), **keys)


def records_of(*specs: SourceSpec, most: int | None = None, piece_bytes: int = 1 << 20) -> list[sources.Record]:
    return [record for piece in sources.pieces(specs, most, piece_bytes) for record in sources.read(piece)]


def questions(*names: str) -> list[dict[str, str]]:
    return [{"question": name, "answer": "x"} for name in names]


# Pieces ------------------------------------------------------------------------------------------------

_LINES = st.one_of(
    st.builds(lambda n: json.dumps({"n": n}).encode(), st.integers(0, 10**30)),
    st.sampled_from(
        [b"", b" ", b"\t\r", b"{", b'{"a": "\xff"}', b"\x00", b'"\\u2028\xe2\x80\xa8"', b"\xef\xbb\xbf{}"]
    ),
)


@given(
    st.lists(_LINES, max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 80),
    st.none() | st.integers(1, 40),
)
def test_no_record_is_lost_or_doubled_where_a_file_is_cut(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    end: bytes,
    torn: bool,
    bom: bool,
    piece_bytes: int,
    most: int | None,
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    content = b"\xef\xbb\xbf" * bom + end.join(lines) + (b"" if torn else end)
    path.write_bytes(content)

    expected: list[tuple[int, Any]] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                expected.append((number, orjson.loads(line)))
            except orjson.JSONDecodeError:
                expected.append((number, f"{path}:{number}: not valid"))
    found = [
        (number, value.cause.partition(" JSON: ")[0] if isinstance(value, DataError) else value)
        for _, number, value in records_of(spec(path), most=most, piece_bytes=piece_bytes)
    ]
    assert found == expected[:most]


@given(st.binary(max_size=400).map(lambda raw: raw.replace(b"\x00", b"\n")), st.integers(1, 50))
def test_a_cut_is_the_first_line_end_at_or_after_each_multiple(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, piece_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "x.jsonl"
    path.write_bytes(content)
    ends = {content.find(b"\n", at) + 1 for at in range(0, len(content), piece_bytes)} - {0}
    bounds = sorted({0, *ends, len(content)})
    for block in (1, 7, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(formats, "_BLOCK_BYTES", block)
            found = sources.pieces((spec(path),), None, piece_bytes)
        assert [(piece.start, piece.stop) for piece in found] == list(itertools.pairwise(bounds))
        assert [piece.first_number for piece in found] == [
            content[:start].count(b"\n") + 1 for start in bounds[:-1]
        ]


def test_a_multiple_of_the_piece_size_that_no_line_ends_after_makes_no_piece(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 100 + b'"}')
    assert [(piece.start, piece.stop) for piece in sources.pieces((spec(path),), None, 10)] == [(0, 109)]
    path.write_bytes(b"")
    assert sources.pieces((spec(path),), None) == []


def write_columns(path: Path, rows: int, unit: int) -> None:
    table = pa.Table.from_pylist([{"question": f"{n}", "answer": "x" * (n % 7)} for n in range(rows)])
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=unit)
        return
    new = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=unit)


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_rows_are_cut_between_units_and_keep_their_numbers(tmp_path: Path, name: str) -> None:
    write_columns(tmp_path / name, 50, 7)
    whole = records_of(spec(tmp_path / name))
    assert [(record.number, record.value["question"]) for record in whole] == [(n + 1, str(n)) for n in range(50)]
    for piece_bytes, count in ((1, 8), (150, None), (1 << 30, 1)):
        found = sources.pieces((spec(tmp_path / name),), None, piece_bytes)
        assert count in (None, len(found))
        assert [record for piece in found for record in sources.read(piece)] == whole
        for piece in found:
            assert next(sources.read(piece)).number == piece.first_number
    assert records_of(spec(tmp_path / name), most=17, piece_bytes=1) == whole[:17]


def mixture(directory: Path) -> tuple[SourceSpec, ...]:
    """Every kind of source, in an order that is not alphabetical."""
    write_lines(directory / "z" / "2.jsonl", questions("z2"))
    write_lines(directory / "z" / "10.jsonl", questions("z10a", "z10b"))
    (directory / "a.json").write_text(json.dumps(questions("a1", "a2")))
    (directory / "c.csv").write_text("question,answer\nc1,x\nc2,x\n")
    write_columns(directory / "p.parquet", 3, 2)
    return (
        spec(directory / "z"),
        spec("tiny"),
        spec(directory / "a.json"),
        spec(directory / "c.csv"),
        spec(directory / "p.parquet"),
        spec(directory / "a.json"),
    )


def test_a_mixture_is_read_in_the_order_given(tmp_path: Path) -> None:
    given_ = mixture(tmp_path)
    names = sources.names(given_)
    expected = ["10.jsonl", "2.jsonl", "tiny", "a.json", "c.csv", "p.parquet", "a.json"]
    assert [Path(name).name for name in names] == expected
    found = sources.pieces(given_, None, 1)
    assert [piece.file for piece in found] == sorted(piece.file for piece in found)
    assert {(piece.file, piece.name) for piece in found} == set(enumerate(names))
    assert {(piece.source, piece.file) for piece in found} == {(0, 0), (0, 1), *((n, n + 1) for n in range(1, 6))}
    everything = records_of(*given_)
    tiny = list(corpus.conversations("tiny"))
    assert [record.value for record in everything if record.file == 2] == tiny
    asked = [(record.file, record.number, record.value["question"]) for record in everything if record.file != 2]
    assert asked == [
        (0, 1, "z10a"), (0, 2, "z10b"), (1, 1, "z2"), (3, 1, "a1"), (3, 2, "a2"), (4, 1, "c1"), (4, 2, "c2"),
        (5, 1, "0"), (5, 2, "1"), (5, 3, "2"), (6, 1, "a1"), (6, 2, "a2"),
    ]  # fmt: skip


def test_max_documents_takes_the_first_records_over_all_sources_and_reads_no_further(tmp_path: Path) -> None:
    given_ = mixture(tmp_path)
    everything = records_of(*given_)
    for most in (1, 2, 3, 4, 3202, 3203, 3204, 3206, 3207, 3209, 3210, 9999):
        found = sources.pieces(given_, most, 1)
        assert [record for piece in found for record in sources.read(piece)] == everything[:most]
        assert sum(piece.limit or 0 for piece in found) == min(most, len(everything))
    (tmp_path / "broken.parquet").write_bytes(b"not looked at")
    assert records_of(spec(tmp_path / "z"), spec(tmp_path / "broken.parquet"), most=3) == everything[:3]


def test_a_piece_survives_its_way_to_a_worker(tmp_path: Path) -> None:
    for piece in sources.pieces(mixture(tmp_path), 3, 1):
        assert pickle.loads(pickle.dumps(piece)) == piece
        assert sources.Piece(**json.loads(json.dumps(dataclasses.asdict(piece)))) == piece


def test_nothing_depends_on_how_the_system_lists_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/1.jsonl", "b/2.jsonl", "a/1.jsonl", "c.json"):
        write_lines(tmp_path / name, questions(name))
    given_ = (spec(tmp_path), spec(tmp_path / "*" / "*.jsonl"))

    def state() -> Any:
        return (
            sources.names(given_),
            records_of(*given_),
            [sources.fingerprint(one, sha256_file) for one in given_],
        )

    before = state()
    walked, draw = os.walk, random.Random(0)

    def shuffled(*args: Any, **keys: Any) -> Iterator[Any]:
        for here, directories, names in walked(*args, **keys):
            draw.shuffle(directories)
            draw.shuffle(names)
            yield here, directories, names

    globbed = sources.glob.glob
    monkeypatch.setattr(sources.os, "walk", shuffled)
    monkeypatch.setattr(sources.glob, "glob", lambda *args, **keys: globbed(*args, **keys)[::-1])
    assert state() == before


def test_a_fingerprint_is_of_the_records_and_not_of_their_place_or_use(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_lines(tmp_path / name / "a.jsonl", chat_records(2))
        write_lines(tmp_path / name / "b.jsonl", chat_records(1))

    def of(source: Path | str, **keys: Any) -> str:
        return sources.fingerprint(spec(source, **keys), sha256_file)

    assert of(tmp_path / "one") == of(tmp_path / "two") == of(tmp_path / "one", weight=2, mapping={"a": "b"})
    (tmp_path / "two" / "a.jsonl").rename(tmp_path / "two" / "c.jsonl")
    assert of(tmp_path / "one") != of(tmp_path / "two"), "the order of the records changed"
    assert of("tiny") != of("tiny_base")
    assert of("o/n") == of("o/n", streaming=True, weight=3) == of("o/n", revision="main") == "o/n@main:train"
    assert of("tulu", revision="v1", subset="s", split="train[:5]") == "Super-shuhe/packing-tulu@v1:s:train[:5]"


# Bad files ---------------------------------------------------------------------------------------------


def test_case_07_bom_crlf_and_blank_lines_are_no_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n \t\n{"a": 2}\r\n\n')
    assert records_of(spec(path)) == [(0, 1, {"a": 1}), (0, 4, {"a": 2})]
    path.write_bytes(b"\xef\xbb\xbf\n\xef\xbb\xbf")
    (bad,) = records_of(spec(path))
    assert "x.jsonl:2: not valid JSON" in bad.value.cause


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a" 1}', "unexpected character, expected '"),
        (b"[1, 2\x00]", "(column 6)"),
        (b"\x00\x00\x00\x00", "(column 1)"),
        (b'{"a": "\xc3("}', "it is not UTF-8 text; save the file as UTF-8 (column 8)"),
        (b'{"a": "cut he', "(column 14)"),
        (b'{"a": NaN}', "(column 7)"),
        (b'{"a": 1} {"a": 2}', "unexpected content after document (column 10)"),
    ],
)
def test_case_06_a_bad_line_is_a_record_that_says_where_and_why_and_the_rest_is_read(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 3}\n' + line)
    first, bad, third, torn = records_of(spec(path))
    assert (first.value, third.value) == ({"a": 1}, {"a": 3})
    for record, number in ((bad, 3), (torn, 5)):
        assert record.number == number
        assert record.value.cause.startswith(f"{path}:{number}: not valid JSON: ")
        assert reason in record.value.cause
        assert "on_error" in record.value.fix
        assert pickle.loads(pickle.dumps(record.value)).cause == record.value.cause


def test_a_line_over_the_limit_is_refused_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(formats, "_BLOCK_BYTES", 16)
    path = tmp_path / "x.jsonl"
    longest, longer = (b'"' + b"x" * (size - 2) + b'"' for size in (50, 51))
    for tail in (b"", b"\n"):
        path.write_bytes(b"\n".join([b"1", longest, longer, b"4", longer * 9, b"6", longer]) + tail)
        for piece_bytes in (1, 64, 1 << 20):
            found = records_of(spec(path), piece_bytes=piece_bytes)
            assert [record.number for record in found] == [1, 2, 3, 4, 5, 6, 7]
            assert [n for n, record in enumerate(found, 1) if isinstance(record.value, DataError)] == [3, 5, 7]
            assert found[4].value.cause.startswith(f"{path}:5: the line is longer than")
            assert records_of(spec(path), most=6, piece_bytes=piece_bytes)[-1].value == 6


def test_case_15_a_line_of_a_gigabyte_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:  # a hole: takes no space on disk, and reads as NUL bytes
        file.write(b'{"a": 1}\n')
        file.seek(1 << 30)
        file.write(b'\n{"a": 3}\n')
    code = (
        "import resource, sys; from packcli.config import SourceSpec; from packcli.data import sources\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = [r for p in sources.pieces((SourceSpec(source=sys.argv[1]),), None) for r in sources.read(p)]\n"
        "print(found[1].value.cause); assert [r.number for r in found] == [1, 2, 3]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess_run([sys.executable, "-c", code, str(path)])
    cause, grown_kib = done.splitlines()
    assert cause == f"{path}:2: the line is longer than 64 MiB"
    assert int(grown_kib) < 300 << 10


def subprocess_run(command: list[str], **env: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (b'[\n{"a": 1},\n{"a" 2}]', ":3: not valid JSON: unexpected character"),
        (
            b'[\n{"a": 1},\n{"a": "\xff"}]',
            ":3: not valid JSON: it is not UTF-8 text; save the file as UTF-8 (column 8)",
        ),
        (b'[\n{"a": 1},\n{"a": 2}\n', ":3: not valid JSON: unexpected end of data (column 9)"),
        (b'{\n "data": [\n{"a": 2}\n]}', ": holds a dict, not a list of records"),
        (b"", ":1: not valid JSON"),
    ],
)
def test_a_json_file_is_refused_as_a_whole(tmp_path: Path, content: bytes, place: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        records_of(spec(tmp_path / "x.json"))
    assert caught.value.cause.startswith(f"{tmp_path}/x.json{place}")


def test_a_json_file_with_an_object_a_line_is_cut_like_any_json_lines(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n{"a": 2}\n')
    assert {piece.kind for piece in sources.pieces((spec(tmp_path / "x.json"),), None, 1)} == {"jsonl"}
    assert records_of(spec(tmp_path / "x.json"), piece_bytes=1) == [(0, 2, {"a": 1}), (0, 3, {"a": 2})]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.zst", "x.parquet.gz"])
def test_case_15_a_compressed_file_is_refused_and_not_passed_over(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / "fine.jsonl", questions("a"))
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for source in (tmp_path / name, tmp_path, tmp_path / "x*"):
        with pytest.raises(ConfigError, match="is compressed") as caught:
            sources.files(spec(source))
        assert "decompress" in caught.value.fix


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    write_lines(tmp_path / "x.jsonl", questions("a"))
    write_lines(tmp_path / ".cache" / "y.jsonl", questions("b"))
    write_lines(tmp_path / ".x.jsonl", questions("c"))
    assert sources.files(spec(tmp_path)) == (tmp_path / "x.jsonl",)


def test_a_directory_is_read_through_its_links_and_each_file_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "elsewhere" / "deep" / "b.jsonl", questions("b"))
    write_lines(tmp_path / "chats" / "a.jsonl", questions("a"))
    (tmp_path / "chats" / "part2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "chats" / "round").symlink_to(tmp_path / "chats")
    (tmp_path / "elsewhere" / "deep" / "back").symlink_to(tmp_path / "elsewhere")
    found = sources.files(spec(tmp_path / "chats"))
    assert found == (tmp_path / "chats" / "a.jsonl", tmp_path / "chats" / "part2" / "deep" / "b.jsonl")
    (tmp_path / "chats" / "lost.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match=r"lost.jsonl` is missing"):
        sources.files(spec(tmp_path / "chats"))


def test_a_directory_that_may_not_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "a.jsonl", questions("a"))
    write_lines(tmp_path / "part2" / "b.jsonl", questions("b"))
    scan = os.scandir

    def refused(path: Any) -> Any:  # whoever runs the tests may be allowed everything
        if Path(path).name == "part2":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ConfigError, match="part2` may not be read: Permission denied"):
        sources.files(spec(tmp_path))


@pytest.mark.parametrize("keys", [{"subset": "s"}, {"revision": "r"}, {"streaming": True}, {"split": "test"}])
def test_a_key_for_the_hub_on_local_data_is_refused_and_not_ignored(tmp_path: Path, keys: dict[str, Any]) -> None:
    write_lines(tmp_path / "x.jsonl", questions("a"))
    for source in (tmp_path, tmp_path / "x.jsonl", tmp_path / "*.jsonl", "tiny"):
        with pytest.raises(ConfigError, match=f"`{next(iter(keys))}` is for Hugging Face") as caught:
            sources.pieces((spec(source, **keys),), None)
        assert str(source) in caught.value.cause


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
@pytest.mark.parametrize("damage", ["middle", "end", "whole", "empty"])
def test_a_damaged_table_is_bad_data_and_not_a_bug(tmp_path: Path, name: str, damage: str) -> None:
    write_columns(tmp_path / name, 999, 100)
    content = bytearray((tmp_path / name).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xff" * 200
    short = {"middle": len(content), "end": len(content) * 2 // 3, "whole": 0, "empty": 0}[damage]
    (tmp_path / name).write_bytes(
        bytes(content[:short]) + b"neither of the two, but long enough" * (damage == "whole")
    )
    for most in (None, 900):
        with pytest.raises(DataError, match=r"not a readable (parquet|arrow) file: \w") as caught:
            records_of(spec(tmp_path / name), most=most)
        assert str(tmp_path / name) in caught.value.cause
        assert "\n" not in caught.value.cause


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.date32()], ids=str)
def test_a_date_that_python_has_not_is_bad_data_and_not_a_bug(tmp_path: Path, name: str, kind: Any) -> None:
    whole = pa.int32() if kind == pa.date32() else pa.int64()
    last = pa.array([(1 << (whole.bit_width - 1)) - 1], whole).view(kind)
    table = pa.table({"question": ["a"], "answer": ["b"], "seen": last})
    path = tmp_path / name
    if name == "x.parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=r"not a readable (parquet|arrow) file: \w") as caught:
        records_of(spec(path))
    assert str(path) in caught.value.cause


# What `datasets` saved ---------------------------------------------------------------------------------


def test_a_saved_dataset_is_read_without_the_caches_beside_it(tmp_path: Path) -> None:
    rows = chat_records(9)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "d", num_shards=3)
    loaded = datasets.load_from_disk(tmp_path / "d")
    loaded.map(lambda row: {"extra": 1}, cache_file_name=str(tmp_path / "d" / "cache-1.arrow"))
    assert [record.value for record in records_of(spec(tmp_path / "d"))] == rows
    assert [record.file for record in records_of(spec(tmp_path / "d"))] == [0] * 3 + [1] * 3 + [2] * 3


def test_the_split_of_a_saved_dataset_dict_is_the_one_named(tmp_path: Path) -> None:
    parts = {"train": chat_records(4), "test": chat_records(2, first=50)}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in parts.items()})
    whole.save_to_disk(tmp_path / "d")
    for name, rows in parts.items():
        assert [record.value for record in records_of(spec(tmp_path / "d", split=name))] == rows
    fingerprints = {sources.fingerprint(spec(tmp_path / "d", split=name), sha256_file) for name in parts}
    assert len(fingerprints) == 2
    with pytest.raises(ConfigError, match="no split `dev`; it has: train, test"):
        sources.files(spec(tmp_path / "d", split="dev"))
    (tmp_path / "d" / "test" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(ConfigError, match="is missing"):
        sources.files(spec(tmp_path / "d", split="test"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("state.json", content) for content in ("{}", "[]", "3", '{"_data_files": [{}]}')),
        ("state.json", '{"_data_files": [{"filename": "../../x.arrow"}]}'),
        ("state.json", '{"_data_files": [{"filename": "/x.arrow"}]}'),
        ("state.json", '{"_data_files": [{"filename": 3}]}'),
        *(("dataset_dict.json", content) for content in ("{}", "[]", '{"splits": 3}', '{"splits": [3]}')),
    ],
)
def test_what_stands_beside_a_saved_dataset_is_checked_and_leads_nowhere_else(
    tmp_path: Path, file: str, content: str
) -> None:
    write_columns(tmp_path / "x.arrow", 3, 3)
    saved = tmp_path / "a" / "b"
    saved.mkdir(parents=True)
    (saved / "dataset_info.json").write_text("{}")
    (saved / file).write_text(content)
    with pytest.raises(DataError, match=f"{file}: not what `datasets` writes there"):
        sources.files(spec(saved))
