"""What every command shares: consoles, common options, errors as exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

notes = Console(stderr=True)
out = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="Configuration file (JSON).")]


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Turns the library's own errors, which say what to do, into exit code 2 without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        notes.print(f"[red]error:[/red] {plain(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(2) from None


class ToldGroup(TyperGroup):
    """A group of commands that all run in ``told()``, for those of a package that cannot import it."""

    def invoke(self, ctx: Any) -> Any:
        with told():
            return super().invoke(ctx)


def plain(error: Exception) -> str:
    """The error's text, its brackets safe from the console's markup."""
    text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
    return text.replace("[", r"\[")


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
