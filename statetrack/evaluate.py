"""How well a model solves a task at given lengths: the state is carried, memory does not grow with the length.

Tasks with one answer per sequence give accuracy; tasks with an answer at every token also the share of sequences
without a mistake up to a length (sequence accuracy, Grazzi et al., arXiv 2411.12537, E.2). Scaled accuracy is 0 for
guessing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from statetrack.errors import UsageError
from statetrack.layers import AttentionConfig, DeltaProductConfig
from statetrack.model import Config, Model
from statetrack.tasks import IGNORE, Task, scaled_accuracy

TOKENS_AT_ONCE = 1 << 15  # batch times chunk
LONGEST_ATTENTION = 32_768  # tokens: the cache and the scores grow, so the million would never end

Length = int | tuple[int, int]


def evaluate(
    model: Model,
    task: Task,
    length: Length,
    *,
    sequences: int = 1024,
    batch_size: int = 256,
    seed: int = 1_000_003,
    report: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Measure the model on `sequences` fresh sequences of one length, or of lengths drawn from a range (lo, hi).

    Returns {"length", "sequences", "accuracy", "scaled_accuracy"} and, for tasks with an answer at every token,
    "sequence_accuracy" (all of the sequence right) and "curve": [[t, sequence accuracy after t tokens], ...].
    `report` is called with the share done. Raises UsageError for lengths the task or the model cannot take.
    """
    for name, value in (("sequences", sequences), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"seed must be at least 0 and below 2**63, got {seed}")
    check_length(model.config, task, length)
    tokens = task.tokens(length)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    every = task.supervision == "every"
    shown = _shown(tokens)
    right = asked = 0
    intact = torch.zeros(len(shown), dtype=torch.int64)
    for first in range(0, sequences, batch_size):
        batch = min(batch_size, sequences - first)
        chunk = max(1, min(tokens, TOKENS_AT_ONCE // batch))
        alive, state, done = torch.ones(batch, dtype=torch.bool), None, 0
        for inputs, targets in task.stream(generator, batch, length, chunk):
            with torch.inference_mode():
                logits, state = model(inputs.to(device), state)
                hits = (logits.argmax(-1).cpu() == targets) & (targets != IGNORE)
            right += int(hits.sum())
            asked += int((targets != IGNORE).sum())
            if every:
                unbroken = alive[:, None] & (hits | (targets == IGNORE)).cummin(1).values
                inside = (shown > done) & (shown <= done + inputs.shape[1])
                intact[inside] += unbroken[:, shown[inside] - done - 1].sum(0)
                alive = unbroken[:, -1]
            done += inputs.shape[1]
            if report is not None:
                report((first + batch * done / tokens) / sequences)
    accuracy = right / asked
    result = {
        "length": length if isinstance(length, int) else list(length),
        "sequences": sequences,
        "accuracy": accuracy,
        "scaled_accuracy": scaled_accuracy(accuracy, task.chance),
    }
    if every:
        curve = (intact / sequences).tolist()
        result["sequence_accuracy"] = curve[-1]
        result["curve"] = [[t, a] for t, a in zip((shown - int(task.bos)).tolist(), curve, strict=True) if t > 0]
    return result


def check_length(config: Config, task: Task, length: Length) -> None:
    """Refuse lengths that the task does not have or the model cannot take."""
    task.length_range(length)
    tokens = task.tokens(length)
    if tokens > LONGEST_ATTENTION and any(isinstance(m, AttentionConfig) for m in config.mixers):
        raise UsageError(f"attention keeps every token: lengths up to {LONGEST_ATTENTION} are accepted, got {tokens}")


def at_precision(model: Model, precision: str) -> Model:
    """Return the same model with `precision` in its delta-rule kernels (`statetrack.ops.delta_rule`).

    Raises UsageError for a model without a delta rule, and where it does not lie on a GPU: only kernels there round.
    """
    config = model.config
    if not any(isinstance(m, DeltaProductConfig) for m in config.mixers):
        raise UsageError(f"precision={precision!r} is of the delta rule's kernels, and this model has no delta rule")
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise UsageError(f"precision={precision!r} is of the GPU kernels, and this model is on {device}")
    mixers = (replace(m, precision=precision) if isinstance(m, DeltaProductConfig) else m for m in config.mixers)
    other = replace(config, mixers=tuple(mixers)).build().to(device)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def _shown(tokens: int) -> torch.Tensor:
    """Return at most about 200 positions, evenly spaced, the last included, at which to record the curve."""
    step = max(1, tokens // 200)
    return torch.tensor(sorted({*range(step, tokens, step), tokens}))


def parse_lengths(words: Sequence[str]) -> list[Length]:
    """Read lengths as a user writes them: `256`, or `40..256` for lengths drawn from that range."""
    lengths: list[Length] = []
    for word in words:
        lo, dots, hi = word.replace(",", "").replace("_", "").partition("..")
        if not lo.isdecimal() or (dots and not hi.isdecimal()):
            raise UsageError(f"a length is a number or a range like 40..256, got {word!r}")
        lengths.append((int(lo), int(hi)) if dots else int(lo))
    return lengths


def shown_length(length: int | Sequence[int]) -> str:
    """Write a length as a user does: `256`, or `40..256`."""
    return str(length) if isinstance(length, int) else f"{length[0]}..{length[1]}"
