"""A fully specified language-model run: data, model, optimisation. `recipes/lm.py` has the papers' and ours."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from statetrack.errors import UsageError
from statetrack.layers import MIXERS, MixerConfig
from statetrack.lm.corpus import Data
from statetrack.model import Block, Config

DOCUMENTS, PRECISIONS = ("separate", "joined"), ("auto", "float32", "bfloat16")
FREE = ("steps", "micro_rows", "log_every", "save_every", "evaluate_every", "evaluate_rows", "compile")
"""what may change when a run is resumed"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: `steps` optimiser steps of `rows` rows of `length` tokens, on however many processes."""

    name: str
    about: str
    """one line: what it is and where the settings are from"""
    data: Data
    mixers: tuple[MixerConfig, ...]
    mlp_dim: int | None = None
    """hidden width of the SwiGLU; default 8/3 of the width rounded up to 256; 0 for none"""
    tied: bool = False
    """one matrix for embeddings and head"""
    init: str | None = None
    """checkpoint whose weights the run begins with; default those that the seed gives"""
    initializer_range: float = 0.02
    """standard deviation of embeddings, head and SwiGLU at the start"""
    length: int = 2048
    """tokens per row"""
    rows: int = 256
    """rows per optimiser step, over all processes"""
    micro_rows: int = 16
    """rows per process at once; the rest are accumulated"""
    steps: int
    lr: float = 3e-4
    min_lr: float = 0.0
    """where the cosine ends"""
    warmup: int = 250
    """steps over which the learning rate rises"""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    """largest gradient norm; 0 for no clipping"""
    documents: str = "separate"
    """separate: every document begins with an empty state; joined: the state runs on within a row"""
    precision: str = "auto"
    """bfloat16 is autocast; auto: bfloat16 on a GPU, float32 elsewhere"""
    compile: bool = True
    """torch.compile every block, on a GPU only"""
    gradient_checkpointing: bool = False
    """keep only the input of every block and run it again in the backward pass"""
    seed: int = 0
    """of weights and order"""
    log_every: int = 10
    save_every: int = 500
    evaluate_every: int = 500
    evaluate_rows: int = 64
    """rows of the validation split per evaluation"""

    def check(self) -> None:
        """Raise UsageError for what can never work."""
        for name in ("rows", "micro_rows", "steps", "log_every", "save_every", "evaluate_every", "evaluate_rows"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.length < 2:
            raise UsageError(f"length must be at least 2, got {self.length}")
        if not 0 < self.lr < math.inf or not 0 <= self.min_lr <= self.lr:
            raise UsageError(f"learning rates must satisfy 0 <= min_lr <= lr, 0 < lr; got {self.min_lr} and {self.lr}")
        if self.warmup < 0 or self.clip < 0 or not 0 <= self.weight_decay < math.inf:
            given = f"{self.warmup}, {self.clip} and {self.weight_decay}"
            raise UsageError(f"warmup, clip and weight_decay must be at least 0, got {given}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"betas must lie in [0, 1), got {self.betas}")
        if not 0 <= self.seed < 1 << 32:
            raise UsageError(f"seed must be at least 0 and below 2**32, got {self.seed}")
        if self.documents not in DOCUMENTS or self.precision not in PRECISIONS:
            accepted = f"documents {', '.join(DOCUMENTS)}; precision {', '.join(PRECISIONS)}"
            raise UsageError(f"unknown {self.documents!r} or {self.precision!r}; accepted: {accepted}")
        self.data.check()

    def accumulation(self, processes: int) -> int:
        """Return how many batches each process adds up per step; raise UsageError if the rows do not divide."""
        if self.rows % (self.micro_rows * processes):
            raise UsageError(
                f"rows={self.rows} per step do not divide by micro_rows={self.micro_rows} times {processes} processes"
            )
        return self.rows // (self.micro_rows * processes)

    def model(self, vocab_size: int) -> Config:
        """Return the model for a tokenizer of this size."""
        return Config(vocab_size=vocab_size, num_outputs=vocab_size, mixers=self.mixers, mlp_dim=self.mlp_dim)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` is the inverse."""
        names = {cls: name for name, cls in MIXERS.items()}
        mixers = [{"mixer": names[type(m)], **asdict(m)} for m in self.mixers]
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**plain, "data": asdict(self.data), "mixers": mixers, "betas": list(self.betas)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Recipe:
        """Build a recipe from `to_dict`'s result."""
        try:
            mixers = Config.from_dict({"vocab_size": 1, "num_outputs": 1, "mixers": data["mixers"]}).mixers
            changed = {"data": Data(**data["data"]), "mixers": mixers, "betas": tuple(data["betas"])}
            return cls(**{**data, **changed})
        except (KeyError, TypeError) as error:
            raise UsageError(f"not the settings of a language-model run: {error}") from None


@dataclass(frozen=True)
class Cost:
    """What one token costs in training."""

    parameters: int
    """in all; a matrix that is embeddings and head counts once"""
    flops: float
    """per token, forward and backward: 6 per weight that is multiplied, and what the states need"""
    blocks: int = field(default=0)


def cost(config: Config, tied: bool) -> Cost:
    """Return a model's parameters and the floating-point operations that training needs per token.

    Forward, a weight of a matrix costs 2 per token, an entry of the state 2 to be decayed or read, and 4 per factor to
    be corrected and written (chunked algorithms do more than that; it is not counted); the backward costs twice the
    forward. Recomputation is not counted.
    """
    with torch.device("meta"):
        blocks = [Block(mixer, _mlp_dim(config), config.norm_eps) for mixer in config.mixers]
        states = [block.mixer.init_state(1) for block in blocks]  # pyright: ignore
    embedding = config.vocab_size * config.dim
    parameters = sum(p.numel() for block in blocks for p in block.parameters()) + config.dim
    matrices = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim == 2) + embedding
    forward = 2.0 * matrices
    for mixer, state in zip(config.mixers, states, strict=True):
        largest = max((t.numel() for t in _tensors(state)), default=0)
        forward += largest * (2 + 4 * getattr(mixer, "factors", 1))
    return Cost(parameters + embedding * (1 if tied else 2), 3 * forward, len(blocks))


def _mlp_dim(config: Config) -> int:
    return 256 * -(-8 * config.dim // 768) if config.mlp_dim is None else config.mlp_dim


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    return [t for part in state or () for t in _tensors(part)] if isinstance(state, tuple) else []


PEAKS = {
    **{"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12},
    **{"L40S": 362e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12},
}
"""dense bfloat16 operations per second, by the makers' data sheets"""


def peak_flops(device: str) -> float | None:
    """Return the device's bfloat16 operations per second, or None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)
