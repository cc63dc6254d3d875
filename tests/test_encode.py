"""Token ids and supervised spans: every engine as `tokenizers` makes them; control tokens are the template's."""

from __future__ import annotations

import json
import logging
import multiprocessing
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from packcli.data import encode, engines
from packcli.data.encode import Encoded, Encoder, EngineDiffers
from packcli.data.render import BREAK, Rendered
from packcli.errors import ConfigError, DataError

BOS, START, END = "<|bos|>", "<|start|>", "<|end|>"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
CORPUS = [
    "The quick brown fox doesn't jump over the lazy dog; they're sleeping, I'll say. " * 3,
    "def add(a, b):\n    return a + b\n\n\nclass Thing:\n        pass\n" * 3,
    "1234567890 12 345 6789 3.14159 ٣٤٥ ²³ une élève déjà naïve, ça va? Straße İstanbul " * 3,
    "漢字とかな 中文句子。한국어 문장 עברית العربية हिन्दी 🎉🎉 👩‍👩‍👧 é e\u0301 \u00a0\u2003 ... !!! ??? --- ___ "
    * 3,
    "< > [ ] / | _ INST <s> </s> [INST] [/INST]",
    "user\nassistant\nsystem\n  two  three   four    \t\ttabs\r\n\r\n",
]
# fmt: off
PIECES = st.sampled_from([
    *" \n\t<|>'s", "  ", "\r\n", "\n\n", "'S", "'ſ", "'ll", " don't", "ing", "return a", " the", "!?!", "end|>",
    "é", "e\u0301", "\u0301", "漢字", "각", "\u1100\u1161", "🎉", "👩\u200d👩\u200d👧", "ß", "İ", "ﬁ",
    "<|en", "\u1e9b\u0323", "\0", "\x1b", "\x85", "\u00a0", "\u2003", "\u200b", "\ufeff", "\uffff",
    "\U0010ffff", "\U00011de1", "1", "12", "1234", "٣", "²", "a" * 40, " " * 40,
])
# fmt: on
TEXTS = st.lists(PIECES | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=12).map("".join)
TURNS = st.lists(st.tuples(TEXTS, TEXTS, st.sampled_from(["", "\n", " \u2003"])), min_size=1, max_size=3)


def fast(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def bpe(
    split: str | None,
    *,
    normalizer: Any = None,
    special: tuple[str | AddedToken, ...] = (BOS, START, END),
    prefix_space: bool = False,
    **model: Any,
) -> Any:
    """A byte-level BPE of 800 tokens, with its special tokens in the vocabulary and a BOS to add."""
    tokenizer = Tokenizer(models.BPE(**model))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    level = pre.ByteLevel(add_prefix_space=prefix_space, use_regex=split is None)
    tokenizer.pre_tokenizer = (
        level if split is None else pre.Sequence([pre.Split(Regex(split), "isolated"), level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=list(special),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Both would change what `encode` gives, were they heeded.
    first = special[0] if isinstance(special[0], str) else special[0].content
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{first} $A", special_tokens=[(first, 0)]),
        ]
    )
    return fast(tokenizer)


def llama3() -> Any:
    """As converted from tiktoken ranks: whole words first, special tokens outside the vocabulary."""
    spec = json.loads(bpe(LLAMA3).backend_tokenizer.to_str())
    vocabulary = [token for token in spec["model"]["vocab"] if not token.startswith("<|")]
    vocabulary.append("Ġzqzqzq")  # a word no merges lead to
    spec["model"].update(vocab={token: id_ for id_, token in enumerate(vocabulary)}, ignore_merges=True)
    spec.update(added_tokens=[], post_processor=None)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, START, END)])
    return fast(tokenizer)


def metaspace(model: str = "bpe") -> Any:
    """As sentencepiece models are converted: control tokens among the vocabulary, spaces as a letter."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    if model == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        trainer: Any = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator([text.replace(" ", " ▁") for text in CORPUS], trainer)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
        )
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return fast(tokenizer)


MAKERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: bpe(None),
    "llama3": llama3,
    "qwen": lambda: bpe(QWEN, normalizer=normalizers.NFC()),
    "odd_split": lambda: bpe(r"\p{L}+|[^\p{L}]"),
    "rstrip": lambda: bpe(LLAMA3, special=(BOS, AddedToken(START, rstrip=True), END)),
}
made = cache(lambda name: MAKERS[name]())
encoder = cache(lambda name, engine: Encoder(made(name), engine))
EXACT = [
    *((name, engine) for name in ("gpt2", "llama3", "qwen") for engine in engines.ENGINES),
    ("odd_split", "tiktoken"),
    ("odd_split", "tokenizers"),
    ("rstrip", "tokenizers"),
]


def document(turns: list[tuple[str, str, str]]) -> Rendered:
    """(question, answer, what follows the stop token) of each turn."""
    text, spans = BOS, []
    for question, answer, closing in turns:
        text += f"{START}user\n{question}{END}\n{START}assistant\n"
        spans.append((len(text), len(text + answer + END + closing)))
        text += answer + END + closing
    return Rendered(text, spans)


def split(encoded: Encoded) -> list[tuple[list[int], list[list[int]]]]:
    """(ids, spans) of each document."""
    ids, spans = (
        np.split(a, b[1:-1]) for a, b in ((encoded.ids, encoded.offsets), (encoded.spans, encoded.span_offsets))
    )
    return [(i.tolist(), s.tolist()) for i, s in zip(ids, spans, strict=True)][: len(encoded.offsets) - 1]


def by_definition(tokenizer: Any, text: str, spans: list[tuple[int, int]], closed: bool) -> list[list[int]]:
    """Token spans, one token at a time, for text that the normalizer leaves alone."""
    backend = tokenizer.backend_tokenizer
    ids = backend.encode(text, add_special_tokens=False).ids
    added = backend.get_added_tokens_decoder()
    sizes = [len(added[i].content.encode()) if i in added else len(backend.id_to_token(i)) for i in ids]
    begins = [sum(sizes[:n]) for n in range(len(ids))]
    found = []
    for first, last in spans:
        low, high = len(text[:first].encode()), len(text[:last].encode())
        inside = [n for n, begin in enumerate(begins) if low <= begin < high]
        if closed:
            inside = inside[: max(k for k, n in enumerate(inside) if ids[n] in added) + 1]
        inside = [n for n in inside if n]
        if inside:
            found.append([inside[0], inside[-1] + 1])
    return found


# Exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "engine"), EXACT)
@settings(max_examples=60, deadline=None)
@given(documents=st.lists(TURNS.map(document), min_size=1, max_size=4), closed=st.booleans())
@example(documents=[document([("\U00011de1\U00011de1 \U00011de1", " \U00011de1 a", "\n")])], closed=True)
@example(documents=[document([("", "zqzqzq zqzqzq", "")]), document([("e\u0301", "\u0301é", "\n")])], closed=True)
def test_every_engine_gives_the_ids_and_spans_of_tokenizers(
    name: str, engine: str, documents: list[Rendered], closed: bool
) -> None:
    used = encoder(name, engine)
    found = used.encode(documents, closed=closed)
    assert used.engine == engine
    assert (found.ids.dtype, found.offsets.dtype) == (np.int32, np.int64)
    assert (found.spans.dtype, found.span_offsets.dtype) == (np.int32, np.int64)
    backend = made(name).backend_tokenizer
    expected = [backend.encode(one.text, add_special_tokens=False).ids for one in documents]
    assert [ids for ids, _ in split(found)] == expected
    assert split(found) == split(used._slow(documents, closed))
    if name not in ("qwen", "rstrip"):
        spans = [by_definition(made(name), one.text, one.spans, closed) for one in documents]
        assert [spans for _, spans in split(found)] == spans


@pytest.mark.parametrize(("name", "engine"), EXACT)
def test_no_character_is_encoded_otherwise(name: str, engine: str) -> None:
    """Every character up to U+0800 and a sample of the others, between letters, after a space, and twice."""
    characters = [chr(c) for c in (*range(0x800), *range(0x800, 0x110000, 373)) if not 0xD800 <= c < 0xE000]
    documents = [Rendered(f"{BOS}a{c}b 1{c}2  {c}{c}\n", []) for c in characters]
    ids = [ids for ids, _ in split(encoder(name, engine).encode(documents))]
    backend = made(name).backend_tokenizer
    assert ids == [backend.encode(one.text, add_special_tokens=False).ids for one in documents]


def test_characters_that_engines_may_class_differently_are_left_to_tokenizers() -> None:
    texts = ["abc", "é漢🎉", "a\uffff", "e\u0301", "\U0010ffff漢", "漢"]
    documents = [Rendered(text, []) for text in texts]
    assert encode._in_bytes(documents, composes=False)[3].tolist() == [False, False, True, False, True, False]
    assert encode._in_bytes(documents, composes=True)[3].tolist() == [False, False, True, True, True, False]


def test_long_runs_neither_fail_nor_differ() -> None:
    documents = [Rendered(BOS + run * 300_000 + "x", [(0, 9)]) for run in (" ", "a", "\n")]
    found = [split(encoder("llama3", engine).encode(documents, closed=False)) for engine in engines.ENGINES]
    assert found[0] == found[1] == found[2]


def test_no_documents_and_empty_ones_are_encoded() -> None:
    for name, engine in EXACT:
        used = encoder(name, engine)
        assert [len(a) for a in (used.encode([]).ids, used.encode([]).offsets)] == [0, 1]
        assert used.encode([]).spans.shape == (0, 2)
        assert split(used.encode([Rendered("", []), Rendered(BOS, []), Rendered("", [(0, 0)])])) == [
            ([], []),
            (made(name).convert_tokens_to_ids([BOS]), []),
            ([], []),
        ]


# Which engine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "gigatoken"),
        ("llama3", "gigatoken"),
        ("qwen", "gigatoken"),
        ("odd_split", "tiktoken"),
        ("rstrip", "tokenizers"),
    ],
)
def test_the_fastest_exact_engine_is_chosen(name: str, expected: str) -> None:
    assert Encoder(made(name)).engine == expected


def with_added(**flags: bool) -> Any:
    tokenizer = bpe(LLAMA3)
    tokenizer.backend_tokenizer.add_tokens([AddedToken("<tool>", **flags)])
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_added(lstrip=True),
        lambda: with_added(rstrip=True),
        lambda: with_added(single_word=True),
        lambda: bpe(LLAMA3, special=(BOS, START, END, END + "x")),
        lambda: bpe(LLAMA3, special=(BOS, START, END, "|>!")),
        lambda: bpe(LLAMA3, normalizer=normalizers.NFKC()),
        lambda: bpe(LLAMA3, normalizer=normalizers.Lowercase()),
        lambda: bpe(LLAMA3, prefix_space=True),
        lambda: bpe(LLAMA3, dropout=0.1),
        metaspace,
        lambda: metaspace("unigram"),
    ],
)
def test_a_tokenizer_that_engines_may_read_otherwise_is_left_to_tokenizers(make: Callable[[], Any]) -> None:
    tokenizer = make()
    used = Encoder(tokenizer)
    assert used.engine == "tokenizers"
    for engine in ("gigatoken", "tiktoken"):
        with pytest.raises(ConfigError, match="cannot encode for this tokenizer"):
            Encoder(tokenizer, engine)
    texts = ["Ａ <tool> the <|end|>x a<tool>b <|end|>!", f"{BOS}hello  {END} world"]
    ids = [ids for ids, _ in split(used.encode([Rendered(text, []) for text in texts]))]
    if not getattr(tokenizer.backend_tokenizer.model, "dropout", None):
        assert ids == [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def test_tiktoken_is_refused_merges_that_its_ranks_cannot_say() -> None:
    spec = json.loads(bpe(LLAMA3).backend_tokenizer.to_str())
    merges = spec["model"]["merges"]
    swapped = {**spec, "model": {**spec["model"], "merges": merges[::-1]}}
    unreachable = {**spec, "model": {**spec["model"], "merges": merges[:20] + merges[21:]}}
    for other in (swapped, unreachable):
        tokenizer = fast(Tokenizer.from_str(json.dumps(other)))
        with pytest.raises(ConfigError, match="tiktoken"):
            Encoder(tokenizer, "tiktoken")


def test_without_the_fast_libraries_the_slower_ones_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = split(Encoder(made("gpt2")).encode([document([("Hi", "there", "\n")])]))
    for missing, left in (("gigatoken", "tiktoken"), ("tiktoken", "tokenizers")):
        monkeypatch.setitem(sys.modules, missing, None)
        used = Encoder(made("gpt2"))
        assert used.engine == left
        assert split(used.encode([document([("Hi", "there", "\n")])])) == expected


def test_truncation_and_padding_of_a_tokenizer_file_do_not_cut_documents() -> None:
    tokenizer = bpe(LLAMA3)
    one = document([("the quick brown fox", "jumps over", "\n")])
    expected = split(Encoder(tokenizer).encode([one]))
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    for engine in engines.ENGINES:
        assert split(Encoder(tokenizer, engine).encode([one])) == expected


# Spans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "engine"), EXACT)
def test_a_token_of_prompt_and_answer_is_not_supervised(name: str, engine: str) -> None:
    text = f"{BOS}so the fox{END}\n"
    ids, [[start, stop]] = split(encoder(name, engine).encode([Rendered(text, [(len(BOS) + 3, len(text))])]))[0]
    whole = made(name)
    if name == "odd_split":  # splits off spaces: nothing straddles
        assert whole.decode(ids[start:stop]) == f"the fox{END}"
    else:
        assert whole.decode(ids[start:stop]) == f" fox{END}"


@pytest.mark.parametrize(("name", "engine"), EXACT)
def test_what_follows_the_stop_token_is_not_supervised_nor_the_first_token(name: str, engine: str) -> None:
    text = f"{BOS}é漢{END}\n\u2003{START}b{END}"
    spans = [(0, text.index(START)), (text.index(START), len(text))]
    ids, found = split(encoder(name, engine).encode([Rendered(text, spans)]))[0]
    assert [made(name).decode(ids[a:b]) for a, b in found] == [f"é漢{END}", f"{START}b{END}"]
    assert found[0][0] == 1


@pytest.mark.parametrize(("name", "engine"), EXACT)
@pytest.mark.parametrize("after", ["x", "é", "\nok", "。"])
def test_a_turn_that_no_special_token_closes_is_an_error(name: str, engine: str, after: str) -> None:
    good = document([("a", "b", "\n")])
    for text in (f"{BOS}user a answer b{END}{after}", f"{BOS}user a answer b{after}"):
        bad = Rendered(text, [(text.index("answer"), len(text))])
        with pytest.raises(DataError, match="without a special token"):
            encoder(name, engine).encode([good, bad, good])
        encoder(name, engine).encode([good, bad, good], closed=False)


@pytest.mark.parametrize(("name", "engine"), EXACT)
def test_an_empty_span_is_left_out(name: str, engine: str) -> None:
    text = f"{BOS}ab{END}"
    found = encoder(name, engine).encode([Rendered(text, [(7, 7), (7, len(text)), (len(text), len(text))])])
    assert split(found)[0][1] == [[1, len(found.ids)]]


def test_a_control_token_that_the_vocabulary_lacks_closes_nothing() -> None:
    tokenizer = bpe(LLAMA3)
    tokenizer._special_tokens_map["eos_token"] = "<|nowhere|>"
    assert "<|nowhere|>" in tokenizer.all_special_tokens
    with pytest.raises(DataError, match="without a special token"):
        Encoder(tokenizer).encode([Rendered(f"{BOS}ab<|nowhere|>", [(7, 20)])])


# Control tokens in messages ----------------------------------------------------------------------------

SPELLINGS = {
    "chatml": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "inst": ("<s>", "</s>", "[INST]", "[/INST]"),
}
GUARDED: dict[str, Callable[[], Any]] = {
    "chatml": lambda: bpe(QWEN, normalizer=normalizers.NFC(), special=SPELLINGS["chatml"]),
    "llama3": lambda: bpe(LLAMA3, special=SPELLINGS["llama3"]),
    "llama3_stripping": lambda: bpe(
        LLAMA3, special=tuple(AddedToken(s, lstrip=True, rstrip=True) for s in SPELLINGS["llama3"])
    ),
    "llama3_words": lambda: bpe(
        LLAMA3, ignore_merges=True, special=tuple(AddedToken(s, single_word=True) for s in SPELLINGS["llama3"])
    ),
    "inst": metaspace,
    "inst_unigram": lambda: metaspace("unigram"),
}
guarded_tokenizer = cache(lambda name: GUARDED[name]())
guarded_encoder = cache(lambda name: Encoder(guarded_tokenizer(name)))


def broken(text: str, spellings: tuple[str, ...]) -> str:
    for spelling in spellings:
        text = text.replace(spelling, spelling[0] + BREAK + spelling[1:])
    return text


def guarded(spellings: tuple[str, ...], question: str, answer: str) -> tuple[Rendered, str]:
    """A document whose messages may spell control tokens, and its text as the messages meant it."""
    opening, closing = f"{spellings[0]} user: ", spellings[-1]
    head = f"{opening}{broken(question, spellings)} {closing}"
    text = f"{head} {broken(answer, spellings)} {closing}"
    return Rendered(text, [(len(head), len(text))], guarded=True), text.replace(BREAK, "")


@pytest.mark.parametrize("name", GUARDED)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_typed_control_token_is_text_and_the_templates_own_is_the_token(name: str, data: st.DataObject) -> None:
    tokenizer, spellings = guarded_tokenizer(name), SPELLINGS[name.split("_")[0]]
    words = st.lists(st.sampled_from([*spellings, "fox", " the ", "dog", " ", "é", "\n"]), max_size=6).map("".join)
    one, plain = guarded(spellings, data.draw(words), data.draw(words) + "!")
    [(ids, [[start, stop]])] = split(guarded_encoder(name).encode([one]))
    control = set(tokenizer.convert_tokens_to_ids(list(spellings)))
    assert [id_ for id_ in ids if id_ in control] == tokenizer.convert_tokens_to_ids(
        [spellings[0], spellings[-1], spellings[-1]]
    )
    assert (ids[start - 1] in control, ids[stop - 1], stop) == (True, ids[-1], len(ids))
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    if name in ("chatml", "llama3", "llama3_words"):
        assert decoded == plain
    else:  # these lose or add spaces around control tokens
        assert "".join(decoded.split()) == "".join(plain.split())


@pytest.mark.parametrize("name", ["chatml", "llama3", "inst"])
def test_only_typed_spellings_change_a_guarded_document(name: str) -> None:
    """Text around them is encoded as in a document without them, and so are control tokens side by side."""
    spellings = SPELLINGS[name]
    one, plain = guarded(spellings, "the quick brown fox", "jumps over the dog")
    assert not one.text.count(BREAK)
    [(ids, spans)] = split(guarded_encoder(name).encode([one]))
    [(same, same_spans)] = split(guarded_encoder(name).encode([Rendered(plain, one.spans)]))
    assert (ids, spans) == (same, same_spans)


def test_spans_of_a_guarded_document_are_those_of_its_text() -> None:
    tokenizer, spellings = guarded_tokenizer("llama3"), SPELLINGS["llama3"]
    one, _ = guarded(spellings, "what does <|eot_id|> do?", "<|eot_id|> ends <|start_header_id|> é")
    found = split(guarded_encoder("llama3").encode([one, one]))
    ids, [[start, stop]] = found[0]
    assert tokenizer.decode(ids[start:stop]) == " <|eot_id|> ends <|start_header_id|> é <|eot_id|>"
    assert found[0] == found[1]


def test_guarded_documents_keep_their_place_among_others() -> None:
    spellings = SPELLINGS["llama3"]
    documents = [guarded(spellings, "a", "b" * n + spellings[n % 4])[0] for n in range(9)]
    documents = [
        one if n % 3 == 0 else Rendered(one.text.replace(BREAK, "-"), one.spans) for n, one in enumerate(documents)
    ]
    used = guarded_encoder("llama3")
    alone = [split(used.encode([one]))[0] for one in documents]
    assert split(used.encode(documents)) == alone


# Safety ------------------------------------------------------------------------------------------------


def test_an_engine_that_differs_is_left_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("packcli"), "propagate", True)
    used = Encoder(made("llama3"))
    right = used._encode
    documents = [document([("Hi", f"answer {n}", "\n")]) for n in range(5)]

    def wrong(texts: list[str]) -> engines.Flat:
        ids, offsets = right(texts)
        ids = ids.copy()
        at = offsets[3] + 5
        ids[at : at + 2] = ids[at : at + 2][::-1]  # as many bytes as before: only a comparison can tell
        return ids, offsets

    monkeypatch.setattr(used, "_encode", wrong)
    with caplog.at_level(logging.WARNING, "packcli"), pytest.raises(EngineDiffers):
        used.compare(documents)
    assert used.engine == "tiktoken"
    [record] = caplog.records
    assert "gigatoken" in record.message
    assert "document 3" in record.message
    used.compare(documents)
    assert split(used.encode(documents)) == split(used._slow(documents, True))


@pytest.mark.parametrize("error", [RuntimeError, type("PanicException", (BaseException,), {})])
def test_an_engine_that_fails_is_left(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    used = Encoder(made("llama3"))

    def fail(texts: list[str]) -> engines.Flat:
        raise error("index out of bounds")

    monkeypatch.setattr(used, "_encode", fail)
    with pytest.raises(EngineDiffers):
        used.encode([document([("a", "b", "")])])
    assert used.engine == "tiktoken"


def test_an_interrupt_does_not_look_like_a_failed_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Encoder(made("llama3"))
    monkeypatch.setattr(used, "_encode", lambda texts: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        used.encode([document([("a", "b", "")])])
    assert used.engine == "gigatoken"


def test_a_document_whose_tokens_are_not_its_text_goes_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Encoder(made("llama3"))
    right = used._encode
    documents = [document([("Hi", f"answer {n}", "\n"), ("é", "漢" * n, "")]) for n in range(5)]

    def short(texts: list[str]) -> engines.Flat:
        ids, offsets = right(texts)
        return np.delete(ids, range(offsets[2] + 3, offsets[3])), np.where(
            np.arange(6) > 2, offsets - (offsets[3] - offsets[2] - 3), offsets
        )

    expected = split(used.encode(documents))
    monkeypatch.setattr(used, "_encode", short)
    assert split(used.encode(documents)) == expected


def test_spans_that_differ_leave_even_the_last_engine_for_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    used = Encoder(made("llama3"), "tokenizers")
    documents = [document([("Hi", "answer", "\n")])]
    right = encode._in_bytes

    def shifted(*args: Any, **kwargs: Any) -> Any:
        owner, spans, sizes, doubtful = right(*args, **kwargs)
        return owner, spans + np.asarray([3, 0]), sizes, doubtful

    monkeypatch.setattr(encode, "_in_bytes", shifted)
    with pytest.raises(EngineDiffers):
        used.compare(documents)
    used.compare(documents)
    assert split(used.encode(documents)) == split(used._slow(documents, True))


# Processes ---------------------------------------------------------------------------------------------


def in_a_process(used: Encoder, documents: list[Rendered]) -> tuple[str, Any, int]:
    """(engine, what it gives, threads it started)."""

    def threads() -> int:
        tasks = Path("/proc/self/task")
        return len(list(tasks.iterdir())) if tasks.exists() else 0

    import awkward  # noqa: F401  (brings Arrow, whose allocator has a thread; the encoder shall add none)

    before = threads()
    found = split(used.encode(documents))
    return used.engine, found, threads() - before


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("method", ["spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_an_encoder_works_in_a_process_of_its_own_without_threads(engine: str, method: str) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    documents = [document([("Hi", f"answer {n}", "\n")]) for n in range(200)]
    used = encoder("llama3", engine)
    expected = split(used.encode(documents))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as pool:
        assert pool.submit(in_a_process, used, documents).result() == (engine, expected, 0)


def test_a_pickled_encoder_stays_with_the_engine_it_had_moved_to() -> None:
    used = Encoder(made("llama3"))
    used._start("tiktoken")
    assert pickle.loads(pickle.dumps(used)).engine == "tiktoken"
