"""Tokenised text on disk: written once, read by every run, the same bytes on every machine.

DIR/data.json                 what it was made from, the tokenizer's digest, the shards, how far it is
DIR/tokenizer/                the tokenizer
DIR/train-00000.tokens.npy    one document after the other, uint16 or uint32
DIR/train-00000.ends.npy      where each ends
DIR/validation-...            the same, of the documents that are not trained on
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from statetrack.errors import UsageError
from statetrack.lm.sources import documents
from statetrack.lm.tokenizers import digest, encode, load_tokenizer, train_tokenizer
from statetrack.progress import Bars
from statetrack.runs import LOCK, read_json, why_not_written, write_atomically, write_json

STATE, SPLITS = "data.json", ("train", "validation")
OURS = re.compile(r"(train|validation)-\d{5,}\.(tokens|ends)\.npy|\..*\.tmp")
BATCH = 64  # documents tokenised at once

Report = Callable[[int, int], None]  # (training tokens, documents)


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a corpus is made from."""

    source: str = "stdlib"
    """stdlib, python, a file, a folder, or a hub name with :CONFIG (`statetrack.lm.sources`)"""
    tokenizer: str = "bpe:4096"
    """hub name, folder, or bpe:SIZE for a byte-level BPE trained on the source"""
    field: str = "text"
    """column of the text in tables and data sets"""
    split: str = "train"
    """split of a data set of the hub"""
    tokens: int | None = None
    """stop after that many training tokens; default all"""
    validation: float = 0.02
    """share of the documents, chosen by their text, that are not trained on"""
    shard_tokens: int = 1 << 26
    """training tokens per file; what an interrupted run loses at most"""

    def check(self) -> None:
        """Raise UsageError for what can never work."""
        if not 0 <= self.validation < 1:
            raise UsageError(f"validation must be a share, at least 0 and below 1, got {self.validation}")
        if self.shard_tokens < 1 or (self.tokens is not None and self.tokens < 1):
            raise UsageError(f"tokens and shard_tokens must be at least 1, got {self.tokens} and {self.shard_tokens}")
        if self.tokenizer.startswith("bpe:") and not self.tokenizer[4:].isdigit():
            raise UsageError(f"tokenizer must be a name, a folder or bpe:SIZE, got {self.tokenizer!r}")


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    tokens: np.ndarray
    """of its documents, one after the other"""
    ends: np.ndarray
    """of its documents, rising, the last one len(tokens)"""


class Corpus:
    """A prepared directory, read from disk as needed. Raises UsageError where it is missing, unfinished or broken."""

    def __init__(self, path: Path):
        if not (path / STATE).exists():
            raise UsageError(f"{path} holds no prepared data; first: statetrack lm prepare SOURCE --out {path}")
        self.path, self.state = path, _read_state(path)
        if not self.state["finished"]:
            raise UsageError(f"{path} is prepared in part only; run its statetrack lm prepare again to go on")
        self.digest: str = self.state["digest"]
        self.vocab_size: int = self.state["vocab_size"]

    def tokenizer(self) -> Any:
        """Return the tokenizer; raise UsageError if it is not the one that made the tokens."""
        tokenizer = load_tokenizer(self.path / "tokenizer")
        if digest(tokenizer) != self.digest:
            raise UsageError(f"{self.path}/tokenizer was changed after the data was made; prepare the data again")
        return tokenizer

    def shards(self, split: str) -> list[Shard]:
        """Return the files of a split, mapped into memory."""
        shards = []
        for i, expected in enumerate(self.state["shards"][split]):
            names = [self.path / f"{split}-{i:05d}.{kind}.npy" for kind in ("tokens", "ends")]
            try:
                tokens, ends = (np.load(name, mmap_mode="r") for name in names)
            except (OSError, EOFError, ValueError) as error:
                raise UsageError(f"{names[0]} cannot be read ({error}); prepare the data again with --force") from None
            if [len(tokens), len(ends)] != [expected["tokens"], expected["documents"]]:
                raise UsageError(f"{names[0]} is not what {STATE} says; prepare the data again with --force")
            shards.append(Shard(tokens, ends))
        return shards

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split."""
        return sum(shard["tokens"] for shard in self.state["shards"][split])

    def documents(self, split: str) -> int:
        """Return the number of documents of a split."""
        return sum(shard["documents"] for shard in self.state["shards"][split])


def prepare(data: Data, path: Path, *, force: bool = False, report: Report | None = None) -> Corpus:
    """Tokenise a source into `path` and return the corpus; an interrupted one goes on after its last whole file.

    Empty documents are left out. Raises UsageError for a directory made from other data (without force), held by
    another process, or with files that are not ours; and for a source without text.
    """
    data.check()
    with held(path):
        state = _begun(data, path, force)
        if not state["finished"]:
            writer = _Writer(data, path, state)
            for text_number, tokens, held_out in _tokenised(data, writer.tokenizer, state["read"]):
                writer.add(text_number, tokens, held_out)
                if report is not None and text_number % BATCH == 0:
                    report(writer.trained, text_number)
                if data.tokens is not None and writer.trained >= data.tokens:
                    break
            writer.finish()
            if report is not None:
                report(writer.trained, state["read"])
    return Corpus(path)


def prepare_shown(data: Data, path: Path, *, force: bool = False) -> Corpus:
    """`prepare`, with a bar."""
    total = None if data.tokens is None else data.tokens / 1e6
    with Bars() as bars:

        def report(tokens: int, documents: int) -> None:
            bars.update("prepare", tokens / 1e6, total, f"million tokens, {documents} documents")

        bars.update("prepare", 0, total, "million tokens; the tokenizer first")
        return prepare(data, path, force=force, report=report)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Make a directory and hold it for this process; raise UsageError where another has it.

    What fails before anything is written leaves no directory.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{path} is in use by another process; wait for it or choose another") from None
        try:
            yield
        finally:
            if made and [entry.name for entry in path.iterdir()] == [LOCK]:
                (path / LOCK).unlink()
                path.rmdir()


def _begun(data: Data, path: Path, force: bool) -> dict[str, Any]:
    """Return the state to go on from; begin anew where there is none, or with force."""
    if (path / STATE).exists() and not force:
        state = _read_state(path)
        if state["data"] != asdict(data):
            differing = [k for k, v in asdict(data).items() if state["data"].get(k) != v]
            shown = "; ".join(f"{k}: {state['data'].get(k)!r} there, {getattr(data, k)!r} now" for k in differing)
            raise UsageError(f"{path} was made from other data ({shown}); choose another --out or --force")
        return state
    others = [entry.name for entry in path.iterdir() if not _is_ours(entry)]
    if others and not (path / STATE).exists():
        raise UsageError(f"{path} is not empty and not prepared data (it has {min(others)}); choose another directory")
    (path / STATE).unlink(missing_ok=True)
    for entry in path.iterdir():
        if OURS.fullmatch(entry.name):
            entry.unlink()
    if data.tokenizer.startswith("bpe:"):
        texts = (text for text in documents(data.source, field=data.field, split=data.split) if text.strip())
        tokenizer = train_tokenizer(texts, int(data.tokenizer[4:]))
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    try:
        tokenizer.save_pretrained(str(path / "tokenizer"))
    except Exception as error:  # the tokenizers library has no type for a full disk
        raise UsageError(f"{path}/tokenizer cannot be written: {why_not_written(error, path)}") from None
    tokenizer = load_tokenizer(path / "tokenizer")
    state = {"data": asdict(data), "digest": digest(tokenizer), "vocab_size": len(tokenizer), "read": 0}
    state |= {"finished": False, "shards": {split: [] for split in SPLITS}}
    write_json(path / STATE, state)
    return state


def _is_ours(entry: Path) -> bool:
    return entry.name in (STATE, LOCK, "tokenizer") or OURS.fullmatch(entry.name) is not None


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path / STATE)
    if (
        not isinstance(state, dict)
        or not {"data", "digest", "vocab_size", "read", "finished", "shards"} <= state.keys()
    ):
        raise UsageError(f"{path / STATE} is not that of prepared data")
    return state


def _tokenised(data: Data, tokenizer: Any, skip: int) -> Iterator[tuple[int, list[int], bool]]:
    """Yield the number of every document that is not empty, counted from 1, its tokens, and whether it is held out."""
    texts = enumerate(documents(data.source, field=data.field, split=data.split, skip=skip), skip + 1)
    filled = ((number, text) for number, text in texts if text.strip())
    while batch := list(islice(filled, BATCH)):
        for (number, text), tokens in zip(batch, encode(tokenizer, [text for _, text in batch]), strict=True):
            share = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            yield number, tokens, int.from_bytes(share) < data.validation * 2**64


class _Writer:
    """Collects documents and writes them out, one file per split at a time, with the state after it."""

    def __init__(self, data: Data, path: Path, state: dict[str, Any]):
        self.data, self.path, self.state = data, path, state
        self.tokenizer = load_tokenizer(path / "tokenizer")
        if digest(self.tokenizer) != state["digest"]:
            raise UsageError(f"{path}/tokenizer was changed while the data was made; begin again with --force")
        self.dtype = np.uint16 if state["vocab_size"] <= 1 << 16 else np.uint32
        self.trained = sum(shard["tokens"] for shard in state["shards"]["train"])
        self.read = state["read"]
        self._clear()

    def add(self, number: int, tokens: list[int], held_out: bool) -> None:
        """Take the document with this number in the source; write a file when there is enough for one."""
        split = "validation" if held_out else "train"
        self.waiting[split].append(np.asarray(tokens, dtype=self.dtype))
        self.read = number
        if not held_out:
            self.trained += len(tokens)
            self.collected += len(tokens)
            if self.collected >= self.data.shard_tokens:
                self._write()

    def finish(self) -> None:
        """Write what is left."""
        self._write()
        if not self.state["shards"]["train"]:
            raise UsageError(f"source {self.data.source!r} has no text to train on")
        self.state["finished"] = True
        write_json(self.path / STATE, self.state)

    def _write(self) -> None:
        for split, texts in self.waiting.items():
            if texts:
                shards = self.state["shards"][split]
                tokens, ends = np.concatenate(texts), np.cumsum([len(t) for t in texts])
                stem = self.path / f"{split}-{len(shards):05d}"
                _save(Path(f"{stem}.tokens.npy"), tokens)
                _save(Path(f"{stem}.ends.npy"), ends)
                shards.append({"tokens": len(tokens), "documents": len(texts)})
        self.state["read"] = self.read
        write_json(self.path / STATE, self.state)
        self._clear()

    def _clear(self) -> None:
        self.waiting: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.collected = 0


def _save(path: Path, array: np.ndarray) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array)

    write_atomically(path, write)
