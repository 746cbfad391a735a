"""Experiments whose rows are measures of one model, each a number with an interval over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax.lab.experiments.budget_table import interval

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measures:
    """What the rows of a kind of experiment hold.

    Attributes:
        keys: columns that name a row.
        values: columns that are averaged over seeds, with their headings.
        percent: whether the values are shares, printed in percent.
        digits: of the percentages.
        note: what a reader must know of the columns.
    """

    keys: tuple[str, ...]
    values: Mapping[str, str]
    percent: bool = False
    digits: int = 1
    note: str = ""


MEASURES: dict[str, Measures] = {
    "difficulty": Measures(
        keys=("rule", "layer"),
        values={
            "surprisal": "surprisal",
            "given_frequency": "given the byte's frequency",
            "within_byte": "among equal bytes",
            "gain": "gain from full k, among equal bytes",
        },
        note="Rank correlations of a token's number of experts: with the loss of the next byte "
        "(surprisal, of the model at full k), the same with the frequency of the token's byte taken "
        "out, the same among tokens of one byte, and with what the loss falls from half the experts to "
        "all of them. 0 is no relation.",
    ),
    "cost": Measures(
        keys=("rule", "saving"),
        values={
            "activations": "expert activations",
            "flops": "FLOPs in theory",
            "executed": "FLOPs executed",
            "cpu_time": "CPU time",
        },
        percent=True,
        note="Saved by the MoE layers against the trained rule: assignments, operations of what was "
        "assigned with the router's, operations of the rows that were computed, and processor time of "
        "routing and experts (best of the repetitions, taken in turn).",
    ),
    "drift": Measures(
        keys=("rule", "variant", "text"),
        values={
            "drift": "drift of the mean k",
            "worst_window": "worst window",
            "fallback": "layers at full k",
            "change": "bits per byte",
        },
        percent=True,
        digits=2,
        note="Rules are fitted on calibration files of code and then read the texts in this order, "
        "in windows of 32 blocks. Drift is the distance of the mean k from its target; worst window "
        "is the largest distance in any window of the text. Bits per byte are compared with the "
        "model's trained rule on the same text. Rules without a controller have no row for it.",
    ),
}


def measured_summary(kind: str, units: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns a row for each combination of the keys: means over seeds with their intervals."""
    shape = MEASURES[kind]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for unit in units:
        for row in unit["rows"]:
            groups.setdefault(tuple(row[key] for key in shape.keys), []).append(row)
    rows = []
    for names, members in groups.items():
        row: Row = {**dict(zip(shape.keys, names, strict=True)), "seeds": len(members)}
        row["mean_k"] = sum(member["mean_k"] for member in members) / len(members)
        for name in shape.values:
            over_seeds = interval([member[name] for member in members])
            row[name] = over_seeds.mean
            row[f"{name}_low"], row[f"{name}_high"] = over_seeds.low, over_seeds.high
        rows.append(row)
    return rows


def measured_table(kind: str, rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Returns the headings and the cells of the table."""
    shape = MEASURES[kind]
    head = (*shape.keys, "seeds", "mean k", *shape.values.values())
    body = []
    for row in rows:
        names = [f"{row[key]:.0%}" if key == "saving" else str(row[key]) for key in shape.keys]
        cells = [_cell(row, name, shape) for name in shape.values]
        body.append((*names, str(row["seeds"]), f"{row['mean_k']:.2f}", *cells))
    return head, body


def _cell(row: Row, name: str, shape: Measures) -> str:
    def number(value: float) -> str:
        return f"{value:+.{shape.digits}%}" if shape.percent else f"{value:+.3f}"

    low, high = row[f"{name}_low"], row[f"{name}_high"]
    # One seed has no interval; JSON holds its bounds as null.
    if low is None or abs(low) == float("inf"):
        return number(row[name])
    return f"{number(row[name])} ({number(low)} to {number(high)})"
