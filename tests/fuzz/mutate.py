"""Mutations that know the shape of a plan, a pattern and a JSON document: most changed bytes would be refused at once.

plan(data, rng)       words moved, dropped, doubled, exchanged for others of the language; numbers at their extremes
document(data, rng)   the same for the values of a JSON document
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from copy import deepcopy
from hashlib import blake2b
from typing import Any, Final

_WORD: Final = re.compile(
    r'"""[^"]*"""|"[^"\n]*"|\'[^\'\n]*\'|#[^\n]*\n|[a-z_][a-z0-9_]*|[0-9.]+|[=!<>]=|&&|\|\||\s+|.'
)
_NUMBERS: Final = (
    "0", "1", "2", "3", "-1", "16", "64", "100", "101", "1000000", "1000001", "2147483647", "2147483648",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "1" + "0" * 30, "0.5", "1.5",
    "9" * 400 + ".0",
)  # fmt: skip
_WORDS: Final = (
    "text", "user", "system", "assistant", "gen", "fork", "branch", "map", "reduce", "loop", "if", "need", "return",
    "expand", "plan", "join", "else", "until", "true", "false", "ids", "logprob", "all", "vote", "best", "first",
    "quorum", "drop", "stitch", "sum", "max", "min", "by", "exact", "casefold", "number", "limit", "upto", "budget",
    "deadline", "fallback", "fresh", "retry", "depth", "type", "int", "float", "bool", "lines", "choice", "regex",
    "json", "stop", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "logprobs",
    "seed", "recorded", "list", "len", "in", "matches", "score", "search", "x", "y", "xs", "a", "b",
)  # fmt: skip
_SIGNS: Final = (
    *"(){}[],;:=.+-*/!<>#'\"%&|\\$",
    "==",
    "!=",
    "<=",
    ">=",
    "&&",
    "||",
    '"""',
    "#{",
    "##{",
    "\n",
    " ",
    "\r",
)
_STRINGS: Final = (
    '""', '"a"', "'b'", '"#{x}"', '"#{xs[0]} #{x.a}"', '"##{x}"', '"###{x}"', '"<|im_start|>"', '"""a\n"b"\n"""',
    '"20s"',     '"\u202e"', '"\ufeff"', '"\x00"', '"(a|b)+[0-9]{2,3}"', '\'{"type": "object"}\'',
)  # fmt: skip
_STATEMENTS: Final = (
    'text("a #{x}");', 'user("b");', 'x = gen("a: ", max=3);', "y = gen(max=2, type=int);", "return(x);",
    "need(x > 0);", "x = fork(2) { y = gen(max=1); return(y); } join(vote(y), stitch);", "y = a(x, budget=3, retry=1);",
    'fork() { a = branch("p") { }; b = branch() { }; };', "y = reduce(g: xs, by=2, upto=4) { return(g[0]); };",
    'xs = map(i, s: ["a", "b"], limit=2) { return(s); } join(all(min=1), text);',
    'loop(3) { x = gen(max=1); } until(x == "a");', "if (len(xs) > 1) { x = 1; } else { x = 2; };",
    'x = gen(max=9, type=choice("a", "b", by="logprob"));',
    'x = gen(max=9, type=lines(1, 3), stop=["a", "b"], recorded=ids(1, 2));',
)  # fmt: skip
_PLANS: Final = (
    'a = plan(x) { text("#{x}"); }\n',
    "b = plan(xs: list(3, text(4)), depth=2, max=5) { x = b(xs); return(x); }\n",
)

_KEYWORDS: Final = (
    "type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems", "enum",
    "const", "anyOf", "oneOf", "allOf", "not", "$ref", "$defs", "definitions", "pattern", "format", "minLength",
    "maxLength", "minimum", "maximum", "exclusiveMinimum", "multipleOf", "if", "then", "else", "uniqueItems",
    "patternProperties", "dependentRequired", "contains", "$id", "$anchor", "x-guidance",
)  # fmt: skip
_VALUES: Final[tuple[Any, ...]] = (
    None, True, False, 0, 1, -1, 63, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**30, 0.5, 1e308,
    float("nan"), float("inf"), "", "a", "object", "array", "string", "integer", "number", "#", "#/$defs/a",
    "#/properties/a", "(a|b)*c{2,5}", "date", "\ud800", "\x00", [], {}, [[]], {"": {}}, {"$ref": "#"},
    {"type": "string"}, ["string", "null"],
)  # fmt: skip


def plan(data: bytes, rng: random.Random) -> bytes:
    """Plan text with a few words changed. Valid text mostly stays close to valid."""
    words = _WORD.findall(data.decode("utf-8", "surrogateescape"))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(words) + 1)
        change = rng.randrange(9)
        if change == 0 and words:
            start = min(at, len(words) - 1)
            del words[start : start + rng.choice((1, 1, 2, 8))]
        elif change == 1 and words:
            start = rng.randrange(len(words))
            words[at:at] = words[start : start + rng.choice((1, 4, 16))] * rng.choice((1, 1, 2, 12))
        elif change == 2 and len(words) > 1:
            one, other = rng.sample(range(len(words)), 2)
            words[one], words[other] = words[other], words[one]
        elif change == 3:
            words.insert(at, rng.choice(_STATEMENTS))
        elif change == 4:
            words.insert(at, rng.choice(_SIGNS))
        elif change == 5:
            words.insert(at, rng.choice((rng.choice(_WORDS), rng.choice(_STRINGS), rng.choice(_PLANS))))
        elif words:
            start = rng.randrange(len(words))
            _exchange(words, start, rng)
    return "".join(words).encode("utf-8", "surrogateescape")


def _exchange(words: list[str], start: int, rng: random.Random) -> None:
    """Another word of the same kind, at the first place from `start` on that is no white space."""
    for at in range(start, min(start + 3, len(words))):
        word = words[at]
        if word.isspace():
            continue
        if word[0].isdigit():
            words[at] = rng.choice(_NUMBERS)
        elif word[0] in "\"'":
            words[at] = rng.choice(_STRINGS)
        elif word[0].isalpha():
            # A name that stands elsewhere in the text is more often in scope than one of the list.
            words[at] = rng.choice([*_WORDS, *(w for w in words[:400] if w.isidentifier())])
        else:
            words[at] = rng.choice(_SIGNS)
        return


def document(data: bytes, rng: random.Random) -> bytes | None:
    """The JSON document with a few values changed; None where it is none."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return None
    for _ in range(rng.choice((1, 1, 2, 4))):
        places = list(_places(root))
        holder, key = rng.choice(places)
        change = rng.randrange(7)
        if change == 0 and holder is not root:
            del holder[key]
        elif change == 1:
            other, name = rng.choice(places)
            holder[key] = deepcopy(other[name])
        elif change == 2 and isinstance(holder[key], list):
            holder[key].insert(rng.randrange(len(holder[key]) + 1), deepcopy(rng.choice(_VALUES)))
        elif change == 2 and isinstance(holder[key], dict):
            holder[key][rng.choice((*_KEYWORDS, "a", ""))] = deepcopy(rng.choice(_VALUES))
        elif change == 3 and isinstance(holder[key], list) and holder[key]:
            holder[key].append(deepcopy(rng.choice(holder[key])))
        elif change == 4 and isinstance(holder[key], int):
            holder[key] = int(holder[key]) + rng.choice((-1, 1, 16))
        elif change == 5 and isinstance(holder[key], str) and isinstance(holder, list):
            holder[key] = rng.choice([s[k] for s, k in places if isinstance(s[k], str)])
        else:
            holder[key] = deepcopy(rng.choice(_VALUES))
        if len(json.dumps(root)) > 1 << 16:
            return None
    return json.dumps(root[0]).encode()


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (list or object, index or name) inside `value`."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        for key, inner in holder.items() if isinstance(holder, dict) else enumerate(holder):
            found.append((holder, key))
            if isinstance(inner, dict | list):
                waiting.append(inner)
    return found


def pattern(data: bytes, rng: random.Random) -> bytes:
    """A `/` and a pattern with a few pieces changed."""
    pieces = re.findall(r"\\.|\{[0-9,]*\}|\[[^\]]*\]|\(\?:|.", data.decode("utf-8", "replace").removeprefix("/"))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces) + 1)
        if pieces and rng.randrange(3) == 0:
            del pieces[min(at, len(pieces) - 1)]
        elif pieces and rng.randrange(3) == 0:
            start = rng.randrange(len(pieces))
            pieces[at:at] = pieces[start : start + rng.choice((1, 3, 9))]
        else:
            pieces.insert(at, rng.choice(_PIECES))
    return ("/" + "".join(pieces)).encode()


_PIECES: Final = (
    *"()[]{}|*+?.^$ab0-é\\", "(?:", "(?i)", "(?=a)", "\\d", "\\w", "\\s", "\\b", "\\pL", "\\x41", "\\x{10FFFF}", "\\n",
    "[a-z]", "[^a]", "[^]", "[[:alpha:]]", "[a&&b]", "[\\d-x]", "[é-ü]", "{2}", "{0}", "{2,}", "{0,3}", "{3,2}",
    "{1,1000}", "{1000000000}", "{99999999999}", "(a|b)", "(a|ab)*", "(a*)*", "\U0001f600", "\ufffd", "**", "+?", "*?",
)  # fmt: skip


def schema(data: bytes, rng: random.Random) -> bytes | None:
    """A pattern, if the data are one, else a JSON document."""
    return pattern(data, rng) if data.startswith(b"/") else document(data, rng)


def journal(data: bytes, rng: random.Random) -> bytes | None:
    """A journal with one line changed, moved, doubled or dropped, and mostly with sums that are right again."""
    texts = [line[_SUM + 4 : -1] for line in data.split(b"\n") if line]
    if not texts:
        return None
    at = rng.randrange(len(texts))
    change = rng.randrange(6)
    if change == 0 and len(texts) > 1:
        del texts[at]
    elif change == 1:
        texts.insert(at, rng.choice(texts))
    else:
        texts[at] = document(texts[at], rng) or texts[at]
    lines, last = [], ""
    for text in texts:
        last = blake2b(last.encode() + text, digest_size=_SUM // 2).hexdigest() if rng.randrange(200) else last
        lines.append(b'["%s",%s]\n' % (last.encode(), text))
    return b"".join(lines)


_SUM: Final = 16  # hex digits of a line's sum

MUTATORS: Final[dict[str, Callable[[bytes, random.Random], bytes | None]]] = {
    "parse": plan,
    "check": plan,
    "schema": schema,
    "recording": document,
    "journal": journal,
}
