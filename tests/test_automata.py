"""Automata and groups: every fast path against the definition, every law, every refusal."""

import json
import time
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sympy.combinatorics import Permutation, PermutationGroup
from sympy.combinatorics.named_groups import AlternatingGroup, DihedralGroup, SymmetricGroup

from statetrack.automata import Automaton, parse_group, permutation_group
from statetrack.errors import UsageError

# beartype, which checks the types of what a strategy builds, picks the item of a container to check with `random`
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@st.composite
def automata(draw: st.DrawFn, letters: int = 2, moore: bool | None = None) -> Automaton:
    """A random automaton of at most 7 states; few outputs, so that minimising has something to merge."""
    states = draw(st.integers(1, 7))
    cell = st.integers(0, states - 1)
    table = draw(st.lists(st.lists(cell, min_size=letters, max_size=letters), min_size=states, max_size=states))
    if draw(st.booleans()) if moore is None else moore:
        output = draw(st.lists(st.integers(0, 2), min_size=states, max_size=states))
        return Automaton(np.array(table), draw(cell), output=np.array(output))
    return Automaton(np.array(table), draw(cell), accepting=draw(st.frozensets(cell)))


def words_of(seed: int, batch: int, tokens: int, letters: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, letters, (batch, tokens))


def step_by_step(automaton: Automaton, word: list[int], state: int) -> list[int]:
    states = []
    for letter in word:
        state = int(automaton.table[state][letter])
        states.append(state)
    return states


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 15, 16, 40])  # both sides of the switch between the two loops
@given(automaton=automata(letters=3), tokens=st.integers(0, 20), seed=st.integers(0, 2**16))
def test_run_is_the_definition(batch: int, automaton: Automaton, tokens: int, seed: int):
    words = words_of(seed, batch, tokens, letters=3)
    states = automaton.run(words)
    assert states.shape == (batch, tokens) and states.dtype == np.int64
    assert states.tolist() == [step_by_step(automaton, word, automaton.start) for word in words.tolist()]
    assert np.array_equal(automaton.outputs(words), automaton.emits[states])
    assert np.array_equal(automaton.run(torch.from_numpy(words)), states)


@pytest.mark.parametrize("batch", [2, 30])
@given(automaton=automata(), cut=st.integers(0, 12), seed=st.integers(0, 2**16))
def test_a_carried_state_continues_the_word(batch: int, automaton: Automaton, cut: int, seed: int):
    words = words_of(seed, batch, 12)
    start = words_of(seed + 1, 1, batch, automaton.states)[0]
    whole = automaton.run(words, start)
    state = np.column_stack([start, whole])[:, cut]
    assert np.array_equal(np.concatenate([whole[:, :cut], automaton.run(words[:, cut:], state)], axis=1), whole)


@pytest.mark.parametrize("shape", [(1, 1_000_000), (1000, 1000)])
def test_a_million_tokens_take_seconds(shape: tuple[int, int]):
    automaton = Automaton.from_group("S5")
    words = words_of(0, *shape, letters=120)
    begin = time.process_time()
    automaton.run(words)
    assert time.process_time() - begin < 3


@pytest.mark.wrong_types
def test_run_refuses_what_it_cannot_read():
    automaton = Automaton(np.array([[0, 1], [1, 0]]), accepting=frozenset({1}))
    for words in (np.array([[0, 2]]), np.array([[-1]]), np.array([0, 1]), np.array([[0.0]])):
        with pytest.raises(UsageError, match="words"):
            automaton.run(words)
    with pytest.raises(UsageError, match=r"states 0\.\.1, got 2"):
        automaton.run(np.array([[0]]), 2)


# --- product, minimise -----------------------------------------------------------------------------------------------


@given(a=automata(moore=False), b=automata(moore=False), seed=st.integers(0, 2**16))
def test_product_combines_the_languages(a: Automaton, b: Automaton, seed: int):
    words = words_of(seed, 20, 15)
    x, y = a.outputs(words), b.outputs(words)
    assert np.array_equal(a.product(b, "and").outputs(words), x & y)
    assert np.array_equal(a.product(b, "or").outputs(words), x | y)
    assert np.array_equal(a.product(b, "xor").outputs(words), x ^ y)


@given(a=automata(), b=automata(), seed=st.integers(0, 2**16))
def test_product_pairs_the_outputs(a: Automaton, b: Automaton, seed: int):
    words = words_of(seed, 20, 15)
    both = a.product(b)
    assert np.array_equal(both.outputs(words), a.outputs(words) * b.num_outputs + b.outputs(words))
    assert both.states <= a.states * b.states


@given(automaton=automata(), seed=st.integers(0, 2**16))
def test_minimise_keeps_what_is_said_and_nothing_else(automaton: Automaton, seed: int):
    small = automaton.minimise()
    words = words_of(seed, 20, 15)
    assert np.array_equal(small.outputs(words), automaton.outputs(words))
    assert small.emits[small.start] == automaton.emits[automaton.start]
    assert small.states == distinguishable_states(automaton)
    assert small.minimise() == small and small.equivalent(automaton)


def distinguishable_states(automaton: Automaton) -> int:
    """Count reachable states up to equivalence by the table-filling method, pair by pair."""
    reached = {automaton.start}
    while (more := reached | {int(q) for r in reached for q in automaton.table[r]}) != reached:
        reached = more
    differ = {(p, q) for p in reached for q in reached if automaton.emits[p] != automaton.emits[q]}
    while True:
        more = differ | {
            (p, q)
            for p in reached
            for q in reached
            if any((int(r), int(s)) in differ for r, s in zip(automaton.table[p], automaton.table[q], strict=True))
        }
        if more == differ:
            return len({frozenset(q for q in reached if (p, q) not in differ) for p in reached})
        differ = more


@given(a=automata(moore=False), b=automata(moore=False))
def test_equivalent_is_an_empty_symmetric_difference(a: Automaton, b: Automaton):
    difference = a.product(b, "xor")  # its states are exactly the reachable pairs
    assert a.equivalent(b) == (not difference.accepting)


@given(automaton=automata(letters=3), seed=st.integers(0, 2**16))
def test_minimise_forgets_how_states_were_numbered(automaton: Automaton, seed: int):
    new = np.random.default_rng(seed).permutation(automaton.states)  # the new number of every state
    old = np.argsort(new)
    table, start = new[automaton.table][old], int(new[automaton.start])
    if automaton.output is not None:
        renumbered = Automaton(table, start, output=automaton.output[old])
    else:
        renumbered = Automaton(table, start, accepting=frozenset(int(new[q]) for q in automaton.accepting or ()))
    assert renumbered.minimise() == automaton.minimise()
    met = [0, *automaton.minimise().table.ravel().tolist()]  # rows in order, letters in order: as a queue meets them
    assert list(dict.fromkeys(met)) == sorted(set(met))


def test_minimise_keeps_a_counter_whole_and_shrinks_a_padded_one():
    states = np.arange(3000)
    counter = Automaton((states[:, None] + np.array([0, 1])) % 3000, output=states % 1000)
    assert counter.minimise().states == 1000
    chain = Automaton(np.minimum(states + 1, 2999)[:, None], accepting=frozenset({2999}))
    assert chain.minimise().states == 3000


def test_minimise_takes_n_log_n_on_chains():
    n = 100_000
    states, last = np.arange(n), frozenset({n - 1})
    forward = np.minimum(states + 1, n - 1)
    chain = Automaton(np.stack([forward, np.maximum(states - 1, 0)], 1), accepting=last)
    turning = Automaton(np.stack([(states + 1) % n, states], 1), output=states % 1000)
    began = time.process_time()
    assert chain.minimise().states == n
    assert turning.minimise().states == 1000
    assert chain.equivalent(Automaton(n - 1 - chain.table[::-1], n - 1, accepting=frozenset({0})))
    assert time.process_time() - began < 60  # a quadratic algorithm takes hours


def test_product_refuses_other_alphabets_and_unknown_combinations():
    flip = Automaton(np.array([[0, 1], [1, 0]]), accepting=frozenset({1}))
    with pytest.raises(UsageError, match="one alphabet, got 2 letters and 6 letters"):
        flip.product(Automaton.from_group("S3"))
    with pytest.raises(UsageError, match="'nand' is unknown; accepted: pair, and, or, xor"):
        flip.product(flip, "nand")
    with pytest.raises(UsageError, match="accepting sets"):
        Automaton.from_group("S3").product(Automaton.from_group("S3"), "and")


def test_idle_letters_change_nothing():
    automaton = Automaton.from_group("S3").with_idle_letters("a", "b")
    states = np.arange(6)
    assert automaton.alphabet == 8
    assert np.array_equal(automaton.table[:, 6], states) and np.array_equal(automaton.table[:, 7], states)


def test_automata_are_frozen_and_hash_with_equality():
    a, b = (Automaton(np.array([[0, 1], [1, 0]]), accepting=frozenset({q})) for q in (0, 1))
    assert a != b and a == Automaton(np.array([[0, 1], [1, 0]]), accepting=frozenset({0}))
    assert len({a, b, Automaton(np.array([[0, 1], [1, 0]]), accepting=frozenset({0}))}) == 2
    with pytest.raises(ValueError, match="read-only"):
        a.table[0, 0] = 1


# --- files -----------------------------------------------------------------------------------------------------------


@given(automaton=automata())
def test_json_round_trip(automaton: Automaton, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("json") / "automaton.json"
    automaton.to_json(path)
    assert Automaton.from_json(path) == automaton


def test_json_keeps_letters_and_start(tmp_path):
    automaton = Automaton(np.array([[0, 1], [1, 0]]), 1, accepting=frozenset({1}), letters=("zero", "one"))
    automaton.to_json(tmp_path / "a.json")
    assert Automaton.from_json(tmp_path / "a.json").letters == ("zero", "one")
    assert Automaton.from_json(tmp_path / "a.json").start == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"table": [[0, 1], [1]], "accepting": [0]}, "row 1 has 1 entries, row 0 has 2"),
        ({"table": [[0, 1], [1, 2]], "accepting": [0]}, r"table\[1\]\[1\] = 2 is no state; accepted: 0\.\.1"),
        ({"table": [[0, -1]], "accepting": [0]}, r"table\[0\]\[1\] = -1 is no state"),
        ({"table": [[0.5]], "accepting": [0]}, "all integers; row 0"),
        ({"table": [["0"]], "accepting": [0]}, "all integers; row 0"),
        ({"table": [[True]], "accepting": [0]}, "all integers; row 0"),
        ({"table": [0, 1], "accepting": [0]}, "all integers"),
        ({"table": "x", "accepting": [0]}, "all integers"),
        ({"table": [], "accepting": [0]}, "table"),
        ({"table": [[]], "accepting": [0]}, "table"),
        ({"table": [[0]], "start": 1, "accepting": [0]}, r"start holds 1, which is no state; accepted: 0\.\.0"),
        ({"table": [[0]], "start": "0", "accepting": [0]}, "start holds '0'"),
        ({"table": [[0]], "accepting": [1]}, "accepting holds 1"),
        ({"table": [[0]], "accepting": 0}, "accepting must be a list"),
        ({"table": [[0]]}, "exactly one of accepting"),
        ({"table": [[0]], "accepting": [0], "output": [0]}, "exactly one of accepting"),
        ({"table": [[0]], "output": [0, 1]}, "one integer >= 0 for each of 1 states"),
        ({"table": [[0]], "output": [-1]}, "one integer >= 0"),
        ({"table": [[0]], "output": [0.5]}, "output must be a list of integers"),
        ({"table": [[0]], "output": [0], "letters": ["a", "b"]}, "letters must be 1 different strings"),
        ({"table": [[0]], "output": [0], "letters": [["a"]]}, "letters must be 1 different strings"),
        ({"table": [[0]], "output": [0], "letters": 7}, "letters must be 1 different strings"),
        ({"table": [[0]], "output": []}, "one integer >= 0 for each of 1 states"),
        ({"table": [[0]], "accepting": [[0]]}, "accepting must be a list of integers"),
        ({"table": [[0]], "output": [0], "finals": [0]}, "found .*finals"),
        ([[0]], "found list"),
    ],
)
@pytest.mark.wrong_types
def test_malformed_files_are_named_and_explained(tmp_path, content: object, message: str):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=message) as caught:
        Automaton.from_json(path)
    assert str(path) in str(caught.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(UsageError, match="cannot read the automaton file"):
        Automaton.from_json(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("table: 1")
    with pytest.raises(UsageError, match="is not JSON"):
        Automaton.from_json(tmp_path / "text.json")


# --- groups ----------------------------------------------------------------------------------------------------------

ORDERS = {"Z1": 1, "Z2": 2, "Z60": 60, "S1": 1, "S3": 6, "S4": 24, "A2": 1, "A4": 12, "A5": 60, "S5": 120, "D3": 6}
ORDERS |= {"D7": 14, "Z2 x S3": 12, "Z2xZ2xZ2": 8, "Z_4": 4, "S3 × D4": 48}


@pytest.mark.parametrize("name", ORDERS)
def test_group_axioms(name: str):
    group = parse_group(name)
    table, elements = group.table, np.arange(group.order)
    assert group.order == ORDERS[name]
    assert np.array_equal(table[0], elements) and np.array_equal(table[:, 0], elements)
    assert np.array_equal(np.sort(table, axis=1), np.tile(elements, (group.order, 1)))  # every row has every element
    assert ((table == 0).sum(axis=1) == 1).all()
    a, b, c = np.random.default_rng(0).integers(0, group.order, (3, 5000))
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]])


def test_products_apply_the_first_letter_first():
    rows = list(permutations(range(4)))
    table = parse_group("S4").table
    for a, first in enumerate(rows):
        for b, second in enumerate(rows):
            assert rows[table[a, b]] == tuple(second[first[i]] for i in range(4))


def test_cyclic_group_is_addition():
    elements = np.arange(60)
    assert np.array_equal(parse_group("Z60").table, (elements[:, None] + elements) % 60)


def test_direct_product_multiplies_componentwise():
    z, s, both = parse_group("Z4").table, parse_group("S3").table, parse_group("Z4 x S3").table
    x, y = np.divmod(np.arange(24), 6)
    assert np.array_equal(both, z[x[:, None], x] * 6 + s[y[:, None], y])


@pytest.mark.parametrize(
    ("name", "sympy_group"),
    [("S4", SymmetricGroup(4)), ("A5", AlternatingGroup(5)), ("D6", DihedralGroup(6)), ("S1", SymmetricGroup(1))],
)
def test_sympy_groups_are_the_same_groups(name: str, sympy_group: PermutationGroup):
    assert np.array_equal(permutation_group(sympy_group).table, parse_group(name).table)
    assert Automaton.from_group(sympy_group) == Automaton.from_group(name)


def test_a_sympy_group_that_fixes_points():
    group = permutation_group(PermutationGroup(Permutation([0, 2, 3, 1, 4])))
    assert np.array_equal(group.table, parse_group("Z3").table)
    assert group.moved.tolist() == [0, 3, 3]


def test_word_problem_follows_the_product():
    rows = list(permutations(range(5)))
    words = words_of(0, 20, 30, letters=120)
    states = Automaton.from_group("S5").outputs(words)
    for word, found in zip(words.tolist(), states.tolist(), strict=True):
        points = tuple(range(5))
        for letter, state in zip(word, found, strict=True):
            points = tuple(rows[letter][p] for p in points)
            assert rows[state] == points


@pytest.mark.wrong_types
def test_letters_may_be_a_subset():
    whole, some = Automaton.from_group("S5"), Automaton.from_group("S5", letters=[7, 0, 119])
    assert np.array_equal(some.table, whole.table[:, [7, 0, 119]])
    wrong: list[Any] = [[120], [-1], [], [0.5]]
    for letters in wrong:
        with pytest.raises(UsageError, match="letters"):
            Automaton.from_group("S5", letters=letters)


def test_swaps_and_three_cycles_are_counted():
    moved = parse_group("S5").moved
    assert (moved <= 2).sum() == 11 and (moved <= 3).sum() == 31


@pytest.mark.parametrize("name", ["Q8", "S", "5", "", "Z0", "D2", "S5 x", "S5 S3", "S-1", "s5", "Z1.5"])
def test_unknown_groups_are_refused(name: str):
    with pytest.raises(UsageError, match="accepted: Z<n>"):
        parse_group(name)


@pytest.mark.parametrize("name", ["S8", "S100000", "A100000", "Z5041", "D3000", "S6 x S5", "Z999999999"])
def test_huge_groups_are_refused_at_once(name: str):
    begin = time.process_time()
    with pytest.raises(UsageError, match="more than 5040 elements"):
        parse_group(name)
    assert time.process_time() - begin < 0.5


def test_group_of_another_type_is_refused():
    five: Any = 5
    with pytest.raises(UsageError, match="got int"):
        Automaton.from_group(five)


def test_s6_table_is_fast():
    begin = time.process_time()
    assert parse_group("S6").table.shape == (720, 720)
    assert time.process_time() - begin < 0.5
