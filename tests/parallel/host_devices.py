"""Runs a script in a process of its own, since JAX must start with its number of host devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Less time in LLVM; the programs' structure, messages and arithmetic are the same.
CHEAP = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(flags: str = CHEAP) -> dict[str, str]:
    """Returns this process's environment with these XLA flags and moe_jax importable.

    The compilation cache is that of the tests: conftest.py puts its folder there.
    """
    return {
        **os.environ,
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(HERE.parents[1]),
    }


def run_script(name: str, *, devices: int) -> dict[str, Any]:
    """Returns the JSON object that a script of this folder prints on so many host devices."""
    flags = f"--xla_force_host_platform_device_count={devices} {CHEAP}"
    done = subprocess.run(
        [sys.executable, str(HERE / name)],
        env=environment(flags),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)
