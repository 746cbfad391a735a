"""Layer ratios as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_ratios(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws ratios to the floor as bars, grouped by case, with the middle half of the rounds."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["ratio"] is not None]
    counts = {r["tokens"] for r in rows}

    def case_of(row: dict[str, Any]) -> str:
        # What all bars share needs no label.
        tokens = f"T={row['tokens']} " if len(counts) > 1 else ""
        return f"{tokens}E={row['experts']}\n{row['dtype']} {row['load']}\n{row['pass']}"

    cases = list(dict.fromkeys(case_of(r) for r in rows))
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    figure = Figure(figsize=(1.6 + 1.1 * len(cases), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    colors = ["#1b5e9c", "#d98324", "#5a8f3c", "#8a5aa8", "#777777", "#b03a48", "#3aa6a0"]
    for i, name in enumerate(names):
        named = False  # a peer may have no bar in the first case
        for r in rows:
            if r["implementation"] != name:
                continue
            x = cases.index(case_of(r)) + (i - (len(names) - 1) / 2) * width
            low, high = r["spread"]
            axes.bar(
                x,
                r["ratio"],
                width * 0.92,
                color=colors[i % len(colors)],
                label=None if named else name,
            )
            named = True
            axes.plot([x, x], [low, high], color="black", linewidth=1)
            axes.text(x, high + 0.02, f"{r['ratio']:.2f}", ha="center", va="bottom", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylabel("time / dense floor")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
