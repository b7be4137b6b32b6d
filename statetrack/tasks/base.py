"""What a task is: a seeded stream of sequences with their answers, at the positions that are supervised.

Legend: B batch, T tokens of a batch, L the paper's sequence length (T is a function of it), t tokens of one piece.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.errors import UsageError

IGNORE = -1
"""The target of a position that is not supervised; `torch.nn.functional.cross_entropy(..., ignore_index=IGNORE)`."""

Supervision = Literal["last", "every"]
Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]


class Task(ABC):
    """Sequences of tokens 0..vocab_size-1 whose supervised positions have one right answer in 0..num_outputs-1.

    A length is an int, or a pair (lo, hi): then each sequence draws its own uniformly from lo..hi, both included, and
    is padded on the right, so that the shape depends on hi alone. Inputs and targets are int64; targets are -1 where
    nothing is supervised. The same generator state gives the same bits.
    """

    name: str
    vocab_size: int
    num_outputs: int
    supervision: Supervision
    """"last": one answer per sequence, at its last token; "every": one after every token"""
    chance: float
    """the accuracy of guessing uniformly among the possible answers"""
    symbols: tuple[str, ...]
    """how each input token is printed"""
    bos: bool = False
    """whether position 0 holds a beginning-of-sequence token"""
    shortest: int = 1
    """the smallest length accepted"""

    @abstractmethod
    def tokens(self, length: int | Sequence[int]) -> int:
        """Return T, the number of input tokens (padding and BOS included) that `sample` gives for this length."""

    @abstractmethod
    def sample(self, generator: torch.Generator, batch: int, length: int | Sequence[int]) -> Batch:
        """Draw `batch` sequences: inputs [B T] and targets [B T]."""

    def stream(
        self, generator: torch.Generator, batch: int, length: int | Sequence[int], chunk: int
    ) -> Iterator[Batch]:
        """Yield what `sample` would return, in consecutive pieces of at most `chunk` tokens."""
        check_positive("chunk", chunk)
        inputs, targets = self.sample(generator, batch, length)
        return zip(inputs.split(chunk, dim=1), targets.split(chunk, dim=1), strict=True)

    def length_range(self, length: int | Sequence[int]) -> tuple[int, int]:
        """Return (lo, hi) of a length given as an int or as a pair; raise UsageError if it is neither, or too short."""
        pair = tuple(length) if isinstance(length, Sequence) else (length, length)
        if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair):
            raise UsageError(f"length must be an int or a pair (lo, hi) of ints, got {length!r}")
        lo, hi = pair
        if not self.shortest <= lo <= hi:
            raise UsageError(f"{self.name}: length must satisfy {self.shortest} <= lo <= hi, got lo = {lo}, hi = {hi}")
        return lo, hi


class RegularTask(Task):
    """A task that a finite automaton over the input vocabulary solves: the target is its output.

    Random numbers are drawn token position by token position, so any cut into pieces gives the same sequences, and a
    piece needs no more memory than its own tokens.
    """

    automaton: Automaton
    """reads the whole vocabulary; its output map gives the targets"""
    delay: int = 0
    """the target at position p is the automaton's output at p - delay"""

    @abstractmethod
    def draw_ends(self, generator: torch.Generator, batch: int, lo: int, hi: int) -> Int[np.ndarray, "B"]:
        """Draw the length of every sequence; return how many input tokens it has up to its last supervised one."""

    @abstractmethod
    def draw_tokens(
        self, generator: torch.Generator, position: Int[np.ndarray, "t 1"], ends: Int[np.ndarray, "B"]
    ) -> Int[np.ndarray, "t B"]:
        """Draw the tokens at some consecutive positions, padding at positions >= ends."""

    def sample(self, generator: torch.Generator, batch: int, length: int | Sequence[int]) -> Batch:
        """Draw `batch` sequences: inputs [B T] and targets [B T]."""
        return next(self.stream(generator, batch, length, self.tokens(length)))

    def stream(
        self, generator: torch.Generator, batch: int, length: int | Sequence[int], chunk: int
    ) -> Iterator[Batch]:
        """Yield what `sample` would return, in consecutive pieces of at most `chunk` tokens, in constant memory."""
        check_positive("batch", batch)
        check_positive("chunk", chunk)
        lo, hi = self.length_range(length)
        return self._pieces(generator, self.draw_ends(generator, batch, lo, hi), self.tokens(length), chunk)

    def _pieces(self, generator: torch.Generator, ends: np.ndarray, tokens: int, chunk: int) -> Iterator[Batch]:
        emits = self.automaton.emits
        state = np.full(len(ends), self.automaton.start)
        late = np.full((len(ends), self.delay), emits[self.automaton.start])  # outputs not yet due
        for begin in range(0, tokens, chunk):
            position = np.arange(begin, min(begin + chunk, tokens))[:, None]
            inputs = self.draw_tokens(generator, position, ends).T
            states = self.automaton.run(inputs, state)
            state = states[:, -1]
            answers = emits[states]
            if self.delay:
                answers = np.concatenate([late, answers], axis=1)
                answers, late = answers[:, : len(position)], answers[:, len(position) :]
            if self.supervision == "last":
                asked = position.T == ends[:, None] - 1
            else:
                asked = (self.bos <= position.T) & (position.T < ends[:, None])
            targets = np.where(asked, answers, IGNORE)
            yield torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(np.ascontiguousarray(targets))


def check_positive(name: str, value: int) -> None:
    """Reject a count that is not an integer >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UsageError(f"{name} must be an integer >= 1, got {value!r}")


def check_flag(name: str, value: bool) -> None:
    """Reject anything but True and False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, got {value!r}")


def draw_integers(generator: torch.Generator, low: int, high: int, *shape: int) -> np.ndarray:
    """Draw integers uniformly from low..high, both included."""
    return torch.randint(low, high + 1, shape, generator=generator).numpy()
