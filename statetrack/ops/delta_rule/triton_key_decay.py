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

import torch
import triton
from torch import Tensor

from statetrack.ops.delta_rule.triton import _save_for_backward, _step
from statetrack.ops.delta_rule.triton_forward import ROWS
from statetrack.ops.delta_rule.triton_key_backward import gather_keys, walk_back_keys
from statetrack.ops.delta_rule.triton_key_forward import prepare_keys, walk_keys
from statetrack.ops.layout import chunk_tables
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
    initial_state: Tensor,
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
        return _step(q, k, v, beta, log_decay, initial_state, scale)
    if log_decay is None:
        log_decay = initial_state.new_zeros(())
    elif log_decay.ndim == 3:
        log_decay = log_decay.unsqueeze(-1)
    log_decay = log_decay.expand(*v.shape[:2], v.shape[3], q.shape[3])
    o, state, *_ = _forward(
        q, k, v, beta, log_decay, initial_state, scale, packed, 2 if precision == "tracking" else 1, keep
    )
    return o, state


class _Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, packed: list[int], terms: int):
        self.B, self.T, self.HK, self.K = q.shape
        self.N, self.HV, self.V = k.shape[2], v.shape[3], v.shape[4]
        self.C = ROWS // self.N
        self.varlen = len(packed) > 0
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // self.C)
            self.starts, self.slots, self.bases = chunk_tables(tuple(packed), self.C, q.device)
            self.chunks = self.slots.shape[0]
        else:
            self.S, self.most = self.B, -(-self.T // self.C)
            self.starts = self.slots = self.bases = None
            self.chunks = self.S * self.most
        exact = v.dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        self.two = terms == 2 and not exact
        self.BK = max(16, triton.next_power_of_2(self.K))
        self.common = {"N": self.N, "C": self.C, "BK": self.BK, "VARLEN": self.varlen, "EXACT": exact}
        channels = {"BS": 16 if exact else min(32, self.BK), "LIMIT": LIMIT[exact], "num_warps": 8, "num_stages": 1}
        self.prepare_options = channels | {"TERMS": terms, "TWO": self.two}
        self.gather_options = channels | {"BV": max(16, min(32 if exact else 64, triton.next_power_of_2(self.V)))}
        self.BV = walk_columns(self.BK, exact)
        self.walk_options = {"TERMS": terms, "TWO": self.two, "BV": self.BV}
        self.walk_options |= {"num_warps": 8 if exact else 4, "STAGES": 1}

    def ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of chunks to take one after another (packed sequences: all chunks at once)."""
        if self.varlen or self.chunks == 0:
            return [(0, self.most)][: self.chunks]
        step = max(MIN_RANGE, -(-self.most // RANGES))
        return [(low, min(low + step, self.most)) for low in range(0, self.most, step)]

    def workspace(self, device: torch.device) -> list[Tensor]:
        """Allocate what `prepare_keys` writes for the longest range: Rows, Squares, scales, total."""
        slots = self.chunks if self.varlen else self.S * max(high - low for low, high in self.ranges())
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
        prepare_keys[(slots * self.HV,)](
            q, k, beta, log_decay, *work, self.starts, self.slots, *sizes,
            **self.common, **self.prepare_options, BACKWARD=backward,
        )  # fmt: skip
        return slots


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
    initial_state: Tensor,
    scale: float,
    packed: list[int],
    terms: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, initial = (t.contiguous() for t in (q, k, v, beta, initial_state.float()))
    log_decay = _evenly_strided(log_decay)
    plan = _Plan(q, k, v, packed, terms)
    o, final = torch.empty_like(v[:, :, 0], memory_format=torch.contiguous_format), torch.empty_like(initial)
    saved = v.new_empty((plan.chunks, plan.HV, plan.V, plan.K) if keep else (0,), dtype=plan.low)
    F = v.new_empty(v.shape if keep else (0,), dtype=plan.low)
    if plan.chunks == 0:
        return o, final.copy_(initial), saved, F
    work, state = plan.workspace(q.device), initial
    for low, high in plan.ranges():
        plan.prepare(q, k, beta, log_decay, work, low, high, backward=False)
        walk_keys[(triton.cdiv(plan.V, plan.BV), plan.S * plan.HV)](
            v, *work, state, o, final, saved, F, plan.starts, plan.bases,
            plan.T, low, high, plan.most, scale, plan.HV, plan.K, plan.V, **plan.common, **plan.walk_options, SAVE=keep,
        )  # fmt: skip
        state = final
    return o, final, saved, F


@_forward.register_fake
def _(*args):
    q, k, v, _, _, initial_state, _, packed, _, keep = args
    C = ROWS // k.shape[2]
    chunks = sum(-(-n // C) for n in packed) if packed else q.shape[0] * (-(-q.shape[1] // C))
    low = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (chunks, v.shape[3], v.shape[4], q.shape[3]) if keep else (0,)
    state = torch.empty_like(initial_state, dtype=torch.float32, memory_format=torch.contiguous_format)
    saved, F = v.new_empty(shape, dtype=low), v.new_empty(v.shape if keep else (0,), dtype=low)
    return v.new_empty(v.shape[:2] + v.shape[3:]), state, saved, F


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
    d_final: Tensor,
    scale: float,
    packed: list[int],
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, d_out, d_final = (t.contiguous() for t in (q, k, v, beta, d_out.to(v.dtype), d_final.float()))
    log_decay = _evenly_strided(log_decay)
    plan = _Plan(q, k, v, packed, terms)
    groups = plan.HV // plan.HK
    per_value_head = q.dtype if groups == 1 else torch.float32  # summed over the group afterwards
    dq, dk = (x.new_empty(*x.shape[:-2], plan.HV, plan.K, dtype=per_value_head) for x in (q, k))
    dv = torch.empty_like(v)
    d_beta = torch.empty(beta.shape, device=q.device)
    d_decay = torch.empty(log_decay.shape, device=q.device)
    d_state = d_final.clone()
    if scale == 0.0:
        d_out, walk_scale = torch.zeros_like(d_out), 1.0
    else:
        walk_scale = scale
    if plan.chunks:
        work = plan.workspace(q.device)
        d_saved = torch.empty(work[0].shape[0], plan.HV, plan.V, plan.K, dtype=plan.low, device=q.device)
    for low, high in plan.ranges()[::-1]:
        slots = plan.prepare(q, k, beta, log_decay, work, low, high, backward=True)
        walk_back_keys[(triton.cdiv(plan.V, plan.BV), plan.S * plan.HV)](
            d_out, *work, d_state, d_state, dv, d_saved, plan.starts, plan.bases,
            plan.T, low, high, walk_scale, plan.HV, plan.K, plan.V, **plan.common, **plan.walk_options,
        )  # fmt: skip
        gather_keys[(slots * plan.HV,)](
            q, k, v, log_decay, d_out, work[2], saved, F, d_saved, dv, dq, dk, d_beta, d_decay, plan.starts, plan.slots,
            plan.T, low, high - low, plan.most, scale, plan.HK, plan.HV, plan.K, plan.V, *log_decay.stride()[1:],
            **plan.common, **plan.gather_options,
        )  # fmt: skip
    if groups > 1:
        dq, dk = (x.unflatten(-2, (plan.HK, groups)).sum(-2) for x in (dq, dk))
    return dq.to(q.dtype), dk.to(k.dtype), dv, d_beta.to(beta.dtype), d_decay.to(log_decay.dtype), d_state


@_backward.register_fake
def _(*args):
    grads = *args[:5], args[8].float()
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads)


def _run_backward(ctx, d_out, d_final, *_):
    q, k, v, beta, log_decay, saved, F = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(v.shape[:2] + v.shape[3:])
    if d_final is None:
        d_final = v.new_zeros(ctx.state_shape, dtype=torch.float32)
    *grads, d_state = _backward(
        q, k, v, beta, log_decay, saved, F, d_out, d_final, ctx.scale, ctx.packed, ctx.terms
    )  # fmt: skip
    return *grads, d_state.to(ctx.state_dtype), None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)
