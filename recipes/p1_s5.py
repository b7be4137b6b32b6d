"""Grazzi et al., arXiv 2411.12537, Figure 4 (S5 in four variants) and Figure 8 (Z60): group word problems.

Settings of appendix E.2: trained on length 32 (64 where elements are spread over tokens), tested to length 500; batch
512, 312,500 steps (100 epochs of 1.6 million), AdamW, learning rate 1e-4, weight decay 0.01, gradient norm clipped to
1, width 128, 4 heads, no convolution in DeltaNet, Mamba with its own. Deviations: sequences are drawn afresh instead
of 1.6 million fixed ones; the learning rate follows a cosine with 10 % warm-up (the paper names no schedule). The
paper prints curves, no numbers.
"""

from __future__ import annotations

from functools import partial

from statetrack.layers import DeltaProductConfig, MambaConfig, MixerConfig
from statetrack.model import Config
from statetrack.results import Cell
from statetrack.tasks import get_task
from statetrack.train import Settings

TASKS = {"S5_swaps": 32, "S5_up_to_3": 32, "S5_4_tokens": 64, "S5": 32, "Z60": 32, "Z60_2_tokens": 64}
"""task: training length"""

SAYS = {
    "S5_swaps-deltanet_-1to1-1l": "fully learns the task",
    "S5_swaps-deltanet_0to1-5l": "generalises just slightly beyond the training length",
    "S5_up_to_3-deltanet_-1to1-5l": "still good length generalisation",
    "S5_4_tokens-deltanet_-1to1-5l": "extrapolates very well until around length 200; one of 3 seeds failed",
    "Z60-mamba_-1to1-5l": "best of all, none extrapolates well",
}


def mixers(dim: int) -> dict[str, tuple[MixerConfig, int]]:
    """Return the token mixer and the number of layers of every curve."""
    rows: dict[str, tuple[MixerConfig, int]] = {}
    for name, eigenvalues in (("0to1", (0.0, 1.0)), ("-1to1", (-1.0, 1.0))):
        delta = DeltaProductConfig(dim=dim, heads=4, conv_size=0, eigenvalues=eigenvalues)
        rows[f"deltanet_{name}-1l"] = (delta, 1)
        rows[f"deltanet_{name}-5l"] = (delta, 5)
        rows[f"mamba_{name}-5l"] = (MambaConfig(dim=dim, eigenvalues=eigenvalues), 5)
    return rows


def settings(seed: int, *, task: str, mixer: MixerConfig, layers: int, quick: bool) -> Settings:
    """Return one run."""
    t = get_task(task)
    length = TASKS[task] // 4 if quick else TASKS[task]
    return Settings(
        task=task,
        model=Config(vocab_size=t.vocab_size, num_outputs=t.num_outputs, mixers=(mixer,) * layers),
        train_length=(length, length),
        steps=1000 if quick else 312_500,
        batch_size=128 if quick else 512,
        lr=3e-3 if quick else 1e-4,
        weight_decay=0.01,
        seed=seed,
    )


def cells(quick: bool) -> list[Cell]:
    """Return the figure's curves; quick: width 64, a quarter of the length, 1,000 steps of batch 128."""
    return [
        Cell(
            name=f"{task}-{name}",
            settings=partial(settings, task=task, mixer=mixer, layers=layers, quick=quick),
            length=125 if quick else 500,
            measure="sequence_accuracy",
            sequences=512 if quick else 8192,
            longer=(1000,) if quick else (4096, 100_000),
            says=SAYS.get(f"{task}-{name}", ""),
        )
        for task in TASKS
        for name, (mixer, layers) in mixers(64 if quick else 128).items()
    ]
