"""Whether a rule gives more experts to tokens that are hard to predict, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.lab.calibration import BATCH, find_rules, fit_layers, run_layers
from moe_jax.lab.data import TextBlocks
from moe_jax.lab.experiments.declaration import Experiment
from moe_jax.lab.language_model import nats, unembed
from moe_jax.lab.model_files import Model
from moe_jax.routers import Router, TopK
from moe_jax.routers.twin import starting_state


def difficulty_rows(
    experiment: Experiment,
    model: Model,
    *,
    calibration: TextBlocks,
    held_out: TextBlocks,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Returns a row for each rule, fitted to the declared saving, and layer.

    A row has ``rule``, ``layer``, ``mean_k`` and the rank correlations that ``measures`` names.
    """
    config = model.config
    full, _ = token_losses(model, [config.router()] * config.num_moe_layers, model.states, held_out)
    half = [TopK(num_experts=config.num_experts, k=max(1, config.k // 2), scoring=config.scoring)]
    half *= config.num_moe_layers
    states = [starting_state(r, s) for r, s in zip(half, model.states, strict=True)]
    fewer, _ = token_losses(model, half, states, held_out)
    symbols = held_out.inputs[held_out.mask]
    seen = np.bincount(calibration.inputs[calibration.mask], minlength=256) + 1
    frequency = np.log(seen)[symbols]
    target = config.k * (1.0 - experiment.savings[0])
    rows = []
    for rule in find_rules(experiment.rules):
        note(rule.label)
        routers = [rule.build(config, target)] * config.num_moe_layers
        fitted = fit_layers(model, routers, calibration, target)
        _, counts = token_losses(model, routers, fitted, held_out)
        for layer, count in enumerate(counts):
            rows.append(
                {
                    "rule": rule.label,
                    "layer": layer,
                    "mean_k": float(count.mean()),
                    "surprisal": correlation(count, full),
                    "given_frequency": partial_correlation(count, full, frequency),
                    "within_byte": correlation_within(count, full, symbols),
                    "gain": correlation_within(count, fewer - full, symbols),
                }
            )
    return rows


def token_losses(
    model: Model, routers: Sequence[Router], states: Sequence[Any], blocks: TextBlocks
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the loss of the next byte f64[N] in nats, and for each layer the experts i64[N] used."""
    padded = blocks.pad_to(BATCH)
    losses: list[np.ndarray] = []
    counts: list[list[np.ndarray]] = [[] for _ in routers]
    for i in range(0, len(padded), BATCH):
        mask = padded.mask[i : i + BATCH]
        tokens, h = jnp.asarray(padded.inputs[i : i + BATCH]), None
        for layer, (_, seen, h) in enumerate(  # noqa: B007  # the last h is read below
            run_layers(model, routers, states, tokens, jnp.asarray(mask))
        ):
            counts[layer].append(np.asarray(seen.counts)[mask])
        assert h is not None
        targets = jnp.asarray(padded.targets[i : i + BATCH])
        losses.append(np.asarray(nats(unembed(model.params, h), targets), np.float64)[mask])
    return np.concatenate(losses), [np.concatenate(part) for part in counts]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Returns Spearman's rank correlation; 0 where one of them does not vary.

    Example:
        >>> correlation(np.array([1, 2, 2, 4]), np.array([0.1, 0.3, 0.2, 9.0])).__round__(3)
        0.949
    """
    return _pearson(_ranks(a), _ranks(b))


def partial_correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> float:
    """Returns the rank correlation of a and b with the ranks of ``given`` partialled out.

    Example:
        >>> x = np.arange(100.0)
        >>> abs(partial_correlation(x + np.tile([0, 9], 50), x + np.tile([9, 0], 50), x)) > 0.9
        True
    """
    ab, ag, bg = correlation(a, b), correlation(a, given), correlation(b, given)
    scale = float(np.sqrt(max((1 - ag**2) * (1 - bg**2), 0.0)))
    return (ab - ag * bg) / scale if scale > 1e-9 else 0.0


def correlation_within(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> float:
    """Returns the correlation of ranks after each group's mean rank is taken out of both.

    Example:
        >>> group = np.repeat([0, 1], 50)
        >>> correlation_within(10 * group + np.tile([0, 1], 50), 10 * group, group)
        0.0
    """
    groups = group.astype(np.int64)
    sizes = np.maximum(np.bincount(groups), 1)

    def centred(values: np.ndarray) -> np.ndarray:
        ranks = _ranks(values)
        return ranks - (np.bincount(groups, weights=ranks) / sizes)[groups]

    return _pearson(centred(a), centred(b))


def _ranks(values: np.ndarray) -> np.ndarray:
    """f64[N]: ranks; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 1e-9 else 0.0
