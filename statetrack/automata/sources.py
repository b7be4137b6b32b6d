"""Automata from a step function, from automata-lib, from permutations, and the notation of cycles."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.exploration import MAX_STATES, explore
from statetrack.errors import UsageError

State = TypeVar("State", bound=Hashable)


def from_function(
    start: State, step: Callable[[State, str], State], accepts: Callable[[State], bool], letters: Sequence[str]
) -> Automaton:
    """Follow q -> step(q, letter) from `start`, and return the automaton of the states reached, minimised.

    States may be any hashable values. Raises UsageError beyond 10,000 of them.
    """
    states, table = explore(start, lambda q: [step(q, letter) for letter in letters], "the step function")
    accepting = frozenset(i for i, q in enumerate(states) if accepts(q))
    return Automaton(table, accepting=accepting, letters=tuple(letters)).minimise()


# --- automata-lib ----------------------------------------------------------------------------------------------------


def automata_lib_kind(machine: Any) -> str | None:
    """Return "DFA" or "NFA" for those of the library automata-lib, else None; nothing is imported to find out."""
    kinds = [kind.__name__ for kind in type(machine).__mro__ if kind.__module__.startswith("automata.")]
    return next((kind for kind in kinds if kind in ("DFA", "NFA")), None)


def from_automata_lib(machine: Any, *, complete: bool = False) -> Automaton:
    """Return the minimal automaton of an automata-lib DFA, or NFA (determinised by automata-lib).

    Letters are the input symbols in sorted order. A DFA with a missing transition is refused, naming it; with
    complete=True it leads to a rejecting sink, as it does for an NFA.
    """
    kind = automata_lib_kind(machine)
    if kind is None:
        raise UsageError(f"expected a DFA or an NFA of automata-lib, got {type(machine).__name__}")
    if kind == "NFA":
        from automata.fa.dfa import DFA

        machine, complete = DFA.from_nfa(machine), True
    sink = object()  # equal to no state
    letters = sorted(machine.input_symbols)

    def successors(state: Hashable) -> list[Hashable]:
        row: Mapping[str, Hashable] = machine.transitions.get(state, {})
        missing = [letter for letter in letters if letter not in row]
        if missing and not complete and state is not sink:
            raise UsageError(
                f"state {state!r} has no transition for letter {missing[0]!r}; complete=True adds a rejecting sink"
            )
        return [row.get(letter, sink) for letter in letters]

    states, table = explore(machine.initial_state, successors, "the automata-lib automaton")
    accepting = frozenset(i for i, q in enumerate(states) if q in machine.final_states)
    return Automaton(table, accepting=accepting, letters=tuple(letters)).minimise()


# --- permutations ----------------------------------------------------------------------------------------------------


def from_permutations(generators: Sequence[Sequence[int]], letters: Sequence[str] | None = None) -> Automaton:
    """Return the word problem of the group that permutations generate: the letters are the generators.

    A generator g maps point i to g[i]; the first letter is applied first. State 0 is the identity, every state is an
    element, and it is the output. letters: their names, by default cycles such as "(0 1)(2 3)". Raises UsageError for
    what is no permutation and, with the order, for a group of more than 10,000 elements.
    """
    rows = [tuple(int(image) for image in generator) for generator in generators]
    if not rows:
        raise UsageError("permutations: give at least one generator")
    points = len(rows[0])
    for i, row in enumerate(rows):
        if sorted(row) != list(range(points)):
            raise UsageError(f"generator {i} is no permutation of the points 0..{points - 1}: {row!r:.80}")
    from sympy.combinatorics import Permutation, PermutationGroup  # here: importing sympy takes most of a second

    order = int(PermutationGroup([Permutation(row) for row in rows]).order())
    if order > MAX_STATES:
        raise UsageError(f"the permutations generate a group of order {order:,}; accepted: at most {MAX_STATES:,}")
    _, table = explore(
        tuple(range(points)), lambda q: [tuple(row[point] for point in q) for row in rows], "the group", order
    )
    names = [cycles(row) for row in rows] if letters is None else letters
    return Automaton(table, output=np.arange(order), letters=tuple(names))


def cycles(permutation: Sequence[int]) -> str:
    """Return a permutation as cycles: (1, 0, 3, 2, 4) is "(0 1)(2 3)", the identity "()"."""
    written, seen = "", set()
    for start in range(len(permutation)):
        cycle = [start]
        while (image := int(permutation[cycle[-1]])) != start:
            cycle.append(image)
        if len(cycle) > 1 and start not in seen:
            written += f"({' '.join(map(str, cycle))})"
        seen.update(cycle)
    return written or "()"


def parse_cycles(text: str) -> list[list[int]]:
    """Return the permutations that "(0 1)(2 3); (0 1 2 3 4)" lists, all on the points up to the largest named."""
    products: list[list[list[int]]] = []
    for part in text.split(";"):
        if not re.fullmatch(r"\s*(\(\s*(\d{1,6}([\s,]+\d{1,6})*)?\s*\)\s*)+", part):
            raise UsageError(
                f"permutations: cannot read {part.strip()!r}; write cycles such as (0 1)(2 3); (0 1 2 3 4)"
            )
        products.append([[int(point) for point in re.findall(r"\d+", cycle)] for cycle in part.split(")")])
    points = 1 + max((point for product in products for cycle in product for point in cycle), default=0)
    permutations = []
    for product, part in zip(products, text.split(";"), strict=True):
        images = list(range(points))
        for cycle in product:
            if len(set(cycle)) < len(cycle) or any(images[point] != point for point in cycle):
                raise UsageError(f"permutations: a point occurs twice in {part.strip()!r}")
            for point, image in zip(cycle, cycle[1:] + cycle[:1], strict=True):
                images[point] = image
        permutations.append(images)
    return permutations
