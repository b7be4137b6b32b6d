"""Every family on parity, the same small model but for the mixer, with eigenvalues in [-1, 1] and in [0, 1].

    python -m recipes.families --seeds 0 1 2

trains one block of width 32 per family, range and seed, up to a minute or so each on one core, and prints the table of
docs/families.md. The settings are the demo's (recipes/demo.py says why label smoothing and the norm's epsilon). A gate
that is to flip a state must be able to reach the low end of its range within the first steps: GLA gets temperature 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from statetrack.evaluate import evaluate
from statetrack.layers import (
    DeltaProductConfig,
    DenseRNNConfig,
    GLAConfig,
    HGRN2Config,
    LSTMConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    MLSTMConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
    SLSTMConfig,
)
from statetrack.model import Config
from statetrack.tasks import get_task
from statetrack.train import Settings, train

RANGES = {"[-1, 1]": (-1.0, 1.0), "[0, 1]": (0.0, 1.0)}
EVALUATED = (40, 256)
"""lengths asked, drawn uniformly; the model is trained on 3 to 40"""


def mixers(eigenvalues: tuple[float, float]) -> dict[str, MixerConfig]:
    """Return the mixer of every family that has a range."""
    delta = {"dim": 32, "heads": 8, "conv_size": 0, "beta_std": 4.0, "norm_eps": 0.1, "eigenvalues": eigenvalues}
    small = {"dim": 32, "heads": 8, "gate_std": 4.0, "norm_eps": 0.1, "eigenvalues": eigenvalues}
    steps = (0.1, 1.0)
    return {
        "DeltaNet": DeltaProductConfig(**delta),
        "KDA": DeltaProductConfig(**delta, gate="key"),
        "Mamba": MambaConfig(dim=32, state_size=4, rank=32, conv_size=0, dt_range=steps, eigenvalues=eigenvalues),
        "Mamba-2": Mamba2Config(**small, state_size=8, conv_size=0, dt_range=steps),
        "GLA": GLAConfig(**small, temperature=1.0),
        "HGRN2": HGRN2Config(dim=32, heads=8, norm_eps=0.1, eigenvalues=eigenvalues),
        "mLSTM": MLSTMConfig(**small),
        "RWKV-6": RWKV6Config(**small),
        "RWKV-7": RWKV7Config(**{**small, "heads": 2}),
        "RetNet": RetNetConfig(dim=32, heads=8, norm_eps=0.1, eigenvalues=eigenvalues),
    }


def baselines() -> dict[str, MixerConfig]:
    """Return the mixers without a range."""
    return {"LSTM": LSTMConfig(dim=32), "sLSTM": SLSTMConfig(dim=32), "DenseRNN": DenseRNNConfig(dim=32, state_size=8)}


def settings(mixer: MixerConfig, seed: int) -> Settings:
    """Return one run."""
    return Settings(
        task="parity",
        model=Config(vocab_size=3, num_outputs=3, mixers=(mixer,), mlp_dim=64),
        train_length=(3, 40),
        steps=300,
        batch_size=128,
        lr=1e-2,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        label_smoothing=0.1,
        seed=seed,
        device="cpu",
    )


def cell(name: str, mixer: MixerConfig, seed: int, out: Path) -> float:
    """Train one run, or go on with it, and return its scaled accuracy at the lengths asked."""
    model = train(settings(mixer, seed), out / f"{name}_s{seed}", resume=True).eval()
    return evaluate(model, get_task("parity"), EVALUATED, sequences=1024)["scaled_accuracy"]


def main() -> None:
    """Print the table, a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="names of families; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/families"))
    a = parser.parse_args()
    by_range = {label: mixers(eigenvalues) for label, eigenvalues in RANGES.items()}
    print(f"| scaled accuracy, seeds {' '.join(map(str, a.seeds))} | {' | '.join(RANGES)} |\n|---|---|---|")
    for name in [n for n in mixers((-1.0, 1.0)) if not a.only or n in a.only]:
        cells = [
            [cell(f"{name}_{lo:g}to{hi:g}", by_range[label][name], seed, a.out) for seed in a.seeds]
            for label, (lo, hi) in RANGES.items()
        ]
        print(f"| {name} | {' | '.join(' '.join(f'{x:.3f}' for x in found) for found in cells)} |", flush=True)
    for name, mixer in baselines().items():
        if not a.only or name in a.only:
            found = " ".join(f"{cell(name, mixer, seed, a.out):.3f}" for seed in a.seeds)
            print(f"| {name} (no range) | {found} | |", flush=True)


if __name__ == "__main__":
    main()
