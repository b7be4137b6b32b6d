"""Number the states that a start state can reach, whatever the states are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from statetrack.errors import UsageError

MAX_STATES = 10_000  # of an automaton under construction

State = TypeVar("State", bound=Hashable)


def explore(
    start: State, successors: Callable[[State], Sequence[State]], what: str, limit: int = MAX_STATES
) -> tuple[list[State], Int[np.ndarray, "Q L"]]:
    """Return the states reachable from `start` in breadth-first order, and the table of their successors.

    successors: the next states of one state, letter by letter. Raises UsageError, naming `what`, beyond `limit` states.
    """
    numbers, states, rows = {start: 0}, [start], []
    for state in states:  # grows as it is walked
        row = []
        for target in successors(state):
            if target not in numbers:
                numbers[target] = len(states)
                states.append(target)
            row.append(numbers[target])
        rows.append(row)
        if len(states) > limit:
            raise UsageError(f"{what} has more than {limit:,} states")
    return states, np.array(rows, dtype=np.int64).reshape(len(states), -1)
