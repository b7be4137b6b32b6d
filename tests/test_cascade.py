"""The passes below the network, each against a naive definition: operations, maps, layers, groups, Zeiger's chain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statetrack import compile
from statetrack.automata import Automaton
from statetrack.automata.verdicts import lower_bounds
from statetrack.compiler import CompiledAutomaton, segments
from statetrack.compiler import zeiger as zeigers
from statetrack.compiler.assembly import chain
from statetrack.compiler.cascade import Limit, TooLarge, extend, nothing_known, view
from statetrack.compiler.compiled import Blueprint
from statetrack.compiler.discrete import apply_factors
from statetrack.compiler.group_heads import group_stage
from statetrack.compiler.kinds import suffix
from statetrack.compiler.operations import Head, Operation, Style, close_cycles, map_factors
from statetrack.compiler.search import find_plans, make_layer
from statetrack.compiler.zeiger import ChainLayer, close_paths, operations, permutation_swaps
from tests.languages import LANGUAGES
from tests.test_automata import automata

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@st.composite
def injections(draw: st.DrawFn, points: int = 6) -> dict[int, int]:
    """A partial injection of some points."""
    sources = draw(st.lists(st.integers(0, points - 1), unique=True))
    return dict(zip(sources, draw(st.permutations(range(points))), strict=False))


@st.composite
def maps(draw: st.DrawFn) -> list[int]:
    """A map of up to 8 points."""
    points = draw(st.integers(1, 8))
    return draw(st.lists(st.integers(0, points - 1), min_size=points, max_size=points))


def product(factors: list[tuple[dict[int, float], float, float]], vector: np.ndarray) -> np.ndarray:
    """Apply generalised Householder factors (key, value, beta) to a vector, in float64."""
    for key, value, beta in factors:
        k = np.zeros(len(vector))
        k[list(key)] = list(key.values())
        norm = np.linalg.norm(k)
        vector = vector + beta * k / norm * (value - k / norm @ vector)
    return vector


@given(moves=injections())
def test_closing_cycles(moves: dict[int, int]):
    cycles = close_cycles(moves)
    permutation = {a: b for cycle in cycles for a, b in zip(cycle, (*cycle[1:], cycle[0]), strict=True)}
    assert sorted(permutation) == sorted(permutation.values())
    assert all(permutation.get(a, a) == b for a, b in moves.items())
    assert set(permutation) <= {p for a, b in moves.items() if a != b for p in (a, b)}


@given(moves=injections(), data=st.data(), keys=st.sampled_from(["integer", "unit"]), gated=st.booleans())
def test_an_operation_is_the_product_of_its_factors(moves: dict[int, int], data: st.DataObject, keys: str, gated: bool):
    everything = range(6)
    clears = data.draw(st.sampled_from([tuple(everything), (), (1, 4), (0, 2, 3)]))
    writes = data.draw(st.frozensets(st.sampled_from(clears or (0,)), max_size=2)) if clears else frozenset()
    operation = Operation(close_cycles(moves), clears, writes)
    head, style = Head(6, (), [], [Operation(), operation]), Style(gated, keys)
    ones = data.draw(st.frozensets(st.integers(0, 5)))
    n = style.copies(head)
    vector = np.repeat([float(i in ones) for i in everything], n)
    if style.resets(head, operation):
        vector *= 0
    factors = style.factors(head, operation)
    want = np.repeat([float(i in operation.apply(ones)) for i in everything], n)
    np.testing.assert_allclose(product(factors, vector), want, atol=1e-12)
    clears = [] if style.resets(head, operation) else operation.clears
    assert len(factors) >= len(operation.swaps) + n * len(clears)
    assert gated or len(factors) == len(operation.swaps) + n * len(operation.clears)


def test_an_operation_by_hand():
    operation = Operation(((0, 1, 2),), clears=(1, 3), writes=frozenset([3]))
    assert operation.apply([0, 2]) == {0, 3} and operation.apply([]) == {3} and operation.apply([1]) == {2, 3}
    assert operation.swaps == [(1, 2), (0, 1)]


@given(to=maps())
def test_a_map_takes_points_minus_components_factors(to: list[int]):
    factors = map_factors(to)
    for q in range(len(to)):
        assert apply_factors(factors, frozenset([q])) == {to[q]}
    component = list(range(len(to)))
    for q, r in enumerate(to):
        component = [component[r] if c == component[q] else c for c in component]
    assert len(factors) == len(to) - len(set(component))


@given(rows=st.dictionaries(st.tuples(st.integers(0, 2), st.tuples(*[st.integers(0, 3)] * 3)), st.integers(0, 4)))
def test_a_chain_of_tables_is_one_table(rows: dict[tuple[int, tuple[int, ...]], int]):
    tables = chain(rows, 3, [4, 4, 4], 5)
    for code in range(4):
        for values in np.ndindex(4, 4, 4):
            found = code
            for table, value in zip(tables, values, strict=True):
                found = table[found, value]
            assert found == rows.get((code, values), 5)


@settings(max_examples=60)
@given(automaton=automata(), window=st.integers(0, 3))
def test_plans_know_the_state_and_respect_the_lower_bound(automaton: Automaton, window: int):
    minimal = automaton.minimise()
    plans, _ = find_plans(minimal, max(1, window), 0)
    bound = lower_bounds(minimal, window=max(0, window - 1)).layers
    for plan in plans:
        assert bound <= plan.depth
        assert all(len(states) == 1 for states in plan.known[-1].possible)


@pytest.mark.parametrize("name", ["JSON number", "URL simple", "C comment", "subseq a..b..a", "Tomita-3", "(ab)*"])
@pytest.mark.parametrize("window", [0, 2])
def test_looking_longer_never_gives_more_layers(name: str, window: int):
    quick = compile(LANGUAGES[name](), window=window, timeout=0)
    better = compile(LANGUAGES[name](), window=window, timeout=4)
    assert lower_bounds(quick.automaton, window=max(0, window - 1)).layers <= better.depth <= quick.depth


@pytest.mark.parametrize("kind", ["peel", "EM", "TR", "zei", "cut", "suf2"])
def test_no_layer_outlasts_its_time(kind: str):
    table = np.random.default_rng(0).integers(0, 60, (60, 40))
    seen = view(Automaton(table, accepting=frozenset({0})).minimise(), without_sink=False)
    known, over = extend(seen, nothing_known(seen), suffix(1)), Limit(-1.0)
    with pytest.raises(TooLarge):
        layer = make_layer(kind, seen, known, over)
        assert layer is not None
        extend(seen, known, layer, limit=over)


@pytest.mark.parametrize("group, factors", [("Z60", 4), ("S5", 4), ("A5", 4), ("Z7", 6), ("Z2 x Z2", 1)])
def test_groups_take_few_reflections(group: str, factors: int):
    stage = group_stage(Automaton.from_group(group, letters=[1, 2]), 5)
    assert stage is not None and stage.factors() <= factors


@settings(max_examples=25)
@given(data=st.data())
def test_a_group_stage_is_the_permutation_automaton(data: st.DataObject):
    points = data.draw(st.integers(2, 5))
    letters = data.draw(st.lists(st.permutations(range(points)), min_size=1, max_size=3))
    automaton = Automaton(np.array(letters).T, output=np.arange(points))
    reached = automaton.minimise()
    stage = group_stage(reached, 1)
    assert (stage is None) == (reached.states == 1)
    if stage is None:
        return
    for head in stage.heads:  # every letter permutes cosets, and costs no more than the natural action
        for operation in head.operations:
            assert not operation.clears and not operation.writes
    natural = max(len(to) - _cycles(to) for to in reached.table.T.tolist())
    assert stage.factors() <= max(1, natural)


def _cycles(to: list[int]) -> int:
    return len(to) - sum(len(cycle) - 1 for cycle in close_cycles(dict(enumerate(to))))


def test_what_is_no_group_or_too_large_has_no_group_stage():
    assert group_stage(LANGUAGES["JSON number"](), 1) is None
    rotate, swap = [*range(1, 8), 0], [1, 0, *range(2, 8)]  # S8 has 40,320 elements
    large = Automaton(np.array([rotate, swap]).T, output=np.arange(8))
    assert group_stage(large, 1) is None
    assert compile(large, timeout=0).depth == 1


# --- Zeiger's chain ---------------------------------------------------------------------------------------------------


def zeiger(automaton: Automaton, structure: str = "gated", keys: str = "integer") -> CompiledAutomaton:
    return Blueprint(automaton.minimise(), [], [], None, structure, keys, 0.0, False, chain=True).build()


def random_automaton(states: int, seed: int) -> Automaton:
    rng = np.random.default_rng(seed)
    accepting = frozenset(np.flatnonzero(rng.random(states) < 0.5).tolist())
    return Automaton(rng.integers(0, states, (states, 2)), accepting=accepting).minimise()


@settings(max_examples=40)
@given(
    automaton=automata(),
    structure=st.sampled_from(["householder", "gated"]),
    keys=st.sampled_from(["integer", "unit"]),
    cut=st.integers(0, 40),
)
def test_the_chain_is_the_automaton(automaton: Automaton, structure: str, keys: str, cut: int):
    network = zeiger(automaton, structure, keys)
    x = torch.randint(automaton.alphabet, (3, 40), generator=torch.Generator().manual_seed(cut))
    want = network.automaton.run(x)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        np.testing.assert_array_equal(network.copy_in(dtype, "cpu").states(x, backend="chunk").numpy(), want)
    first, state = network(x[:, :cut])
    second, _ = network(x[:, cut:], state)
    np.testing.assert_array_equal(torch.cat([first, second], 1).numpy(), automaton.emits[automaton.run(x)])
    assert network.depth == network.automaton.states - 1
    assert network.certificate("bfloat16", "chunk").passed


@settings(max_examples=40)
@given(
    automaton=automata(),
    structure=st.sampled_from(["householder", "gated"]),
    keys=st.sampled_from(["integer", "unit"]),
    batch=st.integers(1, 3),
    length=st.integers(0, 200),
    segment=st.integers(1, 9),
)
def test_segments_of_a_chain_side_by_side_are_the_sequence(
    automaton: Automaton, structure: str, keys: str, batch: int, length: int, segment: int
):
    network = zeiger(automaton, structure, keys)
    x = torch.randint(automaton.alphabet, (batch, length + 7), generator=torch.Generator().manual_seed(length))
    state = network(x[:, :7])[1]
    whole, plain = network(x[:, 7:], state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zeigers, "CUT_ON", ("cpu",))
        patch.setattr(segments, "SEGMENT", segment)
        said, after = network(x[:, 7:], state)
        np.testing.assert_array_equal(network.states(x, backend="chunk").numpy(), network.automaton.run(x))
    assert torch.equal(said, whole)
    for mine, its in zip(after.stages, plain.stages, strict=True):
        assert torch.equal(mine.memory, its.memory) and torch.equal(mine.below, its.below)


@settings(max_examples=40)
@given(moves=injections(), images=maps())
def test_the_chains_operations_are_those_of_the_set(moves: dict[int, int], images: list[int]):
    domain, to = torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6, dtype=torch.long)
    for a, b in moves.items():
        domain[0, a], to[0, a] = True, b
    permutation = close_paths(domain, to)
    assert sorted(permutation[0].tolist()) == list(range(6))
    assert all(permutation[0, a] == b for a, b in moves.items())
    vector = list(range(6))
    for a, b in permutation_swaps(permutation)[0].tolist():
        vector[a], vector[b] = vector[b], vector[a]
    assert [permutation[0, vector[p]] for p in range(6)] == list(range(6))
    assert len(permutation_swaps(permutation)[0]) == 6 - _cycles(permutation[0].tolist())
    n = len(images)
    everything = torch.ones(1, n, dtype=torch.bool)
    _, clears, write = operations(everything, everything, torch.tensor([images]))
    missed = [q for q in range(n) if q not in images]
    assert write.item() == (missed[0] if missed else -1)
    assert clears.all() if missed else not clears.any()


def test_an_automaton_without_a_cascade_falls_back_to_the_chain(tmp_path: Path):
    network = compile(random_automaton(40, 40), window=2, structure="gated", timeout=0)
    assert network.kinds == "zeiger" and network.depth == network.automaton.states - 1
    assert "Zeiger's chain" in network.report() and max(network.factors) < network.automaton.states
    x = torch.randint(2, (2, 60), generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(network.states(x, backend="chunk").numpy(), network.automaton.run(x))
    network.save(tmp_path / "chain")
    again = CompiledAutomaton.load(tmp_path / "chain")
    assert again.kinds == "zeiger" and torch.equal(again(x)[0], network(x)[0])
    oracle = network.automaton.accepts([["0", "1", "1"], []])
    np.testing.assert_array_equal(again.accepts([["0", "1", "1"], []]), oracle)
    state = None
    for t in range(5):
        said, state = again.step(x[:, t], state)
    assert torch.equal(said, network(x)[0][:, 4])


def test_the_chains_certificate_fails_for_inexact_keys_and_says_how_it_proves():
    cycle = Automaton(np.array([[1, 0], [2, 1], [0, 2]]).copy(), output=np.arange(3))
    wide = Automaton(np.stack([np.roll(np.arange(140), -1)] * 2, 1), output=np.arange(140))  # readings 140 + 139 > 256
    assert zeiger(wide).copy_in(torch.bfloat16, "cpu").compare("chunk").inexact == 0
    exact = zeiger(cycle).certificate("bfloat16", "chunk")
    assert exact.passed and "induction" in str(exact) and exact.comparison.transitions > 0
    assert not zeiger(cycle, keys="normalised").certificate("float32", "chunk").passed


@pytest.mark.parametrize("buffer", ["layers.1.moves", "layers.1.query", "layers.0.query", "layers.1.first", "emits"])
def test_faults_planted_in_a_chain_are_found(buffer: str):
    network = zeiger(Automaton(np.array([[1, 0], [2, 1], [0, 2]]), output=np.arange(3)))
    tensor = network.get_buffer(buffer)
    tensor[(0,) * tensor.ndim] += 1
    certificate = network.certificate("float32", "chunk")
    assert certificate.search.disagreements == 1 and not certificate.passed
    assert "1 table entries differ" in str(certificate)
    assert bool(certificate.comparison.inexact) == (buffer == "layers.0.query")


def test_a_chain_of_more_states_than_one_reading_holds():
    states = 300
    table = np.stack([np.roll(np.arange(states), -1), np.zeros(states, dtype=np.int64)], 1)
    network = zeiger(Automaton(table, output=np.arange(states)))
    layer = next(iter(network.layers))
    assert isinstance(layer, ChainLayer) and layer.query.shape[0] == 2
    label = layer.label(torch.tensor([[[[0.0], [3.0]], [[255.0], [0.0]]]]))
    assert label.tolist() == [[257, 254]]
