"""The arguments of `statetrack lm VERB ...`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

T = TypeVar("T")
Unset = Annotated[T, tyro.conf.arg(help_behavior_hint="")]  # the help text says the default itself


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """statetrack lm prepare stdlib --out data/stdlib --tokenizer bpe:4096

    Tokenise text into a directory that runs read. Interrupted, the same command goes on.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """stdlib, python (installed packages too), a file, a folder, or a hub name (HuggingFaceFW/fineweb:sample-10BT)"""
    out: Path
    """directory for the tokens and the tokenizer"""
    tokenizer: str = "bpe:4096"
    """hub name, folder, or bpe:SIZE for a byte-level BPE trained on the source"""
    field: str = "text"
    """column of the text in tables and data sets"""
    split: str = "train"
    """split of a data set of the hub"""
    tokens: Unset[int | None] = None
    """stop after that many training tokens; default all"""
    validation: float = 0.02
    """share of the documents that are not trained on"""
    force: bool = False
    """replace the data that is there"""


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """statetrack lm train tiny --eigenvalues 0 1

    Train a language model by a recipe, on one process or, under torchrun, on many. Ctrl-C stops without loss.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """tiny, code-100m, p1-340m, ... (statetrack lm recipes lists them)"""
    eigenvalues: Annotated[tuple[float, float], tyro.conf.arg(metavar="LO HI")] = (-1.0, 1.0)
    """range of the transitions' data-dependent eigenvalues"""
    init: Annotated[str | None, tyro.conf.arg(metavar="CKPT|RUN", help_behavior_hint="")] = None
    """begin with this model and its weights (all that statetrack convert reads), not with the recipe's model"""
    data: Unset[Path | None] = None
    """prepared data; default runs/data/SOURCE_TOKENIZER of the recipe, prepared if absent"""
    out: Unset[Path | None] = None
    """run directory; default runs/lm_RECIPE_LOtoHI_sSEED, with --init runs/lm_RECIPE_from_NAME_sSEED"""
    steps: Unset[int | None] = None
    """optimiser steps; default the recipe's, as for the rest"""
    rows: Unset[int | None] = None
    """rows per step, over all processes"""
    micro_rows: Unset[int | None] = None
    """rows per process at once; the rest is accumulated"""
    length: Unset[int | None] = None
    """tokens per row"""
    lr: Unset[float | None] = None
    """largest learning rate"""
    warmup: Unset[int | None] = None
    """steps over which the learning rate rises"""
    seed: Unset[int | None] = None
    """of weights and order of the data"""
    documents: Unset[Literal["separate", "joined"] | None] = None
    """separate: a document begins with an empty state; joined: the state runs on within a row"""
    precision: Unset[Literal["auto", "float32", "bfloat16"] | None] = None
    """bfloat16 is autocast; auto: bfloat16 on a GPU, float32 elsewhere"""
    compile: Unset[Literal["yes", "no"] | None] = None
    """torch.compile every block, on a GPU"""
    save_every: Unset[int | None] = None
    """steps between checkpoints"""
    evaluate_every: Unset[int | None] = None
    """steps between evaluations on the validation split"""
    log_every: Unset[int | None] = None
    """steps between lines of metrics"""
    minutes: Unset[float | None] = None
    """stop and save after that time"""
    parallel: Literal["auto", "fsdp", "ddp"] = "auto"
    """with several processes: fsdp spreads the weights (FSDP2), ddp does not; auto: fsdp on GPUs"""
    tracker: Literal["auto", "tensorboard", "wandb", "both", "none"] = "auto"
    """where metrics go besides the run directory; auto: TensorBoard where it is installed"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    resume: bool = False
    """go on with the run that is there, if there is one"""
    force: bool = False
    """replace the run that is there"""


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """statetrack lm evaluate runs/lm_tiny_-1to1_s0 --data runs/data/stdlib-bpe-1024 --length 2048

    Measure perplexity by position on prepared data or a text, and lm-eval's tasks.
    """

    models: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="MODEL ...", help_behavior_hint="")]
    """run directories or checkpoints"""
    data: Unset[Path | None] = None
    """prepared data, whose validation split is read"""
    text: Unset[str | None] = None
    """instead of --data: stdlib, python, a file, a folder, or a hub name"""
    field: str = "text"
    """column of the text in tables and data sets"""
    length: int = 4096
    """tokens of a window, longer than those trained on to see what lies beyond"""
    windows: int = 32
    """windows, as far as there is text"""
    whole_documents: bool = False
    """every window is the beginning of one long document; otherwise documents follow one another"""
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """lm-eval's tasks, e.g. lambada_openai piqa hellaswag arc_easy"""
    include: Unset[Path | None] = None
    """folder of lm-eval tasks of your own"""
    limit: Unset[int | None] = None
    """examples per task; default all"""
    batch_size: int = 8
    """windows or requests at once"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: bfloat16 on a GPU, float32 elsewhere"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    out: Path = Path("runs/lm_evaluation")
    """directory for evaluation.json and the picture"""


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """statetrack lm generate runs/lm_tiny_-1to1_s0 --prompt 'def main('

    Continue a text.
    """

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """run directory or checkpoint"""
    prompt: str = ""
    """beginning of the text, - for standard input"""
    tokens: int = 200
    """tokens at most"""
    temperature: float = 0.8
    """0 takes the likeliest token each time"""
    top_p: float = 0.95
    """draw from the likeliest tokens of that much probability"""
    seed: int = 0
    """of the draws"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: bfloat16 on a GPU, float32 elsewhere"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""


@dataclass(frozen=True, kw_only=True)
class RecipesArguments:
    """statetrack lm recipes

    List the recipes.
    """


Prepare = Annotated[PrepareArguments, tyro.conf.subcommand("prepare")]
Train = Annotated[TrainArguments, tyro.conf.subcommand("train")]
Evaluate = Annotated[EvaluateArguments, tyro.conf.subcommand("evaluate")]
Generate = Annotated[GenerateArguments, tyro.conf.subcommand("generate")]
Recipes = Annotated[RecipesArguments, tyro.conf.subcommand("recipes")]
VERBS = {
    PrepareArguments: "prepare",
    TrainArguments: "train",
    EvaluateArguments: "evaluate",
    GenerateArguments: "generate",
    RecipesArguments: "recipes",
}
"""The function in `statetrack.lm.verbs` that does what the arguments say."""


@dataclass(frozen=True, kw_only=True)
class LMArguments:
    """statetrack lm train tiny

    Language models: prepare text, train, evaluate, generate.
    """

    verb: Prepare | Train | Evaluate | Generate | Recipes
