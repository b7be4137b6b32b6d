"""Small language models for the tests: their recipes, what a run left, something that happens in the middle of one."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from recipes.lm import tiny
from statetrack.layers import DeltaProductConfig, MambaConfig
from statetrack.lm.corpus import Data
from statetrack.lm.settings import Recipe
from statetrack.lm.train import Options

ROOT = Path(__file__).parent.parent
TEXT = str(Path(asyncio.__file__).parent)
OPTIONS = Options(device="cpu", trackers=())


def small(**changes) -> Recipe:
    """A run of seconds."""
    settings = {
        "data": Data(source=TEXT, tokenizer="bpe:300", tokens=60_000, validation=0.2),
        "mixers": (DeltaProductConfig(dim=32, heads=2), MambaConfig(dim=32, state_size=4)),
        "mlp_dim": 64,
        "length": 48,
        "rows": 8,
        "micro_rows": 4,
        "steps": 6,
        "warmup": 1,
        "lr": 1e-2,
        "log_every": 1,
        "save_every": 2,
        "evaluate_every": 3,
        "evaluate_rows": 8,
    }
    return replace(tiny(), **{**settings, **changes})


def spread(**changes) -> Recipe:
    """A run for several processes. Not Mamba: its CPU kernel sees weights as numpy arrays, which FSDP2 cannot free."""
    return small(tied=True, mixers=(DeltaProductConfig(dim=32, heads=2),) * 2, micro_rows=2, **changes)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def losses(path: Path) -> list[float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Stop:
    """A callback that does something after a step."""

    def __new__(cls, step: int, act):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                del args, control
                if state.global_step == step:
                    act(**kwargs)

        return Callback()


def acting(monkeypatch, step: int, act) -> None:
    """Let the next runs do something after a step, before anything is saved."""
    from statetrack.lm import trainer

    init = trainer.LMTrainer.__init__

    def with_callback(self, **kwargs):
        init(self, **kwargs)
        self.callback_handler.callbacks.insert(0, Stop(step, act))

    monkeypatch.setattr(trainer.LMTrainer, "__init__", with_callback)
