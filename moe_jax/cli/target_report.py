"""``moe-jax verify --target``: what the compilers of absent accelerators make of the library."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import typer
from rich.table import Table

from moe_jax.cli.output import library_errors_exit_2, notes, out, print_json


def verify_target(
    name: str, *, layer: str, sizes: dict[str, int | None], implementations: str, as_json: bool
) -> None:
    """Compiles a layer and a training step for ``name``, prints a table, and exits 1 if one fails.

    Args:
        name: the target.
        layer: a published layer's name.
        sizes: fields of ``LayerShape`` that differ from it; None keeps the layer's.
        implementations: names separated by commas, ``default`` among them.
        as_json: whether to print JSON.
    """
    import jax

    # The compilers need no device, and what is compiled for is not there.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax reports every untuned shape
    with library_errors_exit_2():
        programs = list(_programs(name, layer, sizes, implementations))
    # A way of running experts that was asked for by name may be unfit here: that is what the table
    # says. What the library chooses by itself must not be.
    failed = [p for p in programs if p.implementation.startswith("default") and not p.ok]
    unread = sum(not p.readable for p in programs if p.error is None)
    if as_json:
        rows = [p.summary() for p in programs]
        print_json({"target": name, "ok": not failed, "unread": unread, "programs": rows})
    else:
        table = Table(
            *("", "program", "experts by", "passes", "work / 1×", "temp MB", "fits", "kernels"),
            "sent",
            title=f"compiled for {name}, JAX {jax.__version__}; nothing was run",
        )
        for program in programs:
            table.add_row(*_cells(program.summary()))
        out.print(table)
        out.print(
            f"{len(failed)} default programs fail." if failed else "All default programs hold."
        )
        if unread:
            out.print(
                f"The compiler did not write out the HLO of {unread} programs: their arrays and "
                "collectives were not checked, only memory and the count of operations."
            )
    if failed:
        raise typer.Exit(1)


def _programs(name: str, layer: str, sizes: dict[str, int | None], implementations: str) -> Any:
    from moe_jax.lab.target_step import training_program
    from moe_jax.parallel.target_layers import LAYERS, parallel_program, verify_experts
    from moe_jax.parallel.targets import open_target

    if layer not in LAYERS:
        raise ValueError(f"--layer: expected one of {', '.join(LAYERS)}, got {layer!r}.")
    changed = {key: value for key, value in sizes.items() if value is not None}
    shape = dataclasses.replace(LAYERS[layer], **changed)
    target = open_target(name)
    names = [None if n == "default" else n for n in implementations.split(",")]
    for program in verify_experts(target, layer, shape, implementations=names):
        yield _noted(program)
    devices = len(target.devices)
    if devices > 1 and shape.num_experts % devices == 0:
        for gradient in (False, True):
            yield _noted(parallel_program(target, layer, shape, gradient=gradient))
    yield _noted(training_program(target))


def _noted(program: Any) -> Any:
    notes.print(f"compiled {program.what}, {program.implementation}: {program.seconds:.0f} s")
    return program


def _cells(row: dict[str, Any]) -> list[str]:
    start = [row["what"], row["implementation"], row["passes"]]
    if "error" in row:
        return ["[red]BAD[/red]", *start, "", "", "", row["error"][:80].replace("[", r"\["), ""]
    good = "[green]good[/green]" if row["ok"] else "[red]BAD[/red]"
    work = "-" if row["work"] is None else f"{row['work']:.2f}"
    kernels = ", ".join(f"{count} {name}" for name, count in row["kernels"].items())
    sent = ", ".join(f"{s['count']} {kind}" for kind, s in row["collectives"].items())
    fits = "yes" if row["fits"] else "no"
    if row["expanded"]:
        kernels = "every row with every expert"
    return [good, *start, work, f"{row['temp_mb']:,.1f}", fits, kernels or "-", sent or "-"]
