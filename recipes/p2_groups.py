"""Siems et al., arXiv 2502.10297, Figure 5 and Figure 12: S3, S4, A5, S5 with one layer and N = 1..4 factors per token.

Settings of appendix C.1: trained on length 128, tested on 512; batch 1024 (2048 for S3), 195,312 steps (100 epochs of
2 million), AdamW (0.9, 0.999), learning rate 1e-3 on a cosine without warm-up, weight decay 1e-6, width 128, 12 heads
of 32, no convolution, no gate. Deviations: sequences are drawn afresh; weights are kept in float32 (the paper's in
bfloat16).
"""

from __future__ import annotations

from functools import partial

from statetrack.layers import DeltaProductConfig
from statetrack.model import Config
from statetrack.results import Cell
from statetrack.tasks import get_task
from statetrack.train import Settings

ENOUGH = {"S3": 2, "S4": 2, "A5": 2, "S5": 4}
"""factors with which one layer learns the group (Figure 5)"""

S5_AT_512 = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.01}
"""sequence accuracy read off Figure 1 at its right end (length 500)"""


def settings(seed: int, *, group: str, factors: int, eigenvalues: tuple[float, float], quick: bool) -> Settings:
    """Return one run."""
    t = get_task(group)
    length = 16 if quick else 128
    batch_size = 128 if quick else 2048 if group == "S3" else 1024
    mixer = DeltaProductConfig(
        dim=64 if quick else 128,
        heads=4 if quick else 12,
        head_dim=16 if quick else 32,
        factors=factors,
        conv_size=0,
        eigenvalues=eigenvalues,
    )
    return Settings(
        task=group,
        model=Config(vocab_size=t.vocab_size, num_outputs=t.num_outputs, mixers=(mixer,)),
        train_length=(length, length),
        steps=1000 if quick else 100 * 2_000_000 // batch_size,
        batch_size=batch_size,
        lr=3e-3 if quick else 1e-3,
        min_lr=0.0,
        warmup=0.05 if quick else 0.0,
        weight_decay=1e-6,
        seed=seed,
    )


def says(group: str, factors: int, lo: float) -> str:
    """Return what the paper reports of a curve."""
    if lo == 0:
        return "does not learn even length 128"
    return "learned at and beyond length 128" if factors >= ENOUGH[group] else "not learned"


def cells(quick: bool) -> list[Cell]:
    """Return the figure's curves; quick: length 16, width 64, 4 heads of 16, 1,000 steps of batch 128."""
    return [
        Cell(
            name=f"{group}-N{factors}_{lo:g}to1",
            settings=partial(settings, group=group, factors=factors, eigenvalues=(lo, 1.0), quick=quick),
            length=64 if quick else 512,
            measure="sequence_accuracy",
            sequences=512 if quick else 8192,
            longer=(1000,) if quick else (4096, 100_000),
            best=S5_AT_512[factors] if group == "S5" and lo == -1 else None,
            says=says(group, factors, lo),
        )
        for group in ENOUGH
        for lo in (-1.0, 0.0)
        for factors in (1, 2, 3, 4)
    ]
