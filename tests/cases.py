"""The tables: one row per op variant and per layer. A new op or layer is one more row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from statetrack.layers import (
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
    SLSTMConfig,
)
from statetrack.ops import delta_rule, dplr, gated_linear_attention, selective_scan

CPU = ("chunk", "numba") if find_spec("numba") else ("chunk",)
Make = Callable[[torch.Generator, int, int], dict[str, Any]]


@dataclass(frozen=True)
class OpCase:
    """One variant of an op: how to draw its tensors (float64) for B sequences of T tokens."""

    name: str
    op: Callable[..., tuple[Tensor, Tensor]]
    make: Make
    per_token: tuple[str, ...]
    """arguments whose dimension 1 is T"""
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, tensors: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
        """Call the op."""
        return self.op(**tensors, **self.options, **options)


def draws(g: torch.Generator) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return a normal and a uniform source of float64 tensors."""
    return partial(torch.randn, generator=g, dtype=torch.float64), partial(torch.rand, generator=g, dtype=torch.float64)


def delta_inputs(
    H: int = 2, Hk: int | None = None, N: int = 1, K: int = 5, V: int = 4, decay: str = "", hard: bool = False
) -> Make:
    """Draw arguments of `delta_rule`; hard: beta at both ends and 0 length keys, 3 key directions, many resets.

    decay: one per "head" or "key" channel, with some resets, or "mild-head", "mild-key": near 1.
    """

    def make(g: torch.Generator, B: int, T: int) -> dict[str, Any]:
        normal, uniform = draws(g)
        heads = Hk or H
        x = {"q": normal(B, T, heads, K), "k": normal(B, T, N, heads, K), "v": normal(B, T, N, H, V)}
        x["beta"] = 2 * uniform(B, T, N, H)
        if hard:
            x["k"] = normal(3, K)[torch.randint(0, 3, (B, T, N, heads), generator=g)]
            x["k"][uniform(B, T, N, heads) < 0.1] = 0
            x["beta"] = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)[
                torch.randint(0, 3, (B, T, N, H), generator=g)
            ]
        if decay:
            shape = (B, T, H) if decay.endswith("head") else (B, T, H, K)
            x["log_decay"] = -uniform(*shape)
            if decay.startswith("mild"):
                x["log_decay"] /= 10
            else:
                x["log_decay"][uniform(*shape) < (0.2 if hard else 0.03)] = -torch.inf
        x["initial_state"] = normal(B, H, K, V)
        return x

    return make


def scan_inputs(D: int = 6, M: int = 3, skip: bool = True, gate: bool = False) -> Make:
    """Draw arguments of `selective_scan`."""

    def make(g: torch.Generator, B: int, T: int) -> dict[str, Any]:
        normal, _ = draws(g)
        x = {"u": normal(B, T, D), "dt": normal(B, T, D).exp(), "A": -normal(D, M).exp()}
        x |= {"B": normal(B, T, M), "C": normal(B, T, M), "initial_state": normal(B, D, M)}
        return x | ({"D": normal(D)} if skip else {}) | ({"z": normal(B, T, D)} if gate else {})

    return make


EDGES = (0.0, 1e-30, -1e-30, 1.0, -1.0, 0.5, -0.5)
"""decays at which a formula by logarithms or quotients goes wrong: resets, tiny ones, and sign changes"""


def attention_inputs(
    H: int = 2, Hk: int | None = None, K: int = 5, V: int = 4, decay: str = "head", hard: bool = False
) -> Make:
    """Draw arguments of `gated_linear_attention`, with decays of both signs; hard: from `EDGES` alone."""

    def make(g: torch.Generator, B: int, T: int) -> dict[str, Any]:
        normal, uniform = draws(g)
        heads = Hk or H
        x = {"q": normal(B, T, heads, K), "k": normal(B, T, heads, K), "v": normal(B, T, H, V)}
        shape = (B, T, H) if decay == "head" else (B, T, H, K)
        x["decay"] = torch.where(uniform(*shape) < 0.3, -1, 1) * uniform(*shape) ** 0.2
        if hard:
            x["decay"] = torch.tensor(EDGES, dtype=torch.float64)[torch.randint(0, len(EDGES), shape, generator=g)]
        x["initial_state"] = normal(B, H, K, V)
        return x

    return make


def dplr_inputs(
    H: int = 2, Hk: int | None = None, K: int = 5, V: int = 4, decay: bool = True, hard: bool = False
) -> Make:
    """Draw arguments of `dplr`: corrections near -rate kh kh^T, not symmetric; hard: swaps, merges and many resets."""

    def make(g: torch.Generator, B: int, T: int) -> dict[str, Any]:
        normal, uniform = draws(g)
        heads = Hk or H
        x = {"q": normal(B, T, heads, K), "k": normal(B, T, heads, K), "v": normal(B, T, H, V)}
        key = torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
        x |= {"a": key, "b": -2 * uniform(B, T, H, 1) * (key + 0.1 * normal(B, T, H, K))}
        if hard:
            i, j = torch.randint(0, K, (2, B, T, H), generator=g)
            one, other = torch.eye(K, dtype=torch.float64)[i], torch.eye(K, dtype=torch.float64)[j]
            swap = uniform(B, T, H, 1) < 0.5
            x |= {"a": torch.where(swap, one - other, one), "b": other - one}
        if decay:
            x["log_decay"] = -uniform(B, T, H, K)
            x["log_decay"][uniform(B, T, H, K) < (0.2 if hard else 0.03)] = -torch.inf
        x["initial_state"] = normal(B, H, K, V)
        return x

    return make


DELTA = ("q", "k", "v", "beta", "log_decay")
SCAN = ("u", "dt", "B", "C", "z")
ATTENTION = ("q", "k", "v", "decay")
DPLR = ("q", "k", "v", "a", "b", "log_decay")

OPS = [
    OpCase("delta", delta_rule, delta_inputs(), DELTA),
    OpCase("delta-3-factors", delta_rule, delta_inputs(N=3), DELTA),
    OpCase("delta-head-decay", delta_rule, delta_inputs(decay="head"), DELTA),
    OpCase("delta-key-decay", delta_rule, delta_inputs(K=20, decay="key"), DELTA),
    OpCase("delta-mild-head-decay", delta_rule, delta_inputs(decay="mild-head"), DELTA),
    OpCase("delta-mild-key-decay", delta_rule, delta_inputs(N=2, K=20, decay="mild-key"), DELTA),
    OpCase("delta-wide", delta_rule, delta_inputs(N=2, K=20, V=12, decay="head"), DELTA),
    OpCase("delta-shared-heads", delta_rule, delta_inputs(H=4, Hk=2, N=2, decay="head"), DELTA),
    OpCase("delta-shared-heads-key-decay", delta_rule, delta_inputs(H=4, Hk=2, N=2, decay="key"), DELTA),
    OpCase("delta-hard", delta_rule, delta_inputs(hard=True), DELTA),
    OpCase("delta-hard-head-decay", delta_rule, delta_inputs(N=2, decay="head", hard=True), DELTA),
    OpCase("delta-hard-key-decay", delta_rule, delta_inputs(N=2, decay="key", hard=True), DELTA),
    OpCase("delta-scale", delta_rule, delta_inputs(K=2, V=1), DELTA, {"scale": 0.7}),
    OpCase("scan-[-1,1]", selective_scan, scan_inputs(), SCAN, {"eigenvalues": (-1.0, 1.0)}),
    OpCase("scan-[0,1]", selective_scan, scan_inputs(gate=True), SCAN, {"eigenvalues": (0.0, 1.0)}),
    OpCase("scan-[-0.5,0.25]", selective_scan, scan_inputs(D=70, skip=False), SCAN, {"eigenvalues": (-0.5, 0.25)}),
    OpCase("attention-head-decay", gated_linear_attention, attention_inputs(), ATTENTION),
    OpCase("attention-key-decay", gated_linear_attention, attention_inputs(K=20, decay="key"), ATTENTION),
    OpCase("attention-shared-heads", gated_linear_attention, attention_inputs(H=4, Hk=2), ATTENTION),
    OpCase(
        "attention-shared-heads-key-decay", gated_linear_attention, attention_inputs(H=4, Hk=2, decay="key"), ATTENTION
    ),
    OpCase("attention-hard", gated_linear_attention, attention_inputs(hard=True), ATTENTION),
    OpCase("attention-hard-key-decay", gated_linear_attention, attention_inputs(decay="key", hard=True), ATTENTION),
    OpCase("attention-scale", gated_linear_attention, attention_inputs(K=1, V=1, decay="key"), ATTENTION, {"scale": 3}),
    OpCase("dplr", dplr, dplr_inputs(decay=False), DPLR),
    OpCase("dplr-decay", dplr, dplr_inputs(K=20, V=12), DPLR),
    OpCase("dplr-shared-heads", dplr, dplr_inputs(H=4, Hk=2), DPLR),
    OpCase("dplr-hard", dplr, dplr_inputs(decay=False, hard=True), DPLR),
    OpCase("dplr-hard-decay", dplr, dplr_inputs(hard=True), DPLR),
    OpCase("dplr-scale", dplr, dplr_inputs(K=1, V=1), DPLR, {"scale": 0.7}),
]


@dataclass(frozen=True)
class LayerCase:
    """One mixer configuration, small."""

    name: str
    config: MixerConfig


LAYERS = [
    LayerCase("deltanet", DeltaProductConfig(dim=16, heads=2)),
    LayerCase("deltanet-no-conv", DeltaProductConfig(dim=16, heads=2, conv_size=0)),
    LayerCase("deltanet-[0,1]", DeltaProductConfig(dim=16, heads=2, eigenvalues=(0.0, 1.0))),
    LayerCase("deltaproduct", DeltaProductConfig(dim=16, heads=2, factors=3)),
    LayerCase("gated-deltaproduct", DeltaProductConfig(dim=16, heads=2, factors=2, gate=True, output_gate=True)),
    LayerCase("mamba", MambaConfig(dim=12, state_size=4)),
    LayerCase("mamba-no-conv", MambaConfig(dim=12, state_size=4, conv_size=0)),
    LayerCase("mamba-[0,1]", MambaConfig(dim=12, state_size=4, eigenvalues=(0.0, 1.0))),
    LayerCase("kda", DeltaProductConfig(dim=16, heads=2, gate="key", output_gate=True)),
    LayerCase("gla", GLAConfig(dim=16, heads=2)),
    LayerCase("gla-[0,1]", GLAConfig(dim=16, heads=2, temperature=1.0, eigenvalues=(0.0, 1.0))),
    LayerCase("mamba2", Mamba2Config(dim=12, heads=2, state_size=4)),
    LayerCase("mamba2-groups-no-conv", Mamba2Config(dim=12, heads=4, groups=2, state_size=4, conv_size=0)),
    LayerCase("mamba2-[0,1]", Mamba2Config(dim=12, heads=2, state_size=4, eigenvalues=(0.0, 1.0))),
    LayerCase("retnet", RetNetConfig(dim=16, heads=2)),
    LayerCase("hgrn2", HGRN2Config(dim=16, heads=2)),
    LayerCase("mlstm", MLSTMConfig(dim=16, heads=2)),
    LayerCase("mlstm-[0,1]", MLSTMConfig(dim=16, heads=2, eigenvalues=(0.0, 1.0))),
    LayerCase("rwkv6", RWKV6Config(dim=16, heads=2)),
    LayerCase("rwkv7", RWKV7Config(dim=16, heads=2)),
    LayerCase("rwkv7-[0,1]", RWKV7Config(dim=16, heads=2, eigenvalues=(0.0, 1.0))),
    LayerCase("gated-deltanet-wide", DeltaProductConfig(dim=16, heads=4, key_heads=2, value_dim=6, gate=True)),
    LayerCase("deltanet-learned-low", DeltaProductConfig(dim=16, heads=2, learned_low=True)),
    LayerCase("gla-learned-low", GLAConfig(dim=16, heads=2, learned_low=True)),
    LayerCase("mamba2-learned-low", Mamba2Config(dim=12, heads=2, state_size=4, learned_low=True)),
    LayerCase("hgrn2-learned-low", HGRN2Config(dim=16, heads=2, learned_low=True)),
    LayerCase("mlstm-learned-low", MLSTMConfig(dim=16, heads=2, learned_low=True)),
    LayerCase("rwkv6-learned-low", RWKV6Config(dim=16, heads=2, learned_low=True)),
    LayerCase("rwkv7-learned-low", RWKV7Config(dim=16, heads=2, learned_low=True)),
    LayerCase("attention", AttentionConfig(dim=16, heads=2)),
    LayerCase(
        "attention-shared-no-positions", AttentionConfig(dim=16, heads=4, kv_heads=2, rotary_base=None, qk_norm=1e-6)
    ),
    LayerCase("lstm", LSTMConfig(dim=16)),
    LayerCase("slstm", SLSTMConfig(dim=16, heads=2)),
    LayerCase("dense-rnn", DenseRNNConfig(dim=16, state_size=5)),
]
