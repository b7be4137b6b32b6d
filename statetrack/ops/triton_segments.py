"""Sequences cut into segments that are walked side by side: the state before each of them."""

# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from statetrack.ops.triton_launch import bind

BLOCK = 512  # numbers that a program takes


@triton.jit
def _compose_factors(totals, c, first, out, count, size, group, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Write BLOCK numbers of each of a sequence's states; a total holds for `group` numbers side by side."""
    s = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    if first is None:
        state = tl.zeros((BLOCK,), tl.float64)
    else:
        state = tl.load(first + s * size + at, mask=inside, other=0.0).to(tl.float64)
    for n in range(count):
        segment = s * count + n
        if BACK:
            segment = s * count + count - 1 - n
        tl.store(out + segment * size + at, state.to(tl.float32), mask=inside)
        total = tl.load(totals + segment * (size // group) + at // group, mask=inside, other=0.0).to(tl.float64)
        state = total * state + tl.load(c + segment * size + at, mask=inside, other=0.0).to(tl.float64)


def compose_factors(totals: Tensor, c: Tensor, first: Tensor | None, out: Tensor, count: int, back: bool) -> Tensor:
    """Return each segment's initial state under S <- total S + c, taken in float64; from the last segment if `back`.

    Args:
        totals: [B*count ...] a factor for every so many numbers side by side of a state.
        c: [B*count ...] what each segment makes of a zero state, float32.
        first: [B ...] the state before the first segment (after the last one if `back`), float32. Default: zero.
        out: where to write them, as c.
        count: segments of a sequence.
        back: whether the adjoint is meant.
    """
    size = c[0].numel()
    group = c.numel() // totals.numel()
    grid = (-(-size // BLOCK), c.shape[0] // count)
    launch = bind(_compose_factors, BACK=back, BLOCK=BLOCK, num_warps=4)
    launch(grid, (totals, c, first, out), (count, size, group))
    return out


@triton.jit
def _compose_matrices(
    A, c, first, out, memory, count, H, K, V, BACK: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """Write BV columns of each of a sequence's and head's states; `memory` [B H K V] holds the present one, float64."""
    sh = tl.program_id(1)
    s = (sh // H).to(tl.int64)
    h = sh % H
    k = tl.arange(0, BK)
    j = tl.arange(0, BJ)
    e = tl.program_id(0) * BV + tl.arange(0, BV)
    in_v = (e < V)[None, :]
    inside = (k < K)[:, None] & in_v
    tile = k[:, None] * V + e[None, :]
    memory += sh.to(tl.int64) * K * V
    if first is None:
        state = tl.zeros((BK, BV), tl.float64)
    else:
        state = tl.load(first + sh.to(tl.int64) * K * V + tile, mask=inside, other=0.0).to(tl.float64)
    for n in range(count):
        segment = (s * count + n) * H + h
        if BACK:
            segment = (s * count + count - 1 - n) * H + h
        tl.store(out + segment * K * V + tile, state.to(tl.float32), mask=inside)
        tl.debug_barrier()
        tl.store(memory + tile, state, mask=inside)
        tl.debug_barrier()  # other threads' rows are read
        state = tl.load(c + segment * K * V + tile, mask=inside, other=0.0).to(tl.float64)
        for low in range(0, K, BJ):
            rows = low + j
            at = k[:, None] * K + rows[None, :]
            if BACK:
                at = rows[None, :] * K + k[:, None]
            in_k = (k < K)[:, None] & (rows < K)[None, :]
            a = tl.load(A + segment * K * K + at, mask=in_k, other=0.0).to(tl.float64)
            x = tl.load(memory + (rows[:, None] * V + e[None, :]), mask=(rows < K)[:, None] & in_v, other=0.0)
            state = tl.dot(a, x, state, out_dtype=tl.float64)


def compose_matrices(A: Tensor, c: Tensor, first: Tensor | None, count: int, back: bool) -> Tensor:
    """Return each segment's initial state under S <- A S + c, from the last segment with A^T if `back`; in float64.

    Args:
        A: [B*count H K K] each segment's transition.
        c: [B*count H K V] what each segment makes of a zero state.
        first: [B H K V] the state before the first segment (after the last one if `back`). Default: zero.
        count: segments of a sequence.
        back: whether the adjoint is meant.
    """
    H, K, V = c.shape[1:]
    pairs, out = c.shape[0] // count * H, torch.empty_like(c)
    memory = c.new_empty((pairs, K, V), dtype=torch.float64)
    BK = max(16, triton.next_power_of_2(K))
    launch = bind(_compose_matrices, BACK=back, BK=BK, BV=16, BJ=16, num_warps=4 if BK <= 64 else 8)
    launch((-(-V // 16), pairs), (A, c, first, out, memory), (count, H, K, V))
    return out
