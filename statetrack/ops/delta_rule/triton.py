"""The delta rule on a GPU: launches of the Triton kernels, registered with torch.library.

Forward: `prepare` (every chunk's triangular inverse), then `walk` (the state, chunk after chunk). Backward, for a range
of chunks at a time so that its workspace stays small: `prepare` again, `walk_back`, `gather`. Saved between the two:
the inputs, F, and the state at every chunk's start, in the type that the products take. One token without gradients is
one kernel, `step`.

Few heads and a long sequence would leave most of the GPU idle. Then the sequence is cut into segments that are walked
side by side three times: from a zero state (giving c), from the identity without values (giving the transition A), and,
once S <- A S + c has been taken over the segments in float64, from their true initial states. The adjoint needs A^T.

Letters: B batch, T tokens, S sequences, C tokens per chunk, N factors per token, H value heads, K key dim, V value dim.
"""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.delta_rule import triton_hopper as hopper
from statetrack.ops.delta_rule.triton_backward import gather, walk_back
from statetrack.ops.delta_rule.triton_decode import step
from statetrack.ops.delta_rule.triton_forward import ROWS, prepare, walk
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_operator import operator

BACKWARD_RANGES = 4  # the backward's workspace is about this fraction of one for the whole sequence
MIN_RANGE = 8  # chunks
FULL_GPU = 128  # (sequence, head) pairs that keep a GPU busy
MIN_SEGMENT = 16  # chunks
MIN_SEGMENTS = 4  # fewer do not pay for walking three times


def delta_rule_triton(
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
    """Compute `delta_rule` on a GPU, with gradients to every tensor (once differentiable).

    precision="fast" takes one term in every product: about the speed and the error of other libraries' kernels.
    """
    tensors = (q, k, v, beta, log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = [] if q.shape[0] == len(lengths) else lengths
    terms = 2 if precision == "tracking" else 1
    if q.shape[1] == 1 and not packed and not keep:
        return _step(q, k, v, beta, log_decay, initial_state, scale)
    o, state, *_ = _forward(q, k, v, beta, log_decay, initial_state, scale, packed, terms, keep)
    return o, state


class Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, packed: list[int], terms: int):
        self.B, self.T, self.HK, self.K = q.shape
        self.N, self.HV, self.V = k.shape[2], v.shape[3], v.shape[4]
        self.C = ROWS // self.N
        self.varlen, self.segments = len(packed) > 0, 1
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // self.C)
            self.starts, self.slots, self.bases = chunk_tables(tuple(packed), self.C, q.device)
            self.chunks = self.slots.shape[0]
        else:
            self.segments = segments(self.B * self.HV, self.T, self.C)
            self.S, self.T = self.B * self.segments, self.T // self.segments
            self.most = -(-self.T // self.C)
            self.starts = self.slots = self.bases = None
            self.chunks = self.S * self.most
        exact = v.dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        BK = max(16, triton.next_power_of_2(self.K))
        self.shapes = {"N": self.N, "C": self.C, "BK": BK}
        self.common = {"GATE": log_decay is not None, "VARLEN": self.varlen, "EXACT": exact}
        self.BQ = max(16, triton.next_power_of_2(self.C))
        self.BV = walk_columns(self.V, BK, exact)
        self.whole = not self.varlen and self.T % self.C == 0 and ROWS % self.N == 0 and self.BQ == self.C
        even = self.whole and BK == self.K and self.V % self.BV == 0
        self.walk = {"EVEN": even, "TERMS": terms, "BQ": self.BQ, "BV": self.BV, **walk_schedule(BK, self.BV, exact)}
        wide = min(64 if BK <= 128 and not exact else 32 if BK <= 128 else 16, triton.next_power_of_2(self.V))
        wide = max(16, wide)
        even = even and self.V % wide == 0
        self.hopper = hopper.serves(q, v)
        self.gather = {"EVEN": even, "BQ": self.BQ, "BV": wide, "num_warps": 4 if BK <= 128 and not exact else 8}
        self.gather["STAGES"] = 1

    def pairs(self, low: int, high: int) -> int:
        """Return how many (sequence, chunk) pairs the chunks [low, high) of every sequence are (all of packed ones)."""
        return self.chunks if self.varlen else self.S * (high - low)

    def workspace(self, pairs: int, device: torch.device, terms: int) -> dict[str, Tensor]:
        """Allocate what `prepare` writes for this many (sequence, chunk) pairs."""
        shape = (pairs, self.HV, ROWS)
        high = torch.empty(*shape, ROWS, dtype=self.low, device=device)
        two = terms == 2 and self.low == torch.bfloat16
        return {
            "X_hi": high,
            "X_lo": torch.empty_like(high) if two else high,
            "scales": torch.empty(pairs, self.HV, 4, ROWS, device=device),
            "G": torch.empty((pairs, self.HV, 2, ROWS) if self.common["GATE"] else (1,), device=device),
        }

    def prepare(
        self,
        work: dict[str, Tensor],
        tensors: tuple[Tensor, Tensor, Tensor | None],
        low: int,
        high: int,
        terms: int,
        backward: bool,
    ) -> None:
        """Run `prepare` on the chunks [low, high) of every sequence (all chunks of packed ones)."""
        k, beta, log_decay = tensors
        if self.hopper:
            hopper.launch_prepare(self, work, tensors, low, high, terms, backward)
            return
        registers = {} if self.common["EXACT"] else {"maxnreg": 168}  # three programs per multiprocessor
        sizes = self.T, low, high - low, self.HK, self.HV, self.K
        prepare[(self.pairs(low, high) * self.HV,)](
            k, beta, log_decay, work["X_hi"], work["X_lo"], work["scales"], work["G"], self.starts, self.slots,
            *sizes, **self.shapes, **self.common, BACKWARD=backward, TERMS=terms,
            num_warps=8 if self.common["EXACT"] else 4, num_stages=1, **registers,
        )  # fmt: skip


def segments(pairs: int, T: int, C: int) -> int:
    """Return into how many segments to cut sequences of T tokens, given the number of (sequence, head) pairs."""
    count = 1
    while pairs * count < FULL_GPU and T % (2 * count * C) == 0 and T // (2 * count * C) >= MIN_SEGMENT:
        count *= 2
    return count if count >= MIN_SEGMENTS else 1


def walk_columns(V: int, BK: int, exact: bool) -> int:
    """Return how many value columns of the state one program walks with."""
    if exact:
        return 32 if BK == 256 else 64
    return 128 if BK == 128 and V > 64 else 64


def walk_schedule(BK: int, BV: int, exact: bool) -> dict[str, int]:
    """Return warps and pipeline depth of the two walks."""
    if exact:
        return {"num_warps": 8 if BK > 64 else 4, "STAGES": 1}
    return {"num_warps": 8 if BK == 256 or BV == 128 else 4, "STAGES": 1 if BK == 256 else 2}


@operator("statetrack::delta_rule_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    scale: float,
    packed: list[int],
    terms: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, initial = (t.contiguous() for t in (q, k, v, beta, initial_state.float()))
    log_decay = None if log_decay is None else log_decay.contiguous()
    plan = Plan(q, k, v, log_decay, packed, terms)
    o, final = torch.empty_like(v[:, :, 0]), torch.empty_like(initial)
    saved = v.new_empty(_saved_shape(plan, keep), dtype=plan.low)
    F = v.new_empty(v.shape if keep else (0,), dtype=plan.low)
    if plan.chunks == 0:
        return o, final.copy_(initial), saved, F, initial.new_empty(0)
    work = plan.workspace(plan.pairs(0, plan.most), q.device, terms)
    plan.prepare(work, (k, beta, log_decay), 0, plan.most, terms, backward=False)

    def run(start: Tensor, end: Tensor, V: int, values: bool, output: bool) -> Tensor:
        if plan.hopper:
            hopper.launch_walk(
                plan, work, (q, k, v, start, o, end, saved, F), scale, V, (keep and output, values, output)
            )
            return end
        walk[(triton.cdiv(V, plan.BV), plan.S * plan.HV)](
            q, k, v, work["X_hi"], work["X_lo"], work["scales"], work["G"], start, o, end, saved, F,
            plan.starts, plan.bases, plan.T, scale, plan.HK, plan.HV, plan.K, V,
            SAVE=keep and output, VALUES=values, OUTPUT=output, **plan.shapes, **plan.common, **plan.walk,
        )  # fmt: skip
        return end

    A = initial.new_empty(0)
    if plan.segments == 1:
        run(initial, final, plan.V, True, True)
    else:
        states = initial.new_zeros(plan.S, plan.HV, plan.K, plan.V)
        c = run(states, torch.empty_like(states), plan.V, True, False)
        eye = torch.eye(plan.K, device=q.device).expand(plan.S, plan.HV, plan.K, plan.K).contiguous()
        A = run(eye, torch.empty_like(eye), plan.K, False, False)
        states = _compose(A, c, initial, plan.segments, transpose=False)
        final = run(states, c, plan.V, True, True).unflatten(0, (-1, plan.segments))[:, -1].contiguous()
    return o, final, saved, F, A if keep else A.new_empty(0)


def _compose(A: Tensor, c: Tensor, first: Tensor, count: int, transpose: bool) -> Tensor:
    """Return each segment's initial state [S H K V] under S <- A S + c (backwards and with A^T if transpose)."""
    A, c = (x.unflatten(0, (-1, count)).double() for x in (A, c))
    state, out = first.double(), [first] * count
    for s in range(count - 1, -1, -1) if transpose else range(count):
        out[s] = state.float()
        state = (A[:, s].mT if transpose else A[:, s]) @ state + c[:, s]
    return torch.stack(out, 1).flatten(0, 1)


def _saved_shape(plan: Plan, keep: bool) -> tuple[int, ...]:
    return (plan.chunks, plan.HV, plan.V, plan.K) if keep else (0,)


@_forward.register_fake
def _(*args):
    q, k, v, _, _, initial_state, _, packed, _, keep = args
    C, count = ROWS // k.shape[2], 1
    if not packed:
        count = segments(q.shape[0] * v.shape[3], q.shape[1], C)
    chunks = sum(-(-n // C) for n in packed) if packed else q.shape[0] * (-(-q.shape[1] // C))
    low = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (chunks, v.shape[3], v.shape[4], q.shape[3]) if keep else (0,)
    state = torch.empty_like(initial_state, dtype=torch.float32, memory_format=torch.contiguous_format)
    path = (q.shape[0] * count, v.shape[3], q.shape[3], q.shape[3]) if keep and count > 1 else (0,)
    saved, F = v.new_empty(shape, dtype=low), v.new_empty(v.shape if keep else (0,), dtype=low)
    return v.new_empty(v.shape[:2] + v.shape[3:]), state, saved, F, state.new_empty(path)


@operator("statetrack::delta_rule_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    saved: Tensor,
    F: Tensor,
    A: Tensor,
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
    packed: list[int],
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, d_out, d_final = (t.contiguous() for t in (q, k, v, beta, d_out.to(v.dtype), d_final.float()))
    log_decay = None if log_decay is None else log_decay.contiguous()
    plan = Plan(q, k, v, log_decay, packed, terms)
    groups = plan.HV // plan.HK
    per_value_head = q.dtype if groups == 1 else torch.float32  # summed over the group afterwards
    dq, dk = (x.new_empty(*x.shape[:-2], plan.HV, plan.K, dtype=per_value_head) for x in (q, k))
    dv = torch.empty_like(v)
    d_beta = torch.empty(beta.shape, device=q.device)
    d_decay = d_beta.new_empty(() if log_decay is None else log_decay.shape)
    d_state = d_final.clone()
    if scale == 0.0:
        d_out, walk_scale = torch.zeros_like(d_out), 1.0
    else:
        walk_scale = scale

    ranges = _ranges(plan)
    most = max((plan.pairs(low, high) for low, high in ranges), default=0)
    work = plan.workspace(most, q.device, terms)
    d_saved = torch.empty(most, plan.HV, plan.V, plan.K, dtype=plan.low, device=q.device)

    def run(ends: Tensor, out: Tensor, low: int, high: int, output: bool) -> None:
        if plan.hopper:
            hopper.launch_walk_back(plan, work, (q, k, d_out, out, ends, dv, d_saved), walk_scale, low, high, output)
            return
        walk_back[(triton.cdiv(plan.V, plan.BV), plan.S * plan.HV)](
            q, k, d_out, work["X_hi"], work["X_lo"], work["scales"], work["G"], out, ends, dv, d_saved,
            plan.starts, plan.bases, plan.T, low, high, walk_scale, plan.HK, plan.HV, plan.K, plan.V,
            OUTPUT=output, **plan.shapes, **plan.common, **plan.walk,
        )  # fmt: skip

    for low, high in ranges:
        plan.prepare(work, (k, beta, log_decay), low, high, terms, backward=True)
        if plan.segments > 1:
            c = d_state.new_zeros(plan.S, plan.HV, plan.K, plan.V)
            run(c, c, low, high, False)
            d_state = _compose(A, c, d_final, plan.segments, transpose=True)
        run(d_state, d_state, low, high, True)
        if plan.hopper:
            grads = q, k, v, log_decay, d_out, saved, F, d_saved, dv, dq, dk, d_beta, d_decay
            hopper.launch_gather(plan, work, grads, scale, low, high)
            continue
        gather[(plan.pairs(low, high) * plan.HV,)](
            q, k, v, log_decay, d_out, work["scales"], work["G"], saved, F, d_saved, dv, dq, dk, d_beta, d_decay,
            plan.starts, plan.slots, plan.T, low, high - low, plan.most, scale, plan.HK, plan.HV, plan.K, plan.V,
            **plan.shapes, **plan.common, **plan.gather,
        )  # fmt: skip
    d_state = d_state.unflatten(0, (-1, plan.segments))[:, 0].contiguous()
    if groups > 1:
        dq, dk = (x.unflatten(-2, (plan.HK, groups)).sum(-2) for x in (dq, dk))
    d_decay = d_decay if log_decay is None else d_decay.to(log_decay.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv, d_beta.to(beta.dtype), d_decay, d_state


def _ranges(plan: Plan) -> list[tuple[int, int]]:
    """Return the ranges of chunks that the backward takes one after another, last one first."""
    if plan.chunks == 0:
        return []
    if plan.varlen or plan.segments > 1:
        return [(0, plan.most)]
    step = max(MIN_RANGE, -(-plan.most // BACKWARD_RANGES))
    return [(low, min(low + step, plan.most)) for low in range(0, plan.most, step)][::-1]


@_backward.register_fake
def _(*args):
    q, k, v, beta, log_decay, d_final = *args[:5], args[9]
    d_decay = beta.new_empty((), dtype=torch.float32) if log_decay is None else log_decay
    grads = q, k, v, beta, d_decay, d_final.float()
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads)


def _save_for_backward(ctx, inputs, output):
    q, k, v, beta, log_decay, initial_state, ctx.scale, ctx.packed, ctx.terms, _ = inputs
    ctx.state_dtype, ctx.state_shape = initial_state.dtype, initial_state.shape
    ctx.save_for_backward(q, k, v, beta, log_decay, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # else zeros as large as what was saved


def _run_backward(ctx, d_out, d_final, *_):
    q, k, v, beta, log_decay, saved, F, A = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(v.shape[:2] + v.shape[3:])
    if d_final is None:
        d_final = v.new_zeros(ctx.state_shape, dtype=torch.float32)
    dq, dk, dv, d_beta, d_decay, d_state = _backward(
        q, k, v, beta, log_decay, saved, F, A, d_out, d_final, ctx.scale, ctx.packed, ctx.terms
    )
    d_decay = None if log_decay is None else d_decay
    return dq, dk, dv, d_beta, d_decay, d_state.to(ctx.state_dtype), None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)


@operator("statetrack::delta_rule_step")
def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    state = state.contiguous().float()
    final = torch.empty_like(state)
    return _launch_step(q, k, v, beta, log_decay, state, scale, final), final


@_step.register_fake
def _(*args):
    q, _, v, _, _, state, _ = args
    final = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    return v.new_empty(q.shape[0], 1, *v.shape[3:]), final


@operator("statetrack::delta_rule_step_", mutates=("state",))
def delta_rule_step_(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """Take one token (T = 1) and update the float32 state [B H K V] in place; return o. No gradients."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise UsageError(f"state must be contiguous float32, got {state.dtype} with strides {state.stride()}")
    return _launch_step(q, k, v, beta, log_decay, state, scale, state)


@delta_rule_step_.register_fake
def _(*args):
    q, _, v, *_ = args
    return v.new_empty(q.shape[0], 1, *v.shape[3:])


def _launch_step(q, k, v, beta, log_decay, state, scale, final) -> Tensor:
    q, k, v, beta = (t.contiguous() for t in (q, k, v, beta))
    log_decay = None if log_decay is None else log_decay.contiguous()
    (B, _, HK, K), (N, HV, V) = q.shape, (k.shape[2], v.shape[3], v.shape[4])
    o = torch.empty(B, 1, HV, V, dtype=v.dtype, device=v.device)
    BK, BV = max(16, triton.next_power_of_2(K)), 16 if B * HV * V < 32 * 2 * FULL_GPU else 32
    step[(triton.cdiv(V, BV), B * HV)](
        q, k, v, beta, log_decay, state, o, final, scale, HK, HV, K, V,
        N=N, BK=BK, BV=BV, GATE=log_decay is not None, PER_KEY=log_decay is not None and log_decay.ndim == 4,
        num_warps=4,
    )  # fmt: skip
    return o
