"""The tables of an experiment: JSON, CSV, a picture, and Markdown for ``docs/experiments.md``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_jax.lab.experiments.budget_table import AS_TRAINED, Interval, interval, worst_file
from moe_jax.lab.experiments.declaration import Experiment
from moe_jax.lab.experiments.measures import MEASURES, measured_summary, measured_table

Row = dict[str, Any]

MIX = "drop_lowest"  # the control that drops what weighs least, by chance


def write_results(
    experiment: Experiment,
    units: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    command: str = "",
) -> dict[str, Any]:
    """Writes ``results.json``, ``results.csv``, ``results.md`` and ``results.png`` into ``folder``.

    Args:
        experiment: the declaration.
        units: finished recipes and seeds, see ``runner.run_unit``.
        folder: of the results.
        command: that ran the experiment; "" is ``moe-jax experiment`` with its name.

    Returns:
        What ``results.json`` holds: ``name``, ``done`` and ``planned`` units, ``machine``, and
        ``rows``, each a mean over seeds.
    """
    rows = summary(experiment, units)
    results = {
        "name": experiment.name,
        "command": command or f"moe-jax experiment {experiment.name}",
        "kind": experiment.kind,
        "title": experiment.title,
        "question": experiment.question,
        "expectations": list(experiment.expectations),
        "reference": experiment.reference,
        "done": len(units),
        "planned": len(experiment.seeds) * len(experiment.recipes),
        "machine": dict(units[-1]["machine"]) if units else {},
        "data": units[-1]["data"] if units else "",
        "seconds": round(sum(unit["seconds"] for unit in units), 1),
        "rows": rows,
    }
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(results), indent=1, allow_nan=False) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    _write_csv(rows, folder / "results.csv")
    (folder / "results.md").write_text(markdown(results), encoding="utf-8")
    if rows and experiment.kind == "budgets":
        from moe_jax.lab.plots import frontier

        drawn = [row for row in _picture_rows(rows) if row["seeds"] > 1] or _picture_rows(rows)
        if drawn:
            frontier(drawn, folder / "results.png")
    return results


def summary(experiment: Experiment, units: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Returns a row for each recipe, rule and saving: means over seeds and their intervals.

    ``relative`` compares with the reference recipe of the same seed at its full budget, ``own`` with
    the same model at its full budget, and ``mix`` with the same model under the mix of k and k-1 at the
    same saving; all are paired by seed and text.
    """
    if experiment.kind == "decode":
        return _decode_summary(units)
    if experiment.kind in MEASURES:
        return measured_summary(experiment.kind, units)
    full = {
        unit["seed"]: unit["rows"][0] for unit in units if unit["recipe"] == experiment.reference
    }
    groups: dict[tuple[str, str, float], list[tuple[Row, Row, Mapping[str, Any]]]] = {}
    for unit in units:
        for row in unit["rows"]:
            if "skipped" not in row and unit["seed"] in full:
                key = (unit["recipe"], row["rule"], row["saving"])
                groups.setdefault(key, []).append((row, unit["rows"][0], unit))
    mixes = {
        (unit["recipe"], unit["seed"], row["saving"]): row["bits_per_byte"]
        for unit in units
        for row in unit["rows"]
        if row["rule"] == MIX and "skipped" not in row
    }
    reference = [u["training"]["cost"] for u in units if u["recipe"] == experiment.reference]
    rows = []
    for (recipe, rule, saving), members in groups.items():
        relative = interval(
            [row["bits_per_byte"] / full[u["seed"]]["bits_per_byte"] - 1 for row, _, u in members]
        )
        bounds = interval(
            [row["bits_per_byte"] / base["bits_per_byte"] - 1 for row, base, _ in members]
        )
        count = len(members)
        against = [
            row["bits_per_byte"] / mixes[recipe, u["seed"], saving] - 1
            for row, _, u in members
            if (recipe, u["seed"], saving) in mixes
        ]
        mix = interval(against) if len(against) == count and rule != MIX else None
        rows.append(
            {
                **({} if mix is None else _bounds("mix", mix)),
                "recipe": recipe,
                "rule": rule,
                "label": members[0][0]["label"],
                "control": members[0][0]["control"],
                "saving": saving,
                "seeds": count,
                "mean_k": sum(row["mean_k"] for row, _, _ in members) / count,
                "bits_per_byte": sum(row["bits_per_byte"] for row, _, _ in members) / count,
                "relative": relative.mean,
                "relative_low": relative.low,
                "relative_high": relative.high,
                "detectable": relative.detectable,
                "own": bounds.mean,
                "own_low": bounds.low,
                "own_high": bounds.high,
                "worst_file": max(worst_file(row, full[u["seed"]]) for row, _, u in members),
                "training_cost": sum(u["training"]["cost"] for _, _, u in members)
                / count
                / (sum(reference) / len(reference)),
            }
        )
    return rows


def _bounds(name: str, bounds: Interval) -> Row:
    return {name: bounds.mean, f"{name}_low": bounds.low, f"{name}_high": bounds.high}


def _decode_summary(units: Sequence[Mapping[str, Any]]) -> list[Row]:
    groups: dict[tuple[str, int], list[Row]] = {}
    for unit in units:
        for row in unit["rows"]:
            groups.setdefault((row["rule"], row["batch"]), []).append(row)
    rows = []
    for (rule, batch), members in groups.items():
        change = interval([row["relative"] for row in members])
        count = len(members)
        rows.append(
            {
                "rule": rule,
                "batch": batch,
                "seeds": count,
                "relative": change.mean,
                "relative_low": change.low,
                "relative_high": change.high,
                "detectable": change.detectable,
                **{
                    name: sum(row[name] for row in members) / count
                    for name in ("mean_k", "distinct_experts", "distinct_saving", "bits_per_byte")
                },
            }
        )
    return rows


def _finite(value: Any) -> Any:
    """The value with None for infinities, which JSON has not: the interval of a single seed."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and abs(value) == float("inf") else value


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    # The control and the trained rule have no comparison with the control.
    columns = dict.fromkeys(name for row in rows for name in row) or {"recipe": None}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _picture_rows(rows: Iterable[Row]) -> list[Row]:
    """Recipes as lines: each at the rule it serves, or under the blind mix."""
    lines = []
    rows = [row for row in rows if row["saving"]]
    several = len({row["recipe"] for row in rows}) > 1
    for row in rows:
        if several and row["rule"] not in ("top_p", MIX):
            continue
        if row["relative_high"] == float("inf"):
            continue
        control = row["rule"] == MIX
        if several and control and row["recipe"] != "fixed_4":
            continue
        lines.append(
            {
                **row,
                "rule": f"{row['recipe']}: {row['rule']}",
                "label": f"{row['recipe']}, {row['label']}",
                "achieved_saving": row["saving"],
            }
        )
    return lines


# --- the page of all results ----------------------------------------------------------------

PAGE = """# Experiments

Generated by `moe-jax results` from what `moe-jax experiment NAME` measured; do not edit. Each section
names its command. Experiments are declared in `configs/experiments`, with what was expected before the
run. Intervals are 95 % t intervals over training seeds, paired by seed. Every seed is measured on the
same held-out files, so the intervals do not contain the uncertainty of the choice of text. They are not
adjusted for the number of cells.
"""


def _command(results: Mapping[str, Any]) -> str:
    # Results that were kept before the command was noted are of declared experiments.
    return results.get("command") or f"moe-jax experiment {results['name']}"


def write_page(folder: Path, data: Path, page: Path) -> list[str]:
    """Copies the results of experiments to ``data`` and writes the page of all that are there.

    Args:
        folder: of experiments, each with its ``results.json``; one that is missing adds nothing.
        data: folder of ``NAME.json``, kept with the page.
        page: the Markdown file.

    Returns:
        The names on the page.

    Raises:
        ValueError: there are no results.
    """
    for file in sorted(folder.glob("*/results.json")):
        data.mkdir(parents=True, exist_ok=True)
        (data / f"{file.parent.name}.json").write_bytes(file.read_bytes())
    files = sorted(data.glob("*.json"))
    if not files:
        raise ValueError(
            f"results: expected NAME/results.json in {folder} or NAME.json in {data}, got neither. Run "
            "moe-jax experiment first."
        )
    page.write_text(page_of(files), encoding="utf-8")
    return [file.stem for file in files]


def page_of(files: Sequence[Path]) -> str:
    """Returns the page of these ``NAME.json``.

    Raises:
        ValueError: a file is no result of an experiment.
    """
    return "\n".join([PAGE, *map(_section, files)])


def _section(file: Path) -> str:
    try:
        return markdown(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{file}: expected the results of an experiment, as moe-jax experiment writes them, got "
            "something else. Take the file out of the folder, or run the experiment again."
        ) from None


# --- Markdown -------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Returns an experiment's section of ``docs/experiments.md``."""
    rows = results["rows"]
    machine = results["machine"]
    lines = [
        f"## {results['title']}",
        "",
        results["question"],
        "",
        f"`{_command(results)}` · {results['done']} of {results['planned']} runs "
        f"(a recipe with a seed each) · {results['seconds'] / 60:.0f} minutes of run time",
        "",
    ]
    if results["done"] < results["planned"]:
        lines += ["**Partial: the command above goes on where it stopped.**", ""]
    lines += ["Expected before the run:", ""]
    lines += [f"- {text}" for text in results["expectations"]]
    lines += ["", "Outcome:", ""]
    if not rows:
        lines.append("Not run yet.")
    elif results["kind"] in MEASURES:
        lines += [
            MEASURES[results["kind"]].note,
            "",
            *_grid(*measured_table(results["kind"], rows)),
        ]
    else:
        table = _decode_table if results["kind"] == "decode" else _budget_tables
        lines += table(results, rows)
    if machine:
        lines += [
            "",
            f"Machine: {machine['cores']} cores, {machine['processor']}, {machine['device']}, jax "
            f"{machine['jax']}, moe_jax {machine['moe_jax']}; load at the end {machine['load']}.",
        ]
    return "\n".join(lines) + "\n"


def _interval(row: Row, name: str = "relative") -> Interval:
    low, high, detectable = (row[f"{name}_low"], row[f"{name}_high"], row["detectable"])
    infinite = float("inf")
    return Interval(
        mean=row[name],
        low=-infinite if low is None else low,
        high=infinite if high is None else high,
        seeds=row["seeds"],
        detectable=infinite if detectable is None else detectable,
    )


def _grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|{'---|' * len(head)}",
        *(f"| {' | '.join(cells)} |" for cells in body),
    ]


def _budget_tables(results: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    trained = [row for row in rows if row["rule"] == AS_TRAINED and row["saving"] == 0]
    lines = [
        f"Change in bits per byte against `{results['reference']}` of the same seed at its full "
        "budget, mean over seeds with the 95 % t interval.",
        "",
        *_grid(
            ("recipe", "seeds", "bits per byte", "mean k", "change", "training cost"),
            (
                (
                    row["recipe"],
                    str(row["seeds"]),
                    f"{row['bits_per_byte']:.4f}",
                    f"{row['mean_k']:.2f}",
                    _interval(row).text if row["recipe"] != results["reference"] else "0",
                    f"{row['training_cost']:.2f}",
                )
                for row in trained
            ),
        ),
        "",
        "Training cost: rows that experts computed in training, relative to the reference.",
        "",
    ]
    savings = sorted({row["saving"] for row in rows} - {0})
    cells = {(row["recipe"], row["rule"], row["saving"]): row for row in rows}
    pairs = dict.fromkeys((row["recipe"], row["rule"]) for row in rows if row["saving"])
    if savings:
        body = []
        for recipe, rule in pairs:
            row_cells = [cells.get((recipe, rule, saving)) for saving in savings]
            label = next(row["label"] for row in row_cells if row)
            body.append(
                (recipe, label, *("–" if row is None else _interval(row).text for row in row_cells))
            )
        lines += _grid(("recipe", "rule", *(f"−{s:.0%} experts" for s in savings)), body)
        if len({recipe for recipe, _ in pairs}) == 1:
            lines += _against_mix(pairs, cells, savings)
        finite = [r["detectable"] for r in rows if r["saving"] and r["seeds"] > 1]
        if finite:
            finite.sort()
            lines += [
                "",
                "Detectable with these seeds at a power of 80 %: a difference of "
                f"{finite[len(finite) // 2]:.2%} in the median cell, {finite[-1]:.2%} in the widest.",
            ]
    return lines


def _against_mix(
    pairs: Iterable[tuple[str, str]],
    cells: Mapping[tuple[str, str, float], Row],
    savings: Sequence[float],
) -> list[str]:
    body = []
    for recipe, rule in pairs:
        row_cells = [cells.get((recipe, rule, saving), {}) for saving in savings]
        if any("mix" in row for row in row_cells):
            label = next(row["label"] for row in row_cells if row)
            texts = [_interval(row, "mix").text if "mix" in row else "–" for row in row_cells]
            body.append((label, *texts))
    head = ("rule", *(f"−{s:.0%} experts" for s in savings))
    note = (
        "Change against the mix of k and k-1 at the same saving, paired by seed; below 0 is better."
    )
    return ["", note, "", *_grid(head, body)] if body else []


def _decode_table(results: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    return _grid(
        ("rule", "batch", "seeds", "mean k", "distinct experts", "fewer", "change"),
        (
            (
                row["rule"],
                str(row["batch"]),
                str(row["seeds"]),
                f"{row['mean_k']:.2f}",
                f"{row['distinct_experts']:.1f}",
                f"{row['distinct_saving']:.1%}",
                _interval(row).text,
            )
            for row in rows
        ),
    )
