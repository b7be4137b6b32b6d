"""Diagonal plus low rank on a GPU: launches of the Triton kernels, registered with torch.library.

Both directions take a range of chunks at a time, so that the workspace stays small. Forward: `prepare` (scores, inverse
and decayed rows of every chunk), then `walk` (the state and the output, chunk after chunk). Backward: `prepare` again,
`walk` for u and the states at the chunks' starts, `walk_back` for dv and the gradients to the states at their ends,
`meet` and `gather`. Saved between the two: the inputs, and the state before every range. One token without gradients is
one kernel, `step`.

Letters: B batch, T tokens, S sequences, C tokens per chunk, H value heads, K key dim, V value dim.
"""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.dplr.triton_chunk import gather, meet, prepare
from statetrack.ops.dplr.triton_walk import step, walk, walk_back
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_operator import operator

CHUNK = 64
RANGE_BYTES = 2**27  # of the states at the starts of a range's chunks
MIN_RANGE = 8  # chunks


def dplr_triton(
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
    """Compute `dplr` on a GPU, with gradients to every tensor (once differentiable)."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, a, b, log_decay, initial_state))
    packed = [] if q.shape[0] == len(lengths) else lengths
    if q.shape[1] == 1 and not packed and not keep:
        return _step(q, k, v, a, b, log_decay, initial_state, scale)
    o, state, _ = _forward(q, k, v, a, b, log_decay, initial_state, scale, packed, keep)
    return o, state


class _Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(self, q: Tensor, v: Tensor, packed: list[int]):
        self.B, self.T, self.HK, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.varlen = len(packed) > 0
        exact = v.dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // CHUNK)
            self.starts, self.slots, self.bases = chunk_tables(tuple(packed), CHUNK, q.device)
        else:
            self.S, self.most = self.B, -(-self.T // CHUNK)
            self.starts = self.slots = self.bases = None
        self.every = max(1, self.most)
        if not self.varlen:
            chunk_bytes = self.S * self.HV * self.K * self.V * self.low.itemsize
            self.every = max(1, min(self.most, max(MIN_RANGE, RANGE_BYTES // max(1, chunk_bytes))))
        BK = max(16, triton.next_power_of_2(self.K))
        self.rows, self.squares = (4, 4) if exact else (7, 6)
        self.common = {"C": CHUNK, "VARLEN": self.varlen, "EXACT": exact}
        columns = min(BK, 32)
        self.chunk = {"BK": columns, "NK": triton.cdiv(self.K, columns), "num_warps": 8}
        columns = max(16, min(16 if exact else 32, triton.next_power_of_2(self.V)))
        self.walk = {"BK": BK, "BV": columns, "num_warps": 8, "num_stages": 1}
        columns = max(16, min(64, triton.next_power_of_2(self.V)))
        self.meet = {"BV": columns, "NV": triton.cdiv(self.V, columns), "num_warps": 8}
        self.tree = self.meet | {"BK": 16}

    def ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of chunks that are taken one after another."""
        return [(low, min(low + self.every, self.most)) for low in range(0, self.most, self.every)]

    def pairs(self, low: int, high: int) -> int:
        """Return how many (sequence, chunk) pairs the chunks [low, high) of every sequence are (all of packed ones)."""
        return self.slots.shape[0] if self.slots is not None else self.S * (high - low)

    def prepare(self, inputs: tuple[Tensor, ...], low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return Rows, Squares and total for the chunks [low, high), given q, k, a, b and log_decay."""
        pairs, new = self.pairs(low, high), inputs[0].new_empty
        work = (
            new((pairs, self.HV, self.rows, CHUNK, self.K), dtype=self.low),
            new((pairs, self.HV, self.squares, CHUNK, CHUNK), dtype=self.low),
            new((pairs, self.HV, self.K), dtype=torch.float32),
        )
        prepare[(pairs * self.HV,)](
            *inputs, *work, self.starts, self.slots,
            self.T, low, high - low, self.HK, self.HV, self.K, **self.common, **self.chunk,
        )  # fmt: skip
        return work

    def grid(self) -> tuple[int, int]:
        """Return the grid of the two walks."""
        return self.S * self.HV, triton.cdiv(self.V, self.walk["BV"])


@operator("statetrack::dplr_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    scale: float,
    packed: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a, b, log_decay = (t.contiguous() for t in (q, k, v, a, b, log_decay))
    state, plan = initial_state.float().contiguous(), _Plan(q, v, packed)
    o, saved = torch.empty_like(v), state.new_empty(_saved_shape(plan) if keep else (0,))
    for at, chunks in enumerate(plan.ranges()):
        if keep:
            saved[at] = state
        work = plan.prepare((q, k, a, b, log_decay), *chunks)
        state = _walk(plan, work, v, state, scale, chunks, o=o)
    return o, state.clone() if plan.most == 0 else state, saved


def _walk(
    plan: _Plan,
    work: tuple[Tensor, ...],
    v: Tensor,
    initial: Tensor,
    scale: float,
    chunks: tuple[int, int],
    o: Tensor | None = None,
    states: Tensor | None = None,
    u: Tensor | None = None,
) -> Tensor:
    """Launch `walk` over a range of chunks, for o, or for states and u; return the state after it."""
    final = torch.empty_like(initial)
    walk[plan.grid()](
        v, *work, initial, o, final, states, u, plan.starts, plan.bases,
        plan.T, *chunks, scale, plan.HV, plan.K, plan.V, OUTPUT=o is not None, **plan.common, **plan.walk,
    )  # fmt: skip
    return final


def _saved_shape(plan: _Plan) -> tuple[int, ...]:
    return (len(plan.ranges()), plan.S, plan.HV, plan.K, plan.V)


@_forward.register_fake
def _(*args):
    q, v, initial_state, packed, keep = args[0], args[2], args[6], args[8], args[9]
    state = torch.empty_like(initial_state, dtype=torch.float32, memory_format=torch.contiguous_format)
    saved = state.new_empty(_saved_shape(_Plan(q, v, packed)) if keep else (0,))
    return torch.empty_like(v, memory_format=torch.contiguous_format), state, saved


@operator("statetrack::dplr_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    saved: Tensor,
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, a, b, log_decay, d_out = (t.contiguous() for t in (q, k, v, a, b, log_decay, d_out.to(v.dtype)))
    plan = _Plan(q, v, packed)
    d_state, HV, V = d_final.float().contiguous(), plan.HV, plan.V
    dv, da, db, d_log = (torch.empty_like(x) for x in (v, a, b, log_decay))
    parts = HV // plan.HK  # of dq and dk, summed afterwards
    dq, dk = (q.new_empty(parts, *q.shape, dtype=torch.float32 if parts > 1 else q.dtype) for _ in range(2))
    u, z = (torch.empty_like(v, dtype=plan.low) for _ in range(2))
    for low, high in reversed(plan.ranges()):
        work, pairs = plan.prepare((q, k, a, b, log_decay), low, high), plan.pairs(low, high)
        states, d_states = (v.new_empty(pairs, HV, V, plan.K, dtype=plan.low) for _ in range(2))
        _walk(plan, work, v, saved[low // plan.every], scale, (low, high), states=states, u=u)
        before = torch.empty_like(d_state)
        walk_back[plan.grid()](
            d_out, *work, d_state, before, d_states, z, dv, plan.starts, plan.bases,
            plan.T, low, high, scale, HV, plan.K, V, **plan.common, **plan.walk,
        )  # fmt: skip
        d_state, Z = before, v.new_empty(pairs, HV, 4, CHUNK, CHUNK, dtype=plan.low)
        where = plan.starts, plan.slots, plan.T, low, high - low, scale
        meet[(pairs * HV,)](v, u, d_out, z, Z, *where, HV, V, **plan.common, **plan.meet)
        gather[(pairs * HV, triton.cdiv(plan.K, plan.tree["BK"]))](
            q, k, v, a, b, log_decay, u, d_out, z, Z, states, d_states, dq, dk, da, db, d_log,
            *where, plan.HK, HV, plan.K, V, q.numel(), **plan.common, **plan.tree,
        )  # fmt: skip
    dq, dk = (x.sum(0).to(q.dtype) if parts > 1 else x[0] for x in (dq, dk))
    if plan.most == 0:
        dq, dk, d_state = torch.zeros_like(q), torch.zeros_like(k), d_state.clone()
    return dq, dk, dv, da, db, d_log, d_state


@_backward.register_fake
def _(*args):
    grads = *args[:6], args[8].float()
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads)


def _save_for_backward(ctx, inputs, output):
    *tensors, initial_state, ctx.scale, ctx.packed, _ = inputs
    ctx.state_dtype, ctx.state_shape = initial_state.dtype, initial_state.shape
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _run_backward(ctx, d_out, d_final, _):
    *inputs, saved = ctx.saved_tensors
    v = inputs[2]
    if d_out is None:
        d_out = torch.zeros_like(v)
    if d_final is None:
        d_final = v.new_zeros(ctx.state_shape, dtype=torch.float32)
    *grads, d_state = _backward(*inputs, saved, d_out, d_final, ctx.scale, ctx.packed)
    return *grads, d_state.to(ctx.state_dtype), None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)


@operator("statetrack::dplr_step")
def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    state = state.contiguous().float()
    final = torch.empty_like(state)
    return _launch_step(q, k, v, a, b, log_decay, state, scale, final), final


@_step.register_fake
def _(*args):
    final = torch.empty_like(args[6], dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(args[2], memory_format=torch.contiguous_format), final


@operator("statetrack::dplr_step_", mutates=("state",))
def dplr_step_(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> Tensor:
    """Take one token (T = 1) and update the float32 state [B H K V] in place; return o. No gradients."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise UsageError(f"state must be contiguous float32, got {state.dtype} with strides {state.stride()}")
    return _launch_step(q, k, v, a, b, log_decay, state, scale, state)


@dplr_step_.register_fake
def _(*args):
    return torch.empty_like(args[2], memory_format=torch.contiguous_format)


def _launch_step(q, k, v, a, b, log_decay, state, scale, final) -> Tensor:
    q, k, v, a, b, log_decay = (t.contiguous() for t in (q, k, v, a, b, log_decay))
    (B, _, HK, K), (HV, V) = q.shape, v.shape[2:]
    o = torch.empty_like(v)
    step[(B * HV, triton.cdiv(V, 16))](
        q, k, v, a, b, log_decay, state, o, final, scale, HK, HV, K, V,
        BK=max(16, triton.next_power_of_2(K)), BV=16, num_warps=4,
    )  # fmt: skip
    return o
