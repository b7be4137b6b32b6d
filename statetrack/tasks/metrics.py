"""How well a task is solved. Legend: B batch, T tokens. Targets of -1 are never counted."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.tasks.base import IGNORE


def accuracy(predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> float:
    """Return the fraction of right answers over all supervised positions of the batch (NaN if there is none)."""
    asked = targets != IGNORE
    right = (predictions == targets) & asked
    return (right.sum().double() / asked.sum()).item()


def position_accuracy(predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "T"]:
    """Return the fraction of right answers at every position (NaN where none is supervised)."""
    asked = targets != IGNORE
    return ((predictions == targets) & asked).sum(0).double() / asked.sum(0)


def correct(predictions: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """Mark the positions that hold no mistake: right, or not supervised."""
    return (predictions == targets) | (targets == IGNORE)


def sequence_accuracy(correct: Bool[Tensor, "B T"]) -> Float[Tensor, "T"]:
    """Return, for every t, the fraction of sequences without a mistake in positions 0..t (arXiv 2411.12537, E.2)."""
    return correct.long().cumprod(dim=1).double().mean(dim=0)


def scaled_accuracy(accuracy: float, chance: float) -> float:
    """Return (accuracy - chance) / (1 - chance): 0 for uniform guessing, 1 for perfect (arXiv 2411.12537, E.1.2)."""
    if not 0 <= chance < 1:
        raise UsageError(f"chance must lie in [0, 1), got {chance}")
    return (accuracy - chance) / (1 - chance)
