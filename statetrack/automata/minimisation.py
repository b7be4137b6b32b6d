"""Minimising: which states say the same after every word, in time n log n.

Moore's refinement, vectorised, while it makes progress: a round splits every class whose members' successors lie in
different classes, so a table without structure is done in a few rounds. A chain of n states would take n of them, so
what is left is done by Hopcroft's algorithm (1971): of a class that splits, only the smaller part has to split others.

Legend: Q states, L letters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

GROWTH = 1.2  # a round of Moore's that gives fewer classes than this times as many is the last


def explore(
    start: int, step: Callable[[Int[np.ndarray, "Q"]], Int[np.ndarray, "Q L"]]
) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q L"]]:
    """Return the nodes reachable from `start`, as a queue meets them, and their table in that numbering."""
    number, level, nodes, rows = {start: 0}, [start], [start], []
    while level:
        targets = step(np.array(level))
        flat, level = targets.ravel().tolist(), []
        for node in flat:
            if node not in number:
                number[node] = len(number)
                level.append(node)
        nodes += level
        rows.append(np.array([number[node] for node in flat]).reshape(targets.shape))
    return np.array(nodes), np.concatenate(rows)


def equivalent_states(table: Int[np.ndarray, "Q L"], says: Int[np.ndarray, "Q"]) -> tuple[int, Int[np.ndarray, "Q"]]:
    """Return how many classes of equivalent states there are, and every state's class."""
    classes, label = _number(says)
    while True:
        before = classes
        for letter in range(table.shape[1]):
            classes, label = _number(label * classes + label[table[:, letter]])
        if classes == before:
            return classes, label
        if classes < GROWTH * before:
            return _hopcroft(table, classes, label)


def _number(keys: np.ndarray) -> tuple[int, np.ndarray]:
    """Number the distinct keys from 0."""
    distinct, label = np.unique(keys, return_inverse=True)
    return len(distinct), label


class _Classes:
    """A partition in which the members of a class stand side by side, the marked ones first."""

    def __init__(self, classes: int, label: Int[np.ndarray, "Q"]):
        order = np.argsort(label, kind="stable")
        ends = np.cumsum(np.bincount(label, minlength=classes))
        self.members: list[int] = order.tolist()
        self.place: list[int] = np.argsort(order).tolist()
        self.label: list[int] = label.tolist()
        self.end: list[int] = ends.tolist()
        self.first: list[int] = [0, *self.end[:-1]]
        self.marked = [0] * classes
        self.touched: list[int] = []

    def of(self, c: int) -> list[int]:
        """Return the members of a class."""
        return self.members[self.first[c] : self.end[c]]

    def mark(self, states: list[int]) -> None:
        """Mark states, each at most once between two calls of `split`."""
        members, place = self.members, self.place
        for q in states:
            c = self.label[q]
            if not self.marked[c]:
                self.touched.append(c)
            target, here = self.first[c] + self.marked[c], place[q]
            other = members[target]
            members[target], members[here] = q, other
            place[q], place[other] = target, here
            self.marked[c] += 1

    def split(self) -> list[int]:
        """Divide the classes of which some members are marked; return the new classes, of each the smaller part."""
        made = []
        for c in self.touched:
            middle, self.marked[c] = self.first[c] + self.marked[c], 0
            if middle == self.end[c]:
                continue
            new = len(self.end)
            if middle - self.first[c] <= self.end[c] - middle:
                self.first.append(self.first[c])
                self.end.append(middle)
                self.first[c] = middle
            else:
                self.first.append(middle)
                self.end.append(self.end[c])
                self.end[c] = middle
            self.marked.append(0)
            for q in self.of(new):
                self.label[q] = new
            made.append(new)
        self.touched = []
        return made


def _hopcroft(
    table: Int[np.ndarray, "Q L"], classes: int, label: Int[np.ndarray, "Q"]
) -> tuple[int, Int[np.ndarray, "Q"]]:
    """Refine a partition until every letter maps every class into one."""
    states, letters = table.shape
    sources, begins = [], []
    for column in table.T:
        sources.append(np.argsort(column, kind="stable").tolist())
        begins.append(np.concatenate([[0], np.cumsum(np.bincount(column, minlength=states))]).tolist())
    partition = _Classes(classes, label)
    waiting = {(c, x) for c in range(classes) for x in range(letters)}
    while waiting:
        c, x = waiting.pop()
        before, begin = sources[x], begins[x]
        # Gathered first: marking moves members about, those of c included.
        partition.mark([p for q in partition.of(c) for p in before[begin[q] : begin[q + 1]]])
        # Where the old class still waits both parts do; where it does not, the new one, no larger, is enough.
        waiting.update((new, y) for new in partition.split() for y in range(letters))
    return len(partition.end), np.array(partition.label)
