"""statetrack inspect: a model from anywhere, a text, what its eigenvalues do there, as a table and a picture.

Letters: T tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from statetrack import artifact
from statetrack.errors import UsageError, require
from statetrack.model import Model
from statetrack.plots import COLOURS, save_figure
from statetrack.runs import first_line, write_json
from statetrack.spectra import BINS, Head, spectra, summary, to_json


def inspect(
    source: str | Path, out: Path, *, text: Path | None = None, tokens: int = 2048, tokenizer: str | None = None
) -> list[Head]:
    """Write out.json, out.png and out.svg, and return what every head does.

    source: whatever `statetrack.convert` reads. text: for a language model, default the source of a module of Python's
    standard library; of runs of `statetrack train` and of compiled automata the tokens are drawn from the task.
    tokens: at most so many are read. tokenizer: default the checkpoint's own.
    """
    if tokens < 2:
        raise UsageError(f"tokens must be at least 2, got {tokens}")
    model, ids = _model_and_tokens(source, text, tokens, tokenizer)
    model = model.eval().float()
    heads = spectra(model, ids.to(model.embed.weight.device))
    stem = out.with_suffix("") if out.suffix in (".json", ".png", ".svg") else out
    stem.parent.mkdir(parents=True, exist_ok=True)
    report = {"source": str(source), "tokens": ids.shape[1], "summary": summary(heads), "heads": to_json(heads)}
    write_json(stem.with_name(f"{stem.name}.json"), report)
    draw(heads, stem, title=f"{source}: {summary(heads)}")
    return heads


def _model_and_tokens(
    source: str | Path, text: Path | None, count: int, tokenizer: str | None
) -> tuple[Model, Int[Tensor, "1 T"]]:
    """Return the model, and tokens that it knows."""
    path, generator = Path(source), torch.Generator().manual_seed(0)
    compiled, run = (path / artifact.NETWORK).exists(), _is_run(path)
    if (compiled or run) and (text is not None or tokenizer is not None):
        raise UsageError(f"{source} is no language model: its tokens are drawn from its task, without a text")
    if compiled:
        model = artifact.read(path).to_model()
        letters = torch.randint(0, model.config.vocab_size - 1, (1, count - 1), generator=generator)
        return model, torch.cat([torch.tensor([[model.config.vocab_size - 1]]), letters], dim=1)
    if run:
        from statetrack.tasks import get_task
        from statetrack.train import load_run

        settings, model = load_run(path, "cpu")
        return model, get_task(settings.task).sample(generator, 1, settings.train_length)[0][:, :count]
    require("transformers", "hf")
    from statetrack.convert import directory, load

    model = load(source).model
    return model, _encode(tokenizer or str(directory(source)), _text(text), count, model.config.vocab_size)


def _is_run(path: Path) -> bool:
    try:
        stored = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and "settings" in stored


def _text(path: Path | None) -> str:
    if path is None:
        import argparse

        path = Path(argparse.__file__)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read as text: {first_line(error)}") from None


def _encode(tokenizer: str, text: str, count: int, vocabulary: int) -> Int[Tensor, "1 T"]:
    """Return the first tokens of a text."""
    from transformers import AutoTokenizer

    try:
        found: Any = AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:  # transformers raises errors of many types for a directory without a tokenizer
        raise UsageError(f"no tokenizer in {tokenizer} ({first_line(error)}); --tokenizer names one") from None
    ids = found(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, :count]
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise UsageError(f"the tokenizer {tokenizer} has token {int(ids.max())}, the model only {vocabulary} tokens")
    return ids


def draw(heads: list[Head], path: Path, *, title: str) -> list[Path]:
    """Draw where the eigenvalues of every head lie, and on how many tokens one is negative; write a PNG and an SVG."""
    height = min(40.0, max(2.4, 1.4 + 0.16 * len(heads)))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    shares = [head.histogram for head in heads]
    left.imshow(shares, aspect="auto", extent=(-1, 1, len(heads) - 0.5, -0.5), cmap="Blues", vmin=0, vmax=8 / BINS)
    left.axvline(0, color="0.5", linewidth=0.8)
    left.set(xlabel="real part of the eigenvalues", ylabel="layer", xlim=(-1, 1))
    firsts = [i for i, head in enumerate(heads) if head.head == 0]
    left.set_yticks(firsts, [f"{heads[i].layer}" for i in firsts])
    for i in firsts[1:]:
        for axes in (left, right):
            axes.axhline(i - 0.5, color="0.8", linewidth=0.5)
    right.barh(range(len(heads)), [head.negative for head in heads], color=COLOURS[1])
    right.set(xlabel="tokens with a negative one", xlim=(0, 1))
    right.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)
