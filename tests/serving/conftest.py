"""A minute that does not end while a limit is counted."""

from __future__ import annotations

import types
from collections.abc import Iterator

import limits.storage.memory
import pytest


@pytest.fixture(scope="package", autouse=True)
def _one_minute() -> Iterator[None]:
    """Limits are counted in minutes of the clock on the wall. Where one turns between two requests of
    a test, the next minute admits some more, so here it is always the same moment."""
    with pytest.MonkeyPatch.context() as patch:
        still = types.SimpleNamespace(time=lambda: 1_800_000_030.0)
        patch.setattr(limits.storage.memory, "time", still)
        yield
