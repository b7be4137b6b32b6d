"""One table of names per format, read in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from statetrack.errors import UsageError


@dataclass(frozen=True)
class Key:
    """A weight of ours, and those of theirs that make it, one below the other."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...] = ()
    """rows of each of theirs, where there are several"""
    taps: bool = False
    """a convolution: ours [W D], theirs [D 1 W]"""

    def read(self, theirs: Mapping[str, Tensor]) -> Tensor:
        """Return our weight."""
        parts = [theirs[name] for name in self.theirs]
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        return x.squeeze(1).T.contiguous() if self.taps else x

    def write(self, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield their weights."""
        x = ours[self.ours].T.unsqueeze(1) if self.taps else ours[self.ours]
        parts = x.split(list(self.rows)) if len(self.theirs) > 1 else [x]
        for name, part in zip(self.theirs, parts, strict=True):
            yield name, part.clone(memory_format=torch.contiguous_format)


def read_all(keys: Iterable[Key], theirs: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return all our weights; raise UsageError where theirs lack one or have one more."""
    keys = list(keys)
    wanted = {name for key in keys for name in key.theirs}
    if missing := sorted(wanted - set(theirs)):
        raise UsageError(
            f"{source} lacks the weight {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    if unknown := sorted(name for name in set(theirs) - wanted if not name.endswith("inv_freq")):
        raise UsageError(f"{source} has the weight {unknown[0]}, for which a Model has no place")
    return {key.ours: key.read(theirs) for key in keys}


def write_all(keys: Iterable[Key], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return all their weights."""
    return dict(pair for key in keys for pair in key.write(ours))
