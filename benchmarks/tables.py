"""How the benchmarks print what they measured: markdown tables."""

from __future__ import annotations

from typing import Any

Rows = list[dict[str, Any]]


def show(value: Any) -> str:
    """Format a cell: three significant digits of a number."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if 0 < abs(value) < 1e-2 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def table(title: str, rows: Rows) -> str:
    """Format rows as a markdown table; a column stands where its key first comes."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"## {title}", "", f"| {' | '.join(keys)} |", "|---" * len(keys) + "|"]
    return "\n".join(lines + [f"| {' | '.join(show(row.get(key, '')) for key in keys)} |" for row in rows]) + "\n"
