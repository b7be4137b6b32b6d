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

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.gated_linear_attention.triton_head import (
    decay_head,
    gather_head,
    pairs_head,
    prepare_head,
    scores_head,
)
from statetrack.ops.gated_linear_attention.triton_key import gather_key, prepare_key
from statetrack.ops.gated_linear_attention.triton_walk import FACTORS, end_of_segment, step, walk, walk_back
from statetrack.ops.layout import chunk_tables
from statetrack.ops.triton_operator import operator

CHUNK = 64
RANGE_BYTES = 2**27  # of the states at the starts of a range's chunks
MIN_RANGE = 8  # chunks
FULL_GPU = 256  # programs of `walk` that keep a GPU busy
MIN_SEGMENT = 16  # chunks
HEADS = 16  # that one program of `prepare_head` or `decay_head` takes
GATHERERS = 512  # programs of `pairs_head` that keep a GPU busy


def gated_linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """Compute `gated_linear_attention` on a GPU, with gradients to every tensor (once differentiable)."""
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, decay, initial_state))
    packed = [] if q.shape[0] == len(lengths) else lengths
    if q.shape[1] == 1 and not packed and not keep:
        return _step(q, k, v, decay, initial_state, scale)
    o, state, _ = _forward(q, k, v, decay, initial_state, scale, packed, keep)
    return o, state


class _Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(self, q: Tensor, v: Tensor, decay: Tensor, packed: list[int]):
        self.B, self.T, self.HK, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.key = decay.ndim == 4
        self.varlen, self.segments = len(packed) > 0, 1
        exact = v.dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        BK = max(16, triton.next_power_of_2(self.K))
        BV = value_columns(self.V, BK, exact)
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // CHUNK)
            self.starts, self.slots, self.bases = chunk_tables(tuple(packed), CHUNK, q.device)
        else:
            self.segments = segments(self.B * self.HV * triton.cdiv(self.V, BV), self.T)
            self.S, self.T = self.B * self.segments, self.T // self.segments
            self.most = -(-self.T // CHUNK)
            self.starts = self.slots = self.bases = None
        self.every = max(1, self.most)
        if not self.varlen:
            chunk_bytes = self.S * self.HV * self.K * self.V * self.low.itemsize
            self.every = max(1, min(self.most, max(MIN_RANGE, RANGE_BYTES // max(1, chunk_bytes))))
        self.parts = 1  # among how many programs the value heads of a key head are split
        while self.pairs(0, min(self.every, self.most)) * self.HK * self.parts < GATHERERS and (
            self.HV // self.HK % (2 * self.parts) == 0
        ):
            self.parts *= 2
        rows = not self.varlen and self.T % CHUNK == 0

        def full(columns: int) -> int:
            return 0 if BK != self.K or self.V % columns else 2 if rows else 1

        self.common = {"C": CHUNK, "VARLEN": self.varlen, "EXACT": exact}
        self.walk = {
            "BK": BK, "BV": BV, "KEY": self.key, "FULL": full(BV),
            "STAGES": 1 if exact or BK == 256 else 2, "num_warps": 8 if BK == 256 or (exact and BK > 64) else 4,
        }  # fmt: skip
        channels = min(BK, 32 if exact else 64)
        columns = min(BV, 32 if exact else 64)
        inner = {"BV": columns, "NV": triton.cdiv(self.V, columns), "num_warps": 4}
        self.scores = {"BK": channels, "NK": triton.cdiv(self.K, channels), "num_warps": 4}
        self.pairs_head = self.scores | inner | {"FULL": full(columns), "STAGES": 1 if exact else 2}
        self.gather_head = inner | {"BK": channels, "FULL": full(columns), "STAGES": 1 if exact else 2}
        self.decay_head = self.scores | inner | {"NE": self.scores["NK"], "BH": HEADS}
        columns = max(16, min(64 if exact else 128, triton.next_power_of_2(self.V)))
        self.tree = {"BK": min(BK, 32), "BV": columns, "NV": triton.cdiv(self.V, columns), "num_warps": 8}
        columns = min(BK, 64 if exact else 128)
        self.blocks = {"BK": columns, "NK": triton.cdiv(self.K, columns), "num_warps": 8}

    def ranges(self) -> list[tuple[int, int]]:
        """Return the ranges of chunks that are taken one after another."""
        return [(low, min(low + self.every, self.most)) for low in range(0, self.most, self.every)]

    def pairs(self, low: int, high: int) -> int:
        """Return how many (sequence, chunk) pairs the chunks [low, high) of every sequence are (all of packed ones)."""
        return self.slots.shape[0] if self.slots is not None else self.S * (high - low)

    def prepare(
        self, q: Tensor, k: Tensor, decay: Tensor, low: int, high: int, scores: bool = True
    ) -> dict[str, Tensor]:
        """Return what the walks take for the chunks [low, high): q, k, k_lo, G, and P if its scores are wanted."""
        pairs = self.pairs(low, high)
        new = decay.new_empty
        P = new((pairs, self.HV, CHUNK, CHUNK) if scores or self.key else (0,), dtype=self.low)
        if not self.key:
            G = new((pairs, self.HV, FACTORS.value, CHUNK), dtype=torch.float32)
            prepare_head[(pairs, triton.cdiv(self.HV, HEADS))](
                decay, G, self.starts, self.slots, self.T, low, high - low, self.HV,
                C=CHUNK, BH=HEADS, VARLEN=self.varlen, num_warps=4,
            )  # fmt: skip
            if scores:
                scores_head[(pairs * self.HK * self.parts,)](
                    q, k, G, P, self.starts, self.slots, self.T, low, high - low, self.HK, self.HV, self.K,
                    self.HV // self.HK // self.parts, self.parts, **self.common, **self.scores,
                )  # fmt: skip
            return {"q": q, "k": k, "k_lo": k, "G": G, "P": P}
        tiles = (pairs, self.HV, CHUNK, self.K)
        work = {name: new(tiles, dtype=self.low) for name in ("q", "k")}
        work["k_lo"] = work["k"] if self.common["EXACT"] else new(tiles, dtype=self.low)
        work |= {"G": new((pairs, self.HV, self.K), dtype=torch.float32), "P": P}
        prepare_key[(pairs * self.HV,)](
            q, k, decay, *work.values(), self.starts, self.slots,
            self.T, low, high - low, self.HK, self.HV, self.K, **self.common, **self.blocks,
        )  # fmt: skip
        return work

    def grid(self) -> tuple[int, int]:
        """Return the grid of the two walks."""
        return self.S * self.HV, triton.cdiv(self.V, self.walk["BV"])


def value_columns(V: int, BK: int, exact: bool) -> int:
    """Return how many value columns of the state one program walks with."""
    return min(32 if exact and BK == 256 else 64, max(16, triton.next_power_of_2(V)))


def segments(programs: int, T: int) -> int:
    """Return into how many segments to cut sequences of T tokens, given how many programs would walk whole ones."""
    count = 1
    while programs * count < FULL_GPU and T % (2 * count * CHUNK) == 0 and T // (2 * count * CHUNK) >= MIN_SEGMENT:
        count *= 2
    return count


@operator("statetrack::gated_linear_attention_forward")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor,
    scale: float,
    packed: list[int],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, decay, initial = (t.contiguous() for t in (q, k, v, decay, initial_state.float()))
    plan = _Plan(q, v, decay, packed)
    o, saved = torch.empty_like(v), initial.new_empty(_saved_shape(plan) if keep else (0,))
    if plan.most == 0:
        return o, initial.clone(), saved
    if plan.segments > 1:
        if plan.key:
            c = initial.new_zeros(plan.S, plan.HV, plan.K, plan.V)
            for chunks in plan.ranges():
                c = _walk(plan, plan.prepare(q, k, decay, *chunks), v, scale, c, chunks)
        else:
            c = _end_of_segment(plan, q, k, decay, v, k, 1.0, back=False)
        initial = _compose(decay, c, initial, plan.segments, adjoint=False)
    state = initial
    for at, chunks in enumerate(plan.ranges()):
        if keep:
            saved[at] = state
        state = _walk(plan, plan.prepare(q, k, decay, *chunks), v, scale, state, chunks, o=o)
    return o, state.unflatten(0, (-1, plan.segments))[:, -1].contiguous(), saved


def _walk(
    plan: _Plan,
    work: dict[str, Tensor],
    v: Tensor,
    scale: float,
    initial: Tensor,
    chunks: tuple[int, int],
    o: Tensor | None = None,
    states: Tensor | None = None,
) -> Tensor:
    """Launch `walk` over a range of chunks; return the state after it."""
    final = torch.empty_like(initial)
    walk[plan.grid()](
        work["q"], work["k"], work["k_lo"], v, work["G"], work["P"], initial, o, final, states,
        plan.starts, plan.bases, plan.T, *chunks, scale, plan.HK, plan.HV, plan.K, plan.V,
        STATES=states is not None, OUTPUT=o is not None, **plan.common, **plan.walk,
    )  # fmt: skip
    return final


def _walk_back(
    plan: _Plan,
    work: dict[str, Tensor],
    d_out: Tensor,
    scale: float,
    d_final: Tensor,
    chunks: tuple[int, int],
    d_states: Tensor | None = None,
    dv: Tensor | None = None,
) -> Tensor:
    """Launch `walk_back` over a range of chunks; return the gradient to the state before it."""
    d_state = torch.empty_like(d_final)
    walk_back[plan.grid()](
        work["q"], work["k"], d_out, work["G"], work["P"], d_final, d_state, d_states, dv,
        plan.starts, plan.bases, plan.T, *chunks, scale, plan.HK, plan.HV, plan.K, plan.V,
        OUTPUT=d_states is not None, **plan.common, **plan.walk,
    )  # fmt: skip
    return d_state


def _end_of_segment(plan: _Plan, q, k, decay, x, y, scale: float, back: bool) -> Tensor:
    """Return what each segment adds to the state, or `back` to its gradient, with one decay per head."""
    G = plan.prepare(q, k, decay, 0, plan.most, scores=False)["G"]
    out = decay.new_empty((plan.S, plan.HV, plan.K, plan.V), dtype=torch.float32)
    options = {name: plan.walk[name] for name in ("BK", "BV", "FULL", "num_warps")}
    end_of_segment[plan.grid()](
        x, y, G, out, plan.T, plan.most, scale, plan.HK, plan.HV, plan.K, plan.V,
        C=CHUNK, BACK=back, EXACT=plan.common["EXACT"], **options,
    )  # fmt: skip
    return out


def _compose(decay: Tensor, c: Tensor, first: Tensor, count: int, adjoint: bool) -> Tensor:
    """Return each segment's initial state [S H K V] under S <- total S + c; from the last segment back if adjoint."""
    totals = decay.unflatten(1, (count, -1)).prod(2, dtype=torch.float64)
    totals = totals.unsqueeze(-1) if decay.ndim == 4 else totals[..., None, None]
    c, state, out = c.unflatten(0, (-1, count)), first.double(), [first] * count
    for s in range(count - 1, -1, -1) if adjoint else range(count):
        out[s] = state.float()
        state = totals[:, s] * state + c[:, s]
    return torch.stack(out, 1).flatten(0, 1)


def _saved_shape(plan: _Plan) -> tuple[int, ...]:
    return (len(plan.ranges()), plan.S, plan.HV, plan.K, plan.V)


@_forward.register_fake
def _(*args):
    q, _, v, decay, initial_state, _, packed, keep = args
    state = torch.empty_like(initial_state, dtype=torch.float32, memory_format=torch.contiguous_format)
    saved = state.new_empty(_saved_shape(_Plan(q, v, decay, packed)) if keep else (0,))
    return torch.empty_like(v, memory_format=torch.contiguous_format), state, saved


@operator("statetrack::gated_linear_attention_backward")
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    saved: Tensor,
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
    packed: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, decay, d_out, d_state = (t.contiguous() for t in (q, k, v, decay, d_out.to(v.dtype), d_final.float()))
    plan = _Plan(q, v, decay, packed)
    dv, d_decay = torch.empty_like(v), torch.empty(decay.shape, device=decay.device)
    if plan.most == 0:
        return torch.zeros_like(q), torch.zeros_like(k), dv, d_decay.to(decay.dtype), d_state.clone()
    parts = plan.HV // plan.HK if plan.key else plan.parts  # summed afterwards
    dq, dk = (q.new_empty(parts, *q.shape, dtype=torch.float32 if parts > 1 else q.dtype) for _ in range(2))
    if plan.segments > 1:
        if plan.key:
            c = d_state.new_zeros(plan.S, plan.HV, plan.K, plan.V)
            for chunks in reversed(plan.ranges()):
                c = _walk_back(plan, plan.prepare(q, k, decay, *chunks), d_out, scale, c, chunks)
        else:
            c = _end_of_segment(plan, q, k, decay, d_out, q, scale, back=True)
        d_state = _compose(decay, c, d_state, plan.segments, adjoint=True)
    for low, high in reversed(plan.ranges()):
        work = plan.prepare(q, k, decay, low, high)
        pairs = plan.pairs(low, high)
        states, d_states = (v.new_empty(pairs, plan.HV, plan.V, plan.K, dtype=plan.low) for _ in range(2))
        _walk(plan, work, v, scale, saved[low // plan.every], (low, high), states=states)
        d_state = _walk_back(plan, work, d_out, scale, d_state, (low, high), d_states, dv)
        where = plan.starts, plan.slots, plan.T, low, high - low, scale, plan.HK, plan.HV, plan.K, plan.V
        if plan.key:
            gather_key[(pairs * plan.HV, triton.cdiv(plan.K, plan.tree["BK"]))](
                q, k, v, decay, d_out, states, d_states, dq, dk, d_decay, *where, q.numel(), **plan.common, **plan.tree,
            )  # fmt: skip
        else:
            groups, spread = (plan.HV // plan.HK // parts, parts), pairs * plan.HK * parts
            shared = v.new_empty(spread, CHUNK, CHUNK, dtype=plan.low)
            edges = d_decay.new_empty(plan.decay_head["NE"], pairs, plan.HV, 3, CHUNK)
            crossing = d_decay.new_empty(pairs, plan.HV, CHUNK)
            pairs_head[(spread,)](
                q, k, v, d_out, work["G"], shared, crossing, *where, *groups, **plan.common, **plan.pairs_head
            )
            gather_head[(spread, plan.decay_head["NE"])](
                q, k, v, d_out, work["G"], states, d_states, shared, dq, dk, edges, *where,
                *groups, q.numel(), edges[0].numel(), **plan.common, **plan.gather_head,
            )  # fmt: skip
            decay_head[(pairs, triton.cdiv(plan.HV, HEADS))](
                q, k, v, d_out, decay, work["G"], edges, crossing, d_decay, *where,
                edges[0].numel(), **plan.common, **plan.decay_head,
            )  # fmt: skip
    dq, dk = (x.sum(0).to(q.dtype) if parts > 1 else x[0] for x in (dq, dk))
    return dq, dk, dv, d_decay.to(decay.dtype), d_state.unflatten(0, (-1, plan.segments))[:, 0].contiguous()


@_backward.register_fake
def _(*args):
    q, k, v, decay, d_final = *args[:4], args[6]
    grads = q, k, v, decay, d_final.float()
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in grads)


def _save_for_backward(ctx, inputs, output):
    q, k, v, decay, initial_state, ctx.scale, ctx.packed, _ = inputs
    ctx.state_dtype, ctx.state_shape = initial_state.dtype, initial_state.shape
    ctx.save_for_backward(q, k, v, decay, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _run_backward(ctx, d_out, d_final, _):
    q, k, v, decay, saved = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(v)
    if d_final is None:
        d_final = v.new_zeros(ctx.state_shape, dtype=torch.float32)
    *grads, d_state = _backward(q, k, v, decay, saved, d_out, d_final, ctx.scale, ctx.packed)
    return *grads, d_state.to(ctx.state_dtype), None, None, None


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
    step[(B * HV, triton.cdiv(V, BV))](
        q, k, v, decay, state, o, final, scale, HK, HV, K, V,
        BK=max(16, triton.next_power_of_2(K)), BV=BV, KEY=decay.ndim == 4, num_warps=4,
    )  # fmt: skip
    return o
