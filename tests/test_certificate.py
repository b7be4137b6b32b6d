"""Certificates pass for what is exact, and fail for every planted fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from statetrack import compile
from statetrack.automata import Automaton
from statetrack.compiler import CompiledAutomaton
from statetrack.compiler import certificate as certificate_module
from statetrack.compiler.certificate import are_maps, are_moves
from statetrack.compiler.discrete import Search, Walk, random_words, search_pairs
from statetrack.compiler.network import MapLayer
from statetrack.errors import UsageError
from tests.languages import LANGUAGES
from tests.test_automata import automata

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
DTYPES = ("float32", "bfloat16", "float16")
SOME = ("parity (1s even)", "JSON number", "CSV quoted row", "4th last is a", "A5 word problem", "Dyck-1 depth 8")


def with_keys(network: CompiledAutomaton, keys: str) -> CompiledAutomaton:
    return CompiledAutomaton(replace(network.blueprint, keys=keys))


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("structure", ["householder", "gated"])
def test_exact_keys_pass_everywhere_and_normalised_ones_nowhere(name: str, structure: str):
    network = compile(LANGUAGES[name](), structure=structure, timeout=0)
    for keys in ("integer", "unit"):
        for dtype in DTYPES:
            certificate = with_keys(network, keys).certificate(dtype, "chunk")
            assert certificate.passed and "EXACT AT EVERY LENGTH" in str(certificate), str(certificate)
            assert (
                certificate.search.pairs > 0
                and certificate.comparison.transitions > 0
                and certificate.comparison.factors > 0
            )
    if any(op.cycles for stage in network.stages for head in stage.heads for op in head.operations):
        for dtype in (*DTYPES, "float64"):
            certificate = with_keys(network, "normalised").certificate(dtype, "chunk")
            assert not certificate.passed and certificate.comparison.others and "NOT EXACT" in str(certificate)


def test_the_reference_backend_and_the_asymmetric_structure():
    for structure in ("householder", "dplr"):
        network = compile(LANGUAGES["binary %6==0"](), structure=structure, timeout=0)
        assert network.certificate("float32", "reference").passed
    with pytest.raises(UsageError, match="dtype='int8' is unknown"):
        network.certificate("int8")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("structure", ["householder", "gated", "dplr"])
def test_the_triton_kernels(structure: str, monkeypatch: pytest.MonkeyPatch):
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # interpreted: float32 alone (the interpreter takes bfloat16 tiles for integers), and slow
        monkeypatch.setattr(certificate_module, "LONGEST", 70)
        monkeypatch.setattr(certificate_module, "SHORTEST", 70)
    network = compile(LANGUAGES["binary %6==0"](), structure=structure, timeout=0)
    for dtype in DTYPES if on_gpu else ("float32",):
        certificate = network.certificate(dtype, "triton", "cuda" if on_gpu else "cpu")
        assert certificate.passed and certificate.tokens >= 280, str(certificate)


def change(tensor: Tensor, place: int) -> None:
    """Add 1 to an entry (to a float, a half)."""
    flat = tensor.view(-1)
    flat[place % len(flat)] += 0.5 if tensor.is_floating_point() else 1


def swap_letters(network: CompiledAutomaton) -> None:
    """Exchange two letters' operations where they differ."""
    letters = network.layers[0].letters
    assert isinstance(letters, Tensor)
    letters.copy_(letters.flip(-1))


FAULTS: dict[str, Callable[[CompiledAutomaton], object]] = {
    "key": lambda n: change(n.get_buffer("layers.0.keys"), -1),
    "beta": lambda n: change(n.get_buffer("layers.0.beta"), -1),
    "query": lambda n: change(n.get_buffer("layers.0.query"), 0),
    "first vector": lambda n: change(n.get_buffer("layers.0.first"), -1),
    "letters": swap_letters,
    "class of a letter": lambda n: n.classes.copy_(n.classes.flip(0)),
    "state of a code": lambda n: n.states_of.copy_(n.states_of.roll(1)),
    "what a state says": lambda n: n.emits.copy_(1 - n.emits),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("structure", ["householder", "gated"])
def test_planted_faults_are_found(fault: str, structure: str):
    network = compile("(a|b)*abb(ab)*", alphabet="ab", structure=structure, timeout=0)
    assert network.certificate("float32", "chunk").passed
    FAULTS[fault](network)
    certificate = network.certificate("float32", "chunk")
    assert not certificate.passed
    if fault in ("key", "beta", "query", "first vector"):
        assert certificate.comparison.inexact or certificate.comparison.others
    else:
        assert certificate.search.disagreements


def test_every_entry_of_a_table_that_words_reach_matters():
    network = compile(LANGUAGES["JSON number"](), timeout=0)
    table = network.get_buffer(f"layers.{network.depth - 1}.decoder_0")
    pairs, found = search_pairs(network)[0], 0
    for place in range(table.numel()):
        old = table.view(-1)[place].clone()
        table.view(-1)[place] = (old + 1) % len(network.states_of)
        found += search_pairs(network)[1] > 0
        table.view(-1)[place] = old
    assert search_pairs(network) == Search(pairs, 0, complete=True)
    assert found >= network.automaton.states - 1


def test_a_fault_that_random_words_miss_is_found():
    network = compile("a{14}|[ab]*b[ab]*", alphabet="ab", timeout=0)
    rare = int(network.automaton.run(np.zeros((1, 14), dtype=np.int64))[0, -1])
    network.states_of[network.states_of == rare] = network.automaton.start
    certificate = network.certificate("float32", "chunk")
    assert certificate.search.disagreements and not certificate.wrong and not certificate.passed


@settings(max_examples=30)
@given(automaton=automata(), window=st.integers(0, 3), seed=st.integers(0, 9))
def test_the_discrete_walk_is_the_network(automaton: Automaton, window: int, seed: int):
    network = compile(automaton, window=window, timeout=0)
    if network.blueprint.chain:  # a very slow machine
        return
    merged, classes = network.automaton.merge_letters()
    word = random_words(network.automaton, 1, 25, seed)
    walk = Walk(network.stages, network)
    place, told = walk.start, []
    for x in classes[word[0]].tolist():
        place, code = walk.step(place, x)
        told.append(int(network.states_of[code]))
    np.testing.assert_array_equal(told, network.states(torch.from_numpy(word), backend="reference")[0].numpy())
    np.testing.assert_array_equal(told, merged.run(classes[word])[0])


def test_which_factors_are_exact_in_a_chunk():
    swap, clear, pair = [0, 1, -1, 0, 0, 0], [0, 0, 0, 0, 0, 1], [0.5, 0.5, 0, 0, -0.5, -0.5]
    good = {1: [(swap, 0, 2), (clear, 0, 1), (clear, 1, 1), (pair, 0, 0)], 2: [(pair, 0, 2), (clear, 1, 1)]}
    split = [0.5, 0, 0.5, 0, -0.5, -0.5]
    bad = {
        1: [(swap, 0, 1), (swap, 1, 2), (clear, 0, 2), (clear, 0.5, 1), (pair, 0, 2), ([1, 1, 0, 0, 0, 0], 0, 2)],
        2: [(swap, 0, 2), (pair, 1, 2), (split, 0, 2), ([0.5**0.5, 0, -(0.5**0.5), 0, 0, 0], 0, 2)],
    }
    for factors, right in ((good, True), (bad, False)):
        for copies, some in factors.items():
            key, value, beta = (torch.tensor(x, dtype=torch.float32) for x in zip(*some, strict=True))
            assert (are_moves(key, value, beta, copies) == right).all(), (copies, some)


def test_which_asymmetric_factors_are_maps():
    good = [([1, -1, 0], [-1, 1, 0]), ([1, 0, 0], [-1, 0, 1]), ([0, 0, 0], [0, 0, 0])]
    bad = [([1, -1, 0], [-1, 0, 1]), ([1, 0, 0], [0, 0, 1]), ([0, 0, 0], [1, 0, 0]), ([2, 0, 0], [-1, 1, 0])]
    for factors, right in ((good, True), (bad, False)):
        a, b = (torch.tensor(x, dtype=torch.float32) for x in zip(*factors, strict=True))
        assert (are_maps(a, b) == right).all()


def test_two_inexact_factors_that_undo_each_other_are_found():
    network = compile(LANGUAGES["binary %6==0"](), structure="dplr", timeout=0)
    layer = network.layers[0]
    assert isinstance(layer, MapLayer)
    a, b = layer.keys[1, :2, 0], layer.b[1, :2, 0]
    assert network.certificate("float32", "chunk").passed
    a[:], b[:] = 0, 0
    a[0, 0], a[1, 0], b[0, 0], b[1, 0] = 1, 1, 3, -0.75  # 4 times, a quarter of it
    certificate = network.certificate("float32", "chunk")
    assert certificate.comparison.others == 2 and not certificate.passed


def test_tokens_of_more_factors_than_the_proof_allows_are_not_certified(monkeypatch: pytest.MonkeyPatch):
    """The bound of docs/theory.md, "Many tokens at a time", is sharp for MOST."""
    most = certificate_module.MOST
    assert 2 * most**2 < 2**18 <= 2 * (most + 1) ** 2 and 256 * (most + 1) < 2**18
    network = compile("group:Z5", timeout=0)
    assert network.factors == (4,) and network.certificate("bfloat16", "chunk").passed
    monkeypatch.setattr(certificate_module, "MOST", 3)
    beyond = network.certificate("bfloat16", "chunk")
    assert beyond.beyond == 4 and not beyond.passed and str(beyond).startswith("NOT PROVED in bfloat16, backend chunk")
    assert "4 in one token, proved for 3 at most" in str(beyond)
    assert network.certificate("bfloat16", "reference").passed
    assert compile("group:Z5", structure="dplr", timeout=0).certificate("bfloat16", "chunk").passed
