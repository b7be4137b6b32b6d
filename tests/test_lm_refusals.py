"""What is broken, full, missing or of another kind: one line, exit code 2, and the last good checkpoint stays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file, save_file

from statetrack.errors import UsageError
from statetrack.layers import DeltaProductConfig
from statetrack.lm.corpus import prepare
from statetrack.lm.settings import Recipe
from statetrack.lm.train import train
from tests.command import Command, the_line
from tests.lm_runs import OPTIONS, ROOT, TEXT, small


def recipe(**changes) -> Recipe:
    mixers = (DeltaProductConfig(dim=32, heads=2),)
    return small(**{"mixers": mixers, "steps": 4, "evaluate_every": 4, **changes})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory) -> Path:
    """A run with checkpoints of steps 2 and 4, and its model."""
    path = tmp_path_factory.mktemp("lm") / "run"
    train(recipe(), path, data, options=OPTIONS)
    return path


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def command(capsys) -> Command:
    return Command(capsys)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
@pytest.mark.parametrize("how", ["missing", "bytes, not"])
def test_a_checkpoint_that_was_damaged_is_not_gone_on_from(copy: Path, data: Path, name: str, how: str):
    file, stored = copy / "checkpoint-4" / name, (copy / "checkpoint-2" / name).read_bytes()
    whole = file.read_bytes()
    file.unlink()
    if how != "missing":
        file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=rf"{name} .*{how}.*; delete .*checkpoint-4 to go on from .*checkpoint-2"):
        train(recipe(steps=5), copy, data, options=OPTIONS, resume=True)
    assert (copy / "checkpoint-2" / name).read_bytes() == stored
    shutil.rmtree(copy / "checkpoint-4")
    assert train(recipe(), copy, data, options=OPTIONS, resume=True)["step"] == 4


def test_a_checkpoint_of_another_shape_is_refused(copy: Path, data: Path):
    """Of as many bytes, and with every name, or with one less."""
    file = copy / "checkpoint-4" / "model.safetensors"
    weights = load_file(file)
    head = weights["model.head.weight"]
    save_file({**weights, "model.head.weight": head.T.contiguous()}, file, metadata={"format": "pt"})
    (copy / "checkpoint-4" / "complete.json").write_text('{"step": 4}')
    with pytest.raises(
        UsageError, match=r"checkpoint-4 cannot be loaded: .*size mismatch for model.head.weight.*; del"
    ):
        train(recipe(steps=5), copy, data, options=OPTIONS, resume=True)
    save_file({k: v for k, v in weights.items() if k != "model.head.weight"}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="cannot be loaded: it lacks the weight model.head.weight; delete"):
        train(recipe(steps=5), copy, data, options=OPTIONS, resume=True)


def test_every_process_refuses_a_run_that_is_there(run: Path, data: Path, monkeypatch):
    """The second one would otherwise wait for the first, which is gone, until torchrun kills it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="holds a run; --resume to go on"):
        train(recipe(), run, data, options=OPTIONS)
    with pytest.raises(UsageError, match=r"other settings \(lr: 0.01 there, 0.02 now\)"):
        train(recipe(lr=2e-2), run, data, options=OPTIONS, resume=True)


def test_a_recipe_of_other_sizes_is_refused_by_its_settings(run: Path, data: Path):
    other = recipe(mixers=(DeltaProductConfig(dim=32, heads=4),), mlp_dim=32)
    with pytest.raises(UsageError, match=r"\(mixers\[0\].heads: 2 there, 4 now; mlp_dim: 64 there, 32 now\)"):
        train(other, run, data, options=OPTIONS, resume=True)


def test_a_model_that_is_broken_or_has_another_tokenizer_is_refused(copy: Path, command: Command, tmp_path: Path):
    """By evaluate, generate, inspect and convert."""
    model = copy / "model"
    stored = {path.name: path.read_bytes() for path in model.iterdir()}
    asked = f"lm generate {copy} --prompt x --tokens 2 --device cpu"

    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "norm" not in k}, model / "model.safetensors", {"format": "pt"})
    assert "lacks the weight model.blocks.0.mixer.norm.weight" in command.refused(asked)
    (model / "model.safetensors").write_bytes(stored["model.safetensors"][:1000])
    for line in (asked, f"inspect {copy} --out {tmp_path}/s", f"convert {copy} --to delta_net --out {tmp_path}/c"):
        assert "safetensors" in (said := command.refused(line)) or "cannot be loaded" in said
    (model / "model.safetensors").write_bytes(stored["model.safetensors"])

    (model / "config.json").write_bytes(stored["config.json"][:100])
    assert "config.json cannot be read" in command.refused(asked)
    (model / "config.json").write_bytes(stored["config.json"])

    (model / "tokenizer.json").unlink()
    assert "cannot be loaded: it has no tokenizer.json" in command.refused(asked)
    other = json.loads(stored["tokenizer.json"])
    vocabulary = other["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (model / "tokenizer.json").write_text(json.dumps(other))
    for line in (asked, f"lm evaluate {copy} --text {TEXT} --out {tmp_path}/e --device cpu"):
        assert "the tokenizer is not the one that the model was trained with" in command.refused(line)
    assert not list(tmp_path.glob("[sce]"))


def test_folders_of_another_kind_are_refused(command: Command, data: Path, tmp_path: Path):
    for line in (f"convert {data} --to delta_net --out {tmp_path}/c", f"unlock {data} --out {tmp_path}/c"):
        assert f"{data} is no checkpoint and no run: it has no config.json" in command.refused(line)
    assert "no config.json" in command.refused(f"inspect {data} --out {tmp_path}/s")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def offline(monkeypatch) -> None:
    """No network, as huggingface_hub sees it, in processes begun from here."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_hub_that_cannot_be_reached_is_one_line_and_leaves_nothing(offline, tmp_path: Path):
    """In processes of their own: huggingface_hub reads its settings when it is imported."""
    del offline
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub")}
    cases = {
        "lm prepare some/text --tokenizer some/tokenizer --out out": "bpe:SIZE, needs no hub",
        "lm prepare some/text --tokenizer bpe:300 --out other": "the same command goes on when the hub can be reached",
        "lm generate some/model --prompt x": "some/model is no directory here and cannot be had from the hub",
        "inspect some/model --out seen": "some/model is no directory here and cannot be had from the hub",
    }
    running = {
        line: subprocess.Popen(
            [sys.executable, "-m", "statetrack.cli", *line.split()],
            cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        )
        for line in cases
    }  # fmt: skip
    for line, process in running.items():
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2 and cases[line] in the_line(err), err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 9 MiB, where the machine lets us make one."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def left(disk: Path, kib: int) -> None:
    """Fill a disk up to so many KiB."""
    with open(disk / "other", "wb", buffering=0) as file:
        while shutil.disk_usage(disk).free > kib << 10:
            file.write(bytes(4096))


@pytest.mark.parametrize("kib", [0, 100, 300])
def test_a_disk_that_is_really_full(run: Path, data: Path, small_disk: Path, kib: int):
    """While the log, the weights, or the optimiser's state of the second checkpoint is written."""
    path = small_disk / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / "checkpoint-4")
    shutil.rmtree(path / "model")
    left(small_disk, kib)
    with pytest.raises(UsageError, match=r"No space left on device.*; the last good checkpoint is .*checkpoint-2"):
        train(recipe(), path, data, options=OPTIONS, resume=True)
    assert [p.name for p in path.glob("checkpoint-*")] == ["checkpoint-2"]
    (small_disk / "other").unlink()
    train(recipe(), path, data, options=OPTIONS, resume=True)
    ours, whole = (load_file(p / "model" / "model.safetensors") for p in (path, run))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_what_does_not_fit_on_a_disk_is_not_left_in_part(run: Path, command: Command, data: Path, small_disk: Path):
    left(small_disk, 8)
    out = small_disk / "out"
    assert f"{out} cannot be written: " in (said := command.refused(f"convert {run} --to delta_net --out {out}"))
    assert "No space left" in said and not out.exists()
    said = command.refused(f"lm prepare {TEXT} --tokenizer {data}/tokenizer --out {out}")
    assert "No space left" in said and str(out) in said
    assert not list(out.glob("*.npy"))


def test_documents_without_text_and_splits_that_are_too_small(command: Command, data: Path, run: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text(" \n")
    (empty / "b.txt").write_text("")
    said = command.refused(f"lm prepare {empty} --tokenizer {data}/tokenizer --out {tmp_path}/out")
    assert "has no text to train on" in said
    few = f"lm prepare {ROOT}/docs/hf.md --tokenizer {data}/tokenizer --out {tmp_path}/few"
    assert "nothing is held out (a share of 0.02 of 1 documents)" in command(few)[1]
    said = command.refused(f"lm evaluate {run} --text {empty} --device cpu --out {tmp_path}/e")
    assert f"{empty} has no text of 4096 tokens: there are 0 in all; a shorter --length" in said
    prepare(replace(small().data, validation=0.0), tmp_path / "all")
    said = command.refused(f"lm evaluate {run} --data {tmp_path}/all --device cpu --out {tmp_path}/e")
    assert f"the validation split of {tmp_path}/all has no text of 4096 tokens" in said
    assert command(f"lm generate {run} --prompt '' --tokens 2 --device cpu")[0] == 0
