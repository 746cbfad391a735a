"""``moe-jax config ...``: check and show configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from moe_jax.cli.output import (
    AsJson,
    ConfigFile,
    library_errors_exit_2,
    notes,
    out,
    plain,
    print_json,
)

app = typer.Typer(no_args_is_help=True, help="Check and show configuration.")


@app.command("check")
def config_check(
    file: Annotated[Path | None, typer.Argument(help="Configuration file (JSON).")] = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Check a configuration file as the service would; exit code 1 if it is bad, 2 if there is none."""
    from moe_jax.config import ConfigError, ConfigFileError, build_router, load_config

    if (file is None) == (config is None):
        with library_errors_exit_2():
            raise ValueError(
                f"config check: expected one file, got {'none' if file is None else 'two'}. "
                "Give FILE, or --config FILE."
            )
    file = file or config
    try:
        router = build_router(load_config(file))
    except ConfigFileError as error:
        with library_errors_exit_2():
            raise error from None
    except ConfigError as error:
        if as_json:
            print_json({"file": str(file), "ok": False, "problems": str(error).splitlines()})
        else:
            notes.print(f"[red]bad[/red] {plain(error)}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print_json({"file": str(file), "ok": True, "router": router.to_json()})
    else:
        rule = f"{type(router).__name__}, {_k_range(router)}"
        out.print(f"[green]good[/green] {escape(str(file))}: {rule}", soft_wrap=True)


def _k_range(router: Any) -> str:
    return f"{router.min_k} to {router.max_k} of {router.num_experts} experts"


@app.command("show")
def config_show(
    file: Annotated[Path | None, typer.Argument(help="Configuration file (JSON).")] = None,
    config: ConfigFile = None,
    preset: Annotated[
        str | None,
        typer.Option(help="balanced, low_latency, high_accuracy, production, training or mixed."),
    ] = None,
) -> None:
    """Print the configuration in force: environment over file over defaults; or a preset."""
    from moe_jax.config import PRESETS, load_config

    with library_errors_exit_2():
        if sum(one is not None for one in (file, config, preset)) > 1:
            raise ValueError(
                "config show: expected one file, or one --preset, or neither, got more. Leave the "
                "others out."
            )
        if preset is not None:
            if preset not in PRESETS:
                raise ValueError(
                    f"preset: expected one of {', '.join(PRESETS)}, got {preset!r}. "
                    "Leave it out to see the configuration in force."
                )
            chosen = PRESETS[preset]
        else:
            chosen = load_config(file or config)
    print_json(chosen.to_json())
