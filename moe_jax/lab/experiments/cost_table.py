"""How much of a saving of experts becomes a saving of operations, and of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.lab.calibration import BATCH, attend, embed_batch, find_rules, fit_layers, mix, route
from moe_jax.lab.data import TextBlocks
from moe_jax.lab.experiments.declaration import Experiment
from moe_jax.lab.language_model import layer_params
from moe_jax.lab.model_files import Model
from moe_jax.routers import Router

REPETITIONS = 9


def cost_rows(
    experiment: Experiment,
    model: Model,
    *,
    calibration: TextBlocks,
    held_out: TextBlocks,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Returns a row for each rule and saving.

    A row has ``rule``, ``saving`` (requested), ``mean_k``, and what is saved against the trained rule
    as ``measures`` names it. Times are of this process's processor, so that other processes on the
    machine disturb them less than they would a clock on the wall.
    """
    config = model.config
    trained = [config.router()] * config.num_moe_layers
    base = _Run(model, trained, model.states, held_out)
    runs: dict[tuple[str, float], _Run] = {}
    for rule in find_rules(experiment.rules):
        for saving in experiment.savings:
            note(f"{rule.label}, -{saving:.0%}")
            target = config.k * (1.0 - saving)
            routers = [rule.build(config, target)] * config.num_moe_layers
            states = fit_layers(model, routers, calibration, target)
            runs[rule.label, saving] = _Run(model, routers, states, held_out)
    # All in turn, so that a slow moment of the machine meets every rule.
    for _ in range(REPETITIONS):
        for run in (base, *runs.values()):
            run.repeat()
    return [
        {
            "rule": label,
            "saving": saving,
            "mean_k": run.used / base.used * config.k,
            "activations": 1.0 - run.used / base.used,
            "flops": 1.0 - run.flops(run.used) / base.flops(base.used),
            "executed": 1.0 - run.flops(run.executed) / base.flops(base.executed),
            "cpu_time": 1.0 - run.seconds / base.seconds,
        }
        for (label, saving), run in runs.items()
    ]


class _Run:
    """The MoE layers of a model under one rule, on one batch of text, to be timed again and again."""

    def __init__(
        self, model: Model, routers: Sequence[Router], states: Sequence[Any], blocks: TextBlocks
    ) -> None:
        self._config = config = model.config
        tokens = jnp.asarray(blocks.inputs[:BATCH])
        self._mask = jnp.asarray(blocks.mask[:BATCH])
        self.used, self.executed, self.seconds = 0.0, 0.0, float("inf")
        self._layers: list[tuple[Any, ...]] = []
        h = embed_batch(model.params, tokens)
        for index, (router, state) in enumerate(zip(routers, states, strict=True)):
            layer = layer_params(model.params, index)
            h, x = attend(config, layer, h)
            self._layers.append((router, state, layer, h, x))
            h, seen = mix(config, layer, self._route(self._layers[-1]), h, x)
            self.used += float(seen.slots_used)
            self.executed += float(seen.slots_executed)

    def _route(self, layer: tuple[Any, ...]) -> Any:
        router, state, params, _, x = layer
        return route(router, params["moe"]["router"], state, x, self._mask)

    def repeat(self) -> None:
        """Runs routing and experts of every layer, and keeps the least processor time so far."""
        start = time.process_time()
        for layer in self._layers:
            _, _, params, h, x = layer
            jax.block_until_ready(mix(self._config, params, self._route(layer), h, x))
        self.seconds = min(self.seconds, time.process_time() - start)

    def flops(self, rows: float) -> float:
        """Operations of so many expert rows, and of the routers of all layers."""
        config = self._config
        gate = 2.0 * config.d_model * config.num_experts * self._mask.size * len(self._layers)
        return rows * config.experts.flops_per_row(config.d_model, config.d_ff) + gate
