"""A few documents as each arm lays them out (`sample.py`), as one SVG picture. Pure: the text of the file.

Above are the documents and a legend; then one panel per arm: its rows to scale, each document in its colour with
its number, what is supervised, cut, padded and lost, and who attends to whom.

The picture stands alone: no script, no font or image from elsewhere, words for readers who do not see it, and
colours for light and for dark. Equal input gives equal bytes. Sizes are in pixels at its natural size; y grows
downwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from packcli.config import ArmSpec
from packcli.data import index, svg
from packcli.data.sample import Counts, Document, Panel, Span, counts

_MARGIN = 24  # around the picture and between its two columns
_COLUMN = 580
_INSET = 16  # inside the frame of a panel
_WIDTH = 2 * _COLUMN + 3 * _MARGIN
_GUTTER = 30  # batch marks and row numbers, before the rows
_FULL = 384  # a row of max_length slots
_PITCH = 17  # from row to row
_MASK = 84
_MASK_LEFT = 456
_MAX_LOST = 400
_MAX_SPANS = 240  # of all documents together; each is drawn once per panel


@dataclass(frozen=True, slots=True)
class _Canvas:
    """What every mark needs: the documents, the spans drawn as supervised, and pixels per token."""

    documents: Sequence[Document]
    spans: Sequence[tuple[Span, ...]]
    scale: float


def picture(
    documents: Sequence[Document], panels: Sequence[Panel], max_length: int, title: str, note: str = ""
) -> str:
    """The SVG as text. `title`, `note` and names may hold anything; they are escaped."""
    spans, gap = _drawable([document.supervised for document in documents])
    canvas = _Canvas(documents, spans, _FULL / max_length)
    about = f"Rows hold at most {max_length:,} tokens; all bars have one scale. {note}".strip()
    head, y = _head(canvas, title, about, gap)
    cards, height = _cards(canvas, panels, y)
    said = [f"{len(documents)} documents. {about}"]
    said += [f"{drawn.name}: {_caption(counts(documents, drawn))}." for drawn in panels]
    size = f'width="{_WIDTH}" height="{svg.px(height)}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {_WIDTH} {svg.px(height)}" role="img" '
        'aria-labelledby="packcli-title packcli-desc">',
        f'<title id="packcli-title">{svg.safe(title)}</title>',
        f'<desc id="packcli-desc">{svg.safe(" ".join(said))}</desc>',
        f"<style>{svg.STYLE}</style>",
        svg.HATCH,
        f'<rect class="page" {size}/>',
        *head,
        *cards,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _drawable(spans: Sequence[tuple[Span, ...]]) -> tuple[Sequence[tuple[Span, ...]], int]:
    """Few enough spans to keep the file small: those at most `gap` tokens apart become one; and `gap`."""
    gap = 0
    while sum(map(len, spans)) > max(_MAX_SPANS, len(spans)):
        gap = max(1, 2 * gap)
        spans = [_joined(own, gap) for own in spans]
    return spans, gap


def _joined(spans: Iterable[Span], gap: int) -> tuple[Span, ...]:
    joined: list[Span] = []
    for start, stop in spans:
        if joined and start - joined[-1][1] <= gap:
            start = joined.pop()[0]
        joined.append((start, stop))
    return tuple(joined)


def _head(canvas: _Canvas, title: str, about: str, gap: int) -> tuple[list[str], float]:
    """Title, every document at full length, and the legend; and where the panels begin."""
    width, chips = _WIDTH - 2 * _MARGIN, []
    for number, document in enumerate(canvas.documents):
        shown = min(document.length, int((width - 80) / canvas.scale))
        torn = ("", "tooth" if shown < document.length else "")
        bar = _piece(canvas, number, (0, shown), (0.0, 0.0), torn)
        chips.append(svg.chip(bar, shown * canvas.scale, f"{document.length:,}", "small muted"))
    bars, below = svg.flow(chips, width, 22)
    legend, end = svg.flow(_legend(gap), width, 22)
    y = _MARGIN + 20
    parts = [
        svg.text(_MARGIN, y, title, "title"),
        svg.text(_MARGIN, y + 22, about, "small muted"),
        svg.text(_MARGIN, y + 50, "The documents and their tokens", "small"),
        svg.at(_MARGIN, y + 60, bars),
        svg.at(_MARGIN, y + 68 + below, legend),
    ]
    return parts, y + 80 + below + end


def _legend(gap: int) -> list[tuple[float, str]]:
    box = f'width="26" height="{svg.BAR}"'
    apart = f" (parts up to {gap:,} tokens apart drawn as one)" if gap else ""
    bar, triangle = f'<rect class="doc p0" {box}/>', "M0 0V13H13z"
    return [
        svg.chip(bar, 26, "read, not trained on"),
        svg.chip(f'<rect class="s0" {box}/>', 26, f"supervised: trained on{apart}"),
        svg.chip(f'<rect class="padding" {box}/>', 26, "padding"),
        svg.chip(bar + svg.teeth(26, 0, -1, "tooth"), 26, "cut, goes on in another row"),
        svg.chip(bar + svg.teeth(26, 0, -1, "tear"), 26, "cut off, the rest is lost"),
        svg.chip(f'<rect class="lost" {box}/>', 26, "lost: in no row"),
        svg.chip('<path class="mark" d="M5 0H1V13H5"/>', 5, "one micro-batch"),
        svg.chip(f'<path class="s0" d="{triangle}"/>', 13, "attention in a document"),
        svg.chip(f'<path class="cross" d="{triangle}"/>', 13, "attention across documents"),
    ]


def _cards(canvas: _Canvas, panels: Sequence[Panel], top: float) -> tuple[list[str], float]:
    """The panels, and where they end: one document a row beside several, or else two columns of like height."""
    alone = [drawn.arm.one_document_per_row for drawn in panels]
    sides, tops, cards = any(alone) and not all(alone), [top, top], []
    for drawn, left in zip(panels, alone, strict=True):
        column = int(not left) if sides else int(tops[1] < tops[0])
        card, height = _card(canvas, drawn)
        cards.append(svg.at(_MARGIN + column * (_COLUMN + _MARGIN), tops[column], card))
        tops[column] += height + 16
    return cards, max(tops) - 16 + _MARGIN


def _card(canvas: _Canvas, panel: Panel) -> tuple[str, float]:
    """One panel and its height."""
    found, y = counts(canvas.documents, panel), 58.0
    frame = [
        svg.text(_INSET, 26, panel.name, "name"),
        svg.text(_INSET, 44, _description(panel.arm), "small muted"),
    ]
    rows = [_row(canvas, panel, row) for row in range(found.rows)]
    parts = [*frame, svg.at(_INSET, y, "\n".join([*rows, *_batches(panel)]))]
    if found.rows:
        parts.append(svg.at(_MASK_LEFT, y, _mask(panel)))
        y += max(found.rows * _PITCH, _MASK + 34)
    if found.lost:
        lost, height = svg.flow(_lost(canvas, found), _COLUMN - 2 * _INSET, 20)
        parts.append(svg.at(_INSET, y + 6, lost))
        y += 6 + height
    parts.append(svg.text(_INSET, y + 18, _caption(found), "small"))
    box = f'<rect class="card" width="{_COLUMN}" height="{svg.px(y + 32)}" rx="8"/>'
    return "\n".join([box, *parts]), y + 32


def _row(canvas: _Canvas, panel: Panel, row: int) -> str:
    rows, y, slot = panel.rows, float(row * _PITCH), 0
    begins = set(zip(rows.document.tolist(), rows.start.tolist(), strict=True))
    ends = set(zip(rows.document.tolist(), rows.stop.tolist(), strict=True))
    parts = [svg.text(_GUTTER - 6, y + 10, str(row + 1), "small muted end")]
    for piece in range(int(rows.offsets[row]), int(rows.offsets[row + 1])):
        number, start, stop = int(rows.document[piece]), int(rows.start[piece]), int(rows.stop[piece])
        left = "" if start == 0 else "tooth" if (number, start) in ends else "tear"
        whole = stop == canvas.documents[number].length
        right = "" if whole else "tooth" if (number, stop) in begins else "tear"
        parts.append(_piece(canvas, number, (start, stop), (_GUTTER + slot * canvas.scale, y), (left, right)))
        slot += stop - start
    if padding := panel.slots[row] - slot:
        x, width = svg.px(_GUTTER + slot * canvas.scale), svg.px(padding * canvas.scale)
        box = f'<rect class="padding" x="{x}" y="{svg.px(y)}" width="{width}" height="{svg.BAR}">'
        parts.append(f"{box}<title>padding: {padding:,} slots</title></rect>")
    return "".join(parts)


def _piece(canvas: _Canvas, number: int, span: Span, where: tuple[float, float], torn: tuple[str, str]) -> str:
    """Tokens [start, stop) of a document: a pale bar, its supervised parts in full colour, its number.

    `torn`: how its left and its right edge look: "" whole, "tooth" cut, "tear" cut from what is lost.
    """
    (start, stop), (x, y), document = span, where, canvas.documents[number]
    colour, width = number % svg.COLOURS, (stop - start) * canvas.scale
    supervised = sum(b - a for a, b in _within(document.supervised, span))
    words = (
        f"document {number + 1}, tokens {start:,} to {stop:,} of {document.length:,}, {supervised:,} supervised"
    )
    words += f", {document.origin}" if document.origin else ""
    box = f'x="{svg.px(x)}" y="{svg.px(y)}" width="{svg.px(width)}" height="{svg.BAR}"'
    parts = [f'<g><title>{svg.safe(words)}</title><rect class="doc p{colour}" {box}/>']
    blocks = [
        svg.block(x + (a - start) * canvas.scale, y + 0.5, (b - a) * canvas.scale)
        for a, b in _within(canvas.spans[number], span)
    ]
    parts += [f'<path class="s{colour}" d="{"".join(blocks)}"/>'] if blocks else []
    parts += [svg.teeth(x, y, 1, torn[0])] if torn[0] else []
    parts += [svg.teeth(x + width, y, -1, torn[1])] if torn[1] else []
    if width >= 7 * len(str(number + 1)) + 4:
        parts.append(svg.text(x + (5 if torn[0] else 3), y + 10, str(number + 1), "number"))
    return "".join([*parts, "</g>"])


def _within(spans: Iterable[Span], span: Span) -> list[Span]:
    return [(max(a, span[0]), min(b, span[1])) for a, b in spans if a < span[1] and b > span[0]]


def _batches(panel: Panel) -> list[str]:
    """A bracket beside the rows of each micro-batch."""
    size, rows = panel.batch or 1, panel.rows.num_rows if panel.batch else 0
    return [
        f'<path class="mark" d="M5 {first * _PITCH}H1V{(min(first + size, rows) - 1) * _PITCH + svg.BAR}H5"/>'
        for first in range(0, rows, size)
    ]


def _mask(panel: Panel) -> str:
    """Who attends to whom in one row: a token (down) to those before it (across)."""
    rows, row = panel.rows, _typical(panel)
    own = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
    opens = index.opens(rows)[own]
    document = rows.document[own][opens]
    ends = np.cumsum(rows.stop[own] - rows.start[own])[np.append(opens[1:], True)] * (_MASK / panel.slots[row])
    crossing = panel.arm.attention == "causal"
    last = svg.px(ends[-1])
    parts = []
    if ends[-1] < _MASK:
        parts.append(f'<path class="padding" d="M{last} 0H{_MASK}V{_MASK}H0V{last}H{last}z"/>')
    if crossing:
        parts.append(f'<path class="cross" d="M0 0V{last}H{last}z"/>')
    for number, begin, end in zip(document, map(svg.px, [0, *ends[:-1]]), map(svg.px, ends), strict=True):
        parts.append(f'<path class="s{number % svg.COLOURS}" d="M{begin} {begin}V{end}H{end}z"/>')
    parts.append(f'<rect class="frame" width="{_MASK}" height="{_MASK}"/>')
    parts.append(svg.text(0, _MASK + 14, f"row {row + 1}: attention", "small muted"))
    parts.append(svg.text(0, _MASK + 28, f"{'across' if crossing else 'within'} documents", "small muted"))
    return "".join(parts)


def _typical(panel: Panel) -> int:
    """The row whose attention is drawn: of those with the most documents, one of middling length."""
    documents = index.per_row(index.opens(panel.rows).astype(np.int64), panel.rows)
    most = np.flatnonzero(documents == documents.max())
    by_length = most[np.argsort(panel.rows.tokens()[most], kind="stable")]
    return int(by_length[len(by_length) // 2])


def _lost(canvas: _Canvas, found: Counts) -> list[tuple[float, str]]:
    """What lies in no row, in outline, to scale up to a limit."""
    chips = [svg.chip("", -6, "lost:")]
    for number, start, stop in found.lost:
        length, bar = canvas.documents[number].length, (stop - start) * canvas.scale
        words = f"{number + 1}: {'all' if stop - start == length else f'{stop - start:,} of'} {length:,}"
        box = f'<rect class="lost" y="0.5" width="{svg.px(min(bar, _MAX_LOST))}" height="{svg.BAR - 1}"/>'
        more = svg.teeth(_MAX_LOST, 0, -1, "tear") if bar > _MAX_LOST else ""
        chips.append(svg.chip(box + more, min(bar, _MAX_LOST), words))
    return chips


def _caption(found: Counts) -> str:
    efficiency = f"{found.kept / found.slots:.1%}" if found.slots else "none"
    parts = [_many(found.rows, "row"), f"efficiency {efficiency}", f"{_many(found.cut, 'document')} cut over rows"]
    return " · ".join([*parts, f"{_many(found.tokens_lost, 'token')} lost"])


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _description(arm: ArmSpec) -> str:
    """How the arm makes rows, in a line."""
    said = []
    match arm.layout, arm.pad_to:
        case "padding_free", _:
            said.append("one document a row, laid end to end without padding")
        case "pad", "max_length":
            said.append("one document a row, padded to the full length")
        case "pad", _:
            said.append("one document a row, padded to the longest of its micro-batch")
    match arm.packer:
        case "concat":
            said.append("documents end to end, cut at row ends")
        case "next_fit_decreasing":
            said.append("longest first; the one that does not fit opens the next row")
        case "first_fit_decreasing":
            said.append("longest first, into the first row with room")
        case "shuffled_first_fit":
            said.append("in random order, into the first row with room")
        case "best_fit":
            said.append("whole documents in as few rows as we know how")
    said += ["rows of like length together"] if arm.order == "sorted" else []
    said += ["the turn that does not fit is cut"] if arm.truncation == "per_turn" else []
    said += ["over-long ones left out"] if arm.overlong == "drop" else []
    said += ["over-long ones mostly lost"] if arm.overlong == "lost" else []
    said += ["a row that is not full is dropped"] if arm.remainder == "drop" else []
    return "; ".join(said)
