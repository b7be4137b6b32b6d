"""Input checks shared by the ops: bad input is one clear error, never a wrong number."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from statetrack.errors import UsageError

BACKENDS = ("auto", "reference", "chunk", "triton", "numba")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

TRITON_INSTALLED = find_spec("triton") is not None
NUMBA_INSTALLED = find_spec("numba") is not None
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run on CPU tensors: slow, for tests


def check_backend(backend: str, available: tuple[str, ...]) -> None:
    """Reject an unknown backend, and a known one that this op does not have."""
    if backend not in BACKENDS:
        raise UsageError(f"backend={backend!r} is unknown; accepted: {', '.join(BACKENDS)}")
    if backend != "auto" and backend not in available:
        raise UsageError(f"backend={backend!r} is not available for this op; available: {', '.join(available)}")


def numba_chosen(backend: str, x: Tensor) -> bool:
    """Return whether the kernels compiled by Numba are to run; asked for where they cannot, that is an error."""
    if backend not in ("auto", "numba"):
        return False
    fits = NUMBA_INSTALLED and x.device.type == "cpu"
    if backend == "numba" and not fits:
        here = "which is not installed (pip install 'statetrack[cpu]')"
        reason = f"tensors on the CPU, got {x.device}" if NUMBA_INSTALLED else f"Numba, {here}"
        raise UsageError(f'backend="numba" needs {reason}; use backend="chunk"')
    return fits


def check_tensors(**tensors: Tensor | None) -> None:
    """Reject tensors on different devices and integer tensors where floating point is needed."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(given.items()))
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise UsageError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.device != first.device:
            raise UsageError(f"{name} is on {t.device} but {first_name} is on {first.device}; move them to one device")
        if t.dtype not in FLOATS:
            raise UsageError(f"{name} has dtype {t.dtype}; accepted: float64, float32, bfloat16, float16")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Reject a mix of dtypes among tensors that the kernels read with one type."""
    given = {name: t for name, t in tensors.items() if t is not None}
    if len({t.dtype for t in given.values()}) > 1:
        listed = ", ".join(f"{name}: {str(t.dtype).removeprefix('torch.')}" for name, t in given.items())
        raise UsageError(f"these tensors must share one dtype, got {listed}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], legend: str) -> None:
    """Reject a tensor whose shape is not the expected one."""
    if tuple(tensor.shape) != expected:
        raise UsageError(f"{name} has shape {tuple(tensor.shape)}, expected {legend} = {expected}")


def sequence_lengths(cu_seqlens: Tensor | None, batch: int, tokens: int) -> list[int]:
    """Return the length of every sequence: `batch` times `tokens`, or what cu_seqlens says (then batch must be 1)."""
    if cu_seqlens is None:
        return [tokens] * batch
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise UsageError(
            "cu_seqlens must be a 1-D int32 tensor of at least 2 offsets, "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise UsageError(f"with cu_seqlens the batch must be 1 (sequences packed along T), got B = {batch}")
    offsets = cu_seqlens.tolist()
    lengths = [end - start for start, end in zip(offsets, offsets[1:], strict=False)]
    if offsets[0] != 0 or offsets[-1] != tokens or min(lengths) < 0:
        shown = offsets if len(offsets) <= 8 else [*offsets[:4], "...", *offsets[-3:]]
        raise UsageError(f"cu_seqlens must rise from 0 to T = {tokens}, got {shown}")
    return lengths
