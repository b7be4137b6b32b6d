"""The delta rule: a state updated by products of N generalised Householder factors per token.

    S <- exp(log_decay_t) S
    S <- S + beta_tj kh_tj (v_tj - kh_tj^T S)^T,   kh = k / |k|,   for j = 1..N
    o_t = scale S^T q_t

Each factor I - beta kh kh^T has the eigenvalue 1 - beta along its key and 1 elsewhere: beta in [0, 1] keeps it in
[0, 1] (DeltaNet as published), beta in [0, 2] in [-1, 1] (state tracking). N = 1 is DeltaNet, N > 1 DeltaProduct; with
a scalar decay Gated DeltaNet and Gated DeltaProduct; with a decay per key channel Kimi Delta Attention.

References: Yang et al., Parallelizing Linear Transformers with the Delta Rule (arXiv 2406.06484); Grazzi et al.,
Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, eq. 2 (2411.12537); Siems et al., DeltaProduct,
section 4 (2502.10297); Yang et al., Gated Delta Networks (2412.06464).
"""

from __future__ import annotations

from collections.abc import Callable

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
from statetrack.ops.delta_rule.chunk import delta_rule_chunk
from statetrack.ops.delta_rule.reference import delta_rule_reference
from statetrack.ops.layout import untraced_if_packed

PRECISIONS = ("tracking", "fast")


@untraced_if_packed
def delta_rule(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T N Hk K"],
    v: Float[Tensor, "B T N H V"],
    beta: Float[Tensor, "B T N H"],
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None = None,
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "S H K V"] | None = None,
    cu_seqlens: Int[Tensor, "offsets"] | None = None,
    backend: str = "auto",
    precision: str = "tracking",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "S H K V"]]:
    """Apply N generalised Householder factors per token to a matrix state and read it with q.

    Keys need no normalisation: each is divided by its own norm as stored (see docs/numerics.md), and a zero key is a
    no-op. q and k may have fewer heads than v (H a multiple of Hk): value head h reads key head h // (H // Hk).

    Args:
        q: queries, read after the token's last factor.
        k: keys, one per factor. A later factor acts on the result of the earlier ones.
        v: values, one per factor.
        beta: step sizes; the factor's eigenvalue is 1 - beta, so [0, 2] is the contractive range.
        log_decay: natural logarithm of the decay that multiplies the state before the token's first factor, per head or
            per key channel; -inf is an exact reset. Default: no decay.
        scale: factor of the output. Default: K ** -0.5.
        initial_state: state before the first token, one per sequence (S = B, or the number of packed sequences).
        cu_seqlens: offsets [0, ..., T] of sequences packed along T; needs B = 1.
        backend: "reference" (the definition), "chunk" (fast, CPU and GPU), "triton" (faster, GPU; float32, bfloat16,
            float16), "numba" (compiled, CPU only, faster) or "auto": "triton" on a GPU and "numba" on a CPU where
            that is installed and takes the input, else "chunk".
        precision: "tracking" keeps the state's error near the data type's rounding over a million tokens; "fast" lets
            the Triton kernels round what they multiply to bfloat16, as other libraries do. Other backends ignore it.

    Returns:
        o in the dtype of v, and the state after each sequence's last token in float32 (float64 for float64 inputs).

    Raises:
        UsageError: a shape, dtype, device, cu_seqlens, backend or precision that does not fit.
    """
    check_backend(backend, ("reference", "chunk", "triton", "numba"))
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r} is unknown; accepted: {', '.join(PRECISIONS)}")
    check_tensors(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)
    lengths = _check_shapes(q, k, v, beta, log_decay, initial_state, cu_seqlens)
    check_same_dtype(q=q, k=k, v=v)
    compute = torch.float64 if torch.float64 in (q.dtype, beta.dtype) else torch.float32
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = _not_for_triton(q, k, v)
        if reason is None:
            run = _triton_kernels(q, v, log_decay)
            return run(q, k, v, beta, log_decay, scale, initial_state, lengths, precision)
        if backend == "triton":
            raise UsageError(f'backend="triton" {reason}; use backend="chunk"')
    if initial_state is None:
        initial_state = q.new_zeros(len(lengths), v.shape[3], q.shape[-1], v.shape[-1], dtype=compute)
    initial_state = initial_state.to(compute)
    if backend == "reference":
        log_decay = None if log_decay is None else log_decay.to(compute)
        cast = q.to(compute), k.to(compute), v.to(compute), beta.to(compute)
        o, state = delta_rule_reference(*cast, log_decay, scale, initial_state, lengths)
        return o.to(v.dtype), state
    if numba_chosen(backend, q):
        from statetrack.ops.delta_rule.numba import delta_rule_numba

        return delta_rule_numba(q, k, v, beta, log_decay, scale, initial_state, lengths)
    return delta_rule_chunk(q, k, v, beta, log_decay, scale, initial_state, lengths)


def _not_for_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the Triton kernels cannot run on these inputs, or None if they can."""
    if not TRITON_INSTALLED:
        return "needs Triton, which is not installed (pip install 'statetrack[gpu]')"
    if not q.is_cuda and not TRITON_INTERPRETED:
        return f"needs tensors on a CUDA device, got {q.device}"
    if v.dtype == torch.float64:
        return "does not take float64"
    if q.shape[-1] > 256 or v.shape[-1] > 256:
        return f"takes K and V up to 256, got K = {q.shape[-1]}, V = {v.shape[-1]}"
    if k.shape[2] > 8:
        return f"takes up to 8 factors per token, got {k.shape[2]}"
    if v.numel() >= 2**34 or q.shape[1] >= 2**31:
        return f"takes fewer than 2^34 values and 2^31 tokens, got {v.numel()} and {q.shape[1]}"
    return None


def _triton_kernels(q: Tensor, v: Tensor, log_decay: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the kernels that take these inputs: those for a decay per key channel also take wide float32 keys."""
    wide = q.shape[-1] > 128 and v.dtype != torch.bfloat16
    if wide or (log_decay is not None and log_decay.ndim == 4):
        from statetrack.ops.delta_rule.triton_key_decay import delta_rule_triton_key_decay

        return delta_rule_triton_key_decay
    from statetrack.ops.delta_rule.triton import delta_rule_triton

    return delta_rule_triton


def _check_shapes(q, k, v, beta, log_decay, initial_state, cu_seqlens) -> list[int]:
    if q.ndim != 4 or k.ndim != 5 or v.ndim != 5:
        raise UsageError(
            "expected q [B T Hk K], k [B T N Hk K], v [B T N H V], "
            f"got shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, T, Hk, K = q.shape
    N, H, V = k.shape[2], v.shape[3], v.shape[4]
    check_shape("k", k, (B, T, N, Hk, K), "[B T N Hk K]")
    check_shape("v", v, (B, T, N, H, V), "[B T N H V]")
    check_shape("beta", beta, (B, T, N, H), "[B T N H]")
    if min(N, Hk, K, H, V) < 1 or H % Hk:
        raise UsageError(
            f"v has {H} heads and k has {Hk}: the former must be a multiple of the latter (N={N}, K={K}, V={V})"
        )
    if log_decay is not None and tuple(log_decay.shape) not in ((B, T, H), (B, T, H, K)):
        raise UsageError(
            f"log_decay has shape {tuple(log_decay.shape)}, "
            f"expected [B T H] = {(B, T, H)} or [B T H K] = {(B, T, H, K)}"
        )
    lengths = sequence_lengths(cu_seqlens, B, T)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (len(lengths), H, K, V), "[S H K V]")
    return lengths
