"""What `statetrack lm VERB ...` does, given its parsed arguments."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from recipes.lm import RECIPES
from statetrack.errors import UsageError
from statetrack.lm.arguments import (
    EvaluateArguments,
    GenerateArguments,
    PrepareArguments,
    RecipesArguments,
    TrainArguments,
)
from statetrack.lm.corpus import Corpus, Data, prepare_shown
from statetrack.lm.settings import Recipe, cost
from statetrack.progress import Bars
from statetrack.runs import read_json, write_json


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
    corpus = prepare_shown(data, a.out, force=a.force)
    counts = (f"{corpus.tokens(split):,} tokens for {split}" for split in ("train", "validation"))
    say(f"{a.out}: {', '.join(counts)}; next: statetrack lm train RECIPE --data {shlex.quote(str(a.out))}")
    if a.validation and not corpus.tokens("validation"):
        share = f"a share of {a.validation:g} of {corpus.documents('train')} documents"
        say(
            f"{a.out}: nothing is held out ({share}), so runs report no validation loss; a larger --validation, --force"
        )


def train(a: TrainArguments) -> None:
    """Train by a recipe."""
    from statetrack.lm.train import MODEL, Options, leaving_group
    from statetrack.lm.train import train as run_training

    recipe = recipe_of(a)
    lo, hi = a.eigenvalues
    kind = f"from_{Path(a.init).name}" if a.init else f"{lo:g}to{hi:g}"
    path = a.out or Path("runs") / f"lm_{a.recipe}_{kind}_s{recipe.seed}"
    installed = ("tensorboard",) if find_spec("tensorboard") else ()
    trackers = {"auto": installed, "both": ("tensorboard", "wandb"), "none": ()}.get(a.tracker, (a.tracker,))
    options = Options(device=a.device, parallel=a.parallel, minutes=a.minutes, trackers=trackers)
    data = Corpus(a.data).path if a.data else default_data(recipe)
    with leaving_group():
        last = run_training(recipe, path, data, options=options, resume=a.resume, force=a.force)
    if int(os.environ.get("RANK", "0")) == 0:
        shown = f"loss {last['loss']:.4f}" if "loss" in last else "nothing was left to do"
        shown += f", validation {last['eval_loss']:.4f}" if "eval_loss" in last else ""
        say(f"trained to step {last['step']:.0f}: {shown}; the model is {path / MODEL}")
        say(f"next: statetrack lm evaluate {shlex.quote(str(path))} --data {shlex.quote(str(data))}")


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
    if a.init is not None:
        from statetrack.lm.train import with_model_of

        if a.eigenvalues != (-1.0, 1.0):
            raise UsageError("--eigenvalues and --init exclude each other: the range is the checkpoint's")
        recipe = with_model_of(recipe, a.init)
    return replace(recipe, **given)


def default_data(recipe: Recipe) -> Path:
    """Return where a recipe's data lies unless --data says otherwise."""
    name = f"{recipe.data.source}_{recipe.data.tokenizer}"
    return Path("runs/data") / "".join(c if c.isalnum() else "-" for c in name)


def evaluate(a: EvaluateArguments) -> None:
    """Measure perplexity by position, and tasks; keep the numbers as soon as they are there."""
    if not a.models or not (a.data or a.text or a.tasks) or (a.data and a.text):
        raise UsageError("name at least one model, and --data or --text (one of them), or --tasks, or both")
    if a.length < 2 or a.windows < 1 or a.batch_size < 1:
        given = f"{a.length}, {a.windows} and {a.batch_size}"
        raise UsageError(f"length must be at least 2, windows and batch-size at least 1, got {given}")
    if a.tasks:
        from statetrack.lm.evaluate import check_tasks

        check_tasks(a.tasks, a.include)
    found: dict[str, dict[str, Any]] = {}
    with Bars() as bars:
        for path in a.models:
            name = str(path)
            found[name] = {}
            for part in _evaluations(path, a, bars):
                found[name] |= part
                a.out.mkdir(parents=True, exist_ok=True)
                write_json(a.out / "evaluation.json", found)
    _show(found, a)


def _evaluations(path: Path, a: EvaluateArguments, bars: Bars) -> Iterator[dict[str, Any]]:
    """Yield what is asked of one model, part by part."""
    from statetrack.lm.evaluate import (
        PER_BUCKET,
        bucketed,
        corpus_tokens,
        load_model,
        loss_by_position,
        perplexity_within,
        run_tasks,
        source_tokens,
        windows,
    )

    model, tokenizer = load_model(path, a.device, a.precision)
    if a.data or a.text:
        texts = corpus_tokens(Corpus(a.data), tokenizer) if a.data else source_tokens(a.text or "", tokenizer, a.field)
        try:
            tokens = windows(texts, a.length, a.windows, whole=a.whole_documents)
        except UsageError as error:
            where = f"the validation split of {a.data}" if a.data else str(a.text)
            raise UsageError(f"{where} has {error}; a shorter --length, or --text SOURCE") from None
        done = 0

        def report(count: int) -> None:
            nonlocal done
            done += count
            bars.update(str(path), done / 1e3, tokens.numel() / 1e3, "thousand tokens")

        losses = loss_by_position(model, tokens, batch_size=a.batch_size, report=report)
        within = {str(n): perplexity_within(losses, n) for n in _lengths(a.length)}
        positions = bucketed(losses, -(-PER_BUCKET // len(tokens)))
        yield {"windows": len(tokens), "perplexity": within, "positions": positions, "trained": _trained(path)}
    if a.tasks:
        options = {"include": a.include, "limit": a.limit, "batch_size": a.batch_size}
        yield {"tasks": run_tasks(model, tokenizer, a.tasks, **options)}


def _lengths(longest: int) -> list[int]:
    return [n for n in (2**i for i in range(7, 40)) if n < longest] + [longest]


def _trained(path: Path) -> int | None:
    """Return the length of the rows that a run was trained on, where it says so."""
    for folder in (path, path.parent):
        if (folder / "recipe.json").exists():
            return read_json(folder / "recipe.json")["settings"]["length"]
    return None


def _show(found: dict[str, dict[str, Any]], a: EvaluateArguments) -> None:
    """Print tables and draw perplexity by position."""
    from statetrack.lm.pictures import perplexity_by_position

    measured = {name: rows for name, rows in found.items() if "positions" in rows}
    if measured:
        count = min(rows["windows"] for rows in measured.values())
        if count < a.windows:
            say(f"{a.data or a.text} has text for {count} window(s) of {a.length} tokens, not for {a.windows}")
        names = (Column(name, justify="right", overflow="fold") for name in measured)
        table = Table(Column("tokens", justify="right"), *names, title="perplexity of the first tokens of a window")
        for length in map(str, _lengths(a.length)):
            table.add_row(length, *(f"{rows['perplexity'][length]:.3f}" for rows in measured.values()))
        Console(markup=False).print(table)
        curves = {name: [((r["from"] + r["to"]) / 2, r["perplexity"]) for r in rows["positions"]]
                  for name, rows in measured.items()}  # fmt: skip
        trained = {rows["trained"] for rows in measured.values()}
        told = trained.pop() if len(trained) == 1 else None
        title = f"{a.data or a.text}, {count} window(s) of {a.length} tokens"
        perplexity_by_position(curves, a.out / "perplexity", title=title, trained=told)
    for name, rows in found.items():
        for task, values in rows.get("tasks", {}).items():
            shown = (f"{key.removesuffix(',none')} {value:.4f}" for key, value in values.items() if _is_number(value))
            say(f"{name}: {task}: {', '.join(shown)}")
    say(f"wrote {a.out / 'evaluation.json'}" + (f" and {a.out / 'perplexity.png'}" if measured else ""))


def _is_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isnan(value)


def generate(a: GenerateArguments) -> None:
    """Continue a text, shown as it comes."""
    from statetrack.lm.evaluate import load_model
    from statetrack.lm.generate import generate as run_generation

    prompt = sys.stdin.read() if a.prompt == "-" else a.prompt
    model, tokenizer = load_model(a.model, a.device, a.precision)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    show(prompt)
    options = {"tokens": a.tokens, "temperature": a.temperature, "top_p": a.top_p, "seed": a.seed}
    run_generation(model, tokenizer, prompt, show=show, **options)
    show("\n")


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
