"""The run directory: everything a run leaves behind, written so that nothing is ever half there.

config.json         the resolved settings, with version and commit
metrics.jsonl       one line per logged step, append-only
checkpoint.pt       what resuming needs: weights, optimiser, random states, step
model.safetensors   the weights at the end
evaluation.json     accuracies by length (statetrack evaluate)
*.png, *.svg        curves
"""

from __future__ import annotations

import contextlib
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
LOCK = ".lock"


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` on a temporary beside `path`, flush it and rename it: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
        raise UsageError(f"{path} cannot be read: {error}") from None


def commit() -> str | None:
    """Return the commit of the working tree this package lies in, or None where there is none."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


class Run:
    """A run directory that this process holds."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def opened(self, config: dict[str, Any], resume: bool, force: bool) -> Iterator[bool]:
        """Hold the directory for this process and make it ready; yield whether there is a run to resume.

        Raises UsageError where a run exists and neither resume nor force was given, the resumed one has other settings,
        or another process holds it. The hold ends with the process, however it ends.
        """
        exists = self._check(config, resume, force)
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / LOCK, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{self.path} is in use by another process; wait for it or choose another") from None
            if force and not (exists and resume):
                for entry in self.path.iterdir():
                    if entry.is_dir() and not entry.is_symlink():
                        shutil.rmtree(entry)
                    elif entry.name != LOCK:
                        entry.unlink()
            write_json(self.path / CONFIG, config)
            yield exists and resume and (self.path / CHECKPOINT).exists()

    def _check(self, config: dict[str, Any], resume: bool, force: bool) -> bool:
        """Return whether a run exists here; refuse what would overwrite or mix runs."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file; choose another directory")
        exists = (self.path / CONFIG).exists()
        filled = self.path.exists() and any(entry.name != LOCK for entry in self.path.iterdir())
        if filled and not exists and not force:
            raise UsageError(f"{self.path} is not empty and not a run; choose another, or --force to empty it")
        if exists and not (resume or force):
            raise UsageError(f"{self.path} holds a run; --resume to go on, --force to delete it and start again")
        if exists and resume:
            self._check_same(config)
        return exists

    def _check_same(self, config: dict[str, Any]) -> None:
        stored = read_json(self.path / CONFIG)
        old, new = stored.get("settings", {}), json.loads(json.dumps(config["settings"]))
        free = {"steps", "device", "log_every", "checkpoint_every"}  # a run may be made longer, and watched differently
        differing = [k for k in sorted(old.keys() | new.keys()) if k not in free and old.get(k) != new.get(k)]
        if differing:
            shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differing)
            raise UsageError(f"{self.path} was started with other settings ({shown}); choose another --out or --force")

    def save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint."""
        write_atomically(self.path / CHECKPOINT, lambda p: torch.save(checkpoint, p))

    def load_checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint; a corrupt one is one clear error."""
        path = self.path / CHECKPOINT
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever pickle, zip or the file system raise
            reason = str(error).splitlines()[0]
            raise UsageError(f"{path} is corrupt ({reason}); start again with --force") from None

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one line."""
        with open(self.path / METRICS, "a") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read every logged line."""
        path = self.path / METRICS
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

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
            raise UsageError(f"{path} is corrupt ({error}); resume the run to write it again") from None
