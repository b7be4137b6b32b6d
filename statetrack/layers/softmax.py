"""Softmax attention of the tokens of one sequence, or of every sequence of a packing within itself.

Letters: B batch, T tokens, P tokens that may be read, H heads, Hk of keys and values, K head width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from statetrack.layers.packing import Packing

FUSED_WIDTHS = range(8, 257, 8)
"""head widths of the FlashAttention that comes with torch"""


def attend(q: Float[Tensor, "B H T K"], k: Float[Tensor, "B Hk P K"], v: Float[Tensor, "B Hk P K"]) -> Tensor:
    """Let the last T of P tokens read all up to themselves."""
    if q.shape[2] in (1, k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q, k), enable_gqa=True)


def causal_mask(q: Tensor, k: Tensor) -> Bool[Tensor, "T P"]:
    """Return which of P keys each of the last T tokens may read."""
    tokens, keys = q.shape[2], k.shape[2]
    return torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)


def attend_packed(
    q: Float[Tensor, "1 H T K"], k: Float[Tensor, "1 Hk T K"], v: Float[Tensor, "1 Hk T K"], packing: Packing
) -> Float[Tensor, "1 H T K"]:
    """Let every token read its own sequence up to itself: one kernel where `has_fused`, else sequence by sequence."""
    if not has_fused(q):
        parts = [attend(*(y[:, :, start:end] for y in (q, k, v))) for start, end in packing.spans()]
        return torch.cat(parts, dim=2)
    from torch.nn.attention.varlen import varlen_attn

    shared = q.shape[1] // k.shape[1]
    k, v = (y.repeat_interleave(shared, dim=1) if shared > 1 else y for y in (k, v))
    edges = F.pad(packing.starts + packing.lengths, (1, 0)).int()
    longest = int(packing.cu_seqlens.diff().max())
    q, k, v = (y[0].transpose(0, 1) for y in (q, k, v))
    o = varlen_attn(q, k, v, edges, edges, longest, longest, window_size=(-1, 0))
    assert isinstance(o, Tensor)
    return o.transpose(0, 1)[None]


def has_fused(q: Tensor) -> bool:
    """Say whether torch has a kernel for sequences of different lengths: 16 bits, from Ampere on."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and q.shape[-1] in FUSED_WIDTHS and torch.cuda.get_device_capability(q.device) >= (8, 0)
