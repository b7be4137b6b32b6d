"""Gated linear attention on a GPU: launches of the Triton kernels, registered with torch.library.

Both directions take a range of chunks at a time, so that the workspace stays small. Forward: `prepare` (products of the
decays in every chunk), then `walk` (the state and the output, chunk after chunk). Backward: `prepare` again, `walk` for
the states at the chunks' starts, `walk_back` for dv and the gradients to the states at their ends, `gather`. Saved
between the two: the inputs, and the state before every range. One token without gradients is one kernel, `step`.

Few heads and a long sequence would leave most of the GPU idle. Then the sequence is cut into segments. First comes what
each makes of a zero state, c: by a walk, or, with one decay per head, by `end_of_segment`, as far back as the decays
let anything through. Once S <- total S + c has been taken over the segments in float64, all are walked side by side
from their true initial states. The adjoint likewise.

Letters: B batch, T tokens, S sequences, C tokens per chunk, H value heads, K key dim, V value dim.
"""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.gated_linear_attention.triton_plan import CHUNK, FULL_GPU, HEADS, Plan, Range, Work, plan_of
from statetrack.ops.gated_linear_attention.triton_walk import step
from statetrack.ops.triton_launch import bind
from statetrack.ops.triton_operator import operator
from statetrack.ops.triton_segments import compose_factors


def gated_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `gated_linear_attention` on a GPU, with gradients to every tensor (once differentiable)."""
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, decay, initial_state))
    packed = [] if q.shape[0] == len(lengths) else lengths
    if q.shape[1] == 1 and not packed and not keep:
        state = _new_state(q, v, []).zero_() if initial_state is None else initial_state
        return _step(q, k, v, decay, state, scale)
    o, state, _ = _forward(q, k, v, decay, initial_state, scale, packed, keep)
    return o, state


@operator("statetrack::gated_linear_attention_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
    packed: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, decay = (t.contiguous() for t in (q, k, v, decay))
    state = None if initial_state is None else initial_state.float().contiguous()
    plan = plan_of(q, v, decay, packed)
    o, final = torch.empty_like(v), q.new_empty(plan.state, dtype=torch.float32)
    saved = final.new_empty(_saved_shape(plan) if keep else (0,))
    if plan.most == 0:
        return o, final.zero_() if state is None else final.copy_(state), saved
    work = plan.workspace(q, k)
    ends = [final] * len(plan.ranges)  # a walk may write over what it started from
    if keep:
        ends = [*saved.unbind(0), final]
    if plan.segments > 1:
        if plan.key:
            for chunks in plan.ranges:
                plan.prepare(work, q, k, decay, chunks)
                _walk(plan, work, v, scale, None if chunks[0] == 0 else final, chunks, final=final)
        else:
            _end_of_segment(plan, decay, v, k, 1.0, final, back=False)
        out = ends.pop(0) if keep else torch.empty_like(final)
        state = compose_factors(_totals(plan, decay), final, state, out, plan.segments, back=False)
    for chunks, end in zip(plan.ranges, ends, strict=True):
        plan.prepare(work, q, k, decay, chunks)
        _walk(plan, work, v, scale, state, chunks, o=o, final=end)
        state = end
    if plan.segments > 1:
        final = final.unflatten(0, (-1, plan.segments))[:, -1].contiguous()
    return o, final, saved


def _walk(
    plan: Plan,
    work: Work,
    v: Tensor,
    scale: float,
    initial: Tensor | None,
    chunks: Range,
    o: Tensor | None = None,
    states: Tensor | None = None,
    final: Tensor | None = None,
) -> None:
    """Launch `walk` over a range of chunks, for what is given."""
    q, k, k_lo, G, P = work
    tensors = q, k, k_lo, v, G, P, initial, o, final, states, plan.starts, plan.bases
    launch = plan.launch("walk", STATES=states is not None, OUTPUT=o is not None)
    launch(plan.grid, tensors, (plan.T, *chunks, scale, *plan.widths))


def _walk_back(
    plan: Plan,
    work: Work,
    d_out: Tensor,
    scale: float,
    d_final: Tensor | None,
    chunks: Range,
    d_state: Tensor,
    d_states: Tensor | None = None,
    dv: Tensor | None = None,
) -> None:
    """Launch `walk_back` over a range of chunks; d_state gets the gradient to the state before it."""
    q, k, _, G, P = work
    tensors = q, k, d_out, G, P, d_final, d_state, d_states, dv, plan.starts, plan.bases
    launch = plan.launch("walk_back", OUTPUT=d_states is not None)
    launch(plan.grid, tensors, (plan.T, *chunks, scale, *plan.widths))


def _end_of_segment(plan: Plan, decay, x, y, scale: float, out: Tensor, back: bool) -> None:
    """Write what each segment adds to the state, or `back` to its gradient, with one decay per head."""
    G = plan.factors(y, plan.S * plan.most)
    plan.prepare_head(G, decay, (0, plan.most))
    plan.launch("end_of_segment", BACK=back)(plan.grid, (x, y, G, out), (plan.T, plan.most, scale, *plan.widths))


def _totals(plan: Plan, decay: Tensor) -> Tensor:
    """Return the product of each segment's decays, in float64."""
    return decay.unflatten(1, (plan.segments, -1)).prod(2, dtype=torch.float64)


def _saved_shape(plan: Plan) -> tuple[int, ...]:
    """Return the shape of the states before the ranges; that before the first is known if there are no segments."""
    return (max(0, len(plan.ranges) - (plan.segments == 1)), *plan.state)


def _new_state(q: Tensor, v: Tensor, packed: list[int]) -> Tensor:
    """Allocate a state per sequence."""
    return q.new_empty((len(packed) or q.shape[0], v.shape[2], q.shape[3], v.shape[3]), dtype=torch.float32)


@_forward.register_fake
def _(*args):
    q, _, v, decay, _, _, packed, keep = args
    state, plan = _new_state(q, v, packed), Plan(q.shape, v.shape, v.dtype, decay.ndim == 4, tuple(packed), q.device)
    saved = state.new_empty(_saved_shape(plan) if keep else (0,))
    return torch.empty_like(v, memory_format=torch.contiguous_format), state, saved


@operator("statetrack::gated_linear_attention_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    saved: Tensor,
    d_out: Tensor,
    d_final: Tensor | None,
    scale: float,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, decay, d_out = (t.contiguous() for t in (q, k, v, decay, d_out.to(v.dtype)))
    initial, ends = (None if t is None else t.float().contiguous() for t in (initial_state, d_final))
    plan = plan_of(q, v, decay, packed)
    dv, d_decay = torch.empty_like(v), torch.empty_like(decay, dtype=torch.float32)
    d_state = q.new_empty(plan.state, dtype=torch.float32)
    if plan.most == 0:
        d_state = d_state.zero_() if ends is None else d_state.copy_(ends)
        return torch.zeros_like(q), torch.zeros_like(k), dv, d_decay.to(decay.dtype), d_state
    parts = plan.HV // plan.HK if plan.key else plan.parts  # summed afterwards
    shape, dtype = ((parts, *q.shape), torch.float32) if parts > 1 else (q.shape, q.dtype)
    dq, dk = q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)
    work = plan.workspace(q, k)
    if plan.segments > 1:
        if plan.key:
            for chunks in reversed(plan.ranges):
                plan.prepare(work, q, k, decay, chunks)
                _walk_back(plan, work, d_out, scale, None if chunks[1] == plan.most else d_state, chunks, d_state)
        else:
            _end_of_segment(plan, decay, d_out, q, scale, d_state, back=True)
        ends = compose_factors(_totals(plan, decay), d_state, ends, torch.empty_like(d_state), plan.segments, back=True)
    before = [*saved.unbind(0)] if plan.segments > 1 else [initial, *saved.unbind(0)]
    states, d_states = (q.new_empty((plan.pairs, plan.HV, plan.V, plan.K), dtype=plan.low) for _ in range(2))
    gather = _gather_key if plan.key else _gather_head(plan, q)
    for chunks, state in zip(reversed(plan.ranges), reversed(before), strict=True):
        plan.prepare(work, q, k, decay, chunks)
        _walk(plan, work, v, scale, state, chunks, states=states)
        _walk_back(plan, work, d_out, scale, ends, chunks, d_state, d_states, dv)
        ends = d_state
        gather(plan, chunks, scale, (q, k, v, decay, d_out), work[3], (states, d_states), (dq, dk, d_decay))
    if parts > 1:
        dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype)
    if plan.segments > 1:
        d_state = d_state.unflatten(0, (-1, plan.segments))[:, 0].contiguous()
    return dq, dk, dv, d_decay.to(decay.dtype), d_state


def _gather_key(plan: Plan, chunks: Range, scale: float, inputs, _, states, grads) -> None:
    """Launch what writes the gradients of a range of chunks, with one decay per key channel."""
    (low, high), pairs = chunks, plan.pairs_of(*chunks)
    numbers = plan.T, low, high - low, scale, *plan.widths, inputs[0].numel()
    grid = pairs * plan.HV, triton.cdiv(plan.K, plan.tree["BK"])
    plan.launch("gather_key")(grid, (*inputs, *states, *grads, plan.starts, plan.slots), numbers)


def _gather_head(plan: Plan, like: Tensor) -> Callable[..., None]:
    """Return the launches of what writes the gradients of a range of chunks, with one decay per head."""
    edges = like.new_empty((plan.decay_head["NE"], plan.pairs, plan.HV, 3, CHUNK), dtype=torch.float32)
    crossing = like.new_empty((plan.pairs, plan.HV, CHUNK), dtype=torch.float32)
    shared = like.new_empty((plan.pairs * plan.HK * plan.parts, CHUNK, CHUNK), dtype=plan.low)
    split, stride = (plan.HV // plan.HK // plan.parts, plan.parts), 3 * crossing.numel()
    where = plan.starts, plan.slots

    def run(plan: Plan, chunks: Range, scale: float, inputs, G, states, grads) -> None:
        q, k, v, decay, d_out = inputs
        dq, dk, d_decay = grads
        (low, high), pairs = chunks, plan.pairs_of(*chunks)
        spread, numbers = pairs * plan.HK * plan.parts, (plan.T, low, high - low, scale, *plan.widths)
        plan.launch("pairs_head")((spread,), (q, k, v, d_out, G, shared, crossing, *where), (*numbers, *split))
        plan.launch("gather_head")(
            (spread, plan.decay_head["NE"]),
            (q, k, v, d_out, G, *states, shared, dq, dk, edges, *where),
            (*numbers, *split, q.numel(), stride),
        )
        grid = pairs, triton.cdiv(plan.HV, HEADS)
        tensors = q, k, v, d_out, decay, G, edges, crossing, d_decay, *where
        plan.launch("decay_head")(grid, tensors, (*numbers, stride))

    return run


@_backward.register_fake
def _(*args):
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in args[:4])
    return *grads, _new_state(args[0], args[2], args[9])


def _save_for_backward(ctx, inputs, output):
    q, k, v, decay, initial_state, ctx.scale, ctx.packed, _ = inputs
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, decay, initial_state, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _run_backward(ctx, d_out, d_final, _):
    *inputs, saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(inputs[2])
    *grads, d_state = _backward(*inputs, saved, d_out, d_final, ctx.scale, ctx.packed)
    return *grads, None if ctx.state_dtype is None else d_state.to(ctx.state_dtype), None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)


@operator("statetrack::gated_linear_attention_step")
def _step(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    state = state.contiguous().float()
    final = torch.empty_like(state)
    return _launch_step(q, k, v, decay, state, scale, final), final


@_step.register_fake
def _(*args):
    _, _, v, _, state, _ = args
    final = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(v, memory_format=torch.contiguous_format), final


@operator("statetrack::gated_linear_attention_step_", mutates=("state",))
def gated_linear_attention_step_(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, scale: float) -> Tensor:
    """Take one token (T = 1) and update the float32 state [B H K V] in place; return o. No gradients."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise UsageError(f"state must be contiguous float32, got {state.dtype} with strides {state.stride()}")
    return _launch_step(q, k, v, decay, state, scale, state)


@gated_linear_attention_step_.register_fake
def _(*args):
    return torch.empty_like(args[2], memory_format=torch.contiguous_format)


def _launch_step(q, k, v, decay, state, scale, final) -> Tensor:
    q, k, v, decay = (t.contiguous() for t in (q, k, v, decay))
    (B, _, HK, K), (HV, V) = q.shape, v.shape[2:]
    o = torch.empty_like(v)
    BV = 16 if B * HV * V < 32 * FULL_GPU else 32
    launch = bind(step, BK=max(16, triton.next_power_of_2(K)), BV=BV, KEY=decay.ndim == 4, num_warps=4)
    launch((B * HV, triton.cdiv(V, BV)), (q, k, v, decay, state, o, final), (scale, HK, HV, K, V))
    return o
