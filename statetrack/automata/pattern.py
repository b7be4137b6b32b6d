"""The first pass of a regular expression: from what is written to Python's parse tree, over letters of any kind.

Legend: L letters.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from statetrack.errors import UsageError

_parser: Any = import_module("re._parser")  # the same tree from Python 3.11 on
UNBOUNDED = _parser.MAXREPEAT

FLAGS = {"i": re.IGNORECASE, "s": re.DOTALL, "x": re.VERBOSE}
REFUSED_FLAGS = {
    re.MULTILINE: "the multi-line flag m is not supported; for a text of lines see statetrack.automata.lines",
    re.LOCALE: "the locale flag L is not supported; classes such as \\w are ASCII",
    re.UNICODE: "the Unicode flag u is not supported; classes such as \\w are ASCII",
}

_UPPER, _LOWER = np.arange(ord("A"), ord("Z") + 1), np.arange(ord("a"), ord("z") + 1)
CATEGORIES = {
    "DIGIT": "0123456789",
    "SPACE": " \t\n\r\f\v",
    "WORD": "0123456789_abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
}


# --- letters ---------------------------------------------------------------------------------------------------------

PRIVATE = 0x100000  # code points that no standard uses: they stand for names longer than a character while parsing


@dataclass(frozen=True)
class Spelling:
    """How the letters are written: `names` (None for bytes), and the code point that stands for each."""

    names: tuple[str, ...] | None
    codes: Int[np.ndarray, "L"]

    @classmethod
    def of(cls, alphabet: str | Sequence[str]) -> Spelling:
        """Read the argument `alphabet` of `regex`."""
        if isinstance(alphabet, str) and alphabet == "bytes":
            return cls(None, np.arange(256))
        names = tuple(alphabet) if isinstance(alphabet, Iterable) else ()
        if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise UsageError(f"alphabet must be 'bytes' or different, non-empty letters, got {alphabet!r:.80}")
        codes = [ord(name) if len(name) == 1 else PRIVATE + i for i, name in enumerate(names)]
        return cls(names, np.array(codes))

    @cached_property
    def long_names(self) -> dict[str, str]:
        """<name> to the character that stands for it."""
        return {f"<{name}>": chr(PRIVATE + i) for i, name in enumerate(self.names or ()) if len(name) > 1}

    def read(self, pattern: str) -> str | bytes:
        """Return the pattern as Python's parser takes it: bytes, or text with one character per letter."""
        if self.names is None:
            for position, character in enumerate(pattern):
                if not character.isascii():
                    written = "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
                    raise _pointing(pattern, position, f"{character!r} is not ASCII; write its bytes: (?:{written})")
            return pattern.encode("ascii")
        if not self.long_names:
            return pattern
        for found in re.finditer(r"(?<!\(\?P)<[^<>=!]+>", pattern):
            if found[0] not in self.long_names and "<" not in self.names:
                letters = f"the letters are {', '.join(self.names):.80}"
                raise _pointing(pattern, found.start(), f"{found[0]} is no letter; {letters}")
        written = "|".join(re.escape(name) for name in self.long_names)
        return re.sub(rf"(?<!\(\?P)(?:{written})", lambda found: self.long_names[found[0]], pattern)

    def write(self, text: str) -> str:
        """Undo `read`."""
        for name, character in self.long_names.items():
            text = text.replace(character, name)
        return text

    def matches(self, op: str, value: Any, flags: int) -> Bool[np.ndarray, "L"]:
        """Return which letters one parsed item matches; op: LITERAL, NOT_LITERAL, ANY, IN, RANGE, CATEGORY."""
        if op == "ANY":
            return np.full(len(self.codes), True) if flags & re.DOTALL else self.codes != ord("\n")
        if op == "NOT_LITERAL":
            return ~self._among(value, value, flags)
        if op == "IN":
            negated = value[0][0].name == "NEGATE"
            matches = self._part if negated else self.matches
            return np.logical_or.reduce([matches(part.name, av, flags) for part, av in value[negated:]]) ^ negated
        if op != "CATEGORY":
            low, high = value if op == "RANGE" else (value, value)
            self._check_letters(low, high, flags)
        return self._part(op, value, flags)

    def _check_letters(self, low: int, high: int, flags: int) -> None:
        """Refuse characters low..high that are not all letters (with flag i, in one case or the other)."""
        for code in range(low, high + 1):
            if code not in self._letters and not self._among(code, code, flags).any():
                what = self.write(chr(code))
                within = f" ({self.write(chr(low))}-{self.write(chr(high))})" if low < high else ""
                letters = ", ".join(self.names or ())
                raise UsageError(f"{what!r} in the regex{within} is no letter; the letters are {letters:.80}")

    @cached_property
    def _letters(self) -> frozenset[int]:
        return frozenset(self.codes.tolist())

    def _part(self, op: str, value: Any, flags: int) -> Bool[np.ndarray, "L"]:
        """Which letters one item of a class matches; characters that are no letters match none."""
        if op == "CATEGORY":
            name = value.name.removeprefix("CATEGORY_")
            kind = name.removeprefix("NOT_")
            inside = np.isin(self.codes, [ord(character) for character in CATEGORIES[kind]])
            return ~inside if name != kind else inside
        low, high = value if op == "RANGE" else (value, value)
        return self._among(low, high, flags)

    def _among(self, low: int, high: int, flags: int) -> Bool[np.ndarray, "L"]:
        """Which letters lie in low..high, or, with flag i, have the other case there."""
        codes = self.codes
        inside = (low <= codes) & (codes <= high)
        if flags & re.IGNORECASE:
            case = np.isin(codes, _UPPER) * 32 - np.isin(codes, _LOWER) * 32
            inside |= (low <= codes + case) & (codes + case <= high)
        return inside


# --- parse -----------------------------------------------------------------------------------------------------------


def parse(text: str | bytes, flags: str, spelling: Spelling) -> tuple[Any, int]:
    """Return Python's parse tree and the flags that hold for all of it."""
    pattern = spelling.write(text if isinstance(text, str) else text.decode("ascii"))
    unknown = [flag for flag in flags if flag not in FLAGS]
    if unknown:
        raise UsageError(f"flag {unknown[0]!r} is not supported; accepted: {', '.join(FLAGS)}")
    bits = sum(FLAGS[flag] for flag in set(flags)) | (re.ASCII if isinstance(text, str) else 0)
    _refuse_posix_classes(pattern)
    try:
        with warnings.catch_warnings():  # of sets that a later Python may read otherwise, such as [[] and [a&&b]
            warnings.simplefilter("ignore", FutureWarning)
            tree = _parser.parse(text, bits)
    except re.error as error:
        before = text[: error.pos or 0]
        position = len(spelling.write(before)) if isinstance(before, str) else len(before)
        raise _pointing(pattern, position, spelling.write(error.msg)) from None
    except (OverflowError, RecursionError, ValueError) as error:
        if "UNICODE" in str(error):
            raise UsageError(f"regex: {REFUSED_FLAGS[re.UNICODE]}") from None
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UsageError(f"the regex {pattern!r:.80} is refused: {reason}") from None
    return tree, check_flags(tree.state.flags)


_SET = re.compile(r"\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^]\\])*\]", re.DOTALL)  # or an escaped character
_POSIX = re.compile(r"\\.|(\[:\w+:\])", re.DOTALL)


def _refuse_posix_classes(pattern: str) -> None:
    """Refuse [:alpha:] and the like, which Python reads as a set of these very characters."""
    for written in _SET.finditer(pattern):
        for found in _POSIX.finditer(pattern, *written.span()):
            if found[1]:
                said = f"{found[1]} is no class in Python's syntax; write its letters, as in [a-z]"
                raise _pointing(pattern, found.start(), said)


def check_flags(flags: int) -> int:
    """Return the flags, or refuse them by name."""
    for flag, reason in REFUSED_FLAGS.items():
        if flags & flag:
            raise UsageError(f"regex: {reason}")
    return flags


def _pointing(pattern: str, position: int, message: str) -> UsageError:
    """Show the line of the pattern that is wrong, at most 72 characters of it, and a caret under the place."""
    begin = pattern.rfind("\n", 0, position) + 1
    line = pattern[begin:].split("\n", 1)[0]
    column = position - begin
    cut = max(0, column - 48)
    shown = "".join(character if character.isprintable() else "·" for character in line[cut : cut + 72])
    return UsageError(f"regex: {message} at position {position}\n  {shown}\n  {' ' * (column - cut)}^")


def readings(tree: Any) -> int:
    """Count the letters of the pattern with counted repetitions written out (what is empty counts as one)."""
    total = 0
    for op, value in tree:
        if op.name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, items = value
            total += readings(items) * (max(low, 1) if high == UNBOUNDED else high)
        elif op.name == "SUBPATTERN":
            total += readings(value[3])
        elif op.name == "BRANCH":
            total += sum(readings(items) for items in value[1])
        else:
            total += 1
    return max(total, 1)
