"""How a training step is run: op by op, compiled, or as one CUDA graph.

    eager          op by op, as PyTorch does
    compile        forward and loss by torch.compile; batches have one shape, so it compiles once
    graph          the whole step, AdamW included, recorded once as a CUDA graph and replayed: the CPU's launches cost
                   small models most of their time
    compile+graph  a graph of the compiled step

A run that is stopped and resumed ends with the same bits as one that is not; but for a compiled step on a GPU, where
torch.compile adds up an embedding's gradient in any order.
A step waits for nothing: its loss, accuracy and gradient norm stay on the device until somebody reads them.
Legend: B batch, T tokens, A answers (B where a sequence has one answer, else B T).
"""

from __future__ import annotations

import math
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.errors import UsageError
from statetrack.layers.common import decayed_names
from statetrack.runs import first_line
from statetrack.tasks import IGNORE

if TYPE_CHECKING:
    from statetrack.train import Settings

EXECUTIONS = ("auto", "eager", "compile", "graph", "compile+graph")
WARM_UP = 3
"""steps before recording: kernels are compiled and libraries choose theirs, which a recording must not see"""


class Answers(NamedTuple):
    """A batch as a step takes it; every batch of a run has the same shapes."""

    inputs: Int[Tensor, "B T"]
    targets: Int[Tensor, "A"]
    """IGNORE where nothing is asked"""
    places: Int[Tensor, "A"] | None
    """where in the B T logits the answers are; None for everywhere"""

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, *, one_each: bool, device: torch.device) -> Answers:
        """Bring a task's batch to the device; one_each: every sequence has exactly one answer."""
        flat, places = targets.flatten(), None
        if one_each:
            places = (flat != IGNORE).nonzero().squeeze(1)
            flat = flat[places]

        def sent(tensor: Tensor) -> Tensor:  # from pinned memory the copy waits for nothing
            if device.type != "cuda":
                return tensor.to(device)
            return tensor.pin_memory().to(device, non_blocking=True)

        return cls(sent(inputs), sent(flat), None if places is None else sent(places))


def optimizer_for(model: nn.Module, settings: Settings, *, capturable: bool = False) -> torch.optim.AdamW:
    """Return AdamW; capturable: it may be recorded in a CUDA graph.

    Weight decay applies to matrices only: not to norms, biases and gates (one-dimensional), nor to what a layer names
    in `undecayed`.
    """
    names, named = set(decayed_names(model)), list(model.named_parameters())
    decayed, free = ([p for name, p in named if (name in names) == wanted] for wanted in (True, False))
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = True if next(model.parameters()).is_cuda else None
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused, capturable=capturable)


@final
class TrainingStep:
    """Forward, loss, backward, clipping and AdamW on one batch, run as settings.execution says."""

    def __init__(self, model: nn.Module, settings: Settings, device: torch.device, autocast: bool):
        check_execution(settings.execution)
        self.automatic = settings.execution == "auto"
        on_gpu = device.type == "cuda"
        how = ("graph" if on_gpu else "eager") if self.automatic else settings.execution
        self.graphed = "graph" in how
        if self.graphed and not on_gpu:
            raise UsageError(f"execution={how!r} needs a CUDA device, got {device}; accepted here: eager, compile")
        self.model, self.settings, self.device, self.autocast = model, settings, device, autocast
        self.optimizer = optimizer_for(model, settings, capturable=self.graphed)
        self._rate = torch.tensor(settings.lr, device=device) if self.graphed else None
        self._loss = torch.compile(self._eager_loss, dynamic=False) if "compile" in how else self._eager_loss
        self._recorded: tuple[torch.cuda.CUDAGraph, Answers, Tensor] | None = None
        self._share_rate()

    def __call__(self, batch: Answers, lr: float) -> Float[Tensor, "3"]:
        """Take one step; return loss, accuracy and gradient norm, on the device, overwritten by the next step."""
        if self.graphed and self._recorded is None:
            self._record(batch)
        if self._recorded is None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            return self._step(batch)
        assert self._rate is not None
        graph, held, measured = self._recorded
        self._rate.fill_(lr)
        for old, new in zip(held, batch, strict=True):
            if old is not None and new is not None:
                old.copy_(new)
        graph.replay()
        return measured

    def state(self) -> dict[Any, Any]:
        """Return the optimiser's moments and counts: the same for every execution."""
        return self.optimizer.state_dict()["state"]

    def load_state(self, state: dict[Any, Any]) -> None:
        """Go back to a `state()`, of whatever execution. Raises ValueError where it does not fit the model."""
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})
        self._recorded = None  # it works on the tensors that were there before
        self._share_rate()

    def _share_rate(self) -> None:
        """Let every group read the learning rate from the tensor that a graph reads."""
        if self._rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self._rate

    def _eager_loss(self, batch: Answers) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits, _ = self.model(batch.inputs)
        answers = logits.flatten(0, 1)
        if batch.places is not None:
            answers = answers.index_select(0, batch.places)
        answers, targets = answers.float(), batch.targets
        smoothing = self.settings.label_smoothing
        loss = F.cross_entropy(answers, targets, ignore_index=IGNORE, label_smoothing=smoothing)
        right = (answers.detach().argmax(-1) == targets).sum()
        return loss, right / (targets != IGNORE).sum()

    def _step(self, batch: Answers) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss, accuracy = self._loss(batch)
        except RuntimeError as error:
            dynamo = sys.modules.get("torch._dynamo.exc")  # there if something was compiled
            if dynamo is None or not isinstance(error, dynamo.TorchDynamoException):
                raise
            raise UsageError(f"torch.compile failed: {first_line(error)}; execution='eager' does without") from None
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip or math.inf)
        self.optimizer.step()
        return torch.stack([loss.detach(), accuracy, norm])

    def _record(self, batch: Answers) -> None:
        """Record the step as a graph; where it cannot be recorded and nobody asked for it, go on op by op."""
        with torch.cuda.device(self.device):
            self._warm_up(batch)
            self.optimizer.zero_grad(set_to_none=True)
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self.device), torch.cuda.graph(graph):
                measured = self._step(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if not self.automatic:
                reason = f"this model's step cannot be recorded as a CUDA graph: {first_line(error)}"
                raise UsageError(f"{reason}; execution='eager' does without") from None
            warnings.warn(f"no CUDA graph, training op by op: {first_line(error)}", stacklevel=2)
            self.graphed = False
            return
        self._recorded = graph, batch, measured

    def _warm_up(self, batch: Answers) -> None:
        """Take some steps on a stream of their own and undo them, so that every step that counts is a replay."""
        parameters = list(self.model.parameters())
        weights = [p.detach().clone() for p in parameters]
        moments = {p: {name: value.clone() for name, value in m.items()} for p, m in self.optimizer.state.items()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step(batch)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():  # in place: the graph will know these tensors by their addresses
            for p, weight in zip(parameters, weights, strict=True):
                p.copy_(weight)
                for name, value in self.optimizer.state[p].items():
                    before = moments.get(p, {}).get(name)
                    value.zero_() if before is None else value.copy_(before)


def check_execution(name: str) -> None:
    """Refuse an unknown way to run a step."""
    if name not in EXECUTIONS:
        raise UsageError(f"execution must be {', '.join(EXECUTIONS[:-1])} or {EXECUTIONS[-1]}, got {name!r}")
