"""The command line: `statetrack VERB ...`. Every verb is one function; its heavy imports are its own."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

import statetrack
from statetrack.checkpoint_verbs import ConvertArguments, InspectArguments, UnlockArguments
from statetrack.cli_types import Device, Execution, RunPaths, Unset
from statetrack.errors import UsageError
from statetrack.evaluation_verbs import EvaluateArguments, ReproduceArguments
from statetrack.lm.arguments import VERBS as LM_VERBS
from statetrack.lm.arguments import LMArguments

MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "deltanet": ("deltaproduct", {"factors": 1}),
    "gated-deltanet": ("deltaproduct", {"factors": 1, "gate": True}),
    "deltaproduct": ("deltaproduct", {"factors": 2}),
    "gated-deltaproduct": ("deltaproduct", {"factors": 2, "gate": True}),
    "kda": ("deltaproduct", {"factors": 1, "gate": "key", "output_gate": True}),
    "mamba": ("mamba", {}),
    "mamba2": ("mamba2", {}),
    "gla": ("gla", {}),
    "hgrn2": ("hgrn2", {}),
    "retnet": ("retnet", {}),
    "mlstm": ("mlstm", {}),
    "rwkv6": ("rwkv6", {}),
    "rwkv7": ("rwkv7", {}),
    "attention": ("attention", {}),
    "lstm": ("lstm", {}),
    "slstm": ("slstm", {}),
    "dense_rnn": ("dense_rnn", {}),
}
"""What --mixer accepts: the mixer's configuration and the options that the name stands for."""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """statetrack train parity --mixer deltanet --eigenvalues -1 1 --steps 500

    Train a model on a task; weights, metrics and curves go to a run directory. Ctrl-C stops without loss.
    """

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """task, e.g. parity, modular_arithmetic, S5_swaps, group:D7, automaton:FILE (statetrack tasks lists them)"""
    mixer: Literal[
        "deltanet", "gated-deltanet", "deltaproduct", "gated-deltaproduct", "kda", "mamba", "mamba2", "gla", "hgrn2",
        "retnet", "mlstm", "rwkv6", "rwkv7", "attention", "lstm", "slstm", "dense_rnn",
    ] = "deltanet"  # fmt: skip
    """token mixer of every layer"""
    eigenvalues: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LO HI", help_behavior_hint="")] = None
    """range of the transition's data-dependent eigenvalues; default -1 1"""
    dim: int = 128
    """width of the hidden stream"""
    layers: int = 1
    """blocks, each with a mixer and a SwiGLU"""
    heads: Unset[int | None] = None
    """heads; default 4"""
    head_dim: Unset[int | None] = None
    """width of a head; default dim / heads"""
    factors: Unset[int | None] = None
    """Householder factors per token; default 1 for the deltanets, 2 for the deltaproducts"""
    conv: Unset[int | None] = None
    """window of the short convolution, 0 for none; default 4"""
    beta_std: Unset[float | None] = None
    """spread of the logits of a DeltaNet's beta at the start; default about 0.2, 2 to 4 helps small models begin"""
    state_size: Unset[int | None] = None
    """states per channel; default 16 for mamba, 128 for mamba2; side of the matrix, 32, for dense_rnn"""
    mlp_dim: Unset[int | None] = None
    """hidden width of the SwiGLU, 0 for none; default 8/3 of dim rounded up to 256"""
    train_length: Annotated[tuple[int, int], tyro.conf.arg(metavar="LO HI")] = (3, 40)
    """shortest and longest training sequence"""
    steps: int = 2000
    """optimiser steps"""
    batch_size: int = 256
    """sequences per step"""
    lr: float = 1e-3
    """largest learning rate; a tenth of the steps rises to it, the rest falls along a cosine"""
    weight_decay: float = 0.1
    """on matrices only"""
    label_smoothing: float = 0.0
    """share of the target spread over all outputs; 0.1 helps answers hold beyond the training lengths"""
    clip: float = 1.0
    """largest gradient norm, 0 for no clipping"""
    seed: int = 0
    """of the initial weights and of the data"""
    device: Device = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast; auto: bfloat16 on a GPU, float32 elsewhere"""
    execution: Execution = "auto"
    """how a step is run; auto: as one CUDA graph on a GPU, eager elsewhere"""
    init_from_automaton: bool = False
    """start from the exact weights of the task's automaton (groups, automaton:FILE), which also give the model"""
    out: Unset[Path | None] = None
    """run directory; default runs/TASK_MIXER_LOtoHI_LAYERSl_sSEED"""
    resume: bool = False
    """go on with the run that is there, if there is one"""
    force: bool = False
    """replace the run that is there"""


@dataclass(frozen=True, kw_only=True)
class PlotArguments:
    """statetrack plot runs/A runs/B --out figure.png

    Draw accuracy against length from runs that were evaluated; runs that differ only in their seed share a line.
    """

    runs: RunPaths
    """run directories"""
    out: Path = Path("runs/accuracy.png")
    """picture; a PNG and an SVG are written"""


@dataclass(frozen=True, kw_only=True)
class DemoArguments:
    """statetrack demo

    Train DeltaNet and Mamba on parity with eigenvalues in [0, 1] and in [-1, 1], about a minute on two cores.
    """

    seed: int = 0
    """of the initial weights and of the data"""
    workers: int = 2
    """models trained at once, one core each"""
    out: Path = Path("runs/demo")
    """replaced if an earlier demo left it"""


@dataclass(frozen=True, kw_only=True)
class ExplainArguments:
    """statetrack explain '(0|1(01*0)*1)*' --alphabet 01

    Say what can track a language and what cannot, with theorems and witnesses.
    """

    spec: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REGEX|FILE|group:S5")]
    """regular expression, automaton file, or group"""
    alphabet: Annotated[str, tyro.conf.arg(metavar="LETTERS")] = "bytes"
    """letters of a regular expression, such as 01; by default all bytes"""
    flags: Annotated[str, tyro.conf.arg(metavar="LETTERS", help_behavior_hint="")] = ""
    """flags of a regular expression: i ignores case, s lets the dot match newlines, x ignores blanks; default none"""


@dataclass(frozen=True, kw_only=True)
class CompileArguments:
    """statetrack compile '-?[0-9]+([.][0-9]+)?' --out number

    Compile a language to the exact weights of a linear RNN, with a certificate and pictures.
    """

    spec: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="REGEX|FILE|group:S5")]
    """regular expression, automaton file, or group"""
    out: Path
    """directory for the network, its report, the automaton and the pictures"""
    structure: Literal["householder", "gated", "dplr"] = "householder"
    """householder: DeltaProduct; gated: resets by a gate; dplr: one layer, factors that are not symmetric"""
    window: int = 0
    """tokens that the first layer sees; 0 for the current one only"""
    keys: Literal["integer", "unit", "normalised"] = "integer"
    """unit: for kernels that normalise keys; normalised: not exact, to see a certificate fail"""
    objective: Literal["depth", "factors", "width"] = "depth"
    """what is made small first"""
    timeout: float = 20.0
    """seconds for all of it; 0 takes the first network found"""
    alphabet: Annotated[str, tyro.conf.arg(metavar="LETTERS")] = "bytes"
    """letters of a regular expression, such as 01; by default all bytes"""
    flags: Annotated[str, tyro.conf.arg(metavar="LETTERS", help_behavior_hint="")] = ""
    """flags of a regular expression: i ignores case, s lets the dot match newlines, x ignores blanks; default none"""
    force: bool = False
    """replace the compiled automaton that is there"""


@dataclass(frozen=True, kw_only=True)
class RunArguments:
    """statetrack run number numbers.txt

    Stream a file of any size through a compiled automaton in constant memory; say what it accepts.
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """what statetrack compile wrote"""
    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """file, - for standard input"""
    lines: bool = False
    """every line is a text, without its newline; the default"""
    whole: bool = False
    """the whole file is one text"""
    show: bool = False
    """print 1 or 0 for every line, the count goes to stderr"""
    device: Device = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    backend: Literal["auto", "reference", "chunk", "triton", "numba"] = "auto"
    """of the recurrence; auto: the fastest that fits"""


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
    | Annotated[ExplainArguments, tyro.conf.subcommand("explain")]
    | Annotated[CompileArguments, tyro.conf.subcommand("compile")]
    | Annotated[RunArguments, tyro.conf.subcommand("run")]
    | Annotated[ConvertArguments, tyro.conf.subcommand("convert")]
    | Annotated[UnlockArguments, tyro.conf.subcommand("unlock")]
    | Annotated[LMArguments, tyro.conf.subcommand("lm")]
    | Annotated[InspectArguments, tyro.conf.subcommand("inspect")]
    | Annotated[TasksArguments, tyro.conf.subcommand("tasks")]
)
VERBS = {
    TrainArguments: "train",
    EvaluateArguments: "evaluate",
    PlotArguments: "plot",
    ReproduceArguments: "reproduce",
    DemoArguments: "demo",
    ExplainArguments: "explain",
    CompileArguments: "compile",
    RunArguments: "run",
    ConvertArguments: "convert",
    UnlockArguments: "unlock",
    LMArguments: "lm",
    InspectArguments: "inspect",
    TasksArguments: "tasks",
}
"""The function in `statetrack.verbs` that does what the arguments say."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, made to unwind like Ctrl-C, so that temporaries and child processes are cleaned up."""


def main(arguments: list[str] | None = None) -> None:
    """Run one verb; exit with 2 for a user's mistake, 130 or 143 after SIGINT or SIGTERM."""
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["--version"], ["-V"]):
        print(f"statetrack {statetrack.__version__}")
        return
    parsed = parse(words)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        from statetrack import verbs as implementation

        getattr(implementation, VERBS[type(parsed)])(parsed)
    except BrokenPipeError:  # whoever read stdout has enough, as in `statetrack run ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except UsageError as error:
        _fail(str(error), 2)
    except OSError as error:
        what = error.strerror or str(error)
        _fail(f"{error.filename}: {what}" if error.filename and error.strerror else what, 2)
    except _Terminated:
        _fail("stopped", 143)
    except KeyboardInterrupt:
        _fail("stopped", 130)
    except Exception as error:
        if signum := getattr(error, "signum", None):
            _fail(str(error), 128 + signum)
        if not _out_of_memory(error):
            raise
        _fail(f"not enough memory: {str(error).splitlines()[0]}; try a smaller --batch-size or a shorter length", 2)
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse(words: list[str]) -> Any:
    """Return the arguments of one verb; exit with 2 and one line for words that cannot be understood."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                Arguments,  # pyright: ignore[reportArgumentType]
                prog="statetrack",
                description="Linear RNNs that track state.  Start with:  statetrack demo",
                args=words or ["--help"],
                config=(
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.FlagCreatePairsOff,
                    tyro.conf.DisallowNone,
                ),
            )
    except SystemExit as stop:
        if stop.code:
            verb = f" {words[0]}" if words and words[0] in VERBS.values() else ""
            if verb == " lm" and len(words) > 1 and words[1] in LM_VERBS.values():
                verb += f" {words[1]}"
            _fail(f"{_unboxed(printed.getvalue())}; see statetrack{verb} --help", 2)
        raise


def _unboxed(text: str) -> str:
    """Return the sentences of tyro's error box on one line, without its title and what repeats the help.

    Where stdout is not UTF-8, the box is a title and rules of hyphens.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m|\[/?bold\]", "", text).splitlines()
    inside = "\n".join(line.strip("│ ") for line in lines if not line.startswith(("╭", "╰")))
    blocks = [" ".join(block.split()).rstrip(".") for block in re.split(r"^[─-]{5,}$", inside, flags=re.MULTILINE)]
    said = blocks if "╭" in text else blocks[1:]
    return "; ".join(block for block in said if not block.startswith(("For full helptext", "Argument helptext")))


def _out_of_memory(error: Exception) -> bool:
    """Return whether Python, torch on a CPU or torch on a GPU could not get the memory it asked for."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)
    )


def _terminate(_signum: int, _frame: Any) -> None:
    raise _Terminated


def _fail(message: str, code: int) -> None:
    print(f"statetrack: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
