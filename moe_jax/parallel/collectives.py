"""Counts what a compiled program sends between devices, from its HLO, without running it.

The count is that of one execution on each device, so it follows the structure of the program. Of a
conditional the branch that sends most counts. The body of a loop counts as often as the compiler knows
that it runs, and once if the trip count is known at run time only (a further round of the dropless
exchange).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from moe_jax.parallel.target_hlo import loop_trips

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "s4": 4, "u4": 4}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.+)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TWO_BRANCHES = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CollectiveTraffic:
    """One kind of collective: how often it runs, and the bytes of its results on each device."""

    count: int = 0
    num_bytes: int = 0

    def __add__(self, other: CollectiveTraffic) -> CollectiveTraffic:
        return CollectiveTraffic(
            count=self.count + other.count, num_bytes=self.num_bytes + other.num_bytes
        )

    def times(self, n: int) -> CollectiveTraffic:
        """The traffic of ``n`` runs."""
        return CollectiveTraffic(count=self.count * n, num_bytes=self.num_bytes * n)


def collectives_of(compiled: Any) -> dict[str, CollectiveTraffic]:
    """Returns the collectives of a compiled function by kind; a kind that does not occur is absent.

    Args:
        compiled: ``jax.jit(f).lower(...).compile()``, or its text.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> collectives_of(jax.jit(jnp.sin).lower(jnp.ones(3)).compile())
        {}
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations, entry = _computations(text)
    trips = loop_trips(text)
    done: dict[str, Mapping[str, CollectiveTraffic]] = {}

    def of(name: str) -> Mapping[str, CollectiveTraffic]:
        if name not in done:
            done[name] = {}  # a computation never calls itself; this is for unknown names
            total: dict[str, CollectiveTraffic] = {}
            for line in computations.get(name, ()):
                for kind, traffic in _of_line(line, of, trips).items():
                    total[kind] = total.get(kind, CollectiveTraffic()) + traffic
            done[name] = total
        return done[name]

    return {kind: of(entry)[kind] for kind in KINDS if kind in of(entry)}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the instructions of each computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (body := _INSTRUCTION.match(line)):
            current.append(body[1])
    return computations, entry


def _of_line(line: str, of: Any, trips: Mapping[str, int | None]) -> dict[str, CollectiveTraffic]:
    shape, operation = _split(line)
    kind = operation.removesuffix("-start")
    if kind in KINDS:
        size = _num_bytes(shape)
        if operation.endswith("-start") and kind != "all-reduce":
            size //= 2  # the result lists the operands too
        return {kind: CollectiveTraffic(count=1, num_bytes=size)}
    branches = [b for group in _BRANCHES.findall(line) for b in re.findall(r"[\w.\-]+", group)]
    branches += _TWO_BRANCHES.findall(line)
    # One branch of a conditional runs: the one that sends most bounds the others.
    total: dict[str, CollectiveTraffic] = {}
    for branch in branches:
        for kind, traffic in of(branch).items():
            before = total.get(kind, CollectiveTraffic())
            total[kind] = CollectiveTraffic(
                count=max(before.count, traffic.count),
                num_bytes=max(before.num_bytes, traffic.num_bytes),
            )
    for called in _CALLED.findall(line):
        for kind, traffic in of(called).items():
            times = trips.get(called) if operation == "while" else None
            total[kind] = total.get(kind, CollectiveTraffic()) + traffic.times(
                1 if times is None else times
            )
    return total


def _split(line: str) -> tuple[str, str]:
    """(shape, operation) of an instruction. The shape of a tuple has brackets and spaces in it."""
    depth = 0
    for i, letter in enumerate(line):
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == " " and depth == 0:
            rest = line[i + 1 :]
            return line[:i], rest[: rest.find("(")]
    return line, ""


def _num_bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in _SHAPE.findall(shape):
        # The bits of most dtypes are the number in their name, such as bf16 or f8e4m3fn.
        digits = re.search(r"\d+", dtype)
        bits = _BITS.get(dtype, int(digits[0]) if digits else 0)
        total += math.prod(int(s) for s in sizes.split(",") if s) * bits // 8
    return total
