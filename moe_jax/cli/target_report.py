"""``moe-jax verify --target``: what the compilers of absent accelerators make of the library."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import typer
from rich.table import Table

from moe_jax.cli.output import library_errors_exit_2, notes, out, print_json

_COLUMNS = (
    *("", "program", "experts by", "passes", "work / 1×", "temp MB", "held MB", "fits"),
    *("kernels", "sent"),
)
_LEAST_WIDTH = 140  # of a terminal for a table of them; below it a program takes two lines


def print_verification(
    name: str,
    *,
    layer: str,
    sizes: dict[str, int | None],
    implementations: str | None,
    as_json: bool,
) -> None:
    """Compiles a layer and a training step for ``name``, prints a table, and exits 1 if one fails.

    Args:
        name: the target.
        layer: a published layer's name.
        sizes: fields of ``LayerShape`` that differ from it; None keeps the layer's.
        implementations: names separated by commas, ``default`` among them; None is all that can run.
        as_json: whether to print JSON.
    """
    import jax

    from moe_jax.lab.target_verification import verify_target
    from moe_jax.parallel.target_layers import LAYERS

    # The compilers need no device, and what is compiled for is not there.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax reports every untuned shape
    names = None
    if implementations is not None:
        names = [None if n == "default" else n for n in implementations.split(",")]
    with library_errors_exit_2():
        if layer not in LAYERS:
            raise ValueError(f"--layer: expected one of {', '.join(LAYERS)}, got {layer!r}.")
        changed = {key: value for key, value in sizes.items() if value is not None}
        shape = dataclasses.replace(LAYERS[layer], **changed)
        verification = verify_target(
            name,
            shape,
            layer=layer,
            implementations=names,
            on_start=_note_start,
            on_program=_note_end,
        )
    failed = verification.failed
    if as_json:
        print_json(verification.summary())
    else:
        _print(verification)
    if failed:
        raise typer.Exit(1)


def _print(verification: Any) -> None:
    import jax

    target, excused = verification.target, verification.too_large
    title = f"compiled for {target.name}, JAX {jax.__version__}; nothing was run"
    caption = (
        f"held: arguments, results and temporaries of one device, of "
        f"{target.memory_bytes / 1e6:,.0f} MB; in brackets by the model in docs/scaling.md"
    )
    rows = [_cells(p.summary(), excused=p in excused) for p in verification.programs]
    if out.width >= _LEAST_WIDTH:
        table = Table(*_COLUMNS, title=title, caption=caption)
        for row in rows:
            table.add_row(*row)
        out.print(table)
    else:
        out.print(title)
        for row in rows:
            out.print("\n".join(_lines(row)), highlight=False, soft_wrap=True)
        out.print(caption)
    failed, unread = len(verification.failed), verification.unread
    out.print(f"{failed} default programs fail." if failed else "All default programs hold.")
    if excused:
        out.print(
            f"Programs that exceed the memory of one device: {len(excused)}. They do not count, "
            f"because the target has {len(verification.target.devices)} devices. The programs over all "
            "of them are checked."
        )
    if unread:
        out.print(
            f"The compiler did not write out the HLO of {unread} programs: their arrays and "
            "collectives were not checked, only memory and the count of operations."
        )


def _lines(cells: list[str]) -> list[str]:
    """A program's cells as a line of what it is and one of what the compiler says."""
    good, *what = cells[:4]
    figures = zip(_COLUMNS[4:], cells[4:], strict=True)
    said = ", ".join(f"{name} {cell}" for name, cell in figures if cell)
    return [f"{good} {', '.join(filter(None, what))}", f"     {said}"]


def _note_start(number: int, total: int, program: Any) -> None:
    passes = "forward + backward" if program.gradient else "forward"
    devices = "1 device" if program.devices == 1 else f"{program.devices} devices"
    _note(
        f"{number} of {total}: compiling {program.what}, {program.implementation}, {passes}, {devices}"
    )


def _note_end(program: Any) -> None:
    if program.error is not None:
        _note(f"  does not compile: {program.error[:200]}")
    elif program.refused is None and program.too_large is None:
        _note(f"  compiled in {program.seconds:.0f} s")


def _note(line: str) -> None:
    notes.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any], *, excused: bool = False) -> list[str]:
    start = [row["what"], row["implementation"]]
    bad = "[dim]-[/dim]" if excused else "[red]BAD[/red]"
    if "refused" in row:
        reason = f"refused: {row['refused']}".replace("[", r"\[")
        return ["[dim]-[/dim]", *start, "", "", "", "", "", reason, ""]
    if "too_large_mb" in row:
        held = f"> {row['too_large_mb']:,.1f}"
        return [bad, *start, row["passes"], "", "", held, "no", "not compiled", ""]
    start.append(row["passes"])
    if "error" in row:
        return [bad, *start, "", "", "", "", row["error"][:80].replace("[", r"\["), ""]
    good = "[green]good[/green]" if row["ok"] else bad
    work = "-" if row["work"] is None else f"{row['work']:.2f}"
    kernels = ", ".join(f"{count} {name}" for name, count in row["kernels"].items())
    sent = ", ".join(f"{s['count']} {kind}" for kind, s in row["collectives"].items())
    fits = "yes" if row["fits"] else "no"
    if row["expanded"]:
        kernels = "every row with every expert"
    model = f" ({row['model_held_mb']:,.1f})" if "model_held_mb" in row else ""
    held = [f"{row['temp_mb']:,.1f}", f"{row['held_mb']:,.1f}{model}", fits]
    return [good, *start, work, *held, kernels or "-", sent or "-"]
