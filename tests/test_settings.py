"""A run's settings: what is refused, and what the optimiser makes of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from statetrack import runs
from statetrack.errors import UsageError
from statetrack.execution import optimizer_for
from statetrack.train import Settings, learning_rate, train
from tests.test_train import MIXERS, assert_same_run, rows, tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"log_every": 0}, "log_every must be at least 1, got 0"),
        ({"lr": -1.0}, "got 1e-06 and -1.0"),
        ({"lr": math.nan}, "got 1e-06 and nan"),
        ({"lr": 1e-7}, "min_lr <= lr"),
        ({"warmup": 1.5}, "between 0 and 1, got 1.5"),
        ({"warmup": math.nan}, "between 0 and 1, got nan"),
        ({"weight_decay": -0.1}, "at least 0"),
        ({"weight_decay": math.nan}, "at least 0"),
        ({"clip": math.nan}, "at least 0"),
        ({"betas": (0.9, 1.0)}, "betas must lie in"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and below 1, got 1.0"),
        ({"label_smoothing": math.nan}, "label_smoothing must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 1 << 63}, "seed must be at least 0 and below"),
        ({"precision": "float16"}, "got 'float16'"),
        ({"execution": "fast"}, "execution must be auto, eager, compile, graph or compile.graph, got 'fast'"),
        ({"execution": "graph"}, "execution='graph' needs a CUDA device, got cpu; accepted here: eager, compile"),
        ({"device": "meta"}, "got 'meta'"),
        ({"device": "cuda:99"}, "'cuda:99' cannot be used"),
        ({"task": "partiy"}, "did you mean 'parity'"),
        ({"train_length": (0, 5)}, "2 <= lo <= hi, got lo = 0"),
    ],
)
def test_bad_settings_change_nothing(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        train(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_survive_json():
    for mixer in MIXERS:
        settings = tiny(mixer, train_length=(2, 9), betas=(0.5, 0.75))
        assert Settings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize("mixer", MIXERS)
def test_weight_decay_is_on_matrices_only(mixer: str):
    settings = tiny(mixer, weight_decay=0.3)
    model = settings.model.build()
    decay = {id(p): g["weight_decay"] for g in optimizer_for(model, settings).param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        free = p.ndim < 2 or "norm" in name or "bias" in name or name.endswith(("conv.weight", "A_log"))
        assert decay[id(p)] == (0.0 if free else 0.3), name
    assert set(decay.values()) == {0.0, 0.3}


def test_weight_decay_acts(tmp_path: Path):
    free = nn.Module.state_dict(train(tiny(weight_decay=0.0), tmp_path / "free"))
    decayed = train(tiny(weight_decay=10.0), tmp_path / "decayed").state_dict()
    assert decayed["head.weight"].norm() < free["head.weight"].norm()


def test_learning_rate():
    settings = tiny(steps=100, lr=2.0, min_lr=0.5, warmup=0.1)
    rates = [learning_rate(settings, step) for step in range(101)]
    assert rates[:10] == [2.0 * (i + 1) / 10 for i in range(10)]
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.25) and rates[100] == 0.5
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert learning_rate(replace(settings, warmup=0.0), 0) == 2.0
    assert learning_rate(replace(settings, warmup=1.0), 99) == 2.0


def test_clipping_bounds_the_step(tmp_path: Path):
    """What is logged is the norm before clipping; the weights follow the clipped gradient."""
    train(tiny(clip=0.0), tmp_path / "none")
    train(tiny(clip=1e9), tmp_path / "far")
    train(tiny(clip=1e-12), tmp_path / "hard")
    assert_same_run(tmp_path / "none", tmp_path / "far")
    assert rows(tmp_path / "hard")[0]["grad_norm"] > 1e-6
    free, hard = (runs.Run(tmp_path / name).load_checkpoint()["optimizer"]["state"] for name in ("none", "hard"))
    assert all(hard[i]["exp_avg"].norm() <= 1e-12 for i in hard)
    assert max(free[i]["exp_avg"].norm() for i in free) > 1e-6
