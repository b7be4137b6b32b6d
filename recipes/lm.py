"""Language models: the settings of arXiv 2411.12537 (P1, 5.3, E.3) and 2502.10297 (P2, C.3.1), and small ones.

Every function returns a fully specified run for a range of eigenvalues; `RECIPES` has them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from statetrack.layers import DeltaProductConfig, MambaConfig, MixerConfig
from statetrack.lm.corpus import Data
from statetrack.lm.settings import Recipe

Range = tuple[float, float]
BOTH: Range = (-1.0, 1.0)

FINEWEB = Data(source="HuggingFaceFW/fineweb:sample-100BT", tokenizer="mistralai/Mistral-7B-v0.1", validation=0.0005)


def tiny(eigenvalues: Range = BOTH) -> Recipe:
    """A few minutes on a CPU, from the standard library's text."""
    return Recipe(
        name="tiny",
        about="1 million parameters, a few minutes on a CPU, from the standard library's text (ours)",
        data=Data(source="stdlib", tokenizer="bpe:1024", tokens=2_000_000),
        mixers=(DeltaProductConfig(dim=128, heads=4, eigenvalues=eigenvalues),) * 4,
        length=256,
        rows=16,
        micro_rows=16,
        steps=200,
        lr=3e-3,
        min_lr=3e-4,
        warmup=20,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        log_every=10,
        save_every=100,
        evaluate_every=100,
        evaluate_rows=32,
    )


def code_100m(eigenvalues: Range = BOTH) -> Recipe:
    """About four minutes on one H100, from the Python text that is installed there."""
    return Recipe(
        name="code-100m",
        about="98 million parameters, minutes on one H100, from the installed Python packages' text (ours)",
        data=Data(source="python", tokenizer="bpe:16384", validation=0.02),
        mixers=(DeltaProductConfig(dim=768, heads=6, eigenvalues=eigenvalues),) * 12,
        tied=True,
        length=2048,
        rows=64,
        micro_rows=32,
        steps=500,
        lr=1e-3,
        min_lr=1e-4,
        warmup=50,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        save_every=250,
        evaluate_every=100,
        evaluate_rows=128,
    )


P1_SIZES: dict[str, tuple[str, MixerConfig, int, dict[str, Any]]] = {
    "340m": ("DeltaNet 340M: 105", DeltaProductConfig(dim=1024, heads=8), 24, {}),
    "370m": ("Mamba 370M: 105", MambaConfig(dim=1024), 48, {"mlp_dim": 0}),
    "1.3b": (
        "DeltaNet 1.3B: 98",
        DeltaProductConfig(dim=2048, heads=16),
        24,
        {"rows": 960, "micro_rows": 6, "steps": 50_000, "warmup": 500, "save_every": 1000, "evaluate_every": 1000},
    ),
}
"""size: name and billions of tokens, mixer, layers, and what differs from the others

P1 does not give layers and heads: those of 340m are P2's, and tied make 342 million parameters; those of 370m are the
published Mamba's (arXiv 2312.00752).
"""


def p1(size: str, eigenvalues: Range = BOTH) -> Recipe:
    """DeltaNet and Mamba of P1's Table 4; 1.3b: 32 processes with 6 rows at once, accumulated 5 times."""
    about, mixer, layers, different = P1_SIZES[size]
    mixer = replace(mixer, eigenvalues=eigenvalues)  # pyright: ignore[reportCallIssue]
    common = Recipe(
        name=f"p1-{size}",
        about=f"{about} billion tokens of FineWeb, arXiv 2411.12537, Table 4",
        data=FINEWEB,
        mixers=(mixer,) * layers,
        tied=True,
        rows=256,
        micro_rows=16,
        steps=200_000,
        warmup=250,
        save_every=2000,
        evaluate_every=2000,
    )
    return replace(common, **different)


P2_SIZES = {
    "213m": ({1: (768, 8), 2: (736, 6), 3: (768, 4)}, 36_240, "19"),
    "392m": ({1: (1024, 12), 2: (1024, 8), 3: (1024, 6)}, 66_758, "35"),
    "805m": ({1: (1536, 16), 2: (1468, 12), 3: (1536, 8)}, 104_905, "55"),
}
"""size: width and heads by factors per token (P2, Table 6), steps, billions of tokens"""


def p2(size: str, factors: int, eigenvalues: Range = BOTH) -> Recipe:
    """DeltaProduct of P2's Table 4: as many parameters whatever the factors, by fewer heads."""
    shapes, steps, tokens = P2_SIZES[size]
    dim, heads = shapes[factors]
    mixer = DeltaProductConfig(dim=dim, heads=heads, head_dim=128, factors=factors, eigenvalues=eigenvalues)
    return Recipe(
        name=f"p2-{size}-n{factors}",
        about=f"DeltaProduct {size.upper()}, {factors} factors, of arXiv 2502.10297, Table 4: {tokens} billion tokens",
        data=FINEWEB,
        mixers=(mixer,) * 24,
        tied=True,
        initializer_range=0.006,
        length=4096,
        rows=128,
        micro_rows=8,
        steps=steps,
        min_lr=3e-5,
        warmup=512,
        betas=(0.9, 0.95),
        seed=42,
        save_every=2000,
        evaluate_every=2000,
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    "tiny": tiny,
    "code-100m": code_100m,
    **{f"p1-{size}": partial(p1, size) for size in P1_SIZES},
    **{f"p2-{size}-n{factors}": partial(p2, size, factors) for size in P2_SIZES for factors in (1, 2, 3)},
}
