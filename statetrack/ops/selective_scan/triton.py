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

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.layout import chunk_tables
from statetrack.ops.selective_scan.triton_backward import adjoint, backward, unpack
from statetrack.ops.selective_scan.triton_forward import forward, pack
from statetrack.ops.selective_scan.triton_kernels import step
from statetrack.ops.triton_operator import operator


@dataclass(frozen=True)
class Schedule:
    """How many tokens, channels and states a thread takes (see triton_forward.py), and the warps of a program.

    A thread takes more states where a warp would not hold them. REGS limits a thread's
    registers, so that more threads fit; 0 does not. SUB, of the backward alone: how many times TOK tokens lie between
    kept states.
    """

    TOK: int
    CH: int
    K: int
    WARPS: int
    REGS: int = 0
    SUB: int = 1

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.TOK * self.SUB

    def threads(self, M: int) -> dict[str, int]:
        """Return the kernels' parameters for M states."""
        every = triton.next_power_of_2(M)
        K = min(every, max(self.K, every // 32))
        return {"TOK": self.TOK, "CH": self.CH, "K": K, "G": every // K, "N": 32 * self.WARPS}

    def blocks(self, D: int, M: int) -> int:
        """Programs that D channels take."""
        return -(-D // (32 * self.WARPS // self.threads(M)["G"] * self.CH))


FORWARD = [Schedule(8, 2, 4, 4), Schedule(8, 1, 2, 4)]  # many channels, few
BACKWARD = [Schedule(4, 2, 4, 4, 168, 8), Schedule(8, 1, 2, 4, 168, 4)]  # a tile is a multiple of the forward's TOK
FULL_GPU = 2000  # warps that keep a GPU busy
MIN_SEGMENT = 1024  # tokens
PACKED = 4096  # values that one program of `pack` or `unpack` takes


def selective_scan_triton(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    eigenvalues: tuple[float, float],
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `selective_scan` on a GPU, with gradients to every tensor (once differentiable)."""
    lo, hi = (float(x) for x in eigenvalues)
    given = [t for t in (u, dt, A, B, C, D, z, initial_state) if t is not None]
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    packed = [] if u.shape[0] == len(lengths) else lengths
    if u.shape[1] == 1 and not packed and not keep:
        return _step(u, dt, A, B, C, D, z, initial_state, lo, hi)
    y, state, _ = _forward(u, dt, A, B, C, D, z, initial_state, lo, hi, packed, keep)
    return y, state


class _Plan:
    """The sizes and schedules that all launches of one call share."""

    def __init__(self, u: Tensor, M: int, packed: list[int], keep: bool):
        (B, T, self.D), self.M = u.shape, M
        self.varlen, self.packed = len(packed) > 0, tuple(packed)
        self.S, self.T, self.device, self.rows = len(packed) if self.varlen else B, T, u.device, B * T
        for size in range(len(FORWARD)):
            self.size, self.forward, self.backward = size, FORWARD[size], BACKWARD[size]
            warps = self.programs(self.forward) * self.forward.WARPS
            self.segments = 1 if self.varlen else segments(warps, T, self.backward.tile)
            if warps * self.segments >= FULL_GPU:
                break
        self.every = self.backward.tile // self.forward.tile if keep else 1
        if not self.varlen:
            self.S, self.T = B * self.segments, T // self.segments

    def programs(self, schedule: Schedule) -> int:
        """Return how many programs walk."""
        return self.S * schedule.blocks(self.D, self.M)

    def slots(self) -> int:
        """Return how many (sequence, tile of the backward) pairs there are."""
        lengths = self.packed or [self.T] * self.S
        return sum(-(-length // self.backward.tile) for length in lengths)

    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """Return packed sequences' offsets, and each one's first slot."""
        if not self.varlen:
            return None, None
        starts, _, bases = chunk_tables(self.packed, self.backward.tile, self.device)
        return starts, bases

    def options(self, schedule: Schedule, hi: float) -> dict:
        """Return the compile-time choices of a walk."""
        threads = schedule.threads(self.M)
        channels = threads["N"] // threads["G"] * schedule.CH
        full = not self.varlen and self.T % schedule.tile == 0 and self.D % channels == 0
        limit = {"maxnreg": schedule.REGS} if schedule.REGS else {}
        rest = {"WHOLE": hi == 1, "FULL": full, "VARLEN": self.varlen, "num_warps": schedule.WARPS}
        return {"D": self.D} | threads | limit | rest

    def pack(self, schedule: Schedule, B: Tensor, C: Tensor) -> Tensor:
        """Return B and C as the walks of this schedule read them."""
        grid, sizes, width = self._packing(schedule)
        out = torch.empty(self.rows, width, dtype=torch.float32, device=self.device)
        pack[grid](B, C, out, self.rows, self.M, **sizes)
        return out

    def unpack(self, parts: Tensor, dB: Tensor, dC: Tensor) -> None:
        """Sum the blocks' parts into dB and dC."""
        grid, sizes, _ = self._packing(self.backward)
        unpack[grid](parts, dB, dC, self.rows, self.M, parts.shape[0], parts[0].numel(), **sizes)

    def _packing(self, schedule: Schedule) -> tuple[tuple[int], dict[str, int], int]:
        threads = schedule.threads(self.M)
        width = 2 * threads["G"] * threads["K"]
        BT = max(1, PACKED // width)
        return (-(-self.rows // BT),), {"G": threads["G"], "K": threads["K"], "BT": BT}, width

    def compose(self, P: Tensor, c: Tensor, first: Tensor, adjoint: bool) -> Tensor:
        """Return each segment's initial state [S M D] under h <- P h + c; from the last segment back if adjoint."""
        P, c = (x.unflatten(0, (-1, self.segments)) for x in (P, c))
        state, out = first.double(), [first] * self.segments
        for s in range(self.segments - 1, -1, -1) if adjoint else range(self.segments):
            out[s] = state.float()
            state = P[:, s] * state + c[:, s]
        return torch.stack(out, 1).flatten(0, 1)


def segments(warps: int, T: int, tile: int) -> int:
    """Return into how many segments to cut sequences of T tokens, given how many warps would walk whole ones."""
    count = 1
    while warps * count < FULL_GPU and T % (2 * count * tile) == 0 and T // (2 * count) >= MIN_SEGMENT:
        count *= 2
    return count


def _walk(plan: _Plan, u, dt, z, rates, BC, skip, state, lo, hi, y=None, saved=None) -> Tensor | None:
    """Launch `forward`; without y, return the product of the eigenvalues."""
    chosen = plan.forward
    product = torch.empty_like(state) if y is None else None
    forward[(plan.programs(chosen),)](
        u, dt, z, rates, BC, skip, y, state, product, saved, *plan.tables(), plan.T, plan.M, plan.every, lo, hi - lo,
        OUTPUT=y is not None, SAVE=saved is not None, **plan.options(chosen, hi),
    )  # fmt: skip
    return product


def _rates(A: Tensor) -> Tensor:
    """Return A in units of log 2, [M D]."""
    return A.mT.float().contiguous() * math.log2(math.e)


def _inner(state: Tensor) -> Tensor:
    """Return a state [S D M] as the kernels keep it, a new tensor [S M D]."""
    return state.mT.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


@operator("statetrack::selective_scan_forward")
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    initial_state: Tensor,
    lo: float,
    hi: float,
    packed: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    u, dt, B, C, skip = (t.contiguous() for t in (u, dt, B, C, D.float()))
    z = None if z is None else z.contiguous()
    plan = _Plan(u, A.shape[1], packed, keep)
    y, state = torch.empty_like(u), _inner(initial_state)
    saved = state.new_empty(_saved_shape(plan) if keep else (0,))
    if u.numel() > 0:
        rates, BC = _rates(A), plan.pack(plan.forward, B, C)
        if plan.segments > 1:
            c = state.new_zeros(plan.S, plan.M, plan.D)
            P = _walk(plan, u, dt, z, rates, BC, skip, c, lo, hi)
            state = plan.compose(P, c, state, adjoint=False)
        _walk(plan, u, dt, z, rates, BC, skip, state, lo, hi, y, saved if keep else None)
        state = state.unflatten(0, (-1, plan.segments))[:, -1]
    return y, state.mT.contiguous(), saved


def _saved_shape(plan: _Plan) -> tuple[int, ...]:
    return (plan.slots(), plan.M, plan.D)


@_forward.register_fake
def _(*args):
    u, A, initial_state, packed, keep = args[0], args[2], args[7], args[10], args[11]
    state = torch.empty_like(initial_state, dtype=torch.float32, memory_format=torch.contiguous_format)
    saved = state.new_empty(_saved_shape(_Plan(u, A.shape[1], packed, keep)) if keep else (0,))
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
    d_final: Tensor,
    lo: float,
    hi: float,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    u, dt, B, C, skip, dy = (t.contiguous() for t in (u, dt, B, C, D.float(), dy))
    z = None if z is None else z.contiguous()
    du, d_dt, dB, dC = (torch.empty_like(t) for t in (u, dt, B, C))
    dz = u.new_empty(0) if z is None else torch.empty_like(z)
    plan = _Plan(u, A.shape[1], packed, keep=True)
    chosen, S, programs, options = plan.backward, plan.S, plan.programs(plan.backward), plan.options(plan.backward, hi)
    values = chosen.CH * options["K"]
    d_state = _inner(d_final)
    dA, d_skip = torch.zeros_like(d_state), d_state.new_zeros(S, options["G"], plan.D)
    if u.numel() > 0:
        rates, BC, (starts, bases) = _rates(A), plan.pack(chosen, B, C), plan.tables()
        if plan.segments > 1:
            c = d_state.new_zeros(S, plan.M, plan.D)
            P = torch.empty_like(c)
            adjoint[(programs,)](dt, z, rates, BC, dy, c, P, starts, plan.T, plan.M, lo, hi - lo, **options)
            d_state = plan.compose(P, c, d_state, adjoint=True)
            dA = torch.zeros_like(d_state)
        parts = d_state.new_empty(chosen.blocks(plan.D, plan.M), *BC.shape)
        scratch = d_state.new_empty(programs, chosen.SUB, values, options["N"])
        sums = d_state.new_empty(programs, chosen.WARPS, chosen.tile, BC.shape[1])
        backward[(programs,)](
            u, dt, z, rates, BC, skip, dy, saved, d_state, du, d_dt, dz, dA, d_skip, parts, scratch, sums, starts,
            bases, plan.T, plan.M, BC.numel(), lo, hi - lo, SUB=chosen.SUB, **options,
        )  # fmt: skip
        plan.unpack(parts, dB, dC)
        d_state = d_state.unflatten(0, (-1, plan.segments))[:, 0]
    else:
        dB.zero_()
        dC.zero_()
    dA, d_skip = dA.sum(0).mT * (hi - lo), d_skip.sum((0, 1))
    return du, d_dt, dA.contiguous().to(A.dtype), dB, dC, d_skip.to(D.dtype), dz, d_state.mT.contiguous()


@_backward.register_fake
def _(*args):
    u, dt, A, B, C, D, z, _, _, d_final = args[:10]
    grads = u, dt, A, B, C, D, u.new_empty(0) if z is None else z, d_final.float()
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads)


def _save_for_backward(ctx, inputs, output):
    u, dt, A, B, C, D, z, initial_state, ctx.lo, ctx.hi, ctx.packed, _ = inputs
    ctx.state_dtype, ctx.state_shape = initial_state.dtype, initial_state.shape
    ctx.save_for_backward(u, dt, A, B, C, D, z, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _run_backward(ctx, dy, d_final, _):
    *inputs, saved = ctx.saved_tensors
    u, z = inputs[0], inputs[6]
    if dy is None:
        dy = torch.zeros_like(u)
    if d_final is None:
        d_final = u.new_zeros(ctx.state_shape, dtype=torch.float32)
    *grads, dz, d_state = _backward(*inputs, saved, dy, d_final, ctx.lo, ctx.hi, ctx.packed)
    return *grads, None if z is None else dz, d_state.to(ctx.state_dtype), None, None, None, None


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
        step[(u.shape[0] * triton.cdiv(channels, rows),)](
            u, dt, z, A, B, C, D, state, y, final, channels, M, lo, hi - lo, BD=rows, BM=width, num_warps=4,
        )  # fmt: skip
    return y
