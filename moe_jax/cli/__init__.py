"""The ``moe-jax`` command.

Exit codes: 0 done, 1 a check said no (``config check`` on a bad file, a failed verification),
2 wrong input, with a message that says what was expected. ``--json`` prints one JSON object on
standard output and nothing else there; progress and notes go to standard error.

One file a group of commands, one line here: a file exports ``app``, and whatever it needs beyond
typer and rich is imported inside its commands, so that ``moe-jax --help`` stays quick.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

from moe_jax.bench.commands import app as bench
from moe_jax.cli import (
    backup,
    configuration,
    devices,
    experiments,
    models,
    published,
    published_experts,
    rules,
    service,
)
from moe_jax.cli.output import LibraryErrorsExit2, library_errors_exit_2, out

app = typer.Typer(
    name="moe-jax",
    help="Dynamic Mixture-of-Experts routing for JAX, with compute budgets that are held.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.add_typer(models.app)
app.add_typer(published.app)
app.add_typer(published_experts.app)
app.add_typer(service.app)
app.add_typer(experiments.app)
app.add_typer(rules.app)
app.add_typer(backup.app)
app.add_typer(devices.app)
app.add_typer(configuration.app, name="config")
app.add_typer(bench, name="bench", cls=LibraryErrorsExit2)


def _print_version(wanted: bool) -> None:
    if wanted:
        import moe_jax

        out.print(f"moe_jax {moe_jax.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Module of your own rule, to read what was saved with it; repeat for several.",
        ),
    ] = None,
) -> None:
    """Dynamic Mixture-of-Experts routing for JAX, with compute budgets that are held."""
    with library_errors_exit_2():
        for name in modules or []:
            _import_rules(name)


def _import_rules(module: str) -> None:
    """Imports a module, whose rules register themselves. Raises ValueError if it cannot be found."""
    try:
        importlib.import_module(module)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"--import: expected a module that can be imported, such as my_rules, got {module!r}: "
            f"{error}. Give it as in an import, and run in the folder that holds it."
        ) from None


@app.command()
def version() -> None:
    """Print the versions of the library and of JAX, and the devices."""
    import jax

    import moe_jax

    devices = ", ".join(str(d) for d in jax.devices())
    out.print(f"moe_jax {moe_jax.__version__}, jax {jax.__version__}, devices: {devices}")


def main() -> None:
    """Entry point of the ``moe-jax`` command."""
    # So that --rule module:Class finds the user's module: a script's path begins at its own folder.
    sys.path.append(os.getcwd())
    app()
