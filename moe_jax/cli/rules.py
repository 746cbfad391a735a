"""The command about routing rules: rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from moe_jax.cli.output import AsJson, Seed, library_errors_exit_2, notes, out, print_json

app = typer.Typer()


@app.command()
def rules(
    rule: Annotated[
        list[str] | None, typer.Option(help="Only these; module:Class is a rule of your own.")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Train a tiny model with each: some 20 s a rule.")
    ] = False,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each smoke training.")] = 60,
    seed: Seed = 0,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="JSON that keeps the --smoke table; a stopped run continues."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show every routing rule: what it promises, its paper, and whose numbers it is compared with.

    With --smoke, exit code 1 if the routing of a rule collapsed.
    """
    from moe_jax.lab import rule_table as job

    with library_errors_exit_2():
        chosen = job.entries(rule)
        if smoke:
            rows = job.smoke(
                chosen,
                steps=steps,
                seed=seed,
                note=lambda row: notes.print(_line(row)),
                file=file,
            )
        else:
            rows = job.table(chosen)
    if as_json:
        print_json({"rules": rows})
    elif smoke:
        out.print(job.markdown(rows), markup=False, highlight=False, soft_wrap=True)
    else:
        _show(rows)
    if any(row.get("outcome") == "collapsed" for row in rows):
        raise typer.Exit(1)


def _line(row: dict[str, Any]) -> str:
    if row["outcome"] == "skipped":
        return f"{row['rule']:<20} skipped: {row['reason']}"
    return (
        f"{row['rule']:<20} {row['outcome']:<10} {row['first']:.2f} -> {row['last']:.2f} bits a byte, "
        f"mean k {row['mean_k']:.2f}, balance {row['balance']:.2f} {row['reason']}"
    )


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("rule", "causal", "of each token alone", "budget", "fitted", "source", "golden")
    for row in rows:
        table.add_row(
            row["rule"],
            *("yes" if row[name] else "no" for name in ("causal", "batch_invariant")),
            row["budget"],
            "yes" if row["calibrated"] else "",
            row["source"],
            row["golden"],
        )
    out.print(table)
