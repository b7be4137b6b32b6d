"""The selective scan on a GPU: launches of the Triton kernels, registered with torch.library.

Forward: `pack` (B and C in the order in which threads read them), then `forward`, one walk over the tokens, which
keeps the state before every tile of the backward if there will be one. Backward: `pack`, then `backward`, one walk back
that runs the states again tile by tile, and `unpack`, the sum of what blocks of channels gave to dB and dC, in a fixed
order.
One token without gradients is one kernel, `step`.

With few channels the sequences are also cut into segments, which are walked side by side twice: from a zero state
(giving c, and the product P of the eigenvalues), and, once h <- P h + c has been taken over the segments in float64,
from their true initial states. The adjoint likewise.

Letters: B batch, T tokens, S sequences, D channels, M states per channel.
"""

# Launches take constexpr parameters and options that no signature shows:
# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.selective_scan.triton_kernels import step
from statetrack.ops.selective_scan.triton_plan import Plan, plan_of
from statetrack.ops.triton_launch import bind
from statetrack.ops.triton_operator import operator
from statetrack.ops.triton_segments import compose_factors


def selective_scan_triton(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    eigenvalues: tuple[float, float],
    initial_state: Tensor | None,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` on a GPU, with gradients to every tensor (once differentiable)."""
    lo, hi = (float(x) for x in eigenvalues)
    given = [t for t in (u, dt, A, B, C, D, z, initial_state) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    packed = [] if u.shape[0] == len(lengths) else lengths
    if u.shape[1] == 1 and not packed and not keep:
        state = _new_state(u, A, []).zero_() if initial_state is None else initial_state
        return _step(u, dt, A, B, C, D, z, state, lo, hi)
    y, state, _ = _forward(u, dt, A, B, C, D, z, initial_state, lo, hi, packed, keep)
    return y, state


@operator("statetrack::selective_scan_forward")
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_state: Tensor | None,
    lo: float,
    hi: float,
    packed: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    u, dt, A, B, C, skip = (t.contiguous() for t in (u, dt, A.float(), B, C, D.float()))
    z = None if z is None else z.contiguous()
    state = None if initial_state is None else initial_state.float().contiguous()
    plan = plan_of(u, A, packed, hi)
    y, final = torch.empty_like(u), u.new_empty(plan.state, dtype=torch.float32)
    saved = final.new_empty(_saved_shape(plan) if keep else (0,))
    if u.numel() == 0:
        return y, final.zero_() if state is None else final.copy_(state), saved
    BC = plan.pack(plan.forward, B, C)
    grid, where, numbers = plan.grid(plan.forward), (plan.starts, plan.bases), (plan.T, plan.every, lo, hi - lo)
    if plan.segments > 1:
        P, c = torch.empty_like(final), final
        plan.walk(False, False)(grid, (u, dt, z, A, BC, skip, None, None, c, P, None, *where), numbers)
        state = compose_factors(P, c, state, torch.empty_like(c), plan.segments, back=False)
    kept = saved if keep else None
    plan.walk(keep, True)(grid, (u, dt, z, A, BC, skip, y, state, final, None, kept, *where), numbers)
    if plan.segments > 1:
        final = final.unflatten(0, (-1, plan.segments))[:, -1].contiguous()
    return y, final, saved


def _saved_shape(plan: Plan) -> tuple[int, ...]:
    return (plan.slots(), plan.M, plan.D)


def _new_state(u: Tensor, A: Tensor, packed: list[int]) -> Tensor:
    """Allocate a state per sequence."""
    return u.new_empty((len(packed) or u.shape[0], *A.shape), dtype=torch.float32)


@_forward.register_fake
def _(*args):
    u, A, hi, packed, keep = args[0], args[2], args[9], args[10], args[11]
    state, plan = _new_state(u, A, packed), Plan(u.shape, A.shape[1], tuple(packed), hi == 1, u.device)
    saved = state.new_empty(_saved_shape(plan) if keep else (0,))
    return torch.empty_like(u, memory_format=torch.contiguous_format), state, saved


@operator("statetrack::selective_scan_backward")
def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    d_final: Tensor | None,
    lo: float,
    hi: float,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    u, dt, A32, B, C, skip, dy = (t.contiguous() for t in (u, dt, A.float(), B, C, D.float(), dy))
    z = None if z is None else z.contiguous()
    ends = None if d_final is None else d_final.float().contiguous()
    du, d_dt, dB, dC = (torch.empty_like(t) for t in (u, dt, B, C))
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    plan = plan_of(u, A, packed, hi, back=True)
    d_state = u.new_empty(plan.state, dtype=torch.float32)
    if u.numel() == 0:
        d_state = d_state.zero_() if ends is None else d_state.copy_(ends)
        return du, d_dt, torch.zeros_like(A), dB.zero_(), dC.zero_(), torch.zeros_like(D), dz, d_state
    BC, grid = plan.pack(plan.backward, B, C), plan.grid(plan.backward)
    if plan.segments > 1:
        P = torch.empty_like(d_state)
        tensors, numbers = (dt, z, A32, BC, dy, d_state, P, plan.starts), (plan.T, lo, hi - lo)
        plan.walk_back(False)(grid, tensors, numbers)
        ends = compose_factors(P, d_state, ends, torch.empty_like(d_state), plan.segments, back=True)
    dA, parts = torch.empty_like(d_state), d_state.new_empty((plan.blocks, *BC.shape))
    d_skip, scratch, sums = (d_state.new_empty(shape) for shape in plan.backward.memory(plan.S, plan.D, plan.M))
    plan.walk_back(True)(
        grid,
        (u, dt, z, A32, BC, skip, dy, saved, ends, d_state, du, d_dt, dz, dA, d_skip, parts, scratch, sums,
         plan.starts, plan.bases),
        (plan.T, BC.numel(), lo, hi - lo),
    )  # fmt: skip
    plan.unpack(parts, dB, dC)
    if plan.segments > 1:
        d_state = d_state.unflatten(0, (-1, plan.segments))[:, 0].contiguous()
    return du, d_dt, dA.sum(0).to(A.dtype), dB, dC, d_skip.sum((0, 1)).to(D.dtype), dz, d_state


@_backward.register_fake
def _(*args):
    u, dt, A, B, C, D, z = args[:7]
    grads = u, dt, A, B, C, D, u.new_empty(0) if z is None else z
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads)
    return *grads, _new_state(u, A, args[12])


def _save_for_backward(ctx, inputs, output):
    u, dt, A, B, C, D, z, initial_state, ctx.lo, ctx.hi, ctx.packed, _ = inputs
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(u, dt, A, B, C, D, z, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _run_backward(ctx, dy, d_final, _):
    *inputs, saved = ctx.saved_tensors
    u, z = inputs[0], inputs[6]
    if dy is None:
        dy = torch.zeros_like(u)
    *grads, dz, d_state = _backward(*inputs, saved, dy, d_final, ctx.lo, ctx.hi, ctx.packed)
    d_state = None if ctx.state_dtype is None else d_state.to(ctx.state_dtype)
    return *grads, None if z is None else dz, d_state, None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)


@operator("statetrack::selective_scan_step")
def _step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    lo: float,
    hi: float,
) -> tuple[Tensor, Tensor]:
    state = state.contiguous().float()
    final = torch.empty_like(state)
    return _launch_step(u, dt, A, B, C, D, z, state, lo, hi, final), final


@_step.register_fake
def _(*args):
    u, state = args[0], args[7]
    final = torch.empty_like(state, dtype=torch.float32, memory_format=torch.contiguous_format)
    return torch.empty_like(u, memory_format=torch.contiguous_format), final


@operator("statetrack::selective_scan_step_", mutates=("state",))
def selective_scan_step_(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    state: Tensor,
    lo: float,
    hi: float,
) -> Tensor:
    """Take one token (T = 1) and update the float32 state [B D M] in place; return y. No gradients."""
    if state.dtype != torch.float32 or not state.is_contiguous():
        raise UsageError(f"state must be contiguous float32, got {state.dtype} with strides {state.stride()}")
    return _launch_step(u, dt, A, B, C, D, z, state, lo, hi, state)


@selective_scan_step_.register_fake
def _(*args):
    return torch.empty_like(args[0], memory_format=torch.contiguous_format)


def _launch_step(u, dt, A, B, C, D, z, state, lo, hi, final) -> Tensor:
    u, dt, A, B, C, D = (t.contiguous() for t in (u, dt, A.float(), B, C, D.float()))
    z = None if z is None else z.contiguous()
    y, (channels, M) = torch.empty_like(u), A.shape
    width = triton.next_power_of_2(M)
    rows = max(1, 1024 // width)
    if u.numel() > 0:
        grid = (u.shape[0] * -(-channels // rows),)
        launch = bind(step, BD=rows, BM=width, num_warps=4)
        launch(grid, (u, dt, z, A, B, C, D, state, y, final), (channels, M, lo, hi - lo))
    return y
