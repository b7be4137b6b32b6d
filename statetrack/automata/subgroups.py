"""A finite group given by all of its permutations: order, derived series, a readable name.

Legend: G elements of the group, P points moved by the permutations. Element 0 is the identity.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int


class Subgroup:
    """A maximal subgroup of a monoid: the permutations by which its elements act on the image of its idempotent.

    Everything is computed on element numbers: a product is looked up from the images of a few points, the base.
    """

    def __init__(self, elements: Int[np.ndarray, "G"], permutations: Int[np.ndarray, "G P"]):
        self.elements = elements
        """the monoid's numbers of the elements, the idempotent first"""
        self.permutations = permutations
        self.order, self.degree = permutations.shape
        self._trie: list[tuple[int, np.ndarray]] = []
        rank, classes = np.zeros(self.order, dtype=np.int64), 1
        for point in range(self.degree):
            keys, finer = np.unique(rank * self.degree + permutations[:, point], return_inverse=True)
            if len(keys) > classes:
                numbering = np.zeros(classes * self.degree, dtype=np.int64)
                numbering[keys] = np.arange(len(keys))
                self._trie.append((point, numbering))
                rank, classes = finer, len(keys)
        self._element = np.empty(self.order, dtype=np.int64)
        self._element[rank] = np.arange(self.order)

    @property
    def base(self) -> tuple[int, ...]:
        """Points whose images tell the elements apart."""
        return tuple(point for point, _ in self._trie)

    def times(self, element: int) -> Int[np.ndarray, "G"]:
        """Return the product "first a, then element", for every a."""
        return self._find([self.permutations[element][self.permutations[:, point]] for point in self.base])

    def product(self, *elements: int) -> int:
        """Return the product of some elements, the first applied first."""
        images = np.array(self.base, dtype=np.int64)
        for element in elements:
            images = self.permutations[element][images]
        return int(self._find(images[:, None])[0])

    def inverse(self, element: int) -> int:
        """Return the inverse of an element."""
        images = np.argsort(self.permutations[element])[list(self.base)]
        return int(self._find(images[:, None])[0])

    def class_size(self, element: int) -> int:
        """Return how many elements are conjugate to this one: the order over the number that commute with it."""
        images = self.permutations[element]
        before = self._find([self.permutations[:, images[point]] for point in self.base])
        return self.order // int((before == self.times(element)).sum())

    def _find(self, images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Return the elements with the given images of the base, one row per base point."""
        rank = np.zeros(len(images[0]) if len(images) else self.order, dtype=np.int64)
        for (_, numbering), image in zip(self._trie, images, strict=True):
            rank = numbering[rank * self.degree + image]
        return self._element[rank]

    @cached_property
    def orders(self) -> Int[np.ndarray, "G"]:
        """The order of every element: the least common multiple of its cycles through the base points."""
        rows, orders = np.arange(self.order), np.ones(self.order, dtype=np.int64)
        for point in self.base:
            length, image, away = np.ones_like(orders), self.permutations[:, point].astype(np.int64), rows
            while len(away := away[image[away] != point]):
                image[away] = self.permutations[away, image[away]]
                length[away] += 1
            orders = np.lcm(orders, length)
        return orders

    @cached_property
    def exponents(self) -> Counter[int]:
        """How many elements there are of each order."""
        return Counter(self.orders.tolist())

    @cached_property
    def primes(self) -> tuple[int, ...]:
        """The primes that divide the order."""
        return tuple(_factors(self.order))

    @cached_property
    def generators(self) -> tuple[int, ...]:
        """A few elements that generate the group."""
        chosen, members = [], self._generated([])
        while not members.all():
            chosen.append(int(np.argmin(members)))
            members = self._generated(chosen)
        return tuple(chosen)

    def _generated(self, generators: Sequence[int]) -> Bool[np.ndarray, "G"]:
        """Mark the subgroup that some elements generate."""
        steps = [self.times(g) for g in generators]
        members = np.zeros(self.order, dtype=bool)
        members[0], frontier = True, np.array([0])
        while len(frontier):
            reached = np.unique(np.concatenate([step[frontier] for step in steps])) if steps else frontier[:0]
            frontier = reached[~members[reached]]
            members[frontier] = True
        return members

    def _series(self, squares: bool) -> Iterator[int]:
        """Yield the orders of G, G', G'', ...: each generated by the commutators of the last (and, if asked, squares).

        The normal closure of the commutators (and squares) of generators is the smallest normal subgroup whose quotient
        is abelian (and of exponent 2). Ends at the trivial group, or where nothing changes.
        """
        generators, order = self.generators, self.order
        yield order
        while order > 1:
            seeds = [
                self.product(self.inverse(a), self.inverse(b), a, b) for a in generators for b in generators if a != b
            ]
            seeds += [self.product(a, a) for a in generators] if squares else []
            inside, members = [], self._generated([])
            while seeds:
                seed = seeds.pop()
                if not members[seed]:
                    inside.append(seed)
                    members = self._generated(inside)
                    seeds += [self.product(self.inverse(g), seed, g) for g in generators]
            if members.sum() == order:
                return
            generators, order = tuple(inside), int(members.sum())
            yield order

    @cached_property
    def derived_series(self) -> tuple[int, ...]:
        """The orders of the derived series, from the group itself down."""
        return tuple(self._series(squares=False))

    @property
    def abelian(self) -> bool:
        """Whether all elements commute."""
        return self.order == 1 or self.derived_series[1:2] == (1,)

    @property
    def solvable(self) -> bool:
        """Whether the derived series reaches the trivial group."""
        return self.derived_series[-1] == 1

    @property
    def derived_length(self) -> int | None:
        """The least number of abelian groups that it is built of; None if it is not solvable."""
        return len(self.derived_series) - 1 if self.solvable else None

    @cached_property
    def two_length(self) -> int | None:
        """The least number of groups Z2 x ... x Z2 that it is built of; None unless its order is a power of 2."""
        if self.primes not in ((), (2,)):
            return None
        return len(tuple(self._series(squares=True))) - 1

    @cached_property
    def name(self) -> str:
        """Z12, Z2 x Z4, S5, A5, D4, Q8 or AGL(1,7) where it is one of these, else its order."""
        if self.abelian:
            return _abelian_name(self.order, self.exponents)
        for n in range(3, 10):
            spectrum = _spectrum(n)
            if self.order == math.factorial(n) and set(self.exponents) == {order for order, _ in spectrum}:
                return f"S{n}"  # order and element orders characterise S_n and A_n (Bi and Shi 1991)
            even = {order for order, is_even in spectrum if is_even}
            if n > 3 and 2 * self.order == math.factorial(n) and set(self.exponents) == even:
                return f"A{n}"
        half = self.order // 2
        if self.exponents[half] and self.exponents[2] == half + (half % 2 == 0):
            return f"D{half}"
        if self.order == 8:
            return "Q8"
        p = max(self.primes)
        alone = not any(order % p == 0 and order > p for order in self.exponents)
        if self.order == p * (p - 1) and self.exponents[p] == p - 1 and alone:
            return f"AGL(1,{p})"
        return f"a group of order {self.order}"


def _factors(n: int) -> dict[int, int]:
    """Return the prime factorisation of n."""
    found: dict[int, int] = {}
    p = 2
    while n > 1:
        while n % p == 0:
            found[p] = found.get(p, 0) + 1
            n //= p
        p = p + 1 if p * p <= n else max(n, p + 1)
    return found


def _spectrum(n: int, largest: int | None = None) -> set[tuple[int, bool]]:
    """Return (order, is even) of the permutations of n points, from their cycle lengths."""
    if n == 0:
        return {(1, True)}
    return {
        (math.lcm(cycle, order), even == (cycle % 2 == 1))
        for cycle in range(1, min(n, largest or n) + 1)
        for order, even in _spectrum(n - cycle, cycle)
    }


def _abelian_name(order: int, exponents: Counter[int]) -> str:
    """Return the product of cyclic groups with so many elements of each order, as Z2 x Z12: each divides the next."""
    parts: list[list[int]] = []  # per prime, the orders of its cyclic factors, largest first
    for p, top in _factors(order).items():
        counts = [sum(c for d, c in exponents.items() if p**k % d == 0) for k in range(top + 1)]
        ranks = [round(math.log(counts[k + 1] / counts[k], p)) for k in range(top)]  # factors of order > p**k
        parts.append([p ** sum(rank > i for rank in ranks) for i in range(ranks[0])])
    most = max((len(part) for part in parts), default=0)
    factors = [math.prod(part[i] for part in parts if i < len(part)) for i in range(most)]
    return " x ".join(f"Z{factor}" for factor in reversed(factors)) or "Z1"
