"""Memory of one device in an expert-parallel layer, from sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Buffer(NamedTuple):
    """An array of a program, and the first and last of its steps that need it."""

    num_bytes: int
    first: int
    last: int


def packed_bytes(buffers: Sequence[Buffer]) -> int:
    """Returns the bytes of a heap that holds all buffers, each at one place as long as it lives.

    The largest are placed first, each into the smallest gap that fits between those that live at the same
    time, as XLA does (its heap simulator, best fit by decreasing size). Gaps that nothing fits into are
    part of the result.

    Example:
        >>> packed_bytes([Buffer(4, 0, 1), Buffer(4, 1, 2), Buffer(4, 2, 3)])
        8
        >>> packed_bytes([Buffer(3, 0, 1), Buffer(3, 1, 2), Buffer(2, 2, 3), Buffer(5, 3, 3)])
        8
    """
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (-b.num_bytes, b.first)):
        beside = sorted(
            (start, start + other.num_bytes)
            for start, other in placed
            if other.first <= buffer.last and buffer.first <= other.last
        )
        gaps, end = [], 0
        for low, high in beside:
            if low - end >= buffer.num_bytes:
                gaps.append((low - end, end))
            end = max(end, high)
        start = min(gaps)[1] if gaps else end
        placed.append((start, buffer))
    return max((start + buffer.num_bytes for start, buffer in placed), default=0)
