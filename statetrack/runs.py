"""The run directory: everything a run leaves behind, written so that nothing is ever half there.

config.json         the resolved settings, with version and commit
metrics.jsonl       one line per logged step, append-only (a resumed run first drops lines after its checkpoint)
checkpoint.pt       what resuming needs: weights, optimiser, random states, step
model.safetensors   the weights at the end
evaluation.json     accuracies by length (statetrack evaluate)
result.json         the number a paper's table shows (statetrack reproduce)
training.png, .svg  loss and accuracy by step
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from statetrack.errors import UsageError

CONFIG, METRICS, CHECKPOINT, WEIGHTS = "config.json", "metrics.jsonl", "checkpoint.pt", "model.safetensors"
EVALUATION, RESULT, LOCK = "evaluation.json", "result.json", ".lock"
OURS = (CONFIG, METRICS, CHECKPOINT, WEIGHTS, EVALUATION, RESULT, "training.png", "training.svg")
"""What --force deletes; other files are left alone."""


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary beside `path`, flush it and rename it: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say whose write it ended
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON, atomically."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(path, lambda p: p.write_text(text))


def read_json(path: Path) -> Any:
    """Read JSON; a missing or broken file is one clear error."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist; is {path.parent} a run directory?") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, the second too if it ends in a colon, or its type without one."""
    first, *others = (str(error) or type(error).__name__).splitlines()
    return f"{first} {others[0].strip()}" if others and first.endswith(":") else first


def why_not_written(error: BaseException, path: Path) -> str:
    """Say why a file under `path` could not be written; ask at once: what torch says of a full disk does not tell."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    full = "inline_container" in str(error) and shutil.disk_usage(path).free < 1 << 20
    return os.strerror(errno.ENOSPC) if full else first_line(error)


def commit() -> str | None:
    """Return the commit of the working tree this package lies in, or None where there is none."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return found.stdout.strip() or None


class Run:
    """A run directory that this process holds."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def opened(self, config: dict[str, Any], resume: bool, force: bool) -> Iterator[bool]:
        """Hold the directory for this process and clear it for `start`; yield whether there is a run to resume.

        Raises UsageError where a run exists and neither resume nor force was given, the resumed one has other settings,
        the directory holds something else, or another process holds it. The hold ends with the process.
        """
        self._check(config, resume, force)
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{self.path} is in use by another process; wait for it or choose another") from None
            exists = self._check(config, resume, force)  # again: another process may have finished meanwhile
            for entry in self._temporaries():  # of a process that was killed
                entry.unlink()
            if exists and force:
                for name in OURS:
                    if name != CONFIG:  # it says to the end that this is a run
                        (self.path / name).unlink(missing_ok=True)
            yield exists and resume and (self.path / CHECKPOINT).exists()

    def start(self, config: dict[str, Any]) -> None:
        """Write what makes the directory a run: from here on it can be resumed."""
        write_json(self.path / CONFIG, config)

    def _temporaries(self) -> list[Path]:
        return [entry for entry in self.path.glob(".*.tmp") if entry.name.startswith(tuple(f".{o}." for o in OURS))]

    def _check(self, config: dict[str, Any], resume: bool, force: bool) -> bool:
        """Return whether a run exists here; refuse what would overwrite or mix runs."""
        if resume and force:
            raise UsageError("--resume and --force exclude each other: one goes on with a run, the other replaces it")
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; choose another directory")
        ignored = {self.path / LOCK, *self._temporaries()}
        if not any(entry not in ignored for entry in self.path.iterdir()):
            return False
        if not self._is_run(force):
            raise UsageError(f"{self.path} is not empty and not a run; choose another directory")
        if resume:
            self._check_same(config)
        elif not force:
            raise UsageError(f"{self.path} holds a run; --resume to go on, --force to replace it")
        return True

    def _is_run(self, force: bool) -> bool:
        """Return whether a run's config.json is here; a broken one beside a checkpoint can only be replaced."""
        path = self.path / CONFIG
        if not path.exists():
            return False
        try:
            stored = read_json(path)
        except UsageError:
            if force and (self.path / CHECKPOINT).exists():
                return True
            raise
        return isinstance(stored, dict) and "settings" in stored

    def _check_same(self, config: dict[str, Any]) -> None:
        old, new = read_json(self.path / CONFIG)["settings"], json.loads(json.dumps(config["settings"]))
        if not isinstance(old, dict):
            raise UsageError(f"{self.path / CONFIG} is not a run's configuration; --force replaces the run")
        # a run may be made longer, and run and watched differently
        free = {"steps", "device", "execution", "log_every", "checkpoint_every"}
        differing = [k for k in sorted(old.keys() | new.keys()) if k not in free and old.get(k) != new.get(k)]
        if differing:
            shown = "; ".join(difference(k, old.get(k), new.get(k)) for k in differing)
            raise UsageError(f"{self.path} was started with other settings ({shown}); choose another --out or --force")

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self.path / CHECKPOINT, lambda p: torch.save(checkpoint, p))

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint; a corrupt one is one clear error."""
        path = self.path / CHECKPOINT
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever pickle, zip or the file system raise
            raise UsageError(f"{path} is corrupt ({first_line(error)}); start again with --force") from None
        if not isinstance(checkpoint, dict) or "model" not in checkpoint or "step" not in checkpoint:
            raise UsageError(f"{path} is not a checkpoint; start again with --force")
        return checkpoint

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read every logged line; a last one that a killed process did not finish does not count."""
        path = self.path / METRICS
        if not path.exists():
            return []
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        except (ValueError, OSError) as error:
            raise UsageError(f"{path} cannot be read: {first_line(error)}") from None
        if not all(isinstance(row, dict) and "step" in row for row in rows):
            raise UsageError(f"{path} holds lines that are no metrics; start again with --force")
        return rows

    def cut_metrics(self, step: int) -> None:
        """Drop the lines after `step`: those an interrupted run logged after its last checkpoint."""
        kept = [row for row in self.metrics() if row["step"] <= step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        write_atomically(self.path / METRICS, lambda p: p.write_text(text))

    def save_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Write the final weights."""
        contiguous = {name: t.detach().cpu().contiguous() for name, t in state.items()}
        write_atomically(self.path / WEIGHTS, lambda p: save_file(contiguous, p))

    def load_weights(self) -> dict[str, torch.Tensor]:
        """Read the final weights, or those of the checkpoint of an unfinished run."""
        path = self.path / WEIGHTS
        if not path.exists():
            if not (self.path / CHECKPOINT).exists():
                raise UsageError(f"{self.path} has no weights yet; train it first")
            return self.load_checkpoint()["model"]
        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own type
            raise UsageError(f"{path} is corrupt ({first_line(error)}); delete it and --resume the run") from None


def difference(name: str, old: Any, new: Any) -> str:
    """Say how a setting differs, down to the field of a nested one."""
    if isinstance(old, dict) and isinstance(new, dict):
        inner = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        return "; ".join(difference(f"{name}.{k}", old.get(k), new.get(k)) for k in inner)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and isinstance(old[0], dict):
        pairs = [(i, o, n) for i, (o, n) in enumerate(zip(old, new, strict=True)) if o != n]
        return "; ".join(difference(f"{name}[{i}]", o, n) for i, o, n in pairs)
    return f"{name}: {old!r} there, {new!r} now"
