"""Automata from other descriptions: a step function, automata-lib, permutations, the presentation of a group."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from statetrack.automata.automaton import Automaton
from statetrack.automata.exploration import explore

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
