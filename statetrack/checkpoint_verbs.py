"""Verbs about language models' checkpoints: their arguments, and what they do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from statetrack.errors import require

Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR|HUB_NAME")]


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """statetrack convert fla-hub/delta_net-1.3B-100B --to statetrack --out delta_net

    Convert a checkpoint: DeltaNet, Gated DeltaNet and Gated DeltaProduct of flash-linear-attention, olmo_hybrid of
    transformers, and ours, each to each. Runs of `statetrack train` and compiled automata become ours.
    """

    source: Source
    """directory with a checkpoint, or its name on the hub"""
    to: Literal["statetrack", "delta_net", "gated_deltanet", "gated_deltaproduct", "olmo_hybrid"]
    """format to write"""
    out: Path
    """directory to write"""
    force: bool = False
    """replace the checkpoint that is there"""


@dataclass(frozen=True, kw_only=True)
class UnlockArguments:
    """statetrack unlock fla-hub/delta_net-1.3B-100B --out unlocked

    Open the range of the eigenvalues from [0, 1] to [-1, 1]: the same function at first, ready for further training,
    in which every head learns how far below 0 its eigenvalues go. Reads what `statetrack convert` reads.
    """

    source: Source
    """directory with a checkpoint, or its name on the hub"""
    out: Path
    """directory to write, in our format"""
    force: bool = False
    """replace the checkpoint that is there"""


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """statetrack inspect fla-hub/delta_net-1.3B-100B --text book.txt

    Show the eigenvalues that a model really uses on a text: per layer and head their distribution, the share of tokens
    with a negative one, products over windows, the distance to rotations and reflections of finite order, a verdict.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CKPT|RUN")]
    """checkpoint, name on the hub, run of statetrack train, or compiled automaton"""
    text: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """text for a language model; default the source of Python's argparse; runs draw from their task"""
    tokens: int = 2048
    """tokens to read, at most"""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="DIR|HUB_NAME", help_behavior_hint="")] = None
    """default the checkpoint's own"""
    out: Path = Path("spectra")
    """name of the files: OUT.json, OUT.png, OUT.svg"""
    every: bool = False
    """print every head, not only every layer"""


def convert(a: ConvertArguments) -> None:
    """Convert a checkpoint."""
    require("transformers", "hf")
    from statetrack.convert import convert as run

    run(a.source, a.to, a.out, a.force)
    print(f"wrote {a.out}; in Python: {_opening(a.to)}.from_pretrained({str(a.out)!r})")


def unlock(a: UnlockArguments) -> None:
    """Unlock a checkpoint."""
    require("transformers", "hf")
    from statetrack.unlock import unlock as run

    layers = run(a.source, a.out, a.force)
    print(
        f"wrote {a.out}; {layers} layers learn the lower end of their range; in Python: {_opening('statetrack')}"
        f".from_pretrained({str(a.out)!r})"
    )


def inspect(a: InspectArguments) -> None:
    """Print what the heads do, and draw it."""
    from rich.console import Console
    from rich.table import Table

    from statetrack.inspection import inspect as run
    from statetrack.spectra import by_layer, summary

    found = run(a.source, a.out, text=a.text, tokens=a.tokens, tokenizer=a.tokenizer)
    columns = "layer", "head", "mixer", "lowest", "median", "negative", "turning", "distance", "verdict"
    table = Table(*(columns if a.every else (c for c in columns if c != "head")), box=None)
    for row in found if a.every else by_layer(found):
        numbers = (f"{row.lowest:.2f}", f"{row.median:.2f}", f"{row.negative:.0%}", f"{row.turning:.0%}")
        place = (str(row.layer), *((str(row.head),) if a.every else ()), row.mixer)
        said = row.verdict.partition(":")[0] if a.every else row.verdict
        table.add_row(*place, *numbers, f"{row.distance:.2f}", said)
    console = Console(markup=False)
    console.print(table)
    console.print(f"{summary(found)}; wrote {a.out}.json, .png, .svg", soft_wrap=True, highlight=False)


def _opening(to: str) -> str:
    if to == "statetrack":
        return "from statetrack.hf import StateTrackForCausalLM; StateTrackForCausalLM"
    library = "" if to == "olmo_hybrid" else "import fla; "
    return f"{library}from transformers import AutoModelForCausalLM; AutoModelForCausalLM"
