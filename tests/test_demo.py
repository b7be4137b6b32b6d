"""The demo: four small models in processes of their own, none of which outlives it."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recipes.demo import demo_settings
from statetrack import demo, train, workers
from statetrack.errors import UsageError
from tests.test_cli import started, the_line, wait_until


def tiny_demo(out: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Run the demo with few steps; `changes` are for Mamba in [0, 1] only."""

    def recipe(mixer: str, eigenvalues: tuple[float, float], seed: int) -> train.Settings:
        settings = replace(demo_settings(mixer, eigenvalues, seed), steps=3, batch_size=8)
        return replace(settings, **changes) if (mixer, eigenvalues) == ("mamba", (0.0, 1.0)) else settings

    return demo.demo(out, 0, 2, recipe, sequences=16)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo's processes start at once; those below start as they do for a user."""
    real = workers.multiprocessing.get_context
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: real("fork"))


@pytest.mark.usefixtures("forked")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    summary = tiny_demo(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {m: set(ranges) for m, ranges in summary.items()} == dict.fromkeys(
        ("deltanet", "mamba"), {"[-1,1]", "[0,1]"}
    )
    assert all(-1 <= cell["scaled_accuracy"] <= 1 for row in summary.values() for cell in row.values())
    assert {"parity.png", "parity.svg"} <= {p.name for p in tmp_path.iterdir()}
    out = capsys.readouterr().out
    assert f"{summary['mamba']['[-1,1]']['scaled_accuracy']:.3f}" in out and "parity.png" in out
    (tmp_path / "stale").touch()
    assert tiny_demo(tmp_path) == summary, "the same seed gives the same numbers"
    assert not (tmp_path / "stale").exists()


@pytest.mark.usefixtures("forked")
def test_a_model_of_the_demo_fails(tmp_path: Path):
    with pytest.raises(UsageError, match=r"mamba \[0,1\]: the gradient's norm is|mamba \[0,1\]: loss is"):
        tiny_demo(tmp_path, lr=1e30, clip=0.0, warmup=0.0)
    assert workers.multiprocessing.active_children() == []


@pytest.mark.usefixtures("forked")
def test_a_process_of_the_demo_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def dying(_: train.Settings, path: Path, **__: Any) -> None:
        if path.name == "mamba_-1to1":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    monkeypatch.setattr(demo, "train", dying)
    with pytest.raises(UsageError, match=r"mamba \[-1,1\]: its process ended with exit code -9"):
        tiny_demo(tmp_path)
    assert workers.multiprocessing.active_children() == []


def group_is_gone(group: int) -> bool:
    """Return whether no process of the group is left, after giving it a few seconds to go."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_demo_leaves_no_process(tmp_path: Path, signum: int, code: int):
    """Ctrl-C in a terminal reaches the whole group, here as its children start; `kill` the parent alone."""
    typed = signum == signal.SIGINT
    with started(f"demo --out {tmp_path}") as process:
        wait_until(lambda: list(tmp_path.glob(".demo" if typed else "*/metrics.jsonl")), process)
        time.sleep(1.0 if typed else 0.0)  # the children import torch
        (os.killpg if typed else os.kill)(process.pid, signum)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (code, "") and the_line(err) == "stopped"
        assert group_is_gone(process.pid)
    assert not list(tmp_path.glob("*/model.safetensors")), "no model was trained to its end meanwhile"
