"""The file that declares an experiment, checked before anything runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moe_jax
from moe_jax.lab.lm_config import LMConfig

KINDS = ("budgets", "decode", "difficulty", "cost", "drift")
FOLDER = "configs/experiments"
PARTS = ("router", "norms")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train a model.

    Attributes:
        name: the key in the file.
        config: the model and its training.
        steps: training steps, or steps of distillation after ``base``.
        base: recipe whose trained model is frozen and distilled; "" trains from the start.
        parts: what the distillation changes: ``router``, or ``router`` and ``norms``.
        budgets: whether rules are fitted to the model; False for models that a fixed budget was
            trained into, such as ReLU routing.
    """

    name: str
    config: LMConfig
    steps: int
    base: str = ""
    parts: tuple[str, ...] = ()
    budgets: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A declared experiment. ``load`` reads it from a file.

    Attributes:
        name: of the file, without ``.json``.
        kind: ``budgets`` trains recipes and measures what each saving costs; ``decode`` measures rules
            that look at the whole batch of a decoding step; ``difficulty`` whether rules follow the
            loss of a token; ``cost`` what savings become in operations and time; ``drift`` what a
            fitted budget does on other text, with and without what steers it.
        title, question: for the report.
        expectations: what was expected before the run; printed beside the outcome.
        recipes: by name, in the order in which they are run.
        reference: the recipe that others are compared with, at its full budget.
        rules: names of ``moe_jax.lab.calibration.RULES``, ``as_trained``, or ``module:Class``.
        per_layer: those of the rules that are measured a second time with a budget for each layer, see
            ``layer_shares``.
        savings: shares of the reference's experts per token.
        seeds: of parameters and batches.
        core: recipes that run with every seed before the others run at all; so a run that is stopped
            early has compared these.
        models: another experiment whose trained models are used where recipes have the same name.
        calibration_tokens, held_out_tokens: bytes of text.
        batch_sizes, batch_rules: of ``decode``: tokens per decoding step; rules as JSON, by label.
        texts: of ``drift``, in the order of the stream: names of ``drift_texts``, or paths.
        controllers: of ``drift``: by rule, values of its fields under which ``update`` steers it.
        fallback: of ``drift``: ``band`` and ``decay`` of ``moe_jax.interop.DriftMonitor``.
    """

    name: str
    kind: str
    title: str
    question: str
    expectations: tuple[str, ...]
    recipes: Mapping[str, Recipe]
    reference: str
    rules: tuple[str, ...] = ()
    per_layer: tuple[str, ...] = ()
    savings: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    core: tuple[str, ...] = ()
    models: str = ""
    calibration_tokens: int = 8_192
    held_out_tokens: int = 32_768
    batch_sizes: tuple[int, ...] = ()
    batch_rules: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    texts: tuple[str, ...] = ()
    controllers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    fallback: Mapping[str, float] = dataclasses.field(default_factory=dict)


def experiment_files() -> dict[str, Path]:
    """Returns the declared experiments by name: of the working folder, then of the repository."""
    roots = (Path(moe_jax.__file__).resolve().parents[1], Path.cwd())
    return {p.stem: p for root in roots for p in sorted((root / FOLDER).glob("*.json"))}


def load(name: str | Path) -> Experiment:
    """Reads a declared experiment, by its name or the path of its file.

    Raises:
        ValueError: no such experiment, or a file that declares none; the field is named.
    """
    files = experiment_files()
    path = files.get(str(name), Path(name))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = f"one of {', '.join(sorted(files))} in {FOLDER}, or " if files else ""
        where = f"The declared experiments are in {FOLDER} of a clone of the repository: run there."
        raise ValueError(
            f"experiment: expected {known}the path of a JSON file, got {str(name)!r}. "
            f"{'Correct the name.' if files else where}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: expected a JSON object, got no JSON ({error}). Correct the file."
        ) from None
    return declared(path.stem, data)


def declared(name: str, data: Mapping[str, Any]) -> Experiment:
    """Returns the experiment that a JSON object declares.

    Raises:
        ValueError: an unknown or missing field, or values that do not fit.
    """
    if not isinstance(data, Mapping):
        raise ValueError(
            f"experiment {name}: expected a JSON object, got a {type(data).__name__}. See the files in "
            f"{FOLDER}."
        )
    fields = dict(data)
    accepted = {f.name for f in dataclasses.fields(Experiment)} - {"name"} | {"model", "steps"}
    unknown = sorted(set(fields) - accepted)
    missing = sorted({"kind", "title", "question", "recipes", "reference", "steps"} - set(fields))
    if unknown or missing:
        raise ValueError(
            f"experiment {name}: expected the fields {', '.join(sorted(accepted))}, got "
            f"{', '.join(unknown) or 'none'} besides, and not {', '.join(missing) or 'nothing'}."
        )
    for label, value in fields.items():
        _check_type(name, label, value)
    model, steps = fields.pop("model", {}), fields.pop("steps")
    recipes = {
        label: _recipe(label, {**model, **changes}, steps)
        for label, changes in fields.pop("recipes").items()
    }
    for recipe in recipes.values():
        if recipe.base and recipe.base not in recipes:
            raise ValueError(
                f"recipe {recipe.name}: expected base to be one of {', '.join(recipes)}, got "
                f"{recipe.base!r}."
            )
        chain = [recipe.name]
        while recipe.base in recipes:
            recipe = recipes[recipe.base]
            if recipe.name in chain:
                raise ValueError(
                    f"recipe {recipe.name}: expected a base that is trained without it, got "
                    f"{' from '.join([*chain, recipe.name])}. Leave base out of one of them."
                )
            chain.append(recipe.name)
    for label in _LISTS:
        if label in fields:
            fields[label] = tuple(fields[label])
    experiment = Experiment(name=name, recipes=recipes, **{"expectations": (), **fields})
    if experiment.kind not in KINDS or experiment.reference not in recipes:
        raise ValueError(
            f"experiment {name}: expected a kind of {', '.join(KINDS)} and a reference among "
            f"{', '.join(recipes)}, got {experiment.kind!r} and {experiment.reference!r}."
        )
    return experiment


_TEXTS = ("kind", "title", "question", "reference", "models")
_COUNTS = ("steps", "calibration_tokens", "held_out_tokens")
_OBJECTS = ("model", "recipes", "batch_rules", "controllers", "fallback")
_LISTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("expectations", "rules", "per_layer", "core", "texts"), (str,)),
    **dict.fromkeys(("seeds", "batch_sizes"), (int,)),
    "savings": (int, float),
}
_BOUNDS = {"savings": (0.0, 0.99), "seeds": (0, 2**31 - 1), "batch_sizes": (1, 2**20)}


def _check_type(name: str, label: str, value: Any) -> None:
    """Raises ValueError unless a field of a declaration has its JSON type, within its bounds."""
    if label in _TEXTS:
        good, wanted = isinstance(value, str), "a text"
    elif label in _COUNTS:
        good, wanted = type(value) is int and value > 0, "a whole number above 0"
    elif label in _OBJECTS:
        good, wanted = isinstance(value, Mapping), "an object"
        if label in ("recipes", "batch_rules", "controllers"):
            good = good and all(isinstance(one, Mapping) for one in value.values())
            wanted = "an object of objects"
    else:
        kinds = _LISTS[label]
        good = isinstance(value, list | tuple) and all(type(one) in kinds for one in value)
        wanted = f"a list of {'texts' if kinds == (str,) else 'numbers'}"
        if label in _BOUNDS:
            least, most = _BOUNDS[label]
            good = good and all(least <= one <= most for one in value)
            wanted += f" from {least} to {most}"
    if not good:
        raise ValueError(
            f"experiment {name}: {label}: expected {wanted}, got {json.dumps(value)[:80]}. See the "
            f"files in {FOLDER}."
        )


def _recipe(name: str, values: dict[str, Any], steps: int) -> Recipe:
    parts = ("router",) if "base" in values else ()
    for label, wanted in (("steps", int), ("base", str), ("parts", list), ("budgets", bool)):
        if label in values and type(values[label]) is not wanted:
            raise ValueError(
                f"recipe {name}: {label}: expected a JSON value of type {wanted.__name__}, got "
                f"{json.dumps(values[label])[:80]}."
            )
    settings = {
        "steps": values.pop("steps", steps),
        "base": values.pop("base", ""),
        "parts": tuple(values.pop("parts", parts)),
        "budgets": values.pop("budgets", True),
    }
    strange = [part for part in settings["parts"] if part not in PARTS]
    if strange or settings["steps"] < 1:
        raise ValueError(
            f"recipe {name}: expected steps of at least 1 and parts among {', '.join(PARTS)}, got "
            f"steps={settings['steps']}, parts={list(settings['parts'])}."
        )
    try:
        return Recipe(name=name, config=LMConfig.from_json(values), **settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"recipe {name}: {error}") from None


def fingerprint(experiment: Experiment, recipe: Recipe) -> str:
    """Returns 16 hex digits over everything that a recipe's results depend on, but the seed."""
    parts: list[Any] = []
    while True:
        parts.append([recipe.config.to_json(), recipe.steps, list(recipe.parts), recipe.budgets])
        if not recipe.base:
            break
        recipe = experiment.recipes[recipe.base]
    measured = [
        experiment.kind,
        list(experiment.rules),
        list(experiment.savings),
        experiment.calibration_tokens,
        experiment.held_out_tokens,
        list(experiment.batch_sizes),
        dict(experiment.batch_rules),
        experiment.recipes[experiment.reference].config.k,
    ]
    # Only what is declared counts, so that a new field leaves earlier results valid.
    later = [experiment.per_layer, experiment.texts, experiment.controllers, experiment.fallback]
    if any(later):
        measured.append([list(x) if isinstance(x, tuple) else dict(x) for x in later])
    text = json.dumps([parts, measured], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
