"""The preview: what a user would believe of the data if it showed other text than what is trained on."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from rich.console import Console
from rich.segment import Segment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from packcli.config import ARMS, ArmSpec, LayoutSpec
from packcli.data import index
from packcli.packing import Rows
from packcli.report import preview

ALL_ARMS = {name: ArmSpec(**fields) for name, fields in ARMS.items()}
TEXTS = (
    ("Was ist das? 🙂🙃", 'Ein Gruß,\nmit "Zitat" und 漢字.\x1b[2J'),
    ("Say ⟦this⟧ ¦ [red]that[/red]", "\ufffd broken \u202e"),
    ("Short.", "Yes. " * 400),
    ("One", "two"),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows no emoji: each takes four tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["Was ist das und mit Yes. Yes. Yes. "] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>", additional_special_tokens=special[1:]
    )


@dataclass
class FakeTokens:
    """The reading side of a token store, in memory."""

    documents: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def ids(self, document: int) -> np.ndarray:
        return self.documents[document][0]

    def supervised(self, document: int) -> np.ndarray:
        return self.documents[document][1]

    def origin(self, document: int) -> str:
        return f"chats\x07.jsonl:{document}"

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids, _ in self.documents], np.int64)


@pytest.fixture(scope="module")
def tokens(tokenizer: PreTrainedTokenizerFast) -> FakeTokens:
    made = []
    for question, answer in TEXTS:
        before = tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
        after = tokenizer.encode(f"{answer}<|im_end|>")
        ids = np.array([*before, *after, *tokenizer.encode("\n")], np.int32)
        made.append((ids, np.array([[len(before), len(before) + len(after)]], np.int32)))
    return FakeTokens(made)


def indexed(tokens: FakeTokens, rows: Rows) -> index.Index:
    starts = np.array([index.per_row((rows.start == 0).astype(np.int64), rows)]).reshape(-1)
    return index.Index(rows, rows.tokens(), 0 * starts, starts, starts, np.array([0, rows.num_rows]))


def alone(tokens: FakeTokens) -> index.Index:
    every = np.arange(len(tokens.documents))
    return indexed(tokens, Rows(every, np.zeros_like(every), tokens.lengths, np.arange(len(every) + 1)))


Shown = Callable[..., str]


@pytest.fixture
def shown(tokens: FakeTokens, tokenizer: PreTrainedTokenizerFast) -> Shown:
    def render(
        count: int, found: index.Index, layout: LayoutSpec, max_length: int = 4096, colour: bool = False
    ) -> str:
        out = io.StringIO()
        console = Console(
            file=out, width=20_000, force_terminal=colour, color_system="truecolor" if colour else None
        )
        console.print(preview.show(tokens, {"an_arm": (layout, found)}, tokenizer, count, max_length))  # type: ignore[arg-type]
        return out.getvalue()

    return render


def unescaped(text: str) -> str:
    """What a body spelled: our line breaks and marks out, escapes back."""
    text = text.replace("\n", "").replace("¦", "").replace("⟦", "").replace("⟧", "")
    return re.sub(
        r"\\(n|x[0-9a-f]{2}|u[0-9a-f]{4})", lambda m: f"\\{m[1]}".encode().decode("unicode_escape"), text
    )


def body(output: str, document: int) -> str:
    """The first body after a document's heading, without its indent and the filling of lines."""
    after = output.split(f"document {document}  chats", 1)[1].split("\n", 1)[1]
    return "\n".join(line[2:].rstrip(" ") for line in re.split(r"\n *\n", after, maxsplit=1)[0].split("\n"))


@pytest.mark.parametrize("document", [0, 1, 3])
def test_what_stands_between_the_brackets_is_what_is_supervised(
    shown: Shown, tokens: FakeTokens, tokenizer: PreTrainedTokenizerFast, document: int
) -> None:
    text = body(shown(4, alone(tokens), ALL_ARMS["padding"].rows), document)
    assert unescaped("".join(re.findall("⟦(.*?)⟧", text, re.DOTALL))) == TEXTS[document][1] + "<|im_end|>"
    whole = tokenizer.decode(tokens.ids(document), clean_up_tokenization_spaces=False)
    assert unescaped(text) == whole


def test_colour_says_the_same_as_the_brackets(tokens: FakeTokens, tokenizer: PreTrainedTokenizerFast) -> None:
    console = Console(file=io.StringIO(), width=20_000, force_terminal=True, color_system="truecolor")
    group = preview.show(tokens, {"a": (ALL_ARMS["padding"].rows, alone(tokens))}, tokenizer, 1, 4096)  # type: ignore[arg-type]
    segments = [segment for part in group.renderables[2:3] for segment in console.render(part)]

    def spelled(wanted: str) -> str:
        return "".join(s.text for s in segments if s.style and wanted in str(s.style))

    assert unescaped(spelled("green")) == TEXTS[0][1] + "<|im_end|>"
    assert "<|im_start|>" in spelled("magenta")
    assert "Was" in spelled("dim")
    styles = [str(s.style) for s in segments if isinstance(s, Segment) and s.style and s.text.strip()]
    assert any("underline" in style for style in styles)
    assert not all("underline" in style for style in styles)


@pytest.mark.parametrize("colour", [False, True])
def test_data_cannot_drive_the_terminal(shown: Shown, tokens: FakeTokens, colour: bool) -> None:
    output = shown(4, alone(tokens), ALL_ARMS["padding"].rows, colour=colour)
    ours = re.sub(r"\x1b\[[\d;]*m", "", output)
    assert all(char == "\n" or char.isprintable() for char in ours)
    assert "\\x1b[2J" in ours.replace("¦", "")
    assert "\\u202e" in ours.replace("¦", "")
    assert "[red]that[/red]" in ours.replace("¦", "")  # data is no markup
    assert colour or "\x1b" not in output


def test_no_half_characters_are_shown(shown: Shown, tokens: FakeTokens) -> None:
    text = body(shown(1, alone(tokens), ALL_ARMS["padding"].rows), 0)
    assert "🙂" in text
    assert "漢" in text
    assert "\ufffd" not in text


def test_a_character_cut_by_a_row_end_is_named(
    shown: Shown, tokens: FakeTokens, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokens.ids(0)
    before = len(tokenizer.encode("<|im_start|>user\nWas ist das? "))
    length = len(ids)
    rows = Rows(np.array([0, 0]), np.array([0, before + 2]), np.array([before + 2, length]), np.array([0, 1, 2]))
    output = shown(1, indexed(tokens, rows), ALL_ARMS["random"].rows, 200)
    assert output.count("[part of a character]") == 2
    assert "\ufffd" not in output
    assert f"tokens 0 to {before + 2} of {length}" in output


def test_left_out_tokens_are_counted(shown: Shown, tokens: FakeTokens) -> None:
    output = shown(4, alone(tokens), ALL_ARMS["padding_free"].rows)
    text = body(output, 2)
    ((left_out, supervised),) = re.findall(r"\[([\d,]+) tokens left out, ([\d,]+) supervised\]", text)
    assert int(left_out.replace(",", "")) == len(tokens.ids(2)) - sum(preview._DOCUMENT)
    assert supervised == left_out  # the answer is the long part
    kept = re.sub(r" \.\.\. \[.*?\] \.\.\. ", "", text, flags=re.DOTALL)
    assert kept.count("⟦") == kept.count("⟧") == 2
    start, stop = tokens.supervised(2)[0]
    assert f"{len(tokens.ids(2)):,} tokens, {stop - start:,} supervised" in output


def test_rows_say_documents_tokens_padding_and_efficiency(shown: Shown, tokens: FakeTokens) -> None:
    lengths = tokens.lengths
    rows = Rows(np.array([3, 0, 1]), np.zeros(3, np.int64), lengths[[3, 0, 1]], np.array([0, 1, 3]))
    max_length = int(lengths[0] + lengths[1] + 7)
    output = shown(1, indexed(tokens, rows), ALL_ARMS["best_fit"].rows, max_length)
    kept = lengths[0] + lengths[1]
    assert (
        f"an_arm, row 1  2 documents, {kept:,} kept tokens, 7 padding, efficiency {kept / max_length:.1%}"
        in output
    )
    assert "[padding 7 slots]" in output
    assert output.index("── document 0 ──") < output.index("── document 1 ──")
    assert "row 0" not in output  # it holds no document asked for
    longest = shown(1, indexed(tokens, rows), ALL_ARMS["sorted"].rows, max_length)
    assert "[padding up to the longest row of its micro-batch]" in longest


def test_a_document_that_an_arm_loses_is_not_passed_over(
    tokens: FakeTokens, tokenizer: PreTrainedTokenizerFast
) -> None:
    lengths, none = tokens.lengths, np.zeros(1, np.int64)
    first = indexed(tokens, Rows(none, none, lengths[:1], np.array([0, 1])))
    last = indexed(tokens, Rows(none + 3, none, lengths[3:], np.array([0, 1])))
    both = {"first": (ALL_ARMS["padding"].rows, first), "last": (ALL_ARMS["padding"].rows, last)}
    out = io.StringIO()
    Console(file=out, width=500).print(preview.show(tokens, both, tokenizer, 2, 200))  # type: ignore[arg-type]
    assert "first: document 3 is in no row" in out.getvalue()
    assert "last: document 0 is in no row" in out.getvalue()


def test_a_row_of_many_documents_is_shown_in_part_and_counted(
    tokenizer: PreTrainedTokenizerFast, shown: Shown
) -> None:
    ids, spans = np.array(tokenizer.encode("One two"), np.int32), np.array([[1, 2]], np.int32)
    many = FakeTokens([(ids, spans)] * 30)
    document = np.arange(30)[::-1].copy()
    rows = Rows(document, np.zeros(30, np.int64), np.full(30, len(ids)), np.array([0, 30]))
    out = io.StringIO()
    found = {"a": (ALL_ARMS["random"].rows, indexed(many, rows))}
    Console(file=out, width=500).print(preview.show(many, found, tokenizer, 1, 30 * len(ids)))  # type: ignore[arg-type]
    output = out.getvalue()
    assert re.findall(r"── document (\d+) ──", output) == ["29", "1", "0"]
    assert f"[27 more pieces of documents, {27 * len(ids):,} tokens]" in output
    assert "padding" not in output.split("30 documents")[1].split("efficiency")[1]


def test_without_colour_on_a_terminal_brackets_are_used(
    tokens: FakeTokens, tokenizer: PreTrainedTokenizerFast
) -> None:
    out = io.StringIO()
    console = Console(file=out, width=500, force_terminal=True, color_system="truecolor", no_color=True)
    console.print(preview.show(tokens, {"a": (ALL_ARMS["padding"].rows, alone(tokens))}, tokenizer, 1, 4096))  # type: ignore[arg-type]
    assert "⟦" in out.getvalue()
