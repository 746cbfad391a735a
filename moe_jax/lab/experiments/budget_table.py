"""What a saving costs a model: one recipe, one seed, every rule at every budget, on unseen files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from moe_jax.lab.calibration import find_rules, fit_layers
from moe_jax.lab.data import TextBlocks
from moe_jax.lab.experiments.declaration import Experiment, Recipe
from moe_jax.lab.experiments.layer_shares import change_curves, shared_rule
from moe_jax.lab.frontier import LMEvaluation, evaluate
from moe_jax.lab.model_files import Model
from moe_jax.routers import Elastic, Router

AS_TRAINED = "as_trained"
PER_LAYER = ":by_layer"


def budget_rows(
    experiment: Experiment,
    recipe: Recipe,
    model: Model,
    *,
    calibration: TextBlocks,
    held_out: TextBlocks,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Returns a row for the model as it was trained, and one for each rule and saving.

    Rules of ``per_layer`` have further rows in which each layer has a mean k of its own.

    A row has ``rule``, ``label``, ``control``, ``saving`` (requested, against the reference's k; 0 for
    the model as trained), ``mean_k``, ``bits_per_byte``, ``mean_k_per_layer``, ``seconds``,
    ``nats_per_file``; or ``skipped`` with the reason. Savings that leave the model its full k, or less
    than one expert, have no row.
    """
    base = evaluate(model, held_out)
    rows = [_row(AS_TRAINED, "as trained", False, 0.0, base)]
    if not recipe.budgets:
        return rows
    reference_k = experiment.recipes[experiment.reference].config.k
    config = model.config
    for name in experiment.rules:
        label, control, build = _rule(name, model)
        if build is None:
            continue
        for saving in experiment.savings:
            target = reference_k * (1.0 - saving)
            if not 1.0 < target < config.k:
                continue
            note(f"{recipe.name}: {label}, -{saving:.0%}")
            routers = (build(target),) * config.num_moe_layers
            try:
                states = fit_layers(model, routers, calibration, target)
            except ValueError as error:
                rows.append({"rule": name, "saving": saving, "skipped": str(error)})
                continue
            measured = evaluate(model, held_out, routers=routers, states=states)
            rows.append(_row(name, label, control, saving, measured))
    for rule in find_rules(experiment.per_layer):
        curves = change_curves(model, rule, calibration)
        for saving in experiment.savings:
            note(f"{recipe.name}: {rule.label}, a budget for each layer, -{saving:.0%}")
            target = reference_k * (1.0 - saving)
            name = f"{rule.name}{PER_LAYER}"
            try:
                routers, states = shared_rule(model, rule, curves, calibration, target)
            except ValueError as error:
                rows.append({"rule": name, "saving": saving, "skipped": str(error)})
                continue
            measured = evaluate(model, held_out, routers=routers, states=states)
            label = f"{rule.label}, by layer"
            rows.append(_row(name, label, rule.control, saving, measured))
    return rows


def _rule(name: str, model: Model) -> tuple[str, bool, Callable[[float], Router] | None]:
    """The label of a rule, whether it is a control, and how to build it for a target mean k."""
    if name == AS_TRAINED:
        rule = model.config.router()
        return "as trained", False, (lambda target: rule) if isinstance(rule, Elastic) else None
    (rule,) = find_rules([name])
    return rule.label, rule.control, lambda target: rule.build(model.config, target)


def _row(
    rule: str, label: str, control: bool, saving: float, measured: LMEvaluation
) -> dict[str, Any]:
    return {
        "rule": rule,
        "label": label,
        "control": control,
        "saving": saving,
        "mean_k": measured.mean_k,
        "bits_per_byte": measured.bits_per_byte,
        "mean_k_per_layer": measured.mean_k_per_layer.round(4).tolist(),
        "seconds": measured.seconds,
        "nats_per_file": np.round(measured.nats_per_file, 2).tolist(),
    }


def worst_file(row: dict[str, Any], base: dict[str, Any]) -> float:
    """Returns the largest relative rise of a file's nats, among files that hold 64 bytes or more."""
    after, before = (np.asarray(r["nats_per_file"]) for r in (row, base))
    # A file of a few bytes has hardly any nats to compare with.
    large = before > 64
    return float((after[large] / before[large] - 1.0).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % t interval."""

    mean: float
    low: float
    high: float
    seeds: int
    detectable: float  # the smallest true difference that so many seeds show with a power of 80 %

    @property
    def text(self) -> str:
        """``+0.42 % (0.20 to 0.64)``, or the mean alone for one seed."""
        if self.seeds < 2:
            return f"{100 * self.mean:+.2f} %"
        return f"{100 * self.mean:+.2f} % ({100 * self.low:+.2f} to {100 * self.high:+.2f})"


def interval(values: list[float]) -> Interval:
    """Returns the mean of paired relative differences, one a seed, with its 95 % t interval.

    With one seed the interval is the whole line, and so is the detectable difference.

    Example:
        >>> round(interval([0.01, 0.012, 0.014]).low, 4), interval([0.01]).seeds
        (0.007, 1)
    """
    from scipy.special import stdtrit

    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean=mean, low=-np.inf, high=np.inf, seeds=n, detectable=np.inf)
    error = float(np.std(values, ddof=1)) / n**0.5
    wide, power = (float(stdtrit(n - 1, p)) for p in (0.975, 0.8))
    return Interval(
        mean=mean,
        low=mean - wide * error,
        high=mean + wide * error,
        seeds=n,
        detectable=(wide + power) * error,
    )
