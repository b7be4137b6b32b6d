"""What `statetrack lm VERB ...` does, given its parsed arguments."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from recipes.lm import RECIPES
from statetrack.errors import UsageError
from statetrack.lm.arguments import PrepareArguments, RecipesArguments, TrainArguments
from statetrack.lm.corpus import Data
from statetrack.lm.corpus import prepare as prepare_data
from statetrack.lm.settings import Recipe, cost
from statetrack.progress import Bars


def prepare(a: PrepareArguments) -> None:
    """Tokenise a source."""
    data = Data(
        source=a.source,
        tokenizer=a.tokenizer,
        field=a.field,
        split=a.split,
        tokens=a.tokens,
        validation=a.validation,
    )
    with Bars() as bars:

        def report(tokens: int, documents: int) -> None:
            total = None if a.tokens is None else a.tokens / 1e6
            bars.update("prepare", tokens / 1e6, total, f"million tokens, {documents} documents")

        corpus = prepare_data(data, a.out, force=a.force, report=report)
    counts = (f"{corpus.tokens(split):,} tokens for {split}" for split in ("train", "validation"))
    say(f"{a.out}: {', '.join(counts)}; next: statetrack lm train RECIPE --data {shlex.quote(str(a.out))}")


def train(a: TrainArguments) -> None:
    """Train by a recipe."""
    from statetrack.lm.train import MODEL, Options
    from statetrack.lm.train import train as run_training

    recipe = recipe_of(a)
    lo, hi = a.eigenvalues
    path = a.out or Path("runs") / f"lm_{a.recipe}_{lo:g}to{hi:g}_s{recipe.seed}"
    trackers = {"both": ("tensorboard", "wandb"), "none": ()}.get(a.tracker, (a.tracker,))
    options = Options(device=a.device, parallel=a.parallel, minutes=a.minutes, trackers=trackers)
    last = run_training(recipe, path, a.data or default_data(recipe), options=options, resume=a.resume, force=a.force)
    if int(os.environ.get("RANK", "0")) == 0:
        shown = f"loss {last['loss']:.4f}" if "loss" in last else "nothing was left to do"
        shown += f", validation {last['eval_loss']:.4f}" if "eval_loss" in last else ""
        model = shlex.quote(str(path / MODEL))
        say(f"trained to step {last['step']:.0f}: {shown}; next: statetrack lm evaluate {model}")


def recipe_of(a: TrainArguments) -> Recipe:
    """Return the recipe with what the arguments change."""
    if a.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {a.recipe!r}; accepted: {', '.join(RECIPES)}")
    names = ("steps", "rows", "micro_rows", "length", "lr", "warmup", "seed", "documents", "precision")
    names += ("save_every", "evaluate_every", "log_every")
    given = {name: value for name in names if (value := getattr(a, name)) is not None}
    if a.compile is not None:
        given["compile"] = a.compile == "yes"
    recipe = RECIPES[a.recipe](eigenvalues=a.eigenvalues)
    if "lr" in given:
        given["min_lr"] = recipe.min_lr * given["lr"] / recipe.lr
    return replace(recipe, **given)


def default_data(recipe: Recipe) -> Path:
    """Return where a recipe's data lies unless --data says otherwise."""
    name = f"{recipe.data.source}_{recipe.data.tokenizer}"
    return Path("runs/data") / "".join(c if c.isalnum() else "-" for c in name)


def recipes(_: RecipesArguments) -> None:
    """List the recipes."""
    table = Table("recipe", Column("parameters", justify="right"), Column("tokens", justify="right"), "what", box=None)
    for name, make in RECIPES.items():
        recipe = make()
        size = cost(recipe.model(_vocabulary(recipe)), recipe.tied).parameters
        tokens = recipe.steps * recipe.rows * recipe.length
        table.add_row(name, f"{size / 1e6:,.1f} M", f"{tokens / 1e9:,.3f} G", recipe.about)
    Console(markup=False).print(table)


def _vocabulary(recipe: Recipe) -> int:
    """Return the tokenizer's size, as far as its name tells: the hub's one is Mistral's, with 32,000 tokens."""
    kind, _, size = recipe.data.tokenizer.partition(":")
    return int(size) if kind == "bpe" else 32_000


def say(line: str) -> None:
    """Print a line as it is."""
    Console(markup=False).print(line, highlight=False, soft_wrap=True)
