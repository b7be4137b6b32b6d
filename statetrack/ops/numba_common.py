"""What the compiled CPU kernels share: how they are compiled and cached, and how they spread over threads.

They are compiled by Numba when first called with a dtype and kept on disk for later processes. A kernel works on NumPy
views of tensors, without Python's lock; its first two arguments are the range of items (sequences, heads, ...) that
the call is to do, so that threads share the items and no two write to the same place.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

LEAST_WORK = 1_000_000  # multiply-adds that are worth another thread: some 100 us
SHARES = 4  # per thread, so that unequal sequences even out


OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "reassoc"}}


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function on first use: sums may be reordered, NaN and infinity keep their meaning."""
    try:
        return numba.njit(function, **OPTIONS, cache=True)
    except RuntimeError:  # no place to write the cache to
        return numba.njit(function, **OPTIONS)


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that kernels call: it allocates nothing, and does not count references to the views it makes.

    Counting them cost more than the arithmetic where heads are narrow.
    """
    options: dict[str, Any] = OPTIONS | {"_nrt": False}
    return numba.njit(function, **options)


def spread(run: Callable[..., None], items: int, work: int, *arguments: Any) -> None:
    """Run a kernel over all items, on as many threads as PyTorch uses where the work in all (multiply-adds) pays."""
    threads = min(torch.get_num_threads(), items, 1 + work // LEAST_WORK)
    if threads == 1:
        run(0, items, *arguments)
    if threads <= 1:
        return
    count = min(items, SHARES * threads)
    shares = iter([(items * i // count, items * (i + 1) // count) for i in range(count)])
    failures: list[BaseException] = []

    def take_shares() -> None:
        try:
            for share in shares:  # each goes to one thread: Python's lock is held while the iterator moves
                run(*share, *arguments)
        except BaseException as failure:  # an interrupt too: nothing may leave a callback
            failures.append(failure)

    _on_threads(take_shares, threads)
    if failures:
        raise failures[0]


def _on_threads(function: Callable[[], None], threads: int) -> None:
    """Call a function on several threads at once and wait for them all."""
    if PARALLEL is not None:
        PARALLEL(CALLBACK(lambda _: function()), None, threads, 0)
        return
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(function)


def _parallel_of_openmp() -> Any:
    """Return what runs a function on PyTorch's own threads, or None where PyTorch does not come with GNU's OpenMP.

    After an op of PyTorch's these threads wait for the next one in a loop, for milliseconds: other threads would have
    to share the cores with them.
    """
    library = next((Path(torch.__file__).parent / "lib").glob("libgomp*"), None)
    if library is None:
        return None
    parallel = ctypes.CDLL(str(library)).GOMP_parallel
    parallel.argtypes, parallel.restype = (CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
PARALLEL = _parallel_of_openmp()


def array(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a tensor's values, contiguous and in the dtype of the computation; a view where it already is so."""
    return x.detach().to(dtype).contiguous().numpy()


def starts(lengths: Sequence[int]) -> np.ndarray:
    """Return the offsets [0, ..., T] of sequences that lie one after the other."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
