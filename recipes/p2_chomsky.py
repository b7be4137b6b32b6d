"""Siems et al., arXiv 2502.10297, Table 2: DeltaProduct with N = 1..4 factors on parity and modular arithmetic.

Settings of appendix C.2: 3 layers, one head of 128 (with brackets 12 heads of 32), convolution of 4, learning rate
5e-4, batch 1024, weight decay 0.1, 10 % warm-up, cosine to 1e-6, gradient norm clipped to 1 on arithmetic; 20,000 steps
on parity, 100,000 on arithmetic; trained on lengths 3..40, evaluated on 8192 sequences of length 40..256. The paper
gives the best of 3 seeds. Deviations: no weight decay on norms and biases; the brackets without `*` are ours. The
paper's row of DeltaNet differs from that of 2411.12537, which it cites for it. Cells that solve their task are
evaluated at longer lengths too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from recipes import p1_chomsky
from statetrack.layers import DeltaProductConfig, MixerConfig
from statetrack.results import Cell
from statetrack.train import Settings

# best of 3 seeds for parity, arithmetic without and with brackets
PAPER: dict[tuple[float, int], tuple[float, float, float]] = {
    (-1.0, 1): (0.982, 0.915, 0.281),
    (-1.0, 2): (0.896, 0.887, 0.329),
    (-1.0, 3): (0.932, 0.736, 0.330),
    (-1.0, 4): (0.982, 0.893, 0.342),
    (0.0, 1): (0.233, 0.302, 0.253),
    (0.0, 2): (0.264, 0.402, 0.249),
    (0.0, 3): (0.285, 0.402, 0.288),
    (0.0, 4): (0.295, 0.369, 0.288),
}


def mixer(factors: int, lo: float, *, brackets: bool, quick: bool) -> MixerConfig:
    """Return the token mixer of one cell."""
    heads, width = (4, 16) if quick else (12, 32) if brackets else (1, 128)
    return DeltaProductConfig(
        dim=64 if quick else 128, heads=heads, head_dim=width, factors=factors, eigenvalues=(lo, 1.0)
    )


def settings(seed: int, *, task: str, mixer: MixerConfig, quick: bool) -> Settings:
    """Return one run."""
    base = p1_chomsky.settings(seed, task=task, mixer=mixer, quick=quick)
    if quick:
        return base
    model = replace(base.model, mixers=(mixer,) * 3)
    return replace(base, model=model, steps=20_000 if task == "parity" else 100_000, lr=5e-4)


def cells(quick: bool) -> list[Cell]:
    """Return the table's cells; quick: 1 layer of width 64, 4 heads of 16, 1,000 steps of batch 128."""
    return [
        Cell(
            name=f"{short}-N{factors}_{lo:g}to1",
            settings=partial(
                settings, task=task, quick=quick, mixer=mixer(factors, lo, brackets="brackets" in task, quick=quick)
            ),
            length=(40, 256),
            measure="scaled_accuracy",
            sequences=1024 if quick else 8192,
            best=None if short == "brackets-no-mult" else best[column],
            longer=p1_chomsky.LONGER[:1] if quick else p1_chomsky.LONGER,
        )
        for column, (short, task) in enumerate(p1_chomsky.TASKS.items())
        for (lo, factors), best in PAPER.items()
    ]
