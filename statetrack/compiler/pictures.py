"""Pictures of a compiled automaton: its states, its layers, and what the layers hold along a word; PNG and SVG each.

States and layers are laid out by Graphviz, which the package pygraphviz brings along (the extra `pictures`).
"""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
from collections import Counter, deque
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from statetrack.automata import Automaton
from statetrack.automata.components import strong_components
from statetrack.compiler.assembly import Stage, groups
from statetrack.compiler.cascade import sink_of
from statetrack.compiler.compiled import CompiledAutomaton
from statetrack.errors import UsageError
from statetrack.plots import COLOURS, drawable, save_figure
from statetrack.runs import write_atomically

MOST_STATES, MOST_COORDINATES, MOST_HEADS = 40, 120, 6
LINE, MOST_LINES = 22, 4  # of a label: characters, lines
FONT = "DejaVu Sans"


def draw_automaton(automaton: Automaton, path: Path) -> list[Path]:
    """Draw states and letters, a rejecting state that is never left being left out; write path.png and path.svg.

    Raises UsageError for more than 40 states, and where pygraphviz is missing.
    """
    if automaton.states > MOST_STATES:
        raise UsageError(f"{automaton.states} states are too many to draw; at most {MOST_STATES}")
    sink = sink_of(automaton)
    hidden = sink if sink != automaton.start else None
    graph = _graph(rankdir="LR", nodesep="0.3", ranksep="0.5")
    if hidden is not None:
        graph.graph_attr.update(label="what is not drawn is rejected for good", labelloc="b", fontsize="10")
    graph.add_node("start", shape="point", width="0.08")
    for q in range(automaton.states):
        accepts = automaton.accepting is not None and q in automaton.accepting
        said = "" if automaton.output is None else f"/{automaton.output[q]}"
        if q != hidden:
            shape, fill = ("doublecircle", "#d9f0e6") if accepts else ("circle", "white")
            graph.add_node(f"q{q}", label=f"{q}{said}", shape=shape, style="filled", fillcolor=fill, width="0.5")
    graph.add_edge("start", f"q{automaton.start}")
    for q, row in enumerate(automaton.table.tolist()):
        for r in sorted(set(row)):
            if hidden not in (q, r):
                graph.add_edge(f"q{q}", f"q{r}", label=_label(letter_set(automaton, _where(row, r))))
    return _save(graph, path)


def _where(row: list[int], r: int) -> list[int]:
    return [x for x, target in enumerate(row) if target == r]


def draw_layers(compiled: CompiledAutomaton, path: Path) -> list[Path]:
    """Draw the layers with their heads, what these can do, and the tables; write path.png and path.svg.

    Raises UsageError where pygraphviz is missing, and for Zeiger's chain, which has as many layers as states.
    """
    _check_stages(compiled)
    b, merged = compiled.blueprint, compiled.merged
    graph = _graph(rankdir="LR", nodesep="0.15", ranksep="0.45")
    graph.node_attr.update(shape="box", style="filled,rounded", fillcolor="white", margin="0.12,0.06")
    seen = f"the last {compiled.window + 1} letters" if compiled.window else "letter"
    graph.add_node("letter", label=f"{seen}\n{merged.alphabet} classes of {b.automaton.alphabet}", fillcolor="#f0f0f0")
    below = None
    for i, (stage, factors) in enumerate(zip(compiled.stages, compiled.factors, strict=True)):
        names = []
        for j, (text, count) in enumerate(_heads(stage)):
            names.append(f"head {i} {j}")
            graph.add_node(names[-1], label=f"{count} heads, each:\n{text}" if count > 1 else text)
        colour = COLOURS[i % len(COLOURS)]
        words = f"layer {i + 1}: {stage.kind}, {factors} factor{'s' * (factors > 1)} a token"
        graph.add_subgraph(names, name=f"cluster_{i}", label=words, style="rounded", color=colour, fontcolor=colour)
        table = f"table {i}"
        entries = sum(t.size for t in stage.decoder)
        graph.add_node(table, label=f"table\n{entries} entries", fillcolor="#f0f0f0")
        for name in names:
            graph.add_edge("letter" if below is None else below, name, label="" if below is None else " one token ago ")
            graph.add_edge(name, table)
        below = table
    graph.add_node("state", label=f"state\n1 of {b.automaton.states}", fillcolor="#d9f0e6")
    graph.add_edge("letter" if below is None else below, "state")
    return _save(graph, path)


def _check_stages(compiled: CompiledAutomaton) -> None:
    if compiled.depth != len(compiled.stages):
        raise UsageError(f"Zeiger's chain of {compiled.depth} layers is too long to draw")


def _heads(stage: Stage) -> list[tuple[str, int]]:
    """Describe the heads of a layer, those that read the same together; the first few kinds if there are many."""
    texts = Counter(_describe(stage, i) for i in range(len(stage.heads)))
    kinds = list(texts.items())
    if len(kinds) > MOST_HEADS:
        rest = sum(count for _, count in kinds[MOST_HEADS:])
        kinds = [*kinds[:MOST_HEADS], (f"and {rest} more heads", 1)]
    return kinds


def _describe(stage: Stage, i: int) -> str:
    head = stage.heads[i]
    columns = f" x {len(head.start)}" if len(head.start) > 1 else ""
    what = "bits of a register" if head.register else "coordinates"
    if stage.asymmetric:
        kinds = Counter(type(factor).__name__.lower() for factors in stage.asymmetric for factor in factors)
        does = [f"{count} {kind}s" for kind, count in sorted(kinds.items())]
    else:
        swaps = {tuple(sorted(swap)) for op in head.operations for swap in op.swaps}
        clears = {a for op in head.operations for a in op.clears}
        writes = {a for op in head.operations for a in op.writes}
        counted = {"swaps": swaps, "clears": clears, "writes": writes}
        does = [f"{len(found)} {kind if len(found) > 1 else kind[:-1]}" for kind, found in counted.items() if found]
    width = f"{head.width}{columns} {what if head.width > 1 else what.replace('coordinates', 'coordinate')}"
    return f"{width}\n{', '.join(does) or 'nothing to do'}"


def draw_trajectory(
    compiled: CompiledAutomaton, text: str | bytes | Sequence[str] | Int[np.ndarray, "T"], path: Path
) -> list[Path]:
    """Draw what every coordinate of every layer holds along a text, or letters by number; write path.png and path.svg.

    Letters along x, one row per coordinate, layers from top to bottom; below them the automaton's state, framed where
    it accepts. Raises UsageError for what is no letter, and for more than 120 rows or letters.
    """
    _check_stages(compiled)
    word = text if isinstance(text, np.ndarray) else compiled.automaton.encode(text)
    states, layers = _trajectory(compiled, word)
    rows = sum(len(values) for values in layers)
    if max(rows, len(word)) > MOST_COORDINATES:
        raise UsageError(
            f"{rows} coordinates along {len(word)} letters are too many to draw; at most {MOST_COORDINATES} each"
        )
    size = 1.6 + 0.26 * (len(word) + 1), 1.0 + 0.26 * rows + 0.35 * len(layers)
    figure = Figure(figsize=(max(4.0, size[0]), size[1]), layout="constrained")
    heights = [max(1, len(values)) for values in layers] + [1]
    all_axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for i, (axes, values) in enumerate(zip(all_axes, layers, strict=False)):
        shades = ListedColormap(["#f4f4f4", COLOURS[i % len(COLOURS)]])
        edges = np.arange(values.shape[1] + 1) - 0.5, np.arange(len(values) + 1) - 0.5
        axes.pcolormesh(*edges, values, cmap=shades, vmin=0, vmax=1, edgecolors="white", linewidth=1)
        axes.set(ylabel=f"layer {i + 1}", yticks=range(len(values)), yticklabels=range(1, len(values) + 1))
        axes.invert_yaxis()
        axes.tick_params(length=0, labelsize=7, labelbottom=False)
    axes = all_axes[-1]
    _state_row(axes, compiled.automaton, states)
    names = ["", *(_shown(compiled.automaton.names[x]) for x in word)]
    rotation = 90 if max(map(len, names)) > 2 else 0
    axes.set_xticks(range(len(names)), names, fontsize=8, family="monospace", rotation=rotation)
    for each in all_axes:
        each.spines[:].set_visible(False)
    return save_figure(figure, path)


def _trajectory(compiled: CompiledAutomaton, word: np.ndarray) -> tuple[list[int], list[Float[np.ndarray, "D T"]]]:
    """Return the states and every layer's coordinates, at the start and after every letter."""
    state = compiled.init_state(1)
    states, memories = [compiled.automaton.start], [[stage.memory for stage in state.stages]]
    for x in word.tolist():
        after, state = compiled.follow(torch.tensor([[x]], device=compiled.classes.device), state, "auto")
        states.append(int(after))
        memories.append([stage.memory for stage in state.stages])
    layers = []
    for i, stage in enumerate(compiled.stages):
        memory = torch.stack([m[i][0] for m in memories]).cpu().numpy()  # [T R K V]
        rows, r = [], 0
        for head in stage.heads:
            copies = 1 if stage.asymmetric else compiled.style.copies(head)
            for column in range(len(head.start)):
                rows.append(memory[:, r, : copies * head.width : copies, column].T)
            r += len(groups(head))
        layers.append(np.concatenate(rows))
    return states, layers


def _state_row(axes: Any, automaton: Automaton, states: list[int]) -> None:
    for t, q in enumerate(states):
        accepts = automaton.accepting is not None and q in automaton.accepting
        frame = {"boxstyle": "round,pad=0.25", "facecolor": "#d9f0e6", "edgecolor": "black"} if accepts else None
        axes.text(t, 0, str(q), ha="center", va="center", fontsize=8, bbox=frame)
    axes.set(ylim=(-0.5, 0.5), yticks=[0], yticklabels=["state"])
    axes.tick_params(length=0)


def example_word(automaton: Automaton, length: int = 20) -> Int[np.ndarray, "T"]:
    """Return letters that take the transitions in turn, those that there is no way back from late, and end accepted.

    Plain letters are preferred. It ends early where nothing but what is rejected for good can follow.
    """
    rows, sink, q = automaton.table.tolist(), sink_of(automaton), automaton.start
    component = strong_components(automaton.table)
    taken: Counter[tuple[int, int]] = Counter()
    word: list[int] = []

    def go(r: int) -> int:
        plainness = {x: _plainness(automaton.names[x]) for x in _where(rows[q], r)}
        plain = [x for x, rank in plainness.items() if rank == min(plainness.values())]
        word.append(plain[len(word) % len(plain)])
        taken[q, r] += 1
        return r

    while len(word) < length and (targets := set(rows[q]) - {sink}):
        q = go(min(targets, key=lambda r: (taken[q, r] + 3 * (component[q] != component[r]), r != q, r)))
    for r in _shortest_path(rows, q, automaton.accepting or {q}):
        q = go(r)
    return np.array(word, dtype=np.int64)


def _shortest_path(rows: list[list[int]], q: int, goals: Set[int]) -> list[int]:
    """Return the states on a shortest path to a goal; none if there is no way, or none is needed."""
    paths = {q: []}
    todo = deque([q])
    while todo:
        q = todo.popleft()
        if q in goals:
            return paths[q]
        for r in rows[q]:
            if r not in paths:
                paths[r] = [*paths[q], r]
                todo.append(r)
    return []


def _plainness(name: str) -> int:
    kinds = (str.isdigit, str.isalpha, str.isprintable)
    return next((i for i, kind in enumerate(kinds) if len(name) == 1 and name.isascii() and kind(name)), len(kinds))


# --- letters in print -------------------------------------------------------------------------------------------------


def letter_set(automaton: Automaton, letters: Sequence[int]) -> str:
    """Write a set of letters briefly: ranges such as 0-9, "any", or "any but ..." where that is most of them."""
    rest = sorted(set(range(automaton.alphabet)) - set(letters))
    if not rest and automaton.alphabet > 1:
        return "any"
    if len(rest) < len(letters) and automaton.alphabet > 10:
        return "any but " + " ".join(_ranges(automaton.names, rest))
    return " ".join(_ranges(automaton.names, sorted(letters)))


def _ranges(names: Sequence[str], letters: Sequence[int]) -> Iterator[str]:
    """Yield letters, three or more of a kind that follow each other as one range."""
    for _, run in groupby(
        enumerate(letters), key=lambda pair: (_value(names, pair[1]) - pair[0], _kind(names, pair[1]))
    ):
        run = [x for _, x in run]
        if len(run) > 2 and _kind(names, run[0]) != "other":
            yield f"{_shown(names[run[0]])}-{_shown(names[run[-1]])}"
        else:
            yield from (_shown(names[x]) for x in run)


def _value(names: Sequence[str], x: int) -> int:
    """Return a number that grows by one from each letter of a range to the next."""
    name = names[x]
    return int(name) if name.isdecimal() else ord(name) if len(name) == 1 else x


def _kind(names: Sequence[str], x: int) -> str:
    name = names[x]
    if len(names) == 256 and name.startswith("\\x"):
        return "bytes"
    if name.isdigit() or len(name) > 1 or not name.isalnum():
        return "digits" if name.isdigit() else "other"
    return "capitals" if name.isupper() else "small letters"


def _shown(name: str) -> str:
    return drawable({" ": "␣", "\\\\": "\\"}.get(name, name))


def _label(text: str) -> str:
    """Break a label into lines, cut it if it is long, and keep Graphviz from reading anything into it."""
    lines = textwrap.wrap(text, LINE, break_on_hyphens=False) or [text]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], lines[MOST_LINES - 1] + " …"]
    return "\n".join(f" {line} " for line in lines).replace("\\", "\\\\")


# --- Graphviz ---------------------------------------------------------------------------------------------------------


def _graph(**options: str) -> Any:
    try:
        from pygraphviz import AGraph
    except ImportError:
        raise UsageError(
            "pictures of states and layers need pygraphviz, which is not installed (pip install 'statetrack[pictures]')"
        ) from None
    graph = AGraph(directed=True, strict=False, fontname=FONT, fontsize="11", pad="0.15", **options)
    graph.node_attr.update(fontname=FONT, fontsize="11")
    graph.edge_attr.update(fontname=FONT, fontsize="10", arrowsize="0.7")
    return graph


def _save(graph: Any, path: Path) -> list[Path]:
    """Lay a graph out from left to right and write it twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = path.stem if path.suffix in (".png", ".svg") else path.name
    written = []
    with _fonts(), _silent():
        graph.layout(prog="dot")
        for kind, dots in (("png", "144"), ("svg", "72")):
            graph.graph_attr["dpi"] = dots
            data = graph.draw(format=kind)
            written.append(path.with_name(f"{stem}.{kind}"))
            write_atomically(written[-1], lambda p, data=data: p.write_bytes(data))
    return written


@contextmanager
def _fonts() -> Iterator[None]:
    """Let Graphviz measure and draw with the font that matplotlib brings along, the same on every machine."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "fonts.conf"
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        config.write_text(
            '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">'
            f"<fontconfig><dir>{fonts}</dir><cachedir>{folder}</cachedir></fontconfig>"
        )
        before = os.environ.get("FONTCONFIG_FILE")
        os.environ["FONTCONFIG_FILE"] = str(config)
        try:
            yield
        finally:
            if before is None:
                del os.environ["FONTCONFIG_FILE"]
            else:
                os.environ["FONTCONFIG_FILE"] = before


@contextmanager
def _silent() -> Iterator[None]:
    """Drop what C libraries write to stderr: complaints about the font configurations of other programs."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
