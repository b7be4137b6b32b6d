"""The syntactic monoid against naive definitions, and known monoids."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.combinatorics import Permutation, PermutationGroup

from statetrack.automata import Automaton
from statetrack.automata.monoid import Monoid
from statetrack.automata.subgroups import Subgroup
from statetrack.errors import UsageError
from tests.test_automata import automata

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


def accepting(table: list[list[int]] | np.ndarray, *states: int, letters: str | None = None) -> Automaton:
    names = None if letters is None else tuple(letters)
    return Automaton(np.array(table), accepting=frozenset(states), letters=names)


def full(n: int) -> Automaton:
    """The automaton whose words do all maps of n states."""
    cycle, swap, merge = [*range(1, n), 0], [1, 0, *range(2, n)], [0, 0, *range(2, n)]
    return accepting(np.array([cycle, swap, merge]).T, 0)


def dyck(depth: int) -> Automaton:
    lost = depth + 1
    rows = [[min(q + 1, lost), q - 1 if q else lost] for q in range(depth + 1)]
    return accepting([*rows, [lost, lost]], 0, letters="()")


def last_wins(n: int, letters: int) -> Automaton:
    """Is the n-th letter from the end a 1?"""
    states = letters**n
    return accepting(
        [[(letters * q + x) % states for x in range(letters)] for q in range(states)],
        *[q for q in range(states) if q // letters ** (n - 1) == 1],
    )


# --- against the definitions -----------------------------------------------------------------------------------------


class Naive:
    """A monoid as a list of tuples, and every notion by its definition."""

    def __init__(self, automaton: Automaton):
        self.one = tuple(range(automaton.states))
        letters = [tuple(column) for column in automaton.table.T.tolist()]
        self.elements, queue = {self.one}, [self.one]
        self.reached = set()  # effects of words that are not empty
        while queue:
            s = queue.pop()
            for x in letters:
                t = self.times(s, x)
                self.reached.add(t)
                if t not in self.elements:
                    self.elements.add(t)
                    queue.append(t)
        self.idempotents = {e for e in self.elements if self.times(e, e) == e}

    @staticmethod
    def times(s: tuple[int, ...], t: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(t[q] for q in s)

    def right_ideal(self, s: tuple[int, ...]) -> frozenset:
        return frozenset(self.times(s, t) for t in self.elements)

    def left_ideal(self, s: tuple[int, ...]) -> frozenset:
        return frozenset(self.times(t, s) for t in self.elements)

    def ideal(self, s: tuple[int, ...]) -> frozenset:
        return frozenset(self.times(a, b) for a in self.left_ideal(s) for b in self.elements)

    def period(self, s: tuple[int, ...]) -> int:
        powers, power = [], s
        while power not in powers:
            powers.append(power)
            power = self.times(power, s)
        return len(powers) - powers.index(power)

    def law(self, name: str, inside: set | None = None) -> bool:
        t, pairs = self.times, itertools.product(self.idempotents if inside is None else inside, repeat=2)
        laws = {
            "EL": lambda e, f: t(e, f) != e or t(f, e) != f or e == f,
            "ER": lambda e, f: t(e, f) != f or t(f, e) != e or e == f,
            "W": lambda e, f: t(t(e, f), e) == t(f, e),
            "ECom": lambda e, f: t(e, f) == t(f, e),
        }
        return all(laws[name](e, f) for e, f in pairs)

    def local_law(self, name: str) -> bool:
        below = [
            {f for f in self.idempotents if self.times(e, f) == f == self.times(f, e)}
            for e in self.idempotents & self.reached
        ]
        return all(self.law(name, inside) for inside in below)


def classes(labels: np.ndarray, elements: list[tuple[int, ...]]) -> set[frozenset]:
    return {frozenset(elements[i] for i in np.flatnonzero(labels == c)) for c in np.unique(labels)}


def classes_by(key, elements: list[tuple[int, ...]]) -> set[frozenset]:
    found: dict = {}
    for s in elements:
        found.setdefault(key(s), set()).add(s)
    return {frozenset(members) for members in found.values()}


small = automata().map(lambda a: a.minimise()).filter(lambda a: len(Naive(a).elements) <= 300)


@given(small)
@settings(max_examples=80)
def test_everything_is_what_its_definition_says(automaton: Automaton):
    m, naive = Monoid(automaton), Naive(automaton)
    elements = [tuple(row) for row in m.elements.tolist()]
    assert m.complete and m.size == len(elements) == len(set(elements)) and set(elements) == naive.elements
    assert {elements[e] for e in m.idempotents} == naive.idempotents
    if m.size <= 60:
        assert classes(m.r_classes, elements) == classes_by(naive.right_ideal, elements)
        assert classes(m.l_classes, elements) == classes_by(naive.left_ideal, elements)
        assert classes(m.d_classes, elements) == classes_by(naive.ideal, elements)  # D = J in a finite monoid
    both = classes_by(lambda s: (m.r_classes[elements.index(s)], m.l_classes[elements.index(s)]), elements)
    assert classes(m.h_classes, elements) == both
    periods = [naive.period(s) for s in elements]
    assert [m.period(i) for i in range(m.size)] == periods
    assert m.periods == tuple(sorted(set(periods)))
    assert m.periodic.tolist() == [i for i, p in enumerate(periods) if p > 1]
    assert m.aperiodic.holds == (max(periods) == 1)
    assert m.one_idempotent_per_image.holds == naive.law("EL")
    assert m.last_wins.holds == naive.law("W")
    assert m.commuting_idempotents.holds == naive.law("ECom")
    assert m.block_group.holds == (naive.law("EL") and naive.law("ER"))
    assert m.locally_one_idempotent_per_image.holds == naive.local_law("EL")
    assert m.locally_last_wins.holds == naive.local_law("W")


@given(small)
@settings(max_examples=60)
def test_words_products_and_cayley_graphs(automaton: Automaton):
    m = Monoid(automaton)
    lengths = [len(m.word(i)) for i in range(m.size)]
    assert lengths == sorted(lengths) and all(m.element(m.word(i)) == i for i in range(m.size))
    for i in range(min(m.size, 40)):
        for x, names in enumerate(m.letters):
            assert m.right[i, x] == m.product(i, m.element(names[:1]))
            assert m.left[i, x] == m.product(m.element(names[:1]), i)
            assert len({m.element((letter,)) for letter in names}) == 1
    shortest = {tuple(m.elements[0].tolist()): 0}
    for length in range(1, 5):
        for word in itertools.product(range(automaton.alphabet), repeat=length):
            shortest.setdefault(tuple(m.elements[m.element(word)].tolist()), length)
    assert all(lengths[i] == shortest.get(tuple(m.elements[i].tolist()), lengths[i]) for i in range(m.size))


@given(small)
@settings(max_examples=60)
def test_the_current_token_does_not_help(automaton: Automaton):
    """Merging states that every letter takes to the same state changes none of the laws (docs/theory.md, Lemma)."""
    _, label = np.unique(automaton.table, axis=0, return_inverse=True)
    label = label.ravel()
    member = [int(np.argmax(label == c)) for c in range(label.max() + 1)]
    merged = Automaton(label[automaton.table[member]], int(label[automaton.start]), output=np.arange(len(member)))
    m, fewer = Monoid(automaton), Monoid(merged)
    for name in (
        "one_idempotent_per_image",
        "last_wins",
        "locally_one_idempotent_per_image",
        "locally_last_wins",
        "aperiodic",
    ):
        assert getattr(m, name).holds == getattr(fewer, name).holds, name
    assert [g.order for g in m.subgroups] == [g.order for g in fewer.subgroups]


# --- groups ----------------------------------------------------------------------------------------------------------


def whole_group(name: str) -> Subgroup:
    automaton = Automaton.from_group(name)
    m = Monoid(automaton)
    assert m.is_group and m.size == automaton.states and len(m.subgroups) == 1
    return m.subgroups[0]


GROUPS = {
    "Z2": "Z2",
    "Z60": "Z60",
    "Z2 x Z3": "Z6",
    "Z2 x Z4 x Z3": "Z2 x Z12",
    "Z2 x Z2 x Z2": "Z2 x Z2 x Z2",
    "Z3 x Z9": "Z3 x Z9",
    "S3": "S3",
    "D3": "S3",
    "D4": "D4",
    "D7": "D7",
    "S3 x Z2": "D6",
    "A4": "A4",
    "S4": "S4",
    "A5": "A5",
    "S5": "S5",
    "A6": "A6",
    "S4 x Z2": "a group of order 48",
    "A5 x Z2": "a group of order 120",
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_have_their_names(name: str):
    group = whole_group(name)
    oracle = PermutationGroup([Permutation(row.tolist()) for row in group.permutations[list(group.generators)]])
    assert group.name == GROUPS[name] and group.order == oracle.order()
    assert (group.abelian, group.solvable) == (oracle.is_abelian, oracle.is_solvable)
    assert group.derived_series == tuple(
        int(g.order()) for g in oracle.derived_series()
    )  # sympy repeats nothing, as ours
    sample = range(0, group.order, max(1, group.order // 20))
    assert [int(group.orders[i]) for i in sample] == [
        Permutation(group.permutations[i].tolist()).order() for i in sample
    ]


@pytest.mark.parametrize(
    ("name", "length", "two"),
    [("Z8", 1, 3), ("D4", 2, 2), ("Z2 x Z2", 1, 1), ("D8", 2, 3), ("S4", 3, None), ("Z3", 1, None)],
)
def test_lengths_of_series(name: str, length: int, two: int | None):
    group = whole_group(name)
    assert (group.derived_length, group.two_length) == (length, two)
    assert whole_group("A5").derived_length is None


@pytest.mark.parametrize(
    ("p", "base", "name", "order"),
    [(5, 2, "AGL(1,5)", 20), (7, 10, "AGL(1,7)", 42), (97, 10, "AGL(1,97)", 9312), (11, 10, "D11", 22)],
)
def test_affine_groups(p: int, base: int, name: str, order: int):
    """Numbers in some base divisible by p: x -> base x + digit."""
    m = Monoid(accepting([[(base * q + d) % p for d in range(base)] for q in range(p)], 0))
    assert m.size == order and [g.name for g in m.subgroups] == [name]


def test_quaternions():
    i, j = [1, 2, 3, 0, 5, 6, 7, 4], [4, 7, 6, 5, 2, 1, 0, 3]
    m = Monoid(accepting(np.array([i, j]).T, 0))
    assert m.size == 8 and m.subgroups[0].name == "Q8" and m.subgroups[0].two_length == 2


@given(st.integers(1, 6), st.data())
@settings(max_examples=40)
def test_random_permutation_groups_agree_with_sympy(points: int, data: st.DataObject):
    generators = data.draw(st.lists(st.permutations(range(points)), min_size=1, max_size=2))
    m = Monoid(Automaton(np.array(generators).T, output=np.arange(points)))
    oracle = PermutationGroup([Permutation(g) for g in m.generators.tolist()])
    assert m.size == oracle.order() and m.is_group
    for group in m.subgroups:
        assert (group.abelian, group.solvable) == (oracle.is_abelian, oracle.is_solvable)
        assert group.derived_series == tuple(int(g.order()) for g in oracle.derived_series())
        x = group.order // 2
        expected = {tuple(c.array_form) for c in oracle.conjugacy_class(Permutation(group.permutations[x].tolist()))}
        assert group.class_size(x) == len(expected)
        assert group.product(x, group.inverse(x)) == 0


# --- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4, 5, 6])
def test_all_maps(n: int):
    m = Monoid(full(n))
    assert m.size == n**n
    assert len(m.idempotents) == sum(math.comb(n, k) * k ** (n - k) for k in range(1, n + 1))
    assert [g.order for g in m.subgroups] == [math.factorial(k) for k in range(n, 1, -1)]
    assert len(np.unique(m.d_classes)) == n  # one for every rank


def test_a_monoid_cut_short_proves_only_what_it_has_found():
    m = Monoid(full(7), cap=20_000)
    assert not m.complete and m.size == 20_001
    assert m.aperiodic.holds is False and m.one_idempotent_per_image.holds is False and m.last_wins.holds is False
    for wrong in (lambda: m.right, lambda: m.subgroups, lambda: m.r_classes, lambda: m.periods):
        with pytest.raises(UsageError, match="more than 20000 elements"):
            wrong()
    brackets = Monoid(dyck(40), cap=500)
    whole = Monoid(dyck(40))
    assert whole.aperiodic.holds and whole.last_wins.holds and whole.commuting_idempotents.holds
    for name in ("aperiodic", "one_idempotent_per_image", "last_wins", "block_group", "locally_last_wins"):
        assert getattr(brackets, name).holds is None, name


def test_more_than_256_states():
    m = Monoid(last_wins(9, 2))
    assert m.automaton.states == 512 and m.size == 1023 and m.elements.dtype == np.uint16
    assert m.aperiodic.holds and m.last_wins.holds and not m.commuting_idempotents.holds


def test_a_hundred_thousand_elements_in_seconds():
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, n, (n, letters)) for n, letters in ((7, 2), (7, 2), (7, 2), (8, 3), (8, 3), (8, 3))]
    m = Monoid(Automaton(drawn[-1], output=np.arange(8)))
    assert (m.complete, m.size, m.aperiodic.holds) == (True, 85_653, False)
    assert [g.name for g in m.subgroups] == ["S4", "S3", "Z6", "Z4", "Z2"]
    brackets = Monoid(dyck(66))
    assert brackets.size == 1 + sum(k * k for k in range(1, 68)) and brackets.last_wins.holds
    assert time.perf_counter() - began < 20  # 2 s on an idle core


@pytest.mark.wrong_types
@pytest.mark.parametrize("cap", [0, -1, 2.5, True, "many"])
def test_a_bad_cap_is_refused(cap):
    with pytest.raises(UsageError, match="cap must be an integer >= 1"):
        Monoid(dyck(2), cap=cap)


def test_an_element_not_found_is_unknown():
    m = Monoid(full(5), cap=50)
    with pytest.raises(UsageError, match="unknown element: the monoid has more than 50 elements"):
        for i, j in itertools.product(range(m.size), repeat=2):
            m.product(i, j)


# --- the table -------------------------------------------------------------------------------------------------------

# states, letter classes, elements, groups, and whether EL, W, LEL hold (T) or fail (-)
TABLE = {
    "(a|b)*abb": (4, 2, 7, "", "TTT"),
    "parity (1s even)": (2, 2, 2, "Z2", "TTT"),
    "even a, odd b": (4, 2, 4, "Z2 x Z2", "TTT"),
    "a^(3m)": (3, 2, 3, "Z3", "TTT"),
    "mod-7 counter": (7, 2, 7, "Z7", "TTT"),
    "binary %3==0": (3, 2, 6, "S3", "TTT"),
    "decimal %7==0": (7, 7, 42, "AGL(1,7)", "TTT"),
    "binary %6==0": (4, 2, 13, "S3", "TTT"),
    "ISO date loose": (12, 3, 36, "", "TTT"),
    "ISO date strict": (15, 7, 84, "", "TTT"),
    "time HH:MM[:SS]": (11, 7, 36, "", "TTT"),
    "IPv4 strict": (25, 8, 140, "", "TTT"),
    "float literal": (9, 5, 24, "", "TTT"),
    "JSON number": (10, 7, 39, "", "--T"),
    "JSON string": (9, 8, 105, "Z2", "---"),
    "email simple": (8, 6, 23, "", "--T"),
    "identifier": (3, 3, 4, "", "--T"),
    "hex colour": (9, 3, 15, "", "TTT"),
    "UUID": (38, 5, 539, "", "TTT"),
    "MAC address": (19, 3, 49, "", "TTT"),
    "semver core+pre": (12, 6, 54, "", "---"),
    "URL simple": (17, 14, 131, "", "---"),
    "C comment": (6, 3, 25, "", "--T"),
    "CSV quoted row": (5, 4, 36, "Z2", "--T"),
    "roman numeral": (20, 8, 161, "", "TTT"),
    "py int with _": (6, 4, 12, "", "--T"),
    "US phone": (19, 6, 104, "", "TTT"),
    "contains aab": (4, 2, 10, "", "--T"),
    "subseq a..b..a": (4, 3, 7, "", "T-T"),
    "starts with a": (3, 2, 3, "", "--T"),
    "4th last is a": (16, 2, 31, "", "TTT"),
    "(aa|b)*": (3, 2, 7, "Z2", "TTT"),
    "(ab)*": (3, 2, 6, "", "TTT"),
    "a*b*c*": (4, 3, 8, "", "T-T"),
    "UTF-8 validity": (9, 12, 56, "", "--T"),
    "Dyck-1 depth 3": (5, 2, 31, "", "TTT"),
    "Dyck-1 depth 8": (10, 2, 286, "", "TTT"),
    "Dyck-2 depth 3": (16, 4, 285, "", "TTT"),
    "S5 word problem": (120, 2, 120, "S5", "TTT"),
    "A5 word problem": (60, 2, 60, "A5", "TTT"),
    "mod-5 arith (+,*)": (15, 7, 390, "AGL(1,5)", "--T"),
    "Tomita-3": (5, 2, 26, "Z2", "---"),
    "Tomita-7": (5, 2, 9, "", "T-T"),
    "ISO date lines": (15, 8, 241, "", "--T"),
    "IPv4 lines": (25, 9, 770, "", "--T"),
    "float CSV file": (10, 7, 78, "", "---"),
    "ends with C keyword (AC)": (111, 25, 343, "", "TTT"),
    "decimal %97==0": (97, 10, 9312, "AGL(1,97)", "TTT"),
    "decimal %100==0": (3, 2, 5, "", "TTT"),
    "7th last is a": (128, 2, 255, "", "TTT"),
    "C-ish token": (96, 33, 328, "Z2", "---"),
    "ISO datetime+tz": (39, 13, 682, "", "TTT"),
    "IPv6 full+compressed": (72, 3, 355, "", "TTT"),
    "HTTP request line": (36, 25, 418, "", "--T"),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_languages(name: str):
    """The figures of an earlier, independent program."""
    m = Monoid(pytest.importorskip("tests.languages").LANGUAGES[name]())
    flags = (m.one_idempotent_per_image, m.last_wins, m.locally_one_idempotent_per_image)
    groups = ", ".join(sorted({group.name for group in m.subgroups}))
    shown = "".join({True: "T", False: "-"}[bool(flag.holds)] for flag in flags)
    assert (m.automaton.states, len(m.letters), m.size, groups, shown) == TABLE[name]
