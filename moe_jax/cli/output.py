"""Shared by all commands: consoles, common options, library errors as exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

notes = Console(stderr=True)
out = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of all random numbers.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Your own text: a file, or a folder of text files. Default: the standard library's "
        "source, or the checkpoint's own text."
    ),
]
Glob = Annotated[
    str | None, typer.Option(help="Files of a --data folder, such as '*.md'. Default: any text.")
]
AllowOtherData = Annotated[
    bool,
    typer.Option(
        "--allow-other-data",
        help="Use a text other than the checkpoint's own, which is refused without it.",
    ),
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file (JSON).")]


@contextlib.contextmanager
def library_errors_exit_2() -> Iterator[None]:
    """Prints the message of a library error and exits with code 2, without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        notes.print(f"[red]error:[/red] {plain(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except (MemoryError, RuntimeError) as error:
        # XLA reports memory that is not there as a RuntimeError; any other is a defect.
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        notes.print(
            "[red]error:[/red] expected enough memory, got less than this needs: "
            f"{plain(error)[:200]}. Use a smaller model, batch or text.",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(2) from None


class LibraryErrorsExit2(TyperGroup):
    """A command group in ``library_errors_exit_2``, for rooms that may not import ``cli``."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command; a library error ends the process with code 2."""
        with library_errors_exit_2():
            return super().invoke(ctx)


def plain(error: Exception) -> str:
    """The text of an error, escaped for the console's markup."""
    text = str(error)
    # The library's own OSErrors have a message; those of the system have a code and a file.
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}. Check the path and its permissions."
    return escape(text)


def moe_jax_with(context: typer.Context, *rules: str | None) -> str:
    """Returns ``moe-jax``, with the imports that reading a checkpoint of these rules takes.

    Args:
        context: of the running command; its ``--import`` is needed again.
        *rules: values of ``--rule``; those of the form ``module:Class`` need their module.
    """
    given = context.find_root().params.get("modules") or []
    modules = [*given, *(rule.partition(":")[0] for rule in rules if rule and ":" in rule)]
    return " ".join(["moe-jax", *(f"--import {module}" for module in dict.fromkeys(modules))])


def numbers(option: str, text: str) -> list[int]:
    """Returns the whole numbers from 0 of an option such as ``--seeds 0,1,2``.

    Raises:
        ValueError: something else, or a number twice.
    """
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if not values or len(set(values)) < len(values) or not 0 <= min(values) <= max(values) < 2**31:
        raise ValueError(
            f"{option}: expected different numbers from 0 with commas between them, such as 0,1,2, got "
            f"{text!r}. Correct it."
        )
    return values


def print_json(value: Any) -> None:
    """Prints one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
