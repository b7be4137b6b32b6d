"""Shapes of automata that small constructions follow, and what each costs in factors per token.

Legend: n states. Costs: docs/theory.md, Constructions 1, 5, 6 and 7.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.monoid import Monoid


def definite_order(automaton: Automaton) -> int | None:
    """Return the least k such that the last k letters decide the state, None if there is none.

    States merge, from one round to the next, that every letter takes to states merged before; k rounds leave one class.
    """
    label, classes, order = np.arange(automaton.states), automaton.states, 0
    while classes > 1:
        rows, label = np.unique(label[automaton.table], axis=0, return_inverse=True)
        if len(rows) == classes:
            return None
        classes, order = len(rows), order + 1
        label = label.ravel()
    return order


MOST_WORK = 500_000  # steps of an elimination in all, a fraction of a second


def told_by_signs(automaton: Automaton, signed: bool) -> bool:
    """Return whether coordinates of two values tell the state, with the last letter; False too if that is long to find.

    Every letter keeps such a coordinate, sets it or (signed) negates it. As a function c of states, over the field of
    two elements, c(q x) = a_x c(q) + b_x: for given a a linear system for c and b. Two states have the same c in all
    its solutions if their difference is a combination of the equations.
    """
    n, columns = automaton.states, np.unique(automaton.table.T, axis=0).tolist()
    images = [sorted(set(column)) for column in columns]
    # To keep is no use to a letter that resets everything, and to set none to one that permutes.
    choices = [(0,) if len(image) == 1 else (1,) if len(image) == n else (0, 1) for image in images]
    if n * n * len(columns) * math.prod(map(len, choices)) > MOST_WORK:
        return False
    told: list[tuple[int, ...]] = [()] * n
    for keeps in product(*choices):
        rows: dict[int, int] = {}  # bit q: c(q); bit n + x: b_x
        for x, (keep, column) in enumerate(zip(keeps, columns, strict=True)):
            for q, r in enumerate(column):
                equation = 1 << r ^ keep << q ^ (0 if keep and not signed else 1 << n + x)
                if left := _reduced(equation, rows):
                    rows[left.bit_length()] = left
        told = [(*before, _reduced(1 << q, rows)) for q, before in enumerate(told)]
    return all(len({told[q] for q in image}) == len(image) for image in images)


def _reduced(vector: int, rows: dict[int, int]) -> int:
    """Return what is left of a vector of bits when rows, by their highest bits, are taken out of it."""
    for highest in range(vector.bit_length(), 0, -1):
        if vector >> highest - 1 & 1 and highest in rows:
            vector ^= rows[highest]
    return vector


def is_full_transformation_monoid(monoid: Monoid) -> bool:
    """Return whether the words do all n^n maps of the n states: all permutations, and one map of rank n - 1."""
    n = monoid.automaton.states
    ranks = [len(np.unique(effect)) for effect in monoid.generators]
    if n == 1 or n - 1 not in ranks:
        return n == 1
    permutations = [effect.tolist() for effect, rank in zip(monoid.generators, ranks, strict=True) if rank == n]
    if monoid.complete:
        return monoid.size == n**n
    if not permutations:
        return False
    from sympy.combinatorics import Permutation, PermutationGroup  # here: importing sympy takes most of a second

    return PermutationGroup([Permutation(p) for p in permutations]).order() == math.factorial(n)


def merge_cost(automaton: Automaton) -> int:
    """Return the swaps and merges of states that the dearest letter takes: n - number of components of its graph.

    For a permutation, a component is a cycle, and there are swaps only.
    """
    return max(automaton.states - _components(effect) for effect in automaton.table.T.tolist())


def symmetric_cost(monoid: Monoid) -> int | None:
    """Return the swaps that the dearest letter takes if the words form S_n or A_n, n >= 3, acting on n points.

    A letter of S_n is known by its order and the size of its class, as far as these tell; where they do not, the dearer
    one counts, and in A_n all letters count as n - 1.
    """
    if not (monoid.is_group and monoid.complete and monoid.subgroups):
        return None
    group = monoid.subgroups[0]
    if group.name[:1] not in ("S", "A") or not group.name[1:].isdigit():
        return None
    n = int(group.name[1:])
    if group.name[0] == "A":
        return n - 1
    place = {element: i for i, element in enumerate(group.elements.tolist())}
    letters = [place[monoid.element(names[:1])] for names in monoid.letters]
    kinds = {(int(group.orders[x]), group.class_size(x)) for x in letters}
    return max(cost for order, size, cost in _cycle_types(n) if (order, size) in kinds)


def _cycle_types(n: int) -> Iterator[tuple[int, int, int]]:
    """Yield (order, size, n - number of cycles) of the classes of S_n."""

    def partitions(left: int, largest: int) -> Iterator[tuple[int, ...]]:
        if left == 0:
            yield ()
        for part in range(min(left, largest), 0, -1):
            yield from ((part, *rest) for rest in partitions(left - part, part))

    for parts in partitions(n, n):
        commuting = math.prod(length**k * math.factorial(k) for length, k in Counter(parts).items())
        yield math.lcm(*parts), math.factorial(n) // commuting, n - len(parts)


def injection_reset_cost(automaton: Automaton, gate: bool) -> int | None:
    """Return the factors that one layer with a one-hot state needs; None if a letter does not fit.

    Every letter must be a reset to one state, or injective on the states that are not lost; a lost state, which no
    letter leaves, is the zero vector. A path or cycle of length l takes l - 1 swaps, a path one projection more; a
    reset a projection of every coordinate, or none with a gate, which then needs one factor to write.
    """
    columns = automaton.table.T.tolist()
    sinks = [q for q in range(automaton.states) if all(effect[q] == q for effect in columns)]
    costs = []
    for lost in [None, *sinks]:
        per_letter = [_letter_cost(effect, lost, gate) for effect in columns]
        if None not in per_letter:
            costs.append(max(c for c in per_letter if c is not None))
    return min(costs, default=None)


def _letter_cost(effect: Sequence[int], lost: int | None, gate: bool) -> int | None:
    live = [q for q in range(len(effect)) if q != lost]
    images = [effect[q] for q in live if effect[q] != lost]
    reset = len(live) if not gate else 1
    if not images:
        return min(reset, len(live))
    fits = len(set(images)) == len(images)
    resets = len(images) == len(live) and len(set(images)) == 1 and lost is None
    if not fits:
        return reset if resets else None
    cycles = _cycles(effect, set(live))
    injection = len(live) - cycles
    return min(injection, reset) if resets else injection


def _cycles(effect: Sequence[int], live: set[int]) -> int:
    """Count the cycles of an injective partial map."""
    image = set(live)
    while (kept := {effect[q] for q in image if effect[q] in live}) != image:
        image = kept
    count = 0
    while image:
        count += 1
        q = image.pop()
        while (q := effect[q]) in image:
            image.remove(q)
    return count


def _components(effect: Sequence[int]) -> int:
    """Count the connected components of a map's graph: one for each cycle."""
    image = set(range(len(effect)))
    while (smaller := {effect[q] for q in image}) != image:
        image = smaller
    return _cycles(effect, image)
