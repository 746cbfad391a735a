"""How blocks share one budget: savings go where they change least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Name = TypeVar("Name")


def shared_budget(
    curves: Mapping[Name, Sequence[float]], *, k: float, target_mean_k: float
) -> dict[Name, float]:
    """Returns a mean k for each block whose mean over blocks is the target.

    Starting from k everywhere, the block whose change grows least takes the next step down, until the
    steps save at least what was asked for; then every saving is scaled to the target.

    Args:
        curves: by block, the squared change of its output at ``steps`` budgets from k downwards in
            equal steps; the first is k itself, with change 0, and the budget 1 is left out.
        k: the trained k of every block.
        target_mean_k: the mean over blocks, between 1 and k.

    Raises:
        ValueError: blocks have different numbers of budgets, or fewer than two.

    Example:
        >>> shared_budget({"a": [0.0, 1.0], "b": [0.0, 3.0]}, k=3.0, target_mean_k=2.5)
        {'a': 2.0, 'b': 3.0}
    """
    lengths = {len(curve) for curve in curves.values()}
    if len(lengths) != 1 or min(lengths) < 2:
        raise ValueError(
            f"curves: expected as many budgets for each block, at least two, got {sorted(lengths)}. "
            "Measure all blocks at the same budgets."
        )
    steps = lengths.pop()
    width = (k - 1.0) / steps
    level = dict.fromkeys(curves, 0)
    asked = (k - target_mean_k) * len(curves)
    # The tolerance keeps a target that is a whole number of steps from taking one step more.
    while width * sum(level.values()) < asked - 1e-9:
        open_ = [n for n in curves if level[n] + 1 < steps]
        if not open_:  # all blocks are at the last step; scaling goes between it and 1
            break
        cheapest = min(open_, key=lambda n: curves[n][level[n] + 1] - curves[n][level[n]])
        level[cheapest] += 1
    # Steps are whole, the budget is not: without this a target of 3.2 would end at 3.25.
    scale = asked / (width * sum(level.values()))
    return {n: k - scale * width * level[n] if level[n] else k for n in curves}
