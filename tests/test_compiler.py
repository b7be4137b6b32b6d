"""Compiled automata are the automaton, state by state: every structure, window, kind of key, arithmetic and backend."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from statetrack import compile
from statetrack.automata import Automaton
from statetrack.automata.verdicts import lower_bounds
from statetrack.compiler import CompiledAutomaton, segments
from statetrack.errors import UsageError
from tests.languages import LANGUAGES
from tests.test_automata import automata
from tests.test_regex import compiled as python_re
from tests.test_regex import expressions

pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")
STRUCTURES = ("householder", "gated", "dplr")
OPTIONS = st.fixed_dictionaries(
    {
        "structure": st.sampled_from(STRUCTURES),
        "window": st.integers(0, 3),
        "keys": st.sampled_from(["integer", "unit"]),
        "objective": st.sampled_from(["depth", "factors", "width"]),
    }
)
DTYPES = ("float32", "bfloat16", "float16")
SMALL = ("parity (1s even)", "JSON number", "CSV quoted row", "binary %6==0", "4th last is a", "S5 word problem")


def words(automaton: Automaton, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw words that seldom die."""
    rng = np.random.default_rng(seed)
    letters = [[x for x, r in enumerate(row) if r != q] or [0] for q, row in enumerate(automaton.table.tolist())]
    drawn = rng.integers(0, automaton.alphabet, (batch, length))
    for word in drawn:
        q = automaton.start
        for t in range(length):
            if rng.random() < 0.9:
                word[t] = rng.choice(letters[q])
            q = automaton.table[q, word[t]]
    return torch.from_numpy(drawn)


def assert_follows(network: CompiledAutomaton, x: torch.Tensor, backend: str = "chunk") -> None:
    """Fail unless the network's states are the automaton's, after every token."""
    got = network.states(x, backend=backend).numpy()
    np.testing.assert_array_equal(got, network.automaton.run(x))


@settings(max_examples=60)
@given(automaton=automata(), options=OPTIONS, seed=st.integers(0, 99))
def test_a_random_automaton(automaton: Automaton, options: dict[str, Any], seed: int):
    network = compile(automaton, timeout=0, **options)
    x = words(automaton, 3, 50, seed)
    for dtype in DTYPES:
        assert_follows(network.copy_in(getattr(torch, dtype), "cpu"), x)
    said = network(x, backend="reference")[0].numpy()
    np.testing.assert_array_equal(said, automaton.emits[automaton.run(x)])
    assert network.certificate("bfloat16", "chunk").passed
    if options["structure"] != "dplr":
        assert lower_bounds(network.automaton, window=max(0, options["window"] - 1)).layers <= network.depth
    assert len(network.factors) == len(network.widths) == network.depth


@settings(max_examples=40)
@given(data=st.data(), options=OPTIONS)
def test_a_random_expression_against_python(data: st.DataObject, options: dict[str, Any]):
    pattern, match = data.draw(expressions("ab", ""))
    network = compile(pattern, alphabet="ab", timeout=0, **options)
    texts = [
        "",
        match,
        match + "a",
        match[1:],
        match[:-1],
        *data.draw(st.lists(st.text("ab", max_size=12), max_size=8)),
    ]
    oracle = python_re(pattern, "ab")
    assert network.accepts(texts).tolist() == [oracle.fullmatch(text) is not None for text in texts]


@settings(max_examples=25)
@given(data=st.data(), options=OPTIONS)
def test_random_permutations(data: st.DataObject, options: dict[str, Any]):
    points = data.draw(st.integers(2, 6))
    columns = data.draw(st.lists(st.permutations(range(points)), min_size=1, max_size=3))
    accepting = data.draw(st.frozensets(st.integers(0, points - 1)))
    automaton = Automaton(np.array(columns).T, accepting=accepting)
    network = compile(automaton, timeout=0, **options)
    assert_follows(network, words(network.automaton, 3, 60))
    assert network.depth <= 1 and network.certificate("float16", "chunk").passed


@pytest.mark.parametrize("group", ["Z2", "Z6", "S3", "D4", "A4", "Z3 x S3"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_groups_take_one_layer(group: str, structure: str):
    network = compile(f"group:{group}", structure=structure, timeout=1)
    assert network.depth == 1
    assert_follows(network, words(network.automaton, 2, 200))
    assert network.certificate("bfloat16", "chunk").passed


def test_large_groups_find_their_few_points_at_once():
    """S6 on 6 points, by swaps: one factor; signs for each Z2; A7 as it stands on 7 points, in about a second."""
    swaps = compile("group:S6_swaps", timeout=0)
    assert swaps.factors == (1,) and swaps.widths == (6,)
    assert compile("group:Z2 x Z2 x Z2 x Z2 x Z2", timeout=0).factors == (1,)  # five heads of two points
    began = time.process_time()
    columns = [[1, 2, 3, 4, 5, 6, 0], [1, 2, 0, 3, 4, 5, 6]]
    network = compile(Automaton(np.array(columns).T, output=np.arange(7)), timeout=0)
    assert network.factors == (6,) and time.process_time() - began < 4  # 0.8 s on an idle core
    assert_follows(network, words(network.automaton, 2, 100))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("window", [0, 2])
def test_languages_in_every_arithmetic(name: str, structure: str, window: int):
    if structure == "dplr" and (window or name == "S5 word problem"):
        pytest.skip("one layer, whatever the window; 96 micro-steps a token")
    network = compile(LANGUAGES[name](), structure=structure, window=window, timeout=0)
    x = words(network.automaton, 2, 300)
    for keys in ("integer", "unit"):
        other = CompiledAutomaton(replace(network.blueprint, keys=keys))
        for dtype in DTYPES:
            assert_follows(other.copy_in(getattr(torch, dtype), "cpu"), x)
        assert_follows(other, x[:, :40], "reference")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name, structure", [("parity (1s even)", "householder"), ("binary %6==0", "gated")])
def test_the_triton_kernels(name: str, structure: str):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = compile(LANGUAGES[name](), structure=structure, timeout=0).to(device)
    x = words(network.automaton, 2, 40)
    got = network.states(x.to(device), backend="triton").cpu().numpy()
    np.testing.assert_array_equal(got, network.automaton.run(x))


@settings(max_examples=25)
@given(name=st.sampled_from(SMALL), window=st.integers(0, 3), cuts=st.lists(st.integers(0, 30), max_size=3))
def test_split_anywhere_and_carry_the_state(name: str, window: int, cuts: list[int]):
    network = compile(LANGUAGES[name](), window=window, timeout=0)
    x = words(network.automaton, 3, 30)
    want, end = network(x, backend="chunk")
    state, said, places = None, [], [0, *sorted(cuts), 30]
    for a, b in zip(places, places[1:], strict=False):
        part, state = network(x[:, a:b], state, backend="chunk")
        said.append(part)
    assert torch.equal(torch.cat(said, dim=1), want)
    assert state is not None and torch.equal(state.known, end.known) and torch.equal(state.window, end.window)
    for mine, theirs in zip(state.stages, end.stages, strict=True):
        assert torch.equal(mine.memory, theirs.memory) and torch.equal(mine.below, theirs.below)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_batch_equals_single_and_step_equals_sequence(structure: str):
    network = compile(LANGUAGES["JSON number"](), structure=structure, window=2, timeout=0)
    x = words(network.automaton, 4, 20)
    want, _ = network(x)
    assert torch.equal(torch.cat([network(row[None])[0] for row in x]), want)
    state = None
    for t in range(x.shape[1]):
        said, state = network.step(x[:, t], state)
        assert torch.equal(said, want[:, t])


def test_an_empty_sequence_changes_nothing():
    network = compile("(ab)*", alphabet="ab", window=2, timeout=0)
    _, state = network(torch.tensor([[0]]))
    said, after = network(torch.zeros(1, 0, dtype=torch.long), state)
    assert said.shape == (1, 0) and torch.equal(network(torch.tensor([[1]]), after)[0], torch.tensor([[1]]))


def test_pieces_of_a_long_sequence_follow_each_other(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("statetrack.compiler.network.PIECE", 100)
    network = compile(LANGUAGES["JSON number"](), timeout=0)
    assert_follows(network, words(network.automaton, 2, 100))


@settings(max_examples=40)
@given(
    automaton=automata(), options=OPTIONS, batch=st.integers(1, 3), length=st.integers(1, 300), seed=st.integers(0, 9)
)
def test_segments_side_by_side_are_the_sequence(
    automaton: Automaton, options: dict[str, Any], batch: int, length: int, seed: int
):
    compiled = compile(automaton, timeout=0, **options)
    x = words(compiled.automaton, batch, length, seed)
    state = compiled(x[:, : length // 3])[1]
    want = compiled.automaton.run(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "FEW", 0)
        whole, plain = compiled(x[:, length // 3 :], state, backend="reference")
        patch.setattr(segments, "FEW", 4)
        patch.setattr(segments, "SEGMENT", 1 + seed)
        said, after = compiled(x[:, length // 3 :], state, backend="reference")
        np.testing.assert_array_equal(compiled.states(x, backend="chunk").numpy(), want)
    assert torch.equal(said, whole)
    for mine, its in zip(after.stages, plain.stages, strict=True):
        assert torch.equal(mine.memory, its.memory) and torch.equal(mine.below, its.below)


def test_accepts_any_lengths_and_kinds_of_text():
    network = compile(r"\d{1,3}(,\d{3})*", timeout=0)
    texts = ["1", "", "12,345", b"1,234,567", "1,23", "x" * 50]
    assert network.accepts(texts).tolist() == [True, False, True, True, False, False]
    assert compile("(ab)*", alphabet="ab", timeout=0).accepts(["", ["a", "b"], "ba"]).tolist() == [True, True, False]
    moore = Automaton(np.array([[0, 1], [1, 0]]), output=np.array([0, 2]))
    with pytest.raises(UsageError, match="outputs"):
        compile(moore).accepts(["a"])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_save_and_load(structure: str, tmp_path: Path):
    network = compile("[ab]*abb|c", alphabet="abc", structure=structure, window=2, keys="unit", timeout=0)
    network.save(tmp_path / "made")
    again = CompiledAutomaton.load(tmp_path / "made")
    assert again.report() == network.report() and again.automaton == network.automaton
    for name, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.certificate("float32", "chunk") == network.certificate("float32", "chunk")


def test_damaged_files_are_refused(tmp_path: Path):
    network = compile("(ab)*", alphabet="ab", timeout=0)
    path = tmp_path / "made"
    network.save(path)
    tensors, whole = load_file(path), path.read_bytes()
    for content in (b"", b"what", whole[:-10], whole[:100]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="made"):
            CompiledAutomaton.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        CompiledAutomaton.load(tmp_path / "none")
    for metadata in (None, {"format": "other"}):
        save_file(tensors, path, metadata)
        with pytest.raises(UsageError, match="not a compiled automaton"):
            CompiledAutomaton.load(path)
    metadata = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])["__metadata__"]
    wrong = {**tensors, "layers.0.letters": 1 - tensors["layers.0.letters"]}
    fewer = {name: tensor for name, tensor in tensors.items() if name != "classes"}
    blueprint = metadata["blueprint"]
    for changed, text in (
        (wrong, blueprint),
        (fewer, blueprint),
        (tensors, blueprint.replace("householder", "lstm")),
        (tensors, blueprint.replace("heads", "hands")),
        (tensors, blueprint[:-5]),
        (tensors, "[]"),
    ):
        save_file(changed, path, {**metadata, "blueprint": text})
        with pytest.raises(UsageError, match="made is damaged"):
            CompiledAutomaton.load(path)


@settings(max_examples=25)
@given(automaton=automata(), options=OPTIONS)
def test_the_factors_reported_are_those_of_the_tensors(automaton: Automaton, options: dict[str, Any]):
    compiled = compile(automaton, timeout=0, **options)
    if not compiled.blueprint.chain:
        assert compiled.factors == tuple(layer.keys.shape[1] for layer in compiled.layers)  # pyright: ignore
        for layer, most in zip(compiled.layers, compiled.factors, strict=True):
            acts = layer.keys if layer.asymmetric else layer.beta[..., None]  # pyright: ignore
            assert max(1, int(acts.ne(0).any(-1).any(-1).sum(1).max())) == most  # pyright: ignore


def test_it_reports_what_it_made():
    network = compile(LANGUAGES["JSON number"](), structure="gated", window=2, timeout=0)
    report = network.report()
    assert f"{network.depth} recurrent layer" in report and "sees 2 tokens" in report and "gated" in report
    assert "time ran out" not in report


def test_when_the_time_runs_out_the_best_so_far_is_returned_and_that_is_said():
    network = compile(LANGUAGES["C-ish token"](), timeout=0.05)
    assert network.blueprint.late and "the time ran out" in network.report()
    assert_follows(network, words(network.automaton, 2, 50))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"structure": "lstm"}, "structure='lstm' is unknown; accepted: householder, gated, dplr"),
        ({"keys": "float"}, "keys='float' is unknown"),
        ({"objective": "speed"}, "objective='speed' is unknown"),
        ({"window": -1}, "window must be 0 .* got -1"),
        ({"window": 9}, "window must be"),
        ({"timeout": -1.0}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": float("inf")}, "timeout must be"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        compile("(ab)*", alphabet="ab", **options)


def test_tokens_that_are_no_letters_are_refused():
    network = compile("(ab)*", alphabet="ab", timeout=0)
    for token in (-1, 2):
        with pytest.raises(UsageError, match=r"letters 0\.\.1"):
            network(torch.tensor([[0, token]]))


@pytest.mark.wrong_types
def test_tokens_of_other_kinds_are_refused_and_small_integers_taken():
    network = compile("(ab)*", alphabet="ab", timeout=0)
    tokens = torch.tensor([[0, 1, 0]])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(network(tokens.to(dtype))[0], network(tokens)[0])
    for wrong in (tokens.float(), tokens.bool(), tokens[0]):
        with pytest.raises(UsageError, match=r"tokens must be integers \[batch, length\], got torch"):
            network(wrong)
    for options in ({"window": 1.5}, {"timeout": "long"}):
        with pytest.raises(UsageError, match=f"{next(iter(options))} must be"):
            compile("a", **options)  # pyright: ignore[reportArgumentType]


def test_a_file_in_no_directory(tmp_path: Path):
    with pytest.raises(UsageError, match="none is no directory"):
        compile("a", timeout=0).save(tmp_path / "none" / "made")


def test_what_needs_no_memory_takes_no_layer():
    network = compile(".*a", alphabet="ab", timeout=0)
    nothing = compile("[ab]*", alphabet="ab", timeout=0)
    assert nothing.depth == 0 and nothing.accepts(["", "ab"]).all() and nothing.certificate().passed
    assert network.depth == compile(".*a", alphabet="ab", window=1, timeout=0).depth == 1
    last = compile(".*a", alphabet="ab", window=2, timeout=0)
    assert last.depth == 0 and last.accepts(["", "b", "ba", "ab"]).tolist() == [False, False, True, False]
    assert last.certificate().passed
