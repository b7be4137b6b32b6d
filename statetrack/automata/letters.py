"""The names of letters, and texts as letters.

Legend: T letters of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from statetrack.errors import UsageError


def letter_names(names: Any, letters: int) -> tuple[str, ...]:
    """Check the names of so many letters."""
    names = tuple(names) if isinstance(names, Iterable) else (names,)
    if not all(isinstance(name, str) for name in names) or not len(set(names)) == len(names) == letters:
        raise UsageError(f"letters must be {letters} different strings (one per column), got {list(names)}")
    return names


def default_names(letters: int) -> tuple[str, ...]:
    r"""Return what unnamed letters are called in print: bytes as a, b, \n, \xff where there are 256, else numbers."""
    if letters == 256:
        return tuple(repr(bytes([byte]))[2:-1] for byte in range(256))
    return tuple(str(letter) for letter in range(letters))


def encode_bytes(text: str | bytes | Sequence[str]) -> Int[np.ndarray, "T"]:
    """Return the bytes of a text, UTF-8 if it is characters."""
    if not isinstance(text, str | bytes):
        text = "".join(text)
    try:
        data = text.encode("utf-8") if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise UsageError(f"text[{error.start}] = {text[error.start]!r} cannot be written in UTF-8") from None
    return np.frombuffer(data, dtype=np.uint8).astype(np.int64)


def encode_names(text: str | bytes | Sequence[str], names: tuple[str, ...]) -> Int[np.ndarray, "T"]:
    """Return the number of every letter of a text: of every character, or of every item of a sequence of names."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise UsageError(f"text[{error.start}] is not UTF-8 ({error.reason}), and the letters are characters") from None
    if isinstance(text, str):
        known = {ord(name): letter for letter, name in enumerate(names) if len(name) == 1}
        unknown = max(known, default=-1) + 1
        number = np.full(unknown + 1, -1)
        number[list(known)] = list(known.values())
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        letters = number[np.minimum(codes, unknown)]
    else:
        number_of = {name: letter for letter, name in enumerate(names)}
        letters = np.array([number_of.get(name, -1) for name in text], dtype=np.int64)
    if letters.size and letters.min() < 0:
        position = int(np.argmin(letters))
        raise UsageError(
            f"text[{position}] = {text[position]!r} is no letter; the letters are {', '.join(names):.80}"
            + (
                " (a letter with a longer name needs a list of names)"
                * (isinstance(text, str) and max(map(len, names)) > 1)
            )
        )
    return letters
