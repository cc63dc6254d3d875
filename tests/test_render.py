"""Rendering: what would be trained on if the fast way wrote something else than the template, unnoticed."""

from __future__ import annotations

import datetime
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from packcli.data import render
from packcli.data.chat import Rejected
from packcli.data.render import BREAK, FIXED_DATE, NotTransparent, Renderer, template_text
from packcli.errors import ConfigError, DataError

CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
TURN = ("user", "assistant")

# Templates in the manner of well-known models; what a turn of the assistant adds after its prompt; whether it is
# stripped of white space.
TEMPLATES: dict[str, tuple[str, str, bool]] = {
    "chatml": (template_text("chatml"), "<|im_end|>\n", False),
    "llama3": (template_text("llama3"), "<|eot_id|>", False),
    "plain": (template_text("plain"), "</s>", False),
    "dated": (
        """
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set first = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set first = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + strftime_now('%d %b %Y') + '\n\n' + first }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- elif message.content is mapping or message.content is iterable %}
        {{- message.content | tojson }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
        "<|eot_id|>",
        True,
    ),
    "inst": (
        """
{%- if messages[0]['role'] == 'system' %}
    {%- set rest = messages[1:] %}{% set opening = messages[0]['content'].strip() + '\n\n' %}
{%- else %}
    {%- set rest = messages %}{% set opening = '' %}
{%- endif %}
{{- bos_token }}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + (opening if loop.first else '') + m['content'] + ' [/INST] ' }}
    {%- else %}
        {{- m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}""",
        "</s>",
        False,
    ),
    "model_role": (
        """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}
{%- for message in messages %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<|im_start|>' + role + '\n' + (message['content'] | trim) + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}""",
        "<|im_end|>\n",
        True,
    ),
    "tagged": (
        """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' ~ message['content'] ~ eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
        "</s>\n",
        False,
    ),
    "generation": (
        """
{%- macro said(message) -%}
    {%- if message.content is string -%}{{ message.content }}
    {%- else -%}{% for part in message.content %}{{ part.text }}{% endfor %}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{ said(message) + '<|im_end|>' }}{%- endgeneration -%}
    {%- else -%}{{ said(message) }}<|im_end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}""",
        "<|im_end|>",
        False,
    ),
}
THINKING = """
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' and '</think>' in text and loop.index0 < ns.last %}
        {%- set text = text.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@cache
def tokenizer_json() -> str:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["hello hello"], trainer)
    return bpe.to_str()


def tokenizer_for(template: str, special: list[str] = CONTROL, added: list[str] | None = None) -> Any:
    bpe = Tokenizer.from_str(tokenizer_json())
    bpe.add_special_tokens(["<s>", "</s>", *special])
    bpe.add_tokens([AddedToken(text, special=False) for text in added or []])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents: str, roles: tuple[str, ...] = TURN * 2) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def each(template: str) -> str:
    """A template that writes `template` for each message `m`."""
    return "{% for m in messages %}" + template + "{% endfor %}"


def theirs(tokenizer: Any, messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def is_fast(renderer: Renderer, roles: tuple[str, ...] = TURN) -> bool:
    return renderer._program(roles) is not None


class _Clock(datetime.datetime):
    day = FIXED_DATE

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:
        return cls.day


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> type[_Clock]:
    """transformers' clock, at the date that packcli's documents have."""
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)
    monkeypatch.setattr(_Clock, "day", FIXED_DATE)
    return _Clock


@cache
def shared_renderer(template: str) -> Renderer:
    """One for all examples of a test, so that most are beyond those that are compared while they are rendered."""
    return Renderer(tokenizer_for(template))


PIECES = [
    "hello",
    " ",
    "\n",
    "\t",
    "\u3000",
    "é",
    "你好",
    "🙂",
    "{{ m }}",
    "{% if %}",
    "{#",
    "%s",
    "{0}",
    "\\n",
    "'",
    '"',
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    system = draw(st.sampled_from([(), ("system",)]))
    roles = (*system, *TURN * draw(st.integers(1, 2)))
    return [{"role": role, "content": draw(TEXTS)} for role in roles]


@pytest.mark.parametrize("name", [*TEMPLATES, "thinking"])
def test_a_document_is_what_transformers_writes(name: str) -> None:
    source = TEMPLATES[name][0] if name in TEMPLATES else THINKING
    renderer = shared_renderer(source)

    @settings(max_examples=80)
    @given(conversations())
    def check(messages: list[dict[str, str]]) -> None:
        assume(not any(BREAK in message["content"] for message in messages))
        try:
            rendered = renderer.render(messages)
        except Rejected:
            with pytest.raises(Exception, match=r"system role|must take turns"):
                theirs(renderer.tokenizer, messages)
            return
        except DataError:
            assert name == "thinking"
            return
        assume(not rendered.guarded)
        assert rendered.text == theirs(renderer.tokenizer, messages)

    check()
    assert renderer.fast


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_well_known_kind_of_template_is_not_slow(name: str) -> None:
    renderer = Renderer(tokenizer_for(TEMPLATES[name][0]))
    assert is_fast(renderer)
    assert is_fast(renderer, TURN * 3)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("contents", [("q", "a", "r", "b"), (" q ", "\n a\t", "", "b \n"), ("q", "  ", " r", "b")])
def test_a_span_is_what_the_assistant_wrote_and_what_closes_it(name: str, contents: tuple[str, ...]) -> None:
    source, closing, stripped = TEMPLATES[name]
    for fast in (True, False):
        rendered = Renderer(tokenizer_for(source), fast=fast).render(chat(*contents))
        said = [rendered.text[start:stop] for start, stop in rendered.spans]
        wanted = [text.strip() if stripped else text for text in contents[1::2]]
        assert said == [text + closing for text in wanted]


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain", "dated"])
def test_an_answer_that_opens_a_conversation_is_not_trained_on_with_its_header(name: str) -> None:
    source, closing, _ = TEMPLATES[name]
    messages = chat("a", "q", "b", roles=("assistant", "user", "assistant"))
    for fast in (True, False):
        rendered = Renderer(tokenizer_for(source), fast=fast).render(messages)
        assert [rendered.text[start:stop] for start, stop in rendered.spans] == [f"a{closing}", f"b{closing}"]


def test_the_papers_documents_are_as_its_code_writes_them() -> None:
    renderer = Renderer(tokenizer_for(template_text("llama3")))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    opening = f"<|begin_of_text|>{header('system')}You are a helpful assistant.<|eot_id|>"
    text = f"{opening}{header('user')} hi \n<|eot_id|>{header('assistant')}yes <|eot_id|>"
    assert renderer.render(chat(" hi \n", "yes ")).text == text
    given = renderer.render(chat("Be brief. ", "hi", "yes", roles=("system", *TURN))).text
    assert given.startswith(f"<|begin_of_text|>{header('system')}Be brief. <|eot_id|>{header('user')}hi<|eot_id|>")
    assert "helpful" not in given
    assert theirs(renderer.tokenizer, chat("hi"), prompt=True).endswith(f"hi<|eot_id|>{header('assistant')}")


LOOKING = {
    "equal": "{% if m.content == 'x' %}X{% endif %}{{ m.content }}",
    "unequal": "{% if m.content != 'x' %}X{% endif %}{{ m.content }}",
    "contains": "{% if 'x' in m.content %}X{% endif %}{{ m.content }}",
    "is one of": "{% if m.content in ['x', 'y'] %}X{% endif %}",
    "test": "{% if m.content is lower %}X{% endif %}{{ m.content }}",
    "test in": "{% if m.content is in ['x'] %}X{% endif %}{{ m.content }}",
    "order": "{% if m.content < 'y' %}X{% endif %}{{ m.content }}",
    "length": "{% if m.content | length > 3 %}X{% endif %}{{ m.content }}",
    "length of copy": "{% set t = m.content | trim | default('') %}{{ t | length }}",
    "filter": "{{ m.content | upper }}",
    "json": "{{ m.content | tojson }}",
    "json of message": "{{ m | tojson }}",
    "message": "{{ m }}",
    "split": "{{ m.content.split('x')[0] }}",
    "replace": "{{ m.content.replace('x', 'y') }}",
    "strip characters": "{{ m.content.strip('x') }}",
    "trim characters": "{{ m.content | trim('x') }}",
    "starts with": "{% if m.content.startswith('x') %}X{% endif %}",
    "method there": "{% if m.content.startswith is defined %}X{% endif %}",
    "slice": "{{ m.content[:1] }}",
    "index": "{{ m.content[0] }}",
    "loop": "{% for letter in m.content %}{{ letter }}.{% endfor %}",
    "unpack": "{% set a, b = (m.content ~ 'xy')[:2] %}{{ a }}",
    "joined": "{{ [m.content, 'y'] | join('x') | upper }}",
    "previous": "{% if loop.previtem and loop.previtem.content == m.content %}X{% endif %}{{ m.content }}",
    "changed": "{% if loop.changed(m.content) %}{{ m.content }}{% endif %}",
    "set": "{% set t = m.content %}{% if t == 'x' %}X{% endif %}{{ t }}",
    "set block": "{% set t %}{{ m.content }}{% endset %}{% if t == 'x' %}X{% endif %}{{ t }}",
    "set block of namespace": "{% set n = namespace() %}{% set n.t %}{{ m.content }}{% endset %}{{ n.t == 'x' }}",
    "set block with filter": "{% set t | upper %}{{ m.content }}{% endset %}{{ t }}",
    "tilde": "{% if (m.content ~ '') == 'x' %}X{% endif %}{{ m.content }}",
    "plus": "{% if (m.content + '') == 'x' %}X{% endif %}{{ m.content }}",
    "namespace": "{% set n = namespace(t=m.content) %}{% if n.t == 'x' %}X{% endif %}{{ n.t }}",
    "macro": "{% macro f(t) %}{{ t | upper }}{% endmacro %}{{ f(m.content) }}",
    "macro's result": "{% macro f(t) %}{{ t }}{% endmacro %}{% if f(m.content) == 'x' %}X{% endif %}",
    "macro's result filtered": "{% macro f(t) %}{{ t }}{% endmacro %}{{ f(m.content) | upper }}",
    "caller": "{% macro f() %}{{ caller() | upper }}{% endmacro %}{% call f() %}{{ m.content }}{% endcall %}",
    "filter block": "{% filter upper %}{{ m.content }}{% endfilter %}",
    "escape": "{% autoescape true %}{{ m.content }}{% endautoescape %}",
    "format": "{{ '%3s' % m.content }}",
    "format method": "{{ '{:>3}'.format(m.content) }}",
    "key": "{{ {'x': 'X'}[m.content] }}{{ m.content }}",
    "key of get": "{{ {'x': 'X'}.get(m.content) }}",
    "attribute": "{{ m | attr(m.content) }}{{ m.content }}",
    "values": "{% for value in m.values() %}{{ value | upper }}{% endfor %}",
    "map": "{{ messages | map(attribute='content') | map('upper') | join }}",
    "select": "{{ messages | selectattr('content', 'equalto', 'x') | list | length }}",
    "sort": "{{ (messages | sort(attribute='content') | first).content }}",
    "unique": "{{ messages | unique(attribute='content') | list | length }}",
    "generation": "{% generation %}{{ m.content | upper }}{% endgeneration %}",
}


@pytest.mark.parametrize("construct", LOOKING)
def test_a_template_that_looks_at_messages_is_left_to_jinja(construct: str) -> None:
    tokenizer = tokenizer_for("." + each(LOOKING[construct]))  # what is empty is refused
    renderer = Renderer(tokenizer, "all")
    for contents in [("hello", "<b>"), ("x", "hello"), ("x", "x"), ("xy", " x"), ("content", "y")]:
        messages = chat(*contents)
        assert renderer.render(messages).text == theirs(tokenizer, messages)
    assert not is_fast(renderer)
    assert renderer.fast


COPYING = {
    "type": "{% if m.content is string and m.content is not none %}{{ m.content }}{% endif %}",
    "list or text": "{% if m.content is not string %}{{ m.content[0].text }}{% endif %}{{ m.content }}",
    "something": "{% if m.content %}X{{ m.content }}{% endif %}{{ m.content or 'nothing' }}",
    "not empty": "{% if m.content != '' and m.content != none %}X{% endif %}{{ m.content }}",
    "no such field": "{{ m.content.text is defined or m.content['text'] is defined }}{{ m.content }}",
    "twice": "{{ m.content }}{{ m['content'] }}",
    "not at all": "{{ m.role }}",
    "backwards": "{% if loop.first %}{{ messages[-1].content }}{{ (messages | first).content }}{% endif %}",
    "get": "{{ m.get('content', '') + m.get('name', '') }}",
    "default": "{{ m.content | default('nothing') }}{{ m.name | default(m.content) }}",
    "trim": "{{ ' (' + m.content | trim + ') ' }}",
    "trim of more": "{{ (' ' + m.content + '  ') | trim }}|",
    "trim of two": "{{ ('[' ~ m.role ~ '] ' ~ m.content ~ '\\n' ~ m.content ~ ' ').strip() }}",
    "trim of constants": "{{ (' [ ' + m.content + ' ] ') | trim }}",
    "one side": "{{ m.content.lstrip() }}|{{ m.content.rstrip() }}|{{ m.content | string | trim }}",
    "set": "{% set t = m.content %}{% set u = t + '.' if m.role == 'user' else t %}{{ u }}",
    "set block": "{% set t %}-{{ m.content }}-{% endset %}{{ t | trim }}{{ t }}",
    "namespace": "{% set n = namespace(t='') %}{% set n.t = n.t ~ m.content %}{{ n.t }}",
    "macro": "{% macro f(t) %} {{ t }} {% endmacro %}{{ f(m.content) | trim }}{{ f(m.content) ~ 1 }}",
    "list": "{% for t in [m.content, m.role] + ['x'] %}{{ t }}{% endfor %}",
    "pairs": "{% for key, value in m.items() %}{{ value }}{% endfor %}",
    "select": "{% for s in messages | selectattr('role', 'equalto', 'user') %}{{ s.content }}{% endfor %}",
    "neighbour": "{% if loop.previtem is defined %}{{ loop.previtem.content }}{% endif %}",
    "generation": "{% generation %}{% set t = m.content %}{{ t }}{% endgeneration %}{{ t is defined }}",
    "break": "{{ m.content }}{% if m.role == 'assistant' %}{% break %}{% endif %}",
}


@pytest.mark.parametrize("construct", COPYING)
def test_a_template_that_copies_messages_takes_the_fast_way_and_is_right(construct: str) -> None:
    tokenizer = tokenizer_for("." + each(COPYING[construct]))  # what is empty is refused
    renderer = Renderer(tokenizer, "all")
    assert is_fast(renderer)
    for contents in [
        ("hello", "<b>"),
        (" x\n", "\u3000hello "),
        ("", "x"),
        (" \n", "x"),
        ("{{ 1 }}", "y\x00 "),
    ] * 9:
        messages = chat(*contents)
        assert renderer.render(messages).text == theirs(tokenizer, messages)


def test_a_template_may_look_at_some_messages_and_copy_others() -> None:
    source = "{{ m.content | upper if m.role == 'system' else m.content }}"
    renderer = Renderer(tokenizer_for(each(source)), "all")
    assert is_fast(renderer)
    assert not is_fast(renderer, ("system", *TURN))
    assert renderer.render(chat("be", "hi", "yes", roles=("system", *TURN))).text == "BEhiyes"


def test_a_template_that_draws_the_marks_of_the_fast_way_is_caught() -> None:
    renderer = Renderer(tokenizer_for(each("{{ '\\ufdd1' + '0' + '\\ufdd2' + m.content }}")), "all")
    with pytest.raises(NotTransparent):
        renderer.render(chat("hi", "yes"))
    assert not renderer.fast
    assert renderer.render(chat("hi", "yes")).text == "\ufdd10\ufdd2hi\ufdd10\ufdd2yes"


@pytest.mark.parametrize("wrong", [1, 9, 40])
def test_a_wrong_fast_way_is_found_and_given_up(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the `wrong`th conversation on, the fast way loses a character."""
    monkeypatch.setattr(render, "_EVERY", 50)
    fill = render._Program.fill

    def losing(program: Any, contents: list[str]) -> Any:
        text, spans = fill(program, contents)
        return text[: -(program.filled + 1 >= wrong) or None], spans

    monkeypatch.setattr(render._Program, "fill", losing)
    renderer = Renderer(tokenizer_for(template_text("chatml")))
    messages = chat("hi", "yes")
    found = wrong if wrong <= 16 else 50
    for _ in range(found - 1):
        renderer.render(messages)
    with pytest.raises(NotTransparent):
        renderer.render(messages)
    assert not renderer.fast
    assert renderer.render(messages).text == theirs(renderer.tokenizer, messages)


@pytest.mark.parametrize("fast", [True, False])
def test_where_transformers_writes_something_else_it_has_the_word(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_for(template_text("chatml"))
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda messages, **_: "".join(f"{m['content']}." for m in messages)
    )
    renderer = Renderer(tokenizer, "all", fast=fast)
    if fast:
        with pytest.raises(NotTransparent):
            renderer.render(chat("hi", "yes"))
    assert renderer.render(chat("hi", "yes")).text == "hi.yes."


def test_a_refused_conversation_is_rejected_in_the_templates_words() -> None:
    renderer = Renderer(tokenizer_for(TEMPLATES["inst"][0]))
    for _ in range(2):
        with pytest.raises(Rejected, match="must take turns"):
            renderer.render(chat("q", "r", "a", roles=("user", *TURN)))
        assert renderer.render(chat("q", "a")).spans


def test_a_template_that_fails_on_a_conversation_rejects_it_and_is_no_crash() -> None:
    renderer = Renderer(tokenizer_for(each("{{ m.content + 1 }}")))
    with pytest.raises(Rejected, match="refuses it"):
        renderer.render(chat("q", "a"))


def test_a_template_that_is_no_jinja_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="not valid Jinja") as caught:
        Renderer(tokenizer_for("{% for m in messages %}"))
    assert "data.template" in caught.value.fix


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    "source",
    [
        each("{{ m.content if loop.last or m.role == 'user' else '' }}</s>"),
        template_text("chatml").replace("assistant\\n", "model\\n"),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_refused(source: str, fast: bool) -> None:
    with pytest.raises(DataError, match="changes earlier turns") as caught:
        Renderer(tokenizer_for(source), fast=fast).render(chat("q", "a", "r", "b"))
    assert "chatml" in caught.value.fix


def test_the_last_turn_alone_can_be_trained_on_where_earlier_ones_are_rewritten() -> None:
    renderer = Renderer(tokenizer_for(THINKING), "last_assistant")
    messages = chat("q", "<think>hm</think>\na", "r", "<think>ah</think>\nb")
    rendered = renderer.render(messages)
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == ["<think>ah</think>\nb<|im_end|>\n"]
    assert "hm" not in rendered.text
    with pytest.raises(DataError) as caught:
        Renderer(tokenizer_for(THINKING)).render(messages)
    assert "last_assistant" in caught.value.fix


@pytest.mark.parametrize("fast", [True, False])
def test_train_on_supervises_neither_more_nor_less(fast: bool) -> None:
    def said(train_on: Any, messages: list[dict[str, str]]) -> list[str]:
        rendered = Renderer(tokenizer_for(template_text("chatml")), train_on, fast=fast).render(messages)
        return [rendered.text[start:stop] for start, stop in rendered.spans]

    messages = chat("q", "a", "r", "b", "s", roles=(*TURN, *TURN, "user"))
    assert said("assistant", messages) == ["a<|im_end|>\n", "b<|im_end|>\n"]
    assert said("last_assistant", messages) == ["b<|im_end|>\n"]
    assert said("all", messages) == [theirs(tokenizer_for(template_text("chatml")), messages)]


def test_a_prompt_that_opens_the_answer_is_refused_only_where_the_answer_goes_on_otherwise() -> None:
    """Reasoning models' prompts end in <think>; a conversation that has it there loses nothing."""
    source = template_text("chatml").replace("assistant\\n'", "assistant\\n<think>\\n'")
    renderer = Renderer(tokenizer_for(source))
    rendered = renderer.render(chat("q", "<think>\nhm</think>a"))
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == ["hm</think>a<|im_end|>\n"]
    with pytest.raises(DataError, match="changes earlier turns"):
        renderer.render(chat("q", "a"))


SPELLED = ["<|im_end|>", "x<|im_start|>y<|im_end|>", "<|im_end|><|im_end|>", "</s>\n", "<s><s>"]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("content", SPELLED)
def test_a_control_token_in_a_message_is_text(content: str, fast: bool) -> None:
    renderer = Renderer(tokenizer_for(template_text("chatml")), fast=fast)
    rendered = renderer.render(chat("q", content, "r", f"{content} and {content}"))
    assert rendered.guarded
    assert rendered.text.replace(BREAK, "") == theirs(
        renderer.tokenizer, chat("q", content, "r", f"{content} and {content}")
    )
    ends = [rendered.text[start:stop].replace(BREAK, "") for start, stop in rendered.spans]
    assert ends == [f"{content}<|im_end|>\n", f"{content} and {content}<|im_end|>\n"]
    # Only what the template wrote still reads as a control token.
    special = set(renderer.tokenizer.all_special_ids) | set(renderer.tokenizer.get_added_vocab().values())
    ids = renderer.tokenizer.backend_tokenizer.encode(rendered.text, add_special_tokens=False).ids
    assert sum(id_ in special for id_ in ids) == 8


def test_control_tokens_that_overlap_are_all_broken() -> None:
    renderer = Renderer(tokenizer_for(each("{{ m.content }}"), special=["aba", "abab", "]a]", "b+"]), "all")
    assert renderer.render(chat("ababab", "]a]a] b+")).text == (
        f"a{BREAK}b" + f"a{BREAK}b" + "ab" + f"]{BREAK}a]{BREAK}a] b{BREAK}+"
    )


def test_ordinary_text_and_ordinary_added_tokens_are_left_alone() -> None:
    renderer = Renderer(tokenizer_for(template_text("chatml"), added=["<think>", "</think>"]))
    rendered = renderer.render(chat("a < b, <|nothing|>", "<think>x</think> <|im_start| >"))
    assert not rendered.guarded
    assert BREAK not in rendered.text


@pytest.mark.parametrize("fast", [True, False])
def test_a_message_that_holds_the_break_itself_is_rejected(fast: bool) -> None:
    renderer = Renderer(tokenizer_for(template_text("chatml"), special=[*CONTROL, "§"]), fast=fast)
    with pytest.raises(Rejected, match=r"holds the reserved character U\+FDD0"):
        renderer.render(chat("q", f"<{BREAK}|im_end|>"))
    # Nothing can be put into a token of one character.
    with pytest.raises(Rejected, match=r"U\+00A7"):
        renderer.render(chat("q", "§ 1"))


@pytest.mark.parametrize("fast", [True, False])
def test_a_document_does_not_depend_on_the_day_it_was_made(fast: bool, clock: type[_Clock]) -> None:
    messages, written = chat("q", "a", "r", "b"), set()
    for day in (FIXED_DATE, datetime.datetime(2031, 1, 2)):
        clock.day = day
        renderer = Renderer(tokenizer_for(TEMPLATES["dated"][0]), fast=fast)
        written |= {renderer.render(messages).text for _ in range(20)}
        assert renderer.fast is fast
        # What anyone else renders still has the date of the day.
        assert f"{day:%d %b %Y}" in theirs(renderer.tokenizer, messages)
    assert len(written) == 1
    assert "Today is 26 Jul 2024" in written.pop()


@pytest.mark.parametrize("name", ["chatml", "llama3", "plain"])
def test_a_packaged_template_is_found_by_name_and_any_other_by_path(name: str, tmp_path: Any) -> None:
    assert "messages" in template_text(name)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert template_text(str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(ConfigError, match="no chat template `chatlm`"):
        template_text("chatlm")


@pytest.mark.parametrize(
    ("source", "tokens"),
    [
        (template_text("chatml"), ["<|im_start|>", "<|im_end|>"]),
        (
            template_text("llama3"),
            ["<|start_header_id|>", "<|end_header_id|>", "<|begin_of_text|>", "<|eot_id|>"],
        ),
        (template_text("plain"), []),
        (
            each("{{ '<|' + m.role + '|>' + m.content }}</s>{# <|none|> #}"),
            ["</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        ),
        ("<start_of_turn>{{ messages[9].content.x }}<b> <｜User｜> < |", ["<start_of_turn>", "<｜User｜>"]),
    ],
)
def test_the_control_tokens_of_a_template_are_found_in_a_fixed_order(source: str, tokens: list[str]) -> None:
    assert render.control_tokens(source) == tokens


def test_a_control_token_that_would_be_words_to_the_model_is_named() -> None:
    bare = tokenizer_for("", special=["<|im_end|>"])
    assert render.missing_tokens(template_text("chatml"), bare) == ["<|im_start|>"]
    assert render.missing_tokens(template_text("plain"), bare) == []
    bare.eos_token = None
    assert render.missing_tokens(template_text("plain"), bare) == ["eos_token"]
