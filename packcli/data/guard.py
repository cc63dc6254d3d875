"""Documents in which a message spells a control token: what it spells is text, what the template wrote a token."""

from __future__ import annotations

import json
import re
from typing import Any

from packcli.data.render import BREAK, Rendered
from packcli.errors import DataError

Offsets = list[tuple[int, int]]


class Guard:
    """A copy of a tokenizer in which every control token has another spelling, one that no text can hold.

    What the template wrote is respelled before encoding; what a message wrote stays, and names no token any more.
    This holds for every kind of tokenizer, since flags, ids and all ordinary text are left as they are.
    """

    def __init__(self, backend: Any, control: set[str]) -> None:
        from tokenizers import Tokenizer

        added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        # Messages hold no BREAK of their own, so none can hold one of these.
        self._names = {text: f"{BREAK}{n}{BREAK}" for n, text in enumerate(sorted(control & added.keys()))}
        self._tokenizer = Tokenizer.from_str(_renamed(backend, self._names))
        self._original = {
            self._tokenizer.token_to_id(self._names.get(text, text)): backend.token_to_id(text) for text in added
        }
        self._control = {self._tokenizer.token_to_id(name) for name in self._names.values()}
        # The longest first, as `tokenizers` matches.
        spellings = (
            rf"(?<!\w){re.escape(text)}(?!\w)" if added[text].single_word else re.escape(text)
            for text in sorted(self._names, key=len, reverse=True)
        )
        self._pattern = re.compile("|".join([*spellings, BREAK]))

    def encode(self, document: Rendered) -> tuple[list[int], Offsets, Rendered]:
        """ids; the character offsets of each; the text that these count in, with its spans.

        Raises:
            DataError: the tokenizer does not keep a respelled control token in one piece.
        """
        respelled, count = self._respelled(document)
        encoding = self._tokenizer.encode(respelled.text, add_special_tokens=False)
        if sum(id_ in self._control for id_ in encoding.ids) != count:
            raise DataError(
                "a message spells a control token, which this tokenizer cannot tell from the template's own",
                "take those spellings out of the data, or use another tokenizer",
            )
        return [self._original.get(id_, id_) for id_ in encoding.ids], encoding.offsets, respelled

    def _respelled(self, document: Rendered) -> tuple[Rendered, int]:
        """The document as the copy reads it, and how many control tokens it holds."""
        parts, moved = [], []  # moved: (end of a replaced piece, by how much what follows it shifts)
        last = shift = count = 0
        for match in self._pattern.finditer(document.text):
            name = self._names.get(match[0], "")
            parts += [document.text[last : match.start()], name]
            last, shift, count = match.end(), shift + len(name) - len(match[0]), count + bool(name)
            moved.append((last, shift))
        text = "".join([*parts, document.text[last:]])

        def place(position: int) -> int:
            return position + next((by for end, by in reversed(moved) if end <= position), 0)

        return Rendered(text, [(place(start), place(stop)) for start, stop in document.spans]), count


def _renamed(backend: Any, names: dict[str, str]) -> str:
    """tokenizer.json with control tokens under other names, in the model too: a Unigram finds its own there."""
    spec = json.loads(backend.to_str())
    spec.update(truncation=None, padding=None, post_processor=None)
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): id_ for text, id_ in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not {*pair, "".join(pair)} & names.keys()]
    return json.dumps(spec)
