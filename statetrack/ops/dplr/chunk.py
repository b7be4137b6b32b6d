"""Diagonal plus low rank in chunks: the corrections u_t = S_{t-1}^T a_t of a chunk solve one triangular system.

A token writes k v^T and b u^T, and is read by its q and, one token early, by the next token's a. So it is gated linear
attention with two writes and two reads (`statetrack.ops.products`), of which u is not known beforehand. With the scores
A_xy of reads x and writes y, L the products of decays, and S the state at the chunk's start,

    X = (I - A_ab)^-1,  W = X L_{t-1,0} a,  F = X A_ak v,  u = F + W S
    o = L_t0 S^T q + A_qk v + A_qb u,   S <- L_C0 S + sum_j L_Cj (k_j v_j^T + b_j u_j^T)

The inverse is by substitution. With integer swaps and merges all of its entries are small integers, hence exact. The
backward keeps the state at the start of each block and recomputes the rest.

Letters: B batch, T tokens, S sequences, C tokens per chunk, H heads, K key dim, V value dim, R chunks in a block. Block
tensors are [R H rows columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import Block, Chunks, untraced
from statetrack.ops.products import KeyProducts, key_chunk

BLOCK_BYTES = 1 << 21  # of the largest temporary
NAMES = ("q", "k", "v", "a", "b", "log_decay")


@untraced
def dplr_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `dplr` chunk by chunk, with gradients to every tensor (once differentiable)."""
    return _Chunked.apply(q, k, v, a, b, log_decay, scale, initial_state, lengths)  # pyright: ignore[reportReturnType]


@dataclass
class _Inputs:
    """One block's inputs in the compute dtype."""

    q: Tensor  # [R H C K], times scale
    k: Tensor  # [R H C K]
    v: Tensor  # [R H C V]
    a: Tensor  # [R H C K]
    b: Tensor  # [R H C K]
    factor: Tensor  # [R H C K] the decays
    decay: KeyProducts


@dataclass
class _Scores:
    """A_xy [R H C C]: what token i's read x meets of token j's write y."""

    qk: Tensor
    qb: Tensor
    ak: Tensor
    ab: Tensor


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, a, b, log_decay, scale, initial_state, lengths):
        chunks = _cut(k, v, lengths, initial_state.dtype)
        flat = _flatten(q, k, v, a, b, log_decay)
        out = v.new_empty(v.shape[0] * v.shape[1], 1, *v.shape[2:])
        order = torch.tensor(chunks.order, device=q.device)
        state, saved = initial_state[order], []
        for block in chunks.blocks():
            x = _load(block, flat, scale, initial_state.dtype)
            saved.append(state[block.sequences].clone())
            A = _scores(x)
            _, _, u, states = _run_forward(block, x, A, state[block.sequences])
            o = (x.q * x.decay.start) @ states
            o += A.qk @ x.v
            o += A.qb @ u
            block.scatter(out, o)
        final = torch.empty_like(state)
        final[order] = state
        ctx.save_for_backward(q, k, v, a, b, log_decay, *saved)
        ctx.scale, ctx.lengths = scale, lengths
        return out.view(v.shape), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors  # read once: recomputed blocks give them out a single time
        inputs, saved = tensors[:6], tensors[6:]
        chunks = _cut(inputs[1], inputs[2], ctx.lengths, d_final.dtype)
        flat = _flatten(*inputs)
        grads = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in flat.items()}
        order = torch.tensor(chunks.order, device=d_final.device)
        d_state = d_final[order]
        d_out = d_out.flatten(0, 1).unsqueeze(1)
        for block, start in reversed(list(zip(chunks.blocks(), saved, strict=True))):
            x = _load(block, flat, ctx.scale, d_final.dtype)
            block_grads = _block_backward(block, x, block.gather(d_out, d_final.dtype), d_state, start)
            block_grads["q"].mul_(ctx.scale)
            for name, grad in block_grads.items():
                groups = grad.shape[1] // grads[name].shape[2]
                block.scatter(grads[name], grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2))
        d_initial = torch.empty_like(d_state)
        d_initial[order] = d_state
        return *(grads[name].view(x.shape) for name, x in zip(NAMES, inputs, strict=True)), None, d_initial, None


def _cut(k: Tensor, v: Tensor, lengths: list[int], dtype: torch.dtype) -> Chunks:
    H, K, V = v.shape[2], k.shape[-1], v.shape[-1]
    chunk = max(1, min(key_chunk(K), max(lengths, default=1)))
    row_bytes = H * max(2 * chunk * max(K, V, 2 * chunk), K * V) * dtype.itemsize
    return Chunks(lengths, chunk, max(1, BLOCK_BYTES // row_bytes), k.device)


def _flatten(*tensors: Tensor) -> dict[str, Tensor]:
    """Return every input as [B*T 1 H D], the form in which `Block` reads and writes."""
    return {name: x.flatten(0, 1).unsqueeze(1) for name, x in zip(NAMES, tensors, strict=True)}


def _load(block: Block, flat: dict[str, Tensor], scale: float, dtype: torch.dtype) -> _Inputs:
    """Gather one block's inputs; key heads are repeated for the block only."""
    q, k, v, a, b, log_decay = (block.gather(flat[name], dtype) for name in NAMES)  # 0, so no decay, where padded
    groups = v.shape[1] // k.shape[1]
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=1), k.repeat_interleave(groups, dim=1)
    factor = log_decay.exp_()
    return _Inputs(q.mul_(scale), k, v, a, b, factor, KeyProducts(factor))


def _earlier(x: Tensor) -> Tensor:
    """Move every row of [R H C D] one token up, as a read of the token before; the first is lost, the last 0."""
    return torch.cat([x[:, :, 1:], torch.zeros_like(x[:, :, :1])], dim=2)


def _later(x: Tensor, first: Tensor) -> Tensor:
    """Move every row of [R H C D] one token down again, after `first` [R H 1 D]."""
    return torch.cat([first, x[:, :, :-1]], dim=2)


def _beside(x: Tensor, y: Tensor) -> Tensor:
    """Return [R H 2*C D], the rows of x and y by turns."""
    return torch.stack([x, y], dim=3).flatten(2, 3)


def _apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `_beside` put together."""
    return x[:, :, ::2], x[:, :, 1::2]


def _scores(x: _Inputs) -> _Scores:
    q, a = _apart(x.decay.scores(_beside(x.q, _earlier(x.a)), _beside(x.k, x.b)))
    a = _later(a, torch.zeros_like(a[:, :, :1]))
    return _Scores(q[..., ::2], q[..., 1::2], a[..., ::2], a[..., 1::2])


def _reads_of_start(x: _Inputs) -> Tensor:
    """Return L_{t-1,0} a [R H C K]."""
    return x.a * _later(x.decay.start, torch.ones_like(x.a[:, :, :1]))


def _run_forward(block: Block, x: _Inputs, A: _Scores, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return X, W, u and the state at every chunk's start [R H K V]; `state` is carried through the block in place."""
    eye = torch.eye(x.a.shape[2], dtype=x.a.dtype, device=x.a.device)
    inverse = torch.linalg.solve_triangular(eye - A.ab, eye.expand_as(A.ab), upper=False, unitriangular=True)
    W, u = inverse @ _reads_of_start(x), inverse @ (A.ak @ x.v)
    written, end_b = (x.k * x.decay.end).mT @ x.v, x.b * x.decay.end
    states = torch.empty_like(written)
    for rows, alive in block.steps():
        S = state[:alive]
        states[rows] = S
        u[rows] += W[rows] @ S
        torch.addcmul(written[rows], x.decay.total[rows], S, out=S)
        S += end_b[rows].mT @ u[rows]
    return inverse, W, u, states


def _run_backward(block: Block, x: _Inputs, du: Tensor, read: Tensor, W: Tensor, d_state: Tensor) -> Tensor:
    """Add to du what comes through later chunks, and return the gradient to the state at every chunk's end [R H K V].

    `d_state` holds the gradient to every sequence's state after the block, and before it on return.
    """
    d_ends, end_b = torch.empty_like(read), x.b * x.decay.end
    d_state = d_state[block.sequences]
    for rows, alive in reversed(block.steps()):
        dS = d_state[:alive]
        d_ends[rows] = dS
        du[rows] += end_b[rows] @ dS
        torch.addcmul(read[rows], x.decay.total[rows], dS, out=dS)
        dS += W[rows].mT @ du[rows]
    return d_ends


def _block_backward(block: Block, x: _Inputs, d_o: Tensor, d_state: Tensor, start: Tensor) -> dict[str, Tensor]:
    """Return the gradients of one block's inputs; carries the gradient of the state in `d_state`.

    H = X^T du is the gradient to the right-hand side A_ak v + L_{t-1,0} S^T a of the system.
    """
    A = _scores(x)
    inverse, W, u, states = _run_forward(block, x, A, start.clone())
    du = A.qb.mT @ d_o
    d_ends = _run_backward(block, x, du, (x.q * x.decay.start).mT @ d_o, W, d_state)
    H = inverse.mT @ du
    dv = A.qk.mT @ d_o
    dv += A.ak.mT @ H
    dv += (x.k * x.decay.end) @ d_ends

    reads, writes = _beside(x.q, _earlier(x.a)), _beside(x.k, x.b)
    outs, values = _beside(d_o, _earlier(H)), _beside(x.v, u)  # gradients to what the reads see, and what is written
    d_start = outs @ states.mT
    d_reads, d_writes, d_decay = x.decay.backward(
        outs @ values.mT, reads, writes, d_start, values @ d_ends.mT, (states * d_ends).sum(-1)
    )
    (dq, da), (dk, db) = _apart(d_reads), _apart(d_writes)
    da = _later(da, H[:, :, :1] @ states.mT)  # the first token's a reads the chunk's start as it is
    return {"q": dq.contiguous(), "k": dk, "v": dv, "a": da, "b": db, "log_decay": d_decay.mul_(x.factor)}
