"""The regular expressions that become token automata: a subset of Rust's syntax that is read here.

    either = seq ("|" seq)*          seq = (atom count?)*          count = "*" | "+" | "?" | "{n}" | "{n,}" | "{n,m}"
    atom   = "(" "?:"? either ")" | "." | class | character | escape

Read are characters, escaped punctuation, `\\n \\r \\t`, `\\d \\w \\s`, classes whose ranges and exclusions are ASCII,
and groups. A class escape stands for its ASCII members alone: a narrowing, so what is written is still a value of the
type. Everything else (anchors, flags, Unicode classes, look-around, class arithmetic) is not read, and llguidance
decides.
"""

from __future__ import annotations

from anabranch.runtime.automata import Chars, Either, Regex, Repeat, Seq, any_char_but, literal

MAX_NESTING = 64

_CLASSES = {
    "d": frozenset(b"0123456789"),
    "w": frozenset(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"),
    "s": frozenset(b" \t\n\v\f\r"),
}
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}
_SPECIAL = frozenset("()[]{}*+?|.^$\\")


class _NotReadError(Exception):
    """The pattern uses what is not in the subset."""


def parse_regex(pattern: str) -> Regex | None:
    """`pattern` as a regex, or None if it is outside the subset (or no pattern at all)."""
    reader = _Reader(pattern)
    try:
        regex = reader.either(0)
    except _NotReadError:
        return None
    return regex if reader.at == len(pattern) else None


class _Reader:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self) -> str:
        if self.at >= len(self.pattern):
            raise _NotReadError
        self.at += 1
        return self.pattern[self.at - 1]

    def accept(self, text: str) -> bool:
        if self.pattern.startswith(text, self.at):
            self.at += len(text)
            return True
        return False

    def either(self, depth: int) -> Regex:
        if depth > MAX_NESTING:
            raise _NotReadError
        parts = [self.seq(depth)]
        while self.accept("|"):
            parts.append(self.seq(depth))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def seq(self, depth: int) -> Regex:
        parts: list[Regex] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.counted(self.atom(depth)))
        return Seq(tuple(parts))

    def counted(self, atom: Regex) -> Regex:
        while self.peek() in ("*", "+", "?", "{") and self.peek():
            match self.take():
                case "*":
                    least, most = 0, None
                case "+":
                    least, most = 1, None
                case "?":
                    least, most = 0, 1
                case _:
                    least, most = self.braces()
            # A lazy mark changes which match is found, not which whole texts match.
            self.accept("?")
            atom = Repeat(atom, least, most)
        return atom

    def braces(self) -> tuple[int, int | None]:
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at : max(end, 0)].partition(",")
        if not (_is_count(low) and (not high or _is_count(high))):
            raise _NotReadError
        self.at = end + 1
        least = int(low)
        most = None if comma and not high else int(high or low)
        if most is not None and most < least:
            raise _NotReadError
        return least, most

    def atom(self, depth: int) -> Regex:
        char = self.take()
        if char == "(":
            if not self.accept("?:") and self.peek() == "?":
                raise _NotReadError
            inner = self.either(depth + 1)
            if not self.accept(")"):
                raise _NotReadError
            return inner
        if char == "[":
            return self.char_class()
        if char == ".":
            return any_char_but("\n")
        if char == "\\":
            return self.escape()
        if char in _SPECIAL:
            raise _NotReadError
        return literal(char)

    def escape(self) -> Regex:
        char = self.take()
        if char in _CLASSES:
            return Chars(_CLASSES[char])
        return literal(_unescaped(char))

    def char_class(self) -> Regex:
        """What follows a `[`."""
        negated = self.accept("^")
        allowed: set[int] = set()
        wide: list[str] = []
        first = True
        while first or self.peek() != "]":
            first = False
            char = self.take()
            if char in "[]" or self.pattern[self.at - 1 : self.at + 1] in ("&&", "--", "~~"):
                raise _NotReadError
            if char == "\\":
                char = self.take()
                if char in _CLASSES:
                    if negated:
                        raise _NotReadError
                    allowed |= _CLASSES[char]
                    continue
                char = _unescaped(char)
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("]", ""):
                self.take()
                last = self.take()
                if last == "\\":
                    last = _unescaped(self.take())
                elif last in "[]":
                    raise _NotReadError
                if not char <= last <= "\x7f":
                    raise _NotReadError
                allowed.update(range(ord(char), ord(last) + 1))
            elif char.isascii():
                allowed.add(ord(char))
            else:
                wide.append(char)
        self.take()
        if negated:
            if wide:
                raise _NotReadError
            return any_char_but(bytes(sorted(allowed)).decode("ascii"))
        if wide:
            return Either((Chars(frozenset(allowed)), *map(literal, wide)))
        return Chars(frozenset(allowed))


def _unescaped(char: str) -> str:
    """What `\\char` stands for outside the class escapes."""
    if char in _CONTROLS:
        return _CONTROLS[char]
    if char.isascii() and not char.isalnum() and char.isprintable() and char not in " <>":
        return char
    raise _NotReadError


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5
