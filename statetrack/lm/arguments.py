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
    data: Unset[Path | None] = None
    """prepared data; default runs/data/SOURCE_TOKENIZER of the recipe, prepared if absent"""
    out: Unset[Path | None] = None
    """run directory; default runs/lm_RECIPE_LOtoHI_sSEED"""
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
    tracker: Literal["tensorboard", "wandb", "both", "none"] = "tensorboard"
    """where metrics go besides the run directory"""
    device: Annotated[str, tyro.conf.arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: a GPU where there is one"""
    resume: bool = False
    """go on with the run that is there, if there is one"""
    force: bool = False
    """replace the run that is there"""


@dataclass(frozen=True, kw_only=True)
class RecipesArguments:
    """statetrack lm recipes

    List the recipes.
    """


Prepare = Annotated[PrepareArguments, tyro.conf.subcommand("prepare")]
Train = Annotated[TrainArguments, tyro.conf.subcommand("train")]
Recipes = Annotated[RecipesArguments, tyro.conf.subcommand("recipes")]
VERBS = {PrepareArguments: "prepare", TrainArguments: "train", RecipesArguments: "recipes"}
"""The function in `statetrack.lm.verbs` that does what the arguments say."""


@dataclass(frozen=True, kw_only=True)
class LMArguments:
    """statetrack lm train tiny

    Language models: prepare text, train, evaluate, generate.
    """

    verb: Prepare | Train | Recipes
