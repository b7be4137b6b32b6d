"""Automata from functions, automata-lib, permutations and presentations, each against an independent definition."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from automata.fa.dfa import DFA
from automata.fa.nfa import NFA
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.combinatorics import Permutation, PermutationGroup
from sympy.combinatorics.coset_table import coset_enumeration_r
from sympy.combinatorics.fp_groups import FpGroup
from sympy.combinatorics.free_groups import free_group

from statetrack.automata import (
    Automaton,
    automaton_of,
    from_automata_lib,
    from_function,
    from_permutations,
    from_presentation,
    parse_group,
    regex,
)
from statetrack.automata.sources import cycles, parse_cycles
from statetrack.errors import UsageError

SWAP, CYCLE = (1, 0, 2, 3, 4), (1, 2, 3, 4, 0)


def words(letters: str, longest: int) -> list[str]:
    """Every word up to that length."""
    found = [""]
    for word in found:
        if len(word) < longest:
            found += [word + letter for letter in letters]
    return found


# --- a step function -------------------------------------------------------------------------------------------------


def test_from_function_explores_and_minimises():
    automaton = from_function(0, lambda q, x: (10 * q + int(x)) % 100, lambda q: q == 0, "0123456789")
    assert automaton.states == 3  # only the last two digits matter
    assert automaton.accepts(["", "100", "1200", "10", "7"]).tolist() == [True, True, True, False, False]


def test_from_function_stops_at_ten_thousand_states():
    with pytest.raises(UsageError, match="the step function has more than 10,000 states"):
        from_function(0, lambda q, _: q + 1, lambda q: q == 0, "a")


# --- automata-lib ----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(data=st.data(), states=st.integers(1, 6), partial=st.booleans())
def test_a_dfa_of_automata_lib(data: st.DataObject, states: int, partial: bool):
    target = st.integers(0, states - 1)
    row = (
        st.dictionaries(st.sampled_from("ab"), target) if partial else st.fixed_dictionaries({"a": target, "b": target})
    )
    machine = DFA(
        states=set(range(states)),
        input_symbols={"a", "b"},
        transitions={q: data.draw(row) for q in range(states)},
        initial_state=data.draw(target),
        final_states=data.draw(st.frozensets(target)),
        allow_partial=partial,
    )
    automaton = from_automata_lib(machine, complete=partial)
    assert automaton.letters == ("a", "b")
    texts = words("ab", 6)
    assert automaton.accepts(texts).tolist() == [machine.accepts_input(text) for text in texts]
    assert automaton.states == len(machine.to_complete().minify().states if partial else machine.minify().states)


@settings(max_examples=60)
@given(data=st.data(), states=st.integers(1, 5))
def test_an_nfa_of_automata_lib(data: st.DataObject, states: int):
    targets = st.sets(st.integers(0, states - 1))
    machine = NFA(
        states=set(range(states)),
        input_symbols={"a", "b"},
        transitions={q: data.draw(st.dictionaries(st.sampled_from(["a", "b", ""]), targets)) for q in range(states)},
        initial_state=0,
        final_states=data.draw(targets),
    )
    texts = words("ab", 6)
    assert automaton_of(machine).accepts(texts).tolist() == [machine.accepts_input(text) for text in texts]


def test_a_missing_transition_is_named():
    machine = DFA(
        states={"p", "q"},
        input_symbols={"a", "b"},
        transitions={"p": {"a": "q", "b": "p"}, "q": {"a": "p"}},
        initial_state="p",
        final_states={"q"},
        allow_partial=True,
    )
    with pytest.raises(
        UsageError, match="state 'q' has no transition for letter 'b'; complete=True adds a rejecting sink"
    ):
        from_automata_lib(machine)
    assert from_automata_lib(machine, complete=True) == regex("b*a(ab*a)*", alphabet="ab")


def test_what_is_no_automata_lib_object():
    with pytest.raises(UsageError, match="expected a DFA or an NFA of automata-lib, got int"):
        from_automata_lib(5)


# --- permutations ----------------------------------------------------------------------------------------------------


def test_permutations_give_the_word_problem():
    automaton = from_permutations([SWAP, CYCLE])
    assert automaton.letters == ("(0 1)", "(0 1 2 3 4)") and automaton.states == automaton.num_outputs == 120
    group = parse_group("S5")
    rows = [tuple(row) for row in group.permutations.tolist()]
    same = Automaton.from_group(group, [rows.index(SWAP), rows.index(CYCLE)])
    draw = np.random.default_rng(0).integers(0, 2, (50, 40))
    ours, theirs = automaton.outputs(draw), same.outputs(draw)
    assert len(set(zip(ours.ravel().tolist(), theirs.ravel().tolist(), strict=True))) == len(np.unique(theirs))
    assert np.array_equal(ours == 0, theirs == 0)  # 0 is the identity in both


def test_the_first_letter_is_applied_first():
    product = [(1, 0, 2)[point] for point in (1, 2, 0)]  # first the cycle, then the swap
    automaton = from_permutations([[1, 2, 0], [1, 0, 2], product])
    assert automaton.run(np.array([[0, 1]]))[0, -1] == automaton.run(np.array([[2]]))[0, -1]


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        ([], "at least one generator"),
        ([(0, 1), (1, 1)], r"generator 1 is no permutation of the points 0..1: \(1, 1\)"),
        ([(0, 1), (1, 2, 0)], "generator 1 is no permutation of the points 0..1"),
        ([(1, 0), (1, 0)], "letters must be 2 different strings"),
        ([(*range(1, 9), 0), (1, 0, *range(2, 9))], "a group of order 362,880; accepted: at most 10,000"),
    ],
)
def test_permutations_that_are_refused(generators: list[tuple[int, ...]], message: str):
    with pytest.raises(UsageError, match=message):
        from_permutations(generators)


@given(permutation=st.permutations(range(7)))
def test_cycles_round_trip(permutation: list[int]):
    text = f"{cycles(permutation)}; (0 6)"  # the second names the largest point
    assert parse_cycles(text) == [permutation, [6, 1, 2, 3, 4, 5, 0]]
    assert Permutation(permutation).order() == Permutation(parse_cycles(text)[0]).order()


@pytest.mark.parametrize("text", ["", "(0 1", "0 1", "(0 1);", "(a b)", "(0 1))", "(0 -1)"])
def test_cycles_that_cannot_be_read(text: str):
    with pytest.raises(UsageError, match="permutations: cannot read"):
        parse_cycles(text)


@pytest.mark.parametrize("text", ["(0 0)", "(0 1)(1 2)"])
def test_cycles_that_share_a_point(text: str):
    with pytest.raises(UsageError, match="a point occurs twice"):
        parse_cycles(text)


# --- presentations ---------------------------------------------------------------------------------------------------

COXETER_A5 = "a,b,c,d,e | " + ", ".join(
    [f"{x}^2" for x in "abcde"] + ["(a b)^3", "(b c)^3", "(c d)^3", "(d e)^3"]
    + ["(a c)^2", "(a d)^2", "(a e)^2", "(b d)^2", "(b e)^2", "(c e)^2"]
)  # fmt: skip
ORDERS = {
    "x | x^5": 5,
    "x | x": 1,
    "x, y | x^4, x^2 y^-2, y^-1 x y x": 8,
    "<x, y | x^2, y^3, (x y)^5>": 60,
    "a, b | a^2 = b^3 = (a b)^4 = 1": 24,
    "x, y | [x, y], x^9, y**11": 99,
    "r, s | r^12, s*s, s r s = r^-1": 24,
    "x, y | x^2, y^3, (x*y)^7, [x, y]^4": 168,
    "x, y, z | x y = z, y z = x, z x = y": 8,
    "x, y | x^-1 y x y^-2, y^-1 x y x^-2": 1,
    COXETER_A5: 720,
}


@pytest.mark.parametrize("presentation", ORDERS)
def test_presentations(presentation: str):
    automaton = from_presentation(presentation)
    table, states = automaton.table, np.arange(automaton.states)
    assert automaton.states == ORDERS[presentation] and np.array_equal(automaton.emits, states)
    assert (np.sort(table, axis=0) == states[:, None]).all()  # letters are permutations of the elements
    group = PermutationGroup([Permutation(column) for column in table.T.tolist()])
    assert group.order() == automaton.states  # and act regularly


def test_every_relator_holds_at_every_element():
    table = from_presentation("x, y | x^4, x^2 y^-2, y^-1 x y x").table
    letters: list[Any] = [Permutation(column) for column in table.T.tolist()]
    x, y = letters
    assert all(relator.order() == 1 for relator in (x**4, x**2 * y**-2, y**-1 * x * y * x))


FINITE = [(2, 2, 5), (2, 3, 3), (2, 3, 4), (3, 2, 5), (4, 3, 2), (2, 6, 2)]  # triangle groups


@settings(max_examples=40)
@given(powers=st.sampled_from(FINITE), extra=st.lists(st.sampled_from(["x y x", "[x,y]", "x y^-1"]), max_size=2))
def test_presentations_against_sympy(powers: tuple[int, int, int], extra: list[str]):
    free, x, y = free_group("x, y")
    meaning = {"x y x": x * y * x, "[x,y]": x**-1 * y**-1 * x * y, "x y^-1": x * y**-1}
    relators = [x ** powers[0], y ** powers[1], (x * y) ** powers[2], *(meaning[word] ** 2 for word in extra)]
    written = [f"x^{powers[0]}", f"y^{powers[1]}", f"(x y)^{powers[2]}", *(f"({word})^2" for word in extra)]
    enumerated = coset_enumeration_r(FpGroup(free, relators), [])
    order = sum(coset == first for coset, first in enumerate(enumerated.p))
    assert from_presentation(f"x, y | {', '.join(written)}").states == order


@pytest.mark.parametrize("text", ["x, y |", "x, y | x^2, y^3, (x y)^7", "x | x^10000"])
def test_infinite_and_huge_groups_end_within_seconds(text: str):
    begin = time.process_time()
    with pytest.raises(UsageError, match="is infinite or too large: gave up after naming [0-9,]* elements"):
        from_presentation(text)
    assert time.process_time() - begin < 10


def test_a_finite_group_with_too_many_elements():
    with pytest.raises(UsageError, match="has more than 10,000 states"):
        from_presentation("x, y | [x, y], x^101, y^103")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x, y", "expected different names, a bar, and relations"),
        ("x, x | x^2", "expected different names"),
        ("x, 2 | x^2", "expected different names"),
        ("x, y | xy", r"'xy' is no generator \(they are x, y\)"),
        ("x | x^y", "the exponent 'y' is no integer"),
        ("x | x^", "the exponent '' is no integer"),
        ("x | (x", "a bracket is not closed"),
        ("x | [x]", r"a commutator is written \[x, y\]"),
        ("x | [x, x", "a bracket is not closed"),
        ("x | x^2,, x", "',' is no generator"),
        ("x | x^2 =", "a word is missing"),
        ("x | x^2 )", r"cannot read '\)'"),
        ("x | x^20000", "a relator has more than 10,000 letters"),
        ("x | (x^9999) (x^9999)", "a relator has more than 10,000 letters"),
        ("x | ((x^999)^999)", "a relator has more than 10,000 letters"),
    ],
)
def test_presentations_that_cannot_be_read(text: str, message: str):
    with pytest.raises(UsageError, match=message) as caught:
        from_presentation(text)
    assert "write it like 'x, y | x^4" in str(caught.value)
