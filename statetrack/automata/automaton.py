"""A deterministic automaton as data: an integer table, and the few operations that everything else needs.

Legend: Q states, L letters, B batch, T tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int, Integer
from torch import Tensor

from statetrack.automata.groups import Group, as_group, element_indices
from statetrack.automata.letters import default_names, encode_bytes, encode_names, letter_names
from statetrack.automata.minimisation import equivalent_states, explore
from statetrack.errors import UsageError

if TYPE_CHECKING:
    from sympy.combinatorics import PermutationGroup

SMALL_BATCH = 16  # below it a plain Python loop per word beats numpy's per-call cost per token


@dataclass(frozen=True, eq=False)
class Automaton:
    """q_t = table[q_{t-1}, x_t] from q_0 = start; it says 1 in the accepting states, or output[q_t] (a Moore machine).

    Give exactly one of `accepting` (a set of states) and `output` (one integer >= 0 per state). Two automata are equal
    if their tables are, state by state; after `minimise`, equal means equivalent.
    """

    table: Int[np.ndarray, "Q L"]
    start: int = 0
    accepting: frozenset[int] | None = None
    output: Int[np.ndarray, "Q"] | None = None
    letters: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check everything once, and freeze the arrays."""
        table = _integers("table", self.table, ndim=2)
        states, letters = table.shape
        if states == 0 or letters == 0:
            raise UsageError(f"table needs at least one state and one letter, got {states} states, {letters} letters")
        if table.min() < 0 or table.max() >= states:
            row, column = np.argwhere((table < 0) | (table >= states))[0].tolist()
            raise UsageError(
                f"table[{row}][{column}] = {table[row, column]} is no state; accepted: 0..{states - 1} ({states} rows)"
            )
        self._set(table=table, start=_state("start", self.start, states))
        if (self.accepting is None) == (self.output is None):
            raise UsageError("give exactly one of accepting (a set of states) and output (one integer per state)")
        if self.accepting is not None:
            self._set(accepting=frozenset(_state("accepting", q, states) for q in self.accepting))
        if self.output is not None:
            output = _integers("output", self.output, ndim=1)
            if len(output) != states or output.min() < 0:
                raise UsageError(f"output needs one integer >= 0 for each of {states} states, got {output.tolist()}")
            self._set(output=output)
        if self.letters is not None:
            self._set(letters=letter_names(self.letters, letters))

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for everyone else

    def __eq__(self, other: object) -> bool:
        """Compare tables, start, outputs and letter names."""
        if not isinstance(other, Automaton):
            return NotImplemented
        same = self.start == other.start and self.accepting == other.accepting and self.letters == other.letters
        return same and np.array_equal(self.table, other.table) and np.array_equal(self.emits, other.emits)

    def __hash__(self) -> int:
        """Agree with __eq__."""
        return hash((self.table.shape, self.table.tobytes(), self.start, self.emits.tobytes()))

    @property
    def states(self) -> int:
        """The number of states."""
        return self.table.shape[0]

    @property
    def alphabet(self) -> int:
        """The number of letters."""
        return self.table.shape[1]

    @property
    def emits(self) -> Int[np.ndarray, "Q"]:
        """What each state says: `output`, or 1 in the accepting states and 0 elsewhere."""
        if self.output is not None:
            return self.output
        marks = np.zeros(self.states, dtype=np.int64)
        marks[sorted(self.accepting or ())] = 1
        return marks

    @property
    def num_outputs(self) -> int:
        """One more than the largest output."""
        return 2 if self.output is None else int(self.output.max()) + 1

    @property
    def names(self) -> tuple[str, ...]:
        """What the letters are called in print: `letters`, or bytes or numbers where they have no names."""
        return default_names(self.alphabet) if self.letters is None else self.letters

    # --- running -----------------------------------------------------------------------------------------------------

    def run(
        self,
        words: Integer[np.ndarray, "B T"] | Integer[Tensor, "B T"],
        state: Integer[np.ndarray, "B"] | Integer[Tensor, "B"] | int | None = None,
    ) -> Int[np.ndarray, "B T"]:
        """Return the state after every token, from `state` (default: start); pass the last column on to continue."""
        x = _array(words)
        if x.ndim != 2 or x.dtype.kind not in "iu":
            raise UsageError(f"words must be integers of shape [B, T], got {x.dtype} of shape {list(x.shape)}")
        if x.size and (x.min() < 0 or x.max() >= self.alphabet):
            raise UsageError(f"words must hold letters 0..{self.alphabet - 1}, got {x.min()}..{x.max()}")
        first = np.broadcast_to(_array(self.start if state is None else state), x.shape[:1])
        if first.dtype.kind not in "iu" or (first.size and (first.min() < 0 or first.max() >= self.states)):
            raise UsageError(f"state must hold states 0..{self.states - 1}, got {state!r}")
        # A state q is carried as q * L, so that one addition and one look-up are a step.
        jump, code = (self.table * self.alphabet).ravel(), first.astype(np.int64) * self.alphabet
        return (_run_narrow if len(x) < SMALL_BATCH else _run_wide)(jump, x, code) // self.alphabet

    def outputs(
        self,
        words: Integer[np.ndarray, "B T"] | Integer[Tensor, "B T"],
        state: Integer[np.ndarray, "B"] | Integer[Tensor, "B"] | int | None = None,
    ) -> Int[np.ndarray, "B T"]:
        """Return what the automaton says after every token: 0 or 1 for an accepting set, else the output map."""
        return self.emits[self.run(words, state)]

    def encode(self, text: str | bytes | Sequence[str]) -> Int[np.ndarray, "T"]:
        """Return the letters of a text; raise UsageError, with the position, at what is no letter.

        256 letters without names are bytes (text is UTF-8); else a letter is a character, or an item of a sequence.
        """
        if self.letters is None and self.alphabet == 256:
            return encode_bytes(text)
        return encode_names(text, self.names)

    def accepts(self, texts: Iterable[str | bytes | Sequence[str] | Integer[np.ndarray, "T"]]) -> Bool[np.ndarray, "B"]:
        """Whether each text, of any length, ends in an accepting state; letters may be given as an integer array."""
        if self.accepting is None:
            raise UsageError("accepts needs an accepting set; this automaton has outputs: ask outputs(words)")
        words = [text if isinstance(text, np.ndarray) else self.encode(text) for text in texts]
        last = [int(self.run(word[None])[0, -1]) if len(word) else self.start for word in words]
        return np.array([state in self.accepting for state in last], dtype=bool)

    # --- building ----------------------------------------------------------------------------------------------------

    def with_idle_letters(self, *names: str) -> Automaton:
        """Append letters that change nothing, such as padding or a beginning-of-sequence mark."""
        idle = np.repeat(np.arange(self.states)[:, None], len(names), axis=1)
        letters = None if self.letters is None else (*self.letters, *names)
        return Automaton(np.concatenate([self.table, idle], axis=1), self.start, self.accepting, self.output, letters)

    def merge_letters(self) -> tuple[Automaton, Int[np.ndarray, "L"]]:
        """Return the automaton over classes of letters that act alike, and every letter's class.

        A class is named after its first letter; classes are in the order of these.
        """
        _, first, label = np.unique(self.table, axis=1, return_index=True, return_inverse=True)
        order = np.argsort(first)
        names = tuple(self.names[letter] for letter in first[order])
        merged = Automaton(self.table[:, first[order]], self.start, self.accepting, self.output, names)
        return merged, np.argsort(order)[label.ravel()]

    def product(self, other: Automaton, combine: str = "pair") -> Automaton:
        """Run both on the same word; only pairs of states that some word reaches are kept, in breadth-first order.

        combine: "and", "or", "xor" of two accepting sets, or "pair": output = mine * other.num_outputs + theirs.
        """
        if self.alphabet != other.alphabet or self.letters != other.letters:
            raise UsageError(f"product needs one alphabet, got {_alphabet(self)} and {_alphabet(other)}")
        logic = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
        if combine != "pair" and combine not in logic:
            raise UsageError(f"combine={combine!r} is unknown; accepted: pair, {', '.join(logic)}")
        if combine != "pair" and (self.accepting is None or other.accepting is None):
            raise UsageError(f"combine={combine!r} needs two automata with accepting sets; use combine='pair'")

        def step(pairs: np.ndarray) -> np.ndarray:
            mine, theirs = np.divmod(pairs, other.states)
            return self.table[mine] * other.states + other.table[theirs]

        pairs, table = explore(self.start * other.states + other.start, step)
        mine, theirs = self.emits[pairs // other.states], other.emits[pairs % other.states]
        if combine == "pair":
            return Automaton(table, 0, output=mine * other.num_outputs + theirs, letters=self.letters)
        accepting = np.flatnonzero(logic[combine](mine, theirs)).tolist()
        return Automaton(table, 0, accepting=frozenset(accepting), letters=self.letters)

    def minimise(self) -> Automaton:
        """Return the smallest automaton that says the same on every word, its states in breadth-first order.

        See minimisation.py; letters that act alike are looked at once.
        """
        merged, class_of = self.merge_letters()
        reached, table = explore(self.start, lambda states: merged.table[states])
        emits = self.emits[reached]
        classes, label = equivalent_states(table, emits)
        member = np.zeros(classes, dtype=np.int64)
        member[label] = np.arange(len(label))  # any member stands for its class
        order, quotient = explore(int(label[0]), lambda c: label[table[member[c]]])
        quotient = quotient[:, class_of]
        says = emits[member[order]]
        if self.output is not None:
            return Automaton(quotient, 0, output=says, letters=self.letters)
        return Automaton(quotient, 0, accepting=frozenset(np.flatnonzero(says).tolist()), letters=self.letters)

    def equivalent(self, other: Automaton) -> bool:
        """Whether both say the same after every word (the empty one included)."""
        return self.minimise() == other.minimise()

    @classmethod
    def from_group(cls, group: str | Group | PermutationGroup, letters: Sequence[int] | None = None) -> Automaton:
        """The word problem of a group: after x_1 ... x_t the state, and the output, is the product applied in order.

        group: a name ("S5", "Z2 x S3", ...), a Group or a sympy PermutationGroup. letters: the elements that may be
        read (indices; all by default). State 0 is the identity.
        """
        group = as_group(group)
        table = group.table[:, element_indices(group, letters)]
        return cls(table, 0, output=np.arange(group.order))

    # --- files -------------------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path) -> None:
        """Write {"table": [[...]], "start": 0, "accepting" or "output": [...], "letters": [...]}."""
        content: dict[str, Any] = {"table": self.table.tolist(), "start": self.start}
        if self.output is not None:
            content["output"] = self.output.tolist()
        else:
            content["accepting"] = sorted(self.accepting or ())
        if self.letters is not None:
            content["letters"] = list(self.letters)
        Path(path).write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | Path) -> Automaton:
        """Read what `to_json` writes; raise UsageError, naming the file, for anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read the automaton file {str(path)!r}: {error}") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON: {error}") from None
        fields = ("table", "start", "accepting", "output", "letters")
        if not isinstance(content, dict) or "table" not in content or set(content) - set(fields):
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise UsageError(f"{path}: expected an object with 'table' and of {', '.join(fields)}; found {found}")
        try:
            content["table"] = _integers("table", content["table"], ndim=2)
            if content.get("output") is not None:
                content["output"] = _integers("output", content["output"], ndim=1)
            if content.get("accepting") is not None:
                content["accepting"] = frozenset(_integers("accepting", content["accepting"], ndim=1).tolist())
            if content.get("letters") is not None:
                content["letters"] = letter_names(content["letters"], content["table"].shape[1])
            return cls(**content)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def _run_wide(jump: np.ndarray, words: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Step all words together, tokens first in memory."""
    columns = np.ascontiguousarray(words.T, dtype=np.int64)
    codes = np.empty_like(columns)
    for t in range(len(columns)):
        np.add(code, columns[t], out=codes[t])
        code = np.take(jump, codes[t], out=codes[t], mode="clip")  # the letters were checked: clip only skips a copy
    return codes.T


def _run_narrow(jump: np.ndarray, words: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Step one word after the other in plain Python."""
    targets = jump.tolist()
    codes = np.empty(words.shape, dtype=np.int64)
    for b, word in enumerate(words.tolist()):
        codes[b] = list(accumulate(word, lambda q, x: targets[q + x], initial=int(code[b])))[1:]
    return codes


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _integers(name: str, values: Any, ndim: int) -> np.ndarray:
    try:
        array = np.array(_array(values))
    except ValueError:
        array = None  # numpy refuses rows of different lengths
    if array is not None and array.ndim == ndim == 1 and array.size == 0:
        array = array.astype(np.int64)  # numpy takes an empty list for floats
    if array is None or array.ndim != ndim or array.dtype.kind not in "iu":
        shape = "rows of one length, all integers" if ndim == 2 else "a list of integers"
        raise UsageError(f"{name} must be {shape}{_first_fault(values, ndim)}")
    array = array.astype(np.int64)
    array.setflags(write=False)
    return array


def _first_fault(values: Any, ndim: int) -> str:
    """Say which row of a table given as lists is the odd one out."""
    if ndim != 2 or not isinstance(values, list | tuple) or not all(isinstance(row, list | tuple) for row in values):
        return f", got {values!r:.80}"
    for i, row in enumerate(values):
        if len(row) != len(values[0]):
            return f"; row {i} has {len(row)} entries, row 0 has {len(values[0])}"
        if None in row:
            return f"; state {i} has no transition on letter {row.index(None)} (to reject, go to a state for it)"
        if not all(isinstance(q, int | np.integer) and not isinstance(q, bool) for q in row):
            return f"; row {i} is {row!r:.80}"
    return f", got {values!r:.80}"


def _state(name: str, value: Any, states: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 0 <= value < states:
        raise UsageError(f"{name} holds {value!r}, which is no state; accepted: 0..{states - 1}")
    return int(value)


def _alphabet(automaton: Automaton) -> str:
    return f"{automaton.alphabet} letters" if automaton.letters is None else f"letters {', '.join(automaton.letters)}"
