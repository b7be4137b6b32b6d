"""Languages of texts around a language: texts that contain one of its words, texts of lines that are its words."""

from __future__ import annotations

import numpy as np

from statetrack.automata.automaton import Automaton
from statetrack.automata.exploration import explore
from statetrack.errors import UsageError


def contains(automaton: Automaton) -> Automaton:
    """Return the minimal automaton that accepts a text if some factor of it (the empty one included) is accepted.

    A state is the set of states of `automaton` after every suffix of the text so far, or FOUND, for good.
    """
    _accepting("contains", automaton)
    merged, class_of = automaton.minimise().merge_letters()
    accepting = _accepting("contains", merged)
    begin, found = frozenset({merged.start}), frozenset[int]()

    def step(suffixes: frozenset[int], column: list[int]) -> frozenset[int]:
        reached = {column[q] for q in suffixes}
        return found if reached & accepting or not suffixes else begin | reached

    columns = merged.table.T.tolist()
    states, table = explore(
        found if begin & accepting else begin,
        lambda q: [step(q, column) for column in columns],
        "the automaton of factors",
    )
    last = frozenset(i for i, q in enumerate(states) if not q)
    small = Automaton(table, accepting=last).minimise()
    return Automaton(small.table[:, class_of], small.start, small.accepting, letters=automaton.letters)


def lines(automaton: Automaton) -> Automaton:
    """Return the minimal automaton of texts of lines, each ended by a newline, whose lines are all accepted.

    Words of `automaton` with a newline inside count for nothing. No line at all is such a text.
    """
    accepting = _accepting("lines", automaton)
    if "\\n" not in automaton.names and "\n" not in automaton.names:
        raise UsageError(f"lines needs a newline among the letters; the letters are {', '.join(automaton.names):.80}")
    newline = automaton.names.index("\n" if "\n" in automaton.names else "\\n")
    fresh, dead = automaton.states, automaton.states + 1  # at the beginning of a line; after a wrong line
    table = np.vstack([automaton.table, automaton.table[automaton.start], np.full(automaton.alphabet, dead)])
    table[:, newline] = dead
    ends = sorted(accepting) + [fresh] * (automaton.start in accepting)
    table[ends, newline] = fresh
    return Automaton(table, fresh, accepting=frozenset({fresh}), letters=automaton.letters).minimise()


def _accepting(wrapper: str, automaton: Automaton) -> frozenset[int]:
    if automaton.accepting is None:
        raise UsageError(f"{wrapper} needs a language; this automaton has outputs, and no accepting set")
    return automaton.accepting
