"""What can be tracked: every answer known from the papers, every witness run, every law of the answers."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack.automata import Automaton
from statetrack.automata.monoid import Monoid
from statetrack.automata.shapes import injection_reset_cost
from statetrack.automata.verdicts import Family, Structure, Verdict, judge, lower_bounds
from statetrack.automata.witness import Witness
from statetrack.errors import UsageError
from tests.test_automata import automata
from tests.test_monoid import accepting, dyck, full, last_wins

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")

LAST_A = accepting([[1, 0], [1, 0]], 1, letters="ab")
FIRST_A = accepting([[1, 2], [1, 1], [2, 2]], 1, letters="ab")
PARITY = accepting([[0, 1], [1, 0]], 0)
FLIP_FLOP = accepting([[0, 1, 0], [0, 1, 1]], 1)
PARITY_SINCE = accepting([[1, 0, 0], [0, 1, 0]], 0)  # flip, wait, reset
TWO_FLIP_FLOPS = Automaton(np.array([[q & 2, q | 1, q & 1, q | 2] for q in range(4)]), output=np.arange(4))
A_THEN_B = accepting([[1, 0], [1, 2], [2, 2]], 2, letters="ab")
MOD_3 = accepting([[0, 1], [2, 0], [1, 2]], 0)
GROUPS = {name: Automaton.from_group(name) for name in ("Z2 x Z2", "Z3", "Z4", "Z8", "S3", "D4", "S4", "A5", "S5")}

UP_TO_1 = Structure(family="diagonal", eigenvalues=(0.0, 1.0))
REAL = Structure(family="diagonal")
COMPLEX = Structure(family="complex-diagonal")
DELTANET_0 = Structure(family="householder", eigenvalues=(0.0, 1.0), factors=8)
DELTANET = Structure(family="householder")
RWKV7 = Structure(family="dplr")


def one(structure: Structure, **changes) -> Structure:
    return replace(structure, layers=1, **changes)


# structure, automaton, answer, least layers, least factors
KNOWN: list[tuple[Structure, Automaton, str, int | None, int]] = [
    (one(UP_TO_1), LAST_A, "yes", 1, 1),
    (one(UP_TO_1), FIRST_A, "no", 2, 1),
    (UP_TO_1, FIRST_A, "yes", 2, 1),
    (one(DELTANET, factors=4, gate=True), FIRST_A, "no", 2, 1),
    (one(DELTANET, window=1), FIRST_A, "unknown", 1, 1),
    (one(RWKV7), FIRST_A, "yes", 1, 1),
    (UP_TO_1, PARITY, "no", None, 1),
    (DELTANET_0, PARITY, "no", None, 1),
    (replace(DELTANET, eigenvalues=(-0.99, 1.0)), PARITY, "no", None, 1),
    (replace(DELTANET, eigenvalues=(-0.99, 1.0), window=3), GROUPS["S5"], "no", None, 1),
    (one(REAL), PARITY, "yes", 1, 1),
    (one(DELTANET), PARITY, "yes", 1, 1),
    (one(UP_TO_1), FLIP_FLOP, "yes", 1, 1),
    (replace(REAL, eigenvalues=(-0.5, 0.9)), FLIP_FLOP, "no", None, 1),
    (replace(REAL, eigenvalues=(-0.5, 0.9)), LAST_A, "yes", 1, 1),
    (replace(REAL, eigenvalues=(-0.5, 0.9)), last_wins(3, 2), "yes", 1, 1),
    (replace(DELTANET, eigenvalues=(-0.5, 0.9)), FLIP_FLOP, "yes", 1, 1),
    (replace(REAL, eigenvalues=(0.5, 1.0)), FLIP_FLOP, "unknown", 1, 1),
    (replace(REAL, selective=False), FLIP_FLOP, "unknown", 1, 1),
    (one(REAL), PARITY_SINCE, "yes", 1, 1),
    (one(DELTANET), PARITY_SINCE, "yes", 1, 1),
    (one(COMPLEX, eigenvalues=(0.0, 1.0)), PARITY_SINCE, "yes", 1, 1),
    (one(UP_TO_1), PARITY_SINCE, "no", None, 1),
    (one(UP_TO_1), TWO_FLIP_FLOPS, "yes", 1, 1),
    (one(REAL), A_THEN_B, "no", 2, 1),
    (one(DELTANET), A_THEN_B, "unknown", 1, 1),
    (REAL, MOD_3, "no", None, 1),
    (COMPLEX, MOD_3, "yes", 2, 1),
    (one(DELTANET), MOD_3, "yes", 1, 1),
    (one(REAL), GROUPS["Z2 x Z2"], "yes", 1, 1),
    (REAL, GROUPS["Z8"], "yes", 3, 1),
    (replace(REAL, layers=2), GROUPS["Z8"], "no", 3, 1),
    (replace(REAL, layers=3), GROUPS["Z8"], "unknown", 3, 1),
    (REAL, GROUPS["D4"], "yes", 2, 1),
    (REAL, GROUPS["Z3"], "no", None, 1),
    (one(COMPLEX), GROUPS["Z3"], "yes", 1, 1),
    (COMPLEX, GROUPS["S4"], "yes", 3, 1),
    (COMPLEX, GROUPS["A5"], "no", None, 1),
    (one(DELTANET), GROUPS["Z3"], "no", 1, 2),
    (replace(DELTANET, layers=2), GROUPS["Z3"], "yes", 1, 1),
    (one(DELTANET, factors=2), GROUPS["Z3"], "yes", 1, 2),
    (one(DELTANET, factors=2), GROUPS["S3"], "yes", 1, 2),
    (one(DELTANET, factors=2), GROUPS["S4"], "yes", 1, 2),
    (one(DELTANET, factors=2), GROUPS["A5"], "yes", 1, 2),
    (one(DELTANET, factors=2), GROUPS["S5"], "unknown", 1, 2),
    (one(DELTANET, factors=4), GROUPS["S5"], "yes", 1, 2),
    (replace(DELTANET, layers=4), GROUPS["S5"], "yes", 1, 1),
    (replace(DELTANET, layers=3, factors=2), GROUPS["S5"], "yes", 1, 1),
    (replace(DELTANET, layers=2), GROUPS["S5"], "unknown", 1, 1),
    (DELTANET, full(6), "yes", 5, 1),
    (replace(DELTANET, layers=4, factors=9, gate=True, window=3), full(6), "no", 5, 1),
    (replace(DELTANET, layers=5), full(7), "no", 6, 1),
    (replace(RWKV7, layers=1, factors=5), full(6), "yes", 1, 1),
    (replace(RWKV7, layers=4), full(6), "yes", 1, 1),
    (replace(RWKV7, layers=1, factors=4), full(6), "unknown", 1, 1),
    (one(DELTANET, factors=2), accepting([[1, 2], [2, 0], [2, 2]], 0), "yes", 1, 1),
    (one(RWKV7), GROUPS["Z3"], "unknown", 1, 1),
    (one(RWKV7), GROUPS["Z2 x Z2"], "yes", 1, 1),
    (replace(RWKV7, eigenvalues=(0.0, 1.0)), PARITY, "unknown", 1, 1),
    (replace(RWKV7, eigenvalues=(0.0, 1.0)), A_THEN_B, "yes", 1, 1),
    (one(COMPLEX, eigenvalues=(0.0, 1.0)), GROUPS["Z3"], "yes", 1, 1),
    (one(replace(DELTANET_0, factors=1)), GROUPS["Z2 x Z2"], "no", None, 1),
    (Structure(family="attention", layers=4), GROUPS["S5"], "unknown", 1, 1),
    (Structure(family="attention", layers=4), PARITY, "unknown", 1, 1),
    (Structure(family="attention"), LAST_A, "yes", 1, 1),
    (Structure(family="nonlinear", layers=1), GROUPS["S5"], "yes", 1, 1),
]


@pytest.mark.parametrize("row", range(len(KNOWN)))
def test_known_answers(row: int):
    structure, automaton, answer, layers, factors = KNOWN[row]
    verdict = judge(Monoid(automaton, cap=60_000), structure)
    assert (verdict.answer, verdict.min_layers, verdict.min_factors) == (answer, layers, factors), verdict
    assert verdict.reason and str(verdict).startswith(f"{answer}: {verdict.reason}")
    assert bool(verdict.theorem) == (answer != "unknown")
    if verdict.witness:
        check_witness(automaton, verdict.witness)


def test_swaps_need_one_factor():
    """P1: products of swaps, one layer of DeltaNet."""
    for name in ("S3", "S4", "S5"):
        automaton = GROUPS[name]
        swaps = [x for x, row in enumerate(automaton.table) if x and moves_two(name, x)]
        letters = Automaton(automaton.table[:, [0, *swaps]], output=automaton.output)
        assert judge(letters, one(DELTANET)).answer == "yes"
    up_to_3 = Automaton(automaton.table[:, [0, 1, 3]], output=automaton.output)
    assert judge(up_to_3, one(DELTANET)).answer == "no"


def moves_two(name: str, element: int) -> bool:
    from statetrack.automata import parse_group

    return int(parse_group(name).moved[element]) == 2


def test_attention_says_why():
    reason = judge(GROUPS["S5"], Structure(family="attention")).reason
    assert "TC0" in reason and "TC0" not in judge(GROUPS["S3"], Structure(family="attention")).reason


def test_beyond_the_cap():
    short = Monoid(dyck(60), cap=100)
    assert judge(short, UP_TO_1).answer == "unknown" and "more than 100 elements" in judge(short, UP_TO_1).reason
    assert judge(short, DELTANET).answer == "yes" and judge(short, one(DELTANET, factors=61)).answer == "yes"
    assert lower_bounds(short).layers == 1 and "more than 100" in lower_bounds(short).reason
    for structure in (one(DELTANET), one(DELTANET, window=2), one(REAL), replace(COMPLEX, layers=2), one(RWKV7)):
        assert judge(Monoid(GROUPS["S5"], cap=3), structure).answer in ("no", "unknown")
    cut = Monoid(full(7), cap=100)
    assert judge(cut, UP_TO_1).answer == "no" and judge(cut, COMPLEX).answer == "unknown"
    assert lower_bounds(cut).layers == lower_bounds(cut, 5).layers == 6


# --- witnesses -------------------------------------------------------------------------------------------------------


def run(automaton: Automaton, word: tuple[int, ...], state: int) -> int:
    for letter in word:
        state = int(automaton.table[state, letter])
    return state


def effect(automaton: Automaton, *words: tuple[int, ...]) -> list[int]:
    return [run(automaton, sum(words, ()), q) for q in range(automaton.states)]


def check_witness(automaton: Automaton, witness: Witness) -> None:
    """Run the words; states are those of the minimal automaton, which says the same as the given one."""
    a = automaton.minimise()
    if witness.period is not None:
        prefix, word = witness.words
        states = [run(a, prefix, a.start)]
        assert witness.period > 1 and states[0] == witness.states[0]
        for _ in witness.states:
            states.append(run(a, word, states[-1]))
        assert tuple(states[:-1]) == witness.states and states[-1] == states[0] and len(set(states)) > 1
        settled = effect(a, *[word] * a.states)
        whole = [p for p in range(1, witness.period + 1) if effect(a, *[word] * (a.states + p)) == settled]
        assert whole == [witness.period]
        return
    e, f, *local = witness.words
    for idempotent in witness.words:
        assert effect(a, idempotent, idempotent) == effect(a, idempotent)
    for i in local:
        assert i and all(effect(a, i, word) == effect(a, word) == effect(a, word, i) for word in (e, f))
    q, first, second = witness.states
    if effect(a, e, f) == effect(a, e) and effect(a, f, e) == effect(a, f):
        assert (run(a, e, q), run(a, f, q)) == (first, second)
    else:
        assert (run(a, e + f + e, q), run(a, f + e, q)) == (first, second)
    assert first != second


# --- laws ------------------------------------------------------------------------------------------------------------

FAMILIES: st.SearchStrategy[Family] = st.sampled_from(get_args(Family))
RANGES = st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (-0.5, 1.0), (-0.5, 0.5), (-1.0, 0.5), (0.2, 1.0), (-1.0, -0.5)])


@st.composite
def structures(draw: st.DrawFn) -> Structure:
    return Structure(
        family=draw(FAMILIES),
        eigenvalues=draw(RANGES),
        factors=draw(st.integers(1, 5)),
        layers=draw(st.sampled_from([None, 1, 2, 3, 6])),
        window=draw(st.integers(0, 2)),
        gate=draw(st.booleans()),
        selective=draw(st.integers(0, 3)) > 0,
    )


def judged_small(automaton: Automaton) -> Monoid:
    return Monoid(automaton, cap=3000)


@given(automata(letters=3), structures(), st.integers(1, 30))
@settings(max_examples=100)
def test_a_monoid_cut_short_proves_no_more_than_the_whole(automaton: Automaton, structure: Structure, cap: int):
    short, whole = judge(Monoid(automaton, cap), structure), judge(judged_small(automaton), structure)
    if short.answer != "unknown":
        assert short.answer == whole.answer or whole.answer == "unknown"
    if short.witness:
        check_witness(automaton, short.witness)
    for window in (0, 1):
        assert (
            lower_bounds(Monoid(automaton, cap), window).layers <= lower_bounds(judged_small(automaton), window).layers
        )


@given(automata(), structures())
@settings(max_examples=150)
def test_answers_do_not_contradict_each_other(automaton: Automaton, structure: Structure):
    """More layers, factors, window, a gate or a wider range never turn a yes into a no; bounds hold for every yes."""
    m = judged_small(automaton)
    verdict = judge(m, structure)
    if verdict.witness:
        check_witness(automaton, verdict.witness)
    richer = [
        replace(structure, factors=structure.factors + 1),
        replace(structure, window=structure.window + 1),
        replace(structure, gate=True),
        replace(structure, eigenvalues=(-1.0, 1.0)),
        replace(structure, selective=True),
        replace(structure, layers=None),
    ]
    if structure.layers:
        richer.append(replace(structure, layers=structure.layers + 1))
    if structure.family == "diagonal":
        richer.append(replace(structure, family="householder"))
        richer.append(replace(structure, family="complex-diagonal"))
    for more in richer:
        if verdict.answer == "yes":
            assert judge(m, more).answer != "no", more
        if judge(m, more).answer == "no":
            assert verdict.answer == "no", more
    if verdict.answer == "yes" and structure.layers:
        assert verdict.min_layers is not None and structure.layers >= verdict.min_layers
        assert verdict.min_factors is not None and structure.factors >= verdict.min_factors
    if verdict.min_layers is None:
        assert verdict.answer == "no"


def star_free(automaton: Automaton) -> bool:
    """No word of at most 12 letters permutes a set of states other than trivially; enough for 4 states."""
    maps = {tuple(range(automaton.states))}
    frontier = set(maps)
    while frontier:
        frontier = {tuple(int(automaton.table[q, x]) for q in s) for s in frontier for x in range(automaton.alphabet)}
        frontier -= maps
        maps |= frontier
    for s in maps:
        power = list(range(automaton.states))
        for _ in range(math.factorial(automaton.states)):
            power = [s[q] for q in power]
        if [s[q] for q in power] != power:
            return False
    return True


@given(automata().map(lambda a: a.minimise()).filter(lambda a: a.states <= 5))
@settings(max_examples=100)
def test_without_negative_eigenvalues_star_free_and_nothing_else(automaton: Automaton):
    for structure in (UP_TO_1, DELTANET_0):
        assert (judge(automaton, structure).answer == "yes") == star_free(automaton)
        assert (judge(automaton, structure).answer == "no") == (not star_free(automaton))
    assert judge(automaton, DELTANET).answer == "yes"


@given(automata())
@settings(max_examples=100)
def test_bounds_for_exact_layers(automaton: Automaton):
    m = judged_small(automaton)
    without, narrow, wide = (lower_bounds(m, w).layers for w in (0, 1, 4))
    assert without >= narrow >= wide >= 0 and without <= max(1, m.automaton.states - 1)
    structure = one(DELTANET, factors=20)
    if judge(m, structure).answer == "no":
        assert without >= 2
    cost = injection_reset_cost(m.automaton, gate=False)
    if cost is not None and cost > 0:
        assert without <= 1  # one exact layer does it
        assert judge(m, one(DELTANET, factors=cost)).answer == "yes"


# --- the table -------------------------------------------------------------------------------------------------------

# Layers found by a compiler, without a window and with the token before; no lower bound may exceed them.
FOUND = {
    "(a|b)*abb": (1, 1), "ISO date strict": (2, 1), "IPv4 strict": (2, 2), "float literal": (2, 2),
    "JSON number": (2, 2), "JSON string": (3, 2), "email simple": (2, 2), "identifier": (2, 1), "UUID": (1, 1),
    "semver core+pre": (3, 2), "URL simple": (2, 2), "C comment": (2, 2), "CSV quoted row": (2, 1),
    "py int with _": (2, 1), "contains aab": (2, 2),
    "subseq a..b..a": (2, 2), "starts with a": (2, 1), "4th last is a": (1, 1), "(aa|b)*": (1, 1), "a*b*c*": (2, 1),
    "UTF-8 validity": (2, 1), "Dyck-2 depth 3": (1, 1), "S5 word problem": (1, 1), "mod-5 arith (+,*)": (2, 1),
    "Tomita-3": (3, 2), "Tomita-7": (2, 1), "ISO date lines": (2, 1), "IPv4 lines": (2, 2), "float CSV file": (2, 2),
    "decimal %97==0": (1, 1), "decimal %100==0": (1, 1), "7th last is a": (1, 2), "C-ish token": (3, 2),
    "IPv6 full+compressed": (3, 2), "HTTP request line": (2, 2),
}  # fmt: skip
SHARP = {"JSON number", "identifier", "semver core+pre", "a*b*c*", "subseq a..b..a", "Tomita-3", "C-ish token"}


@pytest.mark.parametrize("name", FOUND)
def test_bounds_never_exceed_what_was_found(name: str):
    m = Monoid(pytest.importorskip("tests.languages").LANGUAGES[name]())
    bounds = lower_bounds(m).layers, lower_bounds(m, window=1).layers
    assert bounds[0] <= FOUND[name][0] and bounds[1] <= FOUND[name][1]
    assert (bounds[0] == 2) >= (name in SHARP)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "mamba"}, "family='mamba' is unknown; accepted: diagonal, "),
        ({"eigenvalues": (0.0, 2.0)}, r"-1 <= lo < hi <= 1, got \(0.0, 2.0\)"),
        ({"eigenvalues": (1.0, 0.0)}, "got"),
        ({"eigenvalues": (math.nan, 1.0)}, "got"),
        ({"factors": 0}, "factors must be an integer >= 1, got 0"),
        ({"factors": None}, "got None"),
        ({"layers": 0}, "layers must be an integer >= 1, got 0"),
        ({"layers": True}, "got True"),
        ({"window": -1}, "window must be an integer >= 0, got -1"),
        ({"window": 1.5}, "got 1.5"),
    ],
)
def test_bad_structures_are_refused(changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        Structure(**{"family": "diagonal", **changes})  # pyright: ignore[reportArgumentType]


@pytest.mark.wrong_types
def test_a_bad_window_is_refused():
    with pytest.raises(UsageError, match="window must be an integer >= 0, got -1"):
        lower_bounds(PARITY, window=-1)


def test_verdicts_read_well():
    verdict = judge(FIRST_A, one(DELTANET))
    assert isinstance(verdict, Verdict) and "e = 'a', f = 'b'" in str(verdict) and "Theorem 5" in str(verdict)
    assert "the word '1' has period 2: repeated, states 0 -> 1 -> 0" in str(judge(PARITY, UP_TO_1))
    assert "at least 3 layers" in str(judge(GROUPS["Z8"], REAL))
