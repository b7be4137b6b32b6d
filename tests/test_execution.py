"""The ways to run a training step agree, resume to the last bit, and read each other's checkpoints."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from statetrack import runs
from statetrack.execution import Answers
from statetrack.layers import MLSTMConfig
from statetrack.model import Config
from statetrack.tasks import IGNORE, get_task
from statetrack.train import Interrupted, Settings, train
from tests.test_train import MIXERS, assert_same_run, rows, stop_at, tiny

CASES = {
    "parity": ("parity", "deltaproduct", (3, 6)),
    "ragged": ("Z3", "mamba", (2, 6)),  # an answer at every token, padding among them
    "attention": ("parity", "attention", (3, 6)),
}


def run_of(case: str, execution: str, **changes: Any) -> Settings:
    """Return 20 steps of a small run."""
    name, mixer, train_length = CASES[case]
    task = get_task(name if name == "parity" else f"group:{name}")
    model = Config(vocab_size=task.vocab_size, num_outputs=task.num_outputs, mixers=(MIXERS[mixer],), mlp_dim=16)
    base = {"task": task.name, "model": model, "train_length": train_length, "steps": 20, "execution": execution}
    return tiny(**{**base, "clip": 0.5, "label_smoothing": 0.1, **changes})


def largest_difference(a: Path, b: Path) -> float:
    """Return by how much two runs' weights differ, beside the largest weight."""
    one, two = (runs.Run(path).load_weights() for path in (a, b))
    return max(float((one[name] - two[name]).abs().max() / one[name].abs().max()) for name in one)


def check_agreement(folder: Path, execution: str, device: str, case: str) -> tuple[float, float]:
    """Train 20 steps op by op, and in the other way; return how much they and a run that changed over differ.

    Also: stopped and resumed is the same as uninterrupted, bit for bit; but for compiled steps on a GPU, where
    torch.compile adds up an embedding's gradient in any order.
    """
    options = {"device": device, "precision": "float32", "log_every": 1}
    eager, other = (run_of(case, how, **options) for how in ("eager", execution))
    train(eager, folder / "eager")
    train(other, folder / "other")
    try:
        train(other, folder / "cut", report=stop_at(7))
    except Interrupted:
        train(other, folder / "cut", resume=True)
    if device == "cuda" and "compile" in execution:
        assert largest_difference(folder / "cut", folder / "other") < 1e-3
    else:
        assert_same_run(folder / "cut", folder / "other")
    try:  # begun in one way, finished in the other
        train(other, folder / "changed", report=stop_at(7))
    except Interrupted:
        train(eager, folder / "changed", resume=True)
    assert [row["step"] for row in rows(folder / "changed")] == list(range(1, 21))
    return tuple(largest_difference(folder / "eager", folder / name) for name in ("other", "changed"))  # pyright: ignore


def check_in_a_process(folder: Path, *words: str) -> None:
    """`check_agreement` in a process of its own: the checks of shapes that the tests install cannot be traced."""
    root = Path(__file__).parent.parent
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.test_execution", str(folder), *words],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    differences = [float(word) for word in found.stdout.split()]
    assert len(differences) == 2 and all(0 <= d < 1e-3 for d in differences), differences


@pytest.mark.parametrize("case", CASES)
def test_compiled_steps_agree(tmp_path: Path, case: str):
    check_in_a_process(tmp_path, "compile", "cpu", case)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@GPU
@pytest.mark.parametrize("execution", ["graph", "compile+graph"])
@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_agree(tmp_path: Path, case: str, execution: str):
    """Every step that counts is a replay, so resuming is exact; the rounding is that of other kernels at most."""
    check_in_a_process(tmp_path, execution, "cuda", case)


@GPU
def test_a_recorded_step_sees_every_batch(tmp_path: Path):
    train(run_of("parity", "graph", device="cuda", log_every=1), tmp_path)
    logged = rows(tmp_path)
    assert len({row["loss"] for row in logged}) == 20
    moments = runs.Run(tmp_path).load_checkpoint()["optimizer"]["state"]
    assert all(float(m["step"]) == 20 for m in moments.values()), "the steps before the recording were undone"


@GPU
def test_what_is_not_finite_is_found_in_a_recorded_step(tmp_path: Path):
    from statetrack.errors import UsageError

    with pytest.raises(UsageError, match=r"is (nan|inf) at step \d+; the last good checkpoint is of step 0"):
        train(run_of("parity", "graph", device="cuda", lr=1e30, clip=0.0, checkpoint_every=100), tmp_path)


@pytest.mark.parametrize(("name", "one_each"), [("parity", True), ("modular_arithmetic", True), ("S3", False)])
def test_answers_are_what_the_task_asks(name: str, one_each: bool):
    task = get_task(name)
    inputs, targets = task.sample(torch.Generator().manual_seed(0), 8, (3, 9))
    batch = Answers.of(inputs, targets, one_each=one_each, device=torch.device("cpu"))
    assert (task.supervision == "last") == one_each
    asked = targets != IGNORE
    assert torch.equal(batch.targets[batch.targets != IGNORE], targets[asked])
    assert len(batch.targets) == (8 if one_each else targets.numel()), "every batch has one shape"
    if batch.places is not None:
        logits = torch.randn(*targets.shape, 5)
        assert torch.equal(logits.flatten(0, 1)[batch.places], logits[asked])


def test_padding_counts_for_nothing(tmp_path: Path):
    """Loss and accuracy are means over what is asked: a first loss near that of guessing, whatever the padding."""
    model = Config(vocab_size=4, num_outputs=3, mixers=(MLSTMConfig(dim=16, heads=2),), mlp_dim=16)
    for name, length in (("short", (1, 12)), ("whole", (12, 12))):
        settings = tiny(task="group:Z3", model=model, train_length=length, steps=1, log_every=1, batch_size=64)
        train(settings, tmp_path / name)
    short, whole = (rows(tmp_path / name)[0] for name in ("short", "whole"))
    assert short["loss"] == pytest.approx(whole["loss"], rel=0.1) and 0.2 < short["accuracy"] < 0.5


if __name__ == "__main__":
    print(*check_agreement(Path(sys.argv[1]), *sys.argv[2:]))
