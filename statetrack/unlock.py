"""A model with eigenvalues in [0, 1] becomes one with eigenvalues in [-1, 1] that starts as the same function.

    lambda = lo + (hi - lo) s:   lo = 0 becomes lo_h = -tanh(p_h) per head h, p_h learned from 0

So nothing changes at first, every p gets a gradient, and no lo passes -1 however far p goes. Grazzi et al. (arXiv
2411.12537) train with lo = -1 from the start; this is for models that were trained without.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from statetrack.convert import Checkpoint, check_free, read, write
from statetrack.errors import UsageError
from statetrack.hf import StateTrackConfig


def unlock(source: str | Path, out: Path, force: bool = False) -> int:
    """Write the unlocked checkpoint to the directory `out`, in our format; return how many layers were unlocked.

    source: whatever `statetrack.convert` reads. force: replace a checkpoint that is there. Raises UsageError where no
    layer has the range [0, 1], and where one that has it cannot learn its lower end.
    """
    check_free(out, force)
    found = read(source)
    mixers, weights, count = list(found.config.model_config().mixers), dict(found.weights), 0
    for i, mixer in enumerate(mixers):
        if getattr(mixer, "eigenvalues", None) != (0.0, 1.0):
            continue
        if "learned_low" not in {field.name for field in fields(mixer)}:
            raise UsageError(f"layer {i} cannot learn its lower end: {type(mixer).__name__.removesuffix('Config')}")
        changed: Any = replace(mixer, eigenvalues=(-1.0, 1.0), learned_low=True)
        mixers[i], count = changed, count + 1
        weights[f"model.blocks.{i}.mixer.low"] = torch.zeros(changed.heads)
    if not count:
        ranges = {mixer.eigenvalues for mixer in mixers if hasattr(mixer, "eigenvalues")}  # pyright: ignore
        listed = ", ".join(f"[{lo:g}, {hi:g}]" for lo, hi in sorted(ranges)) or "none"
        raise UsageError(f"{source} has no layer with eigenvalues in [0, 1]; its ranges: {listed}")
    settings = {**found.config.to_dict(), "mixers": mixers}
    write(Checkpoint(StateTrackConfig.from_dict(settings), weights, found.source), "statetrack", out, force)
    return count
