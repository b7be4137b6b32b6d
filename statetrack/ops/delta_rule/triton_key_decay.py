"""The delta rule with a decay per key channel on a GPU: launches, registered with torch.library.

Forward and backward take the sequence in ranges of chunks, one after another, so that a workspace stays small: first
`prepare_keys` for the range's chunks side by side, then `walk_keys` through them (forward), or `walk_back_keys` and
`gather_keys` (backward, last range first). Saved between the two: the inputs, F, and the state at every chunk's start,
in the type that the products take. The same kernels take a decay per head, or none, as one that all channels share: for
keys too wide for the kernels that know only such decays.

Letters: B batch, T tokens, S sequences, C tokens per chunk, N factors per token, H value heads, K key dim, V value dim.
"""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from statetrack.ops.delta_rule.triton import _save_for_backward, _step, new_state
from statetrack.ops.delta_rule.triton_key_backward import gather_keys, walk_back_keys
from statetrack.ops.delta_rule.triton_key_forward import prepare_keys, walk_keys
from statetrack.ops.delta_rule.triton_plan import ROWS
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_launch import bind
from statetrack.ops.triton_operator import operator

RANGES = 8  # a workspace is about this fraction of one for the whole sequence
MIN_RANGE = 8  # chunks
LIMIT = {True: 32, False: 80}  # of a block's log decay that scaling may span: for float32 products, for bfloat16 ones


def delta_rule_triton_key_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    lengths: list[int],
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` on a GPU for log_decay [B T H K], with gradients to every tensor (once differentiable).

    A log_decay [B T H], or none, is read as the same for every channel. `precision` as in `delta_rule_triton`.
    """
    tensors = (q, k, v, beta, log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = [] if q.shape[0] == len(lengths) else lengths
    if q.shape[1] == 1 and not packed and not keep:
        state = new_state(q, v, []).zero_() if initial_state is None else initial_state
        return _step(q, k, v, beta, log_decay, state, scale)
    if log_decay is None:
        log_decay = torch.zeros((), device=q.device)
    elif log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    log_decay = log_decay.expand(*v.shape[:2], v.shape[3], q.shape[3])
    o, state, *_ = _forward(
        q, k, v, beta, log_decay, initial_state, scale, packed, 2 if precision == "tracking" else 1, keep
    )
    return o, state


class _Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(
        self,
        q: tuple[int, ...],
        v: tuple[int, ...],
        dtype: torch.dtype,
        packed: tuple[int, ...],
        terms: int,
        device: torch.device,
    ):
        self.B, self.T, self.HK, self.K = q
        self.N, self.HV, self.V = v[2:]
        self.C = ROWS // self.N
        self.varlen = len(packed) > 0
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // self.C)
            self.starts, self.slots, self.bases = chunk_tables(packed, self.C, device)
            self.chunks = self.slots.shape[0]
        else:
            self.S, self.most = self.B, -(-self.T // self.C)
            self.starts = self.slots = self.bases = None
            self.chunks = self.S * self.most
        exact = dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        self.two = terms == 2 and not exact
        self.BK = max(16, triton.next_power_of_2(self.K))
        common = {"N": self.N, "C": self.C, "BK": self.BK, "VARLEN": self.varlen, "EXACT": exact}
        channels = {"BS": 16 if exact else min(32, self.BK), "LIMIT": LIMIT[exact], "num_warps": 8, "num_stages": 1}
        ways, columns = (
            {"TERMS": terms, "TWO": self.two},
            max(16, min(32 if exact else 64, triton.next_power_of_2(self.V))),
        )
        self.BV = walk_columns(self.BK, exact)
        ways = common | {"TERMS": terms, "TWO": self.two}
        walking = ways | {"BV": self.BV, "num_warps": 8 if exact else 4, "STAGES": 1}
        self.prepare_launch = [bind(prepare_keys, **ways, **channels, BACKWARD=back) for back in (False, True)]
        self.walk = [bind(walk_keys, **walking, SAVE=save) for save in (False, True)]
        self.walk_back = bind(walk_back_keys, **walking)
        self.gather = bind(gather_keys, **common, **channels, BV=columns)
        self.grid = triton.cdiv(self.V, self.BV), self.S * self.HV
        self.ranges = self._ranges()

    def _ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of chunks to take one after another (packed sequences: all chunks at once)."""
        if self.varlen or self.chunks == 0:
            return [(0, self.most)][: self.chunks]
        step = max(MIN_RANGE, -(-self.most // RANGES))
        return [(low, min(low + step, self.most)) for low in range(0, self.most, step)]

    def workspace(self, device: torch.device) -> list[Tensor]:
        """Allocate what `prepare_keys` writes for the longest range: Rows, Squares, scales, total."""
        slots = self.chunks if self.varlen else self.S * max(high - low for low, high in self.ranges)
        rows, squares = 5 if self.two else 3, 3 if self.two else 2
        return [
            torch.empty(slots, self.HV, rows, ROWS, self.BK, dtype=self.low, device=device),
            torch.empty(slots, self.HV, squares, ROWS, ROWS, dtype=self.low, device=device),
            torch.empty(slots, self.HV, 4, ROWS, device=device),
            torch.empty(slots, self.HV, self.BK, device=device),
        ]

    def prepare(self, q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor, work: list[Tensor], low: int, high: int,
                backward: bool) -> int:  # fmt: skip
        """Fill the workspace for the chunks [low, high) of every sequence; return how many (sequence, chunk) pairs."""
        slots = self.chunks if self.varlen else self.S * (high - low)
        sizes = self.T, low, high - low, self.HK, self.HV, self.K, *log_decay.stride()[1:]
        tensors = q, k, beta, log_decay, *work, self.starts, self.slots
        self.prepare_launch[backward]((slots * self.HV,), tensors, sizes)
        return slots


_plan = lru_cache(maxsize=64)(_Plan)


def walk_columns(BK: int, exact: bool) -> int:
    """Return how many value columns of the state one program walks with: two bf16 programs fit a multiprocessor."""
    if BK == 256:
        return 16 if exact else 32
    return 64


def _evenly_strided(log_decay: Tensor) -> Tensor:
    """Return log_decay [B T H K] so that token b T + t lies at b T + t strides of a token."""
    even = log_decay.stride(0) == log_decay.shape[1] * log_decay.stride(1)
    return log_decay if even else log_decay.contiguous()


@operator("statetrack::delta_rule_key_decay_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
    packed: list[int],
    terms: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta = (t.contiguous() for t in (q, k, v, beta))
    log_decay, plan = _evenly_strided(log_decay), _plan(q.shape, v.shape, v.dtype, tuple(packed), terms, q.device)
    state = None if initial_state is None else initial_state.float().contiguous()
    o, final = v.new_empty(v.shape[:2] + v.shape[3:]), new_state(q, v, packed)
    saved = v.new_empty((plan.chunks, plan.HV, plan.V, plan.K) if keep else (0,), dtype=plan.low)
    F = v.new_empty(v.shape if keep else (0,), dtype=plan.low)
    if plan.chunks == 0:
        return o, final.zero_() if state is None else final.copy_(state), saved, F
    work = plan.workspace(q.device)
    for low, high in plan.ranges:
        plan.prepare(q, k, beta, log_decay, work, low, high, backward=False)
        tensors = v, *work, state, o, final, saved, F, plan.starts, plan.bases
        numbers = plan.T, low, high, plan.most, scale, plan.HV, plan.K, plan.V
        plan.walk[keep](plan.grid, tensors, numbers)
        state = final
    return o, final, saved, F


@_forward.register_fake
def _(*args):
    q, k, v, _, _, _, _, packed, _, keep = args
    C = ROWS // k.shape[2]
    chunks = sum(-(-n // C) for n in packed) if packed else q.shape[0] * (-(-q.shape[1] // C))
    low = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (chunks, v.shape[3], v.shape[4], q.shape[3]) if keep else (0,)
    saved, F = v.new_empty(shape, dtype=low), v.new_empty(v.shape if keep else (0,), dtype=low)
    return v.new_empty(v.shape[:2] + v.shape[3:]), new_state(q, v, packed), saved, F


@operator("statetrack::delta_rule_key_decay_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    saved: Tensor,
    F: Tensor,
    d_out: Tensor,
    d_final: Tensor | None,
    scale: float,
    packed: list[int],
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, d_out = (t.contiguous() for t in (q, k, v, beta, d_out.to(v.dtype)))
    log_decay, plan = _evenly_strided(log_decay), _plan(q.shape, v.shape, v.dtype, tuple(packed), terms, q.device)
    ends = None if d_final is None else d_final.float().contiguous()
    groups = plan.HV // plan.HK
    per_value_head = q.dtype if groups == 1 else torch.float32  # summed over the group afterwards
    dq, dk = (x.new_empty((*x.shape[:-2], plan.HV, plan.K), dtype=per_value_head) for x in (q, k))
    dv, d_state = torch.empty_like(v), new_state(q, v, packed)
    d_beta = torch.empty_like(beta, dtype=torch.float32)
    d_decay = d_beta.new_empty(log_decay.shape)
    walk_scale = scale
    if scale == 0.0:
        d_out, walk_scale = torch.zeros_like(d_out), 1.0
    if plan.chunks == 0:
        d_state = d_state.zero_() if ends is None else d_state.copy_(ends)
        return dq.to(q.dtype), dk.to(k.dtype), dv, d_beta.to(beta.dtype), d_decay.to(log_decay.dtype), d_state
    work = plan.workspace(q.device)
    d_saved = torch.empty((work[0].shape[0], plan.HV, plan.V, plan.K), dtype=plan.low, device=q.device)
    for low, high in plan.ranges[::-1]:
        slots = plan.prepare(q, k, beta, log_decay, work, low, high, backward=True)
        tensors = d_out, *work, d_state, ends, dv, d_saved, plan.starts, plan.bases
        plan.walk_back(plan.grid, tensors, (plan.T, low, high, walk_scale, plan.HV, plan.K, plan.V))
        ends, where = d_state, (plan.starts, plan.slots)
        tensors = q, k, v, log_decay, d_out, work[2], saved, F, d_saved, dv, dq, dk, d_beta, d_decay, *where
        sizes = plan.HK, plan.HV, plan.K, plan.V, *log_decay.stride()[1:]
        plan.gather((slots * plan.HV,), tensors, (plan.T, low, high - low, plan.most, scale, *sizes))
    if groups > 1:
        dq, dk = (x.unflatten(-2, (plan.HK, groups)).sum(-2).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, d_beta.to(beta.dtype), d_decay.to(log_decay.dtype), d_state


@_backward.register_fake
def _(*args):
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:5])
    return *grads, new_state(args[0], args[2], args[10])


def _run_backward(ctx, d_out, d_final, *_):
    q, k, v, beta, log_decay, saved, F = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(v.shape[:2] + v.shape[3:])
    *grads, d_state = _backward(
        q, k, v, beta, log_decay, saved, F, d_out, d_final, ctx.scale, ctx.packed, ctx.terms
    )  # fmt: skip
    d_state = None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)
    return *grads, d_state, None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)
