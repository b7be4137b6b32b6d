"""The command line: `statetrack VERB ...`. Every verb is one function; its heavy imports are its own."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import statetrack
from statetrack.errors import UsageError

MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deltanet": ("deltaproduct", {"factors": 1}),
    "gated-deltanet": ("deltaproduct", {"factors": 1, "gate": True}),
    "deltaproduct": ("deltaproduct", {"factors": 2}),
    "gated-deltaproduct": ("deltaproduct", {"factors": 2, "gate": True}),
    "mamba": ("mamba", {}),
    "attention": ("attention", {}),
    "lstm": ("lstm", {}),
}
"""What --mixer accepts: the mixer's configuration and the options that the name stands for."""

Paths = tyro.conf.Positional[tuple[Path, ...]]


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """statetrack train parity --mixer deltanet --eigenvalues -1 1 --steps 500

    Train a model on a task; weights, metrics and curves go to a run directory. Ctrl-C stops without loss.
    """

    task: tyro.conf.Positional[str]
    """task, e.g. parity, modular_arithmetic, S5_swaps, group:D7, automaton:FILE (statetrack tasks lists them)"""
    mixer: Literal["deltanet", "gated-deltanet", "deltaproduct", "gated-deltaproduct", "mamba", "attention", "lstm"] = (
        "deltanet"
    )
    """token mixer of every layer"""
    eigenvalues: tuple[float, float] | None = None
    """range of the transition's data-dependent eigenvalues; default -1 1"""
    dim: int = 128
    """width of the hidden stream"""
    layers: int = 1
    heads: int | None = None
    """heads; default 4"""
    head_dim: int | None = None
    """width of a head; default dim / heads"""
    factors: int | None = None
    """Householder factors per token; default 1 for the deltanets, 2 for the deltaproducts"""
    conv: int | None = None
    """window of the short convolution, 0 for none; default 4"""
    state_size: int | None = None
    """Mamba's states per channel; default 16"""
    mlp_dim: int | None = None
    """hidden width of the SwiGLU, 0 for none; default 8/3 of dim rounded up to 256"""
    train_length: tuple[int, int] = (3, 40)
    """shortest and longest training sequence"""
    steps: int = 2000
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    """largest gradient norm, 0 for no clipping"""
    seed: int = 0
    device: str = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    out: Path | None = None
    """run directory; default runs/TASK_MIXER_[LO,HI]_LAYERSl_sSEED"""
    resume: bool = False
    """go on with the run that is there"""
    force: bool = False
    """delete the run that is there"""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """statetrack evaluate runs/RUN --lengths 40..256 1000 1000000

    Measure accuracy at given lengths, streaming in constant memory; adds to evaluation.json in the run directory.
    """

    runs: Paths
    """run directories"""
    lengths: tuple[str, ...] = ("40", "64", "128", "256", "40..256")
    """lengths; 40..256 draws each sequence's length from that range"""
    sequences: int | None = None
    """sequences per length; default 1024, fewer for lengths above 16384, 8192 for ranges"""
    batch_size: int = 256
    seed: int = 1_000_003
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """statetrack plot runs/A runs/B --out figure.png

    Draw accuracy against length from runs that were evaluated; runs that differ only in their seed share a line.
    """

    runs: Paths
    """run directories"""
    out: Path = Path("runs/accuracy.png")
    """picture; a PNG and an SVG are written"""


@dataclass(frozen=True, kw_only=True)
class ReproduceArguments:
    """statetrack reproduce p1-chomsky --quick

    Run the cells of a paper's table and print our numbers beside the paper's. Cells resume; finished ones are kept.
    """

    table: tyro.conf.Positional[Literal["p1-chomsky", "p1-s5", "p2-groups"]]
    """p1: arXiv 2411.12537 (Table 3, Figure 4); p2: arXiv 2502.10297 (Figure 5)"""
    cells: tuple[str, ...] = ()
    """names, or parts of names, of the cells to run; default all"""
    seeds: tuple[int, ...] = (0, 1, 2)
    quick: bool = False
    """a small setting of ours, minutes instead of hours; the table says so"""
    list: bool = False
    """print the cells and their cost, run nothing"""
    device: str = "auto"
    out: Path = Path("runs/reproduce")


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """statetrack demo

    Train DeltaNet and Mamba on parity with eigenvalues in [0, 1] and in [-1, 1], about a minute on two cores.
    """

    seed: int = 0
    workers: int = 2
    """models trained at once, one core each"""
    out: Path = Path("runs/demo")
    """replaced if an earlier demo left it"""


@dataclass(frozen=True, kw_only=True)
class TasksArguments:
    """statetrack tasks

    List the tasks.
    """


Arguments = (
    Annotated[TrainArguments, tyro.conf.subcommand("train")]
    | Annotated[EvaluateArguments, tyro.conf.subcommand("evaluate")]
    | Annotated[PlotArguments, tyro.conf.subcommand("plot")]
    | Annotated[ReproduceArguments, tyro.conf.subcommand("reproduce")]
    | Annotated[DemoArguments, tyro.conf.subcommand("demo")]
    | Annotated[TasksArguments, tyro.conf.subcommand("tasks")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; exit with 2 for a user's mistake, 130 or 143 after SIGINT or SIGTERM."""
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["--version"], ["-V"]):
        print(f"statetrack {statetrack.__version__}")
        return
    parsed = tyro.cli(
        Arguments,  # pyright: ignore[reportArgumentType]
        prog="statetrack",
        description="Linear RNNs that track state.  Start with:  statetrack demo",
        args=words or ["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    verbs = {
        TrainArguments: "train",
        EvaluateArguments: "evaluate",
        PlotArguments: "plot",
        ReproduceArguments: "reproduce",
        DemoArguments: "demo",
        TasksArguments: "tasks",
    }
    try:
        from statetrack import verbs as implementation

        getattr(implementation, verbs[type(parsed)])(parsed)
    except UsageError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        signum = getattr(error, "signum", None)
        if signum is None:
            raise
        _fail(str(error), 128 + signum)


def _fail(message: str, code: int) -> None:
    print(f"statetrack: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
