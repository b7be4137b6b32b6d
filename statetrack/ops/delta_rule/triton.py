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
from statetrack.ops.delta_rule.triton_decode import step
from statetrack.ops.delta_rule.triton_plan import FULL_GPU, ROWS, Plan, plan_of, segments
from statetrack.ops.triton_launch import bind
from statetrack.ops.triton_operator import operator
from statetrack.ops.triton_segments import compose_matrices


def delta_rule_triton(
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
    """Compute `delta_rule` on a GPU, with gradients to every tensor (once differentiable).

    precision="fast" takes one term in every product: about the speed and the error of other libraries' kernels.
    """
    tensors = (q, k, v, beta, log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = [] if q.shape[0] == len(lengths) else lengths
    terms = 2 if precision == "tracking" else 1
    if q.shape[1] == 1 and not packed and not keep:
        state = new_state(q, v, []).zero_() if initial_state is None else initial_state
        return _step(q, k, v, beta, log_decay, state, scale)
    o, state, *_ = _forward(q, k, v, beta, log_decay, initial_state, scale, packed, terms, keep)
    return o, state


@operator("statetrack::delta_rule_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    packed: list[int],
    terms: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta = (t.contiguous() for t in (q, k, v, beta))
    log_decay = None if log_decay is None else log_decay.contiguous()
    initial = None if initial_state is None else initial_state.float().contiguous()
    plan = plan_of(q, v, log_decay, packed, terms)
    o, final = v.new_empty(v.shape[:2] + v.shape[3:]), _states(plan, plan.V, q)
    saved = v.new_empty((plan.chunks, plan.HV, plan.V, plan.K) if keep else (0,), dtype=plan.low)
    F, A = v.new_empty(v.shape if keep else (0,), dtype=plan.low), final.new_empty(0)
    if plan.chunks == 0:
        return o, final.zero_() if initial is None else final.copy_(initial), saved, F, A
    work = plan.workspace(plan.chunks, q.device)
    grid = (plan.chunks * plan.HV,)
    plan.prepare(False)(grid, (k, beta, log_decay, *work, plan.starts, plan.slots), plan.preparing(0, plan.most))

    def run(start: Tensor | None, end: Tensor, V: int, values: bool, output: bool) -> Tensor:
        tensors = q, k, v, *work, start, o, end, saved, F, plan.starts, plan.bases
        plan.walk(keep and output, values, output, V)(plan.grid(V), tensors, (plan.T, scale, *plan.sizes(V)))
        return end

    if plan.segments == 1:
        return o, run(initial, final, plan.V, True, True), saved, F, A
    c = run(None, final, plan.V, True, False)
    A = run(None, _states(plan, plan.K, q), plan.K, False, False)
    final = run(compose_matrices(A, c, initial, plan.segments, back=False), c, plan.V, True, True)
    final = final.unflatten(0, (-1, plan.segments))[:, -1].contiguous()
    return o, final, saved, F, A if keep else A.new_empty(0)


def _states(plan: Plan, V: int, like: Tensor) -> Tensor:
    """Allocate a state with V value columns per segment."""
    return torch.empty((plan.S, plan.HV, plan.K, V), dtype=torch.float32, device=like.device)


def new_state(q: Tensor, v: Tensor, packed: list[int]) -> Tensor:
    """Allocate a state per sequence."""
    return q.new_empty((len(packed) or q.shape[0], v.shape[3], q.shape[3], v.shape[4]), dtype=torch.float32)


@_forward.register_fake
def _(*args):
    q, k, v, _, _, _, _, packed, _, keep = args
    C, count = ROWS // k.shape[2], 1
    if not packed:
        count = segments(q.shape[0] * v.shape[3], q.shape[1], C)
    chunks = sum(-(-n // C) for n in packed) if packed else q.shape[0] * (-(-q.shape[1] // C))
    low = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (chunks, v.shape[3], v.shape[4], q.shape[3]) if keep else (0,)
    state = new_state(q, v, packed)
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
    d_final: Tensor | None,
    scale: float,
    packed: list[int],
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, d_out = (t.contiguous() for t in (q, k, v, beta, d_out.to(v.dtype)))
    log_decay = None if log_decay is None else log_decay.contiguous()
    ends = None if d_final is None else d_final.float().contiguous()
    plan = plan_of(q, v, log_decay, packed, terms)
    groups = plan.HV // plan.HK
    per_value_head = q.dtype if groups == 1 else torch.float32  # summed over the group afterwards
    dq, dk = (x.new_empty((*x.shape[:-2], plan.HV, plan.K), dtype=per_value_head) for x in (q, k))
    dv = torch.empty_like(v)
    d_beta = torch.empty_like(beta, dtype=torch.float32)
    d_decay = d_beta.new_empty(() if log_decay is None else log_decay.shape)
    if plan.chunks == 0:
        d_state = new_state(q, v, packed).zero_() if ends is None else ends.clone()
        return dq, dk, dv, d_beta.to(beta.dtype), d_decay, d_state
    d_state = _states(plan, plan.V, q)
    walk_scale = scale
    if scale == 0.0:
        d_out, walk_scale = torch.zeros_like(d_out), 1.0
    work = plan.workspace(plan.pairs, q.device)
    d_saved = torch.empty((plan.pairs, plan.HV, plan.V, plan.K), dtype=plan.low, device=q.device)
    sizes, where = plan.sizes(plan.V), (plan.starts, plan.slots)

    def run(ends: Tensor | None, out: Tensor, low: int, high: int, output: bool) -> None:
        tensors = q, k, d_out, *work, out, ends, dv, d_saved, plan.starts, plan.bases
        plan.walk_back(output)(plan.grid(plan.V), tensors, (plan.T, low, high, walk_scale, *sizes))

    for low, high in plan.ranges:
        grid = (plan.pairs_of(low, high) * plan.HV,)
        plan.prepare(True)(grid, (k, beta, log_decay, *work, *where), plan.preparing(low, high))
        if plan.segments > 1:
            run(None, d_state, low, high, False)
            ends = compose_matrices(A, d_state, ends, plan.segments, back=True)
        run(ends, d_state, low, high, True)
        ends = d_state
        tensors = q, k, v, log_decay, d_out, *work[2:], saved, F, d_saved, dv, dq, dk, d_beta, d_decay, *where
        plan.gather()(grid, tensors, (plan.T, low, high - low, plan.most, scale, *sizes))
    if plan.segments > 1:
        d_state = d_state.unflatten(0, (-1, plan.segments))[:, 0].contiguous()
    if groups > 1:
        dq, dk = (x.unflatten(-2, (plan.HK, groups)).sum(-2).to(q.dtype) for x in (dq, dk))
    d_decay = d_decay if log_decay is None else d_decay.to(log_decay.dtype)
    return dq, dk, dv, d_beta.to(beta.dtype), d_decay, d_state


@_backward.register_fake
def _(*args):
    q, k, v, beta, log_decay, packed = *args[:5], args[11]
    d_decay = beta.new_empty((), dtype=torch.float32) if log_decay is None else log_decay
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v, beta, d_decay))
    return *grads, new_state(q, v, packed)


def _save_for_backward(ctx, inputs, output):
    q, k, v, beta, log_decay, initial_state, ctx.scale, ctx.packed, ctx.terms, _ = inputs
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, beta, log_decay, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)  # else zeros as large as what was saved


def _run_backward(ctx, d_out, d_final, *_):
    q, k, v, beta, log_decay, saved, F, A = ctx.saved_tensors
    if d_out is None:
        d_out = v.new_zeros(v.shape[:2] + v.shape[3:])
    dq, dk, dv, d_beta, d_decay, d_state = _backward(
        q, k, v, beta, log_decay, saved, F, A, d_out, d_final, ctx.scale, ctx.packed, ctx.terms
    )
    d_decay = None if log_decay is None else d_decay
    d_state = None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)
    return dq, dk, dv, d_beta, d_decay, d_state, None, None, None, None


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
    gate = {"GATE": log_decay is not None, "PER_KEY": log_decay is not None and log_decay.ndim == 4}
    launch = bind(step, N=N, BK=BK, BV=BV, **gate, num_warps=4)
    launch((triton.cdiv(V, BV), B * HV), (q, k, v, beta, log_decay, state, o, final), (scale, HK, HV, K, V))
    return o
