"""Which ptxas assembles the Triton kernels on a Hopper GPU.

Triton 3.6 and 3.7 assemble for it with ptxas 12.8, which now and then gives the registers of a matrix product's left
operand to something else before the product has read them. Kernels for narrow heads with a decay per key channel then
return wrong numbers or end in an illegal memory access (docs/LOG.md, 2026-11-25). The newer ptxas that Triton brings
along for Blackwell (12.9 in Triton 3.6, 13.1 in 3.7) assembles them right, so it is taken, for the whole process and
its children; a TRITON_PTXAS_PATH that is set already stays.
"""

from __future__ import annotations

import ctypes
import os
import warnings

import torch
from triton import knobs

CHOICE = "TRITON_PTXAS_PATH"


def choose_assembler() -> None:
    """Set Triton's ptxas to its newer one on a Hopper GPU, if the driver can load what that one makes."""
    if CHOICE in os.environ or not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return
    from triton.backends.nvidia import compiler

    old, new = knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell
    if major_minor(new.version) <= major_minor(old.version):
        return
    if major_minor(new.version)[0] > driver_major():
        warnings.warn(
            f"Triton's ptxas {old.version} may miscompile kernels on this GPU, and ptxas {new.version} needs a newer "
            f"NVIDIA driver: update the driver, or set {CHOICE} to another ptxas",
            stacklevel=2,
        )
        return
    knobs.nvidia.ptxas = new.path
    compiler.get_ptxas_version.cache_clear()  # part of the key under which compiled kernels are kept


def major_minor(version: str) -> tuple[int, int]:
    """Return "12.9" as (12, 9)."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def driver_major() -> int:
    """Return the major version of CUDA that the NVIDIA driver knows; 0 if it does not say."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return 0 if failed else version.value // 1000
