"""Parity and modular arithmetic (Grazzi et al., arXiv 2411.12537, section 5.1 and appendix E.1).

A sequence of length L holds its answer as its last token; the inputs are the L - 1 tokens before it, and the one
supervised position is the last of the question (parity: the last bit; arithmetic: `=`). Targets are the answer's token,
so the outputs are the whole vocabulary, as in the authors' generator. There is no BOS token. A range (lo, hi) of
lengths gives T = hi - 1. Tokens after the supervised position are padding.

Legend: B batch, T input tokens, L length with the answer, t tokens of one piece, N spans of one level of brackets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Int

from statetrack.automata import Automaton
from statetrack.tasks.base import IGNORE, Batch, RegularTask, Task, check_flag, check_positive, draw_integers

MODULUS = 5


@final
class Parity(RegularTask):
    """L - 1 fair bits (tokens 1 and 2); the answer is 1 + (number of 2s mod 2). Train on L 3..40, test on 40..256."""

    name = "parity"
    symbols = ("[PAD]", "0", "1")
    vocab_size = num_outputs = 3
    supervision = "last"
    chance = 1 / 2
    shortest = 2

    def __init__(self) -> None:
        table = [[0, 0, 1], [1, 1, 0]]  # padding and a zero keep the state, a one flips it
        self.automaton = Automaton(np.array(table), output=np.array([1, 2]), letters=self.symbols)

    def tokens(self, length: int | Sequence[int]) -> int:
        """Return hi - 1: the answer is not an input."""
        return self.length_range(length)[1] - 1

    def draw_ends(self, generator: torch.Generator, batch: int, lo: int, hi: int) -> Int[np.ndarray, "B"]:
        """L uniform in lo..hi; L - 1 bits."""
        return draw_integers(generator, lo, hi, batch) - 1

    def draw_tokens(
        self, generator: torch.Generator, position: Int[np.ndarray, "t 1"], ends: Int[np.ndarray, "B"]
    ) -> Int[np.ndarray, "t B"]:
        """Draw fair bits."""
        bits = draw_integers(generator, 1, 2, len(position), len(ends))
        return np.where(position < ends, bits, 0)


@final
class ModularArithmetic(RegularTask):
    """Digits mod 5 joined by + - * with the usual precedence, then `=`: a regular language.

    L = 2 U - 1 with U uniform in (lo + 1) // 2 .. (hi + 1) // 2, so L is odd: 3..39 for (3, 40), 39..255 for (40, 256).
    """

    name = "modular_arithmetic"
    symbols = ("[PAD]", "+", "-", "*", "=", "0", "1", "2", "3", "4")
    vocab_size = num_outputs = 10
    supervision = "last"
    chance = 1 / MODULUS
    shortest = 3

    def __init__(self) -> None:
        self.automaton = _arithmetic_automaton(self.symbols)

    def tokens(self, length: int | Sequence[int]) -> int:
        """Return hi - 1: the answer is not an input."""
        return self.length_range(length)[1] - 1

    def draw_ends(self, generator: torch.Generator, batch: int, lo: int, hi: int) -> Int[np.ndarray, "B"]:
        """Odd L; L - 1 tokens up to and including `=`."""
        return 2 * draw_integers(generator, (lo + 1) // 2, (hi + 1) // 2, batch) - 2

    def draw_tokens(
        self, generator: torch.Generator, position: Int[np.ndarray, "t 1"], ends: Int[np.ndarray, "B"]
    ) -> Int[np.ndarray, "t B"]:
        """Draw a digit at even positions and an operation at odd ones; the last token is `=`."""
        number = draw_integers(generator, 0, 3 * MODULUS - 1, len(position), len(ends))
        drawn = np.where(position % 2 == 0, 5 + number % MODULUS, 1 + number // MODULUS)
        return np.where(position < ends - 1, drawn, np.where(position == ends - 1, 4, 0))


def _arithmetic_automaton(symbols: tuple[str, ...]) -> Automaton:
    """Keep (sum of the finished terms, current term, pending operation); the output is the token of sum + term.

    `=` and padding change nothing. Two digits in a row, which never occur, read as a sum.
    """
    m, operations = MODULUS, ("+", "-", "*")
    table = np.zeros((m * m * 3, len(symbols)), dtype=np.int64)
    output = np.zeros(m * m * 3, dtype=np.int64)

    def index(total: int, term: int, operation: int) -> int:
        return (total % m * m + term % m) * 3 + operation

    for total, term, pending in np.ndindex(m, m, 3):
        state = index(total, term, pending)
        output[state] = symbols.index("0") + (total + term) % m
        for letter, symbol in enumerate(symbols):
            if symbol in operations:
                table[state, letter] = index(total, term, operations.index(symbol))
            elif symbol.isdigit() and operations[pending] == "*":
                table[state, letter] = index(total, term * int(symbol), 0)
            elif symbol.isdigit():
                sign = 1 if operations[pending] == "+" else -1
                table[state, letter] = index(total + term, sign * int(symbol), 0)
            else:
                table[state, letter] = state
    return Automaton(table, output=output, letters=symbols).minimise()


class _Level(NamedTuple):
    """The spans at one depth of all expressions of a batch: values of the leaves, and which spans have children."""

    values: Int[np.ndarray, "N"]
    inner: Int[np.ndarray, "M"]
    operation: Int[np.ndarray, "M"]


@final
class ModularArithmeticBrackets(Task):
    """Fully bracketed expressions mod 5 of exactly L - 3 tokens, then `=`, the answer and one padding token.

    gen(n) = `t`, `- t`, `( t )`, `( - t )` for n = 1..4 with a uniform digit t, else `( gen(l) op gen(n - 3 - l) )`
    with l uniform in 1..n-4 and op uniform in + - *, or in + - without `mult`. L = max(uniform in lo..hi, 5).

    `mult` is on by default: the main results of the paper ("with brackets", Table 3) are reached only with it (always
    answering 0 then scores 0.12, as its weakest rows do), although the released generator has it off by default; the
    last column of Table 5 has no multiplication. The language is context-free, so no automaton solves it.
    """

    symbols = ("0", "1", "2", "3", "4", "+", "-", "*", "(", ")", "=", "[PAD]")
    vocab_size = num_outputs = 12
    supervision = "last"
    chance = 1 / MODULUS

    def __init__(self, mult: bool = True) -> None:
        check_flag("mult", mult)
        self.mult = mult
        self.name = "modular_arithmetic_brackets" if mult else "modular_arithmetic_brackets_no_mult"

    def tokens(self, length: int | Sequence[int]) -> int:
        """Return max(hi, 5) - 1."""
        return max(self.length_range(length)[1], 5) - 1

    def sample(self, generator: torch.Generator, batch: int, length: int | Sequence[int]) -> Batch:
        """Draw `batch` expressions, all of them one level of brackets after the other."""
        check_positive("batch", batch)
        tokens = self.tokens(length)
        question = np.maximum(draw_integers(generator, *self.length_range(length), batch), 5) - 3
        inputs = np.full((batch, tokens), self.symbols.index("[PAD]"))
        first = np.arange(batch) * tokens  # where each row starts in the flat array
        levels = self._write(generator, inputs.reshape(-1), first, question)
        row = np.arange(batch)
        inputs[row, question] = self.symbols.index("=")
        inputs[row, question + 1] = 0  # the authors' generator overwrites the answer by token 0
        targets = np.full((batch, tokens), IGNORE)
        targets[row, question] = _evaluate(levels)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _write(
        self, generator: torch.Generator, flat: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> list[_Level]:
        """Fill spans (start, length) of `flat` with expressions; return the tree, the root level first.

        The children of the M inner spans of a level are the 2 M spans of the next: all left ones, then all right ones.
        """
        minus, opening, closing = (self.symbols.index(s) for s in "-()")
        levels = []
        while len(start):
            is_leaf = length < 5
            leaf, inner = np.flatnonzero(is_leaf), np.flatnonzero(~is_leaf)

            at, size = start[leaf], length[leaf]
            digit = draw_integers(generator, 0, MODULUS - 1, len(leaf))
            negative, wrapped = size % 2 == 0, size >= 3
            flat[at + wrapped + negative] = digit
            flat[(at + wrapped)[negative]] = minus
            flat[at[wrapped]] = opening
            flat[(at + size - 1)[wrapped]] = closing
            values = np.zeros(len(start), dtype=np.int64)
            values[leaf] = np.where(negative, -digit, digit)

            at, size = start[inner], length[inner]
            uniform = torch.rand(len(inner), generator=generator, dtype=torch.float64).numpy()
            left = 1 + (uniform * (size - 4)).astype(np.int64)
            operation = draw_integers(generator, 0, 2 if self.mult else 1, len(inner))
            flat[at] = opening
            flat[at + 1 + left] = self.symbols.index("+") + operation
            flat[at + size - 1] = closing
            levels.append(_Level(values, inner, operation))
            start, length = np.concatenate([at + 1, at + 2 + left]), np.concatenate([left, size - 3 - left])
        return levels


def _evaluate(levels: list[_Level]) -> Int[np.ndarray, "B"]:
    """Return the value mod 5 of every root, from the deepest level up."""
    below = np.zeros(0, dtype=np.int64)
    for values, inner, operation in reversed(levels):
        left, right = below[: len(inner)], below[len(inner) :]
        values[inner] = np.choose(operation, [left + right, left - right, left * right])
        below = values % MODULUS
    return below
