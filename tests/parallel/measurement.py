"""Runs eight_devices.py once for all workers of a test run, beside the other tests."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax

HERE = Path(__file__).parent
# Less time in LLVM; the programs' structure, messages and arithmetic are the same.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)


def measured(base: Path) -> dict[str, Any]:
    """Returns what eight_devices.py measures, by case: runs it, or waits for the worker that does.

    Args:
        base: the run's temporary folder as the worker sees it.
    """
    # Under pytest-xdist each worker has a folder of its own below that of the run.
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    result = folder / "eight_devices.json"
    with open(folder / "eight_devices.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            result.write_text(_measure())
    return json.loads(result.read_text())


def start(base: Path) -> threading.Thread:
    """Begins to measure in a thread: minutes that no worker then waits for.

    A failure is not reported from the thread: the first test measures again and fails with it.
    """

    def quietly() -> None:
        try:
            measured(base)
        except AssertionError:
            return

    thread = threading.Thread(target=quietly, name="eight-devices")
    thread.start()
    return thread


def _measure() -> str:
    environment = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or ""),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "eight_devices.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
