"""The results of the demo in words: a table, and plain sentences about what was measured."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from moe_jax.lab.calibration import MAX_CALIBRATION_ERROR, RULES
from moe_jax.lab.frontier import MAX_DRIFT


def summarise(results: Mapping[str, Any], out: Path, console: Console) -> None:
    """Prints one screen: the cost of each saving, and which rules keep equal quality."""
    rows, trained = results["rows"], results["trained"]
    savings = sorted({row["saving"] for row in rows})
    table = Table(
        title=f"Change in bits per byte, %, on {results['held_out_files']} held-out files, against "
        f"{trained['bits_per_byte']:.3f} at k={trained['k']}",
        title_justify="left",
        caption_justify="left",
        caption="Each with its own 95 % paired bootstrap interval over files, not adjusted for their "
        "number. Green: equal quality. Dim: controls. ~: mean k off its target by more than 3 %.",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    # Every column fits a terminal of 80: a rule without its name would say nothing.
    table.add_column("rule", no_wrap=True)
    for saving in savings:
        table.add_column(f"-{saving:.0%} experts", justify="right", no_wrap=True)
    for rule in dict.fromkeys(row["rule"] for row in rows):
        by_saving = {row["saving"]: row for row in rows if row["rule"] == rule}
        cells = [_cell(by_saving[saving]) for saving in savings]
        label = next(iter(by_saving.values()))["label"]
        label = label.removesuffix(" (control)")
        table.add_row(*[label, *cells], style="dim" if RULES[rule].control else None)
    console.print(table)
    console.print(Panel("\n".join(findings(results)), title="Found", title_align="left"))
    seconds = results["seconds"]
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total")
    console.print(
        f"{seconds['total']:.0f} s ({parts}). Pictures and results.json in {_short(out)}."
    )
    console.print(f"Look at {_short(out / 'frontier.png')} and {_short(out / 'source.html')}.")
    console.print(
        f"Next: [bold]moe-jax calibrate {_short(out / 'model')} --rule MinP --target-saving 0.15 "
        f"--out {_short(out / 'min_p-15')}[/bold]",
        soft_wrap=True,
    )


def _cell(row: Mapping[str, Any]) -> str:
    text = (
        f"{_percent(row['relative'])} "
        f"[dim]({_percent(row['relative_low'])}–{_percent(row['relative_high'])})[/dim]"
    )
    if row["verdict"] == "equal":
        text = f"[green]{text}[/green]"
    return f"{text} ~" if row["drifted"] else text


def _percent(share: float) -> str:
    """Three digits: 0.09, -0.02, 11.1."""
    return f"{100 * share:.2f}" if abs(share) < 0.0995 else f"{100 * share:.1f}"


def findings(results: Mapping[str, Any]) -> list[str]:
    """Returns the findings as sentences, including those against the dynamic rules."""
    rows = results["rows"]
    dynamic = [row for row in rows if not row["control"]]
    limit = results["equal_quality"]

    def listed(some: Sequence[Mapping[str, Any]]) -> str:
        """``top-p -10/-20%, min-p -10%``"""
        names = []
        for label in dict.fromkeys(row["label"] for row in some):
            savings = [f"-{100 * row['saving']:.0f}" for row in some if row["label"] == label]
            names.append(f"{label} {'/'.join(savings)}%")
        return ", ".join(names) or "none"

    def with_verdict(verdict: str) -> str:
        return listed([row for row in dynamic if row["verdict"] == verdict])

    sentences = [
        f"Equal quality (interval ends at or below +{limit:.1%}): {with_verdict('equal')}.",
        f"Not shown to be equal, nor worse: {with_verdict('not shown')}.",
        f"Worse than that: {with_verdict('worse')}.",
    ]
    best = [
        min((r for r in dynamic if r["saving"] == saving), key=lambda r: r["delta"])
        for saving in sorted({r["saving"] for r in dynamic})
    ]
    for control in dict.fromkeys(name for row in best for name in row["recovered"]):
        shares = ", ".join(
            f"{_avoided(row, control)} at -{row['saving']:.0%} ({row['label']})"
            for row in best
            if control in row["recovered"]
        )
        sentences.append(f"Loss of the {_plain(control)} that the best rule avoids: {shares}.")
    top_p = [row for row in rows if row["rule"] == "top_p" and "drop_lowest" in row["recovered"]]
    if top_p:
        shares = ", ".join(
            f"{_avoided(row, 'drop_lowest')} at -{row['saving']:.0%}" for row in top_p
        )
        sentences.append(f"Loss of the {_plain('drop_lowest')} that top-p avoids: {shares}.")
    losers = [row for row in dynamic if min(row["recovered"].values(), default=1.0) <= 0]
    sentences.append(f"No better than one of the controls: {listed(losers)}.")
    drifted = [
        f"{row['label']} -{row['saving']:.0%} ({row['drift']:+.1%})"
        for row in rows
        if row["drifted"]
    ]
    sentences.append(
        f"Mean k on held-out files off its target by more than {MAX_DRIFT:.0%}: "
        f"{', '.join(drifted) or 'none'}."
    )
    missed = [
        f"{row['label']} -{row['saving']:.0%} ({row['calibrated_mean_k']:.3f} for "
        f"{row['target_mean_k']:.3f})"
        for row in rows
        if abs(row["calibrated_mean_k"] / row["target_mean_k"] - 1) > MAX_CALIBRATION_ERROR
    ]
    if missed:
        sentences.append(f"Missed their mean k on the calibration text: {', '.join(missed)}.")
    fresh = results["fresh_process"]
    sentences.append(
        f"A fresh process restored {fresh['compared']} layer rules and routed "
        f"{fresh['tokens']} bytes bit for bit the same."
    )
    return sentences


def _avoided(row: Mapping[str, Any], control: str) -> str:
    """``49% (31 to 63)``, with the 95 % interval."""
    ends = row["recovered_interval"][control]
    low, high = ("unbounded" if end is None else f"{100 * end:.0f}" for end in ends)
    return f"{row['recovered'][control]:.0%} ({low} to {high})"


def _plain(control: str) -> str:
    return RULES[control].label.removesuffix(" (control)")


def _short(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)
