"""Finite groups as permutations, and their multiplication tables.

Legend: G elements of the group, P points moved by the permutations. Element 0 is the identity, always.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from statetrack.errors import UsageError

if TYPE_CHECKING:
    from sympy.combinatorics import PermutationGroup

MAX_ORDER = 5040  # the table has order**2 entries of 8 bytes: 203 MB for S7
ACCEPTED = "Z<n>, S<n>, A<n>, D<n> (order 2n, n >= 3) and direct products such as 'Z2 x S3'"


@dataclass(frozen=True, eq=False)
class Group:
    """The group of the rows of `permutations`, row a mapping point i to permutations[a, i], in lexicographic order.

    Build one with `parse_group` or `permutation_group`; `table[a, b]` is "first a, then b".
    """

    name: str
    permutations: Int[np.ndarray, "G P"]

    @property
    def order(self) -> int:
        """The number of elements."""
        return len(self.permutations)

    @cached_property
    def moved(self) -> Int[np.ndarray, "G"]:
        """How many points each element moves: 0 for the identity, 2 for a swap."""
        return (self.permutations != np.arange(self.permutations.shape[1])).sum(axis=1)

    @cached_property
    def table(self) -> Int[np.ndarray, "G G"]:
        """table[a, b] = the element that applies a first and b second, i -> b(a(i)).

        All products are looked up at once, point by point: `rank` numbers the elements by their images of the points
        seen so far, so it is a walk down the trie of the rows. Points that separate nothing new are skipped.
        """
        rows, (order, points) = self.permutations, self.permutations.shape
        rank, classes = np.zeros(order, dtype=np.int64), 1
        product_rank = np.zeros((order, order), dtype=np.int64)
        for point in range(points):
            keys, new_rank = np.unique(rank * points + rows[:, point], return_inverse=True)
            if len(keys) == classes:
                continue
            numbering = np.zeros(classes * points, dtype=np.int64)
            numbering[keys] = np.arange(len(keys))
            product_rank *= points
            product_rank += rows.T[rows[:, point]]  # entry [a, b] = b(a(point))
            np.take(numbering, product_rank, out=product_rank, mode="clip")
            rank, classes = new_rank, len(keys)
        element = np.empty(order, dtype=np.int64)
        element[rank] = np.arange(order)
        return np.take(element, product_rank, out=product_rank, mode="clip")


def parse_group(name: str) -> Group:
    """Return the group called `name`: Z60, S5, A5, D4 (order 8), or a direct product such as 'Z2 x S3'.

    Z_n acts on n points by shifts (element k is the shift by k), D_n on the corners of an n-gon, S_n and A_n on n
    points.
    """
    factors = [_parse_factor(factor, name) for factor in re.split(r"\s*[x×]\s*", name.strip())]
    order = math.prod(order for order, _ in factors)
    if order > MAX_ORDER:
        raise UsageError(f"group {name!r} has more than {MAX_ORDER} elements, too many for a multiplication table")
    return Group(name.strip(), reduce(_direct_product, [rows() for _, rows in factors]))


def permutation_group(group: PermutationGroup, name: str | None = None) -> Group:
    """Return any sympy PermutationGroup with its elements in lexicographic order."""
    order = int(group.order())
    if order > MAX_ORDER:
        raise UsageError(f"the permutation group has {order} elements; accepted: at most {MAX_ORDER}")
    rows = sorted(tuple(images) for images in group.generate_dimino(af=True))
    return Group(name or f"permutation group of order {order}", np.array(rows, dtype=np.int64).reshape(order, -1))


def as_group(group: str | Group | PermutationGroup) -> Group:
    """Return `group` itself, the group that a name stands for, or the sympy group converted."""
    if isinstance(group, Group):
        return group
    if isinstance(group, str):
        return parse_group(group)
    from sympy.combinatorics import PermutationGroup  # here: importing sympy takes most of a second

    if isinstance(group, PermutationGroup):
        return permutation_group(group)
    raise UsageError(f"group must be a name ({ACCEPTED}) or a sympy PermutationGroup, got {type(group).__name__}")


def element_indices(group: Group, letters: Sequence[int] | None) -> Int[np.ndarray, "L"]:
    """Return the elements used as letters: all of them by default."""
    if letters is None:
        return np.arange(group.order)
    chosen = np.asarray(letters)
    if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu":
        raise UsageError(f"letters must be a non-empty list of element indices, got {letters!r}")
    if chosen.min() < 0 or chosen.max() >= group.order:
        raise UsageError(f"letters of {group.name} must lie in 0..{group.order - 1}, got {letters!r}")
    return chosen.astype(np.int64)


def _parse_factor(text: str, whole: str) -> tuple[int, Callable[[], np.ndarray]]:
    """Return the order of one factor (capped, so that S99999 is refused at once) and how to enumerate it."""
    match = re.fullmatch(r"([ZSAD])_?(\d{1,9})", text)
    if match is None:
        raise UsageError(f"group {whole!r} is unknown (cannot read {text!r}); accepted: {ACCEPTED}")
    family, n = match[1], int(match[2])
    smallest = 3 if family == "D" else 1
    if n < smallest:
        raise UsageError(f"group {whole!r}: {text!r} needs n >= {smallest}; accepted: {ACCEPTED}")
    if family == "Z":
        return n, lambda: (np.arange(n)[:, None] + np.arange(n)) % n
    if family == "D":
        return 2 * n, lambda: _dihedral(n)
    order = math.factorial(n) if n <= 12 else MAX_ORDER + 1
    if family == "S":
        return order, lambda: _symmetric(n)
    return (order + 1) // 2 if n <= 12 else order, lambda: _alternating(n)


def _symmetric(n: int) -> np.ndarray:
    return np.array(list(permutations(range(n))), dtype=np.int64)  # already in lexicographic order


def _alternating(n: int) -> np.ndarray:
    rows = _symmetric(n)
    inversions = sum((rows[:, i] > rows[:, j]).astype(np.int64) for i in range(n) for j in range(i + 1, n))
    return rows[np.asarray(inversions) % 2 == 0] if n > 1 else rows


def _dihedral(n: int) -> np.ndarray:
    k, i = np.arange(n)[:, None], np.arange(n)
    rows = np.concatenate([(i + k) % n, (k - i) % n])
    return rows[np.lexsort(rows.T[::-1])]


def _direct_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Let a and b act on disjoint points; element (x, y) has index x * |b| + y."""
    return np.concatenate([np.repeat(a, len(b), axis=0), np.tile(b, (len(a), 1)) + a.shape[1]], axis=1)
