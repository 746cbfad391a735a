"""Runs eight_devices.py once for all workers of a test run, beside the other tests."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import Any

from tests.parallel import host_devices


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
            measured = host_devices.run_script("eight_devices.py", devices=8)
            result.write_text(json.dumps(measured))
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
