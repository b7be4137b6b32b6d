"""transformers' Trainer with what our runs need: our order of rows, checkpoints that are whole or absent, speed.

Nothing of the training loop is ours: batches, accumulation, autocast, clipping, optimiser, schedule, processes, FSDP2
and resuming are transformers' and accelerate's.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from statetrack.errors import UsageError
from statetrack.layers.common import decayed_names
from statetrack.lm.settings import Cost, peak_flops
from statetrack.progress import Bars
from statetrack.runs import first_line, read_json, why_not_written, write_atomically, write_json
from statetrack.train import Signals

SHARDED = "pytorch_model_fsdp.bin"
"""the weights as accelerate writes them with FSDP2"""
COMPLETE = "complete.json"
"""the file that a checkpoint gets last: one without it is not whole"""
CLOSE = 1e-5  # of a weight's sums before and after it was spread over processes


def checkpoints(path: Path) -> list[Path]:
    """Return a run's whole checkpoints, oldest first."""
    found = [p.parent for p in path.glob(f"checkpoint-*/{COMPLETE}")]
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def check_start(checkpoint: Path, sharded: bool) -> None:
    """Raise UsageError if a file of a checkpoint is missing or has another size than when it was written, and if it
    was written with FSDP2 and the run goes on without, or the other way round.
    """
    if sharded != (checkpoint / SHARDED).exists():
        how = "without FSDP2" if sharded else "with FSDP2"
        raise UsageError(f"{checkpoint} was written {how}; go on {how} (--parallel, and the number of processes)")
    sizes = read_json(checkpoint / COMPLETE).get("files", {})
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.exists() or file.stat().st_size != size:
            has = f"has {file.stat().st_size:,} bytes, not {size:,}" if file.exists() else "is missing"
            raise UsageError(f"{file} {has}; {_without(checkpoint)}")


@contextlib.contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Say in one line that a checkpoint cannot be read or is that of another model."""
    try:
        yield
    except Exception as error:  # torch, pickle, zip and safetensors raise errors of many types
        if checkpoint is None or isinstance(error, UsageError):
            raise
        raise UsageError(f"{checkpoint} cannot be loaded: {first_line(error)}; {_without(Path(checkpoint))}") from error


def _without(checkpoint: Path) -> str:
    before = [path for path in checkpoints(checkpoint.parent) if path != checkpoint]
    return f"delete {checkpoint} to go on from " + (str(before[-1]) if before else "the beginning")


class Arguments(TrainingArguments):
    """transformers' arguments, with one name for the CPU: transformers 5.17 asks torch to load tensors to "cpu:0"."""

    @property
    def device(self) -> torch.device:
        """Return the device of this process."""
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found


class LMTrainer(Trainer):
    """Trainer that reads rows in their own order and does not leave half a checkpoint, nor one that is not finite."""

    def __init__(self, *, cost: Cost, tokens_per_step: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.cost, self.tokens_per_step = cost, tokens_per_step
        self._clock: tuple[int, float] | None = None  # step and time of the last measurement

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)  # pyright: ignore

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise UsageError("accelerate spreads weights over GPUs only; choose --parallel ddp")
        if not self.is_fsdp_enabled:  # which moves the shards, and only the first process has any weights yet
            super()._move_model_to_device(model, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what transformers warns of: weights that would stay as the seed gave them."""
        model: Any = self.model
        tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
        if lacking := set(load_result.missing_keys) - tied:
            raise ValueError(f"it lacks the weight {min(lacking)}")
        if load_result.unexpected_keys:
            raise ValueError(f"it has the unknown weight {min(load_result.unexpected_keys)}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return what `statetrack.train` decays."""
        return decayed_names(model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log tokens per second, share of the device's peak, and peak memory beside the loss."""
        if "loss" in logs:
            logs = {**logs, **self._speed()}
            self._clock = self.state.global_step, time.perf_counter()
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do a step; the clock begins with the first one, which is not step 0 in a run that is resumed."""
        if self._clock is None:
            self._clock = self.state.global_step, time.perf_counter()
        return super().training_step(*args, **kwargs)

    def _not_counted(self, began: float) -> None:
        """Leave what began then and ends now out of the time of training."""
        if self._clock is not None:
            self._clock = self._clock[0], self._clock[1] + time.perf_counter() - began

    def _speed(self) -> dict[str, float]:
        if self._clock is None or self.state.global_step <= self._clock[0]:
            return {}
        steps, seconds = self.state.global_step - self._clock[0], time.perf_counter() - self._clock[1]
        rate = steps * self.tokens_per_step / seconds
        speed = {"tokens_per_second": rate}
        if torch.cuda.is_available() and self.args.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
            if peak is not None:
                speed["mfu"] = rate * self.cost.flops / (peak * self.args.world_size)
            speed["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return speed

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; the time that takes does not count as training."""
        began = time.perf_counter()
        found = super().evaluate(*args, **kwargs)
        self._not_counted(began)
        return found

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint with its mark last; if that fails, leave none of it."""
        self.check_finite(model)
        root, step = Path(str(self.args.output_dir)), self.state.global_step
        path, began = root / f"checkpoint-{step}", time.perf_counter()
        try:
            super()._save_checkpoint(model, trial)
            if self.args.world_size > 1:
                dist.barrier()
            if self.args.should_save:
                sizes = _flush(path)
                write_json(path / COMPLETE, {"step": step, "files": sizes})
        except Exception as error:  # OSError, RuntimeError of torch.save, safetensors' own
            reason = why_not_written(error, root)
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(f"the checkpoint of step {step} cannot be written: {reason}; {last_good(root)}") from error
        self._not_counted(began)

    def check_finite(self, model: nn.Module) -> None:
        """Raise UsageError if any weight is not a finite number."""
        bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(_local(p)).all())]
        if bad:
            raise UsageError(
                f"{bad[0]} is not finite after step {self.state.global_step}; "
                f"{last_good(Path(str(self.args.output_dir)))}; lower the learning rate?"
            )


def last_good(path: Path) -> str:
    """Say which checkpoint a run goes on from."""
    whole = checkpoints(path)
    return f"the last good checkpoint is {whole[-1]}" if whole else "there is no checkpoint yet"


def _flush(path: Path) -> dict[str, int]:
    """See that every file is on the disk; return their sizes."""
    sizes = {}
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
            sizes[str(file.relative_to(path))] = file.stat().st_size
    return sizes


def _local(p: Tensor) -> Tensor:
    return p.to_local() if hasattr(p, "to_local") else p  # pyright: ignore[reportAttributeAccessIssue]


def sums(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the sum of every parameter, and of its squares, over all processes: what initialisation must have left."""
    found = {}
    for name, p in model.named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p  # pyright: ignore[reportAttributeAccessIssue]
        found[name] = (float(whole.detach().double().sum()), float(whole.detach().double().square().sum()))
    return found


class CheckStart(TrainerCallback):
    """Before the first step: the weights, wherever they lie now, are those that the seed gives on one process."""

    def __init__(self, expected: dict[str, tuple[float, float]]):
        self.expected = expected

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Compare; a weight that was lost on the way, or is not finite, is an error."""
        del control, kwargs
        if state.global_step or model is None:
            return
        found = sums(model)
        for name, values in found.items() if args.process_index == 0 else ():
            expected = self.expected[name.replace("_orig_mod.", "").removeprefix("module.")]
            if not all(abs(a - b) <= CLOSE * (1 + abs(b)) for a, b in zip(values, expected, strict=True)):
                raise UsageError(f"{name} is not as it was initialised: sums {values}, expected {expected}")


class StopSafely(TrainerCallback):
    """After a signal or at the time limit: finish the step, save, stop. On a loss that is not finite: stop at once."""

    def __init__(self, signals: Signals, minutes: float | None):
        self.signals, self.limit = signals, None if minutes is None else time.monotonic() + 60 * minutes

    def on_step_end(self, args, state, control, **kwargs):
        """Ask every process whether it is to stop, so that all stop after the same step."""
        del kwargs
        late = self.limit is not None and time.monotonic() >= self.limit
        if greatest(self.signals.received or int(late), args):
            control.should_training_stop = True
        if control.should_training_stop or state.global_step == state.max_steps:
            control.should_save, control.should_log = args.save_strategy != "no", True

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Refuse to go on with a loss or gradient that is not finite."""
        del control, kwargs
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                where = last_good(Path(str(args.output_dir)))
                raise UsageError(f"{name} is {value} at step {state.global_step}; {where}; lower the learning rate?")


class Report(TrainerCallback):
    """Append what is logged to a file, and show it."""

    def __init__(self, path: Path, bars: Bars):
        self.path, self.bars, self.shown = path, bars, ""

    def on_train_begin(self, args, state, control, **kwargs):
        """Keep the lines of the steps that a resumed run has behind it."""
        del args, control, kwargs
        self._show(state)
        text = "".join(json.dumps(row) + "\n" for row in state.log_history)
        write_atomically(self.path, lambda p: p.write_text(text))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write a line."""
        del args, control, kwargs
        row = {**(logs or {}), "step": state.global_step}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.shown = "  ".join(f"{name} {row[key]:{form}}" for key, (name, form) in SHOWN.items() if key in row)
        self._show(state)

    def on_step_end(self, args, state, control, **kwargs):
        """Count the step."""
        del args, control, kwargs
        self._show(state)

    def _show(self, state: TrainerState) -> None:
        self.bars.update("train", state.global_step, state.max_steps, self.shown)


SHOWN = {
    "loss": ("loss", ".4f"),
    "eval_loss": ("validation loss", ".4f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "mfu": ("mfu", ".1%"),
}


def greatest(number: int, args: Any) -> int:
    """Return the greatest of the numbers that the processes have."""
    if args.world_size == 1:
        return number
    numbers = torch.tensor(number, device=args.device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers.item())
