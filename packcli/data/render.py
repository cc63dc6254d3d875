"""Conversations as text by a chat template, with what is trained on of it.

The text is what transformers' `apply_chat_template` writes, at a small part of its cost: `symbolic` runs the
template once for each sequence of roles, and a conversation is then constants joined with its messages. What keeps
that honest: a template that looks at what messages say is always run by Jinja, and the first conversations of
every sequence of roles, and every thousandth after, go both ways.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.meta

from packcli.data import symbolic
from packcli.data.chat import Messages, Rejected
from packcli.deadline import within
from packcli.errors import ConfigError, DataError, PackcliError

TrainOn = Literal["assistant", "last_assistant", "all"]

BREAK = "\ufdd0"
"""A character that no text holds: Unicode sets it aside for use inside programs (a "noncharacter")."""

FIXED_DATE = datetime(2024, 7, 26)
"""What `strftime_now` tells a template. A document must not depend on the day it was made; this is the date that
Llama 3's templates write where they have no clock."""

# Conversations that go both ways: the first ones of each sequence of roles, and later one in so many.
_FIRST, _EVERY = 16, 1000
# Conversations, from the first, that transformers renders too.
_BY_TRANSFORMERS = 16
# Beyond these, another sequence of roles is left to Jinja, and the texts of beginnings are made anew.
_MOST_PROGRAMS, _MOST_TEXTS, _MOST_CHARACTERS = 4096, 4096, 16 << 20
# Messages: a longer conversation is left to Jinja, as it alone would fill `_texts`.
_LONGEST = 1000
# Spellings of control tokens: <|...|> with either bar, <s>, </s>, <bos>, <start_of_turn> and their like.
_CONTROL = re.compile(r"<([|｜])[^|｜<>\s]+\1>|</?s>|<(?:bos|eos|pad|unk)>|<(?:start|end)_of_[a-z_]+>")
MOST_S = 30.0
"""For one conversation: a template is a program, and may never end."""
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text.

    text      the whole document, every control token of the template in it.
    spans     [start, stop) characters of `text` that are trained on; each ends with the text that closes the turn.
    guarded   a message held the spelling of a control token. In `text` each such spelling has a `BREAK` after its
              first character, so that only what the template itself wrote still reads as a control token.
    """

    text: str
    spans: list[tuple[int, int]]
    guarded: bool = False


class NotTransparent(Exception):
    """The fast way wrote something else than the template: redo what this renderer made, with `fast=False`."""


class Renderer:
    """A tokenizer's chat template, and what is trained on.

    train_on   assistant: every assistant turn. last_assistant: the conversation's last one. all: the whole text.
    fast       False: every conversation by Jinja. Turns False by itself where the two ways differ.
    """

    def __init__(self, tokenizer: Any, train_on: TrainOn = "assistant", *, fast: bool = True) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.fast = fast
        source = tokenizer.get_chat_template()
        self._template = _compiled(source)
        self._globals = None if self._template is None else self._template.globals
        self._variables = {
            **tokenizer.special_tokens_map,
            "tools": None,
            "documents": None,
            "strftime_now": FIXED_DATE.strftime,
        }
        self._openings, self._first, self._reserved = _spellings(special_tokens(tokenizer))
        self._symbolic = _symbolic(self._template, source) if fast else None
        self._programs: dict[tuple[str, ...], _Program | None] = {}
        self._texts: dict[tuple[tuple[str, ...], bool], str] = {}
        self._held = 0  # characters of `_texts`
        self._count = 0
        self._prompt: str | None = None

    def render(self, messages: Messages) -> Rendered:
        """The conversation as text, and what of it is trained on.

        An assistant turn's text is what the template adds when the turn is appended after its generation
        prompt, the closing text included. A template for which the earlier text is no prefix of the later
        cannot be supervised that way.

        Raises:
            Rejected: the template refuses these messages (order of roles, for example), or one holds `BREAK`.
            DataError: the template has not the prefix property.
            NotTransparent: the fast way is not exact for this template.
        """
        self._count += 1
        roles = tuple([message["role"] for message in messages])
        contents = [message["content"] for message in messages]
        guarded = self._guard(contents)
        # An empty text, or nothing but white space, is more than `symbolic` promises to get right.
        fast = self.fast and len(roles) <= _LONGEST and all(map(str.strip, contents))
        program = self._programs.get(roles) if fast else None
        if program is not None and program.filled >= _FIRST and self._count % _EVERY:
            text, spans = program.fill(contents)
            program.filled += 1
        else:
            with within(MOST_S, _endless(len(roles))):
                text, spans = self._carefully(roles, contents, fast)
        if not text or text.isspace():
            raise Rejected("the chat template writes nothing for it")
        return Rendered(text, spans, guarded)

    def _carefully(
        self, roles: tuple[str, ...], contents: list[str], fast: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """By Jinja, or the fast way and then compared."""
        messages = _messages(roles, contents)
        program = self._program(roles) if fast else None
        if program is None:
            return self._by_jinja(messages)
        text, spans = program.fill(contents)
        program.filled += 1
        if program.filled <= _FIRST or self._count % _EVERY == 0:
            self._compare(text, spans if program.filled == 1 else None, messages)
        return text, spans

    def _guard(self, contents: list[str]) -> bool:
        """Put a `BREAK` into every control token that a message spells, in place; whether there was one."""
        guarded = False
        for number, content in enumerate(contents):
            for character in self._reserved:
                if character in content:
                    raise Rejected(f"holds the reserved character U+{ord(character):04X}")
            for opening in self._openings:
                if opening in content:
                    contents[number], found = self._first.subn(_broken, content)
                    guarded |= found > 0
                    break
        return guarded

    def _program(self, roles: tuple[str, ...]) -> _Program | None:
        """How to write a conversation with these roles; None: only Jinja knows."""
        if roles not in self._programs:
            if self._symbolic is None or len(self._programs) == _MOST_PROGRAMS:
                return None
            try:
                text = self._marked(roles, False)
                spans = self._supervised(roles, text, lambda number, prompt: self._marked(roles[:number], prompt))
            except NotTransparent:
                raise
            except Exception:
                # `Opaque`, or the template fails on these roles or on what only stands for text, or no prefix is
                # one for every text. Jinja says which, or that this conversation is not concerned.
                self._programs[roles] = None
            else:
                self._programs[roles] = _Program.of(text, spans, len(roles))
        return self._programs[roles]

    def _marked(self, roles: tuple[str, ...], prompt: bool) -> str:
        """What the template writes for any messages with these roles, with marks for them (see `symbolic`)."""
        key = (roles, prompt)
        if key not in self._texts:
            assert self._symbolic is not None
            contents = [symbolic.Content(symbolic.Slot(number)) for number in range(len(roles))]
            messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
            given = {**self._variables, "messages": messages, "add_generation_prompt": prompt}
            text = self._symbolic.render(given)
            self._held += len(text)
            if len(self._texts) == _MOST_TEXTS or self._held > _MOST_CHARACTERS:
                self._texts.clear()
                self._held = len(text)
            self._texts[key] = text
        return self._texts[key]

    def _supervised(
        self, roles: Sequence[str], text: str, beginning: Callable[[int, bool], str]
    ) -> list[tuple[int, int]]:
        """What of `text` is trained on. `beginning(n, prompt)`: the first n messages as the template has them."""
        if self.train_on == "all":
            return [(0, len(text))]
        turns = [number for number, role in enumerate(roles) if role == "assistant"]
        spans = []
        for number in turns[-1:] if self.train_on == "last_assistant" else turns:
            after = beginning(number + 1, False) if number + 1 < len(roles) else text
            before = beginning(number, True) if number else self._before_first(after)
            if not (after.startswith(before) and text.startswith(after)):
                also = ", or `data.train_on` to last_assistant" if self.train_on == "assistant" else ""
                raise DataError(
                    "the chat template changes earlier turns when one is added: assistant spans are unknown",
                    f"set `data.template`, for example to chatml{also}",
                )
            spans.append((len(before), len(after)))
        return spans

    def _before_first(self, after: str) -> str:
        """What stands before an answer that nothing precedes, up to and with the template's generation prompt.

        Most templates cannot render no messages at all; the prompt is what one adds behind a question.
        """
        if self._prompt is None:
            question = [{"role": "user", "content": "."}]
            try:
                without, prompted = self._apply(question), self._apply(question, True)
            except Rejected:
                without = prompted = ""
            self._prompt = prompted.removeprefix(without) if prompted.startswith(without) else ""
        found = after.find(self._prompt) if self._prompt else -1
        return after[: found + len(self._prompt)] if found >= 0 else ""

    def _by_jinja(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        text = self._apply(messages)
        roles = [message["role"] for message in messages]
        return text, self._supervised(roles, text, lambda number, prompt: self._apply(messages[:number], prompt))

    def _compare(self, text: str, spans: list[tuple[int, int]] | None, messages: Messages) -> None:
        """Raise `NotTransparent` if Jinja makes another text of `messages`, or other spans if there are some."""
        try:
            same = self._apply(messages) == text if spans is None else self._by_jinja(messages) == (text, spans)
        except Rejected:
            same = False
        if not same:
            self.fast = False
            raise NotTransparent

    def _apply(self, messages: Messages, prompt: bool = False) -> str:
        try:
            if self._template is None:
                return self._theirs(messages, prompt)
            given = {**self._variables, "messages": messages, "add_generation_prompt": prompt}
            text = str(self._template.render(given))
            if self._count > _BY_TRANSFORMERS or text == self._theirs(messages, prompt):
                return text
        except Exception as error:  # what a program of somebody else's raises is no closed set
            raise Rejected(f"the chat template refuses it: {str(error)[:_SHOWN]}") from None
        self._template = None
        if self.fast:
            self.fast = False
            raise NotTransparent
        return self._theirs(messages, prompt)

    def _theirs(self, messages: Messages, prompt: bool) -> str:
        """By transformers' own function, several times the cost of the rendering itself.

        It hands plain data to a template and no functions, so the fixed date goes through the template's globals.
        """
        if self._globals is not None:
            self._globals["strftime_now"] = FIXED_DATE.strftime
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
        finally:
            if self._globals is not None:
                del self._globals["strftime_now"]


@dataclass(slots=True)
class _Program:
    """All conversations with the same roles.

    texts    what the template writes before, between and after the messages' texts, with room for those
    rooms    (message, how its text is stripped) for each; None: every message once, in order, as it is
    spans    start and stop of what is trained on, each as characters of `texts` and rooms before it
    filled   conversations made of it
    """

    texts: list[str]
    rooms: list[tuple[int, Callable[[str], str]]] | None
    spans: list[tuple[int, int, int, int]]
    filled: int = 0

    @classmethod
    def of(cls, marked: str, spans: list[tuple[int, int]], messages: int) -> _Program:
        def place(position: int) -> tuple[int, int]:
            texts, slots = symbolic.parts(marked[:position])
            return sum(map(len, texts)), len(slots)

        constants, slots = symbolic.parts(marked)
        texts = [""] * (2 * len(slots) + 1)
        texts[::2] = constants
        as_they_are = slots == [symbolic.Slot(number) for number in range(messages)]
        rooms = None if as_they_are else [(slot.message, _strip(slot)) for slot in slots]
        return cls(texts, rooms, [(*place(start), *place(stop)) for start, stop in spans])

    def fill(self, contents: list[str]) -> tuple[str, list[tuple[int, int]]]:
        said = contents if self.rooms is None else [strip(contents[message]) for message, strip in self.rooms]
        texts = self.texts.copy()
        texts[1::2] = said
        ends = [0, *accumulate(map(len, said))]
        return "".join(texts), [(a + ends[i], b + ends[j]) for a, i, b, j in self.spans]


def _broken(first: re.Match[str]) -> str:
    # A function, as `re` looks a replacement text up under the pattern, and hashing a long one costs 20 us.
    return first[0] + BREAK


def _strip(slot: symbolic.Slot) -> Callable[[str], str]:
    match slot.left, slot.right:
        case True, True:
            return str.strip
        case True, False:
            return str.lstrip
        case False, True:
            return str.rstrip
    return str


def _messages(roles: Sequence[str], contents: Sequence[str]) -> Messages:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _compiled(source: str) -> Any:
    """The template as transformers compiles it: its sandbox, filters and tags. None: it no longer shows how."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:
        return None
    hint = "mend it, or set `data.template`, for example to chatml"
    try:
        with within(MOST_S, _endless()):  # Jinja computes constants: `9**9**9` takes minutes
            return _compile_jinja_template(source)
    except PackcliError:
        raise
    except Exception as error:  # Python's own refusals, too: blocks nested too deeply, numbers of 5,000 digits
        raise ConfigError(f"the chat template is not valid Jinja: {str(error)[:_SHOWN]}", hint) from None


def _endless(messages: int | None = None) -> ConfigError:
    long = "" if messages is None else f" of {messages:,} messages"
    cause = f"the chat template takes more than {MOST_S:g} s for one conversation{long}"
    return ConfigError(cause, "mend it, or set `data.template`, for example to chatml")


def _symbolic(template: Any, source: str) -> jinja2.Template | None:
    try:
        return None if template is None else symbolic.compiled(template, source)
    except symbolic.Opaque:
        return None


def special_tokens(tokenizer: Any) -> set[str]:
    """The spellings of a tokenizer's control tokens; other added tokens are ordinary vocabulary."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def _spellings(tokens: set[str]) -> tuple[list[str], re.Pattern[str], list[str]]:
    """How to find `tokens` in a text: (openings, pattern, reserved).

    The openings are the tokens' first characters: a text without them, and most have none, is done in no time. The
    pattern matches the first character of each token, of overlapping ones too. A token of one character cannot be
    broken: like `BREAK`, no text may hold it.
    """
    groups = [(first, list(group)) for first, group in groupby(sorted(tokens), key=lambda token: token[0])]
    firsts = [
        f"{re.escape(first)}(?={'|'.join(re.escape(token[1:]) for token in group)})" for first, group in groups
    ]
    reserved = [BREAK, *(token for token in tokens if len(token) == 1)]
    return [first for first, _ in groups], re.compile("|".join(firsts) or "(?!)"), reserved


def template_text(template: str) -> str:
    """A chat template by packaged name (chatml, llama3, llama3_bare, plain) or by path to a Jinja file.

    `llama3` is what the released code of "Packing Analysis" (arXiv 2410.08081) writes: unlike Meta's own template,
    it has a system message for conversations without one, and strips no white space.
    """
    packaged = resources.files("packcli.data") / "templates" / f"{template}.jinja"
    if "/" not in template and packaged.is_file():
        return packaged.read_text()
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        hint = "`data.template` is chatml, llama3, llama3_bare, plain, or a path to a Jinja file"
        raise ConfigError(f"no chat template `{template}`", hint) from None


def control_tokens(template: str) -> list[str]:
    """The control tokens that a template (its text) spells, in order; those that it puts together come last.

    Looked for in its constants and in what it writes, for such as '<|' + message.role + '|>'.
    """
    found = dict.fromkeys(match[0] for text in _writings(template) for match in _CONTROL.finditer(text))
    return sorted(found, key=lambda token: template.find(token) % (len(template) + 1))


def _writings(source: str) -> Iterator[str]:
    template = _compiled(source)
    if template is None:
        yield source
        return
    for node in template.environment.parse(source).find_all((jinja2.nodes.TemplateData, jinja2.nodes.Const)):
        yield str(node.data if isinstance(node, jinja2.nodes.TemplateData) else node.value)
    for roles in (["user", "assistant"], ["system", "user", "assistant"]):
        given = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            "strftime_now": FIXED_DATE.strftime,
        }
        try:
            with within(MOST_S, _endless()):
                text = template.render(messages=_messages(roles, roles), **given)
        except PackcliError:
            raise
        except Exception:  # it refuses such a conversation
            continue
        yield text


def missing_tokens(template: str, tokenizer: Any) -> list[str]:
    """The control tokens of a template (its text) that a tokenizer has not: it would take them for words.

    `eos_token` stands for itself where the template closes turns with it and the tokenizer names none.
    """
    known = special_tokens(tokenizer) | set(tokenizer.get_added_vocab())
    missing = [token for token in control_tokens(template) if token not in known]
    compiled = _compiled(template)
    if compiled is not None and tokenizer.eos_token is None:
        used = jinja2.meta.find_undeclared_variables(compiled.environment.parse(template))
        missing += ["eos_token"] if "eos_token" in used else []
    return missing
