"""A chat template run on messages that stand for any text.

Jinja costs tens of microseconds a conversation, and what a template writes around the messages is mostly the same
for all conversations with the same roles. So it is run once for a sequence of roles, by Jinja itself, with a
`Content` in the place of each message's text. A `Content` can be written out, joined to other text and stripped of
white space. Whatever else is done to it (a comparison, a length, a search, a cut, a filter) raises `Opaque`: what
comes out may then depend on what the message says. A run without `Opaque` is right for every text.

The one thing assumed is that each text holds more than white space: a `Content` is true, and is not "".
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class Opaque(Exception):
    """The template looks at what a message says."""


class Slot(NamedTuple):
    """Where the text of a message goes (by its place), stripped of white space on its left, its right, or both."""

    message: int
    left: bool = False
    right: bool = False


Part = str | Slot

# A slot in rendered text, between two characters that Unicode sets aside for use inside programs.
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"
_MARK = re.compile(f"{_OPEN}([0-9]+)(l?)(r?){_CLOSE}")
# Answers of Jinja's tests for any string; of the tests not named here the answer depends on the string.
_TESTS = {
    **dict.fromkeys(("string", "defined", "iterable", "sequence"), True),
    **dict.fromkeys(("undefined", "none", "mapping", "number", "integer", "float", "boolean"), False),
    **dict.fromkeys(("callable", "true", "false", "escaped"), False),
}
_JOIN = "packcli_join"


class Content:
    """Text with at least one message in it. Only the operations below are known to be right for any message."""

    __slots__ = ("_parts",)

    def __init__(self, *parts: Part) -> None:
        self._parts = parts

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Content):
            return Content(*self._parts, *other._parts)
        return Content(*self._parts, other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return Content(other, *self._parts) if isinstance(other, str) else NotImplemented

    def strip(self, *chars: Any) -> Content:
        return self.lstrip(*chars).rstrip(*chars)

    def lstrip(self, *chars: Any) -> Content:
        return _opaque() if chars else Content(*_bare(self._parts, 0))

    def rstrip(self, *chars: Any) -> Content:
        return _opaque() if chars else Content(*_bare(self._parts, -1))

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Content) or (isinstance(other, str) and other.strip()):
            _opaque()
        return False

    def __hash__(self) -> int:
        _opaque()

    def __getattr__(self, name: str) -> NoReturn:
        # What no string has, a message's text has not either: templates ask such things before they call it text.
        if hasattr(str, name) and not name.startswith("_"):
            _opaque()
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> NoReturn:
        if isinstance(key, str):
            raise TypeError("string indices must be integers")
        _opaque()

    def __str__(self) -> str:
        _opaque()

    __repr__ = __str__

    def __iter__(self) -> NoReturn:
        _opaque()

    def __contains__(self, _: object) -> NoReturn:
        _opaque()

    def __len__(self) -> NoReturn:
        _opaque()

    def marked(self) -> str:
        """As text, each slot as a mark that `parts` finds again."""
        return "".join(
            part if isinstance(part, str) else f"{_OPEN}{part.message}{'l' * part.left}{'r' * part.right}{_CLOSE}"
            for part in self._parts
        )


def _opaque() -> NoReturn:
    raise Opaque


def _bare(parts: Sequence[Part], end: int) -> list[Part]:
    """Without white space at one end (0 or -1), as `str.lstrip` and `str.rstrip` take it away."""
    kept = list(parts)
    while isinstance(part := kept[end], str):
        if part := part.rstrip() if end else part.lstrip():
            kept[end] = part
            return kept
        del kept[end]
    kept[end] = part._replace(right=True) if end else part._replace(left=True)
    return kept


def parts(text: str) -> tuple[list[str], list[Slot]]:
    """Marked text as the slots in it and what stands before, between and after them (one more than slots)."""
    pieces = _MARK.split(text)
    slots = zip(pieces[1::4], pieces[2::4], pieces[3::4], strict=True)
    return pieces[::4], [Slot(int(message), bool(left), bool(right)) for message, left, right in slots]


def compiled(template: jinja2.Template, source: str) -> jinja2.Template:
    """`template`, whose source is `source`, ready to be given `Content`s; what it renders is marked text.

    Raises:
        Opaque: it uses a construct through which a `Content` could pass unseen.
    """
    theirs = template.environment
    tree = theirs.parse(source)
    if _OPEN in source or tree.find(nodes.EvalContextModifier):
        raise Opaque
    ours: Any = theirs.overlay(finalize=_written)
    ours.filters = {name: _watched(function, name) for name, function in ours.filters.items()} | {_JOIN: _joined}
    ours.tests = {name: _watched(function, name, _TESTS.get(name)) for name, function in ours.tests.items()}
    # An overlay is an object of its own: what is set on it leaves transformers' environment as it was.
    call, getitem = ours.call, ours.getitem
    ours.call = lambda *args, **kwargs: _lifted(call(*args, **kwargs))
    ours.getitem = lambda of, key: _opaque() if isinstance(key, Content) else getitem(of, key)
    return cast(jinja2.Template, ours.from_string(_Rewritten().visit(tree)))


def _written(value: Any) -> Any:
    """A value as it is about to be written out."""
    return value.marked() if isinstance(value, Content) else value


def _joined(values: Sequence[Any]) -> Any:
    """What `~` makes of them."""
    return functools.reduce(lambda left, right: left + right, (_text(value) for value in values))


def _text(value: Any) -> Any:
    return value if isinstance(value, Content) else _lifted(str(value))


def _watched(function: Callable[..., Any], name: str, answer: bool | None = None) -> Callable[..., Any]:
    """A filter or a test that does not see into a `Content`."""

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_lifted(value) for value in args)
        if not any(isinstance(value, Content) for value in (*args, *kwargs.values())):
            return function(*args, **kwargs)
        match args:
            case [Content()] if answer is not None:
                return answer
            case [Content() as text] if name == "trim" and not kwargs:
                return text.strip()
            case [Content() as text] if name == "string":
                return text
        return function(*args, **kwargs) if name in ("default", "d") else _opaque()

    return watched


def _lifted(value: Any) -> Any:
    """What a macro or a `{% set %}` block wrote comes back as text: with marks in it, it is a `Content` again."""
    if not isinstance(value, str) or _OPEN not in value:
        return value
    texts, slots = parts(value)
    found: list[Part] = [texts[0]]
    for slot, after in zip(slots, texts[1:], strict=True):
        found += [slot, after]
    return Content(*found)


class _Rewritten(NodeTransformer):
    """The constructs that turn a value into plain text, by others that keep a `Content` one."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), _JOIN, [], [], None, None)

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> list[nodes.Node]:
        self.generic_visit(node)
        if not isinstance(node.target, nodes.Name):
            raise Opaque
        value = nodes.List([nodes.Name(node.target.name, "load")])
        again = nodes.Filter(value, _JOIN, [], [], None, None)
        return [node, nodes.Assign(nodes.Name(node.target.name, "store"), again)]

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        # `{% generation %}` marks what the assistant writes, and writes it as it is.
        if not isinstance(node.call.node, nodes.ExtensionAttribute):
            raise Opaque
        return nodes.Scope(node.body)
