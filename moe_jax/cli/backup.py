"""Commands for backup and recovery: export, restore, rollback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moe_jax.cli.output import AsJson, ConfigFile, library_errors_exit_2, notes, out, print_json

app = typer.Typer()

Releases = Annotated[Path, typer.Argument(help="Folder of releases that restore wrote.")]


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to create; it must not exist.")],
    config: ConfigFile = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Baseline of moe-jax bench ... --json.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write parameters, thresholds, configuration and baseline into one checksummed folder.

    Without --config the configuration is the checkpoint's own if it was saved with one, else the
    default one with the checkpoint's sizes. The environment is not read: an export must not depend
    on who makes it.
    """
    from moe_jax.checkpoint import archive
    from moe_jax.config import load_config

    with library_errors_exit_2():
        chosen = None if config is None else load_config(config, env={})
        in_file = (
            None
            if config is None
            else json.loads(config.read_text("utf-8")).get("router_config", {})
        )
        manifest = archive.export(folder, checkpoint, config=chosen, baseline=baseline)
    if as_json:
        print_json({"export": str(folder), **manifest})
    else:
        size = sum(entry["size"] for entry in manifest["files"].values())
        place = escape(str(folder))
        out.print(
            f"export in {place}: {len(manifest['files'])} files, {size:,} bytes, "
            f"release {manifest['checksum'][:16]}; next: moe-jax restore {place} --into RELEASES",
            soft_wrap=True,
        )
        for name, value in manifest["provenance"]["superseded"].items():
            if in_file is not None and name not in in_file:
                continue  # a default that nobody set is no contradiction
            notes.print(
                f"[yellow]not in force:[/yellow] router_config.{name}; the checkpoint has {value}. "
                "The service goes by the checkpoint: give the configuration its value.",
                soft_wrap=True,
                highlight=False,
            )
        if manifest["provenance"]["baseline"] is None:
            notes.print("no performance baseline in it: add --baseline FILE")


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="Export folder.")],
    releases: Annotated[Path, typer.Option("--into", help="Folder of releases.")],
    as_json: AsJson = False,
) -> None:
    """Verify an export and make it the current release of a folder of releases."""
    from moe_jax.checkpoint import archive

    with library_errors_exit_2():
        result = archive.restore(folder, releases)
    _tell(result, releases, as_json)
    if result["repaired"] and not as_json:
        out.print("The release was there already and was damaged: it was replaced.")


@app.command()
def rollback(releases: Releases, as_json: AsJson = False) -> None:
    """Make the previous release the current one again. A second rollback undoes the first."""
    from moe_jax.checkpoint import archive

    with library_errors_exit_2():
        result = archive.rollback(releases)
    _tell(result, releases, as_json)
    if not as_json:
        out.print(f"Another rollback would make {result['previous']} current again.")


def _tell(result: dict[str, Any], releases: Path, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    out.print(
        f"current release: {result['current']} (before: {result['previous'] or 'none'}), "
        f"checkpoint in {escape(str(releases))}/current/checkpoint",
        soft_wrap=True,
    )
