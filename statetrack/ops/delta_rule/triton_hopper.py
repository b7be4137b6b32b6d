"""Launches of the Gluon kernels: what triton.py runs on Hopper GPUs instead of its Triton kernels."""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statetrack.ops.delta_rule.triton_hopper_gather import gather
from statetrack.ops.delta_rule.triton_hopper_prepare import prepare
from statetrack.ops.delta_rule.triton_hopper_walk import walk, walk_back

if TYPE_CHECKING:
    from statetrack.ops.delta_rule.triton import Plan


def serves(q: Tensor, v: Tensor) -> bool:
    """Return whether the kernels are made for these tensors and their GPU."""
    if v.dtype != torch.bfloat16 or not v.is_cuda or torch.cuda.get_device_capability(v.device) != (9, 0):
        return False
    return q.shape[-1] in (64, 128) and v.shape[-1] % 64 == 0


def launch_prepare(
    plan: Plan,
    work: dict[str, Tensor],
    tensors: tuple[Tensor, Tensor, Tensor | None],
    low: int,
    high: int,
    terms: int,
    backward: bool,
) -> None:
    """Write what the walks need of the chunks [low, high) of every sequence (all chunks of packed ones)."""
    k, beta, log_decay = tensors
    prepare[(plan.pairs(low, high) * plan.HV,)](
        k, beta, log_decay, work["X_hi"], work["X_lo"], work["scales"], work["G"], plan.starts, plan.slots,
        plan.T, low, high - low,
        plan.HK, plan.HV, plan.K, plan.N, plan.C,
        plan.common["GATE"], plan.varlen, plan.whole, backward, terms, num_warps=4,
    )  # fmt: skip


def launch_walk(plan: Plan, work: dict[str, Tensor], tensors: tuple[Tensor, ...], scale: float, V: int, what) -> None:
    """Walk over all chunks; V: value columns of the state, what: (save for the backward?, take values?, output?)."""
    q, k, v, start, o, end, saved, F = tensors
    save, values, output = what
    walk[(V // 64, plan.S * plan.HV)](
        q, k, v, work["X_hi"], work["X_lo"], work["scales"], work["G"], start, o, end, saved, F,
        plan.starts, plan.bases, plan.T, scale, plan.HK, plan.HV, plan.K, V, plan.N, plan.C, plan.BQ,
        plan.common["GATE"], plan.varlen, plan.whole, save, values, output, plan.walk["TERMS"], num_warps=4,
    )  # fmt: skip


def launch_walk_back(
    plan: Plan, work: dict[str, Tensor], tensors: tuple[Tensor, ...], scale: float, low: int, high: int, output: bool
) -> None:
    """Walk back over the chunks [low, high) of every sequence (all chunks of packed ones)."""
    q, k, d_out, out, ends, z, d_saved = tensors
    walk_back[(plan.V // 64, plan.S * plan.HV)](
        q, k, d_out, work["X_hi"], work["X_lo"], work["scales"], work["G"], out, ends, z, d_saved,
        plan.starts, plan.bases, plan.T, low, high, scale, plan.HK, plan.HV, plan.K, plan.V, plan.N, plan.C, plan.BQ,
        plan.common["GATE"], plan.varlen, plan.whole, output, plan.walk["TERMS"], num_warps=4,
    )  # fmt: skip


def launch_gather(
    plan: Plan, work: dict[str, Tensor], tensors: tuple[Tensor, ...], scale: float, low: int, high: int
) -> None:
    """Write the gradients of the chunks [low, high)."""
    q, k, v, log_decay, d_out, saved, F, d_saved, z, dq, dk, d_beta, d_decay = tensors
    registers = {} if plan.common["GATE"] else {"maxnreg": 128}  # two programs per multiprocessor
    gather[(plan.pairs(low, high) * plan.HV,)](
        q, k, v, log_decay, d_out, work["scales"], work["G"], saved, F, d_saved, z, dq, dk, d_beta, d_decay,
        plan.starts, plan.slots, plan.T, low, high - low, plan.most, scale,
        plan.HK, plan.HV, plan.K, plan.V, plan.N, plan.C,
        plan.common["GATE"], plan.varlen, plan.whole, num_warps=8, **registers,
    )  # fmt: skip
