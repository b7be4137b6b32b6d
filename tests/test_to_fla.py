"""Compiled automata as fla's GatedDeltaProduct: its equations, in bfloat16 like its kernels, are the automaton."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from statetrack import cli, compile
from statetrack.compiler import CompiledAutomaton
from statetrack.compiler.to_model import opposite_bfloat16_preimages
from statetrack.errors import UsageError
from statetrack.runs import read_json
from tests.languages import LANGUAGES
from tests.test_compiler import words
from tests.test_convert import fla_logits

CASES = [
    ("parity (1s even)", 0),
    ("(a|b)*abb", 0),
    ("binary %3==0", 0),
    ("JSON number", 2),
    ("Tomita-3", 0),
    ("S5 word problem", 0),
    ("4th last is a", 0),
]


def said(compiled: CompiledAutomaton, length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of fla's equations after every letter, and what the automaton says there."""
    settings, weights = compiled.to_fla()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    x = words(compiled.automaton, 1, length, seed)[0]
    with torch.no_grad():
        logits = fla_logits(settings, weights, torch.cat([torch.tensor([settings["bos_token_id"]]), x]))
    return logits[1:], torch.from_numpy(compiled.automaton.outputs(x[None])[0])


@pytest.mark.parametrize("name, window", CASES)
def test_flas_equations_are_the_automaton_to_the_bit(name: str, window: int):
    logits, want = said(compile(LANGUAGES[name](), window=window, timeout=0), 200, seed=1)
    assert logits.dtype == torch.bfloat16 and (logits.argmax(-1) == want).all()
    assert set(logits.unique().tolist()) <= {0.0, 10.0, 20.0, 30.0}  # to the bit, after 200 tokens as after one


def test_more_outputs_than_letters_and_more_letters_than_outputs():
    for spec in ("permutations:(0 1); (0 1 2)", "group:Z5"):
        compiled = compile(spec, timeout=0)
        logits, want = said(compiled, 100, seed=2)
        assert (logits.argmax(-1) == want).all()
        assert logits.shape[1] == max(compiled.automaton.alphabet + 1, compiled.automaton.num_outputs)


def test_the_keys_of_swaps_are_halves_after_normalising():
    for p in (torch.nn.functional.silu(torch.tensor(z, dtype=torch.bfloat16)) for z in opposite_bfloat16_preimages()):
        key = p.float() / (4 * p.float().square() + 1e-6).sqrt()
        assert key.bfloat16().abs() == 0.5
    plus, minus = (torch.nn.functional.silu(torch.tensor(z).bfloat16()) for z in opposite_bfloat16_preimages())
    assert plus == -minus and plus > 0


def test_convert_writes_the_same(tmp_path: Path):
    made, out = tmp_path / "made", tmp_path / "fla"
    for line in (
        f"compile '(0*10*1)*0*' --alphabet 01 --timeout 0 --out {made}",
        f"convert {made} --to gated_deltaproduct --out {out}",
    ):
        cli.main(shlex.split(line))
    settings, weights = CompiledAutomaton.load(made / "compiled.safetensors").to_fla()
    assert read_json(out / "config.json").items() >= settings.items()
    written = load_file(out / "model.safetensors")
    assert set(written) == set(weights) and all(torch.equal(written[name], w) for name, w in weights.items())


def test_what_fla_cannot_hold_is_refused():
    with pytest.raises(UsageError, match='needs structure="householder"'):
        compile("(ab)*", alphabet="ab", structure="gated", timeout=0).to_fla()
    with pytest.raises(UsageError, match="128 coordinates at most, this network needs 131"):
        compile("group:Z131", timeout=0).to_fla()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fla runs on a GPU only")
@pytest.mark.parametrize("name, window", CASES)
def test_fla_itself(name: str, window: int):
    models = pytest.importorskip("fla.models")
    compiled = compile(LANGUAGES[name](), window=window, timeout=0)
    settings, weights = compiled.to_fla()
    model = models.GatedDeltaProductForCausalLM(models.GatedDeltaProductConfig(**settings)).cuda().bfloat16()
    model.load_state_dict(weights)
    x = words(compiled.automaton, 4, 2000, seed=3)
    bos = torch.full((4, 1), settings["bos_token_id"])
    with torch.no_grad():
        logits = model.eval()(torch.cat([bos, x], 1).cuda()).logits[:, 1:]
    assert (logits.argmax(-1).cpu() == torch.from_numpy(compiled.automaton.outputs(x))).all()
