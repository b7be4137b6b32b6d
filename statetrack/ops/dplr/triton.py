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

from functools import lru_cache

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.dplr.triton_chunk import gather, meet, prepare
from statetrack.ops.dplr.triton_walk import step, walk, walk_back
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_launch import bind
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
    initial_state: Tensor | None,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `dplr` on a GPU, with gradients to every tensor (once differentiable)."""
    tensors = q, k, v, a, b, log_decay, initial_state
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = [] if q.shape[0] == len(lengths) else lengths
    if q.shape[1] == 1 and not packed and not keep:
        state = _new_state(q, v, []).zero_() if initial_state is None else initial_state
        return _step(q, k, v, a, b, log_decay, state, scale)
    o, state, _ = _forward(q, k, v, a, b, log_decay, initial_state, scale, packed, keep)
    return o, state


class _Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(
        self,
        q: tuple[int, ...],
        v: tuple[int, ...],
        dtype: torch.dtype,
        packed: tuple[int, ...],
        device: torch.device,
    ):
        self.B, self.T, self.HK, self.K = q
        self.HV, self.V = v[2:]
        self.varlen = len(packed) > 0
        exact = dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        self.starts = self.slots = self.bases = None
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // CHUNK)
            self.starts, self.slots, self.bases = chunk_tables(packed, CHUNK, device)
        else:
            self.S, self.most = self.B, -(-self.T // CHUNK)
        self.every = max(1, self.most)
        if not self.varlen:
            chunk_bytes = self.S * self.HV * self.K * self.V * self.low.itemsize
            self.every = max(1, min(self.most, max(MIN_RANGE, RANGE_BYTES // max(1, chunk_bytes))))
        self.ranges = [(low, min(low + self.every, self.most)) for low in range(0, self.most, self.every)]
        self.pairs = self.pairs_of(0, min(self.every, self.most))  # of the longest range
        self.rows, self.squares = (4, 4) if exact else (7, 6)
        self.state = self.S, self.HV, self.K, self.V
        self._launches(exact)

    def _launches(self, exact: bool) -> None:
        """Choose every kernel's tiles and warps."""
        common = {"C": CHUNK, "VARLEN": self.varlen, "EXACT": exact}
        BK = max(16, triton.next_power_of_2(self.K))
        columns = min(BK, 32)
        self.prepare_launch = bind(prepare, **common, BK=columns, NK=triton.cdiv(self.K, columns), num_warps=8)
        columns = max(16, min(16 if exact else 32, triton.next_power_of_2(self.V)))
        walking = common | {"BK": BK, "BV": columns, "num_warps": 8, "num_stages": 1}
        self.walk = [bind(walk, **walking, OUTPUT=output) for output in (False, True)]
        self.walk_back = bind(walk_back, **walking)
        self.grid = self.S * self.HV, triton.cdiv(self.V, columns)
        columns = max(16, min(64, triton.next_power_of_2(self.V)))
        tiles = common | {"BV": columns, "NV": triton.cdiv(self.V, columns), "num_warps": 8}
        self.meet, self.gather = bind(meet, **tiles), bind(gather, **tiles, BK=16)

    def pairs_of(self, low: int, high: int) -> int:
        """Return how many (sequence, chunk) pairs the chunks [low, high) of every sequence are (all of packed ones)."""
        return self.slots.shape[0] if self.slots is not None else self.S * (high - low)

    def workspace(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Allocate what `prepare` writes for the longest range: Rows, Squares and total."""
        return (
            like.new_empty((self.pairs, self.HV, self.rows, CHUNK, self.K), dtype=self.low),
            like.new_empty((self.pairs, self.HV, self.squares, CHUNK, CHUNK), dtype=self.low),
            like.new_empty((self.pairs, self.HV, self.K), dtype=torch.float32),
        )

    def prepare(self, work: tuple[Tensor, ...], inputs: tuple[Tensor, ...], low: int, high: int) -> None:
        """Fill the workspace for the chunks [low, high), given q, k, a, b and log_decay."""
        tensors = *inputs, *work, self.starts, self.slots
        numbers = self.T, low, high - low, self.HK, self.HV, self.K
        self.prepare_launch((self.pairs_of(low, high) * self.HV,), tensors, numbers)


_plan = lru_cache(maxsize=64)(_Plan)


@operator("statetrack::dplr_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
    packed: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, a, b, log_decay = (t.contiguous() for t in (q, k, v, a, b, log_decay))
    state = None if initial_state is None else initial_state.float().contiguous()
    plan = _plan(q.shape, v.shape, v.dtype, tuple(packed), q.device)
    o, final = torch.empty_like(v), q.new_empty(plan.state, dtype=torch.float32)
    saved = final.new_empty(_saved_shape(plan) if keep else (0,))
    if plan.most == 0:
        return o, final.zero_() if state is None else final.copy_(state), saved
    work = plan.workspace(q)
    ends = [*saved.unbind(0), final] if keep else [final] * len(plan.ranges)  # a walk may write over what it read
    for chunks, end in zip(plan.ranges, ends, strict=True):
        plan.prepare(work, (q, k, a, b, log_decay), *chunks)
        _walk(plan, work, v, state, scale, chunks, o=o, final=end)
        state = end
    return o, final, saved


def _walk(
    plan: _Plan,
    work: tuple[Tensor, ...],
    v: Tensor,
    initial: Tensor | None,
    scale: float,
    chunks: tuple[int, int],
    o: Tensor | None = None,
    states: Tensor | None = None,
    u: Tensor | None = None,
    final: Tensor | None = None,
) -> None:
    """Launch `walk` over a range of chunks, for o and the state after it, or for states and u."""
    tensors = v, *work, initial, o, final, states, u, plan.starts, plan.bases
    plan.walk[o is not None](plan.grid, tensors, (plan.T, *chunks, scale, plan.HV, plan.K, plan.V))


def _saved_shape(plan: _Plan) -> tuple[int, ...]:
    """Return the shape of the states before the ranges, but the first."""
    return (max(0, len(plan.ranges) - 1), *plan.state)


def _new_state(q: Tensor, v: Tensor, packed: list[int]) -> Tensor:
    """Allocate a state per sequence."""
    return q.new_empty((len(packed) or q.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)


@_forward.register_fake
def _(*args):
    q, v, packed, keep = args[0], args[2], args[8], args[9]
    state, plan = _new_state(q, v, packed), _Plan(q.shape, v.shape, v.dtype, tuple(packed), q.device)
    saved = state.new_empty(_saved_shape(plan) if keep else (0,))
    return torch.empty_like(v, memory_format=torch.contiguous_format), state, saved


@operator("statetrack::dplr_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    saved: Tensor,
    d_out: Tensor,
    d_final: Tensor | None,
    scale: float,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, a, b, log_decay, d_out = (t.contiguous() for t in (q, k, v, a, b, log_decay, d_out.to(v.dtype)))
    initial, ends = (None if t is None else t.float().contiguous() for t in (initial_state, d_final))
    plan = _plan(q.shape, v.shape, v.dtype, tuple(packed), q.device)
    d_state, HV, V = q.new_empty(plan.state, dtype=torch.float32), plan.HV, plan.V
    dv, da, db, d_log = (torch.empty_like(x) for x in (v, a, b, log_decay))
    if plan.most == 0:
        d_state = d_state.zero_() if ends is None else d_state.copy_(ends)
        return torch.zeros_like(q), torch.zeros_like(k), dv, da, db, d_log, d_state
    parts = HV // plan.HK  # of dq and dk, summed afterwards
    shape, dtype = ((parts, *q.shape), torch.float32) if parts > 1 else (q.shape, q.dtype)
    dq, dk = q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)
    u, z = q.new_empty(v.shape, dtype=plan.low), q.new_empty(v.shape, dtype=plan.low)
    states, d_states = (q.new_empty((plan.pairs, HV, V, plan.K), dtype=plan.low) for _ in range(2))
    work, Z = plan.workspace(q), q.new_empty((plan.pairs, HV, 4, CHUNK, CHUNK), dtype=plan.low)
    for chunks, state in zip(reversed(plan.ranges), reversed([initial, *saved.unbind(0)]), strict=True):
        (low, high), pairs = chunks, plan.pairs_of(*chunks)
        plan.prepare(work, (q, k, a, b, log_decay), low, high)
        _walk(plan, work, v, state, scale, chunks, states=states, u=u)
        tensors = d_out, *work, ends, d_state, d_states, z, dv, plan.starts, plan.bases
        plan.walk_back(plan.grid, tensors, (plan.T, low, high, scale, HV, plan.K, V))
        ends, where, numbers = d_state, (plan.starts, plan.slots), (plan.T, low, high - low, scale)
        plan.meet((pairs * HV,), (v, u, d_out, z, Z, *where), (*numbers, HV, V))
        tensors = q, k, v, a, b, log_decay, u, d_out, z, Z, states, d_states, dq, dk, da, db, d_log, *where
        grid = pairs * HV, -(-plan.K // plan.gather.options["BK"])
        plan.gather(grid, tensors, (*numbers, plan.HK, HV, plan.K, V, q.numel()))
    if parts > 1:
        dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype)
    return dq, dk, dv, da, db, d_log, d_state


@_backward.register_fake
def _(*args):
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:6])
    return *grads, _new_state(args[0], args[2], args[11])


def _save_for_backward(ctx, inputs, output):
    *tensors, initial_state, ctx.scale, ctx.packed, _ = inputs
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, initial_state, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _run_backward(ctx, d_out, d_final, _):
    *inputs, saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(inputs[2])
    *grads, d_state = _backward(*inputs, saved, d_out, d_final, ctx.scale, ctx.packed)
    return *grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None


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
    launch = bind(step, BK=max(16, triton.next_power_of_2(K)), BV=16, num_warps=4)
    launch((B * HV, triton.cdiv(V, 16)), (q, k, v, a, b, log_decay, state, o, final), (scale, HK, HV, K, V))
    return o
