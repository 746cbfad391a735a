"""What the three security levels differ in: one table, each row of it observable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level:
    """A security level.

    Attributes:
        name: ``minimal``, ``standard`` or ``strict``.
        nonfinite: what NaN and inf do: ``off`` (flagged only), ``mask`` or ``reject``.
        magnitude: what values above the bound do: ``off``, ``count`` or ``reject``.
        requests_per_minute: of one client; None is no limit.
        tokens_per_minute: of one client; None is no limit.
        block_after: violations within ``block_window`` seconds that block a client; None is never.
        block_window: seconds.
        block_seconds: length of the first block; each further one is twice as long.
        block_max_seconds: longest block.
        api_key_required: whether a request without a valid key is refused.
        keyed_cache: whether cache keys are keyed (blake3) and each client has its own results.
        metrics_need_bearer: whether ``/metrics`` asks for the admin key.
        terse_errors: whether messages to clients leave details out.
    """

    name: str
    nonfinite: str
    magnitude: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    block_after: int | None
    block_window: float
    block_seconds: float
    block_max_seconds: float
    api_key_required: bool
    keyed_cache: bool
    metrics_need_bearer: bool
    terse_errors: bool


LEVELS: Mapping[str, Level] = MappingProxyType(
    {
        level.name: level
        for level in (
            Level(
                name="minimal",
                nonfinite="off",
                magnitude="off",
                requests_per_minute=None,
                tokens_per_minute=None,
                block_after=None,
                block_window=300.0,
                block_seconds=60.0,
                block_max_seconds=3600.0,
                api_key_required=False,
                keyed_cache=False,
                metrics_need_bearer=False,
                terse_errors=False,
            ),
            Level(
                name="standard",
                nonfinite="mask",
                magnitude="count",
                requests_per_minute=600,
                tokens_per_minute=2_000_000,
                block_after=10,
                block_window=300.0,
                block_seconds=60.0,
                block_max_seconds=3600.0,
                api_key_required=False,
                keyed_cache=False,
                metrics_need_bearer=False,
                terse_errors=False,
            ),
            Level(
                name="strict",
                nonfinite="reject",
                magnitude="reject",
                requests_per_minute=120,
                tokens_per_minute=400_000,
                block_after=5,
                block_window=300.0,
                block_seconds=300.0,
                block_max_seconds=3600.0,
                api_key_required=True,
                keyed_cache=True,
                metrics_need_bearer=True,
                terse_errors=True,
            ),
        )
    }
)


def level_for(
    name: str,
    *,
    nonfinite: str = "level",
    requests_per_minute: int = 0,
    tokens_per_minute: int = 0,
) -> Level:
    """The level of this name with an operator's own choices in place of its defaults.

    Args:
        name: a key of ``LEVELS``.
        nonfinite: ``level`` leaves the level's own.
        requests_per_minute, tokens_per_minute: 0 leaves the level's own.

    Example:
        >>> level_for("minimal", requests_per_minute=10).requests_per_minute
        10
    """
    level = LEVELS[name]
    if nonfinite != "level":
        level = dataclasses.replace(level, nonfinite=nonfinite)
    if requests_per_minute:
        level = dataclasses.replace(level, requests_per_minute=requests_per_minute)
    if tokens_per_minute:
        level = dataclasses.replace(level, tokens_per_minute=tokens_per_minute)
    return level
