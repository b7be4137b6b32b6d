"""Pictures of language models: loss by step, perplexity by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from statetrack.plots import COLOURS, DASHES, save_figure


def loss_by_step(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> list[Path]:
    """Draw every run's training loss, and its validation loss as dots, against the step; write path.png and .svg."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, rows) in enumerate(runs.items()):
        trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        colour = COLOURS[i % len(COLOURS)]
        told, told_too = (name, f"{name}, validation") if len(runs) > 1 else ("training", "validation")
        axes.plot(*_columns(trained), DASHES[i % len(DASHES)], color=colour, label=told, linewidth=1.2)
        if held_out:
            axes.plot(*_columns(held_out), "o", color=colour, markersize=4, label=told_too)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=title)
    axes.legend()
    return save_figure(figure, path)


def perplexity_by_position(
    models: Mapping[str, Sequence[tuple[float, float]]], path: Path, *, title: str, trained: int | None = None
) -> list[Path]:
    """Draw every model's perplexity against the position; write path.png and .svg. `trained`: length of its rows."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(models.items()):
        axes.plot(*_columns(points), DASHES[i % len(DASHES)], color=COLOURS[i % len(COLOURS)], label=name)
    if trained is not None:
        axes.axvline(trained, color="0.6", linewidth=0.8)
        axes.text(trained, axes.get_ylim()[0], " training length", ha="left", va="bottom", fontsize=8, color="0.4")
    axes.set(xlabel="position", ylabel="perplexity", title=title, xscale="log")
    axes.legend()
    return save_figure(figure, path)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
