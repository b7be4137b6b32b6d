"""Grazzi et al., arXiv 2411.12537, Table 3 (best seed) and Table 5 (median): parity and modular arithmetic.

Settings of appendix E.1.1: 2 layers on parity, 3 on arithmetic, width 128, 4 heads, convolution of 4 in DeltaNet and
Mamba, batch 1024 (512 for mLSTM), 100,000 steps, AdamW with weight decay 0.1, 10 % warm-up, cosine to 1e-6, gradient
norm clipped to 1 for Transformer, Mamba and DeltaNet on arithmetic; mLSTM and sLSTM on arithmetic with width 64 and one
head; trained on lengths 3..40, evaluated on 8192 sequences of length 40..256. Both readings of the brackets: with `*`
(the main results) and without (the last column of Table 5, read as that because its baselines are near 0).

Deviations: one learning rate, 1e-3, where the paper picks the best of several per cell; no weight decay on norms and
biases; the Transformer, whose settings the paper does not give, has rotary positions and 4 heads; mLSTM and sLSTM are
mixers in our blocks (RMSNorm, SwiGLU) without mLSTM's convolution and up-projection, mLSTM with soft-capped gates.
Cells that solve their task are evaluated at longer lengths too; the paper stops at 256.
"""

from __future__ import annotations

from functools import partial

from statetrack.layers import AttentionConfig, DeltaProductConfig, MambaConfig, MixerConfig, MLSTMConfig, SLSTMConfig
from statetrack.model import Config
from statetrack.results import Cell
from statetrack.tasks import get_task
from statetrack.train import Settings

TASKS = {
    "parity": "parity",
    "arithmetic": "modular_arithmetic",
    "brackets": "modular_arithmetic_brackets",
    "brackets-no-mult": "modular_arithmetic_brackets_no_mult",
}

# (best of Table 3, median of Table 5) for each task in the order of TASKS; the last has no best
PAPER: dict[str, list[tuple[float | None, float]]] = {
    "transformer": [(0.022, 0.003), (0.031, 0.018), (0.067, 0.064), (None, 0.025)],
    "mlstm": [(0.087, 0.018), (0.040, 0.027), (0.114, 0.114), (None, 0.034)],
    "slstm": [(1.000, 1.000), (0.787, 0.124), (0.178, 0.163), (None, 0.153)],
    "mamba_0to1": [(0.000, 0.000), (0.095, 0.066), (0.123, 0.116), (None, 0.072)],
    "mamba_-1to1": [(1.000, 1.000), (0.241, 0.214), (0.116, 0.098), (None, 0.126)],
    "deltanet_0to1": [(0.017, 0.010), (0.314, 0.214), (0.194, 0.162), (None, 0.113)],
    "deltanet_-1to1": [(1.000, 0.999), (0.971, 0.826), (0.260, 0.227), (None, 0.129)],
}


FIRST = ("deltanet_-1to1", "deltanet_0to1", "mamba_-1to1", "mamba_0to1")
"""rows that run before the others"""

LONGER = (1000, 10_000, 100_000)
"""lengths for cells that solve their task"""


def mixers(dim: int, arithmetic: bool) -> dict[str, MixerConfig]:
    """Return the token mixer of every row."""
    width, heads = (dim // 2, 1) if arithmetic else (dim, 4)
    return {
        "deltanet_-1to1": DeltaProductConfig(dim=dim, heads=4, eigenvalues=(-1.0, 1.0)),
        "deltanet_0to1": DeltaProductConfig(dim=dim, heads=4, eigenvalues=(0.0, 1.0)),
        "mamba_-1to1": MambaConfig(dim=dim, eigenvalues=(-1.0, 1.0)),
        "mamba_0to1": MambaConfig(dim=dim, eigenvalues=(0.0, 1.0)),
        "transformer": AttentionConfig(dim=dim, heads=4),
        "mlstm": MLSTMConfig(dim=width, heads=heads, eigenvalues=(0.0, 1.0)),
        "slstm": SLSTMConfig(dim=width, heads=heads),
    }


def settings(seed: int, *, task: str, mixer: MixerConfig, quick: bool) -> Settings:
    """Return one run."""
    t = get_task(task)
    layers = 1 if quick else 2 if task == "parity" else 3
    return Settings(
        task=task,
        model=Config(vocab_size=t.vocab_size, num_outputs=t.num_outputs, mixers=(mixer,) * layers),
        train_length=(3, 40),
        steps=1000 if quick else 100_000,
        batch_size=128 if quick else 512 if isinstance(mixer, MLSTMConfig) else 1024,
        lr=2e-3 if quick else 1e-3,
        weight_decay=0.1,
        clip=0.0 if task == "parity" or isinstance(mixer, (MLSTMConfig, SLSTMConfig)) else 1.0,
        seed=seed,
    )


def cells(quick: bool) -> list[Cell]:
    """Return the table's cells, DeltaNet and Mamba first; quick: 1 layer of width 64, 1,000 steps of batch 128."""
    return [
        Cell(
            name=f"{short}-{name}",
            settings=partial(settings, task=task, mixer=mixer, quick=quick),
            length=(40, 256),
            measure="scaled_accuracy",
            sequences=1024 if quick else 8192,
            best=PAPER[name][column][0],
            median=PAPER[name][column][1],
            longer=LONGER[:1] if quick else LONGER,
        )
        for first in (True, False)
        for column, (short, task) in enumerate(TASKS.items())
        for name, mixer in mixers(64 if quick else 128, arithmetic=task != "parity").items()
        if (name in FIRST) == first
    ]
