"""Documents in which every word tells where it stands, and a tiny model with random weights that reads them.

Nothing of packcli is imported here: this file also runs inside another trainer's environment (`bundle.py`).

Word `d7w3` is word 3 of document 7 and occurs nowhere else. Every token of the vocabulary has a twin with the same
row in the output head, which never occurs in data; `trace.py` says what for.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEGIN, STOP = "<|begin_of_text|>", "<|eot_id|>"
SPECIALS = ("<|unk|>", BEGIN, STOP, "<|eom_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
ROLES = ("system", "user", "assistant")
MAX_LENGTH = 64
"""Tokens in a row of every run of an audit, whatever the configuration says: documents are made to fit it."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Document:
    """A conversation in Llama 3's format, as its tokens should be.

    tokens    as text
    kinds     one letter each: `p` prompt and template, `a` a word of an answer, `s` its stop token
    """

    messages: tuple[tuple[str, str], ...]
    tokens: tuple[str, ...]
    kinds: str


@functools.cache
def documents(count: int = 26) -> list[Document]:
    """Of 14 to 47 tokens; two of 89 and 128 do not fit a row. Every third has two turns."""
    made = []
    for number in range(count):
        turns = [(3 + number * 5 % 6, 2 + number * 7 % 11)]
        if number % 3 == 2:
            turns.append((2 + number % 3, 3 + number % 5))
        if number in (5, 16):
            turns = [(6, 60 + number - 5), (4, 30)] if number == 16 else [(4, 76)]
        made.append(_document(number, turns))
    return made


def _document(number: int, turns: list[tuple[int, int]]) -> Document:
    words = iter(range(10_000))
    messages, tokens, kinds = [], [BEGIN], "p"
    for turn in turns:
        for role, length in zip(("user", "assistant"), turn, strict=True):
            content = [f"d{number}w{next(words)}" for _ in range(length)]
            messages.append((role, " ".join(content)))
            tokens += ["<|start_header_id|>", role, "<|end_header_id|>", *content, STOP]
            kinds += "ppp" + ("a" * length + "s" if role == "assistant" else "p" * (length + 1))
    return Document(tuple(messages), tuple(tokens), kinds)


def vocabulary(made: list[Document]) -> list[str]:
    """Tokens in the order of their ids; those from the middle on are the twins."""
    words = [token for document in made for token in document.tokens if token[0] == "d"]
    tokens = [*SPECIALS, *ROLES, *words]
    return [*tokens, *(f"twin:{token}" for token in tokens)]


def write(directory: Path, made: list[Document]) -> None:
    """`model/` (with its tokenizer) and `chats.jsonl`; nothing is downloaded."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = vocabulary(made)
    words = Tokenizer(models.WordLevel({token: id_ for id_, token in enumerate(tokens)}, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(list(SPECIALS))
    # Without a padding token, as Llama's own: a trainer that takes the stop token for it must not mask stops.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BEGIN, eos_token=STOP, unk_token="<|unk|>", chat_template=TEMPLATE
    )
    shape: dict[str, Any] = {"hidden_size": 160, "intermediate_size": 96, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids: dict[str, Any] = {"bos_token_id": tokens.index(BEGIN), "eos_token_id": tokens.index(STOP)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Wide enough that what stands before a token shows in what the model makes of it.
        shape |= {"vocab_size": len(tokens), "initializer_range": 0.2, "tie_word_embeddings": False}
        config = LlamaConfig(**shape, **heads, **ids)
        model = LlamaForCausalLM(config).float()
        half = len(tokens) // 2
        with torch.no_grad():
            model.lm_head.weight[half:] = model.lm_head.weight[:half]
    model.save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    lines = [
        json.dumps({"messages": [{"role": role, "content": content} for role, content in document.messages]})
        for document in made
    ]
    (directory / "chats.jsonl").write_text("\n".join(lines) + "\n")
