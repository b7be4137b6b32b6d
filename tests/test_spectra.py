"""The eigenvalues that a configuration promises are those of the transition that its data makes, at both ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from statetrack.layers import (
    DeltaProduct,
    DeltaProductConfig,
    DenseRNNConfig,
    GLAConfig,
    HGRN2Config,
    Mamba,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
)
from statetrack.layers.mlstm import MLSTMState
from statetrack.ops import delta_rule, dplr, gated_linear_attention, selective_scan

from .test_layers import build, sequence

RANGES = [(-1.0, 1.0), (0.0, 1.0), (-0.5, 0.75)]
every_range = pytest.mark.parametrize("eigenvalues", RANGES, ids=str)


def saturating_inputs(weight: Tensor) -> Tensor:
    """Return x [1 2 D] whose two tokens drive a projection's outputs far to both ends."""
    push = 1e4 * torch.linalg.pinv(weight) @ torch.ones(weight.shape[0], 1, dtype=weight.dtype)
    return torch.stack([push[:, 0], -push[:, 0]])[None]


@every_range
@pytest.mark.parametrize("factors", [1, 3])
def test_spectrum_of_deltaproduct_reaches_both_ends_of_its_range(eigenvalues, factors: int):
    mixer = build(DeltaProductConfig(dim=16, heads=1, factors=factors, eigenvalues=eigenvalues, conv_size=0))
    assert isinstance(mixer, DeltaProduct)
    inputs = mixer.op_inputs(saturating_inputs(mixer.beta_proj.weight))
    ends = []
    for t in range(2):
        for j in range(factors):  # the transition of one factor: run it on the identity
            one = {n: inputs[n][:, t : t + 1, j : j + 1] for n in ("k", "v", "beta")}
            one["v"] = torch.zeros_like(one["v"])
            eye = torch.eye(16, dtype=torch.float64)[None, None]
            _, transition = delta_rule(inputs["q"][:, t : t + 1], **one, initial_state=eye)
            spectrum = torch.linalg.eigvalsh(transition[0, 0])
            away = spectrum[(spectrum - 1).abs().argmax()]
            torch.testing.assert_close((spectrum - 1).abs().sort().values[:-1], torch.zeros(15).double())
            ends.append(away.item())
    assert min(ends) == pytest.approx(eigenvalues[0], abs=1e-6) and max(ends) == pytest.approx(eigenvalues[1], abs=1e-6)


@every_range
def test_spectrum_of_mamba_reaches_both_ends_of_its_range(eigenvalues):
    mixer = build(MambaConfig(dim=16, state_size=4, eigenvalues=eigenvalues))
    assert isinstance(mixer, Mamba)
    inputs = mixer.op_inputs(sequence(mixer.config, 2, batch=1))
    found = []
    for dt in (0.0, 1e4):  # softplus ranges over (0, inf)
        one = {n: inputs[n][:, :1] for n in ("u", "dt", "B", "C")}
        one |= {"u": torch.zeros_like(one["u"]), "dt": torch.full_like(one["dt"], dt), "A": inputs["A"]}
        ones = torch.ones(1, 32, 4, dtype=torch.float64)
        _, transition = selective_scan(**one, eigenvalues=eigenvalues, initial_state=ones)
        found.append(transition)
    torch.testing.assert_close(found[0], torch.full_like(found[0], eigenvalues[1]))
    torch.testing.assert_close(found[1], torch.full_like(found[1], eigenvalues[0]))


GATES: dict[str, tuple[MixerConfig, Callable[[Any], Tensor]]] = {
    "gla": (GLAConfig(dim=16, heads=2), lambda m: m.decay_proj.up.weight),
    "hgrn2": (HGRN2Config(dim=16, heads=2), lambda m: m.f_proj.weight),
    "mamba2": (Mamba2Config(dim=16, heads=2, state_size=4), lambda m: m.in_proj.weight[-2:]),
    "mlstm": (MLSTMConfig(dim=16, heads=2), lambda m: m.gates.weight[2:]),
    "rwkv6": (RWKV6Config(dim=16, heads=2), lambda m: m.decay_proj.up.weight),
}
"""Mixers whose transition is diagonal, and the weights that tie it to the data."""


def transitions(inputs: dict[str, Any]) -> Tensor:
    """Return the transition of every token as a matrix [T H K K]: run the token alone on the identity."""
    T, H, K = inputs["v"].shape[1], inputs["v"].shape[2], inputs["k"].shape[-1]
    tokens = {n: inputs[n].transpose(0, 1) for n in ("q", "k", "decay")}
    tokens["v"] = tokens["k"].new_zeros(T, 1, H, K)
    eye = torch.eye(K, dtype=torch.float64).expand(T, H, K, K)
    return gated_linear_attention(**tokens, initial_state=eye)[1]


@every_range
@pytest.mark.parametrize("name", GATES)
def test_spectrum_of_a_diagonal_mixer_reaches_both_ends_of_its_range(name: str, eigenvalues):
    config, gate = GATES[name]
    mixer = build(replace(config, eigenvalues=eigenvalues))
    with torch.no_grad():
        gate(mixer).mul_(1e6)
    found = transitions(mixer.op_inputs(sequence(config, 64, batch=1)))
    assert not (found - torch.diag_embed(found.diagonal(dim1=-2, dim2=-1))).any()
    spectrum = torch.linalg.eigvalsh(found)
    assert spectrum.min().item() == pytest.approx(eigenvalues[0], abs=1e-6)
    assert spectrum.max().item() == pytest.approx(eigenvalues[1], abs=1e-6)


@every_range
def test_spectrum_of_retnet_is_fixed_and_spans_its_range(eigenvalues):
    mixer = build(RetNetConfig(dim=60, heads=30, first_exponent=0.0, eigenvalues=eigenvalues))
    inputs = mixer.op_inputs(sequence(mixer.config, 8, batch=1))
    spectrum = torch.linalg.eigvalsh(transitions(inputs))
    assert spectrum.min().item() == pytest.approx(eigenvalues[0], abs=1e-6)
    assert spectrum.max().item() == pytest.approx(eigenvalues[1], abs=1e-6)
    other = mixer.op_inputs(-sequence(mixer.config, 8, batch=1))
    assert torch.equal(inputs["decay"], other["decay"]) and not torch.equal(inputs["k"], other["k"])


def test_rotation_of_retnet_depends_on_distance_alone():
    """Its state after a call, turned back, gives what one call over both parts gives, at far positions too."""
    mixer = build(RetNetConfig(dim=16, heads=2)).double()
    x = sequence(mixer.config, 300)
    want, _ = mixer(x)
    state, outs = None, []
    for piece in x.split(7, dim=1):
        y, state = mixer(piece, state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-10)


def transition_of_rwkv7(config: RWKV7Config, decay_bias: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and decays of one head, the rate driven to its ends, the same decay in every channel."""
    mixer = build(config)
    with torch.no_grad():
        mixer.rate_proj.up.weight.copy_(1e6 * mixer.rate_proj.up.weight[:1].expand_as(mixer.rate_proj.up.weight))
        mixer.decay_proj.up.weight.zero_()
        mixer.decay_proj.up.bias.fill_(decay_bias)
    inputs = {n: x.transpose(0, 1) for n, x in mixer.op_inputs(sequence(config, 64, batch=1)).items()}
    inputs["v"] = torch.zeros_like(inputs["v"])
    T, _, H, K = inputs["k"].shape
    _, found = dplr(**inputs, initial_state=torch.eye(K, dtype=torch.float64).expand(T, H, K, K))
    return torch.linalg.eigvals(found).real, inputs["log_decay"].exp()


@every_range
def test_spectrum_of_rwkv7_reaches_both_ends_of_its_range(eigenvalues):
    spectrum, decay = transition_of_rwkv7(RWKV7Config(dim=16, heads=1, eigenvalues=eigenvalues), -1e4)
    assert (decay == 1).all()
    away = spectrum.gather(-1, (spectrum - 1).abs().argmax(-1, keepdim=True))
    assert away.min().item() == pytest.approx(eigenvalues[0], abs=1e-6)
    assert away.max().item() == pytest.approx(eigenvalues[1], abs=1e-6)


def test_spectrum_of_rwkv7_stays_in_the_range_where_it_also_forgets():
    spectrum, decay = transition_of_rwkv7(RWKV7Config(dim=16, heads=1), 1.0)
    w = decay.max().item()
    assert 0.6 < w < 0.7
    assert spectrum.min().item() == pytest.approx(-1, abs=1e-6) and spectrum.max().item() == pytest.approx(w, abs=1e-6)
    published, _ = transition_of_rwkv7(RWKV7Config(dim=16, heads=1, eigenvalues=(0.0, 1.0)), 1.0)
    assert published.min().item() == pytest.approx(w - 1, abs=1e-6)


def test_products_of_kda_are_contractions():
    mixer = build(DeltaProductConfig(dim=16, heads=1, gate="key", beta_std=4.0))
    inputs = mixer.op_inputs(sequence(mixer.config, 50, batch=1))
    assert inputs["log_decay"].shape == (1, 50, 1, 16) and inputs["log_decay"].std(-1).min() > 0
    inputs["v"] = torch.zeros_like(inputs["v"])
    for t in range(1, 50):
        part = {n: x[:, :t] for n, x in inputs.items()}
        _, found = delta_rule(**part, initial_state=torch.eye(16, dtype=torch.float64)[None, None])
        assert torch.linalg.matrix_norm(found, 2) <= 1 + 1e-12


def test_transition_of_the_dense_rnn_is_any_matrix():
    mixer = build(DenseRNNConfig(dim=64, state_size=3))
    A = torch.randn(3, 3, dtype=torch.float64)
    x = torch.linalg.pinv(mixer.transition.weight) @ (A - mixer.offset).flatten()
    torch.testing.assert_close(mixer.op_inputs(x[None, None])["A"][0, 0], A)
    direction, log_norm = mixer(x[None, None])[1]
    torch.testing.assert_close(log_norm.exp() * direction[0], A)


def attention_to_all(decay: Tensor) -> dict[str, Any]:
    """Return arguments of an mLSTM's cell whose queries and keys agree, with strong input gates."""
    T, g = len(decay), torch.Generator().manual_seed(0)
    ones = torch.ones(1, T, 1, 4, dtype=torch.float64)
    v = torch.randn(1, T, 1, 4, dtype=torch.float64, generator=g)
    return {"q": ones, "k": 1e4 * ones, "v": v, "decay": decay[None, :, None]}


def empty() -> MLSTMState:
    return MLSTMState(*(torch.zeros(1, 1, 4, n, dtype=torch.float64) for n in (4, 1)))


def test_normaliser_of_mlstm_is_safe_whatever_the_signs_of_its_gate():
    mixer = build(MLSTMConfig(dim=4, heads=1, key_dim=4))
    signs = 1 - 2.0 * torch.randint(0, 2, (500,), generator=torch.Generator().manual_seed(0)).double()
    x = attention_to_all(signs)
    h, _ = mixer.cell(x, empty())
    assert h.abs().max() <= x["v"].abs().max() * (1 + 1e-12)
    ones = {**x, "v": torch.ones_like(x["v"][..., :1])}
    n, _ = gated_linear_attention(**ones)  # with the gate's own sign the normaliser vanishes, and the read explodes
    memory, _ = gated_linear_attention(**x)
    assert n.abs().min() == 0 and (memory / n.abs().clamp(min=1)).abs().max() > 1e3


def test_mlstm_with_positive_gates_is_the_published_cell():
    """Against the recurrence of Beck et al. (arXiv 2405.04517), eq. 19 to 27, with its running maximum."""
    config = MLSTMConfig(dim=8, heads=2, eigenvalues=(0.0, 1.0))
    mixer, x = build(config), 3 * sequence(config, 40)
    h, _ = mixer.cell(mixer.op_inputs(x), mixer.init_state(2))
    write, keep = (15 * torch.tanh(mixer.gates(x) / 15)).chunk(2, dim=-1)
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    C, n, m = torch.zeros(2, 2, 2, 4).double(), torch.zeros(2, 2, 2).double(), torch.zeros(2, 2).double()
    for t in range(40):
        log_f = torch.nn.functional.logsigmoid(keep[:, t])
        new = torch.maximum(log_f + m, write[:, t])
        f, i = torch.exp(log_f + m - new)[..., None], torch.exp(write[:, t] - new)[..., None]
        C = f[..., None] * C + i[..., None] * k[:, t, ..., None] * v[:, t, :, None]
        n, m = f * n + i * k[:, t], new
        scaled = q[:, t] * 2**-0.5
        below = torch.maximum((scaled * n).sum(-1).abs(), torch.exp(-m))
        want = (scaled[..., None] * C).sum(-2) / below[..., None]
        torch.testing.assert_close(h[:, t], want, rtol=0, atol=1e-10)
