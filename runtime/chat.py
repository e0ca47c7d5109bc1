"""A model's chat template, taken apart once into the texts that open and close each turn.

The template is rendered with sentinels for the messages' contents, and what stands around them are the pieces. They are
right only if pieces in a row are what the template gives for the whole conversation; that is checked on several shapes
of conversation, and a template that fails is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Literal, NoReturn, Protocol, TypeAlias

import jinja2
import jinja2.ext
import jinja2.sandbox

from anabranch.dsl.diagnostics import Diagnostic, PlanError
from anabranch.runtime.tokenizer import Piece, Tokenizer

Role: TypeAlias = Literal["user", "system", "assistant"]

# Each ends in a generation prompt, as a context does when a model goes on from it.
_SHAPES: tuple[tuple[Role, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
    ("user", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
    ("user", "system", "user"),
)


class Chat(Protocol):
    """How turns are written."""

    def turn(self, role: Role, content: Sequence[Piece], *, first: bool, open: bool) -> list[Piece]:
        """A whole turn.

        first: nothing stands before it
        open: an assistant's turn stands open before it, and is closed first
        Raises PlanError `bad-template` if the template has no such turn.
        """
        ...

    def open_assistant(self, *, first: bool) -> list[Piece]:
        """What opens the assistant's turn for a `gen`, `text` or `fork`."""
        ...


class RawChat:
    """No template: each turn is its content and a newline."""

    def turn(self, role: Role, content: Sequence[Piece], *, first: bool, open: bool) -> list[Piece]:
        return [*content, ("\n", True)]

    def open_assistant(self, *, first: bool) -> list[Piece]:
        return []


@dataclass(frozen=True, slots=True)
class _Turn:
    opening: str
    closing: str


@dataclass(frozen=True, slots=True)
class TemplateChat:
    """The pieces of a template.

    first, later: by role, for a turn with nothing before it and for any other; a role that the template refuses in that
        place, or writes in a way that does not concatenate, is absent
    generation: opens the assistant's turn; generation_first: the same with nothing before it
    assistant_closing: ends the assistant's turn
    """

    first: Mapping[Role, _Turn]
    later: Mapping[Role, _Turn]
    generation: str
    generation_first: str
    assistant_closing: str
    where: str = field(default="", compare=False)

    def turn(self, role: Role, content: Sequence[Piece], *, first: bool, open: bool) -> list[Piece]:
        found = (self.first if first else self.later).get(role)
        if found is None:
            place = "the first turn" if first else "a later turn"
            raise _bad_template(self.where, f"it has no `{role}` as {place}")
        closing = self.assistant_closing if open else ""
        return _pieces((closing + found.opening, True), *content, (found.closing, True))

    def open_assistant(self, *, first: bool) -> list[Piece]:
        return _pieces((self.generation_first if first else self.generation, True))


def read_chat(tokenizer: Tokenizer, where: str) -> Chat:
    """The pieces of the tokenizer's chat template; `RawChat` for a model without one.

    where: the model's name, for errors
    Raises PlanError `bad-template` if the template does not render or its pieces do not concatenate.
    """
    if tokenizer.chat_template is None:
        return RawChat()
    return _checked(_take_apart(_Renderer(tokenizer, where)), tokenizer)


def _take_apart(render: _Renderer) -> TemplateChat:
    opening, user_closing = render.parts("user", generate=False)
    _, prompt = render.parts("user", generate=True)
    _, _, assistant_closing = render.parts("user", "assistant", generate=False)
    _, _, between, _ = render.parts("user", "assistant", "user", generate=False)
    generation = render.after(user_closing, prompt)
    user = _Turn(render.after(assistant_closing, between), user_closing)
    first: dict[Role, _Turn] = {"user": _Turn(opening, user_closing)}
    later: dict[Role, _Turn] = {"user": user, "assistant": _Turn(generation, assistant_closing)}
    if (parts := render.try_parts("assistant", generate=False)) is not None:
        first["assistant"] = _Turn(parts[0], parts[1])
    # What stands between a system message and the user's is the one's closing and the other's opening.
    parts = render.try_parts("system", "user", generate=False)
    if parts is not None and parts[1].endswith(user.opening):
        first["system"] = _Turn(parts[0], parts[1].removesuffix(user.opening))
    parts = render.try_parts("user", "system", "user", generate=False)
    if parts is not None and parts[1].startswith(user_closing) and parts[2].endswith(user.opening):
        later["system"] = _Turn(parts[1].removeprefix(user_closing), parts[2].removesuffix(user.opening))
    alone = render.try_parts(generate=True)
    return TemplateChat(
        first=first,
        later=later,
        generation=generation,
        generation_first=generation if alone is None else alone[0],
        assistant_closing=assistant_closing,
        where=render.where,
    )


def _checked(chat: TemplateChat, tokenizer: Tokenizer) -> TemplateChat:
    """The pieces, shown to concatenate in every shape that the template renders, without a start token in them."""
    render = _Renderer(tokenizer, chat.where)
    for roles in _SHAPES:
        whole = render.text(roles, generate=True)
        if whole is None or not all(role in (chat.later if i else chat.first) for i, role in enumerate(roles)):
            continue
        if "".join(text for text, _ in _conversation(chat, roles)) != whole:
            raise _bad_template(chat.where, f"its pieces do not concatenate in a conversation of {', '.join(roles)}")
    if tokenizer.bos_id is None:
        return chat
    bos = tokenizer.template_names.get("bos_token", "")
    return replace(
        chat,
        first={role: replace(turn, opening=turn.opening.removeprefix(bos)) for role, turn in chat.first.items()},
        generation_first=chat.generation_first.removeprefix(bos),
    )


def _conversation(chat: TemplateChat, roles: Sequence[Role]) -> Iterator[Piece]:
    """A conversation as a context writes it: an assistant's turn is opened, filled, and closed by the next turn."""
    is_open = False
    for i, role in enumerate(roles):
        content: Piece = (_sentinel(i), True)
        if role == "assistant":
            yield from (*chat.open_assistant(first=i == 0), content)
            is_open = True
        else:
            yield from chat.turn(role, [content], first=i == 0, open=is_open)
            is_open = False
    yield from chat.open_assistant(first=False)


@dataclass(frozen=True)
class _Renderer:
    """Renders the template for conversations of sentinels."""

    tokenizer: Tokenizer
    where: str

    @cached_property
    def _template(self) -> jinja2.Template:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            return environment.from_string(self.tokenizer.chat_template or "")
        except jinja2.TemplateError as error:
            raise _bad_template(self.where, f"it is no Jinja template ({error})") from None

    def render(self, roles: Sequence[Role], *, generate: bool) -> str:
        """The conversation as the template writes it. Raises whatever the template does."""
        messages = [{"role": role, "content": _sentinel(i)} for i, role in enumerate(roles)]
        return self._template.render(
            messages=messages, add_generation_prompt=generate, tools=None, **self.tokenizer.template_names
        )

    def text(self, roles: Sequence[Role], *, generate: bool) -> str | None:
        """The conversation as the template writes it; None where the template refuses it."""
        try:
            return self.render(roles, generate=generate)
        except PlanError:
            raise
        except Exception:  # a template may fail in any way that Python code can
            return None

    def try_parts(self, *roles: Role, generate: bool) -> list[str] | None:
        """The texts around the contents; None where the template refuses the conversation or reorders it."""
        text = self.text(roles, generate=generate)
        return None if text is None else _split(text, len(roles))

    def parts(self, *roles: Role, generate: bool) -> list[str]:
        """As `try_parts`. Raises PlanError `bad-template` where that gives None."""
        conversation = f"a conversation of {', '.join(roles)}"
        try:
            parts = _split(self.render(roles, generate=generate), len(roles))
        except PlanError:
            raise
        except Exception as error:  # as in `text`
            raise _bad_template(self.where, f"it fails on {conversation} ({error})") from None
        if parts is None:
            raise _bad_template(self.where, f"it does not write each message of {conversation} once, in order")
        return parts

    def after(self, start: str, text: str) -> str:
        """`text` without `start`. Raises PlanError `bad-template` where it does not start so."""
        if not text.startswith(start):
            raise _bad_template(self.where, f"a turn that ends in {start!r} elsewhere goes on as {text!r}")
        return text.removeprefix(start)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _bad_template(where: str, reason: str) -> PlanError:
    return PlanError(
        Diagnostic("bad-template", f"cannot use the chat template of `{where}`: {reason}", help="`--template raw`")
    )


def _pieces(*pieces: Piece) -> list[Piece]:
    return [piece for piece in pieces if piece[0]]


def _sentinel(i: int) -> str:
    """Stands for the content of message i: a word that no template holds, and that trimming leaves as it is."""
    return f"Qz{i}contentzQ"


def _split(text: str, num_messages: int) -> list[str] | None:
    """The texts around the contents, in order; None unless each content stands there once, in order."""
    parts = []
    for i in range(num_messages):
        before, found, text = text.partition(_sentinel(i))
        if not found:
            return None
        parts.append(before)
    parts.append(text)
    return None if any("contentzQ" in part for part in parts) else parts
