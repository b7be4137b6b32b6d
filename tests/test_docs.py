"""Every Python snippet and every command in the documentation works as written (training for fewer steps)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/guide.md", "docs/automata.md", "docs/compiler.md", "docs/theory.md", "docs/hf.md")


def blocks() -> list[tuple[str, str]]:
    """Return (page, code) of every Python block."""
    return [
        (page, code) for page in PAGES for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    ]


@pytest.mark.parametrize("page, code", blocks(), ids=lambda text: text if text.endswith(".md") else "")
def test_python(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = re.sub(r"steps=\d+", "steps=2", code)
    exec(compile(short, page, "exec"), {})
    promised = re.findall(r"print\(.*\)  # (\[\[.*\]\]|\(.*\)|True|False)", code)
    printed = capsys.readouterr().out
    for text in promised:
        assert text.split(":")[0] in printed


def test_readme_names_every_file():
    tree = (ROOT / "README.md").read_text().split("## Files")[1].split("## Citation")[0]
    for folder in ("statetrack", "recipes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name in tree or path.name == "__init__.py", f"{path.relative_to(ROOT)} is not in README's tree"
            assert path.parent.name + "/" in tree, f"{path.parent.name}/ is not in README's tree"
