"""Runs a script in a process of its own, since JAX must start with its number of host devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def environment(*, devices: int = 1) -> dict[str, str]:
    """Returns this process's environment with so many host devices, and moe_jax importable.

    Compilation is as cheap, and its cache the same, as in the tests: conftest.py sets the environment.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }


def run_script(name: str, *, devices: int) -> dict[str, Any]:
    """Returns the JSON object that a script of this folder prints on so many host devices."""
    done = subprocess.run(
        [sys.executable, str(HERE / name)],
        env=environment(devices=devices),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
