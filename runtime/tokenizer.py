"""Text to token ids and back, exactly: which text may form a special token is decided here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import llguidance
import tokenizers

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.config import bad_model, read_json
from anabranch.runtime.weights import GgufFile

Piece: TypeAlias = tuple[str, bool]
"""(text, is_literal): a special token is formed only from text that the plan's author wrote, which is literal."""


class Tokenizer:
    """A BPE tokenizer in the `tokenizers` library's JSON form, byte-level or SentencePiece-like.

    vocab_size: ids are below it
    bos_id: the start token, None unless the model's own tokenizer begins a text with it
    eos_ids: the end-of-turn tokens
    chat_template: Jinja source, None for a model without one
    template_names: what a chat template may call `bos_token`, `eos_token` and so on
    specials: special tokens by text
    """

    def __init__(
        self,
        spec: Mapping[str, Any],
        *,
        eos_ids: Iterable[int],
        bos_id: int | None = None,
        chat_template: str | None = None,
        template_names: Mapping[str, str] | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        """spec: the JSON of a `tokenizer.json`. Raises PlanError `bad-model` if it cannot be used."""
        self._spec = dict(spec)
        self.template_names = dict(template_names or {})
        self._where = where
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        self.chat_template = chat_template
        try:
            model, added = self._spec["model"], self._spec.get("added_tokens") or []
            if model.get("type", "BPE") != "BPE":
                raise bad_model(where, f"tokenizer type `{model['type']}` is not supported, only `BPE`")
            # A marker such as `<think>` is one token though not declared special; runs of spaces are text.
            self.specials: dict[str, int] = {t["content"]: t["id"] for t in added if t["content"].strip()}
            self._hidden = frozenset(t["id"] for t in added if t.get("special"))
            self._texts: dict[int, str] = {i: t for t, i in model["vocab"].items()}
            self._texts.update({t["id"]: t["content"] for t in added})
            self.vocab_size = max(self._texts) + 1
            self._prefix = _space_prefix(self._spec)
            self._plain = tokenizers.Tokenizer.from_str(json.dumps(_plain_spec(self._spec, self.specials)))
        except PlanError:
            raise
        except Exception as error:  # `tokenizers` raises bare Exception
            raise bad_model(where, f"the tokenizer cannot be read ({type(error).__name__}: {error})") from None
        by_length = sorted(self.specials, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, by_length))) if by_length else None

    @staticmethod
    def from_folder(folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`."""
        path = folder / "tokenizer.json"
        spec = read_json(path)
        options = _read_optional(folder / "tokenizer_config.json")
        generation = _read_optional(folder / "generation_config.json")
        model = _read_optional(folder / "config.json")
        try:
            ids = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
            bos_id = _start_token(spec, options, ids)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise bad_model(path, f"the tokenizer cannot be read ({type(error).__name__}: {error})") from None
        eos_ids = {*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))}
        eos = ids.get(_content(options.get("eos_token")))
        if eos is not None:
            eos_ids.add(eos)
        if not eos_ids:
            raise bad_model(folder, "no end-of-turn token is named in its configuration")
        return Tokenizer(
            spec,
            eos_ids=eos_ids,
            bos_id=bos_id,
            chat_template=_chat_template(folder, options),
            template_names={k: _content(v) for k, v in options.items() if k.endswith("_token") and _content(v)},
            where=str(path),
        )

    @staticmethod
    def from_gguf(file: GgufFile) -> Tokenizer:
        """Rebuild SmolLM2's tokenizer from a GGUF file; other pre-tokenizers are refused by name."""
        kind = (file.metadata("tokenizer.ggml.model"), file.metadata("tokenizer.ggml.pre"))
        if kind != ("gpt2", "smollm"):
            raise bad_model(
                file.path,
                f"tokenizer `{kind[0]}` with pre-tokenizer `{kind[1]}` is not read from GGUF",
                "use the model's Hugging Face folder",
            )
        tokens: list[str] = file.metadata("tokenizer.ggml.tokens")
        types: list[int] = file.metadata("tokenizer.ggml.token_type")
        merges: list[str] = file.metadata("tokenizer.ggml.merges")
        names = {role: file.metadata(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")}
        if not (tokens and types and merges) or names["eos"] is None:
            raise bad_model(file.path, "its tokenizer has no tokens, token types, merges or end-of-turn token")
        if len(types) != len(tokens) or any(i is not None and i >= len(tokens) for i in names.values()):
            raise bad_model(file.path, "its tokenizer's tables do not agree in length")
        control = 3
        spec = byte_level_spec(
            tokens,
            [merge.split(" ") for merge in merges],
            [i for i, kind_ in enumerate(types) if kind_ == control],
            # llama.cpp's `smollm` splits digits one by one, which the file itself does not say.
            [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        )
        adds_bos = bool(file.metadata("tokenizer.ggml.add_bos_token"))
        return Tokenizer(
            spec,
            eos_ids=[names["eos"]],
            bos_id=names["bos"] if adds_bos else None,
            chat_template=file.metadata("tokenizer.chat_template"),
            template_names={f"{role}_token": tokens[i] for role, i in names.items() if i is not None},
            where=str(file.path),
        )

    @property
    def spec(self) -> Mapping[str, Any]:
        """The JSON of the `tokenizer.json`."""
        return self._spec

    def encode(self, pieces: Sequence[Piece], *, start: bool = False) -> list[int]:
        """The ids of a statement's text.

        The pieces are read as one text, split only at special tokens that stand whole in literal text; between those,
        literal and interpolated text is encoded together, and no special token is formed from it.
        start: the text opens the context, where a SentencePiece-like tokenizer puts a space before it
        """
        ids: list[int] = []
        run: list[str] = []
        prefixed = start

        def flush() -> None:
            text = _without_lone_surrogates("".join(run))
            run.clear()
            if text:
                ids.extend(self._plain.encode(self._prefix + text if prefixed else text, add_special_tokens=False).ids)

        for text, is_literal in _merged(pieces):
            at = 0
            for found in self._special_pattern.finditer(text) if is_literal and self._special_pattern else ():
                run.append(text[at : found.start()])
                flush()
                ids.append(self.specials[found.group()])
                prefixed = self._prefix_after_special
                at = found.end()
            run.append(text[at:])
        flush()
        return ids

    @cached_property
    def _prefix_after_special(self) -> bool:
        pre_tokenizer = self._spec.get("pre_tokenizer") or {}
        return bool(self._prefix) and pre_tokenizer.get("prepend_scheme") != "first"

    def token_bytes(self, id: int) -> bytes:
        """The exact bytes that a token stands for, b"" for a special token. Raises IndexError above the vocabulary."""
        return self._bytes[id]

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes of a run of tokens, special tokens left out; they may end in half a UTF-8 character."""
        return b"".join([self._bytes[i] for i in ids])

    def is_special(self, id: int) -> bool:
        """Whether the token is a control token, which stands for no text."""
        return id in self._hidden

    @cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        to_bytes = _byte_level_bytes if _is_byte_level(self._spec) else _sentencepiece_bytes
        marked = {i: t for t, i in self.specials.items()}
        out = []
        for i in range(self.vocab_size):
            text = self._texts.get(i, "")
            if i in self._hidden:
                out.append(b"")
            elif i in marked:
                out.append(text.encode())
            else:
                out.append(to_bytes(text))
        return tuple(out)

    def ll_tokenizer(self) -> llguidance.LLTokenizer:
        """The tokenizer as llguidance reads it, built on the first call (about a second for 49k tokens)."""
        return self._ll_tokenizer

    @cached_property
    def _ll_tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(json.dumps(self._spec), n_vocab=self.vocab_size, eos_token=sorted(self.eos_ids))


def byte_level_spec(
    tokens: Sequence[str],
    merges: Sequence[Sequence[str]],
    special_ids: Iterable[int],
    pre_tokenizers: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The JSON of a byte-level BPE tokenizer.

    tokens: by id, in the byte-level alphabet (specials as they are); merges: pairs, the first to be applied first
    """
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": tokens[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in special_ids
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [dict(p) for p in pre_tokenizers]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(merge) for merge in merges],
        },
    }


# Pairs that a small vocabulary merges, in order: English fragments; tokens that run over a word's, a sentence's or a
# line's end, so that stops fall inside a token; and pieces of UTF-8 characters, so that text ends inside one.
_BYTE_MERGES = (
    "t h  th e  Ġ the  Ġ t  i n  e r  a n  o n  Ġ a  r e  e s  o r  an d  in g  y es  n o  Ġ s  s Ġ  e Ġ  d Ġ  "
    ". Ġ  , Ġ  : Ġ  . Ċ  Ċ Ċ  u e  t r  tr ue  1 2  f a  Ã ©  â Ģ  âĢ Ļ  © Ġ  ] ]  Ġ Ġ"
)
BYTE_SPECIALS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BYTE_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """The random test model's: every byte, a few merges that make tokens of several bytes, and the special tokens."""
    alphabet = _byte_level_alphabet()
    merges = [pair.split() for pair in _BYTE_MERGES.split("  ")]
    tokens = [*alphabet, *dict.fromkeys(a + b for a, b in merges), *BYTE_SPECIALS]
    specials = range(len(tokens) - len(BYTE_SPECIALS), len(tokens))
    spec = byte_level_spec(
        tokens,
        merges,
        specials,
        [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}],
    )
    ids = dict(zip(BYTE_SPECIALS, specials, strict=True))
    return Tokenizer(
        spec,
        eos_ids=[ids["<|eos|>"], ids["<|im_end|>"]],
        bos_id=ids["<|bos|>"],
        chat_template=BYTE_TEMPLATE,
        template_names={"bos_token": "<|bos|>", "eos_token": "<|eos|>"},
        where="random",
    )


def _without_lone_surrogates(text: str) -> str:
    """Half of a surrogate pair, which JSON may hold and UTF-8 may not, as U+FFFD; a whole pair as its character."""
    if text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Adjacent pieces of one kind as one, so that a special token written across two literals is found."""
    out: list[Piece] = []
    for text, is_literal in pieces:
        if out and out[-1][1] == is_literal:
            out[-1] = (out[-1][0] + text, is_literal)
        else:
            out.append((text, is_literal))
    return out


def _space_prefix(spec: Mapping[str, Any]) -> str:
    """The space that a SentencePiece-like tokenizer puts before a text; "" for others."""
    normalizer, pre_tokenizer = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(s.get("type") == "Prepend" for s in steps):
        return " "
    if pre_tokenizer.get("type") == "Metaspace" and pre_tokenizer.get("prepend_scheme", "always") != "never":
        return " "
    return ""


def _plain_spec(spec: Mapping[str, Any], specials: Mapping[str, int]) -> dict[str, Any]:
    """The tokenizer with no special token, no space put before a text, and nothing added around one."""
    plain = dict(spec)
    model = spec["model"]
    # Under `ignore_merges` a word that is a token as it stands becomes that token: special tokens must leave.
    kept_specials = {model.get("unk_token")}
    vocab = {t: i for t, i in model["vocab"].items() if t not in specials or t in kept_specials}
    plain["model"] = {**model, "vocab": vocab}
    plain["added_tokens"] = [t for t in spec.get("added_tokens") or [] if t["content"] not in specials]
    plain["post_processor"] = plain["truncation"] = plain["padding"] = None
    normalizer, pre_tokenizer = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    if normalizer.get("type") == "Sequence":
        kept = [s for s in normalizer["normalizers"] if s.get("type") != "Prepend"]
        plain["normalizer"] = {**normalizer, "normalizers": kept}
    elif normalizer.get("type") == "Prepend":
        plain["normalizer"] = None
    if pre_tokenizer.get("type") == "Metaspace":
        plain["pre_tokenizer"] = {**pre_tokenizer, "prepend_scheme": "never"}
    return plain


def _read_optional(path: Path) -> Mapping[str, Any]:
    return read_json(path) if path.is_file() else {}


def _chat_template(folder: Path, options: Mapping[str, Any]) -> str | None:
    """The Jinja source: a file of its own, or an option, which may hold several by name."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise bad_model(path, str(error)) from None
    template = options.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _content(token: object) -> str:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _ids(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _start_token(spec: Mapping[str, Any], options: Mapping[str, Any], ids: Mapping[str, int]) -> int | None:
    """The token that the model's own tokenizer puts before a text, by its post-processor or its configuration."""
    processor = spec.get("post_processor") or {}
    for step in processor.get("processors", [processor]):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            first = step["single"][0].get("SpecialToken")
            if first:
                return ids.get(first["id"])
    if options.get("add_bos_token") is True:
        return ids.get(_content(options.get("bos_token")))
    return None


def _is_byte_level(spec: Mapping[str, Any]) -> bool:
    decoder = spec.get("decoder") or {}
    return any(d.get("type") == "ByteLevel" for d in decoder.get("decoders", [decoder]))


def _byte_level_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary (Radford et al. 2019).

    Bytes that print in Latin-1 stand for themselves; the others, in order, for the characters from U+0100.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printing]
    return [chr(b) if b in printing else chr(0x100 + others.index(b)) for b in range(256)]


_BYTE_OF = {c: b for b, c in enumerate(_byte_level_alphabet())}
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF[c] for c in token])
    except KeyError:
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    fallback = _FALLBACK.fullmatch(token)
    return bytes([int(fallback[1], 16)]) if fallback else token.replace("▁", " ").encode()
