"""A deadline that passes at a known moment, on a busy machine too."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from moe_jax.serving.resilience.job import Job


@contextlib.contextmanager
def passing_at_work() -> Iterator[Callable[[], object]]:
    """Inside, a caller's deadline passes as soon as its work has begun.

    A deadline of some milliseconds does the same on an idle machine; on a busy one it passes before a
    worker takes the work up, which is another case. Yields what the work calls when it begins.
    """
    begun = threading.Semaphore(0)

    def wait(job: Job, timeout: float | None) -> bool:
        assert begun.acquire(timeout=60.0), "the work did not begin"
        return job.done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "wait", wait)
        yield begun.release
