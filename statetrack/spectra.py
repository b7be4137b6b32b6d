"""The eigenvalues that a trained model really uses on a text: per layer and head, token by token and over windows.

A transition that depends on the token has eigenvalues that do not: 1 where a Householder factor does not reach. What
counts is the rest: alpha (1 - beta) for one factor, those on the span of the keys for several (they may be complex, a
rotation), the decays of a diagonal transition. One that returns to itself after m tokens has m-th roots of unity only;
m = 2 is a reflection, m > 2 a rotation. How far a transition is from that is the largest distance of one of its
eigenvalues from the nearest such root, for the best m up to 6.

References: Grazzi et al., Theorems 1 to 4 (arXiv 2411.12537); Siems et al., sections 3 and 5 (2502.10297).

Letters: T tokens, H heads, N factors, K key width, E eigenvalues that depend on the token, L tokens of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.model import Model

ORDERS = (1, 2, 3, 4, 5, 6)
NEAR = 0.1
"""distance below which a transition counts as one of finite order"""
WINDOWS = (4, 16, 64)
PLACES = 4
"""windows per length"""
BINS = 40
CHANNELS = 64
"""channels of a Mamba layer that are looked at, evenly spaced"""
SAMPLES = 128
"""tokens whose eigenvalues are computed where that takes a whole matrix each, evenly spaced"""


@dataclass(frozen=True)
class Window:
    """Products of the transitions of L consecutive tokens."""

    negative: float
    """share with an eigenvalue whose real part is below -0.1"""
    largest: float
    """median of the largest magnitude: what is kept of the state in the best direction"""
    distance: float
    """median distance to a finite order"""


@dataclass(frozen=True)
class Head:
    """What one head of one layer does on the text."""

    layer: int
    head: int
    mixer: str
    lowest: float
    median: float
    highest: float
    """of the real parts"""
    negative: float
    """share of tokens with an eigenvalue whose real part is below 0"""
    turning: float
    """share of tokens with an eigenvalue that is not real"""
    orders: dict[int, float]
    """share of tokens whose transition is within 0.1 of one of order m, the smallest such m"""
    distance: float
    """median distance to a finite order"""
    windows: dict[int, Window]
    histogram: list[float]
    """share of the real parts in each of 40 bins from -1 to 1"""
    verdict: str


@dataclass(frozen=True)
class Transitions:
    """The transitions of a layer on one text."""

    eigenvalues: Complex[Tensor, "T H E"]
    product: Callable[[int, int], Complex[Tensor, "H E_"]]
    """from (first token, L) to the eigenvalues of the product"""


@torch.no_grad()
def spectra(model: Model, tokens: Int[Tensor, "1 T"]) -> list[Head]:
    """Return what every head of every layer with a linear transition does on the tokens.

    Raises UsageError where no layer has one (attention, LSTM) or the text is shorter than 2 tokens.
    """
    if tokens.shape[1] < 2:
        raise UsageError(f"a text of at least 2 tokens is needed, got {tokens.shape[1]}")
    inputs: dict[int, Tensor] = {}
    hooks = [
        block.mixer.register_forward_pre_hook(lambda _, args, i=i: inputs.__setitem__(i, args[0]))  # pyright: ignore
        for i, block in enumerate(model.blocks)
    ]
    try:
        model.hidden(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for i, block in enumerate(model.blocks):
        if (seen := transitions(block.mixer, inputs[i])) is not None:
            found += _heads(i, type(block.mixer).__name__, seen)
    if not found:
        raise UsageError("no layer of this model has a linear transition whose eigenvalues could be looked at")
    return found


def transitions(mixer: Any, x: Float[Tensor, "1 T D"]) -> Transitions | None:
    """Return a mixer's transitions on x, or None where it has no linear ones."""
    if not hasattr(mixer, "op_inputs"):
        return None
    inputs = {k: v.double() if isinstance(v, Tensor) else v for k, v in mixer.op_inputs(x).items()}
    if "beta" in inputs:
        return _householder(inputs)
    if "a" in inputs:
        return _matrices(lambda t: _dplr_matrix(inputs, t), x.shape[1])
    if "dt" in inputs:
        lo, hi = mixer.config.eigenvalues
        kept = torch.linspace(
            0, inputs["dt"].shape[2] - 1, min(CHANNELS, inputs["dt"].shape[2]), device=x.device
        ).long()
        rates = inputs["dt"][0][:, kept, None] * inputs["A"][kept]
        return _diagonal((lo + (hi - lo) * rates.exp()).flatten(1).unsqueeze(1))
    if "decay" in inputs:
        decay = inputs["decay"][0]
        decay = decay.unsqueeze(-1) if decay.ndim == 2 else decay
        if (base := getattr(mixer.config, "rotary_base", None)) is not None:  # RetNet turns its keys, at a fixed rate
            half = mixer.head_dim // 2
            angle = base ** (-torch.arange(half, dtype=torch.float64, device=x.device) / half)
            return _diagonal(decay * torch.cat([torch.polar(torch.ones_like(angle), s * angle) for s in (1, -1)]))
        return _diagonal(decay)
    return None


def _diagonal(decay: Tensor) -> Transitions:
    values = decay.to(torch.complex128)
    return Transitions(values, lambda start, length: values[start : start + length].prod(0))


def _matrices(matrix: Callable[[int], Tensor], tokens: int) -> Transitions:
    """Look at transitions given as matrices [H K K]."""

    def product(start: int, length: int) -> Tensor:
        total = matrix(start)
        for t in range(start + 1, start + length):
            total = matrix(t) @ total
        return torch.linalg.eigvals(total)

    places = torch.linspace(0, tokens - 1, min(tokens, SAMPLES)).long().tolist()
    return Transitions(torch.stack([torch.linalg.eigvals(matrix(t)) for t in places]), product)


def _householder(inputs: dict[str, Any]) -> Transitions:
    """Look at products of Householder factors, with a decay before them or without."""
    beta, heads = inputs["beta"][0], inputs["beta"].shape[-1]
    k = F.normalize(inputs["k"][0], dim=-1).repeat_interleave(heads // inputs["k"].shape[-2], dim=2)
    log_decay = inputs.get("log_decay")
    decay = torch.ones_like(beta[:, 0]) if log_decay is None else log_decay[0].exp()

    def matrix(t: int) -> Tensor:
        total = (
            torch.diag_embed(decay[t]) if decay.ndim == 3 else decay[t, :, None, None] * torch.eye(k.shape[-1]).to(k)
        )
        for j in range(k.shape[1]):
            total = total - beta[t, j, :, None, None] * k[t, j, :, :, None] * (k[t, j, :, None] @ total)
        return total

    if decay.ndim == 3:
        return _matrices(matrix, len(beta))
    product = _matrices(matrix, 1).product
    gram = torch.einsum("tnhk,tmhk->thnm", k, k)
    span = torch.eye(k.shape[1]).to(k).expand_as(gram)
    for j in range(k.shape[1]):  # the factors in coordinates of the keys: c -> c - beta_j e_j (gram c)_j
        row = gram[..., j : j + 1, :] @ span
        step = torch.zeros_like(gram)
        step[..., j : j + 1, :] = beta[:, j, :, None, None] * row
        span = span - step
    values = torch.linalg.eigvals(span) if k.shape[1] > 1 else span.squeeze(-1).to(torch.complex128)
    return Transitions(decay[..., None] * values, product)


def _dplr_matrix(inputs: dict[str, Any], t: int) -> Tensor:
    a, b = inputs["a"][0, t], inputs["b"][0, t]
    decay = torch.ones_like(a) if inputs.get("log_decay") is None else inputs["log_decay"][0, t].exp()
    return torch.diag_embed(decay) + b[..., :, None] * a[..., None, :]


def order_distances(eigenvalues: Complex[Tensor, "*S E"]) -> Float[Tensor, "*S M"]:
    """Return, for every order m, the largest distance of an eigenvalue from the nearest m-th root of unity."""
    found = []
    for m in ORDERS:
        angles = 2 * math.pi * torch.arange(m, dtype=torch.float64, device=eigenvalues.device) / m
        roots = torch.polar(torch.ones_like(angles), angles)
        found.append((eigenvalues[..., None] - roots).abs().amin(-1).amax(-1))
    return torch.stack(found, dim=-1)


def _heads(layer: int, mixer: str, seen: Transitions) -> list[Head]:
    values = seen.eigenvalues
    distances = order_distances(values)
    near = distances <= NEAR
    order = torch.where(near.any(-1), near.double().argmax(-1) + 1, 0)  # the smallest; 0 for none
    windows = {length: _window(seen, length) for length in WINDOWS if length <= len(values)}
    found = []
    for h in range(values.shape[1]):
        real, imaginary = values[:, h].real, values[:, h].imag
        orders = {m: (order[:, h] == m).double().mean().item() for m in ORDERS}
        head: dict[str, Any] = {
            "lowest": real.min().item(),
            "median": real.median().item(),
            "highest": real.max().item(),
            "negative": (real < 0).any(-1).double().mean().item(),
            "turning": (imaginary.abs() > 1e-6).any(-1).double().mean().item(),
            "orders": orders,
            "distance": distances[:, h].amin(-1).median().item(),
            "windows": {length: _summary(products[:, h]) for length, products in windows.items()},
            "histogram": (real.clamp(-1, 1).histc(BINS, -1, 1) / real.numel()).tolist(),
        }
        found.append(Head(layer=layer, head=h, mixer=mixer, **head, verdict=verdict(head)))
    return found


def _window(seen: Transitions, length: int) -> Complex[Tensor, "P H E"]:
    tokens = len(seen.eigenvalues)
    starts = torch.linspace(0, tokens - length, min(PLACES, tokens - length + 1)).long().tolist()
    return torch.stack([seen.product(start, length) for start in starts])


def _summary(products: Complex[Tensor, "P E"]) -> Window:
    return Window(
        negative=(products.real < -0.1).any(-1).double().mean().item(),
        largest=products.abs().amax(-1).median().item(),
        distance=order_distances(products).amin(-1).median().item(),
    )


def verdict(head: dict[str, Any]) -> str:
    """Say in words what a head can follow on this text, by the theorems for finite precision: KIND: REASON."""
    orders, lowest = head["orders"], head["lowest"]
    turns = {m: share for m, share in orders.items() if m > 2 and share >= 0.01}
    if turns:
        m = max(turns, key=lambda m: turns[m])
        return f"turns, order {m}: {turns[m]:.0%} of the tokens are close to such a rotation"
    if orders[2] >= 0.01:
        return f"flips: {orders[2]:.0%} of the tokens are close to a reflection"
    if lowest >= 0 and not head["turning"]:
        return "never below 0: cannot follow parity, nor any count modulo m"
    if lowest < 0 and abs(lowest) < 1 - NEAR:
        return f"fades: negative, but at most {abs(lowest):.2f} of what is flipped is left after one flip"
    if (share := max(head["negative"], head["turning"])) >= 0.01:
        return f"in part: flips or turns on {share:.0%} of the tokens, none of them close to a finite order as a whole"
    return "still: forgets and keeps, flips next to nothing on this text"


def summary(heads: list[Head]) -> str:
    """Say in one sentence what the model does."""
    kinds = {"turn": "turns", "flip": "flips", "fade": "fades", "never go below 0": "never"}
    counts = {name: sum(head.verdict.startswith(start) for head in heads) for name, start in kinds.items()}
    listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    rest = len(heads) - sum(counts.values())
    return f"of {len(heads)} heads {listed or 'none turns or flips'}" + (f", {rest} none of this" if rest else "")


def by_layer(heads: list[Head]) -> list[Head]:
    """Return one row per layer: extremes, medians and mean shares of its heads, the verdicts counted."""
    rows = []
    for layer in sorted({head.layer for head in heads}):
        own = [head for head in heads if head.layer == layer]
        words = [head.verdict.partition(":")[0] for head in own]
        counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        middle = {name: sorted(getattr(head, name) for head in own)[len(own) // 2] for name in ("median", "distance")}
        means = {name: sum(getattr(head, name) for head in own) / len(own) for name in ("negative", "turning")}
        ends = {"lowest": min(head.lowest for head in own), "highest": max(head.highest for head in own)}
        rows.append(replace(own[0], **middle, **means, **ends, verdict=own[0].verdict if len(own) == 1 else counted))
    return rows


def to_json(heads: list[Head]) -> list[dict[str, Any]]:
    """Return plain data."""
    return [asdict(head) for head in heads]
