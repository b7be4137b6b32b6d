"""One layer for a permutation automaton: cheap actions of its group, side by side.

Where every letter permutes the states, the letters generate a group G, and the state is determined by a point of any
faithful action. An action on the cosets of a subgroup H costs n - #cycles reflections a letter (no fewer will do for
that representation); several heads, one action each, may do together what one costly action does: Z60 as 3 + 4 + 5
points with 4 reflections instead of 60 points with 59. A head's columns are cosets followed at the same time. Searched
among point stabilisers, large subgroups, cyclic and randomly generated ones: what is found is an upper bound. (Grazzi
et al., arXiv 2411.12537, Theorem 3 is the natural action.)

Letters: G elements, D cosets.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from statetrack.automata import Automaton, Group
from statetrack.compiler.assembly import Stage, chain, groups
from statetrack.compiler.operations import Head, Operation, close_cycles

MOST_ELEMENTS, TRIES, MOST_ACTIONS = 3000, 400, 40
CLIMBS, LEAST, STEPS = 12, 4, 30  # large subgroups tried first, however late it is; elements tried to make one larger


@dataclass(frozen=True)
class Action:
    """The group acting on cosets: images[i, g] is where coset i goes under g."""

    images: Int[np.ndarray, "D G"]
    cost: int
    """reflections for the worst letter"""
    kernel: Int[np.ndarray, "G"]
    """the class of each element modulo what acts trivially"""


def group_stage(automaton: Automaton, timeout: float) -> Stage | None:
    """Return the cheapest stage found for a permutation automaton; None for any other, and for too large a group."""
    if any(len(set(column)) < automaton.states for column in automaton.table.T.tolist()):
        return None
    elements = _closure(automaton.table.T)
    if elements is None:
        return None
    group = Group("", elements)
    rows = {row.tobytes(): i for i, row in enumerate(elements)}
    letters = [rows[column.tobytes()] for column in np.ascontiguousarray(automaton.table.T, dtype=np.int64)]
    state = elements[:, automaton.start]
    actions = _actions(group, letters, time.monotonic() + timeout)
    best: tuple[tuple[int, int, int], tuple[Action, ...]] | None = None
    few = (chosen for size in (1, 2, 3) for chosen in itertools.combinations(actions[:MOST_ACTIONS], size))
    for chosen in (*_cheapest(actions, state), *few):
        cost = max(a.cost for a in chosen), sum(len(a.images) for a in chosen), len(chosen)
        if (best is None or cost < best[0]) and _determines([a.kernel for a in chosen], state):
            best = cost, chosen
    return None if best is None else _stage(best[1], letters, state)


def _closure(generators: Int[np.ndarray, "L Q"]) -> Int[np.ndarray, "G Q"] | None:
    """Return the permutations generated, in lexicographic order (the identity first); None for too many."""
    found = {tuple(range(generators.shape[1]))}
    todo = list(found)
    while todo:
        few = max(1, MOST_ELEMENTS // len(generators))
        part, todo = np.array(todo[:few]), todo[few:]
        products = np.unique(generators[:, part].reshape(-1, generators.shape[1]), axis=0)
        fresh = [row for row in map(tuple, products.tolist()) if row not in found]
        found.update(fresh)
        if len(found) > MOST_ELEMENTS:
            return None
        todo += fresh
    return np.array(sorted(found), dtype=np.int64)


def _cheapest(actions: list[Action], state: Int[np.ndarray, "G"]) -> Iterator[tuple[Action, ...]]:
    """Yield the cheapest actions that determine the state together, however many: each tells more than those before."""
    chosen: list[Action] = []
    told = _joint([np.zeros_like(state)])
    for action in actions:
        more = _joint([told, action.kernel])
        if more.max() > told.max():
            chosen, told = [*chosen, action], more
        if _determines([told], state):
            yield tuple(chosen)
            return


def _actions(group: Group, letters: list[int], deadline: float) -> list[Action]:
    """Return the cheapest action found for every kernel, cheap ones first."""
    table, rng = group.table, random.Random(0)
    found: dict[bytes, Action] = {}
    seen: set[bytes] = set()

    def consider(subgroup: Bool[np.ndarray, "G"]) -> None:
        if subgroup.tobytes() in seen or subgroup.all():
            return
        seen.add(subgroup.tobytes())
        action = _action(table, subgroup, letters)
        old = found.get(action.kernel.tobytes())
        if old is None or (action.cost, len(action.images)) < (old.cost, len(old.images)):
            found[action.kernel.tobytes()] = action

    for point in range(group.permutations.shape[1]):
        consider(group.permutations[:, point] == point)
    for i, subgroup in enumerate(_subgroups(table, rng)):
        if i >= LEAST and time.monotonic() > deadline:
            break
        consider(subgroup)
    return sorted(found.values(), key=lambda a: (a.cost, len(a.images)))


def _subgroups(table: Int[np.ndarray, "G G"], rng: random.Random) -> Iterator[Bool[np.ndarray, "G"]]:
    """Yield large subgroups first: their actions have few points and take little time."""
    everything = range(len(table))
    for _ in range(CLIMBS):
        yield _climbed(table, rng)
    for i in range(TRIES):
        if i < min(len(table), 200):
            yield _generated(table, [i])
        yield _generated(table, rng.choices(everything, k=rng.choice([2, 2, 3])))
        if i % 8 == 0:
            yield _climbed(table, rng)


def _climbed(table: Int[np.ndarray, "G G"], rng: random.Random) -> Bool[np.ndarray, "G"]:
    """Return a large proper subgroup: elements are added as long as they do not generate everything."""
    generators = [rng.randrange(len(table))]
    subgroup = _generated(table, generators)
    for _ in range(STEPS):
        element = rng.randrange(len(table))
        if not subgroup[element] and not (larger := _generated(table, [*generators, element])).all():
            generators, subgroup = [*generators, element], larger
    return subgroup


def _generated(table: Int[np.ndarray, "G G"], generators: list[int]) -> Bool[np.ndarray, "G"]:
    """Return which elements a set of elements generates."""
    inside = np.zeros(len(table), dtype=bool)
    inside[0] = True
    frontier = np.array([0])
    while len(frontier):
        products = np.unique(table[frontier][:, generators])
        frontier = products[~inside[products]]
        inside[frontier] = True
    return inside


def _action(table: Int[np.ndarray, "G G"], subgroup: Bool[np.ndarray, "G"], letters: list[int]) -> Action:
    """Return the action on the right cosets H g."""
    members = np.flatnonzero(subgroup)
    coset = np.full(len(table), -1)
    representatives = []
    for g in range(len(table)):
        if coset[g] < 0:
            coset[table[members, g]] = len(representatives)
            representatives.append(g)
    images = coset[table[representatives]]
    cost = max(len(images) - _cycles(images[:, g].tolist()) for g in letters)
    _, kernel = np.unique(images, axis=1, return_inverse=True)
    return Action(images, cost, kernel.reshape(-1))


def _cycles(permutation: list[int]) -> int:
    """Return the number of cycles, fixed points included."""
    seen, count = [False] * len(permutation), 0
    for i in range(len(permutation)):
        count += not seen[i]
        while not seen[i]:
            seen[i] = True
            i = permutation[i]
    return count


def _joint(classes: list[Int[np.ndarray, "G"]]) -> Int[np.ndarray, "G"]:
    """Number the joint classes of elements."""
    joint = np.zeros(len(classes[0]), dtype=np.int64)
    for label in classes:
        _, joint = np.unique(joint * (int(label.max()) + 1) + label, return_inverse=True)
    return joint


def _determines(classes: list[Int[np.ndarray, "G"]], state: Int[np.ndarray, "G"]) -> bool:
    """Whether elements of one joint class all lead to one state."""
    joint = _joint(classes)
    return len(np.unique(joint)) == len(np.unique(joint * (int(state.max()) + 1) + state))


def _stage(actions: tuple[Action, ...], letters: list[int], state: Int[np.ndarray, "G"]) -> Stage:
    columns = _columns(actions, state)
    most = max(len(followed) for followed in columns)
    heads, images, sizes = [], [], []
    for action, followed in zip(actions, columns, strict=True):
        start = tuple(frozenset([i]) for i in followed)
        head = Head(len(action.images), start, [])
        moves = [Operation(close_cycles(dict(enumerate(action.images[:, g].tolist())))) for g in letters]
        head.letters = [[head.number(operation) for operation in moves], [0] * len(letters)]
        heads.append(head)
        for weights in groups(head):
            worth = np.array(weights)
            images += [worth[action.images[i]] for i in followed] + [np.zeros_like(state)] * (most - len(followed))
            sizes += [max(weights) + 1] * most
    rows = {(0, tuple(int(v) for v in values)): int(q) for *values, q in zip(*images, state, strict=True)}
    decoder = chain(rows, 1, sizes, int(state.max()) + 1)
    return Stage("group", heads, decoder, int(state[0]))


def _columns(actions: tuple[Action, ...], state: Int[np.ndarray, "G"]) -> list[list[int]]:
    """Choose few cosets of each action whose images together determine the state; at least one per action."""
    choices = [(a, i) for a, action in enumerate(actions) for i in range(len(action.images))]
    used: list[tuple[int, int]] = []
    while not used or not _determines([actions[a].images[i] for a, i in used], state):
        used.append(max(choices, key=lambda c: int(_joint([actions[a].images[i] for a, i in [*used, c]]).max())))
    columns: list[list[int]] = [[i for b, i in used if b == a] for a in range(len(actions))]
    return [followed or [0] for followed in columns]
