"""The selective scan in blocks of tokens that stay in cache: everything but the recurrence itself is vectorised.

In a block, a = lo + (hi - lo) exp(dt A) and x = dt u B are formed at once as [R D M]; one fused multiply-add per token
then turns x into the states in place, and y = C h is a batch of matrix-vector products. The backward keeps the state at
block starts only, recomputes the block and runs the adjoint recurrence

    g_t = C_t dy_t + a_{t+1} g_{t+1};   d(dt A)_t = g_t h_{t-1} (a_t - lo);   d(dt u B)_t = g_t

The same instructions run for every range of eigenvalues.

Letters: B batch, T tokens, D channels, M states per channel, R rows: the tokens of a block, step by step, at each step
one per sequence that is still alive.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import Block, Chunks

BLOCK_BYTES = 1 << 22  # of one [R D M] tensor; a block holds three
LEAST_STEPS = 16  # tokens per block and sequence: one state is kept for each block


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
    """Compute `selective_scan` block by block, with gradients to every tensor (once differentiable)."""
    return _Blocked.apply(u, dt, A, B, C, D, eigenvalues, initial_state, lengths)  # pyright: ignore[reportReturnType]


@dataclass
class _Inputs:
    """One block's inputs, a row per token."""

    u: Tensor  # [R D]
    dt: Tensor  # [R D]
    B: Tensor  # [R M]
    C: Tensor  # [R M]


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, eigenvalues, initial_state, lengths):
        chunks = _cut(A, lengths)
        order = torch.tensor(chunks.order, device=u.device)
        state = initial_state[order]
        y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        starts = []
        for block in chunks.blocks():
            x = _load(block, u, dt, B, C)
            starts.append(state[block.sequences][: block.active[0]].clone())
            h, _ = _states(block, x, A, eigenvalues, state[block.sequences])
            _scatter(block, y, (h @ x.C[..., None]).squeeze(-1).addcmul_(x.u, D))
        final = torch.empty_like(state)
        final[order] = state
        ctx.save_for_backward(u, dt, A, B, C, D, *starts)
        ctx.eigenvalues, ctx.lengths = eigenvalues, lengths
        return y, final

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        u, dt, A, B, C, D, *starts = ctx.saved_tensors
        chunks = _cut(A, ctx.lengths)
        order = torch.tensor(chunks.order, device=u.device)
        d_state = d_final[order]
        du, d_dt, dB, dC = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (u, dt, B, C))
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        for start, block in reversed(list(zip(starts, chunks.blocks(), strict=True))):
            x = _load(block, u, dt, B, C)
            dy_rows = _gather(block, dy)
            h, a = _states(block, x, A, ctx.eigenvalues, start.clone())
            g = torch.mul(dy_rows[..., None], x.C[:, None, :])
            _run_backward(block, a, g, d_state[block.sequences])
            into = (g @ x.B[..., None]).squeeze(-1)
            _scatter(block, du, torch.addcmul(into * x.dt, dy_rows, D))
            _scatter(block, dB, (g.mT @ (x.dt * x.u)[..., None]).squeeze(-1))
            _scatter(block, dC, (h.mT @ dy_rows[..., None]).squeeze(-1))
            d_rate = g.mul_(_before(block, start, h)).mul_(a.sub_(ctx.eigenvalues[0]))  # gradient to dt A
            _scatter(block, d_dt, (d_rate * A).sum(-1).addcmul_(into, x.u))
            dA += d_rate.mul_(x.dt[..., None]).sum(0)
            dD += (dy_rows * x.u).sum(0)
        d_initial = torch.empty_like(d_state)
        d_initial[order] = d_state
        return du, d_dt, dA, dB, dC, dD, None, d_initial, None


def _cut(A: Tensor, lengths: list[int]) -> Chunks:
    rows = max(LEAST_STEPS, BLOCK_BYTES // (A.numel() * A.element_size()))
    return Chunks(lengths, 1, rows, A.device, least_steps=LEAST_STEPS)


def _gather(block: Block, x: Tensor) -> Tensor:
    """Return the rows [R D] of x [B T D]."""
    return block.gather(x.flatten(0, 1)[:, None, None], x.dtype)[:, 0, 0]


def _scatter(block: Block, out: Tensor, rows: Tensor) -> None:
    """Write the rows [R D] to their places in out [B T D]."""
    block.scatter(out.flatten(0, 1)[:, None, None], rows[:, None, None])


def _load(block: Block, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> _Inputs:
    return _Inputs(*(_gather(block, x) for x in (u, dt, B, C)))


def _states(
    block: Block, x: _Inputs, A: Tensor, eigenvalues: tuple[float, float], state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the state after every token and the transition [R D M]; `state` is carried through in place."""
    lo, hi = eigenvalues
    a = torch.mul(x.dt[..., None], A).exp_()
    torch.add(torch.full((), lo, dtype=a.dtype, device=a.device), a, alpha=hi - lo, out=a)
    h = torch.mul((x.dt * x.u)[..., None], x.B[:, None, :])
    previous = state[: block.active[0]]
    for rows, alive in block.steps():
        if alive < len(previous):
            state[alive : len(previous)] = previous[alive:]  # these sequences have ended
        now = h[rows]
        previous = now.addcmul_(a[rows], previous[:alive])
    state[: len(previous)] = previous
    return h, a


def _run_backward(block: Block, a: Tensor, g: Tensor, d_state: Tensor) -> None:
    """Add to g [R D M] what reaches each state from later ones; `d_state` is carried through in place."""
    later = d_state[:0]
    for rows, alive in reversed(block.steps()):
        now = g[rows]
        now[len(later) :] += d_state[len(later) : alive]  # these sequences end here, or the block does
        now[: len(later)] += later
        later = a[rows] * now
    d_state[: len(later)] = later


def _before(block: Block, start: Tensor, h: Tensor) -> Tensor:
    """Return the state before every token [R D M]."""
    if block.active[0] == block.active[-1]:
        return torch.cat([start, h[: len(h) - len(start)]])
    counts = torch.tensor((len(start), *block.active), device=h.device)
    rows = torch.arange(len(h), device=h.device)
    back = counts[:-1].repeat_interleave(counts[1:])  # a row's predecessor lies that many rows earlier
    return torch.cat([start, h]).index_select(0, rows + len(start) - back)
