"""Where text comes from. A source is one string, and its documents always come in the same order.

stdlib             the Python standard library's sources and documentation, which every machine has
python             the same and those of every installed package
FILE or FOLDER     text (a document per file), .jsonl or .json (a document per line or entry), .parquet
NAME[:CONFIG]      a data set of the Hugging Face hub, streamed, e.g. HuggingFaceFW/fineweb:sample-10BT
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from statetrack.errors import UsageError
from statetrack.runs import first_line

BUILTIN = ("stdlib", "python")
TEXT = (".py", ".pyi", ".rst", ".md", ".txt")
TABLES = (".parquet", ".jsonl", ".json")
HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


def documents(source: str, *, field: str = "text", split: str = "train", skip: int = 0) -> Iterator[str]:
    """Yield the documents of a source after the first `skip`; `field` and `split` are those of tables and data sets.

    Local text files come in an order that is mixed once and for all, without exact copies; files that are not UTF-8
    are left out. Raises UsageError for a source that does not exist, has no such field or cannot be read.
    """
    path = Path(source)
    if source in BUILTIN:
        yield from islice(_texts(_python_files(source)), skip, None)
    elif path.is_dir():
        tables = sorted(p for p in path.rglob("*") if p.suffix in TABLES and p.is_file())
        found = _tables(tables, field) if tables else _texts(sorted(p for p in path.rglob("*") if p.is_file()))
        yield from islice(found, skip, None)
    elif path.is_file():
        found = _tables([path], field) if path.suffix in TABLES else _texts([path])
        yield from islice(found, skip, None)
    elif HUB.fullmatch(source) and path.suffix not in (*TEXT, *TABLES):
        yield from _hub(source, field, split, skip)
    else:
        raise UsageError(
            f"source {source!r} does not exist; accepted: {', '.join(BUILTIN)}, a file, a folder, a hub name"
        )


def _python_files(source: str) -> list[Path]:
    """Return the text files of the standard library and, for "python", of every installed package."""
    names = ("stdlib", "platstdlib", "purelib", "platlib") if source == "python" else ("stdlib",)
    found: set[Path] = set()
    for root in {Path(sysconfig.get_paths()[name]) for name in names}:
        for path in root.rglob("*"):
            installed = "site-packages" in path.relative_to(root).parts
            if path.suffix in TEXT and path.is_file() and not (installed and source == "stdlib"):
                found.add(path)
    return sorted(found)


def _texts(paths: list[Path]) -> Iterator[str]:
    """Yield the texts of files in a fixed random order, copies left out."""
    seen: set[bytes] = set()
    for path in random.Random(0).sample(paths, len(paths)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield text


def _tables(paths: list[Path], field: str) -> Iterator[str]:
    for path in paths:
        for row in _parquet(path) if path.suffix == ".parquet" else _json(path):
            yield _field(row, field, str(path))


def _json(path: Path) -> Iterator[Any]:
    """Yield the lines of a .jsonl, or the entries of a .json that is one list."""
    with open(path, encoding="utf-8") as file:
        try:
            if path.suffix == ".json" and file.read(1) == "[":
                file.seek(0)
                yield from json.load(file)
                return
            file.seek(0)
            for line in file:
                if line.strip():
                    yield json.loads(line)
        except ValueError as error:
            accepted = "a list of rows, or a row per line" if path.suffix == ".json" else "a row per line"
            raise UsageError(f"{path} is not JSON with {accepted}: {first_line(error)}") from None


def _parquet(path: Path) -> Iterator[Any]:
    load_dataset = _load_dataset()
    try:
        yield from load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:  # datasets raises whatever pyarrow and fsspec raise
        raise UsageError(f"{path} cannot be read: {first_line(error)}") from None


def _hub(source: str, field: str, split: str, skip: int) -> Iterator[str]:
    load_dataset = _load_dataset()
    name, _, config = source.partition(":")
    try:
        rows = load_dataset(name, config or None, split=split, streaming=True).skip(skip)
        for row in rows:
            yield _field(row, field, source)
    except UsageError:
        raise
    except Exception as error:  # of the network, the hub, a missing split, a broken file
        hint = "the same command goes on when the hub can be reached; a file or folder needs none"
        raise UsageError(f"data set {source!r} cannot be read: {first_line(error)}; {hint}") from None


def _load_dataset() -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise UsageError("this source needs `datasets`: pip install 'statetrack[lm]'") from None
    return load_dataset


def _field(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        names = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UsageError(f"{where} has no text in field {field!r}; it has: {names}")
    return row[field]
