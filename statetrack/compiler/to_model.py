"""A compiled automaton as an ordinary `Model`: embedding, DeltaProduct mixers, SwiGLUs, head; exact in float32.

The hidden stream holds one-hot sections and one constant. The embedding writes the letter; every stage is a block whose
mixer runs the stage's operations and whose SwiGLU decodes what it reads. Between two stages lies a block whose mixer,
through a short convolution of 2, repeats what was known at the token before, and whose SwiGLU makes that and the letter
the next stage's event. A stage's mixer has one head per coordinate, all with the same keys: head i reads coordinate i.

Why it is exact. The constant is 2^16 and the width a power of 4, so every RMSNorm divides by a power of two whatever
else is in the stream, and its weight undoes it. SiLU leaves 32 as it is; the keys of swaps are (p, -p), a power of two
for which numbers are found whose SiLU is p and -p to the last bit. A gate of the SwiGLU is 32 where all evidence is
there, and below -200, whose SiLU is 0, where some is missing. Sequences begin with a BOS token, the last of the
vocabulary, which writes the start. A mixer's norm has an epsilon of three times the mean square of what it normalises,
so that the sum is a power of 4 again, and what should be 0 is not blown up once training has made it small instead.

For fla's GatedDeltaProduct (`normalising=True`), whose kernels normalise keys and run in bfloat16, all mixers are alike
(heads, factors, a convolution of 2), keys are those of length 1 over pairs of coordinates, and the numbers whose SiLU
is p and -p are bfloat16's. The 1e-6 that is added to |k|^2 there is lost when the key is rounded to 8 bits.

Letters: D width, K head width, H heads, F factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from statetrack.compiler.assembly import Stage, groups
from statetrack.compiler.compiled import CompiledAutomaton
from statetrack.compiler.operations import Style
from statetrack.errors import UsageError
from statetrack.layers import DeltaProduct, DeltaProductConfig
from statetrack.model import Block, Config, Model

CONSTANT = 2.0**16  # its square swallows the squares of all one-hot entries
LARGE = 32.0  # what SiLU leaves as it is: queries, keys with one entry, open gates
SATURATED = 40.0  # a logit whose sigmoid is 1
SHUT = -120.0  # a logit whose sigmoid is 0
FLA_HEAD_DIM = 256  # the widest head of fla's kernels
CONFIDENT = 20.0  # logit of the answer

Row = tuple[list[tuple[int, int]], int]  # evidence: (coordinate of the stream, 1 or -1 for 1 or 0); coordinate written


@dataclass(frozen=True)
class Section:
    """A one-hot part of the stream."""

    start: int
    size: int

    def __getitem__(self, i: int) -> int:
        """Return the coordinate of entry i."""
        return self.start + i


@dataclass(frozen=True)
class Level:
    """One stage's events and sections of the stream."""

    stage: Stage
    events: dict[tuple[int, ...], int]
    """the operations of all heads, by their numbers; the identity is no event"""
    event: Section
    """the events, then that of BOS"""
    bits: Section
    """what the mixer's heads read: coordinate by coordinate of every head, all columns of each"""
    known: Section
    before: Section
    """what the layers below knew at the token before"""

    def bit(self, head: int, coordinate: int, column: int) -> int:
        """Return the stream's coordinate of one bit."""
        offset = sum(h.width * len(h.start) for h in self.stage.heads[:head])
        return self.bits[offset + coordinate * len(self.stage.heads[head].start) + column]

    def rows(self, below: Section) -> Iterator[Row]:
        """Yield the decoder's entries: what must be known below and read here, and what is known then."""
        for c, values, code in _entries(self.stage):
            evidence = [(below[c], 1)] if below.size > 1 else []
            yield evidence + self._read(values), self.known[code]

    def _read(self, values: list[int]) -> list[tuple[int, int]]:
        columns = max(len(head.start) for head in self.stage.heads)
        at, evidence = iter(values), []
        for h, head in enumerate(self.stage.heads):
            found: list[set[int]] = [set() for _ in range(columns)]
            for weights in groups(head):
                for column in range(columns):
                    value = next(at)
                    if head.register:
                        found[column] |= {i for i, weight in enumerate(weights) if weight & value}
                    elif value:
                        found[column].add(weights.index(value))
            for column in range(len(head.start)):
                for i in range(head.width):
                    if i in found[column]:
                        evidence.append((self.bit(h, i, column), 1))
                    elif head.register or not found[column]:
                        evidence.append((self.bit(h, i, column), -1))
        return evidence


def _entries(stage: Stage) -> Iterator[tuple[int, list[int], int]]:
    """Yield the entries of a stage's chain of tables: known below, readings, known here."""

    def walk(i: int, code: int, values: list[int]) -> Iterator[tuple[list[int], int]]:
        if i == len(stage.decoder):
            yield values, code
            return
        table = stage.decoder[i]
        for reading in np.flatnonzero(table[code] != table[-1, 0]).tolist():
            yield from walk(i + 1, int(table[code, reading]), [*values, reading])

    for c in range(len(stage.decoder[0]) - 1):
        for values, code in walk(0, c, []):
            yield c, values, code


def to_model(compiled: CompiledAutomaton, normalising: bool = False) -> Model:
    """Return a model of DeltaProduct blocks that follows the automaton exactly on sequences that begin with BOS.

    vocab_size is the number of letters and one more for BOS, the last; the logit of what the automaton says is larger
    than the others by 10 at least. normalising: for fla's GatedDeltaProduct in bfloat16; BOS is still the number of
    letters, but there are as many outputs as tokens, some of which may have no use. Raises UsageError for structures
    other than "householder", for windows of more than 2 tokens, and for what fla's kernels or bfloat16 cannot hold.
    """
    if compiled.blueprint.chain:
        raise UsageError("Zeiger's chain has no tables that a model could hold; to_model needs a searched network")
    if compiled.blueprint.structure != "householder" or compiled.window > 1:
        raise UsageError(
            'to_model needs structure="householder" and a window of at most 2 tokens, '
            f"got {compiled.blueprint.structure!r} and {compiled.window + 1}"
        )
    return _Builder(compiled, normalising).model()


class _Builder:
    """The stream's sections first, then the blocks' configurations and weights, from the bottom up."""

    def __init__(self, compiled: CompiledAutomaton, normalising: bool):
        self.normalising, self.style = normalising, Style(keys="unit" if normalising else "integer")
        self.compiled, self.letters, self.size = compiled, compiled.merged.alphabet, 1  # coordinate 0: the constant
        self.letter = self._section(self.letters + 1)
        codes = [len(stage.decoder[0]) - 1 for stage in compiled.stages] + [len(compiled.states_table) - 1]
        self.seen = self._section(codes[0] if compiled.window else 0)  # what the window alone tells
        self.levels = [self._level(i, stage, codes) for i, stage in enumerate(compiled.stages)]
        self.dim = 4 ** max(2, math.ceil(math.log(self.size, 4)))
        heads = [head for stage in compiled.stages for head in stage.heads]
        widest = max((max(head.width * self.style.copies(head), len(head.start)) for head in heads), default=1)
        self.head_dim = 4 ** max(1 + normalising, math.ceil(math.log(widest, 4)))
        if normalising and self.head_dim > FLA_HEAD_DIM:
            raise UsageError(
                f"fla's heads hold {FLA_HEAD_DIM // 2} coordinates at most, this network needs {widest // 2}"
            )
        if normalising:
            self.plus, self.minus = opposite_bfloat16_preimages()
        else:
            self.plus, self.minus = opposite_preimages()

    def _section(self, size: int) -> Section:
        self.size += size
        return Section(self.size - size, size)

    def _level(self, i: int, stage: Stage, codes: list[int]) -> Level:
        events: dict[tuple[int, ...], int] = {}
        for c in range(codes[i]):
            for x in range(self.letters):
                key = tuple(head.letters[c][x] for head in stage.heads)
                if any(key):
                    events.setdefault(key, len(events))
        bits = sum(head.width * len(head.start) for head in stage.heads)
        before = self._section(codes[i] if i or self.compiled.window else 0)
        return Level(
            stage, events, self._section(len(events) + 1), self._section(bits), self._section(codes[i + 1]), before
        )

    def model(self) -> Model:
        """Return the model."""
        plan: list[tuple[DeltaProductConfig, list[Row], Level, Section | None]] = []
        below = self.seen
        for level in self.levels:
            if level.before.size:
                plan.append((self._repeater(level.before), list(self._event_rows(level)), level, below))
            plan.append((self._mixer(level), list(level.rows(below)), level, None))
            below = level.known
        if not plan:
            raise UsageError("this language needs no recurrent layer; a model of it would have no mixer")
        config = self._model_config([mixer for mixer, *_ in plan], max(1, *(len(rows) for _, rows, *_ in plan)))
        model = config.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            for block, (_, rows, level, repeats) in zip(model.blocks, plan, strict=True):
                assert isinstance(block, Block) and isinstance(block.mixer, DeltaProduct)
                self._write_norm(block.mixer_norm)
                self._write_norm(block.mlp_norm)
                self._write_rows(block, rows)
                if repeats is None:
                    self._write_mixer(block.mixer, level)
                else:
                    self._write_repeater(block.mixer, repeats, level.before)
            self._write_ends(model, below)
        return model

    # --- configurations ----------------------------------------------------------------------------------------------

    def _model_config(self, mixers: list[DeltaProductConfig], mlp_dim: int) -> Config:
        automaton = self.compiled.automaton
        tokens, outputs = automaton.alphabet + 1, automaton.num_outputs
        if not self.normalising:
            return Config(vocab_size=tokens, num_outputs=outputs, mixers=tuple(mixers), mlp_dim=mlp_dim)
        heads, factors = max(m.heads for m in mixers), max(m.factors for m in mixers)
        alike = (self._config(heads, factors, 2),) * len(mixers)
        size = max(tokens, outputs)
        return Config(vocab_size=size, num_outputs=size, mixers=alike, mlp_dim=mlp_dim, norm_eps=alike[0].norm_eps)

    def _mixer(self, level: Level) -> DeltaProductConfig:
        heads = sum(head.width for head in level.stage.heads)
        starts = max(self.style.copies(head) * len(set().union(*head.start)) for head in level.stage.heads)
        return self._config(heads, max(level.stage.factors(self.style), starts), 0)

    def _repeater(self, repeated: Section) -> DeltaProductConfig:
        return self._config(-(-repeated.size // self.head_dim), 1, 2)

    def _config(self, heads: int, factors: int, conv_size: int) -> DeltaProductConfig:
        return DeltaProductConfig(
            dim=self.dim,
            heads=heads,
            head_dim=self.head_dim,
            factors=factors,
            conv_size=conv_size,
            norm_eps=3 * (LARGE / self.head_dim) ** 2,
        )

    def _event_rows(self, level: Level) -> Iterator[Row]:
        """Yield what makes an event: what was known before, and the letter."""
        for c in range(level.before.size):
            for x in range(self.letters):
                key = tuple(head.letters[c][x] for head in level.stage.heads)
                if key in level.events:
                    yield [(level.before[c], 1), (self.letter[x], 1)], level.event[level.events[key]]
        yield [(self.letter[self.letters], 1)], level.event[len(level.events)]

    # --- weights -----------------------------------------------------------------------------------------------------

    def _write_norm(self, norm: nn.Module) -> None:
        """Undo the division by 2^16 / sqrt(D); the constant becomes 1."""
        weight = norm.weight
        assert isinstance(weight, Tensor)
        weight.fill_(CONSTANT / self.dim**0.5)
        weight[0] = self.dim**-0.5

    def _write_rows(self, block: Block, rows: list[Row]) -> None:
        """Let every row be a hidden unit that writes 1 where all its evidence is there."""
        gate, up = block.gate_up.weight.chunk(2)
        for unit, (evidence, written) in enumerate(rows):
            gate[unit, 0] = open_gate = LARGE - 256 * sum(sign == 1 for _, sign in evidence)
            if self.normalising and float(torch.tensor(open_gate).bfloat16()) != open_gate:
                raise UsageError(
                    "a decoder of this network combines more than 32 readings, more than bfloat16 can add up"
                )
            for coordinate, sign in evidence:
                gate[unit, coordinate] = 256 * sign
            up[unit, 0] = 1
            block.down.weight[written, unit] = 1 / LARGE

    def _write_mixer(self, mixer: DeltaProduct, level: Level) -> None:
        """Run the stage's operations in every head, and read one coordinate in each."""
        N, H, K = mixer.config.factors, mixer.config.heads, self.head_dim
        q = mixer.q_proj.weight.view(H, K, -1)
        k, v = (projection.weight.view(N, H, K, -1) for projection in (mixer.k_proj, mixer.v_proj))
        beta = mixer.beta_proj.weight.view(N, H, -1)
        mixer.norm.weight.fill_(2 * K**-0.5)
        beta[:, :, 0] = SHUT
        if mixer.conv is not None:
            mixer.conv.weight[1] = 1  # this token
        first = 0
        for h, head in enumerate(level.stage.heads):
            copies, n = slice(first, first + head.width), self.style.copies(head)
            for i in range(head.width):
                q[first + i, n * i, 0] = LARGE
                for column in range(len(head.start)):
                    mixer.o_proj.weight[level.bit(h, i, column), (first + i) * K + column] = 1
            for numbers, event in level.events.items():
                at = level.event[event]
                for f, (key, value, step) in enumerate(self.style.factors(head, head.operations[numbers[h]])):
                    for i, sign in key.items():
                        k[f, copies, i, at] = LARGE if len(key) == 1 else self.plus if sign > 0 else self.minus
                    v[f, copies, 0, at] = LARGE * value
                    beta[f, copies, at] = SATURATED * (step - 1) - SHUT
            bos = level.event[len(level.events)]
            coordinates = sorted(n * i + copy for i in set().union(*head.start) for copy in range(n))
            for f, i in enumerate(coordinates):
                k[f, copies, i, bos] = LARGE
                beta[f, copies, bos] = -SHUT
                for column, ones in enumerate(head.start):
                    v[f, copies, column, bos] = LARGE * (i // n in ones)
            first += head.width

    def _write_repeater(self, mixer: DeltaProduct, known: Section, before: Section) -> None:
        """Write what is known at every token, and read what was written for the token before."""
        H, K, inner = mixer.config.heads, self.head_dim, mixer.config.heads * self.head_dim
        assert mixer.conv is not None
        mixer.conv.weight[1, :inner] = 1  # queries: this token
        mixer.conv.weight[0, inner:] = 1  # keys and values: the token before
        mixer.beta_proj.weight.view(mixer.config.factors, H, -1)[1:, :, 0] = SHUT
        mixer.norm.weight.fill_(2 * K**-0.5)
        for h in range(H):
            mixer.q_proj.weight[h * K, 0] = mixer.k_proj.weight[h * K, 0] = LARGE
        for c in range(known.size):
            mixer.v_proj.weight[c, known[c]] = LARGE
            mixer.o_proj.weight[before[c], c] = 1

    def _write_ends(self, model: Model, known: Section) -> None:
        """Write the embedding (the letter, and what it alone tells) and the head (what the automaton says)."""
        compiled, classes = self.compiled, self.compiled.classes.tolist()
        model.embed.weight[:, 0] = CONSTANT
        for token, x in enumerate([*classes, self.letters]):
            entry = model.embed.weight[token]
            entry[self.letter[x]] = 1
            if compiled.window_stage is not None:
                table = compiled.window_stage.decoder[0]
                entry[self.seen[int(table[0, x + 1]) if x < self.letters else compiled.window_stage.start]] = 1
            elif self.levels:
                first = self.levels[0]
                key = tuple(head.letters[0][x] for head in first.stage.heads) if x < self.letters else ()
                event = first.events.get(key, None) if x < self.letters else len(first.events)
                if event is not None:
                    entry[first.event[event]] = 1
        self._write_norm(model.norm)
        emits = compiled.automaton.emits
        model.head.weight[int(emits[compiled.states_table[-1]]), 0] = CONFIDENT / 2  # where nothing is known: dead
        for c, q in enumerate(compiled.states_table[:-1].tolist()):
            model.head.weight[int(emits[q]), known[c]] = CONFIDENT


def opposite_preimages() -> tuple[float, float]:
    """Return float32 numbers whose SiLU is p and -p to the last bit, for some power of two p."""
    for exponent in range(2, 24):
        pair = [_preimage(sign * 2.0**-exponent) for sign in (1, -1)]
        if pair[0] is not None and pair[1] is not None:
            return pair[0], pair[1]
    raise UsageError("torch's SiLU reaches no power of two exactly on this machine")


def opposite_bfloat16_preimages() -> tuple[float, float]:
    """Return bfloat16 numbers whose SiLU rounds to p and -p in bfloat16, as far from a tie as any."""
    z = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = z[torch.isfinite(z) & (z > 0.25) & (z < 1.2)].double()
    found: dict[float, dict[int, tuple[float, float]]] = {}
    for sign in (1, -1):
        exact = F.silu(sign * z)
        rounded = exact.bfloat16().double()
        for x, p, off in zip(
            z.tolist(), (sign * rounded).tolist(), ((exact - rounded) / rounded).abs().tolist(), strict=True
        ):
            best = found.setdefault(p, {})
            best[sign] = min(best.get(sign, (1.0, 0.0)), (off, sign * x))
    _, plus, minus = min((max(b[1][0], b[-1][0]), b[1][1], b[-1][1]) for b in found.values() if len(b) == 2)
    return plus, minus


def _preimage(target: float) -> float | None:
    """Return a number whose SiLU is the target, however many of them are computed at once; None if there is none."""
    low, high = (0.0, 2.0) if target > 0 else (-1.0, 0.0)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / (1 + math.exp(-middle)) < target else (low, middle)
    near = [np.float32(low)]
    for _ in range(16):
        near = [np.nextafter(near[0], np.float32(-np.inf)), *near, np.nextafter(near[-1], np.float32(np.inf))]
    exact = [float(z) for z in near if all((F.silu(torch.full((n,), float(z))) == target).all() for n in (1, 7, 64))]
    return exact[len(exact) // 2] if exact else None
