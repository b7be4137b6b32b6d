"""The selective scan: a diagonal recurrence whose decay, input and read-out depend on the token (Mamba).

    h_t = (lo + (hi - lo) exp(dt_t A)) h_{t-1} + dt_t B_t u_t
    y_t = C_t h_t + D u_t,   times silu(z_t) where a gate z is given

(lo, hi) = (0, 1) is Mamba as published; (-1, 1) lets the state flip its sign.

References: Gu and Dao, Mamba (arXiv 2312.00752), eq. 2 and 4 with the simplified discretisation of its code; Grazzi et
al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, Table 2 (2411.12537).
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
    check_shape,
    check_tensors,
    numba_chosen,
    sequence_lengths,
)
from statetrack.ops.layout import untraced_if_packed
from statetrack.ops.selective_scan.chunk import selective_scan_chunk
from statetrack.ops.selective_scan.reference import selective_scan_reference


@untraced_if_packed
def selective_scan(  # noqa: PLR0913 (the recurrence has seven tensors)
    u: Float[Tensor, "B T D"],
    dt: Float[Tensor, "B T D"],
    A: Float[Tensor, "D M"],
    B: Float[Tensor, "B T M"],
    C: Float[Tensor, "B T M"],
    D: Float[Tensor, "D"] | None = None,
    z: Float[Tensor, "B T D"] | None = None,
    *,
    eigenvalues: tuple[float, float] = (-1.0, 1.0),
    initial_state: Float[Tensor, "S D M"] | None = None,
    cu_seqlens: Int[Tensor, "offsets"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "S D M"]]:
    """Run D x M scalar recurrences whose coefficients depend on the token, and read them with C.

    Args:
        u: the input of every channel.
        dt: time steps, positive (the layer applies the softplus).
        A: rates, negative: the eigenvalue is lo + (hi - lo) exp(dt A).
        B: how the input enters each state; shared by the channels.
        C: how each state is read; shared by the channels.
        D: skip connection per channel. Default: none.
        z: gate: y is multiplied by z sigmoid(z). Default: none.
        eigenvalues: range (lo, hi) of the transition, -1 <= lo < hi <= 1.
        initial_state: state before the first token, one per sequence (S = B, or the number of packed sequences).
        cu_seqlens: offsets [0, ..., T] of sequences packed along T; needs B = 1.
        backend: "reference" (the definition), "chunk" (fast, CPU and GPU), "triton" (GPU kernels), "numba" (compiled,
            CPU only) or "auto": on a GPU "triton", on a CPU "numba" where it is installed, else "chunk"; there a single
            token goes by the definition.

    Returns:
        y in the dtype of u, and the state after each sequence's last token in float32 (float64 for float64 inputs).

    Raises:
        UsageError: a shape, dtype, device, range, cu_seqlens or backend that does not fit.
    """
    check_backend(backend, ("reference", "chunk", "triton", "numba"))
    check_tensors(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, initial_state=initial_state)
    lo, hi = eigenvalues
    if not -1 <= lo < hi <= 1:
        raise UsageError(f"eigenvalues must be (lo, hi) with -1 <= lo < hi <= 1, got {tuple(eigenvalues)}")
    lengths = _check_shapes(u, dt, A, B, C, D, z, initial_state, cu_seqlens)
    compute = torch.float64 if torch.float64 in (u.dtype, dt.dtype, A.dtype) else torch.float32
    if D is None:
        D = u.new_zeros(A.shape[0], dtype=compute)
    A, D = A.to(compute), D.to(compute)
    if backend == "triton" or (backend == "auto" and u.is_cuda):
        reason = _not_for_triton(u, A, B, C, z, compute)
        if reason is None:
            from statetrack.ops.selective_scan.triton import selective_scan_triton

            return selective_scan_triton(u, dt, A, B, C, D, z, eigenvalues, initial_state, lengths)
        if backend == "triton":
            raise UsageError(f'backend="triton" {reason}; use backend="chunk"')
    if initial_state is None:
        initial_state = u.new_zeros(len(lengths), *A.shape, dtype=compute)
    initial_state = initial_state.to(compute)
    one_token = cu_seqlens is None and u.shape[1] == 1  # decoding: nothing to put into blocks
    if backend == "reference" or (backend == "auto" and one_token):
        cast = (u.to(compute), dt.to(compute), A, B.to(compute), C.to(compute), D)
        y, state = selective_scan_reference(*cast, eigenvalues, initial_state, lengths)
    else:
        y, state = _blocked(backend, u, dt, A, B, C, D, eigenvalues, initial_state, lengths)
    if z is not None:
        y = y.to(compute) * torch.nn.functional.silu(z.to(compute))
    return y.to(u.dtype), state


def _blocked(backend: str, u: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """Run the backend of a CPU: compiled where that is asked for or possible, else in chunks."""
    if numba_chosen(backend, u):
        from statetrack.ops.selective_scan.numba import selective_scan_numba

        return selective_scan_numba(u, *rest)
    return selective_scan_chunk(u, *rest)


def _not_for_triton(u, A, B, C, z, compute) -> str | None:
    """Return why the Triton kernels cannot run on these inputs, or None if they can."""
    if not TRITON_INSTALLED:
        return "needs Triton, which is not installed (pip install 'statetrack[gpu]')"
    if not u.is_cuda and not TRITON_INTERPRETED:
        return f"needs tensors on a CUDA device, got {u.device}"
    if compute == torch.float64 or torch.float64 in (B.dtype, C.dtype, *(() if z is None else (z.dtype,))):
        return "does not take float64"
    if u.numel() >= 2**40 or u.shape[1] >= 2**31 or A.numel() >= 2**31:
        return f"takes fewer than 2^40 values, 2^31 tokens and 2^31 rates, got u {tuple(u.shape)}, A {tuple(A.shape)}"
    return None


def _check_shapes(u, dt, A, B, C, D, z, initial_state, cu_seqlens) -> list[int]:
    if u.ndim != 3 or A.ndim != 2:
        raise UsageError(f"expected u [B T D] and A [D M], got shapes {tuple(u.shape)} and {tuple(A.shape)}")
    batch, tokens, channels = u.shape
    states = A.shape[1]
    check_shape("A", A, (channels, states), "[D M]")
    check_shape("dt", dt, (batch, tokens, channels), "[B T D]")
    check_shape("B", B, (batch, tokens, states), "[B T M]")
    check_shape("C", C, (batch, tokens, states), "[B T M]")
    if D is not None:
        check_shape("D", D, (channels,), "[D]")
    if z is not None:
        check_shape("z", z, (batch, tokens, channels), "[B T D]")
    lengths = sequence_lengths(cu_seqlens, batch, tokens)
    if initial_state is not None:
        check_shape("initial_state", initial_state, (len(lengths), channels, states), "[S D M]")
    return lengths
