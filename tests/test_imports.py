"""Imports point down: ops <- layers <- model <- what trains or runs; automata <- tasks, which know no model."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "statetrack"

# What each part may import from the package, besides itself and `errors`.
ALLOWED = {
    "errors": set(),
    "ops": set(),
    "layers": {"ops"},
    "model": {"layers"},
    "loss": set(),
    "decoding": {"model"},
    "hf": {"decoding", "layers", "loss", "model"},
    "unlock": {"convert", "hf"},
    "spectra": {"model"},
    "convert": {"artifact", "compiler", "hf", "layers", "model", "runs", "train"},
    "automata": set(),
    "tasks": {"automata"},
    "compiler": {"automata", "convert", "ops", "layers", "model", "plots", "runs"},
}
# Parts that only work with an extra, and that nothing imports when loaded.
NEEDS = {
    "statetrack.hf": {"transformers"},
    "statetrack.lm.trainer": {"transformers"},
    "statetrack.convert": set(),
    "statetrack.convert.fla": set(),
    "statetrack.convert.olmo_hybrid": set(),
    "statetrack.unlock": set(),
}
COMPILERS = ("triton", "numba")  # modules so named hold kernels, and are imported where one is chosen
BASE = {"torch", "numpy", "jaxtyping", "tyro", "rich", "matplotlib", "safetensors", "sympy"}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def imported(tree: ast.AST) -> list[tuple[str, bool]]:
    """Return every imported module's dotted name, and whether the import runs when the file is loaded."""
    at_top = {id(node) for node in ast.iter_child_nodes(tree)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.append((node.module or "", id(node) in at_top))
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    part = part_of(path)
    if part not in ALLOWED:
        return
    for name, _ in imported(ast.parse(path.read_text())):
        if name.startswith("statetrack."):
            target = name.split(".")[1]
            assert target in ALLOWED[part] | {part, "errors"}, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_extras_are_imported_only_where_needed(path: Path):
    known = BASE | {"statetrack", "recipes"} | set(sys.stdlib_module_names) | NEEDS.get(module_of(path), set())
    kernels = path.name.startswith(COMPILERS)
    for name, at_top in imported(ast.parse(path.read_text())):
        needs_compiler = name.split(".")[0] in COMPILERS or name.split(".")[-1].startswith(COMPILERS)
        if at_top and not (kernels and needs_compiler):
            assert name.split(".")[0] in known, f"{path.name} imports {name} when loaded; the base install lacks it"
            assert name not in NEEDS or module_of(path) in NEEDS, f"{path.name} imports {name} when loaded"
            assert not needs_compiler, f"{path.name} imports {name} when loaded; only where a kernel is chosen"


def test_the_check_sees_an_upward_import():
    tree = ast.parse("from statetrack.train import run\ndef f():\n    import triton\n")
    assert imported(tree) == [("statetrack.train", True), ("triton", False)]
