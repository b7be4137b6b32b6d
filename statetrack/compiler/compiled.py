"""A compiled automaton: an exact network, run on token batches, carried from token to token, saved and certified."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from statetrack.automata import Automaton
from statetrack.compiler.assembly import Stage
from statetrack.compiler.cascade import sink_of
from statetrack.compiler.certificate import Certificate, Comparison, certify, compare_stages
from statetrack.compiler.discrete import Search, search_pairs
from statetrack.compiler.network import Network, State
from statetrack.compiler.operations import UNITS, Head, Merge, Operation, Style, Swap
from statetrack.errors import UsageError
from statetrack.model import Model

FORMAT = "statetrack compiled automaton 1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
STRUCTURES = ("householder", "gated", "dplr")
BATCH_LETTERS = 1 << 20  # of accepts, in one call


@dataclass(frozen=True)
class Blueprint:
    """All that a compiled automaton is made from: its automaton, its stages, and how they were found."""

    automaton: Automaton
    stages: list[Stage]
    states: list[int]
    """the automaton's state for everything that the network may know; the last for what cannot be"""
    window: Stage | None
    structure: str
    keys: str
    seconds: float
    """that compiling took"""
    late: bool
    """the time ran out: a smaller network may exist"""
    chain: bool = False
    """Zeiger's chain (zeiger.py), which has no stages"""

    def build(self) -> CompiledAutomaton:
        """Return the network."""
        from statetrack.compiler.zeiger import Chain

        return Chain(self) if self.chain else CompiledAutomaton(self)


class CompiledAutomaton(Network):
    """An automaton as the weights of a linear RNN, right to the last bit at any length (see `certificate`).

    Called on tokens [B T], letters as numbers, it returns what the automaton says after every token, and a state that
    goes on from there. It is a torch module without parameters: `.to("cuda")`, `.to(torch.bfloat16)` move it.
    """

    def __init__(self, blueprint: Blueprint):
        merged, classes = blueprint.automaton.merge_letters()
        style = Style(gated=blueprint.structure == "gated", keys=blueprint.keys)
        table = np.array(blueprint.states, dtype=np.int64)
        super().__init__(blueprint.automaton, classes, blueprint.stages, table, blueprint.window, style)
        self.blueprint, self.merged, self.style, self.states_table = blueprint, merged, style, table
        self.automaton, self.window_stage = blueprint.automaton, blueprint.window
        self.stages, self.sink = blueprint.stages, sink_of(blueprint.automaton)

    # --- running -----------------------------------------------------------------------------------------------------

    def forward(
        self, tokens: Int[Tensor, "B T"], state: State | None = None, *, backend: str = "auto"
    ) -> tuple[Int[Tensor, "B T"], State]:
        """Return what the automaton says after every token (1 where it accepts, or its output), and the state after.

        Raises UsageError for tokens that are no letters.
        """
        states, after = self.follow(tokens, state, backend)
        return self.emits[states], after

    def step(self, tokens: Int[Tensor, "B"], state: State | None = None) -> tuple[Int[Tensor, "B"], State]:
        """Take one token of every sequence; return what the automaton says, and the state."""
        said, after = self.forward(tokens[:, None], state)
        return said[:, 0], after

    def states(self, tokens: Int[Tensor, "B T"], *, backend: str = "auto") -> Int[Tensor, "B T"]:
        """Return the state of the minimal automaton (`.automaton`) after every token."""
        return self.follow(tokens, None, backend)[0]

    def accepts(self, texts: Iterable[str | bytes | Sequence[str]], *, backend: str = "auto") -> Bool[np.ndarray, "B"]:
        """Return which texts (str, bytes, or sequences of letters' names) are in the language; any lengths."""
        if self.automaton.accepting is None:
            raise UsageError("this automaton has outputs, not accepting states; call it, or use .states")
        words = [self.automaton.encode(text) for text in texts]
        found = np.empty(len(words), dtype=bool)
        order = sorted(range(len(words)), key=lambda i: len(words[i]))
        while order:
            longest = len(words[order[-1]])
            most = max(1, BATCH_LETTERS // max(1, longest))
            batch, order = order[-most:], order[:-most]
            padded = np.zeros((len(batch), longest), dtype=np.int64)
            for row, i in enumerate(batch):
                padded[row, : len(words[i])] = words[i]
            device = self.classes.device
            states = self.states(torch.from_numpy(padded).to(device), backend=backend).cpu().numpy()
            for row, i in enumerate(batch):
                last = states[row, len(words[i]) - 1] if len(words[i]) else self.automaton.start
                found[i] = last in self.automaton.accepting
        return found

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """The number of recurrent layers."""
        return len(self.stages)

    @property
    def factors(self) -> tuple[int, ...]:
        """The most factors per token, layer by layer."""
        return tuple(stage.factors(self.style) for stage in self.stages)

    @property
    def widths(self) -> tuple[int, ...]:
        """The coordinates of the state, layer by layer."""
        return tuple(stage.width for stage in self.stages)

    @property
    def kinds(self) -> str:
        """How the layers were found (see kinds.py)."""
        return "+".join(stage.kind for stage in self.stages) or "none"

    def report(self) -> str:
        """Return what was compiled to what, one line each."""
        b, merged = self.blueprint, self.merged
        letters = f"{merged.alphabet} classes of {b.automaton.alphabet} letters"
        always = "" if b.automaton.states > 1 else f"; it says {b.automaton.emits[0]} of every text"
        lines = [f"automaton   {b.automaton.states} states, {letters}{always}"]
        seen = f", the first sees {self.window + 1} tokens" if self.window else ""
        lines.append(f"network     {self.depth} recurrent layer(s){seen}; structure {b.structure}, keys {b.keys}")
        lines += self.layer_lines()
        late = "; the time ran out: this is the best found so far" if b.late else ""
        lines.append(f"compiled    in {b.seconds:.2f} s{late}")
        return "\n".join(lines)

    def layer_lines(self) -> list[str]:
        """Return the report's lines about the layers."""
        lines = []
        for i, (stage, factors) in enumerate(zip(self.stages, self.factors, strict=True)):
            heads = "+".join(
                f"{head.width}x{len(head.start)}" if len(head.start) > 1 else str(head.width) for head in stage.heads
            )
            rows = sum(table.size for table in stage.decoder)
            lines.append(
                f"  layer {i + 1}   {stage.kind:6s} heads of width {heads}; {factors} factor(s) a token; "
                f"tables of {rows} entries"
            )
        return lines

    def certificate(
        self, dtype: str | torch.dtype = "float32", backend: str = "auto", device: str = "cpu"
    ) -> Certificate:
        """Prove that the network is right on every word, in this arithmetic and kernel; see certificate.py.

        dtype: of the keys: float32, bfloat16, float16 or float64. backend: "reference", "chunk", "triton" or "auto".
        """
        if isinstance(dtype, str):
            if dtype not in DTYPES:
                raise UsageError(f"dtype={dtype!r} is unknown; accepted: {', '.join(DTYPES)}")
            dtype = DTYPES[dtype]
        return certify(self, dtype, backend, device)

    def search(self) -> Search:
        """Return the certificate's symbolic half."""
        return search_pairs(self)

    def compare(self, backend: str) -> Comparison:
        """Return the certificate's numeric half, in this network's own arithmetic."""
        return compare_stages(self, backend)

    def to_model(self, normalising: bool = False) -> Model:
        """Return an ordinary `Model` of DeltaProduct blocks with these weights (see to_model.py).

        normalising: for kernels that normalise keys in bfloat16, as fla's.
        """
        from statetrack.compiler.to_model import to_model

        return to_model(self, normalising)

    def to_fla(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return config.json and weights of flash-linear-attention's GatedDeltaProduct model, in bfloat16.

        `statetrack convert DIR --to gated_deltaproduct --out OUT` writes them, for AutoModelForCausalLM. Sequences
        begin with the token `bos_token_id`; the logits say at every token what the automaton does. Needs transformers;
        raises UsageError where `to_model` does, for decoders that bfloat16 cannot add up, and for heads of more than
        128 coordinates.
        """
        from statetrack.convert import Checkpoint, exported

        return exported(Checkpoint.of_compiled(self, normalising=True), "gated_deltaproduct")

    def copy_in(self, dtype: torch.dtype, device: str) -> CompiledAutomaton:
        """Return the same network in another arithmetic or place."""
        other = self.blueprint.build()
        other.load_state_dict(self.state_dict())
        return other.to(device=device, dtype=dtype)

    # --- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: the weights, and in its metadata all that the report and certificate need."""
        from statetrack.runs import write_atomically

        if not Path(path).absolute().parent.is_dir():
            raise UsageError(f"{path} cannot be written: {Path(path).parent} is no directory")
        metadata = {"format": FORMAT, "blueprint": json.dumps(_to_json(self.blueprint))}
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        write_atomically(Path(path), lambda p: save_file(tensors, p, metadata))

    @classmethod
    def load(cls, path: str | Path) -> CompiledAutomaton:
        """Read what `save` wrote; raises UsageError for anything else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except Exception as error:  # safetensors raises its own type
            raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
        if metadata.get("format") != FORMAT:
            raise UsageError(f"{path} is not a compiled automaton (or of another version)")
        try:
            compiled = _from_json(json.loads(metadata["blueprint"])).build()
            made = {name: tensor.clone() for name, tensor in compiled.state_dict().items()}
            compiled.load_state_dict(tensors)
        except Exception as error:  # whatever may be wrong with it
            raise UsageError(f"{path} is damaged: {str(error).splitlines()[0]}") from None
        for name, tensor in compiled.state_dict().items():
            if not torch.equal(tensor, made[name].to(tensors[name].dtype).to(tensor.dtype)):
                raise UsageError(f"{path} is damaged: {name} is not what was compiled")
        return compiled


def _to_json(b: Blueprint) -> dict[str, Any]:
    a = b.automaton
    automaton = {
        "table": a.table.tolist(),
        "start": a.start,
        "accepting": None if a.accepting is None else sorted(a.accepting),
        "output": None if a.output is None else a.output.tolist(),
        "letters": a.letters,
    }
    stages = [_stage_to_json(stage) for stage in b.stages]
    window = None if b.window is None else _stage_to_json(b.window)
    return {**b.__dict__, "automaton": automaton, "stages": stages, "window": window}


def _stage_to_json(stage: Stage) -> dict[str, Any]:
    heads = [
        {
            **{field.name: getattr(head, field.name) for field in fields(head) if field.init},
            "start": [sorted(ones) for ones in head.start],
            "operations": [[op.cycles, op.clears, sorted(op.writes)] for op in head.operations],
        }
        for head in stage.heads
    ]
    asymmetric = [[[type(f).__name__, f.q, f.r] for f in factors] for factors in stage.asymmetric]
    decoder = [table.tolist() for table in stage.decoder]
    return {"kind": stage.kind, "start": stage.start, "heads": heads, "decoder": decoder, "asymmetric": asymmetric}


def _from_json(data: dict[str, Any]) -> Blueprint:
    a = data["automaton"]
    automaton = Automaton(
        np.array(a["table"]),
        a["start"],
        None if a["accepting"] is None else frozenset(a["accepting"]),
        None if a["output"] is None else np.array(a["output"]),
        None if a["letters"] is None else tuple(a["letters"]),
    )
    if data["structure"] not in STRUCTURES or data["keys"] not in UNITS:
        raise ValueError(f"no structure {data['structure']!r} with keys {data['keys']!r}")
    stages = [_stage_from_json(stage) for stage in data["stages"]]
    window = None if data["window"] is None else _stage_from_json(data["window"])
    return Blueprint(**{**data, "automaton": automaton, "stages": stages, "window": window})


def _stage_from_json(data: dict[str, Any]) -> Stage:
    kinds = {"Swap": Swap, "Merge": Merge}
    heads = []
    for head in data["heads"]:
        operations = [
            Operation(tuple(map(tuple, cycles)), tuple(clears), frozenset(writes))
            for cycles, clears, writes in head["operations"]
        ]
        heads.append(Head(**{**head, "start": tuple(map(frozenset, head["start"])), "operations": operations}))
    decoder = [np.array(table, dtype=np.int64) for table in data["decoder"]]
    asymmetric = [[kinds[name](q, r) for name, q, r in factors] for factors in data["asymmetric"]]
    return Stage(data["kind"], heads, decoder, data["start"], asymmetric)
