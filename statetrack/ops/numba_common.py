"""What the compiled CPU kernels share: how they are compiled and cached, and how they spread over threads.

They are compiled by Numba when first called with a dtype and kept on disk for later processes. A kernel works on NumPy
views of tensors, without Python's lock; its first two arguments are the range of items (sequences, heads, ...) that
the call is to do, so that threads share the items and no two write to the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

LEAST_WORK = 200_000  # multiply-adds that are worth another thread, whose start costs some 50 us
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
    shares = min(items, SHARES * threads)
    bounds = [items * i // shares for i in range(shares + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(run, *share, *arguments) for share in zip(bounds, bounds[1:], strict=False)]:
            done.result()


def array(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Return a tensor's values, contiguous and in the dtype of the computation; a view where it already is so."""
    return x.detach().to(dtype).contiguous().numpy()


def starts(lengths: Sequence[int]) -> np.ndarray:
    """Return the offsets [0, ..., T] of sequences that lie one after the other."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
