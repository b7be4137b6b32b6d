"""Training: resumed to the last bit, on several processes as on one, never half a checkpoint, never a lost run."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from recipes.lm import RECIPES
from statetrack.cli import parse
from statetrack.errors import UsageError
from statetrack.layers.common import decayed_names
from statetrack.lm.corpus import Corpus, prepare
from statetrack.lm.settings import Recipe, cost, peak_flops
from statetrack.lm.train import Options, build, train
from statetrack.train import Interrupted
from tests.command import Command
from tests.lm_runs import OPTIONS, ROOT, acting, losses, same, small, spread, weights


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    path = tmp_path_factory.mktemp("lm") / "whole"
    train(small(), path, data, options=Options(device="cpu"))
    return path


def test_a_run_leaves_what_it_says(whole: Path):
    names = {p.name for p in whole.iterdir()}
    assert {"recipe.json", "metrics.jsonl", "model", "checkpoint-4", "checkpoint-6", "training.png", "runs"} <= names
    assert list(whole.glob("runs/*/events*")), "TensorBoard's file"
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in logged)
    assert logged[-1]["loss"] < logged[0]["loss"] - 0.1
    assert [row["step"] for row in rows if "eval_loss" in row] == [3, 6]
    assert Recipe.from_dict({k: v for k, v in json.loads((whole / "recipe.json").read_text())["settings"].items()
                             if k != "tokenizer_digest"}) == small()  # fmt: skip


def test_the_first_loss_is_that_of_the_seeds_weights_on_the_seeds_rows(whole: Path, data: Path):
    from statetrack.lm.packing import Order, Rows, pack

    corpus, recipe = Corpus(data), small()
    model = build(recipe, corpus).train()
    rows = Order(Rows(corpus.shards("train"), recipe.length), recipe.rows, recipe.seed)
    batch = pack([rows[i] for i in range(recipe.rows)])
    assert losses(whole)[0] == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)


@pytest.mark.parametrize("stop_at", [2, 3])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    whole: Path, data: Path, tmp_path: Path, monkeypatch, stop_at: int, capsys
):
    """SIGINT at a step that is saved anyway, and at one that is not."""
    with monkeypatch.context() as patched:
        acting(patched, stop_at, lambda **_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=f"stopped at step {stop_at}") as stopped:
            train(small(), tmp_path / "run", data, options=OPTIONS)
    assert stopped.value.signum == signal.SIGINT
    assert "stopping when this step is done and saved" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()
    train(small(), tmp_path / "run", data, options=OPTIONS, resume=True)
    assert same(weights(tmp_path / "run" / "model"), weights(whole / "model"))
    assert losses(tmp_path / "run") == losses(whole)


def test_a_resumed_run_is_as_fast_as_it_is(data: Path, tmp_path: Path, monkeypatch):
    """With a clock that goes on by a second whenever it is read, all steps take the same time, resumed or not."""
    from statetrack.lm import trainer

    ticks = itertools.count()
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(ticks), monotonic=time.monotonic))
    train(small(steps=3, save_every=3), tmp_path, data, options=OPTIONS)
    train(small(save_every=3), tmp_path, data, options=OPTIONS, resume=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    speeds = {row["step"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    assert list(speeds) == [1, 2, 3, 4, 5, 6] and all(speeds[n + 3] == speeds[n] for n in (1, 2, 3))


def test_a_full_disk_leaves_the_last_good_checkpoint(whole: Path, data: Path, tmp_path: Path, monkeypatch):
    """The optimiser's state, written after the weights, does not fit any more."""
    path, save = tmp_path / "run", torch.save

    def full(state, file, *args, **kwargs):
        if "checkpoint-4" in str(file) and "optimizer" in str(file):
            Path(file).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(state, file, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(UsageError, match="step 4 cannot be written: .*No space left.*last good checkpoint is .*-2"):
            train(small(), path, data, options=OPTIONS)
    assert [p.name for p in path.glob("checkpoint-*")] == ["checkpoint-2"]
    train(small(), path, data, options=OPTIONS, resume=True)
    assert same(weights(path / "model"), weights(whole / "model"))


def test_half_a_checkpoint_of_a_killed_process_is_not_gone_on_from(whole: Path, data: Path, tmp_path: Path):
    path = tmp_path / "run"
    train(small(steps=4), path, data, options=OPTIONS)
    (path / "checkpoint-4" / "complete.json").unlink()
    (path / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"other settings \(lr: 0.01 there, 0.001 now\)"):
        train(small(lr=1e-3), path, data, options=OPTIONS, resume=True)
    train(small(steps=4), path, data, options=OPTIONS, resume=True)
    assert losses(path)[:2] == losses(whole)[:2] and len(losses(path)) == 4


def test_a_weight_that_is_not_finite_stops_the_run_and_is_not_saved(data: Path, tmp_path: Path, monkeypatch):
    def spoil(model, **_):
        next(iter(model.parameters())).data[0] = float("nan")

    acting(monkeypatch, 4, spoil)
    with pytest.raises(UsageError, match="not finite after step 4; the last good checkpoint is .*checkpoint-2"):
        train(small(log_every=3), tmp_path, data, options=OPTIONS)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path, monkeypatch):
    def spoil(model, **_):
        next(iter(model.parameters())).data.fill_(float("nan"))

    acting(monkeypatch, 1, spoil)
    with pytest.raises(UsageError, match="loss is nan at step 2; there is no checkpoint yet; lower the learning rate"):
        train(small(save_every=5), tmp_path, data, options=OPTIONS)


def test_the_time_limit_saves_and_ends(data: Path, tmp_path: Path):
    last = train(small(steps=1000), tmp_path, data, options=replace(OPTIONS, minutes=1e-6))
    assert last["step"] == 1 and (tmp_path / "checkpoint-1" / "complete.json").exists()
    assert weights(tmp_path / "model")


def test_another_tokenizer_or_run_is_refused(whole: Path, data: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="holds a run; --resume to go on, --force to replace it"):
        train(small(), whole, data, options=OPTIONS)
    other = tmp_path / "other"
    prepare(replace(small().data, tokenizer="bpe:301"), other)
    with pytest.raises(UsageError, match="started on data of another tokenizer"):
        train(small(), whole, other, options=OPTIONS, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty and not a run"):
        train(small(), tmp_path / "mine", data, options=OPTIONS)
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rows": 6}, "rows=6 per step do not divide by micro_rows=4 times 1 processes"),
        ({"lr": 0.0}, "learning rates"),
        ({"length": 1}, "length must be at least 2"),
        ({"documents": "mixed"}, "accepted: documents separate, joined"),
        ({"length": 100_000}, "not enough for one row"),
    ],
)
def test_bad_settings_are_one_line(data: Path, tmp_path: Path, changes: dict, message: str):
    with pytest.raises(UsageError, match=message):
        train(small(**changes), tmp_path, data, options=OPTIONS)


def test_wandb_is_asked_for_only_where_it_is_installed(data: Path, tmp_path: Path):
    pytest.importorskip("transformers")
    if find_spec("wandb") is None:
        with pytest.raises(UsageError, match=r"wandb is not installed: pip install 'statetrack\[wandb\]'"):
            train(small(), tmp_path, data, options=replace(OPTIONS, trackers=("wandb",)))


def on_processes(data: Path, path: Path, *stop: int, parallel: str = "fsdp", count: int = 2) -> str:
    """Run tests/lm_processes.py under torchrun, on a port of its own; return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m", "tests.lm_processes"]
    done = subprocess.run(
        [sys.executable, *command, str(data), str(path), parallel, *map(str, stop)],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one(data: Path, tmp_path: Path):
    """The same command under torchrun, with FSDP2: the second process begins with no weights at all."""
    on_processes(data, tmp_path / "two")
    train(spread(), tmp_path / "one", data, options=OPTIONS)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = weights(tmp_path / "one" / "model"), weights(tmp_path / "two" / "model")
    assert torch.equal(two.pop("model.head.weight", two["model.embed.weight"]), two["model.embed.weight"])
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name


def test_two_processes_that_are_stopped_go_on_to_the_same_bits(data: Path, tmp_path: Path):
    """A signal to one of them stops both after step 3, at which nothing would have been saved. Four go on as two do,
    but for the rounding of sums; one, which has no FSDP2, does not.
    """
    on_processes(data, tmp_path / "whole")
    assert "stopped at step 3" in on_processes(data, tmp_path / "run", 3)
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(UsageError, match="checkpoint-3 was written with FSDP2; go on with FSDP2"):
        train(spread(), tmp_path / "run", data, options=OPTIONS, resume=True)
    shutil.copytree(tmp_path / "run", tmp_path / "four")
    on_processes(data, tmp_path / "run")
    assert same(weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    on_processes(data, tmp_path / "four", count=4)
    assert losses(tmp_path / "four")[:3] == losses(tmp_path / "run")[:3]
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "run"), rel=1e-5)


def test_another_number_of_processes_goes_on_or_is_refused(data: Path, tmp_path: Path, monkeypatch):
    """One process to two and back: not with FSDP2; with weights whole on each, the same run but for rounding."""
    train(spread(), tmp_path / "whole", data, options=OPTIONS)
    with monkeypatch.context() as patched:
        acting(patched, 3, lambda **_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted):
            train(spread(), tmp_path / "run", data, options=OPTIONS)
    said = on_processes(data, tmp_path / "run")
    assert "checkpoint-3 was written without FSDP2; go on without FSDP2" in said
    assert "stopped at step 5" in on_processes(data, tmp_path / "run", 5, parallel="ddp")
    train(spread(), tmp_path / "run", data, options=OPTIONS, resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    ours, whole = (weights(tmp_path / name / "model") for name in ("run", "whole"))
    assert all(torch.allclose(ours[name], whole[name], atol=2e-4) for name in whole)


def test_a_weight_that_was_lost_on_the_way_is_noticed(data: Path, tmp_path: Path, monkeypatch):
    from statetrack.lm import trainer

    sums = trainer.sums
    calls = []

    def changed(model):
        if calls:  # after the weights were placed
            next(iter(model.parameters())).data[3] = 0
        calls.append(1)
        return sums(model)

    monkeypatch.setattr(trainer, "sums", changed)
    with pytest.raises(UsageError, match="embed.weight is not as it was initialised"):
        train(small(), tmp_path, data, options=OPTIONS)


def test_an_empty_model_keeps_what_weight_decay_spares(data: Path):
    full, empty = build(small(), Corpus(data)), build(small(), Corpus(data), empty=True)
    names = decayed_names(full)
    assert decayed_names(empty) == names
    assert sum(p.ndim >= 2 and name not in names for name, p in full.named_parameters()) >= 2


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_papers_sizes(name: str):
    for eigenvalues in ((0.0, 1.0), (-1.0, 1.0)):
        recipe = RECIPES[name](eigenvalues=eigenvalues)
        recipe.check()
        assert all(m.eigenvalues == eigenvalues for m in recipe.mixers)  # pyright: ignore
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    vocabulary = {"tiny": 1024, "code-100m": 16384}.get(name, 32_000)
    size = cost(recipe.model(vocabulary), recipe.tied).parameters / 1e6
    told = {"tiny": 1.3, "code-100m": 98, "p1-370m": 353, "p1-1.3b": 1300}
    said = told[name] if name in told else float(name.split("-")[1].removesuffix("m"))
    assert size == pytest.approx(said, rel=0.02)


def test_cost_counts_what_a_model_has(data: Path):
    for tied in (False, True):
        recipe = small(tied=tied)
        model = build(recipe, Corpus(data))
        counted = cost(recipe.model(300), tied)
        assert counted.parameters == sum(p.numel() for p in model.parameters())
        assert 6 * counted.parameters * 0.5 < counted.flops < 6 * counted.parameters * 1.5
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("abacus") is None


def test_the_command_line_trains(capsys, tmp_path: Path, data: Path, monkeypatch):
    command = Command(capsys)
    monkeypatch.chdir(tmp_path)
    line = f"lm train tiny --data {data} --steps 1 --rows 2 --micro-rows 2 --length 16 --tracker none --device cpu"
    code, out, _ = command(f"{line} --eigenvalues 0 1")
    assert code == 0 and "trained to step 1" in out and Path("runs/lm_tiny_0to1_s0/model/config.json").exists()
    said, _, following = out.rpartition("next: statetrack ")
    assert said and command(following)[0] == 0
    assert "nowhere holds no prepared data; first: statetrack lm prepare" in command.refused(
        "lm train tiny --data nowhere"
    )
    assert "see statetrack lm train --help" in command.refused(f"{line} --lr much")
    assert "unknown recipe 'huge'; accepted: tiny, code-100m" in command.refused("lm train huge")
    assert "holds a run" in command.refused(f"{line} --eigenvalues 0 1")
    code, out, _ = command("lm recipes")
    assert code == 0 and "p2-805m-n3" in out


def test_the_documentation_commands_are_understood():
    """Every `statetrack lm` line of the page is one that the command line takes."""
    page = (ROOT / "docs" / "language_models.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^    statetrack (lm .*?)(?: <.*)?$", page, re.MULTILINE)
    lines += re.findall(r"-m statetrack\.cli (lm .*)$", page, re.MULTILINE)
    assert len(lines) >= 12
    for line in lines:
        parse(shlex.split(line, comments=True))
