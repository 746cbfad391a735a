"""Commands and options about devices: many of them, and a check of this machine's."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import typer

app = typer.Typer()


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
    from moe_jax.sharding import make_mesh

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
    from moe_jax.distributed import Group, process_group

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
