"""The task trainer: AdamW, warm-up and cosine, gradient clipping, resumable to the last bit.

The learning rate rises linearly over the first `warmup` share of the steps, then falls along a cosine to `min_lr`.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import statetrack
from statetrack.errors import UsageError
from statetrack.execution import Answers, TrainingStep, check_execution
from statetrack.model import Config, Model
from statetrack.runs import CONFIG, EVALUATION, WEIGHTS, Run, commit, first_line, read_json
from statetrack.tasks import Task, get_task

MOST_UNWATCHED = 50
"""steps on a GPU before signals and losses are looked at"""

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A fully specified training run."""

    task: str
    model: Config
    train_length: tuple[int, int]
    steps: int
    batch_size: int = 256
    lr: float = 1e-3
    min_lr: float = 1e-6
    warmup: float = 0.1
    """share of the steps over which the learning rate rises"""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    label_smoothing: float = 0.0
    """share of the target spread over all outputs; above 0 the loss keeps asking for the same answer at every length"""
    clip: float = 1.0
    """largest gradient norm; 0 for no clipping"""
    seed: int = 0
    precision: str = "auto"
    """float32, bfloat16 (autocast), or auto: bfloat16 on a GPU, float32 elsewhere"""
    device: str = "auto"
    execution: str = "auto"
    """how a step is run: eager, compile, graph, compile+graph (statetrack.execution), or auto: graph on a GPU, eager
    elsewhere"""
    init_from_automaton: bool = False
    """start from the exact weights of the task's automaton, compiled; `model` must be that model's configuration"""
    log_every: int = 20
    checkpoint_every: int = 500

    def check(self) -> None:
        """Raise UsageError for what can never work."""
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf or not 0 <= self.min_lr <= self.lr:
            raise UsageError(f"learning rates must satisfy 0 <= min_lr <= lr, 0 < lr; got {self.min_lr} and {self.lr}")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup must be a share of the steps between 0 and 1, got {self.warmup}")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing}")
        if not (0 <= self.weight_decay < math.inf and self.clip >= 0):
            given = f"got {self.weight_decay} and {self.clip}"
            raise UsageError(f"weight_decay and clip must be at least 0, weight_decay finite; {given}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas must lie in [0, 1), got {self.betas}")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed must be at least 0 and below 2**63, got {self.seed}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"precision must be auto, float32 or bfloat16, got {self.precision!r}")
        check_execution(self.execution)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` is the inverse."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Settings:
        """Build settings from `to_dict`'s result."""
        try:
            pairs = {name: tuple(data[name]) for name in ("train_length", "betas")}
            return cls(**{**data, **pairs, "model": Config.from_dict(data["model"])})
        except UsageError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UsageError(f"not the settings of a run: {type(error).__name__} {error}") from None


class Interrupted(Exception):
    """Training was stopped after saving; `resume` goes on from there. `signum` is the signal, 0 if time was up."""

    def __init__(self, signum: int, step: int, path: Path, how: str = "the same command goes on (train: add --resume)"):
        super().__init__(f"stopped at step {step}, saved in {path}; {how}")
        self.signum = signum


class Signals:
    """Turn SIGINT and SIGTERM into a flag, so that a step and its checkpoint are never cut in two.

    say: gets a line when the first one comes, where what is not cut in two takes long.
    """

    def __init__(self, say: Callable[[str], None] | None = None):
        self.say = say

    def __enter__(self) -> Signals:
        self.received = 0
        self._previous = {}
        for signum in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[signum] = signal.signal(signum, self._note)
            except ValueError:  # not in the main thread: the caller's signals are not ours
                break
        return self

    def _note(self, signum: int, _frame: Any) -> None:
        if self.say is not None and not self.received:
            with contextlib.suppress(RuntimeError):  # this very thread was writing to the same stream
                self.say("stopping when this step is done and saved")
        self.received = signum

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def choose_device(name: str) -> torch.device:
    """Return the named device; auto is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device must be auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {first_line(error)}") from None


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    warmup = round(settings.warmup * settings.steps)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, settings.steps - warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def initial_model(settings: Settings, task: Task) -> Model:
    """Return the untrained model, or the one that already follows the task's automaton."""
    if not settings.init_from_automaton:
        return settings.model.build()
    model = model_of_task(task)
    if model.config != settings.model:
        raise UsageError("init_from_automaton: `model` is not the configuration of the task's compiled automaton")
    return model


def model_of_task(task: Task) -> Model:
    """Return the exact model of a task's automaton (`CompiledAutomaton.to_model`).

    Raises UsageError for a task without an automaton that begins with BOS.
    """
    from statetrack.automata import Automaton
    from statetrack.compiler import compile

    automaton = getattr(task, "automaton", None)
    if automaton is None or not getattr(task, "bos", False):
        raise UsageError(f"task {task.name!r} has no automaton that begins with BOS; accepted: groups, automaton:FILE")
    without_bos = automaton.table[:, :-1]
    return compile(Automaton(without_bos, automaton.start, automaton.accepting, automaton.output)).to_model()


class Trainer:
    """One run: model, optimiser, data stream and step, in memory."""

    def __init__(self, settings: Settings):
        settings.check()
        self.settings = settings
        self.task: Task = get_task(settings.task)
        self.task.length_range(settings.train_length)
        self.device = choose_device(settings.device)
        torch.manual_seed(settings.seed)
        self.model: Model = initial_model(settings, self.task).to(self.device)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = 0
        gpu = self.device.type == "cuda"
        autocast = settings.precision == "bfloat16" or (settings.precision == "auto" and gpu)
        self.run_step = TrainingStep(self.model, settings, self.device, autocast)

    def train_steps(self, count: int = 1) -> list[dict[str, float]]:
        """Take some optimiser steps; return loss, accuracy, gradient norm and learning rate of each.

        The device is waited for once, at the end. Raises UsageError where a loss or a norm is not finite.
        """
        s, one_each = self.settings, self.task.supervision == "last"
        rates, measured = [], []
        for _ in range(count):
            inputs, targets = self.task.sample(self.generator, s.batch_size, s.train_length)
            batch = Answers.of(inputs, targets, one_each=one_each, device=self.device)
            rates.append(learning_rate(s, self.step))
            measured.append(self.run_step(batch, rates[-1]).clone())
            self.step += 1
        rows = []
        for i, (loss, accuracy, norm) in enumerate(torch.stack(measured).tolist(), self.step - count + 1):
            if not math.isfinite(loss):
                raise UsageError(f"loss is {loss} at step {i}")
            if not math.isfinite(norm):
                raise UsageError(f"the gradient's norm is {norm} at step {i}")
            rows.append({"loss": loss, "accuracy": accuracy, "grad_norm": norm, "lr": rates[len(rows)]})
        return rows

    def state(self) -> dict[str, Any]:
        """Return all that resuming needs; refuse weights that are not finite."""
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise UsageError(f"weights are not finite at step {self.step}")
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": {"state": self.run_step.state()},
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to a `state()`."""
        try:
            self.model.load_state_dict(state["model"])
            self.run_step.load_state(state["optimizer"]["state"])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["torch"])
            self.step = state["step"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise UsageError(f"the checkpoint does not fit the model: {first_line(error)}") from None


def train(
    settings: Settings,
    path: Path,
    *,
    resume: bool = False,
    force: bool = False,
    report: Report | None = None,
    until: float = math.inf,
) -> Model:
    """Train in the run directory `path` and return the model; the weights are also in `path`.

    `report` is called for every step with {"step", "loss", "accuracy", ...}, on a GPU up to 50 steps late. `until`: the
    value of time.monotonic() after which to save and stop. Raises UsageError for bad settings, an existing run (without
    resume or force), a corrupt checkpoint and a loss that is not finite; Interrupted after SIGINT, SIGTERM or `until`.
    """
    trainer, run = Trainer(settings), Run(path)
    config = {"settings": settings.to_dict(), "version": statetrack.__version__, "commit": commit()}
    with run.opened(config, resume, force) as resumed, Signals() as signals:
        if resumed:
            trainer.load_state(run.load_checkpoint())
            if trainer.step > settings.steps:
                raise UsageError(f"{path} is at step {trainer.step} already, beyond steps={settings.steps}")
            run.cut_metrics(trainer.step)
        run.start(config)
        if not resumed:
            run.cut_metrics(0)
            run.save_checkpoint(trainer.state())
        if trainer.step < settings.steps:
            for stale in (WEIGHTS, EVALUATION):
                (path / stale).unlink(missing_ok=True)
        _steps(trainer, run, signals, report, until)
        run.save_weights(trainer.model.state_dict())
        if signals.received:
            raise Interrupted(signals.received, trainer.step, path)
    return trainer.model


def _steps(trainer: Trainer, run: Run, signals: Signals, report: Report | None, until: float) -> None:
    """Take the steps that are left, with log lines and checkpoints on the way and when stopped."""
    s, saved = trainer.settings, trainer.step
    while trainer.step < s.steps:
        first, began = trainer.step + 1, time.perf_counter()
        try:
            rows = trainer.train_steps(_unwatched(trainer))
            seconds = (time.perf_counter() - began) / len(rows)
            last = trainer.step == s.steps
            stopped = signals.received or time.monotonic() > until
            keep = trainer.step % s.checkpoint_every == 0 or last or stopped
            checkpoint = trainer.state() if keep else None
        except UsageError as error:
            where = f"the last good checkpoint is of step {saved} in {run.path}"
            raise UsageError(f"{error}; {where}; lower the learning rate?") from None
        for step, numbers in enumerate(rows, first):
            row = {"step": step, **numbers, "seconds": seconds}
            if step % s.log_every == 0 or step == s.steps:
                run.append_metrics(row)
            if report is not None:
                report(row)
        if checkpoint is not None:
            run.save_checkpoint(checkpoint)
            saved = trainer.step
        if checkpoint is not None and stopped and not last:
            raise Interrupted(signals.received, trainer.step, run.path)


def _unwatched(trainer: Trainer) -> int:
    """Return how many steps to take before looking: one on a CPU, else up to the next log line or checkpoint."""
    s, done = trainer.settings, trainer.step
    if trainer.device.type == "cpu":
        return 1
    due = (s.steps - done, s.log_every - done % s.log_every, s.checkpoint_every - done % s.checkpoint_every)
    return min(*due, MOST_UNWATCHED)


def load_settings(path: Path) -> Settings:
    """Return the settings of a run directory."""
    stored = read_json(path / CONFIG)
    if not isinstance(stored, dict) or not isinstance(stored.get("settings"), dict):
        raise UsageError(f"{path / CONFIG} is not a run's configuration")
    return Settings.from_dict(stored["settings"])


def load_run(path: Path, device: str = "auto") -> tuple[Settings, Model]:
    """Return the settings and the trained model of a run directory; of an unfinished run, its last checkpoint's."""
    settings = load_settings(path)
    model = settings.model.build()
    try:
        model.load_state_dict(Run(path).load_weights())
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"{path}: the weights do not fit the model: {first_line(error)}") from None
    return settings, model.to(choose_device(device)).eval()
