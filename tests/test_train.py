"""Training: resumable to the last bit, and nothing is lost whatever stops it."""

import json
import math
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from statetrack import runs
from statetrack.errors import UsageError
from statetrack.layers import AttentionConfig, DeltaProductConfig, LSTMConfig, MambaConfig, MixerConfig
from statetrack.model import Config
from statetrack.train import Interrupted, Settings, Trainer, learning_rate, load_run, train

MIXERS: dict[str, MixerConfig] = {
    "deltaproduct": DeltaProductConfig(dim=16, heads=2, factors=2, gate=True),
    "mamba": MambaConfig(dim=16, state_size=4),
    "attention": AttentionConfig(dim=16, heads=2),
    "lstm": LSTMConfig(dim=16),
}


def tiny(mixer: str = "deltaproduct", **changes: Any) -> Settings:
    """Return a run of 8 steps, logged every second and checkpointed every third."""
    model = Config(vocab_size=3, num_outputs=3, mixers=(MIXERS[mixer],), mlp_dim=16)
    base = Settings(
        task="parity", model=model, train_length=(3, 6), steps=8, batch_size=4, log_every=2, checkpoint_every=3
    )
    return replace(base, **{"device": "cpu", **changes})


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the metrics, but the seconds."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in lines]


def contents(path: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.name != ".lock"}


def stop_at(step: int, signum: int = signal.SIGINT) -> Callable[[dict[str, Any]], None]:
    """Send this process a signal once, after `step`."""

    def report(row: dict[str, Any]) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signum)

    return report


def assert_same_run(path: Path, other: Path):
    for name, tensor in runs.Run(path).load_weights().items():
        assert torch.equal(tensor, runs.Run(other).load_weights()[name]), name
    assert rows(path) == rows(other)
    # the optimiser's moments and the random states as well: going on from here would be the same, too
    a, b = (runs.Run(p).load_checkpoint() for p in (path, other))
    assert (
        a["step"] == b["step"] and torch.equal(a["generator"], b["generator"]) and torch.equal(a["torch"], b["torch"])
    )
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][key]) for key, value in moments.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_resumed_equals_uninterrupted(tmp_path: Path, mixer: str):
    settings = tiny(mixer)
    train(settings, tmp_path / "whole")
    for step in (1, 5):
        with pytest.raises(Interrupted, match=f"step {step + 1}|step {step}"):
            train(settings, tmp_path / "cut", resume=step > 1, report=stop_at(step))
    train(settings, tmp_path / "cut", resume=True)
    assert [row["step"] for row in rows(tmp_path / "cut")] == [2, 4, 6, 8]
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_the_seed_matters(tmp_path: Path):
    train(tiny(), tmp_path / "a")
    train(tiny(seed=1), tmp_path / "b")
    assert rows(tmp_path / "a") != rows(tmp_path / "b")


def test_a_finished_run_stays_as_it_is(tmp_path: Path):
    train(tiny(), tmp_path)
    before = contents(tmp_path)
    train(tiny(), tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_a_run_made_longer_forgets_its_old_evaluation(tmp_path: Path):
    train(tiny(), tmp_path)
    (tmp_path / "evaluation.json").write_text("[]")
    train(tiny(steps=10), tmp_path, resume=True)
    assert runs.Run(tmp_path).load_checkpoint()["step"] == 10
    assert not (tmp_path / "evaluation.json").exists()
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="is at step 10 already, beyond steps=8"):
        train(tiny(), tmp_path, resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_between_steps(tmp_path: Path, signum: int):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="stopped at step 2, saved in") as stop:
        train(tiny(), tmp_path, report=stop_at(1, signum))
    assert stop.value.signum == signum
    assert signal.getsignal(signum) is before
    assert runs.Run(tmp_path).load_checkpoint()["step"] == 2
    assert sorted(contents(tmp_path)) == ["checkpoint.pt", "config.json", "metrics.jsonl"]


def test_a_signal_at_the_last_step_saves_everything(tmp_path: Path):
    with pytest.raises(Interrupted, match="stopped at step 8"):
        train(tiny(), tmp_path, report=stop_at(8))
    train(tiny(), tmp_path / "whole")
    assert_same_run(tmp_path, tmp_path / "whole")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the process would do afterwards happens."""


def dies(patch: pytest.MonkeyPatch, after: int) -> None:
    """Let the process die at a change of a directory (a file replaced or deleted) after so many of them."""
    calls = 0

    def mortal(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*positional: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Killed
            return real(*positional, **named)

        return change

    patch.setattr(os, "replace", mortal(os.replace))
    patch.setattr(Path, "unlink", mortal(Path.unlink))


@pytest.mark.parametrize("force", [False, True])
def test_death_at_any_change_of_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool):
    train(tiny(), tmp_path / "whole")
    for changes in range(100):
        cut = tmp_path / f"cut{changes}"
        if force:
            train(tiny(seed=1), cut)
        with monkeypatch.context() as patch:
            dies(patch, changes)
            try:
                train(tiny(), cut, force=force)
                break
            except Killed:
                pass
        train(tiny(), cut, resume=not force, force=force)
        assert_same_run(cut, tmp_path / "whole")
    assert 10 < changes < 99


def test_death_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The process dies with half of the checkpoint of step 6 on the disk."""

    def half(state: Any, path: Path) -> None:
        real(state, path)
        if state["step"] == 6:
            os.truncate(path, os.path.getsize(path) // 2)
            dies(monkeypatch, 0)
            raise Killed

    real = torch.save
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        train(tiny(), tmp_path / "cut")
    monkeypatch.undo()
    assert any(entry.suffix == ".tmp" for entry in (tmp_path / "cut").iterdir())
    assert runs.Run(tmp_path / "cut").load_checkpoint()["step"] == 3
    assert load_run(tmp_path / "cut")[0] == tiny()
    train(tiny(), tmp_path / "cut", resume=True)
    assert not any(entry.suffix == ".tmp" for entry in (tmp_path / "cut").iterdir())
    train(tiny(), tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path: Path):
    with pytest.raises(Interrupted):
        train(tiny(), tmp_path / "cut", report=stop_at(3))
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    train(tiny(), tmp_path / "cut", resume=True)
    train(tiny(), tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("broken", ["loss", "gradient", "weights"])
def test_what_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    real = Trainer.train_steps

    def failing(self: Trainer, count: int) -> list[dict[str, float]]:
        weight = self.model.head.weight
        if self.step == 5 and broken == "loss":
            weight.data.fill_(math.nan)
        elif self.step == 5 and broken == "gradient":
            weight.register_hook(lambda g: g * math.inf)
        measured = real(self, count)
        if self.step == 6 and broken == "weights":
            weight.data[0, 0] = math.inf
        return measured

    monkeypatch.setattr(Trainer, "train_steps", failing)
    expected = {"loss": "loss is nan at step 6", "gradient": "norm is (nan|inf) at step 6", "weights": "not finite at"}
    with pytest.raises(UsageError, match=f"{expected[broken]}.* the last good checkpoint is of step 3 in {tmp_path}"):
        train(tiny(), tmp_path / "cut")
    monkeypatch.undo()
    assert runs.Run(tmp_path / "cut").load_checkpoint()["step"] == 3
    train(tiny(), tmp_path / "cut", resume=True)
    train(tiny(), tmp_path / "whole")
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


CORRUPTIONS = {
    "empty": lambda data: data[:0],
    "cut": lambda data: data[: len(data) // 2],
    "noise": lambda data: bytes(range(256)) * (len(data) // 256),
}


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors", "config.json"])
def test_corrupt_files_are_one_clear_error(tmp_path: Path, name: str, corrupt: Callable[[bytes], bytes]):
    train(tiny(), tmp_path)
    path = tmp_path / name
    path.write_bytes(corrupt(path.read_bytes()))
    if name != "checkpoint.pt":  # a finished run is read from its weights
        with pytest.raises(UsageError, match=f"{name}.*(corrupt|cannot be read)") as error:
            load_run(tmp_path)
        assert "\n" not in str(error.value)
    if name != "model.safetensors":
        before = contents(tmp_path)
        with pytest.raises(UsageError, match=f"{name}.*(corrupt|cannot be read)") as error:
            train(tiny(steps=9), tmp_path, resume=True)
        assert "\n" not in str(error.value)
        assert contents(tmp_path) == before
    train(tiny(), tmp_path, force=True)  # the way out that the messages name
    load_run(tmp_path)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "3", '{"settings": 3}', '{"settings": {"task": "parity"}}', '{"settings": {"model": []}}']
)
def test_a_config_that_is_none(tmp_path: Path, content: str):
    train(tiny(), tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match="not a run's configuration|not the settings of a run"):
        load_run(tmp_path)
    with pytest.raises(UsageError, match="not a run|other settings"):
        train(tiny(), tmp_path, resume=True)


def test_weights_of_another_model(tmp_path: Path):
    train(tiny(), tmp_path / "a")
    train(tiny("lstm"), tmp_path / "b")
    for name in ("model.safetensors", "checkpoint.pt"):
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(UsageError, match="the weights do not fit the model"):
        load_run(tmp_path / "a")
    with pytest.raises(UsageError, match="the checkpoint does not fit the model"):
        train(tiny(steps=9), tmp_path / "a", resume=True)


def test_an_existing_run_is_left_alone(tmp_path: Path):
    train(tiny(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="holds a run; --resume to go on, --force to replace it"):
        train(tiny(seed=1), tmp_path)
    with pytest.raises(UsageError, match="exclude each other"):
        train(tiny(), tmp_path, resume=True, force=True)
    assert contents(tmp_path) == before
    train(tiny(seed=1), tmp_path, force=True)
    assert load_run(tmp_path)[0].seed == 1


@pytest.mark.parametrize("options", [{}, {"force": True}, {"resume": True}])
@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_directory_that_is_no_run_is_left_alone(tmp_path: Path, name: str, options: dict[str, Any]):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(UsageError, match="is not empty and not a run"):
        train(tiny(), tmp_path, **options)
    assert contents(tmp_path) == {name: b'{"mine": 1}'}
    assert not (tmp_path / ".lock").exists()


def test_force_deletes_the_runs_files_only(tmp_path: Path):
    train(tiny(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "evaluation.json").write_text("[]")
    train(tiny(), tmp_path, force=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "evaluation.json").exists()


def test_one_process_per_directory(tmp_path: Path):
    def second(row: dict[str, Any]) -> None:
        if row["step"] == 4:  # a lock belongs to the open file, so this process can stand for another
            with pytest.raises(UsageError, match="in use by another process"):
                train(tiny(), tmp_path / "run", resume=True)
            with pytest.raises(UsageError, match="in use by another process"):
                train(tiny(), tmp_path / "run", force=True)

    train(tiny(), tmp_path / "run", report=second)
    train(tiny(), tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_changed_settings_are_named(tmp_path: Path):
    train(tiny(), tmp_path)
    wider = replace(tiny().model, mixers=(replace(MIXERS["deltaproduct"], heads=4),))
    with pytest.raises(UsageError, match="started with other settings") as error:
        train(tiny(lr=0.5, model=wider), tmp_path, resume=True)
    assert "lr: 0.001 there, 0.5 now" in str(error.value)
    assert "model.mixers[0].heads: 2 there, 4 now" in str(error.value)
    assert "dim" not in str(error.value) and "batch_size" not in str(error.value)


def test_what_is_logged(tmp_path: Path):
    seen: list[dict[str, Any]] = []
    train(tiny(), tmp_path, report=seen.append)
    assert [row["step"] for row in seen] == list(range(1, 9))
    logged = runs.Run(tmp_path).metrics()
    assert logged == [row for row in seen if row["step"] % 2 == 0]
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in logged)
    assert logged[-1]["lr"] == learning_rate(tiny(), 7)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert Settings.from_dict(stored["settings"]) == tiny() and stored["version"]


def test_training_learns(tmp_path: Path):
    """Forty steps on parity of two bits: the loss must fall far below guessing among two (log 2 = 0.69)."""
    train(tiny(steps=60, batch_size=32, lr=1e-2, train_length=(3, 3)), tmp_path)
    assert rows(tmp_path)[-1]["loss"] < 0.2
