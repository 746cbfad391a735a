"""Runs a declared experiment, one recipe and seed after the other, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.progress import Progress

import moe_jax
from moe_jax.checkpoint import check_free
from moe_jax.lab.calibration import calibration_blocks, find_rules
from moe_jax.lab.data import Corpus, load_corpus
from moe_jax.lab.experiments.budget_table import AS_TRAINED, budget_rows
from moe_jax.lab.experiments.cost_table import cost_rows
from moe_jax.lab.experiments.declaration import (
    Experiment,
    Recipe,
    experiment_files,
    fingerprint,
    load,
)
from moe_jax.lab.experiments.decode_table import check_decode, decode_rows
from moe_jax.lab.experiments.difficulty_table import difficulty_rows
from moe_jax.lab.experiments.drift_table import check_drift, drift_rows
from moe_jax.lab.experiments.recipes import trained_model
from moe_jax.lab.experiments.tables import write_results
from moe_jax.lab.frontier import held_out_blocks
from moe_jax.lab.progress import track

Unit = tuple[Recipe, int]


def units(experiment: Experiment) -> list[Unit]:
    """Every recipe and seed: the core first, seed by seed, then the other recipes."""
    recipes = experiment.recipes.values()
    core = [r for r in recipes if r.name in experiment.core]
    others = [r for r in recipes if r.name not in experiment.core]
    return [(r, seed) for part in (core, others) for seed in experiment.seeds for r in part]


def run_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    progress: Progress | bool = True,
    note: Callable[[str], None] = lambda text: None,
    corpus: Corpus | None = None,
    seconds: float | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Runs what is left of an experiment and writes its tables.

    Args:
        experiment: from ``declaration.load``.
        folder: of the results. A finished recipe and seed is a file in ``units/``, which a later call
            reuses if the declaration still says the same of it; models are in ``models/``.
        progress: see ``moe_jax.lab.training.train``.
        note: called with a line of text for each finished unit.
        corpus: the text; None is the standard library's source.
        seconds: start no further unit after so long; None runs all.
        command: what the report names as the command that goes on; by default that of its name.

    Returns:
        What ``results.json`` holds: see ``tables.write_results``.

    Raises:
        TypeError, ValueError: a rule, text or setting that does not exist. Nothing is trained then.
        CheckpointError: the folder cannot be written.
    """
    started = time.perf_counter()
    find_rules([name for name in experiment.rules if name != AS_TRAINED])
    find_rules(experiment.per_layer)
    check_decode(experiment)
    if experiment.kind == "drift":
        check_drift(experiment)
    _check_models(experiment)
    check_free(folder / "models" / "model", overwrite=True)
    corpus = load_corpus() if corpus is None else corpus
    todo = units(experiment)
    (folder / "units").mkdir(parents=True, exist_ok=True)
    with track(progress, experiment.name, len(todo)) as advance:
        for recipe, seed in todo:
            path = unit_file(folder, recipe, seed)
            label = f"{recipe.name}, seed {seed}"
            if finished(experiment, recipe, path) is None:
                if seconds is not None and time.perf_counter() - started > seconds:
                    break
                unit = run_unit(experiment, recipe, seed, folder, corpus, advance_note=note)
                temporary = path.with_suffix(".partial")
                temporary.write_text(json.dumps(unit) + "\n", encoding="utf-8")
                os.replace(temporary, path)
                note(f"{label}: {unit['seconds']:.0f} s")
            advance(label)
    done = list(finished_units(experiment, folder))
    return write_results(experiment, done, folder, command=command)


def _check_models(experiment: Experiment) -> None:
    """Raises ValueError if the models of a declared experiment would be trained in another way."""
    if experiment.models not in experiment_files():
        return
    theirs = load(experiment.models).recipes
    other = [name for name, recipe in experiment.recipes.items() if theirs.get(name) != recipe]
    if other:
        raise ValueError(
            f"experiment {experiment.name}: expected the recipes of {experiment.models}, whose models "
            f"it takes, got another {', '.join(other)}. Remove the line models: it then trains its own."
        )


def run_unit(
    experiment: Experiment,
    recipe: Recipe,
    seed: int,
    folder: Path,
    corpus: Corpus,
    *,
    advance_note: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Trains one recipe with one seed and measures it."""
    started = time.perf_counter()
    models = folder.parent / (experiment.models or folder.name) / "models"
    model, training = trained_model(experiment, recipe, seed, models, corpus)
    # The same text for every seed: the interval over seeds is that of training.
    sizes = {"calibration": experiment.calibration_tokens, "held_out": experiment.held_out_tokens}
    blocks = {
        "calibration": calibration_blocks(model.config, corpus, tokens=sizes["calibration"]),
        "held_out": held_out_blocks(model.config, corpus, tokens=sizes["held_out"]),
    }
    if experiment.kind == "decode":
        rows = decode_rows(experiment, model, note=advance_note, **blocks)
    elif experiment.kind == "difficulty":
        rows = difficulty_rows(experiment, model, note=advance_note, **blocks)
    elif experiment.kind == "drift":
        rows = drift_rows(
            experiment, model, calibration=blocks["calibration"], corpus=corpus, note=advance_note
        )
    elif experiment.kind == "cost":
        rows = cost_rows(experiment, model, note=advance_note, **blocks)
    else:
        rows = budget_rows(experiment, recipe, model, note=advance_note, **blocks)
    return {
        "recipe": recipe.name,
        "seed": seed,
        "fingerprint": fingerprint(experiment, recipe),
        "training": training,
        "machine": machine_note(),
        "data": corpus.describe()["fingerprint"],
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }


def unit_file(folder: Path, recipe: Recipe, seed: int) -> Path:
    """The path of the result of one recipe and seed."""
    return folder / "units" / f"{recipe.name}-{seed}.json"


def finished(experiment: Experiment, recipe: Recipe, path: Path) -> dict[str, Any] | None:
    """The unit in this file, or None without such a file or if the declaration has changed since."""
    try:
        unit = json.loads(path.read_text(encoding="utf-8"))
        stated = unit["fingerprint"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return unit if stated == fingerprint(experiment, recipe) else None


def finished_units(experiment: Experiment, folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the results in the folder that belong to the declaration as it is now, in its order."""
    for recipe, seed in units(experiment):
        unit = finished(experiment, recipe, unit_file(folder, recipe, seed))
        if unit is not None:
            yield unit


def machine_note() -> dict[str, Any]:
    """Returns what a figure's reader must know of the machine and the versions."""
    load: Sequence[float] = os.getloadavg() if hasattr(os, "getloadavg") else ()
    return {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "device": jax.devices()[0].device_kind,
        "load": round(load[0], 1) if load else None,
        "jax": jax.__version__,
        "moe_jax": moe_jax.__version__,
        "python": platform.python_version(),
    }
