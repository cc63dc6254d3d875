"""Items of the embedded tasks as text for one tokenizer: what the model reads, what it has to write.

Loads no model and no lm-eval; a tokenizer is whatever transformers gives.
"""

from __future__ import annotations

from typing import Any

from packcli.data import corpus, topics
from packcli.data.render import MOST_S, special_tokens
from packcli.deadline import within
from packcli.errors import ConfigError
from packcli.eval import long_context
from packcli.eval.protocol import Task
from packcli.files import digest

_ASK = "PACKCLI-QUESTION"
_REPLY = "PACKCLI-ANSWER"


def documents(task: Task, tokenizer: Any, *, chat_template: bool) -> list[dict[str, str]]:
    """One `{"prompt", "target"}` per held-out item of an embedded task.

    With a chat template, `prompt` is the template over all turns up to where the assistant starts to write and
    `target` the answer with the template's end-of-turn token. Without one, every turn is a line of its own:
    `reverse: sun cat pen\\n` and `= pen cat sun\\n`.
    """
    assert task.corpus_task is not None
    assert task.corpus_split is not None
    made = topics if task.corpus_task in topics.TASKS else corpus
    items = made.items(task.corpus_task, task.corpus_split)
    if not chat_template:
        return [{"prompt": _lines(item["messages"]), "target": item["answer"] + "\n"} for item in items]
    end = end_of_turn(tokenizer)
    return [{"prompt": _render(tokenizer, item["messages"]), "target": item["answer"] + end} for item in items]


def long_texts(task: Task, tokenizer: Any, *, chat_template: bool) -> list[dict[str, Any]]:
    """One `{"text", "target", "answers", "depth"}` per item of a generated task.

    Prompt and answer together fill `task.length` tokens.

    Raises:
        ConfigError: a question alone is longer.
    """
    assert task.family is not None
    assert task.length is not None

    def count(text: str) -> int:
        prompt = _render(tokenizer, [{"role": "user", "content": text}]) if chat_template else text
        # A template writes every special token it wants.
        return len(tokenizer.encode(prompt, add_special_tokens=not chat_template))

    return [
        {"text": item.text, "target": " ".join(item.answers), "answers": list(item.answers), "depth": item.depth}
        for item in long_context.items(task.family, task.length, count)
    ]


def end_of_turn(tokenizer: Any) -> str:
    """What an assistant has to write after its answer: up to and with the first special token of the template.

    `<|im_end|>` of the `<|im_end|>\\n` in ChatML, `<|eot_id|>` in Llama 3, ` </s>` in Llama 2. A template that
    closes a turn with plain text gives all of that text; one that adds nothing, the tokenizer's end of sequence.

    Raises:
        ConfigError: there is no chat template, or it leaves out or alters what the assistant said.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            "this checkpoint's tokenizer has no chat template",
            "set `eval.chat_template: false` to score it on plain text, or save the template with the tokenizer",
        )
    exchange = [{"role": "user", "content": _ASK}, {"role": "assistant", "content": _REPLY}]
    rendered = rendered_by(tokenizer, exchange)
    _, found, rest = rendered.rpartition(_REPLY)
    if not found:
        raise ConfigError("the chat template does not show what the assistant said", "check the template")
    starts = {rest.find(token): token for token in sorted(special_tokens(tokenizer), key=len) if token in rest}
    if starts:
        first = min(starts)
        return rest[: first + len(starts[first])]
    return rest or tokenizer.eos_token or ""


def rendering_key(tokenizer: Any) -> str:
    """Equal for two tokenizers whose chat template turns the same items into the same text."""
    return digest([tokenizer.chat_template, tokenizer.special_tokens_map, sorted(special_tokens(tokenizer))])


def tokenizing_key(tokenizer: Any) -> str:
    """Equal for two tokenizers that also make the same tokens of it."""
    engine = getattr(tokenizer, "backend_tokenizer", None)
    return digest([rendering_key(tokenizer), engine.to_str() if engine else sorted(tokenizer.get_vocab().items())])


def _render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return rendered_by(tokenizer, messages, add_generation_prompt=True)


def rendered_by(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """Messages by the chat template that came with a checkpoint: a program of somebody else's.

    Raises:
        ConfigError: it refuses them, or does not end.
    """
    hint = "mend its chat template, or set `eval.chat_template: false`"
    cause = f"the checkpoint's chat template takes more than {MOST_S:g} s for one conversation"
    try:
        with within(MOST_S, ConfigError(cause, hint)):
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            return text
    except ConfigError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"the checkpoint's chat template refuses a conversation: {reason}", hint) from None


def _lines(messages: list[dict[str, str]]) -> str:
    return "".join(message["content"] + "\n" for message in messages)
