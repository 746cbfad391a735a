"""Commands about declared experiments: experiment, results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_jax.cli.output import AsJson, library_errors_exit_2, notes, numbers, out, print_json

app = typer.Typer()

Folder = Annotated[
    Path, typer.Option("--out", help="Folder of all experiments; each has its own inside.")
]


@app.command()
def experiment(
    name: Annotated[str, typer.Argument(help="A name in configs/experiments, or a JSON file.")],
    folder: Folder = Path("runs/experiments"),
    rule: Annotated[
        list[str] | None,
        typer.Option(help="Measure these rules instead, such as top_p or your module:Class."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds instead of the declared ones, such as 0,1,2.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Start no further run after so many minutes.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a declared experiment; a run that was stopped goes on where it was."""
    import dataclasses
    import shlex

    from rich.markdown import Markdown

    from moe_jax.lab.experiments.declaration import load
    from moe_jax.lab.experiments.runner import run_experiment

    with library_errors_exit_2():
        declared = load(name)
        if rule:
            declared = dataclasses.replace(declared, rules=tuple(rule), per_layer=())
        if seeds is not None:
            declared = dataclasses.replace(declared, seeds=tuple(numbers("--seeds", seeds)))
        place = folder / declared.name
        words = ["moe-jax", "experiment", name]
        words += [word for one in rule or [] for word in ("--rule", one)]
        words += [] if seeds is None else ["--seeds", seeds]
        results = run_experiment(
            declared,
            place,
            progress=notes.is_terminal,
            note=lambda text: notes.print(text, highlight=False),
            seconds=None if minutes is None else 60 * minutes,
            command=shlex.join(words),
        )
    if as_json:
        print_json({"folder": str(place), "done": results["done"], "planned": results["planned"]})
        return
    text = (place / "results.md").read_text(encoding="utf-8")
    if out.is_terminal:
        out.print(Markdown(text))
    else:  # in a file or a pipe, Markdown is of more use than its drawing
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    out.print(f"JSON, CSV and pictures are in {place}.", markup=False, soft_wrap=True)


@app.command()
def results(
    folder: Folder = Path("runs/experiments"),
    data: Annotated[Path, typer.Option(help="Folder that keeps the results with the page.")] = Path(
        "benchmarks/results/experiments"
    ),
    page: Annotated[Path, typer.Option(help="The page to write.")] = Path("docs/experiments.md"),
) -> None:
    """Write the page of results from the experiments that were run."""
    from moe_jax.lab.experiments.tables import write_page

    with library_errors_exit_2():
        names = write_page(folder, data, page)
    out.print(f"{', '.join(names)} are in {page}", soft_wrap=True)
