"""The demo over several seeds: pooled changes and ratios, with intervals over files and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import moe_jax
from moe_jax.lab import demo, plots
from moe_jax.lab.calibration import RULES
from moe_jax.lab.data import Corpus, load_corpus
from moe_jax.models.confidence import EQUAL_QUALITY, avoided_share, resampled_sums, verdict


def run_seeds(
    out: Path,
    seeds: Sequence[int],
    quick: bool = False,
    console: Console | None = None,
    *,
    settings: demo.Settings | None = None,
    corpus: Corpus | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Runs the demo once per seed, in ``out/seed_N``, and pools what was measured.

    Leaves in ``out``: the folders of the seeds, ``results.json`` and ``results.md`` (pooled) and
    ``frontier.png``.

    Args:
        out: the folder.
        seeds: seeds of model, batches and measured blocks; at least two different ones.
        quick: see ``moe_jax.lab.demo.run``.
        console: see ``moe_jax.lab.demo.run``.
        settings: see ``moe_jax.lab.demo.run``.
        corpus: see ``moe_jax.lab.demo.run``.
        resume: keep the seeds that an earlier call with the same model, text and version finished.

    Returns:
        What ``results.json`` holds: see ``pool``.

    Raises:
        ValueError: fewer than two different seeds.
        DataError, CheckpointError, RuntimeError: see ``moe_jax.lab.demo.run``.
    """
    if len(set(seeds)) < 2 or len(set(seeds)) != len(seeds):
        raise ValueError(
            f"seeds: expected at least two different numbers, such as 0,1,2, got {list(seeds)}. For "
            "one seed use --seed."
        )
    console = Console() if console is None else console
    out = Path(out).resolve()
    demo.check_place(out, quick)
    settings = settings or (demo.QUICK if quick else demo.FULL)
    corpus = load_corpus() if resume and corpus is None else corpus
    for number, seed in enumerate(seeds):
        kept = (
            corpus is not None
            and resume
            and _finished(out / f"seed_{seed}", seed, settings, corpus)
        )
        state = ", kept from an earlier run" if kept else ""
        console.print(f"seed {seed} ({number + 1} of {len(seeds)}){state}", highlight=False)
        if kept:
            continue
        demo.run(
            out / f"seed_{seed}",
            quick=quick,
            seed=seed,
            console=console,
            settings=settings,
            corpus=corpus,
        )
    results = pool([out / f"seed_{seed}" for seed in seeds])
    demo.write_results(out, results)
    (out / "results.md").write_text(markdown_table(results), encoding="utf-8")
    plots.frontier(results["rows"], out / "frontier.png", equal_quality=EQUAL_QUALITY)
    console.print(pooled_table(results))
    for sentence in pooled_sentences(results):
        console.print(sentence, highlight=False)
    return results


def _finished(folder: Path, seed: int, settings: demo.Settings, corpus: Corpus) -> bool:
    """Whether a demo of this seed, model, text and version is whole in the folder."""
    try:
        before = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        # Measurements are written last: older ones are those of another run.
        stamps = [(folder / name).stat().st_mtime for name in ("results.json", "measurements.npz")]
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(before, dict) or not isinstance(before.get("training"), dict):
        return False
    wanted = {
        "library_version": moe_jax.__version__,
        "seed": seed,
        "model": settings.model.to_json(),
        "steps": settings.steps,
        "data": corpus.describe(),
    }
    stated = {**before, "steps": before["training"].get("steps")}
    return stamps[0] <= stamps[1] and all(stated.get(n) == value for n, value in wanted.items())


def pool(folders: Sequence[Path]) -> dict[str, Any]:
    """Returns one row for each rule and saving, pooled over demos of several seeds.

    A row has ``relative``, ``relative_low`` and ``relative_high``: the change in bits per byte over the
    trained model, summed over seeds and files, with a 95 % interval from resampling both. Further
    ``relative_by_seed``, ``avoided`` and ``avoided_interval`` (see
    ``moe_jax.models.confidence.avoided_share``), ``avoided_by_seed`` for each control, the mean of
    ``achieved_saving``, and ``verdict``.

    Args:
        folders: of demos of one version, one model and one text.

    Raises:
        ValueError: the demos differ in more than their seed.
    """
    each = [json.loads((f / "results.json").read_text(encoding="utf-8")) for f in folders]
    same = ("library_version", "quick", "model", "data", "calibration_tokens")
    differ = [name for name in same if any(one[name] != each[0][name] for one in each)]
    if differ:
        raise ValueError(
            f"pool: expected demos that differ in their seed only, got different {', '.join(differ)} "
            f"in {', '.join(map(str, folders))}. Run them again with one command."
        )
    nats = []
    for folder in folders:
        with np.load(folder / "measurements.npz") as arrays:
            nats.append({name: arrays[name] for name in arrays.files})
    stacked = {name: np.stack([one[name] for one in nats]) for name in nats[0]}
    base = stacked["trained"]
    changes = {n: v - base for n, v in stacked.items() if n not in ("trained", "bytes")}
    rows = [_row(name, number, changes, base, each) for number, name in enumerate(changes)]
    return {
        **{name: each[0][name] for name in same},
        "seeds": [one["seed"] for one in each],
        "held_out_files": each[0]["held_out_files"],
        "intervals": "95 %, bootstrap over seeds and held-out files, paired with the trained model",
        "trained": {
            "k": each[0]["trained"]["k"],
            "bits_per_byte": [one["trained"]["bits_per_byte"] for one in each],
        },
        "rows": rows,
        "seconds": [one["seconds"]["total"] for one in each],
    }


def _row(
    name: str,
    number: int,
    changes: Mapping[str, np.ndarray],
    base: np.ndarray,
    each: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    change = changes[name]
    by_seed = [one["rows"][number] for one in each]
    first = by_seed[0]
    assert all(row["variant"] == name for row in by_seed)
    rise, before = resampled_sums([change, base])
    low, high = np.quantile(rise / before, (0.025, 0.975))
    avoided, intervals, shares = {}, {}, {}
    for other in each[0]["rows"]:
        theirs = changes[other["variant"]]
        if not other["control"] or other["saving"] != first["saving"] or theirs.sum() <= 0:
            continue
        share, *ends = avoided_share(change, theirs)
        avoided[other["rule"]] = share
        intervals[other["rule"]] = [end if np.isfinite(end) else None for end in ends]
        shares[other["rule"]] = [row["recovered"].get(other["rule"]) for row in by_seed]
    return {
        **{key: first[key] for key in ("variant", "rule", "label", "control", "saving")},
        "relative": float(change.sum() / base.sum()),
        "relative_low": float(low),
        "relative_high": float(high),
        "relative_by_seed": [row["relative"] for row in by_seed],
        "achieved_saving": float(np.mean([row["achieved_saving"] for row in by_seed])),
        "drift": [row["drift"] for row in by_seed],
        "verdict": verdict(float(low), float(high)),
        "avoided": avoided,
        "avoided_interval": intervals,
        "avoided_by_seed": shares,
    }


def pooled_table(results: Mapping[str, Any]) -> Table:
    """Returns the table of README: the change in bits per byte for each rule and saving."""
    rows = results["rows"]
    savings = sorted({row["saving"] for row in rows})
    table = Table(
        title=f"Change in bits per byte, %, over seeds {', '.join(map(str, results['seeds']))} and "
        f"{results['held_out_files']} held-out files",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("rule", no_wrap=True)
    for saving in savings:
        table.add_column(f"-{saving:.0%} experts", justify="right", no_wrap=True)
    for rule in dict.fromkeys(row["rule"] for row in rows):
        by_saving = {row["saving"]: row for row in rows if row["rule"] == rule}
        cells = [
            f"{100 * by_saving[s]['relative']:.2f} ({100 * by_saving[s]['relative_low']:.2f}–"
            f"{100 * by_saving[s]['relative_high']:.2f})"
            for s in savings
        ]
        table.add_row(RULES[rule].label.removesuffix(" (control)"), *cells)
    return table


def markdown_table(results: Mapping[str, Any]) -> str:
    """Returns the table in Markdown, as README shows it, with the shares avoided in its last row.

    Args:
        results: of ``pool``.
    """
    rows = results["rows"]
    savings = sorted({row["saving"] for row in rows})
    lines = [
        f"| rule | −{savings[0]:.0%} experts | "
        + " | ".join(f"−{saving:.0%}" for saving in savings[1:])
        + " |",
        "|---" * (1 + len(savings)) + "|",
    ]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        by_saving = {row["saving"]: row for row in rows if row["rule"] == rule}
        label = RULES[rule].label
        if RULES[rule].control:
            label = f"*control: {label.removesuffix(' (control)')}*"
        cells = [
            _span(*(by_saving[s][key] for key in ("relative", "relative_low", "relative_high")))
            for s in savings
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    shares = []
    for saving in savings:
        best = _best(rows, saving)
        low, high = best["avoided_interval"].get("drop_lowest", (None, None))
        share = best["avoided"].get("drop_lowest")
        ends = "–".join("unbounded" if end is None else f"{100 * end:.0f}" for end in (low, high))
        shares.append("none" if share is None else f"{100 * share:.0f} % ({ends}), {best['label']}")
    lines.append(f"| loss of the mix that the best rule avoids | {' | '.join(shares)} |")
    return "\n".join(lines) + "\n"


def _span(*values: float) -> str:
    """``0.08 (0.02–0.13)``, in %."""
    middle, low, high = (f"{100 * v:.2f}" if abs(v) < 0.05 else f"{100 * v:.1f}" for v in values)
    return f"{middle} ({low}–{high})".replace("-", "−")


def _best(rows: Sequence[Mapping[str, Any]], saving: float) -> Mapping[str, Any]:
    """The rule, not a control, that costs least at a saving."""
    return min(
        (row for row in rows if row["saving"] == saving and not row["control"]),
        key=lambda row: row["relative"],
    )


def pooled_sentences(results: Mapping[str, Any], control: str = "drop_lowest") -> list[str]:
    """Returns, for each saving, how much of a control's loss the best rule avoids, with intervals."""
    sentences = []
    rows = results["rows"]
    label = RULES[control].label.removesuffix(" (control)")
    for saving in sorted({row["saving"] for row in rows}):
        best = _best(rows, saving)
        if control not in best["avoided"]:
            continue
        ends = [
            "unbounded" if end is None else f"{end:.0%}"
            for end in best["avoided_interval"][control]
        ]
        by_seed = [
            "none" if share is None else f"{share:.0%}"
            for share in best["avoided_by_seed"][control]
        ]
        sentences.append(
            f"At -{saving:.0%}, {best['label']} avoids {best['avoided'][control]:.0%} "
            f"({ends[0]} to {ends[1]}) of the loss of the {label}; by seed: {', '.join(by_seed)}."
        )
    return sentences
