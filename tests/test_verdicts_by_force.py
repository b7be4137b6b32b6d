"""Verdicts beside what is found without the monoid of the library: theorems from scratch, networks, coordinates."""

import itertools
import random
from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pytest

from statetrack import compile
from statetrack.automata import Automaton
from statetrack.automata.monoid import Monoid
from statetrack.automata.verdicts import Structure, judge, lower_bounds

Map = tuple[int, ...]


def drawn(seed: int, count: int, most: int, letters: int) -> Iterator[Automaton]:
    """Draw automata of which many letters permute, reset, or move a single state."""
    draw = random.Random(seed)
    for _ in range(count):
        n, columns = draw.randint(1, most), []
        for _ in range(draw.randint(1, letters)):
            kind, column = draw.randrange(4), list(range(n))
            if kind == 0:
                draw.shuffle(column)
            elif kind == 1:
                column = [draw.randrange(n)] * n
            elif kind == 2:
                column[draw.randrange(n)] = draw.randrange(n)
            else:
                column = draw.choices(range(n), k=n)
            columns.append(column)
        table, start = np.array(columns).T, draw.randrange(n)
        if draw.randrange(2):
            yield Automaton(table, start, output=np.arange(n)).minimise()
        else:
            accepting = frozenset(q for q in range(n) if draw.randrange(2))
            yield Automaton(table, start, accepting=accepting).minimise()


def then(s: Map, t: Map) -> Map:
    return tuple(t[q] for q in s)


class Facts:
    """What the theorems ask of an automaton, each by its definition."""

    def __init__(self, automaton: Automaton):
        self.letters: list[Map] = [tuple(column) for column in automaton.table.T.tolist()]
        self.states = automaton.states
        self.one: Map = tuple(range(self.states))
        found, self.reached = [self.one], set[Map]()
        for s in found:
            for x in self.letters:
                self.reached.add(then(s, x))
                if then(s, x) not in found:
                    found.append(then(s, x))
        self.elements = found
        self.idempotents = [e for e in found if then(e, e) == e]
        self.periods = {s: self._period(s) for s in found}

    def _period(self, s: Map) -> int:
        seen, power = list[Map](), s
        while power not in seen:
            seen.append(power)
            power = then(power, s)
        return len(seen) - seen.index(power)

    @cached_property
    def definite(self) -> bool:
        """Whether some number of last letters decides the state."""
        words = {self.one}
        for _ in range(self.states):
            words = {then(w, x) for w in words for x in self.letters}
        return all(len(set(w)) == 1 for w in words)

    def law(self, name: str, local: bool) -> bool:
        """Whether EL or W holds of all idempotents, or of those of every local monoid."""
        tops = [i for i in self.idempotents if i in self.reached] if local else [self.one]
        for i in tops:
            some = [e for e in self.idempotents if then(then(i, e), i) == e]
            for e, f in itertools.product(some, some):
                if name == "W" and then(then(e, f), e) != then(f, e):
                    return False
                if name == "EL" and e != f and then(e, f) == e and then(f, e) == f:
                    return False
        return True

    def groups(self) -> Iterator[tuple[Map, list[Map]]]:
        """Yield the identity and the elements of every maximal subgroup."""
        for e in self.idempotents:
            near = [s for s in self.elements if then(e, s) == s == then(s, e)]
            yield e, [s for s in near if any(then(s, u) == e == then(u, s) for u in near)]


def parts(e: Map, group: list[Map], squares: bool) -> int | None:
    """Return the length of the derived series (of the series by commutators and squares); None if it does not end."""
    inverse = {a: next(b for b in group if then(a, b) == e) for a in group}
    now, length = set(group), 0
    while len(now) > 1:
        seeds = {then(then(inverse[a], inverse[b]), then(a, b)) for a in now for b in now}
        seeds |= {then(a, a) for a in now} if squares else set()
        smaller, new = {e}, {e}
        while new:
            new = {then(a, s) for a in new for s in seeds} - smaller
            smaller |= new
        if len(smaller) == len(now):
            return None
        now, length = smaller, length + 1
    return length


def layers_needed(facts: Facts, s: Structure) -> int | None:
    """Return how many layers docs/theory.md asks for at least; None where no number is enough."""
    (lo, hi), diagonal, real = s.eigenvalues, s.family != "householder", s.family != "complex-diagonal"
    if diagonal and max(abs(lo), abs(hi)) < 1 and not facts.definite:
        return None
    if real and lo > -1 and max(facts.periods.values()) > 1:
        return None
    needed = [1]
    if diagonal:
        for e, group in facts.groups():
            length = parts(e, group, squares=real)
            if length is None:
                return None
            needed.append(length)
    laws = ("EL", "W") if diagonal else ("EL",)
    needed += [2 for law in laws if not facts.law(law, local=s.window > 0)]
    if len(facts.elements) == facts.states**facts.states:
        needed.append(facts.states - 1)
    return max(needed)


def test_what_cannot_be_is_what_the_theorems_say_from_scratch():
    draw, said = random.Random(0), 0
    for automaton in drawn(1, 250, most=5, letters=3):
        facts, monoid = Facts(automaton), Monoid(automaton)
        assert len(facts.elements) == monoid.size
        if monoid.size > 150:
            continue
        for _ in range(6):
            structure = Structure(
                family=draw.choice(["diagonal", "complex-diagonal", "householder"]),
                eigenvalues=draw.choice([(0.0, 1.0), (-1.0, 1.0), (-1.0, 1.0), (-0.5, 1.0), (-0.5, 0.5), (-1.0, 0.5)]),
                factors=draw.randint(1, 3),
                layers=draw.choice([None, 1, 1, 2, 3]),
                window=draw.choice([0, 0, 1, 2]),
            )
            needed = layers_needed(facts, structure)
            excluded = needed is None or (structure.layers is not None and structure.layers < needed)
            if structure.family == "householder" and structure.layers == structure.factors == 1:
                excluded |= any(facts.periods[x] > 2 for x in facts.letters)
            assert (judge(monoid, structure).answer == "no") == excluded, (automaton, structure)
            said += excluded
    assert said > 200


@pytest.mark.parametrize("structure", ["householder", "gated", "dplr"])
def test_no_verdict_excludes_a_network_that_is_there(structure: str):
    for i, automaton in enumerate(drawn(2, 120, most=5, letters=3)):
        network = compile(automaton, structure=structure, window=i % 4, timeout=0)
        window = 0 if structure == "dplr" else max(0, i % 4 - 1)
        same = Structure(
            family="dplr" if structure == "dplr" else "householder",
            layers=max(1, network.depth),
            factors=max(1, *network.factors, 1),
            window=window,
            gate=structure == "gated",
        )
        verdict = judge(automaton, same)
        assert verdict.answer != "no" and (network.depth or verdict.answer == "yes"), (automaton, same)
        assert structure == "dplr" or lower_bounds(automaton, window).layers <= network.depth


def told_by_coordinates(automaton: Automaton, signed: bool) -> bool:
    """Return whether coordinates that every letter keeps, sets or (signed) negates tell the output, with the letter."""
    acts = [(1, 0), *((0, value) for value in (0, 1, 2, -1, -2)), *([(-1, 0)] if signed else [])]
    coordinates = list(itertools.product(acts, repeat=automaton.alphabet))
    a, b = np.array([[[act[i] for act in one] for one in coordinates] for i in (0, 1)]).swapaxes(1, 2)
    first = np.array([np.zeros(len(coordinates), dtype=int), np.ones(len(coordinates), dtype=int)])
    seen, todo, says = {(first.tobytes(), automaton.start)}, [(first, automaton.start)], {}
    for held, q in todo:
        for x in range(automaton.alphabet):
            after, r = a[x] * held + b[x], int(automaton.table[q, x])
            if says.setdefault((after.tobytes(), x), automaton.emits[r]) != automaton.emits[r]:
                return False
            if (after.tobytes(), r) not in seen:
                seen.add((after.tobytes(), r))
                todo.append((after, r))
    return True


@pytest.mark.parametrize("signed", [False, True])
def test_one_diagonal_layer_beside_all_coordinates(signed: bool):
    """What they tell is never excluded; what is said to be possible, but by fading memory, they tell."""
    structure = Structure(family="diagonal", eigenvalues=(-1.0 if signed else 0.0, 1.0), layers=1)
    answers = set()
    for automaton in drawn(3, 250, most=4, letters=2):
        verdict, told = judge(automaton, structure), told_by_coordinates(automaton, signed)
        answers.add((verdict.answer, told))
        assert not (told and verdict.answer == "no"), automaton
        assert told or verdict.answer != "yes" or "Construction 1" in verdict.theorem, automaton
    assert answers >= {("yes", True), ("no", False)}
