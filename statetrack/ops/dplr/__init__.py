"""Diagonal plus low rank: a decay per key channel and one rank-one correction per token, symmetric or not.

    S <- (diag(exp(log_decay_t)) + b_t a_t^T) S + k_t v_t^T;   o_t = scale S^T q_t

RWKV-7 is a = -kh, b = rate kh for a unit key kh. Without decay, b = -(e_i - e_j), a = e_i - e_j swaps rows i and j of
the state and b = e_r - e_q, a = e_q adds row q to row r and clears it: products of these are all maps of a finite set
to itself, so one layer with several tokens (micro-steps) per letter follows any automaton, to the last bit.

The decay is given as its logarithm, as in `delta_rule` and unlike in `gated_linear_attention`: here it need not be
signed (signs come from b a^T), layers have it as a logarithm, and in bfloat16 a logarithm holds decays near 1 that a
decay would round to 1.

References: Peng et al., RWKV-7, eq. 15 to 17 (arXiv 2503.14456); Siems et al., DeltaProduct, Theorems 6 and 8
(2502.10297).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops.checks import (
    TRITON_INSTALLED,
    TRITON_INTERPRETED,
    check_backend,
    check_same_dtype,
    check_shape,
    check_tensors,
    numba_chosen,
    sequence_lengths,
)
from statetrack.ops.dplr.chunk import dplr_chunk
from statetrack.ops.dplr.reference import dplr_reference
from statetrack.ops.layout import untraced_if_packed


@untraced_if_packed
def dplr(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    a: Float[Tensor, "B T H K"],
    b: Float[Tensor, "B T H K"],
    log_decay: Float[Tensor, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "S H K V"] | None = None,
    cu_seqlens: Int[Tensor, "offsets"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "S H K V"]]:
    """Multiply a matrix state by a diagonal plus rank-one matrix, write k v^T to it and read it with q, at every token.

    q and k may have fewer heads than v (H a multiple of Hk): value head h reads key head h // (H // Hk). Nothing keeps
    the transition a contraction: that is for whoever chooses a and b.

    Args:
        q: queries, read after the token's write.
        k: keys, as they are.
        v: values.
        a: what the state is read with before the token, a^T S: neither decay nor write of the token have happened.
        b: where that is added.
        log_decay: natural logarithm of the decay per key channel; -inf is an exact reset of the channel. Default: none.
        scale: factor of the output. Default: K ** -0.5.
        initial_state: state before the first token, one per sequence (S = B, or the number of packed sequences).
        cu_seqlens: offsets [0, ..., T] of sequences packed along T; needs B = 1.
        backend: "reference" (the definition), "chunk" (fast, CPU and GPU), "triton" (GPU kernels), "numba" (compiled,
            CPU only, faster) or "auto": "triton" on a GPU and "numba" on a CPU where that is installed and takes the
            input, else "chunk".

    Returns:
        o in the dtype of v, and the state after each sequence's last token in float32 (float64 for float64 inputs).

    Raises:
        UsageError: a shape, dtype, device, cu_seqlens or backend that does not fit.
    """
    check_backend(backend, ("reference", "chunk", "triton", "numba"))
    check_tensors(q=q, k=k, v=v, a=a, b=b, log_decay=log_decay, initial_state=initial_state)
    lengths = _check_shapes(q, k, v, a, b, log_decay, initial_state, cu_seqlens)
    check_same_dtype(q=q, k=k, v=v)
    compute = torch.float64 if torch.float64 in (q.dtype, a.dtype, b.dtype) else torch.float32
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if log_decay is None:
        log_decay = torch.zeros_like(a)
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = _not_for_triton(q, v, a, b, log_decay)
        if reason is None:
            from statetrack.ops.dplr.triton import dplr_triton

            return dplr_triton(q, k, v, a, b, log_decay, scale, initial_state, lengths)
        if backend == "triton":
            raise UsageError(f'backend="triton" {reason}; use backend="chunk"')
    if initial_state is None:
        initial_state = q.new_zeros(len(lengths), v.shape[2], q.shape[-1], v.shape[-1], dtype=compute)
    initial_state = initial_state.to(compute)
    one_token = cu_seqlens is None and q.shape[1] == 1  # decoding: nothing to put into chunks
    if backend == "reference" or (backend == "auto" and one_token):
        q, k, a, b, log_decay = (x.to(compute) for x in (q, k, a, b, log_decay))
        o, state = dplr_reference(q, k, v.to(compute), a, b, log_decay, scale, initial_state, lengths)
        return o.to(v.dtype), state
    if numba_chosen(backend, q):
        from statetrack.ops.numba_matrix import dplr_numba

        return dplr_numba(q, k, v, a, b, log_decay, scale, initial_state, lengths)
    return dplr_chunk(q, k, v, a, b, log_decay, scale, initial_state, lengths)


def _not_for_triton(q, v, a, b, log_decay) -> str | None:
    """Return why the Triton kernels cannot run on these inputs, or None if they can."""
    if not TRITON_INSTALLED:
        return "needs Triton, which is not installed (pip install 'statetrack[gpu]')"
    if not q.is_cuda and not TRITON_INTERPRETED:
        return f"needs tensors on a CUDA device, got {q.device}"
    if torch.float64 in (v.dtype, a.dtype, b.dtype, log_decay.dtype):
        return "does not take float64"
    if q.shape[-1] > 128 or v.shape[-1] > 256:
        return f"takes K up to 128 and V up to 256, got K = {q.shape[-1]}, V = {v.shape[-1]}"
    if v.numel() >= 2**34 or q.shape[1] >= 2**31:
        return f"takes fewer than 2^34 values and 2^31 tokens, got {v.numel()} and {q.shape[1]}"
    return None


def _check_shapes(q, k, v, a, b, log_decay, initial_state, cu_seqlens) -> list[int]:
    if q.ndim != 4 or v.ndim != 4:
        raise UsageError(f"expected q [B T Hk K] and v [B T H V], got shapes {tuple(q.shape)} and {tuple(v.shape)}")
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    check_shape("k", k, (B, T, Hk, K), "[B T Hk K]")
    check_shape("v", v, (B, T, H, V), "[B T H V]")
    if min(Hk, K, H, V) < 1 or H % Hk:
        raise UsageError(f"v has {H} heads and k has {Hk}: the former must be a multiple of the latter (K={K}, V={V})")
    for name, x in (("a", a), ("b", b), ("log_decay", log_decay)):
        if x is not None:
            check_shape(name, x, (B, T, H, K), "[B T H K]")
    lengths = sequence_lengths(cu_seqlens, B, T)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (len(lengths), H, K, V), "[S H K V]")
    return lengths
