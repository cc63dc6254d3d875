"""The picture of layouts: what a reader would believe if it showed other rows than those trained on."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from packcli.config import ARMS, LENGTHS_ALONE, ArmSpec
from packcli.data import draw, sample
from packcli.packing import Rows

SVG = "{http://www.w3.org/2000/svg}"
MAX_LENGTH = 100
LENGTHS = (12, 55, 30, 8, 250, 71, 44, 19, 96, 63, 27, 5)
ALL_ARMS = {name: ArmSpec(**ARMS[name]) for name in LENGTHS_ALONE}
HOSTILE = "<script>&\"'\x1b[31m\n]]>\ud800\ufffe"


def a_document(length: int, turns: int = 2) -> sample.Document:
    """`turns` turns of equal length, the second half of each supervised."""
    ends = np.linspace(0, length, 2 * turns + 1).astype(int).tolist()
    return sample.Document(length, tuple((a, b) for a, b in zip(ends[1::2], ends[2::2], strict=True) if a < b))


DOCUMENTS = [a_document(length) for length in LENGTHS]
PANELS = sample.panels(DOCUMENTS, ALL_ARMS, MAX_LENGTH, micro_batch=4)


def drawn(documents: list[sample.Document], panels: list[sample.Panel], **options: str) -> ET.Element:
    return ET.fromstring(draw.picture(documents, panels, MAX_LENGTH, options.get("title", "a title")))


def cards(root: ET.Element) -> list[ET.Element]:
    return [group for group in root.iter(f"{SVG}g") if group.find(f"{SVG}rect[@class='card']") is not None]


def words_of(element: ET.Element) -> list[str]:
    return [text.text or "" for text in element.iter(f"{SVG}text")]


def bars(card: ET.Element) -> list[tuple[float, int, int, int, float, float]]:
    """(y, document, start, stop, x, width) of each piece drawn in a panel, from its tooltip and its bar."""
    found = []
    for group in card.iter(f"{SVG}g"):
        title, bar = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        if title is not None and bar is not None:
            match = re.match(r"document (\d+), tokens ([\d,]+) to ([\d,]+) of", title.text or "")
            assert match, title.text
            number, start, stop = (int(part.replace(",", "")) for part in match.groups())
            x, y, width = (float(bar.attrib[key]) for key in ("x", "y", "width"))
            found.append((y, number - 1, start, stop, x, width))
    return found


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_no_piece_of_a_row_is_missing_doubled_or_out_of_scale(panel: sample.Panel) -> None:
    (card,) = cards(drawn(DOCUMENTS, [panel]))
    pixels = draw._FULL / MAX_LENGTH
    rows = panel.rows
    expected = []
    for row in range(rows.num_rows):
        slot = 0
        for piece in range(rows.offsets[row], rows.offsets[row + 1]):
            number, start, stop = int(rows.document[piece]), int(rows.start[piece]), int(rows.stop[piece])
            x, width = draw._GUTTER + slot * pixels, (stop - start) * pixels
            expected.append((row * draw._PITCH, number, start, stop, x, width))
            slot += stop - start
    assert len(bars(card)) == len(expected)
    for found, wanted in zip(bars(card), expected, strict=True):
        assert found == pytest.approx(wanted, abs=0.011)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel.name)
def test_padding_drawn_is_the_padding_computed(panel: sample.Panel) -> None:
    (card,) = cards(drawn(DOCUMENTS, [panel]))
    told = [rect.find(f"{SVG}title") for rect in card.iter(f"{SVG}rect") if rect.attrib["class"] == "padding"]
    padding = [int(re.sub(r"\D", "", title.text or "")) for title in told if title is not None]
    gaps = np.array(panel.slots, np.int64) - panel.rows.tokens()
    assert padding == gaps[gaps > 0].tolist()


@pytest.mark.parametrize("name", ALL_ARMS)
def test_kept_and_lost_tokens_are_all_tokens(name: str) -> None:
    panel = PANELS[list(ALL_ARMS).index(name)]
    found = sample.counts(DOCUMENTS, panel)
    assert found.kept + found.tokens_lost == sum(LENGTHS)
    (card,) = cards(drawn(DOCUMENTS, [panel]))
    told = [int(re.sub(r"\D", "", words.split(":")[1].split(" of ")[0])) for words in words_of(card)
            if re.match(r"\d+: (all|[\d,]+ of) ", words)]  # fmt: skip
    assert sum(told) == found.tokens_lost


def test_the_arms_show_what_tells_them_apart() -> None:
    found = {panel.name: sample.counts(DOCUMENTS, panel) for panel in PANELS}
    assert found["padding_free"].kept == found["padding_free"].slots
    assert found["padding"].rows == len(LENGTHS)
    assert found["random"].tokens_lost == 0 < found["random"].cut
    assert found["best_fit"].cut == 0
    assert found["random_released"].tokens_lost > 0
    assert found["greedy_released"].tokens_lost >= 250 - MAX_LENGTH
    assert found["sorted"].slots < found["padding_released"].slots < found["padding"].slots


def test_supervised_parts_have_the_place_they_have_in_the_document() -> None:
    rows = Rows(np.array([0, 0]), np.array([0, 50]), np.array([50, 90]), np.array([0, 1, 2]))
    document = sample.Document(90, ((10, 20), (40, 60)))
    panel = sample.Panel("one", ALL_ARMS["random"], rows, (100, 100))
    (card,) = cards(drawn([document], [panel]))
    pieces = [
        g
        for g in card.iter(f"{SVG}g")
        if (t := g.find(f"{SVG}title")) is not None and "document" in (t.text or "")
    ]
    paths = [
        path.attrib["d"] for piece in pieces for path in piece.iter(f"{SVG}path") if path.attrib["class"] == "s0"
    ]
    pixels, blocks = draw._FULL / MAX_LENGTH, re.compile(r"M([\d.]+) [\d.]+h([\d.]+)")
    found = [tuple(float(part) for part in match) for path in paths for match in blocks.findall(path)]
    wanted = [(10, 10), (40, 10), (0, 10)]
    for got, (at, wide) in zip(found, wanted, strict=True):
        assert got == pytest.approx((draw._GUTTER + at * pixels, wide * pixels), abs=0.011)
    said = [piece.findtext(f"{SVG}title") or "" for piece in pieces]
    assert [words.split(", ")[-1] for words in said] == ["20 supervised", "10 supervised"]


def test_causal_attention_is_drawn_across_documents_and_document_attention_is_not() -> None:
    rows = Rows(np.array([0, 1]), np.array([0, 0]), np.array([12, 55]), np.array([0, 2]))
    for attention, crossing in (("causal", 1), ("document", 0)):
        positions = {"causal": "continue", "document": "reset"}[attention]
        arm = ALL_ARMS["best_fit"].model_copy(update={"attention": attention, "positions": positions})
        (card,) = cards(drawn(DOCUMENTS, [sample.Panel("a", arm, rows, (100,))]))
        kinds = [path.attrib["class"] for path in card.iter(f"{SVG}path")]
        assert kinds.count("cross") == crossing
        triangles = [
            p for p in card.iter(f"{SVG}path") if re.fullmatch(r"M[\d.]+ [\d.]+V[\d.]+H[\d.]+z", p.attrib["d"])
        ]
        assert len([p for p in triangles if p.attrib["class"].startswith("s")]) == 2


def test_names_from_a_sweep_file_cannot_become_markup() -> None:
    documents = [replace(document, origin=HOSTILE) for document in DOCUMENTS]
    panels = [replace(PANELS[0], name=HOSTILE)]
    text = draw.picture(documents, panels, MAX_LENGTH, HOSTILE, HOSTILE)
    root = ET.fromstring(text.encode())
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "desc", "style", "defs", "pattern", "path", "rect", "g", "text"}  # fmt: skip
    shown = "<script>&\"'\\x1b[31m\\n]]>\\ud800\\ufffe"
    assert words_of(root)[0] == shown
    assert shown in words_of(root)


def test_equal_input_gives_equal_bytes_and_a_file_that_stands_alone() -> None:
    once, again = (
        draw.picture(DOCUMENTS, sample.panels(DOCUMENTS, ALL_ARMS, MAX_LENGTH, 4), MAX_LENGTH, "t")
        for _ in range(2)
    )
    assert once == again
    assert len(once.encode()) < 100_000
    assert not re.search(r"<script|href|@import|https?://(?!www\.w3\.org/2000/svg\")", once)
    root = ET.fromstring(once)
    assert root.attrib["role"] == "img"
    described = root.find(f"{SVG}desc")
    assert described is not None
    assert all(f"{name}: " in (described.text or "") for name in ALL_ARMS)
    assert "prefers-color-scheme:dark" in once


def test_conversations_of_many_turns_do_not_make_a_huge_file() -> None:
    documents = [a_document(4000, turns=500) for _ in range(12)]
    panels = sample.panels(documents, ALL_ARMS, 8192, 4)
    text = draw.picture(documents, panels, 8192, "t")
    assert len(text.encode()) < 120_000
    assert "drawn as one" in text
    assert "2,000 supervised" in text  # the count stays exact


def test_documents_without_a_label_are_shown_as_lost_not_as_an_error() -> None:
    documents = [sample.Document(10, ()), sample.Document(20, ())]
    (panel,) = sample.panels(documents, {"padding": ALL_ARMS["padding"]}, MAX_LENGTH, 4)
    assert sample.counts(documents, panel).lost == ((0, 0, 10), (1, 0, 20))
    assert "0 rows · efficiency none · 0 documents cut over rows · 30 tokens lost" in words_of(
        drawn(documents, [panel])
    )


@given(
    lengths=st.lists(st.integers(1, 5000), max_size=200),
    count=st.integers(1, 20),
    max_length=st.integers(2, 8192),
)
def test_no_document_is_chosen_twice(lengths: list[int], count: int, max_length: int) -> None:
    chosen = sample.choose(np.array(lengths, np.int64), max_length, count)
    assert len(set(chosen)) == len(chosen) == min(count, len(lengths))
    assert chosen == sorted(chosen)
    assert all(0 <= number < len(lengths) for number in chosen)
