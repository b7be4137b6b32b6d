"""Shapes of automata: each against its definition, each cost against matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.automata import Automaton
from statetrack.automata.monoid import Monoid
from statetrack.automata.shapes import definite_order, injection_reset_cost, is_full_transformation_monoid, merge_cost
from statetrack.automata.witness import access_words
from tests.test_automata import automata
from tests.test_monoid import accepting, dyck
from tests.test_verdicts import A_THEN_B, FLIP_FLOP, MOD_3, run

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@given(automata().map(lambda a: a.minimise()))
@settings(max_examples=100)
def test_the_last_letters_decide(automaton: Automaton):
    order = definite_order(automaton)
    for k in range(automaton.states):
        words = (
            np.array(np.meshgrid(*[np.arange(automaton.alphabet)] * k)).reshape(k, -1).T if k else np.zeros((1, 0), int)
        )
        decided = all(len({run(automaton, tuple(w), q) for q in range(automaton.states)}) == 1 for w in words.tolist())
        assert decided == (order is not None and k >= order)


def test_a_reset_of_a_one_hot_state_is_simulated():
    """Follow the moves and resets that the cost counts, with Householder factors on a one-hot state."""
    for automaton, gate, cost in (
        (accepting([[1, 2], [2, 0], [2, 2]], 0), False, 2),  # (ab)*
        (FLIP_FLOP, False, 2),
        (FLIP_FLOP, True, 1),
        (dyck(3), False, 4),
        (MOD_3, False, 1),
        (accepting([[(3 * q + 1) % 7] for q in range(7)], 0), False, 5),
        (A_THEN_B, False, None),
    ):
        assert injection_reset_cost(automaton, gate) == cost
    eye, state = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    state[0] = 1
    swap = [eye - torch.outer(eye[i] - eye[i + 1], eye[i] - eye[i + 1]) for i in range(3)]
    opened = swap[0] @ swap[1] @ swap[2] @ (eye - torch.outer(eye[3], eye[3]))  # "(": 3 swaps and 1 projection
    for depth in range(1, 4):
        state = opened @ state
        assert torch.equal(state, eye[depth])
    assert not (opened @ state).any()


@given(automata())
@settings(max_examples=60)
def test_merges_are_the_rank_of_the_change(automaton: Automaton):
    """n - components of a map's graph is the rank of I - A, the fewest factors of rank one."""
    a = automaton.minimise()
    matrices = [np.eye(a.states)[:, column] for column in a.table.T]
    assert merge_cost(a) == max(np.linalg.matrix_rank(np.eye(a.states) - matrix) for matrix in matrices)


@given(st.integers(2, 5), st.data())
@settings(max_examples=60)
def test_all_maps_are_recognised(n: int, data: st.DataObject):
    cells = st.lists(st.integers(0, n - 1), min_size=n, max_size=n)
    letters = data.draw(st.lists(st.one_of(st.permutations(range(n)), cells), min_size=2, max_size=4))
    automaton = Automaton(np.array(letters).T, output=np.arange(n))
    m = Monoid(automaton)
    states = m.automaton.states
    assert is_full_transformation_monoid(m) == (m.size == states**states)
    if m.size > 8:
        assert is_full_transformation_monoid(Monoid(automaton, cap=5)) == is_full_transformation_monoid(m)


def test_access_words_are_shortest():
    assert access_words(dyck(3)) == [(), (0,), (0, 0), (0, 0, 0), (1,)]
