"""Single tokens on a GPU as one CUDA graph each: op by op they are bound by the CPU's launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from statetrack.model import State

Step = Callable[[Int[Tensor, "B 1"], State], tuple[Float[Tensor, "B 1 D"], State]]
RECORD_AT = 3
"""the single token of a generation that is recorded: those before it have compiled the kernels"""

_generation: ContextVar[object | None] = ContextVar("generation", default=None)


@contextmanager
def generation() -> Iterator[None]:
    """Let the `SingleTokens` of this thread record: nobody else holds on to states, or changes weights, in here."""
    before = _generation.set(object())
    try:
        yield
    finally:
        _generation.reset(before)


class SingleTokens:
    """Steps of one token, recorded within a `generation` and where `RecordedStep` can."""

    def __init__(self) -> None:
        self._forget(None)

    def _forget(self, current: object | None) -> None:
        self.generation, self.count, self.recorded = current, 0, None

    def __call__(self, step: Step, tokens: Int[Tensor, "B 1"], state: State) -> tuple[Float[Tensor, "B 1 D"], State]:
        """Take one token per sequence."""
        current = _generation.get()
        if self.generation is not current or (self.recorded is not None and not self.recorded.fits(tokens, state)):
            self._forget(current)
        self.count += 1
        if current is not None and self.count == RECORD_AT:
            self.recorded = RecordedStep.of(step, tokens, state)
        return (self.recorded or step)(tokens, state)

    def __deepcopy__(self, memo: dict) -> SingleTokens:
        """A copy records for itself."""
        return SingleTokens()


class RecordedStep:
    """A step (tokens, state) -> (hidden, state) without gradients, recorded once and replayed.

    The state lies in tensors of its own, which every replay overwrites: what `__call__` returns holds until the next
    call. A state that is not the one returned last is copied into them first. `of` returns None where recording is not
    possible: no CUDA device, gradients, autocast, a state that grows (attention) or holds anything else than tensors,
    or a step that waits for the device.
    """

    def __init__(self, step: Step, tokens: Tensor, leaves: list[Tensor], spec):
        self.tokens, self.leaves = tokens.clone(), [leaf.clone() for leaf in leaves]
        self.state: State = tree_unflatten(self.leaves, spec)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.hidden, state = step(self.tokens, self.state)
            for held, new in zip(self.leaves, tree_flatten(state)[0], strict=True):
                held.copy_(new)

    @classmethod
    def of(cls, step: Step, tokens: Int[Tensor, "B 1"], state: State) -> RecordedStep | None:
        """Record a step on states of this shape; the step has run before, so that its kernels are compiled."""
        leaves, spec = tree_flatten(state)
        if not tokens.is_cuda or torch.is_grad_enabled() or torch.is_autocast_enabled("cuda"):
            return None
        on_gpu = all(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in leaves)
        if not on_gpu or torch.cuda.is_current_stream_capturing():
            return None
        side = torch.cuda.Stream(tokens.device)
        side.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.cuda.stream(side):  # where a recording needs libraries to have been used once
            after, spec_after = tree_flatten(step(tokens, state)[1])
        torch.cuda.current_stream(tokens.device).wait_stream(side)
        if spec_after != spec or [(x.shape, x.dtype) for x in after] != [(x.shape, x.dtype) for x in leaves]:
            return None
        try:
            return cls(step, tokens, leaves, spec)
        except RuntimeError:  # what cannot be recorded still runs op by op
            return None

    def fits(self, tokens: Tensor, state: State) -> bool:
        """Return whether a batch has the size that was recorded."""
        leaves = tree_flatten(state)[0]
        return tokens.shape == self.tokens.shape and all(
            isinstance(x, Tensor) and x.shape == held.shape and x.dtype == held.dtype
            for x, held in zip(leaves, self.leaves, strict=True)
        )

    def __call__(self, tokens: Int[Tensor, "B 1"], state: State) -> tuple[Float[Tensor, "B 1 D"], State]:
        """Take one token per sequence."""
        self.tokens.copy_(tokens)
        for held, given in zip(self.leaves, tree_flatten(state)[0], strict=True):
            if given is not held:
                held.copy_(given)
        self.graph.replay()
        return self.hidden.clone(), self.state
