"""Gated linear attention: a diagonal decay, of either sign, and one outer product written per token.

    S <- diag(decay_t) S + k_t v_t^T;   o_t = scale S^T q_t

One decay per head is Mamba-2, mLSTM and RetNet, one per key channel GLA, HGRN2 and RWKV-6. The decays are the
eigenvalues of the transition: in [0, 1] as published, in [-1, 1] the state can change its sign and follow a parity.

References: Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, eq. 3 and section 4
(arXiv 2312.06635); Dao and Gu, Transformers are SSMs (2405.21060); Grazzi et al., Unlocking State-Tracking in Linear
RNNs Through Negative Eigenvalues, eq. 2 (2411.12537).
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
from statetrack.ops.gated_linear_attention.chunk import gated_linear_attention_chunk
from statetrack.ops.gated_linear_attention.reference import gated_linear_attention_reference
from statetrack.ops.layout import untraced_if_packed


@untraced_if_packed
def gated_linear_attention(
    q: Float[Tensor, "B T Hk K"],
    k: Float[Tensor, "B T Hk K"],
    v: Float[Tensor, "B T H V"],
    decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Tensor, "S H K V"] | None = None,
    cu_seqlens: Int[Tensor, "offsets"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "S H K V"]]:
    """Decay a matrix state, write k v^T to it and read it with q, at every token.

    q and k may have fewer heads than v (H a multiple of Hk): value head h reads key head h // (H // Hk).

    Args:
        q: queries, read after the token's write.
        k: keys, as they are: nothing normalises them.
        v: values.
        decay: what multiplies the state before the write, per head or per key channel, in [-1, 1]. 0 is an exact reset;
            its gradient, too, is that of the equation.
        scale: factor of the output. Default: K ** -0.5.
        initial_state: state before the first token, one per sequence (S = B, or the number of packed sequences).
        cu_seqlens: offsets [0, ..., T] of sequences packed along T; needs B = 1.
        backend: "reference" (the definition), "chunk" (fast, CPU and GPU), "triton" (faster, GPU; float32, bfloat16,
            float16), "numba" (compiled, CPU only, faster) or "auto": "triton" on a GPU and "numba" on a CPU where
            that is installed and takes the input, else "chunk".

    Returns:
        o in the dtype of v, and the state after each sequence's last token in float32 (float64 for float64 inputs).

    Raises:
        UsageError: a shape, dtype, device, cu_seqlens or backend that does not fit.
    """
    check_backend(backend, ("reference", "chunk", "triton", "numba"))
    check_tensors(q=q, k=k, v=v, decay=decay, initial_state=initial_state)
    lengths = _check_shapes(q, k, v, decay, initial_state, cu_seqlens)
    check_same_dtype(q=q, k=k, v=v)
    compute = torch.float64 if torch.float64 in (q.dtype, decay.dtype) else torch.float32
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if backend == "triton" or (backend == "auto" and q.is_cuda):
        reason = _not_for_triton(q, v, decay)
        if reason is None:
            from statetrack.ops.gated_linear_attention.triton import gated_linear_attention_triton

            return gated_linear_attention_triton(q, k, v, decay, scale, initial_state, lengths)
        if backend == "triton":
            raise UsageError(f'backend="triton" {reason}; use backend="chunk"')
    if initial_state is None:
        initial_state = q.new_zeros(len(lengths), v.shape[2], q.shape[-1], v.shape[-1], dtype=compute)
    initial_state = initial_state.to(compute)
    one_token = cu_seqlens is None and q.shape[1] == 1  # decoding: nothing to put into chunks
    if backend == "reference" or (backend == "auto" and one_token):
        cast = q.to(compute), k.to(compute), v.to(compute), decay.to(compute)
        o, state = gated_linear_attention_reference(*cast, scale, initial_state, lengths)
        return o.to(v.dtype), state
    if numba_chosen(backend, q):
        from statetrack.ops.numba_matrix import gated_linear_attention_numba

        return gated_linear_attention_numba(q, k, v, decay, scale, initial_state, lengths)
    return gated_linear_attention_chunk(q, k, v, decay, scale, initial_state, lengths)


def _not_for_triton(q: Tensor, v: Tensor, decay: Tensor) -> str | None:
    """Return why the Triton kernels cannot run on these inputs, or None if they can."""
    if not TRITON_INSTALLED:
        return "needs Triton, which is not installed (pip install 'statetrack[gpu]')"
    if not q.is_cuda and not TRITON_INTERPRETED:
        return f"needs tensors on a CUDA device, got {q.device}"
    if torch.float64 in (v.dtype, decay.dtype):
        return "does not take float64"
    widest = 256 if v.dtype == torch.bfloat16 else 128
    if q.shape[-1] > widest or v.shape[-1] > 256:
        return f"takes K up to {widest} and V up to 256 in {v.dtype}, got K = {q.shape[-1]}, V = {v.shape[-1]}"
    if v.numel() >= 2**34 or q.shape[1] >= 2**31:
        return f"takes fewer than 2^34 values and 2^31 tokens, got {v.numel()} and {q.shape[1]}"
    return None


def _check_shapes(q, k, v, decay, initial_state, cu_seqlens) -> list[int]:
    if q.ndim != 4 or v.ndim != 4:
        raise UsageError(f"expected q [B T Hk K] and v [B T H V], got shapes {tuple(q.shape)} and {tuple(v.shape)}")
    B, T, Hk, K = q.shape
    H, V = v.shape[2:]
    check_shape("k", k, (B, T, Hk, K), "[B T Hk K]")
    check_shape("v", v, (B, T, H, V), "[B T H V]")
    if min(Hk, K, H, V) < 1 or H % Hk:
        raise UsageError(f"v has {H} heads and k has {Hk}: the former must be a multiple of the latter (K={K}, V={V})")
    if tuple(decay.shape) not in ((B, T, H), (B, T, H, K)):
        raise UsageError(
            f"decay has shape {tuple(decay.shape)}, expected [B T H] = {(B, T, H)} or [B T H K] = {(B, T, H, K)}"
        )
    lengths = sequence_lengths(cu_seqlens, B, T)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (len(lengths), H, K, V), "[S H K V]")
    return lengths
