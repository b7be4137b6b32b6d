"""The delta rule on a GPU: launches of the Triton kernels, registered with torch.library.

Forward: `prepare` (every chunk's triangular inverse), then `walk` (the state, chunk after chunk). Backward, for a range
of chunks at a time so that its workspace stays small: `prepare` again, `walk_back`, `gather`. Saved between the two:
the inputs and the state at every chunk's start, in the type that the products take.

Letters: B batch, T tokens, S sequences, C tokens per chunk, N factors per token, H value heads, K key dim, V value dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.delta_rule.triton_backward import gather, walk_back
from statetrack.ops.delta_rule.triton_forward import ROWS, prepare, walk

PRECISIONS = ("tracking", "fast")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_DIM = 256
BACKWARD_RANGES = 8  # the backward's workspace is about this fraction of one for the whole sequence
MIN_RANGE = 8  # chunks


def unsupported(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> str | None:
    """Return why these inputs cannot run on the kernels, or None if they can."""
    N, K, V = k.shape[2], k.shape[-1], v.shape[-1]
    if v.dtype not in DTYPES:
        return f"dtype {v.dtype}; accepted: float32, bfloat16, float16"
    if max(K, V) > MAX_DIM:
        return f"K = {K}, V = {V}; accepted: up to {MAX_DIM}"
    if N > 8:
        return f"N = {N} factors per token; accepted: up to 8"
    if log_decay is not None and log_decay.ndim == 4:
        return "a decay per key channel; accepted: none or one per head"
    if v.numel() >= 2**31 * 8 or max(q.shape[1], 1) >= 2**31:
        return f"{v.numel()} values; accepted: fewer than 2^34"
    return None


def delta_rule_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    initial_state: Tensor,
    lengths: list[int],
    precision: str = "tracking",
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` on a GPU, with gradients to every tensor (once differentiable).

    precision="fast" takes one term in every product: about the speed and the error of other libraries' kernels.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r} is unknown; accepted: {', '.join(PRECISIONS)}")
    reason = unsupported(q, k, v, log_decay)
    if reason is not None:
        raise UsageError(f'backend="triton" does not take {reason}; use backend="chunk"')
    tensors = (q, k, v, beta, log_decay, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    packed = [] if q.shape[0] == len(lengths) else lengths
    terms = 2 if precision == "tracking" else 1
    o, state, _ = _forward(q, k, v, beta, log_decay, initial_state, scale, packed, terms, keep)
    return o, state


class _Plan:
    """The sizes and the compile-time choices that all launches of one call share."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, packed: list[int], terms: int):
        self.B, self.T, self.HK, self.K = q.shape
        self.N, self.HV, self.V = k.shape[2], v.shape[3], v.shape[4]
        self.C = ROWS // self.N
        self.varlen = len(packed) > 0
        if self.varlen:
            self.S, self.most = len(packed), -(-max(packed) // self.C)
            self.starts, self.slots, self.bases = _tables(tuple(packed), self.C, q.device)
            self.chunks = self.slots.shape[0]
        else:
            self.S, self.most = self.B, -(-self.T // self.C)
            self.starts = self.slots = self.bases = None
            self.chunks = self.S * self.most
        exact = v.dtype != torch.bfloat16
        self.low = torch.float32 if exact else torch.bfloat16
        BK = max(16, triton.next_power_of_2(self.K))
        self.shapes = {"N": self.N, "C": self.C, "BK": BK}
        self.common = {"GATE": log_decay is not None, "VARLEN": self.varlen, "EXACT": exact}
        self.BQ = max(16, triton.next_power_of_2(self.C))
        self.BV = walk_columns(self.V, BK, exact)
        even = not self.varlen and self.T % self.C == 0 and ROWS % self.N == 0 and self.BQ == self.C
        even = even and BK == self.K and self.V % self.BV == 0
        self.walk = {"EVEN": even, "TERMS": terms, "BQ": self.BQ, "BV": self.BV, **walk_schedule(BK, exact)}
        wide = min(64 if BK <= 128 and not exact else 32 if BK <= 128 else 16, triton.next_power_of_2(self.V))
        self.gather = {"BQ": self.BQ, "BV": max(16, wide), "num_warps": 8, "num_stages": 1}

    def workspace(self, slots: int, device: torch.device, terms: int) -> dict[str, Tensor]:
        """Allocate what `prepare` writes for this many (sequence, chunk) pairs."""
        shape = (slots, self.HV, ROWS)
        high = torch.empty(*shape, ROWS, dtype=self.low, device=device)
        two = terms == 2 and self.low == torch.bfloat16
        return {
            "X_hi": high,
            "X_lo": torch.empty_like(high) if two else high,
            "scales": torch.empty(slots, self.HV, 3, ROWS, device=device),
            "G": torch.empty(shape if self.common["GATE"] else (1,), dtype=torch.float64, device=device),
        }

    def prepare(self, k: Tensor, beta: Tensor, log_decay: Tensor | None, low: int, high: int, terms: int):
        """Run `prepare` on the chunks [low, high) of every sequence (all chunks of packed ones)."""
        slots = self.chunks if self.varlen else self.S * (high - low)
        work = self.workspace(slots, k.device, terms)
        sizes = self.T, low, high - low, self.HK, self.HV, self.K
        prepare[(slots, self.HV)](
            k, beta, log_decay, work["X_hi"], work["X_lo"], work["scales"], work["G"], self.starts, self.slots,
            *sizes, **self.shapes, **self.common, num_warps=4, num_stages=1,
        )  # fmt: skip
        return work


def walk_columns(V: int, BK: int, exact: bool) -> int:
    """Return how many value columns of the state one program walks with."""
    return 32 if exact and BK == 256 else 64


def walk_schedule(BK: int, exact: bool) -> dict[str, int]:
    """Return warps and pipeline depth of the two walks."""
    if exact:
        return {"num_warps": 8 if BK > 64 else 4, "STAGES": 1}
    return {"num_warps": 8 if BK == 256 else 4, "STAGES": 1 if BK == 256 else 2}


@lru_cache(maxsize=16)
def _tables(lengths: tuple[int, ...], C: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the packed sequences' offsets, their (sequence, chunk) pairs, and each one's first pair."""
    starts, pairs, bases = [0], [], []
    for s, length in enumerate(lengths):
        starts.append(starts[-1] + length)
        bases.append(len(pairs))
        pairs += [(s, c) for c in range(-(-length // C))]
    pairs = torch.tensor(pairs, dtype=torch.int32).view(-1, 2)
    make = lambda x: torch.tensor(x, dtype=torch.int32, device=device)  # noqa: E731
    return make(starts), pairs.to(device), make(bases)


@torch.library.custom_op("statetrack::delta_rule_forward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, beta, initial = (t.contiguous() for t in (q, k, v, beta, initial_state.float()))
    log_decay = None if log_decay is None else log_decay.contiguous()
    plan = _Plan(q, k, v, log_decay, packed, terms)
    o, final = torch.empty_like(v[:, :, 0]), torch.empty_like(initial)
    saved = v.new_empty(_saved_shape(plan, keep), dtype=plan.low)
    if plan.chunks == 0:
        return o, final.copy_(initial), saved
    work = plan.prepare(k, beta, log_decay, 0, plan.most, terms)
    grid = (triton.cdiv(plan.V, plan.BV), plan.S * plan.HV)
    walk[grid](
        q, k, v, work["X_hi"], work["X_lo"], work["scales"], work["G"], initial, o, final, saved,
        plan.starts, plan.bases, plan.T, scale, plan.HK, plan.HV, plan.K, plan.V,
        SAVE=keep, OUTPUT=True, **plan.shapes, **plan.common, **plan.walk,
    )  # fmt: skip
    return o, final, saved


def _saved_shape(plan: _Plan, keep: bool) -> tuple[int, ...]:
    return (plan.chunks, plan.HV, plan.V, plan.K) if keep else (0,)


@_forward.register_fake
def _(q, k, v, beta, log_decay, initial_state, scale, packed, terms, keep):
    C = ROWS // k.shape[2]
    chunks = sum(-(-n // C) for n in packed) if packed else q.shape[0] * (-(-q.shape[1] // C))
    low = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (chunks, v.shape[3], v.shape[4], q.shape[3]) if keep else (0,)
    state = torch.empty_like(initial_state, dtype=torch.float32, memory_format=torch.contiguous_format)
    return v.new_empty(v.shape[:2] + v.shape[3:]), state, v.new_empty(shape, dtype=low)


@torch.library.custom_op("statetrack::delta_rule_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    saved: Tensor,
    d_out: Tensor,
    d_final: Tensor,
    scale: float,
    packed: list[int],
    terms: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, beta, d_out, d_final = (t.contiguous() for t in (q, k, v, beta, d_out.to(v.dtype), d_final.float()))
    log_decay = None if log_decay is None else log_decay.contiguous()
    plan = _Plan(q, k, v, log_decay, packed, terms)
    groups = plan.HV // plan.HK
    heads = lambda x: torch.empty(  # noqa: E731
        *x.shape[:-2], plan.HV, plan.K, dtype=x.dtype if groups == 1 else torch.float32, device=x.device
    )
    dq, dk, dv = heads(q), heads(k), torch.empty_like(v)
    d_beta = torch.empty(beta.shape, device=q.device)
    d_decay = d_beta.new_empty(() if log_decay is None else log_decay.shape)
    d_state = d_final.clone()
    if scale == 0.0:
        d_out, walk_scale = torch.zeros_like(d_out), 1.0
    else:
        walk_scale = scale
    grid = (triton.cdiv(plan.V, plan.BV), plan.S * plan.HV)
    for low, high in _ranges(plan):
        work = plan.prepare(k, beta, log_decay, low, high, terms)
        slots = work["X_hi"].shape[0]
        d_saved = torch.empty(slots, plan.HV, plan.V, plan.K, dtype=plan.low, device=q.device)
        walk_back[grid](
            q, k, d_out, work["X_hi"], work["X_lo"], work["scales"], work["G"], d_state, d_state, dv, d_saved,
            plan.starts, plan.bases, plan.T, low, high, walk_scale, plan.HK, plan.HV, plan.K, plan.V,
            **plan.shapes, **plan.common, **plan.walk,
        )  # fmt: skip
        gather[(slots, plan.HV)](
            q, k, v, log_decay, d_out, work["X_hi"], work["scales"], work["G"], saved, d_saved, dv, dq, dk, d_beta,
            d_decay, plan.starts, plan.slots, plan.T, low, high - low, plan.most, scale, plan.HK, plan.HV, plan.K,
            plan.V, **plan.shapes, **plan.common, **plan.gather,
        )  # fmt: skip
    if groups > 1:
        dq, dk = (x.unflatten(-2, (plan.HK, groups)).sum(-2) for x in (dq, dk))
    d_decay = d_decay if log_decay is None else d_decay.to(log_decay.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv, d_beta.to(beta.dtype), d_decay, d_state


def _ranges(plan: _Plan) -> list[tuple[int, int]]:
    """Return the ranges of chunks that the backward takes one after another, last one first."""
    if plan.chunks == 0:
        return []
    if plan.varlen:
        return [(0, plan.most)]
    step = max(MIN_RANGE, -(-plan.most // BACKWARD_RANGES))
    return [(low, min(low + step, plan.most)) for low in range(0, plan.most, step)][::-1]


@_backward.register_fake
def _(q, k, v, beta, log_decay, saved, d_out, d_final, scale, packed, terms):
    new = lambda x: torch.empty_like(x, memory_format=torch.contiguous_format)  # noqa: E731
    d_decay = beta.new_empty((), dtype=torch.float32) if log_decay is None else new(log_decay)
    return new(q), new(k), new(v), new(beta), d_decay, new(d_final.float())


def _save_for_backward(ctx, inputs, output):
    q, k, v, beta, log_decay, initial_state, ctx.scale, ctx.packed, ctx.terms, _ = inputs
    ctx.state_dtype = initial_state.dtype
    ctx.save_for_backward(q, k, v, beta, log_decay, output[2])
    ctx.mark_non_differentiable(output[2])


def _run_backward(ctx, d_out, d_final, _):
    q, k, v, beta, log_decay, saved = ctx.saved_tensors
    dq, dk, dv, d_beta, d_decay, d_state = _backward(
        q, k, v, beta, log_decay, saved, d_out, d_final, ctx.scale, ctx.packed, ctx.terms
    )
    d_decay = None if log_decay is None else d_decay
    return dq, dk, dv, d_beta, d_decay, d_state.to(ctx.state_dtype), None, None, None, None


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)
