"""The selective scan in blocks of tokens that stay in cache: everything but the recurrence itself is vectorised.

In a block, a = lo + (hi - lo) exp(dt A) and x = dt u B are formed at once as [R M D]; one fused multiply-add per token
then turns x into the states in place, and y = C h is a batch of vector-matrix products. Nothing of that size outlives
its block: the backward keeps only the state at the start of each, recomputes the block and runs the adjoint recurrence

    g_t = C_t dy_t + a_{t+1} g_{t+1};   d(dt A)_t = g_t h_{t-1} (a_t - lo);   d(dt u B)_t = g_t

The same instructions run for every range of eigenvalues.

Letters: S sequences, T tokens, D channels (last, so that they are contiguous), M states per channel, R rows: the tokens
of a block, step by step, at each step one per sequence that still has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import untraced

BLOCK_BYTES = 1 << 20  # of one [R M D] tensor; the forward works on two of them, the backward on three
LEAST_STEPS = 16  # consecutive tokens of a sequence in a block, for each of which the backward keeps one state [M D]


@untraced
def selective_scan_chunk(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    eigenvalues: tuple[float, float],
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` block by block in the dtype of A, D and initial_state; differentiable once."""
    return _Blocked.apply(u, dt, A, B, C, D, eigenvalues, initial_state, lengths)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Block:
    """Consecutive steps of the sequences of a group."""

    tokens: Tensor  # [R] positions in the flattened batch
    active: list[int]  # per step: that many sequences still have a token


@dataclass(frozen=True)
class _Group:
    """Sequences that advance side by side, longest first, so that the active ones are always the first ones."""

    sequences: Tensor  # [S]
    blocks: list[_Block]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, eigenvalues, initial_state, lengths):
        groups = list(_cut(A, lengths))
        A = A.mT.contiguous()
        y, final = _empty_like(u), _empty_like(initial_state)
        space, starts = _space(groups, A, 2), []
        for group in groups:
            state = initial_state[group.sequences].mT.contiguous()
            for block in group.blocks:
                starts.append(state[: block.active[0]].clone())
                ub, dtb, Bb, Cb = _rows(block, A.dtype, u, dt, B, C)
                _, _, h = _states(block, space, ub, dtb, Bb, A, eigenvalues, starts[-1])
                _keep_last(block, h, state)
                _write(block, y, (Cb[:, None] @ h)[:, 0].addcmul_(ub, D))
            final[group.sequences] = state.mT
        ctx.save_for_backward(u, dt, A, B, C, D, *starts)
        ctx.groups, ctx.eigenvalues = groups, eigenvalues
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        u, dt, A, B, C, D, *starts = ctx.saved_tensors
        du, d_dt, dB, dC, d_initial = (_empty_like(x) for x in (u, dt, B, C, d_final))
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        space = _space(ctx.groups, A, 3)
        for group in reversed(ctx.groups):
            d_state = d_final[group.sequences].mT.contiguous()
            for block in reversed(group.blocks):
                ub, dtb, Bb, Cb, dyb = _rows(block, A.dtype, u, dt, B, C, dy)
                a, before, h = _states(block, space, ub, dtb, Bb, A, ctx.eigenvalues, starts.pop())
                _write(block, dC, (dyb[:, None] @ h.mT)[:, 0])
                g = torch.mul(dyb[:, None], Cb[..., None], out=space[2, : len(ub)])
                _run_back(block, a, g, d_state)
                d_input = (Bb[:, None] @ g)[:, 0]  # gradient to dt u
                _write(block, dB, ((dtb * ub)[:, None] @ g.mT)[:, 0])
                _write(block, du, torch.addcmul(d_input * dtb, dyb, D))
                d_rate = g.mul_(before).mul_(a.sub_(ctx.eigenvalues[0]))  # gradient to dt A
                _write(block, d_dt, torch.mul(d_rate, A, out=a).sum(1).addcmul_(d_input, ub))
                dA += d_rate.mul_(dtb[:, None]).sum(0)
                dD += (dyb * ub).sum(0)
            d_initial[group.sequences] = d_state.mT
        return du, d_dt, dA.mT, dB, dC, dD, None, d_initial, None


def _cut(A: Tensor, lengths: list[int]) -> Iterator[_Group]:
    """Yield the sequences in groups and their tokens in blocks of limited size, but not too few consecutive ones."""
    least_steps = max(LEAST_STEPS, A.shape[1] // 2)  # so that the states kept do not outweigh the inputs
    most_rows = max(least_steps, BLOCK_BYTES // max(1, A.numel() * A.element_size()))
    lengths_ = torch.tensor(lengths, dtype=torch.long)
    order = lengths_.argsort(descending=True, stable=True)
    starts = lengths_.cumsum(0) - lengths_
    for group in order.split(most_rows // least_steps):
        longest = lengths[group[0]]
        active = len(group) - lengths_[group].bincount().cumsum(0)[:longest]  # [T]
        first = active.cumsum(0) - active  # row at which a step begins
        member = torch.arange(int(active.sum())) - first.repeat_interleave(active)
        tokens = (starts[group][member] + torch.arange(longest).repeat_interleave(active)).to(A.device)
        counts, blocks, step = active.tolist(), [], 0
        while step < longest:
            now = counts[step : step + max(1, most_rows // counts[step])]
            blocks.append(_Block(tokens[: sum(now)], now))
            tokens, step = tokens[sum(now) :], step + len(now)
        yield _Group(group.to(A.device), blocks)


def _empty_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor in row-major order, whatever the strides of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _space(groups: list[_Group], A: Tensor, tensors: int) -> Tensor:
    """Return memory for that many tensors [R M D], each with room for the states before the block."""
    rows = max((len(b.tokens) + b.active[0] for g in groups for b in g.blocks), default=0)
    return A.new_empty(tensors, rows, *A.shape)


def _rows(block: _Block, dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.flatten(0, 1).index_select(0, block.tokens).to(dtype) for x in tensors]


def _write(block: _Block, out: Tensor, rows: Tensor) -> None:
    out.flatten(0, 1).index_copy_(0, block.tokens, rows.to(out.dtype))


def _steps(block: _Block, *rows: Tensor) -> list[tuple]:
    """Return, for every step, the number of active sequences and their rows of each tensor."""
    return list(zip(block.active, *(x.split_with_sizes(block.active) for x in rows), strict=True))


def _states(
    block: _Block,
    space: Tensor,
    u: Tensor,
    dt: Tensor,
    B: Tensor,
    A: Tensor,
    eigenvalues: tuple[float, float],
    start: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the transition of every token, the state before it and the state after it, [R M D] in `space`."""
    (lo, hi), R, first = eigenvalues, len(u), len(start)
    a = torch.mul(dt[:, None], A, out=space[0, :R]).exp_()
    torch.add(A.new_tensor(lo), a, alpha=hi - lo, out=a)
    both = space[1, : first + R]
    both[:first] = start
    h = torch.mul((dt * u)[:, None], B[..., None], out=both[first:])
    previous, count = both[:first], first
    for active, now, decay in _steps(block, h, a):
        if active < count:
            previous, count = previous[:active], active
        previous = now.addcmul_(decay, previous)
    if block.active[-1] == first:
        return a, both[:R], h
    counts = torch.tensor([first, *block.active], device=h.device)
    back = counts[:-1].repeat_interleave(counts[1:])  # a row's predecessor lies that many rows earlier
    return a, both.index_select(0, torch.arange(first, first + R, device=h.device) - back), h


def _keep_last(block: _Block, h: Tensor, state: Tensor) -> None:
    """Copy the last states of the block [R M D] to `state` [S M D]."""
    end, done = len(h), 0
    for active in reversed(block.active):
        if active > done:  # these sequences end here, or the block does
            state[done:active] = h[end - active + done : end]
            done = active
        end -= active
        if done == block.active[0]:
            return


def _run_back(block: _Block, a: Tensor, g: Tensor, d_state: Tensor) -> None:
    """Add to g [R M D] what reaches each state from later ones; `d_state` is carried through in place."""
    later, decay, count = g[:0], a[:0], 0
    for active, now, decay_now in reversed(_steps(block, g, a)):
        if active == count:
            now.addcmul_(decay, later)
        else:
            now[:count].addcmul_(decay, later)
            now[count:] += d_state[count:active]  # these sequences end here, or the block does
        later, decay, count = now, decay_now, active
    torch.mul(decay, later, out=d_state[:count])
