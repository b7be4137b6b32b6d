"""Gated linear attention in chunks: dense algebra inside a chunk, one matrix product per chunk across them.

With the products of decays L_ij inside the chunk (`statetrack.ops.products`), L_t0 from its start, L_Cj to its end, and
S the state at its start,

    o_t = L_t0 S^T q_t + sum_{j <= t} (q_t . L_tj k_j) v_j;   S <- L_C0 S + sum_j L_Cj k_j v_j^T

The backward keeps the state at the start of each block and recomputes the rest, so that forward and backward need
little more memory than inputs, outputs and gradients.

Letters: B batch, T tokens, S sequences, C tokens per chunk, H heads, K key dim, V value dim, R chunks in a block. Block
tensors are [R H rows columns].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statetrack.ops.layout import Block, Chunks, untraced
from statetrack.ops.products import HeadProducts, KeyProducts, key_chunk

HEAD_TOKENS = 64  # per chunk, with one decay per head
BLOCK_BYTES = 1 << 21  # of the largest temporary: a few of them stay in a core's cache


@untraced
def gated_linear_attention_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `gated_linear_attention` chunk by chunk, with gradients to every tensor (once differentiable)."""
    return _Chunked.apply(q, k, v, decay, scale, initial_state, lengths)  # pyright: ignore[reportReturnType]


@dataclass
class _Inputs:
    """One block's inputs in the compute dtype."""

    q: Tensor  # [R H C K], times scale
    k: Tensor  # [R H C K]
    v: Tensor  # [R H C V]
    decay: HeadProducts | KeyProducts


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, decay, scale, initial_state, lengths):
        chunks = _cut(k, v, decay, lengths, initial_state.dtype)
        flat = _flatten(q, k, v, decay)
        out = v.new_empty(v.shape[0] * v.shape[1], 1, *v.shape[2:])
        order = torch.tensor(chunks.order, device=q.device)
        state, saved = initial_state[order], []
        for block in chunks.blocks():
            x = _load(block, flat, scale, initial_state.dtype)
            saved.append(state[block.sequences].clone())
            states = _run_forward(block, x, state[block.sequences])
            o = (x.q * x.decay.start) @ states
            o += x.decay.scores(x.q, x.k) @ x.v
            block.scatter(out, o)
        final = torch.empty_like(state)
        final[order] = state
        ctx.save_for_backward(q, k, v, decay, *saved)
        ctx.scale, ctx.lengths = scale, lengths
        return out.view(v.shape), final

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, d_final):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, decay, *saved = ctx.saved_tensors
        chunks = _cut(k, v, decay, ctx.lengths, d_final.dtype)
        flat = _flatten(q, k, v, decay)
        grads = {name: torch.empty_like(x, memory_format=torch.contiguous_format) for name, x in flat.items()}
        order = torch.tensor(chunks.order, device=q.device)
        d_state = d_final[order]
        d_out = d_out.flatten(0, 1).unsqueeze(1)
        for block, start in reversed(list(zip(chunks.blocks(), saved, strict=True))):
            x = _load(block, flat, ctx.scale, d_final.dtype)
            states = _run_forward(block, x, start.clone())
            block_grads = _block_backward(block, x, block.gather(d_out, d_final.dtype), d_state, states)
            block_grads["q"].mul_(ctx.scale)
            for name, grad in block_grads.items():
                groups = grad.shape[1] // grads[name].shape[2]
                block.scatter(grads[name], grad if groups == 1 else grad.unflatten(1, (-1, groups)).sum(2))
        d_initial = torch.empty_like(d_state)
        d_initial[order] = d_state
        dq, dk, dv, d_decay = (grads[n].view(x.shape) for n, x in (("q", q), ("k", k), ("v", v), ("decay", decay)))
        return dq, dk, dv, d_decay, None, d_initial, None


def _cut(k: Tensor, v: Tensor, decay: Tensor, lengths: list[int], dtype: torch.dtype) -> Chunks:
    H, K, V = v.shape[2], k.shape[-1], v.shape[-1]
    most = HEAD_TOKENS if decay.ndim == 3 or K == 1 else key_chunk(K)
    chunk = max(1, min(most, max(lengths, default=1)))
    row_bytes = H * max(chunk * max(K, V, chunk), K * V) * dtype.itemsize
    return Chunks(lengths, chunk, max(1, BLOCK_BYTES // row_bytes), k.device)


def _flatten(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> dict[str, Tensor]:
    """Return every input as [B*T 1 H D], the form in which `Block` reads and writes."""
    decay = decay if decay.ndim == 4 else decay.unsqueeze(-1)
    return {name: x.flatten(0, 1).unsqueeze(1) for name, x in (("q", q), ("k", k), ("v", v), ("decay", decay))}


def _load(block: Block, flat: dict[str, Tensor], scale: float, dtype: torch.dtype) -> _Inputs:
    """Gather one block's inputs; key heads are repeated for the block only."""
    x = {name: block.gather(t, dtype) for name, t in flat.items()}
    q, k, v, decay = x["q"].mul_(scale), x["k"], x["v"], x["decay"]
    if block.padding is not None:  # the state passes through
        decay.masked_fill_(block.padding[:, None, :, None], 1)
    groups = v.shape[1] // k.shape[1]
    if groups > 1:
        q, k = q.repeat_interleave(groups, dim=1), k.repeat_interleave(groups, dim=1)
    return _Inputs(q, k, v, HeadProducts(decay) if decay.shape[-1] == 1 else KeyProducts(decay))


def _run_forward(block: Block, x: _Inputs, state: Tensor) -> Tensor:
    """Return the state at every chunk's start [R H K V]; `state` holds those before the block, on return after it."""
    written = (x.k * x.decay.end).mT @ x.v
    states = torch.empty_like(written)
    for rows, alive in block.steps():
        S = state[:alive]
        states[rows] = S
        torch.addcmul(written[rows], x.decay.total[rows], S, out=S)
    return states


def _block_backward(block: Block, x: _Inputs, d_o: Tensor, d_state: Tensor, states: Tensor) -> dict[str, Tensor]:
    """Return the gradients of one block's inputs; carries the gradient of the state in `d_state`."""
    read = (x.q * x.decay.start).mT @ d_o
    d_ends = torch.empty_like(read)
    d_state = d_state[block.sequences]
    for rows, alive in reversed(block.steps()):
        dS = d_state[:alive]
        d_ends[rows] = dS
        torch.addcmul(read[rows], x.decay.total[rows], dS, out=dS)
    dv = x.decay.scores(x.q, x.k).mT @ d_o
    dv += (x.k * x.decay.end) @ d_ends
    dq, dk, d_decay = x.decay.backward(
        d_o @ x.v.mT, x.q, x.k, d_o @ states.mT, x.v @ d_ends.mT, (states * d_ends).sum(-1)
    )
    return {"q": dq, "k": dk, "v": dv, "decay": d_decay}
