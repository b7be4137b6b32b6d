"""Training that begins with a checkpoint: its function at first, then every weight learns; another model is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from statetrack.convert import convert, load
from statetrack.errors import UsageError
from statetrack.layers import DeltaProductConfig
from statetrack.lm.corpus import Corpus, prepare
from statetrack.lm.packing import Order, Rows, pack
from statetrack.lm.settings import Recipe
from statetrack.lm.train import train, with_model_of
from statetrack.unlock import unlock
from tests.command import Command
from tests.lm_runs import OPTIONS, losses, same, small, weights

MIXERS = (DeltaProductConfig(dim=32, heads=2, eigenvalues=(0.0, 1.0)),) * 2


def locked(**changes) -> Recipe:
    return small(**{"mixers": MIXERS, "tied": True, "steps": 2, "save_every": 2, "evaluate_every": 2, **changes})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory) -> Path:
    """A model whose eigenvalues lie in [0, 1], trained for two steps."""
    path = tmp_path_factory.mktemp("lm") / "run"
    train(locked(), path, data, options=OPTIONS)
    return path


def loss_of(source: Path, recipe: Recipe, data: Path) -> float:
    """Return a checkpoint's loss on the first rows that a recipe trains on."""
    rows = Order(Rows(Corpus(data).shards("train"), recipe.length), recipe.rows, recipe.seed)
    batch = pack([rows[i] for i in range(recipe.rows)])
    with torch.no_grad():
        return float(load(source)(**batch).loss)


@pytest.mark.parametrize("through", ["unlock", "delta_net"])
def test_it_begins_as_the_checkpoint_and_every_weight_learns(run: Path, data: Path, tmp_path: Path, through: str):
    """Unlocked, the lower ends of the ranges leave 0 too; fla's format is as good as ours."""
    if through == "unlock":
        unlock(run, tmp_path / "begun")
    else:
        convert(run, through, tmp_path / "begun")
    recipe = with_model_of(small(steps=3, warmup=0, seed=5), str(tmp_path / "begun"))
    assert recipe.tied and recipe.mixers[0].eigenvalues == ((-1.0, 1.0) if through == "unlock" else (0.0, 1.0))  # pyright: ignore
    train(recipe, tmp_path / "out", data, options=OPTIONS)
    assert losses(tmp_path / "out")[0] == pytest.approx(loss_of(run, recipe, data), rel=1e-5)
    before, after = load(tmp_path / "begun").state_dict(), weights(tmp_path / "out" / "model")
    assert all(not torch.equal(before[name], value) for name, value in after.items())
    assert sum(name.endswith("mixer.low") for name in after) == (2 if through == "unlock" else 0)


def test_interrupted_it_is_resumed_with_the_checkpoint_gone_on_from(run: Path, data: Path, tmp_path: Path):
    """The same bits as without a stop; what it began with is no longer looked at but for its model."""
    recipe = with_model_of(small(steps=4), str(run))
    train(recipe, tmp_path / "whole", data, options=OPTIONS)
    train(replace(recipe, steps=4), tmp_path / "cut", data, options=replace(OPTIONS, minutes=1e-6))
    train(recipe, tmp_path / "cut", data, options=OPTIONS, resume=True)
    assert same(weights(tmp_path / "cut" / "model"), weights(tmp_path / "whole" / "model"))


def test_what_does_not_fit_is_one_line(run: Path, data: Path, tmp_path: Path, capsys):
    other = tmp_path / "other"
    prepare(replace(small().data, tokenizer="bpe:301"), other)
    with pytest.raises(
        UsageError, match=r"other was made with another tokenizer than that of .*--tokenizer .*run/model"
    ):
        train(with_model_of(small(), str(run)), tmp_path / "a", other, options=OPTIONS)
    with pytest.raises(UsageError, match="is another model than that of the recipe"):
        train(replace(locked(mlp_dim=32), init=str(run)), tmp_path / "a", data, options=OPTIONS)
    command, line = Command(capsys), f"lm train tiny --data {data} --device cpu --tracker none --init"
    assert "nowhere is no directory with a checkpoint" in command.refused(f"{line} nowhere")
    assert "--eigenvalues and --init exclude" in command.refused(f"{line} {run} --eigenvalues 0 1")
    config = run.parent / "eps"
    model = load(run)
    model.config.norm_eps = 1e-3
    model.save_pretrained(config)
    assert "has num_outputs, norm_eps or post_norm of its own" in command.refused(f"{line} {config}")


def test_the_command_line_names_the_run_after_it(run: Path, data: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = f"lm train tiny --data {data} --steps 1 --rows 2 --micro-rows 2 --length 16 --tracker none --device cpu"
    assert Command(capsys)(f"{line} --init {run}")[0] == 0
    assert (tmp_path / "runs" / "lm_tiny_from_run_s0" / "model" / "config.json").exists()
