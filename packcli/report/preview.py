"""What `packcli prepare --show N` prints: documents token by token, and the rows that hold them.

With colours, supervised tokens are green, others dim, control tokens magenta or, where supervised, on green;
every second token is underlined. Without (a pipe, `NO_COLOR`), supervised text stands in ⟦ ⟧ and tokens are parted
by ¦. Characters that would drive the terminal are shown escaped, as are those three marks where data holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from packcli.config import LayoutSpec
from packcli.data import framed
from packcli.data.framed import Reader
from packcli.data.index import Index
from packcli.log import plain
from packcli.packing import Rows

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    from packcli.data.tokens import Tokens

_DOCUMENT = (160, 80)  # tokens shown of a long document: from its head, from its tail
_PIECE = (24, 16)  # and of a document in a row; a tail holds a unit of `_WINDOW` tokens
_PIECES = 12  # documents shown of a row; of a fuller one, those asked for and their neighbours
_ROWS = 8  # rows shown of an arm
_WINDOW = 16
"""Tokens that may share one character: 4 spell one, and where one ends another may begin."""
_OPEN, _CLOSE, _BETWEEN = "⟦", "⟧", "¦"
_ESCAPED = {ord(mark): f"\\u{ord(mark):04x}" for mark in (_OPEN, _CLOSE, _BETWEEN)}


@dataclass(frozen=True, slots=True)
class Unit:
    """Tokens [start, stop) of a document that spell whole characters together: mostly one token."""

    start: int
    stop: int
    text: str
    control: bool = False


@dataclass(frozen=True, slots=True)
class _Both:
    """A text in two forms: for a terminal with colours, and for any other place. `indent` in columns."""

    coloured: Text
    marked: Text
    indent: int = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        text = self.coloured if console.color_system and not console.no_color else self.marked
        width = max(1, options.max_width - self.indent)
        for line in console.render_lines(text, options.update_width(width), pad=False):
            yield Segment(" " * self.indent)
            yield from line
            yield Segment.line()


def show(
    tokens: Tokens,
    indexes: Mapping[str, tuple[LayoutSpec, Index]],
    tokenizer: Any,
    count: int,
    max_length: int,
) -> Group:
    """The first `count` documents that lie in a row of any of `indexes` (arm -> its rows, of the first epoch).

    Args:
        tokens: the store that the indexes are of.
        indexes: the arm's name -> how it makes rows, and its index.
        tokenizer: of `transformers`; what the store's documents were tokenized by.
        count: how many documents, 1 or more.
        max_length: slots of a row that is padded to its full length.
    """
    from rich.console import Group

    speller = Speller(tokenizer)
    firsts = {name: (layout, index.epoch(0)) for name, (layout, index) in indexes.items()}
    found = [index.rows.document for _, index in firsts.values()] or [np.arange(len(tokens.lengths))]
    held = np.unique(np.concatenate(found))[:count]
    parts: list[RenderableType] = [_legend()]
    for document in held.tolist():
        parts += _document(tokens, document, speller)
    for name, (layout, index) in firsts.items():
        framing = framed.marks(layout.boundary, lambda: tokenizer)
        parts += _arm(name, layout, index, held, framed.reader(tokens, framing), speller, max_length)
    return Group(*parts)


class Speller:
    """Reads tokens as text, as many at a time as whole characters need."""

    def __init__(self, tokenizer: Any) -> None:
        added = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._control = frozenset(added | set(tokenizer.all_special_ids))
        self._tokenizer = tokenizer

    def units(self, ids: NDArray[np.int32], start: int, stop: int) -> list[Unit]:
        """Tokens [start, stop) of a document; a character of which they hold a part only is named, not shown."""
        first = max(0, start - _WINDOW)
        read = self._read(ids[first : stop + _WINDOW].tolist())
        moved = [Unit(unit.start + first, unit.stop + first, unit.text, unit.control) for unit in read]
        return [
            unit
            if start <= unit.start and unit.stop <= stop
            else Unit(max(unit.start, start), min(unit.stop, stop), "[part of a character]")
            for unit in moved
            if unit.start < stop and unit.stop > start
        ]

    def _read(self, ids: list[int]) -> Iterator[Unit]:
        # A token is read together with what came just before: some tokenizers drop a text's leading space.
        context = begin = 0
        for place, id_ in enumerate(ids):
            if id_ in self._control:
                if begin < place:
                    yield self._unit(ids, context, begin, place)
                yield Unit(place, place + 1, self._tokenizer.convert_ids_to_tokens(id_), control=True)
                context = begin = place + 1
                continue
            unit = self._unit(ids, context, begin, place + 1)
            # Half a character reads as U+FFFD. So does one that the data itself holds: then the next token joins.
            if (unit.text and not unit.text.endswith("\ufffd")) or unit.stop - unit.start == _WINDOW:
                yield unit
                context, begin = begin, place + 1
        if begin < len(ids):
            yield self._unit(ids, context, begin, len(ids))

    def _unit(self, ids: list[int], context: int, begin: int, end: int) -> Unit:
        before = self._decode(ids[context:begin]) if context < begin else ""
        return Unit(begin, end, self._decode(ids[context:end])[len(before) :])

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _legend() -> _Both:
    from rich.text import Text

    coloured = Text("tokens: ")
    for words, style in (
        ("supervised", "green"),
        ("read only", "dim"),
        ("control", _style(control=True, supervised=False)),
        ("control, supervised", _style(control=True, supervised=True)),
    ):
        coloured.append(words, style).append("  ")
    coloured.append("every ").append("second", "underline").append(" one underlined")
    marked = Text(f"tokens are parted by {_BETWEEN}; {_OPEN}supervised ones stand in brackets{_CLOSE}")
    return _Both(coloured, marked)


def _document(tokens: Tokens, document: int, speller: Speller) -> list[RenderableType]:
    ids, spans = tokens.ids(document), tokens.supervised(document)
    supervised = int((spans[:, 1] - spans[:, 0]).sum())
    about = f"{plain(tokens.origin(document))}  {len(ids):,} tokens, {supervised:,} supervised"
    return [_heading(f"document {document}", about), _body(tokens, document, (0, len(ids)), _DOCUMENT, speller)]


def _arm(
    name: str,
    layout: LayoutSpec,
    index: Index,
    held: NDArray[np.int64],
    tokens: Reader,
    speller: Speller,
    max_length: int,
) -> list[RenderableType]:
    """The rows of one arm that hold any of the documents."""
    from rich.text import Text

    rows = index.rows
    pieces = np.flatnonzero(np.isin(rows.document, held))
    holding = np.unique(np.searchsorted(rows.offsets, pieces, side="right") - 1)
    parts: list[RenderableType] = []
    for row in holding[:_ROWS].tolist():
        filled = int(index.filled[row])
        padding = {"none": 0, "max_length": max_length - filled, "longest": None}[layout.pad_to]
        parts.append(_heading(f"{plain(name)}, row {row}", _row_words(index, row, padding)))
        parts += _row(rows, row, held, tokens, speller)
        if padding is None:
            parts.append(_note("[padding up to the longest row of its micro-batch]"))
        elif padding:
            parts.append(_note(f"[padding {padding:,} {'slot' if padding == 1 else 'slots'}]"))
    if (more := len(holding) - _ROWS) > 0:
        parts.append(_note(f"[{more:,} more rows of {plain(name)} hold the rest of these documents]"))
    for document in np.setdiff1d(held, rows.document).tolist():
        parts += [Text(), _note(f"{plain(name)}: document {document} is in no row (dropped, lost or held out)")]
    return parts


def _row_words(index: Index, row: int, padding: int | None) -> str:
    rows, kept, boundary = index.rows, int(index.tokens[row]), int(index.boundary[row])
    documents = len(np.unique(rows.document[rows.offsets[row] : rows.offsets[row + 1]]))
    words = f"{documents:,} {'document' if documents == 1 else 'documents'}, {kept:,} kept tokens"
    if boundary:
        words += f", {boundary:,} between documents"
    if padding is None:
        return words
    return f"{words}, {padding:,} padding, efficiency {kept / (kept + boundary + padding):.1%}"


def _row(
    rows: Rows, row: int, held: NDArray[np.int64], tokens: Reader, speller: Speller
) -> Iterator[RenderableType]:
    """The pieces of a row, each under a line that says which document begins."""
    pieces = np.arange(rows.offsets[row], rows.offsets[row + 1])
    asked = np.isin(rows.document[pieces], held)
    shown = _shown(asked)
    sizes, left_out = rows.stop[pieces] - rows.start[pieces], 0
    for place, piece in enumerate(pieces.tolist()):
        if not shown[place]:
            left_out += 1
            if place + 1 == len(pieces) or shown[place + 1]:
                omitted = int(sizes[place + 1 - left_out : place + 1].sum())
                yield _note(f"[{left_out:,} more pieces of documents, {omitted:,} tokens]")
                left_out = 0
            continue
        document, span = int(rows.document[piece]), (int(rows.start[piece]), int(rows.stop[piece]))
        length = len(tokens.ids(document))
        part = "" if span == (0, length) else f", tokens {span[0]:,} to {span[1]:,} of {length:,}"
        yield _note(f"── document {document}{part} ──", "bold cyan" if asked[place] else "cyan")
        yield _body(tokens, document, span, _PIECE, speller)


def _shown(asked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which pieces of a row are shown: all, or of a full row those asked for, their neighbours and both ends."""
    if len(asked) <= _PIECES:
        return np.ones(len(asked), bool)
    shown = asked.copy()
    shown[1:] |= asked[:-1]
    shown[:-1] |= asked[1:]
    shown[[0, -1]] = True
    return shown


def _body(
    tokens: Reader, document: int, span: tuple[int, int], limits: tuple[int, int], speller: Speller
) -> _Both:
    """Tokens [start, stop) of a document, in both forms; only head and tail where that is much shorter."""
    from rich.text import Text

    ids, (start, stop), (head, tail) = tokens.ids(document), span, limits
    supervised = np.zeros(len(ids), bool)
    for first, last in tokens.supervised(document):
        supervised[first:last] = True
    coloured, marked = Text(overflow="fold"), Text(overflow="fold")
    if stop - start <= head + tail + _WINDOW:
        _spell(coloured, marked, speller.units(ids, start, stop), supervised)
    else:
        above = [unit for unit in speller.units(ids, start, start + head + _WINDOW) if unit.stop <= start + head]
        below = [unit for unit in speller.units(ids, stop - tail - _WINDOW, stop) if unit.start >= stop - tail]
        out = supervised[above[-1].stop : below[0].start]
        left_out = f" ... [{len(out):,} tokens left out, {int(out.sum()):,} supervised] ... "
        _spell(coloured, marked, above, supervised)
        coloured.append(left_out, "bold")
        marked.append(left_out)
        _spell(coloured, marked, below, supervised)
    for text in (coloured, marked):
        if text.plain.endswith("\n"):
            text.right_crop(1)
    return _Both(coloured, marked, indent=2)


def _spell(coloured: Text, marked: Text, units: Sequence[Unit], supervised: NDArray[np.bool_]) -> None:
    """Append units to both forms. A line of the data ends a line here too, after its escaped form."""
    inside = False
    for number, unit in enumerate(units):
        now = bool(supervised[unit.start])
        words, end = plain(unit.text), "\n" if "\n" in unit.text else ""
        style = _style(control=unit.control, supervised=now)
        coloured.append(words, f"{style} underline" if number % 2 else style).append(end)
        if now != inside:
            marked.append(_OPEN if now else _CLOSE)
        elif number:
            marked.append(_BETWEEN)
        marked.append(words.translate(_ESCAPED) + end)
        inside = now
    if inside:
        marked.append(_CLOSE)


def _style(*, control: bool, supervised: bool) -> str:
    if control:
        return "black on green" if supervised else "magenta"
    return "green" if supervised else "dim"


def _heading(name: str, about: str) -> Text:
    from rich.text import Text

    return Text.assemble("\n", (name, "bold"), f"  {about}")


def _note(words: str, style: str = "dim") -> Text:
    from rich.text import Text

    return Text(f"  {words}", style)
