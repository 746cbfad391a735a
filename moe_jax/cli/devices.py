"""Commands and options about devices: many of them, and a check of this machine's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from moe_jax.cli.output import AsJson, library_errors_exit_2, notes, out, print_json

app = typer.Typer()

# A fresh interpreter, since the number of CPU devices is fixed once JAX has looked at them.
_WITH_DEVICES = """
import jax, sys
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", int(sys.argv.pop(1)))
from moe_jax.cli import main
main()
"""


@app.command()
def verify(
    devices: Annotated[
        int | None, typer.Option(min=1, help="Number of devices, simulated on CPU. Default: all.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Compile for an accelerator that need not be here: v5e:2x4, v5p:2x2x1, v6e:2x4, "
            "h100, h100x8. Runs nothing."
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="With --target: small, mixtral, olmoe or deepseek_v3. Default: small.",
        ),
    ] = None,
    d_model: Annotated[int | None, typer.Option(min=1, help="With --target: D.")] = None,
    d_ff: Annotated[int | None, typer.Option(min=1, help="With --target: F.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="With --target: E.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="With --target: experts per token.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="With --target: tokens of one device.")
    ] = None,
    implementations: Annotated[
        str | None,
        typer.Option(
            help="With --target: what runs the experts, separated by commas, such as default,ragged. "
            "Default: the library's choice and all others that can run there."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine: all ways of running experts agree, nothing leaks, N devices equal one.

    With --target, compile for an accelerator instead: work against that of the rows in use, kernels,
    collectives, memory of each device and whether it fits, for a layer and for a training step.

    Exit code 1 if a check fails.
    """
    sizes = dict(d_model=d_model, d_ff=d_ff, num_experts=num_experts, k=k, tokens=tokens)
    with library_errors_exit_2():
        of_target = {"layer": layer, **sizes, "implementations": implementations}
        _check_target_options(target, devices, of_target)
    if target is not None:
        from moe_jax.cli.target_report import print_verification

        print_verification(
            target,
            layer=layer or "small",
            sizes=sizes,
            implementations=implementations,
            as_json=as_json,
        )
        return
    import jax

    if devices is not None and devices > jax.device_count():
        platform = jax.default_backend()
        if platform != "cpu":
            notes.print(f"{jax.device_count()} {platform} devices here: on {devices} of the CPU.")
        again = ["verify", "--devices", str(devices), *(["--json"] if as_json else [])]
        command = [sys.executable, "-c", _WITH_DEVICES, str(devices), *again]
        raise typer.Exit(subprocess.run(command, check=False).returncode)
    from moe_jax.parallel.selftest import verify as job

    with library_errors_exit_2():
        checks = job(devices)
    failed = [check for check in checks if check.passed is False]
    kind = jax.devices()[0].device_kind
    count = jax.device_count() if devices is None else devices
    if as_json:
        rows = [dataclasses.asdict(check) for check in checks]
        print_json({"device": kind, "devices": count, "ok": not failed, "checks": rows})
    else:
        table = Table(
            "", "check", "what was seen", title=f"{count} x {kind}, JAX {jax.__version__}"
        )
        words = {True: "[green]good[/green]", False: "[red]BAD[/red]", None: "[dim]-[/dim]"}
        for check in checks:
            table.add_row(words[check.passed], check.name, check.detail.replace("[", r"\["))
        out.print(table)
        said = sum(check.passed is not None for check in checks)
        out.print(
            f"{len(failed)} of {said} checks failed." if failed else f"All {said} checks hold."
        )
    if failed:
        raise typer.Exit(1)


def _check_target_options(
    target: str | None, devices: int | None, of_target: dict[str, Any]
) -> None:
    """Raises if options were given that the command would not read."""
    if target is not None and devices is not None:
        raise ValueError(
            f"--devices: expected none with --target, got {devices}. The target says how many devices "
            "there are, such as h100x8."
        )
    given = [f"--{n.replace('_', '-')}" for n, value in of_target.items() if value is not None]
    if target is None and given:
        raise ValueError(
            f"--target: expected one with {', '.join(given)}, got none. Name what to compile for, such "
            "as v5e:2x4; without it this machine is checked, which has no such options."
        )


@contextlib.contextmanager
def training_mesh(
    coordinator: str | None,
    processes: int,
    process_id: int,
    *,
    expert_devices: int | None,
    host_devices: int | None,
    patience: float,
    hint: str,
) -> Iterator[Any]:
    """The mesh that ``moe-jax train`` was asked for, None without any of the options.

    In several processes an error ends this one at once: JAX's own clean-up would wait for the others.
    """
    if (coordinator is None) != (processes == 1):
        raise ValueError(
            f"--coordinator, --processes: expected both or neither, got {coordinator!r}, {processes}. "
            "Give every process the same address of process 0."
        )
    if coordinator is None and expert_devices is None and host_devices is None:
        yield None
        return
    import jax

    if host_devices is not None:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", host_devices)
    from moe_jax.parallel.sharding import make_mesh

    def mesh() -> Any:
        devices = jax.device_count()
        experts = expert_devices or 1
        if devices % experts:
            raise ValueError(
                f"--expert-devices: expected a divisor of the {devices} devices, got {experts}."
            )
        return make_mesh(data=devices // experts, expert=experts)

    if coordinator is None:
        yield mesh()
        return
    from moe_jax.parallel.distributed import Group, process_group

    group = Group(coordinator=coordinator, processes=processes, process_id=process_id)
    try:
        # gloo writes to standard output, where a command's result belongs.
        with _stdout_to_stderr(), process_group(group, patience=patience, hint=hint):
            yield mesh()
    except Exception as error:
        sys.stderr.write(f"process {process_id} of {processes}: {type(error).__name__}: {error}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Sends what C++ code prints to standard output to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
