"""The part of ``moe-jax evaluate`` that measures checkpoints of this library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from moe_jax.cli.output import notes, out, print_json


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of this library, and not a published model.

    Raises:
        ValueError: it is neither.
    """
    if (folder / "manifest.json").is_file():
        return True
    if (folder / "config.json").is_file():
        return False
    got = "no folder" if not folder.exists() else "a file" if folder.is_file() else "neither"
    raise ValueError(
        f"{folder}: expected a checkpoint of this library (with manifest.json) or the folder of a "
        f"published model (with config.json), got {got}. Correct the path."
    )


def evaluate_checkpoint(
    folder: Path,
    *,
    data: Path | None,
    glob: str | None,
    allow_other_data: bool,
    variant: str,
    limit: int | None,
    seed: int,
    as_json: bool,
    unused: Sequence[str] = (),
) -> None:
    """Measures a checkpoint and prints the report.

    Raises:
        ValueError: ``unused`` names options that only published models take, or see
            ``moe_jax.lab.model_report.evaluate_checkpoint``.
    """
    from moe_jax.checkpoint import load_metadata
    from moe_jax.lab import model_report
    from moe_jax.lab.model_files import corpus_for

    if "model_budget" in load_metadata(folder)["metadata"]:
        raise ValueError(
            f"{folder}: expected a checkpoint of a model of this library, got a budget for a published "
            f"model, which has no text of its own. Run: moe-jax evaluate MODEL --text DIR --budget "
            f"{folder}"
        )
    if unused:
        raise ValueError(
            f"{folder}: expected --data for a checkpoint of this library, got {', '.join(unused)}, "
            "for published models. Leave them out; rules are fitted with moe-jax calibrate."
        )
    corpus = corpus_for(folder, data, glob=glob, allow_other=allow_other_data, calibrated=True)
    report = model_report.evaluate_checkpoint(
        folder,
        variant=variant,
        corpus=corpus,
        tokens=32_768 if limit is None else limit,
        seed=seed,
        console=notes,
    )
    if as_json:
        print_json(report)
    else:
        _show(report)


def _show(report: dict[str, Any]) -> None:
    low, high = report["interval"]
    trained = report["trained"]
    out.print(
        f"[bold]{report['bits_per_byte']:.4f}[/bold] bits per byte ({low:.4f} to {high:.4f}) with "
        f"{report['rule']}, on {report['tokens']:,} bytes of {report['held_out_files']} held-out "
        f"{report['data']['split']['unit']}s"
    )
    if report["change"]:
        change = report["change"]
        out.print(
            f"Against {trained['bits_per_byte']:.4f} at the trained k={trained['k']}: "
            f"{_span(change)}, {report['saving']:.1%} fewer experts. Equal quality (at most "
            f"+0.2 %): {change['verdict']}."
        )
        table = Table("control at the same mean k", "mean k", "change", "loss that the rule avoids")
        for control in report["controls"].values():
            table.add_row(
                control["label"].removesuffix(" (control)"),
                f"{control['mean_k']:.3f}",
                _span(control),
                _share(control["avoided"]),
            )
        out.print(table)
    else:
        out.print(f"The model runs at its trained k={trained['k']}: nothing is saved, no controls.")
    table = Table("layer", "target", "calibrated", "measured")
    for layer in report["layers"]:
        budget = [layer["target_mean_k"], layer["calibrated_mean_k"], layer["mean_k"]]
        table.add_row(str(layer["layer"]), *("" if k is None else f"{k:.3f}" for k in budget))
    out.print(table)
    tails = report["tails"]
    k = tails["mean_k_of_sequences"]
    out.print(
        f"Mean k of {tails['sequences']} sequences: median {k['median']:.2f}, 95th percentile "
        f"{k['p95']:.2f}, 99th {k['p99']:.2f}, largest {k['max']:.2f}."
    )
    shares = ", ".join(f"{n}: {s:.1%}" for n, s in enumerate(tails["tokens_by_experts"]) if s)
    out.print(f"Tokens by experts used: {shares}.")
    if report["change"]:
        files = tails["change_of_files"]
        out.print(
            f"Change by file: median {files['median']:+.2%}, 95th percentile {files['p95']:+.2%}, "
            f"largest {files['max']:+.2%} ({files['worst_file']}).",
            markup=False,
            soft_wrap=True,
        )


def _span(change: dict[str, Any]) -> str:
    return (
        f"{change['relative']:+.2%} ({change['relative_low']:+.2%} to "
        f"{change['relative_high']:+.2%})"
    )


def _share(avoided: list[float | None] | None) -> str:
    if avoided is None:
        return "the control loses nothing"
    share, *ends = avoided
    if share is None or None in ends:
        return "not determined"
    return f"{share:.0%} ({ends[0]:.0%} to {ends[1]:.0%})"
