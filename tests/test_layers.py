"""The contract of every mixer and of the model: state in, state out, causal, the eigenvalues the config promises."""

from __future__ import annotations

import dataclasses
import itertools
import json
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from statetrack.errors import UsageError
from statetrack.layers import (
    MIXERS,
    AttentionConfig,
    DeltaProductConfig,
    DenseRNNConfig,
    GLAConfig,
    HGRN2Config,
    LSTMConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
    softmax,
)
from statetrack.layers.packing import Packing
from statetrack.model import Config

from .cases import LAYERS, LayerCase

every_layer = pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)


def build(config: MixerConfig, seed: int = 0) -> Any:
    """Return the mixer in float64, with every parameter moved off its initial value."""
    torch.manual_seed(seed)
    mixer = config.build().double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def sequence(config: MixerConfig, tokens: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, config.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def flatten(state) -> list[Tensor]:
    return [t for t in state if t is not None]


@every_layer
@settings(max_examples=8)
@given(data=st.data())
def test_split_anywhere_and_carry_the_state(case: LayerCase, data):
    mixer, tokens = build(case.config), data.draw(st.integers(1, 80))
    cut = data.draw(st.integers(0, tokens))
    x = sequence(case.config, tokens)
    want, want_state = mixer(x)
    y1, middle = mixer(x[:, :cut])
    y2, state = mixer(x[:, cut:], middle)
    torch.testing.assert_close(torch.cat([y1, y2], 1), want, rtol=0, atol=1e-10)
    for got, wanted in zip(flatten(state), flatten(want_state), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@every_layer
def test_token_by_token_equals_sequence(case: LayerCase):
    mixer, x = build(case.config), sequence(case.config, 12)
    want, _ = mixer(x)
    state, outs = mixer.init_state(2), []
    for t in range(12):
        y, state = mixer(x[:, t : t + 1], state)
        outs.append(y)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-10)


@every_layer
def test_causal(case: LayerCase):
    mixer, x = build(case.config), sequence(case.config, 70)
    changed = torch.cat([x[:, :50], -x[:, 50:]], dim=1)
    before, after = mixer(x)[0], mixer(changed)[0]
    torch.testing.assert_close(before[:, :50], after[:, :50], rtol=0, atol=1e-12)
    assert not torch.allclose(before[:, 50:], after[:, 50:])


@every_layer
def test_every_parameter_gets_a_gradient(case: LayerCase):
    mixer, x = build(case.config), sequence(case.config, 9)
    mixer(x)[0].square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_runs_and_agrees(case: LayerCase, dtype):
    mixer, x = build(case.config), sequence(case.config, 70)
    want, _ = mixer(x)
    got, _ = mixer.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert (got.double() - want).norm() / want.norm() <= 30 * torch.finfo(dtype).eps


@every_layer
def test_under_autocast_a_recurrence_gets_16_bits(case: LayerCase, monkeypatch: pytest.MonkeyPatch):
    """Else its float32 kernels would run, several times slower; decays, rates and writing strengths stay float32."""
    seen: dict[str, torch.dtype] = {}

    def watched(op):
        def run(*args, **kwargs):
            seen.update({name: x.dtype for name, x in kwargs.items() if isinstance(x, torch.Tensor)})
            return op(*args, **kwargs)

        return run

    module = import_module(type(case.config).__module__)
    for name in ("delta_rule", "selective_scan", "gated_linear_attention", "dplr"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    mixer = build(case.config).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixer(sequence(case.config, 9).float())
    streams = {name: seen[name] for name in ("q", "k", "v", "u", "B", "C", "z") if name in seen}
    assert set(streams.values()) <= {torch.bfloat16}, streams
    assert {seen[name] for name in ("decay", "log_decay", "beta", "A") if name in seen} <= {torch.float32}


OTHER = {
    "dim": 32, "heads": 1, "head_dim": 12, "factors": 2, "gate": True, "conv_size": 3, "output_gate": True,
    "eigenvalues": (-0.5, 0.5), "norm_eps": 0.1, "backend": "reference", "state_size": 3, "expand": 3, "rank": 3,
    "rotary_base": 100.0, "dt_range": (0.5, 0.9), "beta_std": 2.0, "key_dim": 3, "gate_rank": 5, "temperature": 1.0,
    "groups": 2, "first_exponent": 1.0, "lower_bound": 0.3, "gate_cap": 0.5, "mix_rank": 5,
    "gate_std": 2.0, "value_dim": 3, "key_heads": 2, "kv_heads": 2, "qk_norm": 1e-6, "learned_low": True,
    "precision": "fast",
}  # fmt: skip
OPTIONS = [(cls, f.name) for cls in MIXERS.values() for f in dataclasses.fields(cls)]


@pytest.mark.parametrize("cls, option", OPTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_every_option_is_read(cls, option: str):
    """Flip an option and the output changes (or, for the backend, the path taken, which rounds differently)."""
    base, device = cls(dim=16), "cpu"
    if option == "precision":  # of the Triton kernels alone
        pytest.importorskip("triton")
        base = dataclasses.replace(base, backend="triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    x = torch.randn(1, 70, OTHER["dim"] if option == "dim" else 16).to(device)
    changed = dataclasses.replace(base, **{option: OTHER[option]})
    outs = []
    for config in (base, changed):
        torch.manual_seed(0)
        mixer = config.build().to(device)
        outs.append(mixer(x[..., : config.dim])[0])
    assert outs[0].shape != outs[1].shape or not torch.equal(*outs)


BAD = [
    (DeltaProductConfig(dim=16, heads=3), "dim=16 does not divide by heads=3"),
    (DeltaProductConfig(dim=16, heads=0), "heads must be a whole number of at least 1, got 0"),
    (DeltaProductConfig(dim=16, factors=0), "factors must be"),
    (DeltaProductConfig(dim=16, conv_size=-1), "conv_size must be 0"),
    (DeltaProductConfig(dim=16, key_heads=3), "heads=4 does not divide by key_heads=3"),
    (DeltaProductConfig(dim=16, value_dim=0), "value_dim must be"),
    (AttentionConfig(dim=16, kv_heads=3), "heads=4 does not divide by kv_heads=3"),
    (DeltaProductConfig(dim=16, beta_std=0.0), "beta_std must be positive"),
    (DeltaProductConfig(dim=16, eigenvalues=(-2.0, 1.0)), "eigenvalues must be"),
    (MambaConfig(dim=16, eigenvalues=(1.0, 1.0)), "eigenvalues must be"),
    (MambaConfig(dim=16, state_size=0), "state_size must be"),
    (MambaConfig(dim=16, dt_range=(0.1, 0.01)), "dt_range must be"),
    (GLAConfig(dim=16, temperature=0.0), "temperature must be positive"),
    (GLAConfig(dim=16, gate_std=-1.0), "gate_std must be positive"),
    (GLAConfig(dim=16, key_dim=0), "key_dim must be"),
    (GLAConfig(dim=16, gate_rank=0), "rank must be"),
    (Mamba2Config(dim=16, groups=3), "heads=4 does not divide by groups=3"),
    (Mamba2Config(dim=16, conv_size=-1), "conv_size must be 0"),
    (Mamba2Config(dim=16, dt_range=(0.1, 0.01)), "dt_range must be"),
    (Mamba2Config(dim=16, eigenvalues=(0.5, 0.5)), "eigenvalues must be"),
    (RetNetConfig(dim=12), "even head width"),
    (RetNetConfig(dim=16, first_exponent=-1.0), "first_exponent must be"),
    (HGRN2Config(dim=16, lower_bound=1.0), "lower_bound must be"),
    (MLSTMConfig(dim=16, gate_cap=50.0), "gate_cap must be"),
    (RWKV6Config(dim=16, mix_rank=0), "mix_rank must be"),
    (RWKV7Config(dim=16, heads=3), "does not divide"),
    (DenseRNNConfig(dim=16, state_size=0), "state_size must be"),
    (AttentionConfig(dim=6, heads=2), "even head width"),
    (LSTMConfig(dim=0), "dim must be"),
]


@pytest.mark.parametrize("config, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_configurations_are_refused(config: MixerConfig, message: str):
    with pytest.raises(UsageError, match=message):
        config.build()


def hybrid() -> Config:
    return Config(vocab_size=7, num_outputs=5, mixers=tuple(cls(dim=16) for cls in MIXERS.values()))


def test_model_streams_a_hybrid_of_all_mixers():
    torch.manual_seed(0)
    model = hybrid().build().double()
    tokens = torch.randint(0, 7, (2, 75))
    want, _ = model(tokens)
    assert want.shape == (2, 75, 5)
    state, outs = None, []
    for piece in tokens.split([1, 1, 30, 43], dim=1):
        logits, state = model(piece, state)
        outs.append(logits)
    torch.testing.assert_close(torch.cat(outs, 1), want, rtol=0, atol=1e-10)
    assert [type(s) for s in model.init_state(2)] == [type(s) for s in state or ()]


def test_config_survives_the_round_trip_through_json():
    config = hybrid()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [{"depth": 3}, {"mixers": [{"mixer": "transformer", "dim": 4}]}, {"mixers": 3}])
def test_config_refuses_what_it_does_not_know(change):
    with pytest.raises(UsageError):
        Config.from_dict({**hybrid().to_dict(), **change})


def test_mlp_dim_follows_the_paper_unless_given():
    mixer = (LSTMConfig(dim=128),)
    widths = [
        Config(vocab_size=3, num_outputs=2, mixers=mixer, mlp_dim=d).build().blocks[0].mlp_dim for d in (None, 0, 48)
    ]
    assert widths == [512, 0, 48]


@st.composite
def packings(draw) -> list[int]:
    """Draw the lengths of up to 5 sequences, some of them empty, not all."""
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    return lengths if any(lengths) else [1]


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@every_layer
@settings(max_examples=8)
@given(lengths=packings(), continued=st.booleans())
def test_packed_sequences_equal_separate_passes(case: LayerCase, lengths: list[int], continued: bool):
    """No sequence sees another: outputs, states and gradients, from empty states or from those of other lengths."""
    mixer, S = build(case.config), len(lengths)
    x = sequence(case.config, sum(lengths), batch=1).requires_grad_()
    state, singles = None, [None] * S
    if continued:
        before = [3 + s for s in range(S)]
        past = sequence(case.config, sum(before) + 1, batch=1)[:, 1:]
        singles = [mixer(part)[1] for part in past.split(before, dim=1)]
        _, state = mixer(past, None, Packing.of(offsets(before), past))
    y, states = mixer(x, state, Packing.of(offsets(lengths), x))
    parts = [mixer(part, single) for part, single in zip(x.split(lengths, dim=1), singles, strict=True)]
    want = torch.cat([part for part, _ in parts], dim=1)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    weights = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    got_gradient, want_gradient = (torch.autograd.grad((o * weights).sum(), x)[0] for o in (y, want))
    torch.testing.assert_close(got_gradient, want_gradient, rtol=0, atol=1e-10)
    torch.manual_seed(3)
    more = torch.randn(S, 2, case.config.dim, dtype=torch.float64)  # the states mean the same: go on from both
    after, _ = mixer(more, states)
    for s in range(S):
        torch.testing.assert_close(after[s : s + 1], mixer(more[s : s + 1], parts[s][1])[0], rtol=0, atol=1e-10)


def test_model_keeps_packed_documents_apart():
    torch.manual_seed(0)
    model = hybrid().build().double()
    tokens, lengths = torch.randint(0, 7, (1, 60)), [7, 0, 33, 20]
    logits, state = model(tokens, cu_seqlens=offsets(lengths))
    parts = [model(part)[0] for part in tokens.split(lengths, dim=1) if part.shape[1]]
    torch.testing.assert_close(logits, torch.cat(parts, 1), rtol=0, atol=1e-10)
    next_logits, _ = model(torch.arange(4)[:, None], state)
    assert next_logits.shape == (4, 1, 5)


def test_recomputing_blocks_gives_the_same_gradients():
    torch.manual_seed(0)
    model, tokens, gradients = hybrid().build().double(), torch.randint(0, 7, (2, 20)), []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        model(tokens)[0].logsumexp(-1).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [torch.tensor([0, 5]), torch.tensor([0, 9, 6]), torch.tensor([0])], ids=str)
def test_bad_packings_are_refused(bad: Tensor):
    with pytest.raises(UsageError, match="cu_seqlens must"):
        hybrid().build()(torch.zeros(1, 6, dtype=torch.long), cu_seqlens=bad.int())
    with pytest.raises(UsageError, match="batch must be 1"):
        hybrid().build()(torch.zeros(2, 6, dtype=torch.long), cu_seqlens=torch.tensor([0, 6]))


def test_post_norm_normalises_what_mixer_and_swiglu_return():
    torch.manual_seed(0)
    mixers = (AttentionConfig(dim=16), DeltaProductConfig(dim=16))
    model = Config(vocab_size=7, num_outputs=5, mixers=mixers, mlp_dim=24, post_norm=(0,)).build().double()
    assert [block.post_norm for block in model.blocks] == [True, False]
    block: Any = model.blocks[0]
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y = x + block.mixer_norm(block.mixer(x)[0])
    gate, up = block.gate_up(y).chunk(2, dim=-1)
    want = y + block.mlp_norm(block.down(torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(block(x)[0], want, rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="post_norm must number some of 2 blocks"):
        Config(vocab_size=7, num_outputs=5, mixers=mixers, post_norm=(2,)).build()


def by_the_definition(q, k, v, edges, same_edges, longest, same_longest, *, window_size):
    """torch's varlen_attn as documented, [T H K] each: a softmax per token over its sequence up to itself."""
    assert edges is same_edges and edges.dtype == torch.int32 and longest == same_longest == int(edges.diff().max())
    assert window_size == (-1, 0) and q.shape == k.shape == v.shape
    out = torch.zeros_like(q)
    for start, end in itertools.pairwise(edges.tolist()):
        for t in range(start, end):
            scores = torch.einsum("hk,shk->hs", q[t], k[start : t + 1]) * q.shape[-1] ** -0.5
            out[t] = torch.einsum("hs,shk->hk", scores.softmax(-1), v[start : t + 1])
    return out


@given(lengths=packings(), kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=10)
def test_the_call_of_the_fused_kernel_for_packed_attention(lengths: list[int], kv_heads: int):
    """On a GPU one call serves all sequences; here the kernel is replaced by its definition."""
    q, k, v = (torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, kv_heads, kv_heads))
    packing = Packing.of(offsets(lengths), q[0, 0, None])
    separate = softmax.attend_packed(q, k, v, packing)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(softmax, "has_fused", lambda _: True)
        patched.setattr(varlen, "varlen_attn", by_the_definition)
        torch.testing.assert_close(softmax.attend_packed(q, k, v, packing), separate)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is torch's, for GPUs")
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_packed_attention_on_a_gpu_is_that_of_the_sequences_alone(kv_heads: int):
    lengths = [3, 0, 130, 1, 257]
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, kv_heads, kv_heads)]
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes]
    packing = Packing.of(offsets(lengths), inputs[0][0, 0, None])
    assert softmax.has_fused(inputs[0])
    q, k, v = inputs
    o = softmax.attend_packed(q, k, v, packing)
    precise = [x.detach().double().requires_grad_() for x in inputs]
    spans = packing.spans()
    q, k, v = precise
    alone = torch.cat([softmax.attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]) for a, b in spans if b > a], dim=2)
    weight = torch.randn_like(o)
    got = torch.autograd.grad((o * weight).sum(), inputs)
    wanted = torch.autograd.grad((alone * weight).sum(), precise)
    for x, y in zip((o, *got), (alone, *wanted), strict=True):
        assert float((x.double() - y).norm() / y.norm()) < 0.01
