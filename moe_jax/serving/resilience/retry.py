"""Transient errors, and one more attempt after them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from moe_jax.serving.errors import ServingError

# The status words that XLA and PJRT put first in their messages. A full device memory is temporary:
# other requests free their buffers in the meantime.
TRANSIENT_STATUS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED", "CANCELLED")
_DELAY = 0.02

T = TypeVar("T")


class BadOutput(RuntimeError):
    """Raised if the device returns values that are not finite for finite input."""


def is_transient(error: BaseException) -> bool:
    """Returns whether the same work may succeed a moment later. False for refused requests.

    Example:
        >>> is_transient(RuntimeError("RESOURCE_EXHAUSTED: out of memory"))
        True
        >>> is_transient(ValueError("RESOURCE_EXHAUSTED"))
        False
    """
    if isinstance(error, MemoryError):  # the host's; other requests' arrays are freed meanwhile
        return True
    if isinstance(error, ServingError) or not isinstance(error, RuntimeError | OSError):
        return False
    return str(error).lstrip().startswith(TRANSIENT_STATUS)


def retry_once(
    function: Callable[[], T],
    *,
    seconds_left: Callable[[], float],
    on_retry: Callable[[BaseException], None] = lambda error: None,
    sleep: Callable[[float], None] = time.sleep,
    uniform: Callable[[float, float], float] = random.uniform,
) -> T:
    """Calls the function, and once more after a transient error if time allows.

    The pause between is random, 10 to 30 ms, so that requests that failed together do not return
    together.

    Args:
        function: the work.
        seconds_left: returns the seconds until the deadline.
        on_retry: called with the error before the second attempt.
        sleep, uniform: injectable for tests.
    """
    try:
        return function()
    except Exception as error:
        pause = _DELAY * uniform(0.5, 1.5)
        if not is_transient(error) or seconds_left() <= pause:
            raise
        on_retry(error)
    sleep(pause)
    return function()
