"""Every family on parity and modular arithmetic without brackets, eigenvalues in [-1, 1] and [0, 1]; no paper's table.

Settings of Grazzi et al., arXiv 2411.12537, appendix E.1.1, as in recipes/p1_chomsky.py: 2 layers on parity, 3 on
arithmetic, width 128, 4 heads, batch 1024, 100,000 steps. Each layer otherwise starts as its configuration does by
default. DeltaNet, Mamba, attention, mLSTM in [0, 1] and sLSTM are cells of p1-chomsky. Cells that solve their task are
evaluated at longer lengths too.
"""

from __future__ import annotations

from functools import partial

from recipes.p1_chomsky import LONGER, TASKS, settings
from statetrack.layers import (
    DeltaProductConfig,
    DenseRNNConfig,
    GLAConfig,
    HGRN2Config,
    LSTMConfig,
    Mamba2Config,
    MixerConfig,
    MLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
)
from statetrack.results import Cell


def ranged(dim: int, lo: float) -> dict[str, MixerConfig]:
    """Return the mixers that have a range of eigenvalues, in [lo, 1]."""
    common = {"dim": dim, "heads": 4, "eigenvalues": (lo, 1.0)}
    return {
        "gated-deltanet": DeltaProductConfig(**common, gate=True),
        "kda": DeltaProductConfig(**common, gate="key", output_gate=True),
        "mamba2": Mamba2Config(**common),
        "gla": GLAConfig(**common),
        "hgrn2": HGRN2Config(**common),
        "mlstm": MLSTMConfig(**common),
        "retnet": RetNetConfig(**common),
        "rwkv6": RWKV6Config(**common),
        "rwkv7": RWKV7Config(**common),
    }


def cells(quick: bool) -> list[Cell]:
    """Return the cells; quick: 1 layer of width 64, 1,000 steps of batch 128."""
    dim = 64 if quick else 128
    rows = {f"{name}_{lo:g}to1": mixer for lo in (-1.0, 0.0) for name, mixer in ranged(dim, lo).items()}
    rows |= {"lstm": LSTMConfig(dim=dim), "dense-rnn": DenseRNNConfig(dim=dim)}
    return [
        Cell(
            name=f"{short}-{name}",
            settings=partial(settings, task=TASKS[short], mixer=mixer, quick=quick),
            length=(40, 256),
            measure="scaled_accuracy",
            sequences=1024 if quick else 8192,
            longer=LONGER[:1] if quick else LONGER,
        )
        for short in ("parity", "arithmetic")
        for name, mixer in rows.items()
    ]
