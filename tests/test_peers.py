"""Agreement with other libraries on a CPU: the same weights, eigenvalues (0, 1), outputs and all gradients.

Needs the extra `peers` (transformers, fla-core, einops); a test says why it is skipped where its peer is absent. Of
fla-core only the files of naive references are read: they need neither Triton nor a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.layers import (
    DeltaProductConfig,
    GLAConfig,
    HGRN2Config,
    Mamba2Config,
    MLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
)
from statetrack.ops import delta_rule, dplr, gated_linear_attention

PUBLISHED = {"dim": 16, "heads": 2, "eigenvalues": (0.0, 1.0)}


def fla(file: str, function: str) -> Callable[..., Any]:
    """Return a naive reference of fla-core without importing the package."""
    package = PathFinder.find_spec("fla")
    if package is None or not package.submodule_search_locations or find_spec("einops") is None:
        pytest.skip("fla-core and einops are not installed (pip install 'statetrack[peers]')")
    spec = spec_from_file_location("peer", Path(package.submodule_search_locations[0], "ops", file))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)


def transformers(model: str) -> Any:
    """Return the module of a model of transformers, which computes in torch where no kernels are installed."""
    if find_spec("transformers") is None:
        pytest.skip("transformers is not installed (pip install 'statetrack[peers]')")
    return import_module(f"transformers.models.{model}.modeling_{model}")


def agree(ours: Tensor, theirs: Tensor, leaves: dict[str, Tensor], bound: float = 2e-5) -> None:
    """Fail unless outputs and the gradients of a random functional agree, relative to the largest entry."""
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(ours.shape, generator=g)
    grads = [torch.autograd.grad((y * weights).sum(), list(leaves.values()), retain_graph=True) for y in (ours, theirs)]
    pairs = {"output": (ours, theirs), **dict(zip(leaves, zip(*grads, strict=True), strict=True))}
    for name, (got, want) in pairs.items():
        assert want.abs().max() > 0, f"{name}: nothing to compare"
        assert (got - want).abs().max() <= bound * want.abs().max(), name


def built(config: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Return a mixer moved off its initial weights, an input, and all that asks for gradients."""
    torch.manual_seed(0)
    mixer = config.build()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 70, config.dim, requires_grad=True)
    return mixer, x, {"x": x, **dict(mixer.named_parameters())}


def used(leaves: dict[str, Tensor], *outputs: Tensor) -> dict[str, Tensor]:
    """Return the leaves that the outputs depend on."""
    total = torch.stack([y.sum() for y in outputs]).sum()
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)
    return {name: leaf for (name, leaf), grad in zip(leaves.items(), grads, strict=True) if grad is not None}


@pytest.mark.parametrize("config", [GLAConfig(**PUBLISHED), HGRN2Config(**PUBLISHED)], ids=["gla", "hgrn2"])
def test_key_decay_against_fla(config: GLAConfig | HGRN2Config):
    peer = fla("gla/naive.py", "naive_recurrent_gla")
    mixer, x, leaves = built(config)
    inputs = mixer.op_inputs(x)
    ours, _ = gated_linear_attention(**inputs)
    theirs, _ = peer(inputs["q"], inputs["k"], inputs["v"], inputs["decay"].log())
    agree(ours, theirs, used(leaves, ours))


def test_head_decay_against_fla():
    peer = fla("simple_gla/naive.py", "naive_recurrent_simple_gla")
    mixer, x, leaves = built(Mamba2Config(**PUBLISHED, state_size=8))
    inputs = mixer.op_inputs(x)
    ours, _ = gated_linear_attention(**inputs)
    q, k = (inputs[n].expand(-1, -1, 2, -1) for n in ("q", "k"))
    theirs, _ = peer(q, k, inputs["v"], inputs["decay"].log(), scale=1.0)
    agree(ours, theirs, used(leaves, ours))


def test_retention_against_fla():
    peer = fla("retention/naive.py", "naive_retention")
    mixer, x, leaves = built(RetNetConfig(**PUBLISHED))
    inputs = mixer.op_inputs(x)
    ours, _ = gated_linear_attention(**inputs)
    theirs = peer(*(inputs[n].transpose(1, 2) for n in ("q", "k", "v"))).transpose(1, 2)
    agree(ours, theirs, used(leaves, ours))


def test_rwkv6_against_fla():
    peer = fla("rwkv6/recurrent_naive.py", "naive_recurrent_rwkv6")
    mixer, x, leaves = built(RWKV6Config(**PUBLISHED))
    inputs, gate = mixer._op_inputs(x, None, None)
    q, k, v, w = (inputs[n].transpose(1, 2) for n in ("q", "k", "v", "decay"))
    o, _ = peer(q, k, v, w.log(), mixer.bonus, scale=1.0)
    theirs = mixer.o_proj(mixer.norm(o.transpose(1, 2)).flatten(2) * F.silu(gate))
    agree(mixer(x)[0], theirs, leaves, bound=1e-4)


def test_rwkv7_against_fla():
    peer = fla("generalized_delta_rule/dplr/naive.py", "dplr_recurrence")
    mixer, x, leaves = built(RWKV7Config(**PUBLISHED))
    inputs = mixer.op_inputs(x)
    ours, _ = dplr(**inputs)
    theirs, _ = peer(*(inputs[n].transpose(1, 2) for n in ("q", "k", "v", "a", "b", "log_decay")))
    agree(ours, theirs.transpose(1, 2), used(leaves, ours))


def test_kda_against_fla():
    peer = fla("kda/naive.py", "naive_recurrent_kda")
    mixer, x, leaves = built(DeltaProductConfig(**PUBLISHED, gate="key"))
    inputs = mixer.op_inputs(x)
    ours, _ = delta_rule(**inputs)
    key = F.normalize(inputs["k"].squeeze(2), dim=-1)
    theirs, _ = peer(inputs["q"], key, inputs["v"].squeeze(2), inputs["log_decay"], inputs["beta"].squeeze(2))
    agree(ours, theirs, used(leaves, ours))


def test_kda_against_transformers():
    if find_spec("fla") is not None:
        pytest.skip("fla-core is installed, and transformers computes with its GPU kernels instead of torch")
    peer = transformers("kimi_linear").chunk_kimi_delta_attention
    mixer, x, leaves = built(DeltaProductConfig(**PUBLISHED, gate="key"))
    inputs = mixer.op_inputs(x)
    ours, _ = delta_rule(**inputs)
    key = F.normalize(inputs["k"].squeeze(2), dim=-1)
    theirs, _ = peer(
        inputs["q"], key, inputs["v"].squeeze(2), g=inputs["log_decay"], beta=inputs["beta"].squeeze(2),
        initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    )  # fmt: skip
    agree(ours, theirs, used(leaves, ours))


def test_mamba2_against_transformers():
    peers = transformers("mamba2")
    mixer, x, leaves = built(Mamba2Config(**PUBLISHED, state_size=8, groups=2))
    settings = peers.Mamba2Config(
        hidden_size=16, num_heads=2, head_dim=16, state_size=8, expand=2, n_groups=2, conv_kernel=4, use_bias=False,
        num_hidden_layers=1, layer_norm_epsilon=1e-6, chunk_size=32, time_step_limit=(0.0, float("inf")),
    )  # fmt: skip
    peer = peers.Mamba2Mixer(settings, 0).eval()
    own = {
        "in_proj.weight": mixer.in_proj.weight, "conv1d.weight": mixer.conv.weight.T.unsqueeze(1),
        "conv1d.bias": mixer.conv.bias, "dt_bias": mixer.dt_bias, "A_log": mixer.A_log, "D": mixer.D,
        "norm.weight": mixer.norm.weight, "out_proj.weight": mixer.out_proj.weight,
    }  # fmt: skip
    agree(mixer(x)[0], run_with(peer, own, x), leaves, bound=1e-4)  # D's gradient is a sum that cancels


def test_mlstm_against_transformers():
    peers = transformers("xlstm")
    if peers.external_xlstm:
        pytest.skip("the package xlstm is installed, and transformers computes with it instead of its own torch code")
    mixer, x, leaves = built(MLSTMConfig(**PUBLISHED))
    with torch.no_grad():
        mixer.gates.weight.mul_(5)  # gates of very different strength
    settings = peers.xLSTMConfig(
        hidden_size=16, num_heads=2, num_hidden_layers=1, mode="inference", eps=0.0, norm_eps=1e-6, use_bias=False,
        autocast_kernel_dtype="float32",
    )  # fmt: skip
    peer = peers.xLSTMLayer(settings).eval()
    own = {
        "q.weight": mixer.q_proj.weight, "k.weight": mixer.k_proj.weight, "v.weight": mixer.v_proj.weight,
        "ogate_preact.weight": mixer.output_gate.weight, "out_proj.weight": mixer.o_proj.weight,
        "multihead_norm.weight": mixer.norm.weight.repeat(2),
        "igate_preact.weight": mixer.gates.weight[:2], "igate_preact.bias": mixer.gates.bias[:2],
        "fgate_preact.weight": mixer.gates.weight[2:], "fgate_preact.bias": mixer.gates.bias[2:],
    }  # fmt: skip
    agree(mixer(x)[0], run_with(peer, own, x)[0], leaves, bound=1e-4)


def run_with(peer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Any:
    """Call the peer with these tensors in the place of its parameters, so that gradients reach ours."""
    assert parameters.keys() == dict(peer.named_parameters()).keys()
    return torch.func.functional_call(peer, parameters, (x,))
