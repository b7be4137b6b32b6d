"""The syntactic monoid of an automaton: what its words do, and the properties that theorems ask about.

An element is a map of the states of the minimal automaton, the effect of a word; words act from left to right, so the
product s t is "first s, then t". Element 0 is the identity, the effect of the empty word. Letters with the same effect
are one generator. References: J.-E. Pin, Mathematical Foundations of Automata Theory, chapters IV and V (Green's
relations, idempotents, groups); compare docs/theory.md.

Legend: S elements, Q states of the minimal automaton, X generators, E idempotents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int, Integer

from statetrack.automata.automaton import Automaton
from statetrack.automata.components import strong_components
from statetrack.automata.subgroups import Subgroup
from statetrack.errors import UsageError

MAX_BYTES = 400_000_000  # of the table of elements
MAX_PRODUCTS = 20_000_000
MAX_PAIRS = 2_000_000_000  # states looked up to compare all pairs of idempotents; a tenth in a monoid cut short

Law = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From the map of e and the maps of all f, the truth of a law for every f and state."""


@dataclass(frozen=True)
class Property:
    """Whether a property holds (None: not decided); if it does not, the elements that show it."""

    holds: bool | None
    witness: tuple[int, ...] = ()


class Monoid:
    """The elements reached from the identity by right multiplication, shortest words first.

    If there are more than `cap` (or more than memory is good for), `complete` is False and `size` counts those found:
    then a property can still be found to fail, since its witness is an element, but never to hold.
    """

    def __init__(self, automaton: Automaton, cap: int = 200_000):
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
            raise UsageError(f"cap must be an integer >= 1, got {cap!r}")
        self.automaton = automaton.minimise()
        """the minimal automaton, whose states the elements map"""
        self.letters = _letter_classes(self.automaton)
        """the generators: letters that do the same to every state, the most readable first"""
        table = self.automaton.table
        width = np.min_scalar_type(table.shape[0] - 1)
        self.generators: Integer[np.ndarray, "X Q"] = table.T[[names[0] for names in self.letters]].astype(width)
        self._enumerate(min(cap, max(1, MAX_BYTES // (table.shape[0] * width.itemsize))))

    def _enumerate(self, cap: int) -> None:
        """Find the elements breadth first: a block of them times every generator, looked up as bytes."""
        states, generators = self.generators.shape[1], len(self.generators)
        one = np.arange(states, dtype=self.generators.dtype)[None]
        height = max(1, 50_000_000 // self.generators.nbytes)
        numbers, blocks, parent, last, rows, first = {one.tobytes(): 0}, [one], [-1], [-1], [], 0
        self.complete = True
        for block in blocks:  # it grows
            products = np.ascontiguousarray(self.generators[:, block].swapaxes(0, 1)).reshape(-1, states)
            fresh = []
            for i, key in enumerate(products.view(f"V{states * products.itemsize}").ravel().tolist()):
                number = numbers.setdefault(key, len(numbers))
                if number == len(parent):
                    fresh.append(i)
                    parent.append(first + i // generators)
                    last.append(i % generators)
                rows.append(number)
                if first and (len(parent) > cap or len(rows) > MAX_PRODUCTS):  # the letters are always found
                    self.complete = False
                    break
            first += len(block)
            blocks += [products[fresh[i : i + height]] for i in range(0, len(fresh), height)]
            if not self.complete:
                break
        self.elements: Integer[np.ndarray, "S Q"] = np.concatenate(blocks)
        self.elements.setflags(write=False)
        self._numbers, self._parent, self._last = numbers, np.array(parent), np.array(last)
        self._rows = rows

    # --- elements and words ------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The number of elements (of those found, if not complete)."""
        return len(self.elements)

    def word(self, element: int, empty: bool = True) -> tuple[int, ...]:
        """Return a shortest word with this effect, as letters of the automaton; empty=False: one that is not empty."""
        letters = []
        if element == 0 and not empty:
            before, last = divmod(self._rows.index(0), len(self.generators))
            return (*self.word(before), self.letters[last][0])
        while element:
            letters.append(self.letters[self._last[element]][0])
            element = int(self._parent[element])
        return tuple(reversed(letters))

    def element(self, word: Sequence[int]) -> int:
        """Return the effect of a word; UsageError if the monoid was not enumerated so far."""
        effect = np.arange(self.automaton.states)
        for letter in word:
            effect = self.automaton.table[effect, letter]
        return self._number(effect)

    def product(self, first: int, then: int) -> int:
        """Return the element "first, then"."""
        return self._number(self.elements[then][self.elements[first]])

    def _number(self, effect: np.ndarray) -> int:
        number = self._numbers.get(effect.astype(self.elements.dtype).tobytes())
        if number is None:
            raise UsageError(
                f"unknown element: the monoid has more than {self.size - 1} elements, the others not found"
            )
        return number

    # --- Cayley graphs and Green's relations -------------------------------------------------------------------------

    @cached_property
    def right(self) -> Int[np.ndarray, "S X"]:
        """The right Cayley graph: right[s, x] = s x."""
        self._require_complete()
        return np.array(self._rows, dtype=np.int64).reshape(self.size, len(self.generators))

    @cached_property
    def left(self) -> Int[np.ndarray, "S X"]:
        """The left Cayley graph: left[s, x] = x s; with s = r y, x s = (x r) y, read off the right one."""
        left = np.empty_like(self.right)
        left[0] = self.right[0]
        depth = np.zeros(self.size, dtype=np.int64)
        for s in range(1, self.size):
            depth[s] = depth[self._parent[s]] + 1
        bounds = np.searchsorted(depth, np.arange(1, depth[-1] + 2))
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            parents, last = self._parent[begin:end], self._last[begin:end]
            left[begin:end] = self.right[left[parents], last[:, None]]
        return left

    @cached_property
    def r_classes(self) -> Int[np.ndarray, "S"]:
        """Green's R: equal where s M = t M."""
        return strong_components(self.right)

    @cached_property
    def l_classes(self) -> Int[np.ndarray, "S"]:
        """Green's L: equal where M s = M t."""
        return strong_components(self.left)

    @cached_property
    def h_classes(self) -> Int[np.ndarray, "S"]:
        """Green's H, R and L at once; with an idempotent it is a group."""
        return np.unique(self.r_classes * self.size + self.l_classes, return_inverse=True)[1]

    @cached_property
    def d_classes(self) -> Int[np.ndarray, "S"]:
        """Green's D (J is the same in a finite monoid): s R r L t for some r."""
        rows, columns = self.r_classes, self.l_classes
        root = np.arange(rows.max() + 1)  # one R class stands for its D class: L classes join R classes
        while True:
            lowest = np.full(columns.max() + 1, len(root))
            np.minimum.at(lowest, columns, root[rows])
            joined = root.copy()
            np.minimum.at(joined, rows, lowest[columns])
            joined = joined[joined]
            if np.array_equal(joined, root):
                return np.unique(root[rows], return_inverse=True)[1]
            root = joined

    def _require_complete(self) -> None:
        if not self.complete:
            raise UsageError(f"unknown: the monoid has more than {self.size - 1} elements")

    # --- idempotents -------------------------------------------------------------------------------------------------

    @cached_property
    def idempotents(self) -> Int[np.ndarray, "E"]:
        """The elements with e e = e."""
        blocks = np.array_split(self.elements, self.elements.nbytes // 10_000_000 + 1)
        return np.flatnonzero(np.concatenate([(np.take_along_axis(b, b, axis=1) == b).all(axis=1) for b in blocks]))

    @cached_property
    def commuting_idempotents(self) -> Property:
        """ECom: e f = f e for all idempotents."""
        return self._pairs(lambda e, f: e[f] == f[:, e])

    @cached_property
    def block_group(self) -> Property:
        """BG: no two idempotents with the same image (L-equivalent), nor with the same kernel (R-equivalent)."""
        rows = self.elements[self.idempotents]
        kernels = np.zeros_like(rows)
        for q in range(rows.shape[1] - 1, -1, -1):
            kernels[rows == rows[:, q : q + 1]] = q  # at last, the smallest state with the same image
        return self._distinct(self.one_idempotent_per_image, self.idempotents, kernels)

    @cached_property
    def one_idempotent_per_image(self) -> Property:
        """EL: e f = e and f e = f imply e = f, that is, idempotents with the same image are equal."""
        return self._distinct(Property(True), self.idempotents, self._images(self.idempotents))

    @cached_property
    def last_wins(self) -> Property:
        """W: e f e = f e for all idempotents."""
        if self.one_idempotent_per_image.holds is False:
            return self.one_idempotent_per_image  # e f e = e, f e = f
        return self._pairs(_last_wins)

    @cached_property
    def locally_one_idempotent_per_image(self) -> Property:
        """LEL: every local monoid e M e, e the effect of a word that is not empty, is in EL. Witness: f, g, e."""
        if self.one_idempotent_per_image.holds:
            return self.one_idempotent_per_image
        return self._locally(lambda below: self._distinct(Property(True), below, self._images(below)))

    @cached_property
    def locally_last_wins(self) -> Property:
        """LW: every local monoid e M e, e the effect of a word that is not empty, is in W. Witness: f, g, e."""
        if self.last_wins.holds:
            return self.last_wins
        if self.locally_one_idempotent_per_image.holds is False:
            return self.locally_one_idempotent_per_image
        return self._locally(lambda below: self._pairs(_last_wins, below))

    @property
    def _budget(self) -> int:
        return MAX_PAIRS if self.complete else MAX_PAIRS // 10

    def _images(self, elements: np.ndarray) -> Bool[np.ndarray, "E Q"]:
        """Mark the states in the image of some elements."""
        rows = self.elements[elements]
        marks = np.zeros(rows.shape, dtype=bool)
        np.put_along_axis(marks, rows.astype(np.int64), True, axis=1)
        return marks

    def _distinct(self, otherwise: Property, elements: np.ndarray, keys: np.ndarray) -> Property:
        """Fail with the first two elements of one key, else go by `otherwise`; nothing holds of a monoid cut short."""
        if otherwise.holds is False:
            return otherwise
        seen: dict[bytes, int] = {}
        for element, key in zip(elements.tolist(), keys, strict=True):
            other = seen.setdefault(key.tobytes(), element)
            if other != element:
                return Property(False, (other, element))
        return Property(otherwise.holds if self.complete else None)

    def _pairs(self, law: Law, elements: np.ndarray | None = None) -> Property:
        """Fail with the first pair of idempotents e, f for which the law, given e and all f, is not true everywhere."""
        elements = self.idempotents if elements is None else elements
        rows = self.elements[elements]
        affordable = self._budget // max(1, rows.size)
        for i, e in enumerate(rows[:affordable]):
            true = law(e, rows).all(axis=1)
            if not true.all():
                return Property(False, (int(elements[i]), int(elements[np.argmin(true)])))
        return Property(True if self.complete and affordable >= len(rows) else None)

    def _locally(self, test: Callable[[np.ndarray], Property]) -> Property:
        """Test the idempotents below every maximal idempotent that a word which is not empty has as its effect."""
        reached = self.idempotents[self.idempotents > 0] if 0 not in self._rows else self.idempotents
        rows = self.elements[self.idempotents]
        ranks = self._images(reached).sum(axis=1)
        covered, undecided, spent = np.zeros(self.size, dtype=bool), not self.complete, 0
        for e in reached[np.argsort(-ranks, kind="stable")].tolist():
            if covered[e]:
                continue  # e M e lies in the local monoid of a larger idempotent
            spent += rows.size
            if spent > self._budget:
                undecided = True
                break
            effect = self.elements[e]
            below = self.idempotents[((effect[rows] == rows) & (rows[:, effect] == rows)).all(axis=1)]
            covered[below] = True
            found = test(below)
            if found.holds is False:
                return Property(False, (*found.witness, e))
            undecided |= found.holds is None
        return Property(None if undecided else True)

    # --- groups ------------------------------------------------------------------------------------------------------

    def cycles(self, element: int) -> list[tuple[int, ...]]:
        """Return the cycles that the element's powers run through in the end, longest first."""
        effect = self.elements[element].tolist()
        state = set(range(len(effect)))
        while (image := {effect[q] for q in state}) != state:
            state = image
        found, done = [], set()
        for first in sorted(state):
            if first in done:
                continue
            cycle = [first]
            while (q := effect[cycle[-1]]) != first:
                cycle.append(q)
            done.update(cycle)
            found.append(tuple(cycle))
        return sorted(found, key=len, reverse=True)

    def period(self, element: int) -> int:
        """Return the least p with s^(n + p) = s^n for large n: the least common multiple of its cycles."""
        return math.lcm(*map(len, self.cycles(element)))

    @cached_property
    def periodic(self) -> Int[np.ndarray, "_"]:
        """The elements of period greater than 1, shortest words first; s^n != s^(n + 1) for n = Q."""
        found, step = [], max(1, 10_000_000 // self.automaton.states)
        for begin in range(0, self.size, step):
            rows = self.elements[begin : begin + step]
            power = rows
            for _ in range(self.automaton.states.bit_length()):
                power = np.take_along_axis(power, power, axis=1)
            found.append(begin + np.flatnonzero((np.take_along_axis(rows, power, axis=1) != power).any(axis=1)))
        return np.concatenate(found)

    @property
    def aperiodic(self) -> Property:
        """Whether every period is 1: the language is star-free (Schuetzenberger)."""
        if len(self.periodic):
            return Property(False, (int(self.periodic[0]),))
        return Property(True if self.complete else None)

    @cached_property
    def subgroups(self) -> tuple[Subgroup, ...]:
        """The maximal subgroups that are not trivial, one of each D class, largest first."""
        if self.aperiodic.holds:
            return ()
        self._require_complete()
        order = np.argsort(self.h_classes, kind="stable")
        bounds = np.searchsorted(self.h_classes[order], np.arange(self.h_classes.max() + 2))
        seen, found = set(), []
        for e in self.idempotents.tolist():
            h, d = self.h_classes[e], self.d_classes[e]
            members = order[bounds[h] : bounds[h + 1]]
            if d in seen or len(members) == 1:
                continue
            seen.add(d)
            members = np.concatenate([[e], members[members != e]])
            image, rows = np.unique(self.elements[e]), self.elements[members]
            found.append(Subgroup(members, np.searchsorted(image, rows[:, image])))
        return tuple(sorted(found, key=lambda group: -group.order))

    @cached_property
    def periods(self) -> tuple[int, ...]:
        """The periods of all elements: the orders of elements of the subgroups."""
        return tuple(sorted({1}.union(*(group.exponents for group in self.subgroups))))

    @property
    def is_group(self) -> bool:
        """Whether every letter permutes the states."""
        return all(len(np.unique(effect)) == len(effect) for effect in self.generators)


def _last_wins(e: np.ndarray, f: np.ndarray) -> np.ndarray:
    return e[f][:, e] == e[f]  # e f e is: first e, then f, then e


def letter_names(automaton: Automaton) -> tuple[str, ...]:
    """Return the letters' names, printable."""
    return tuple(name if name.isprintable() else ascii(name)[1:-1] for name in automaton.names)


def _letter_classes(automaton: Automaton) -> tuple[tuple[int, ...], ...]:
    """Return the letters of equal columns, classes in order of first appearance, letters and digits first in each."""
    classes: dict[bytes, list[int]] = {}
    for letter, column in enumerate(automaton.table.T):
        classes.setdefault(column.tobytes(), []).append(letter)
    names = letter_names(automaton)
    signs = [not (name.isalnum() and name.isascii()) for name in names]
    return tuple(tuple(sorted(members, key=lambda x: (signs[x], x))) for members in classes.values())
