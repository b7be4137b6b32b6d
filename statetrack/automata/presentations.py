"""The group of a presentation, by enumerating its elements (Todd and Coxeter 1936; strategy HLT, Holt 2005, chapter 5).

A word is a list of columns of the table: generator i is column 2i, its inverse 2i + 1, so x ^ 1 is the inverse of x.
"""

from __future__ import annotations

import re
from typing import NoReturn

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.exploration import explore
from statetrack.errors import UsageError

MAX_DEFINED = 100_000  # elements named while enumerating; many turn out to be equal
MAX_STEPS = 30_000_000  # columns followed: a few seconds
MAX_RELATOR = 10_000  # letters of a relator


def from_presentation(presentation: str) -> Automaton:
    """Return the word problem of a group given by generators and relators, such as "x, y | x^4, x^2 y^-2, y^-1 x y x".

    Letters are the generators; state 0 is the identity, every state is an element, and it is the output. A relator is a
    word of generators with spaces or * between them, powers x^-2, brackets (x y)^3 and commutators [x, y] = x^-1 y^-1
    x y; a relation may also be written x y = y x. Raises UsageError if the group is infinite, or too large to be
    enumerated within seconds.
    """
    generators, relators = _Reader(presentation).read()
    elements = _Elements(len(generators), presentation)
    element = 0
    while element < len(elements.rows):
        for relator in relators:
            if elements.alive(element):
                elements.close(element, relator)
        for column in range(2 * len(generators)):
            if elements.alive(element) and elements.rows[element][column] < 0:
                elements.define(element, column)
        element += 1
    states, table = explore(0, lambda q: elements.rows[q][::2], f"the group of the presentation {presentation!r:.80}")
    return Automaton(table, output=np.arange(len(states)), letters=tuple(generators))


class _Elements:
    """rows[q][x] = the element q x, or -1 where it is not known yet; equal elements are merged into the first."""

    def __init__(self, generators: int, presentation: str) -> None:
        self.width, self.presentation = 2 * generators, presentation
        self.rows = [[-1] * self.width]
        self.same = [0]  # an equal element with a smaller number, or itself
        self.steps = 0

    def alive(self, element: int) -> bool:
        """Whether it has not been merged into another."""
        return self.same[element] == element

    def define(self, element: int, column: int) -> None:
        """Name the element that `column` leads to."""
        new = len(self.rows)
        self._spend(0 if new < MAX_DEFINED else MAX_STEPS + 1)
        self.rows.append([-1] * self.width)
        self.same.append(new)
        self._join(element, column, new)

    def close(self, element: int, relator: list[int]) -> None:
        """Make the relator lead from the element back to itself, from both ends, naming what is missing between."""
        row, front, back, i, j = self.rows, element, element, 0, len(relator) - 1
        while True:
            before = j - i
            while i <= j and row[front][relator[i]] >= 0:
                front, i = row[front][relator[i]], i + 1
            while j >= i and row[back][relator[j] ^ 1] >= 0:
                back, j = row[back][relator[j] ^ 1], j - 1
            self._spend(before - (j - i) + 1)
            if i > j:
                return self._merge(front, back)
            if i == j:
                return self._join(front, relator[i], back)
            self.define(front, relator[i])

    def _spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            named = len(self.rows)
            raise UsageError(
                f"the group of the presentation {self.presentation!r:.80} is infinite or too large: gave up after "
                f"naming {named:,} elements, {sum(map(self.alive, range(named))):,} of them not known to be equal"
            )

    def _join(self, element: int, column: int, target: int) -> None:
        self.rows[element][column] = target
        self.rows[target][column ^ 1] = element

    def _first(self, element: int) -> int:
        while self.same[element] != element:
            self.same[element] = element = self.same[self.same[element]]
        return element

    def _merge(self, a: int, b: int) -> None:
        """Take two elements for one, and whatever follows from that."""
        equal = [(a, b)]
        while equal:
            kept, dropped = sorted(map(self._first, equal.pop()))
            if kept == dropped:
                continue
            self.same[dropped] = kept
            for column, target in enumerate(self.rows[dropped]):
                if target < 0:
                    continue
                self.rows[target][column ^ 1] = -1
                source, target = self._first(kept), self._first(target)
                if self.rows[source][column] >= 0:
                    equal.append((self.rows[source][column], target))
                elif self.rows[target][column ^ 1] >= 0:
                    equal.append((self.rows[target][column ^ 1], source))
                else:
                    self._join(source, column, target)


# --- reading ---------------------------------------------------------------------------------------------------------


class _Reader:
    """Read "x, y | relations": a relation is words with = between them, a word powers of generators and brackets."""

    def __init__(self, text: str) -> None:
        self.text = text
        inside = text.strip().removeprefix("<").removesuffix(">")
        names, bar, relations = inside.partition("|")
        self.generators = [name.strip() for name in names.split(",")]
        wrong = [name for name in self.generators if not re.fullmatch(r"[A-Za-z]\w*", name)]
        if not bar or wrong or len(set(self.generators)) < len(self.generators):
            self.fail("expected different names, a bar, and relations")
        self.tokens = re.findall(r"[A-Za-z]\w*|\d+|\*\*|\S", relations) + [""]
        self.at = 0

    def fail(self, reason: str) -> NoReturn:
        raise UsageError(f"presentation {self.text!r:.80}: {reason}; write it like 'x, y | x^4, x^2 y^-2, y^-1 x y x'")

    def read(self) -> tuple[list[str], list[list[int]]]:
        """Return the generators and the relators, those that are empty left out."""
        relators = []
        while self.tokens[self.at]:
            first = self.word()
            if self.tokens[self.at] != "=":
                relators.append(first)
            while self.take("="):
                relators.append(self.check(first + _inverse(self.word())))
            if not self.take(",") and self.tokens[self.at]:
                self.fail(f"cannot read {self.tokens[self.at]!r}")
        return self.generators, [relator for relator in relators if relator]

    def take(self, *tokens: str) -> bool:
        """Pass over the next token if it is one of these."""
        found = self.tokens[self.at] in tokens
        self.at += found
        return found

    def word(self) -> list[int]:
        """A product of powers."""
        word = self.power()
        while self.take("*") or self.tokens[self.at] in ("(", "[") or self.tokens[self.at][:1].isalnum():
            word = self.check(word + self.power())
        return word

    def power(self) -> list[int]:
        """An atom, and its exponent."""
        atom = self.atom()
        while self.take("^", "**"):
            negative, exponent = self.take("-"), self.tokens[self.at]
            if not exponent.isdigit():
                self.fail(f"the exponent {exponent!r} is no integer")
            self.at += 1
            if int(exponent[:9]) * len(atom) > MAX_RELATOR:
                self.fail(f"a relator has more than {MAX_RELATOR:,} letters")
            atom = (_inverse(atom) if negative else atom) * int(exponent)
        return atom

    def atom(self) -> list[int]:
        """A generator, 1, a word in brackets, or a commutator."""
        token = self.tokens[self.at]
        if token in self.generators:
            self.at += 1
            return [2 * self.generators.index(token)]
        if self.take("1"):
            return []
        if self.take("("):
            word = self.word()
            if not self.take(")"):
                self.fail("a bracket is not closed")
            return word
        if self.take("["):
            first = self.word()
            second = self.word() if self.take(",") else self.fail("a commutator is written [x, y]")
            if not self.take("]"):
                self.fail("a bracket is not closed")
            return _inverse(first) + _inverse(second) + first + second
        self.fail(
            f"{token!r} is no generator (they are {', '.join(self.generators)})" if token else "a word is missing"
        )

    def check(self, word: list[int]) -> list[int]:
        """Refuse a word that is too long."""
        return word if len(word) <= MAX_RELATOR else self.fail(f"a relator has more than {MAX_RELATOR:,} letters")


def _inverse(word: list[int]) -> list[int]:
    return [column ^ 1 for column in reversed(word)]
