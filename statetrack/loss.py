"""The loss of a language model from its hidden states: no logits of a whole batch are ever in memory.

    loss = sum_n -log softmax(W h_n)[y_n] / count,   over the n with y_n != -100

Letters: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""label of a token that is no target"""
CHUNK_LOGITS = 2**25
"""logits at once, 128 MiB in float32"""


def linear_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    count: int | Int[Tensor, ""] | Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the targets under the logits W h, as a sum divided by `count`.

    count: default the number of targets that are not -100; with gradient accumulation, or several processes, that of
    the whole step. On a GPU the fused kernels of Liger (`pip install 'statetrack[gpu]'`) are used where they
    are installed; elsewhere torch, in chunks of tokens whose logits are computed again in the backward pass. Under
    autocast the logits are products in its dtype; the softmax and the sums are in float32.
    """
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = _liger if hidden.is_cuda and find_spec("liger_kernel") else _chunked
    return total(hidden, weight, targets) / count


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(
        hidden, weight, targets, ignore_index=IGNORED, reduction="sum", accum_dtype=torch.float32
    )


def _chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    size = max(1, CHUNK_LOGITS // weight.shape[0])
    total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for h, y in zip(hidden.split(size), targets.split(size), strict=True):
        total = total + checkpoint(_sum_of_chunk, h, weight, y, use_reentrant=False)
    return total


def _sum_of_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
