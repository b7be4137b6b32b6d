"""Pictures: accuracy against length, one line per configuration, a band over its seeds; loss against step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from textwrap import fill

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font
from matplotlib.ticker import StrMethodFormatter

from statetrack.errors import UsageError
from statetrack.runs import write_atomically

Curve = Sequence[tuple[int, float]]  # (length, accuracy)
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)  # told apart by the colour-blind
DASHES = ("-", "--", ":", "-.")


def drawable(text: str) -> str:
    """Return a text with every character that matplotlib's own fonts lack as its number, such as U+1F642."""
    return "".join(c if ord(c) in _characters() else f"U+{ord(c):04X}" for c in text)


@cache
def _characters() -> frozenset[int]:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
    return frozenset(get_font(str(path)).get_charmap()) | {ord("\n")}


def accuracy_by_length(
    curves: Mapping[str, Sequence[Curve]],
    path: Path,
    *,
    title: str,
    measure: str = "scaled accuracy",
    trained: tuple[int, int] | None = None,
) -> list[Path]:
    """Draw one line per name, the mean over its seeds with a band from worst to best; write path.png and path.svg."""
    names = {
        name: name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds, worst to best)"
        for name, seeds in curves.items()
    }
    labels = {name: fill(drawable(label), 100) for name, label in names.items()}
    below = max(map(len, names.values()), default=0) > 40  # no room for the legend at the side
    lines = sum(label.count("\n") + 1 for label in labels.values()) if below else 0
    figure = Figure(figsize=(7.2, 4.2 + 0.18 * lines), layout="constrained")
    axes = figure.add_subplot()
    lengths = [x for seeds in curves.values() for curve in seeds for x, _ in curve]
    if trained is not None:
        axes.axvspan(*trained, color="0.92", zorder=0)
        axes.text(trained[1], 1.05, "trained up to here ", ha="right", va="bottom", fontsize=8, color="0.4")
    for i, (name, seeds) in enumerate(curves.items()):
        shared = sorted(set.intersection(*(set(x for x, _ in curve) for curve in seeds)))
        rows = [[dict(curve)[x] for x in shared] for curve in seeds]
        mean = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[(i // len(COLOURS) + i) % len(DASHES)]
        width = max(1.2, 4.0 - i)  # the first lines are wide, so that lines that coincide all show
        marker = "o" if len(shared) < 25 else None
        axes.plot(
            shared, mean, dash, color=colour, label=labels[name], linewidth=width, marker=marker, markersize=width + 2
        )
        if len(seeds) > 1:
            worst, best = [min(c) for c in zip(*rows, strict=True)], [max(c) for c in zip(*rows, strict=True)]
            axes.fill_between(shared, worst, best, color=colour, alpha=0.2, linewidth=0)
    if lengths and min(lengths) > 0 and max(lengths) / min(lengths) > 50:
        axes.set_xscale("log", base=2 if max(lengths) < 1000 * min(lengths) else 10)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set(xlabel="sequence length", ylabel=measure, title=drawable(title), ylim=(-0.1, 1.15))
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    if below:
        figure.legend(frameon=False, fontsize=8, loc="outside lower left")
    else:
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)


def dots(
    values: Mapping[str, Sequence[float]], paper: Mapping[str, float | None], path: Path, *, title: str, measure: str
) -> list[Path]:
    """Draw a line of dots per name, one for each seed, and the paper's number; write path.png and path.svg."""
    figure = Figure(figsize=(7.2, 1.2 + 0.28 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    for y, (name, seeds) in enumerate(values.items()):
        axes.plot(
            seeds, [y] * len(seeds), "o", color=COLOURS[0], markersize=6, alpha=0.6, label="ours" if y == 0 else None
        )
        if (number := paper.get(name)) is not None:
            axes.plot([number], [y], "|", color=COLOURS[1], markersize=14, markeredgewidth=2.5)
    axes.plot([], [], "|", color=COLOURS[1], markersize=12, markeredgewidth=2.5, label="the paper's")
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.set(xlabel=measure, xlim=(-0.1, 1.05), ylim=(len(values) - 0.5, -0.5))
    axes.set_title(fill(title, 60), fontsize=10)
    axes.grid(axis="x", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save_figure(figure, path)


def training_curve(rows: Sequence[Mapping[str, int | float]], path: Path, *, title: str) -> list[Path]:
    """Draw loss and accuracy against step from a run's metrics; write path.png and path.svg."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    steps = [row["step"] for row in rows]
    for position, name in enumerate(("loss", "accuracy")):
        axes = figure.add_subplot(1, 2, position + 1)
        axes.plot(steps, [row[name] for row in rows], color=COLOURS[position])
        axes.set(xlabel="step", ylabel=f"training {name}")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(drawable(title), fontsize=10)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> list[Path]:
    """Write path.png and path.svg."""
    if not path.name:
        raise UsageError(f"{str(path)!r} is no name for a picture; give a file, e.g. accuracy.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem if path.suffix in (".png", ".svg") else path.name
    png, svg = path.with_name(f"{stem}.png"), path.with_name(f"{stem}.svg")
    write_atomically(png, lambda p: FigureCanvasAgg(figure).print_png(str(p), metadata={"Software": None}))
    write_atomically(svg, lambda p: FigureCanvasSVG(figure).print_svg(str(p), metadata={"Date": None}))
    return [png, svg]
