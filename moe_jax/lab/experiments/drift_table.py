"""What a fitted budget does on text that it was not fitted on, and what steering it helps.

A model reads one text after the other in windows. Its rules were fitted on the first. Four variants:
the rules stay ``as fitted``; after each window ``update`` moves their states (``controller``); a
``DriftMonitor`` of each layer returns to the trained rule once the layer's mean k leaves its band
(``fallback``); or both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_number
from moe_jax.interop import DriftMonitor
from moe_jax.lab.calibration import (
    BATCH,
    attend,
    embed_batch,
    find_rules,
    fit_layers,
    mix,
    route,
    spread_blocks,
)
from moe_jax.lab.data import Corpus, TextBlocks
from moe_jax.lab.experiments.declaration import Experiment
from moe_jax.lab.experiments.drift_texts import check_text, drift_text
from moe_jax.lab.language_model import layer_params, nats, unembed
from moe_jax.lab.model_files import Model
from moe_jax.routers import Router
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.stats import routing_stats
from moe_jax.types import Routing

FITTED, CONTROLLER, FALLBACK = "as fitted", "controller", "fallback"
BOTH = f"{CONTROLLER} and {FALLBACK}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """What a model did in one window of the stream."""

    text: str
    tokens: int
    nats: float
    used: float  # experts, over tokens and layers
    trained_layers: float  # share of the layers that ran their trained rule


def check_drift(experiment: Experiment) -> None:
    """Raises TypeError or ValueError for texts, controllers or a fallback that cannot be run."""
    if len(experiment.savings) != 1 or not experiment.texts:
        raise ValueError(
            f"experiment {experiment.name}: expected one saving and at least one text, got "
            f"savings={list(experiment.savings)}, texts={list(experiment.texts)}. A drift experiment "
            "fits its rules once and reads every text."
        )
    for name in experiment.texts:
        check_text(name)
    known = {rule.name: rule for rule in find_rules(experiment.rules)}
    target = 1.0 - experiment.savings[0]
    for name, values in experiment.controllers.items():
        if name not in known:
            raise ValueError(
                f"controllers: expected rules among {', '.join(known)}, got {name!r}. Add it to rules, "
                "or leave its controller out."
            )
        for recipe in experiment.recipes.values():
            rule = known[name].build(recipe.config, target * recipe.config.k)
            accepted = {field.name for field in dataclasses.fields(rule)}  # pyright: ignore
            unknown = sorted(values.keys() - accepted)
            if unknown:
                raise ValueError(
                    f"controllers: {name}: expected fields among {', '.join(sorted(accepted))}, got "
                    f"{', '.join(unknown)}. Correct the name."
                )
            _steered(rule, values, target * recipe.config.k)
    unknown = sorted(experiment.fallback.keys() - {"band", "decay"})
    if unknown:
        raise ValueError(
            f"fallback: expected band and decay, got {', '.join(unknown)}. Correct the name."
        )
    for label, value in experiment.fallback.items():
        check_number(label, value)
    DriftMonitor(static=None, dynamic=None, target_mean_k=1.0, **experiment.fallback)


def drift_rows(
    experiment: Experiment,
    model: Model,
    *,
    calibration: TextBlocks,
    corpus: Corpus,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Returns a row for each rule, variant and text.

    A row has ``rule``, ``variant``, ``text``, ``mean_k`` and, as shares: ``drift`` of the mean k from
    the target, ``worst_window`` (the largest of any window, regardless of sign), ``fallback`` (layers
    that ran their trained rule) and ``change`` in bits per byte from the trained rule on this text.
    """
    config = model.config
    stream = [
        (name, spread_blocks(drift_text(name, corpus), config, experiment.held_out_tokens, 0))
        for name in experiment.texts
    ]
    trained = [config.router()] * config.num_moe_layers
    base = list(read_stream(model, stream, trained, model.states))
    target = config.k * (1.0 - experiment.savings[0])
    rows = []
    for rule in find_rules(experiment.rules):
        routers = [rule.build(config, target)] * config.num_moe_layers
        states = fit_layers(model, routers, calibration, target)
        variants: dict[str, tuple[bool, bool]] = {FITTED: (False, False)}
        steering = experiment.controllers.get(rule.name)
        if steering is not None:
            variants[CONTROLLER] = (True, False)
        if experiment.fallback:
            variants[FALLBACK] = (False, True)
            if steering is not None:
                variants[BOTH] = (True, True)
        for name, (steered, watched) in variants.items():
            note(f"{rule.label}, {name}")
            used = [_steered(r, steering or {}, target) for r in routers] if steered else routers
            band = experiment.fallback if watched else None
            windows = read_stream(
                model, stream, used, states, target=target, update=steered, fallback=band
            )
            rows += _rows(rule.label, name, list(windows), base, target, len(routers))
    return rows


def read_stream(
    model: Model,
    stream: Sequence[tuple[str, TextBlocks]],
    routers: Sequence[Router],
    states: Sequence[Any],
    *,
    target: float = 0.0,
    update: bool = False,
    fallback: Mapping[str, float] | None = None,
) -> Iterator[Window]:
    """Runs a model over texts in windows of ``BATCH`` blocks.

    Args:
        model: the trained model.
        stream: texts and their names, in order.
        routers: a rule for each layer.
        states: its fitted states.
        target: the mean k that was fitted, for the fallback.
        update: whether each window moves the states, after it was measured.
        fallback: ``band`` and ``decay`` of the monitors; None is no fallback.

    Yields:
        A ``Window`` each.
    """
    config, states = model.config, list(states)
    static = list(zip([config.router()] * len(states), model.states, strict=True))
    monitors = []
    if fallback is not None:
        monitors = [
            DriftMonitor(static=True, dynamic=False, target_mean_k=target, **fallback)
            for _ in states
        ]
    for text, blocks in stream:
        padded = blocks.pad_to(BATCH)
        for start in range(0, len(padded), BATCH):
            mask = jnp.asarray(padded.mask[start : start + BATCH])
            tokens = int(mask.sum())
            h = embed_batch(model.params, jnp.asarray(padded.inputs[start : start + BATCH]))
            used, fallen = 0.0, 0
            for index, router in enumerate(routers):
                layer = layer_params(model.params, index)
                off = bool(monitors) and monitors[index].tripped
                rule, state = static[index] if off else (router, states[index])
                h, x = attend(config, layer, h)
                routing = route(rule, layer["moe"]["router"], state, x, mask)
                h, seen = mix(config, layer, routing, h, x)
                count = float(seen.slots_used)
                used, fallen = used + count, fallen + off
                if update and not off:
                    states[index] = _updated(router, state, routing)
                if monitors and not off:
                    monitors[index].observe(count / tokens)
            targets = jnp.asarray(padded.targets[start : start + BATCH])
            losses = jnp.where(mask, nats(unembed(model.params, h), targets), 0.0)
            yield Window(
                text=text,
                tokens=tokens,
                nats=float(losses.sum()),
                used=used,
                trained_layers=fallen / len(states),
            )


@functools.partial(jax.jit, static_argnames="router")
def _updated(router: Router, state: Any, routing: Routing) -> Any:
    plan = plan_dispatch(to_assignments(routing))
    stats = routing_stats(routing, plan, observed=router.observe(state, routing))
    return router.update(state, stats)


def _steered(router: Any, values: Mapping[str, Any], target: float) -> Router:
    names = {field.name for field in dataclasses.fields(router)}
    aim = {"target_mean_k": target} if "target_mean_k" in names else {}
    return dataclasses.replace(router, **{**aim, **values})


def _rows(
    rule: str,
    variant: str,
    windows: Sequence[Window],
    base: Sequence[Window],
    target: float,
    layers: int,
) -> list[dict[str, Any]]:
    rows = []
    for text in dict.fromkeys(window.text for window in windows):
        mine = [window for window in windows if window.text == text]
        full = [window for window in base if window.text == text]
        tokens = sum(window.tokens for window in mine)
        means = np.array([window.used / window.tokens / layers for window in mine])
        mean_k = sum(window.used for window in mine) / tokens / layers
        rows.append(
            {
                "rule": rule,
                "variant": variant,
                "text": text,
                "mean_k": mean_k,
                "drift": mean_k / target - 1.0,
                "worst_window": float(np.abs(means / target - 1.0).max()),
                "fallback": sum(window.trained_layers for window in mine) / len(mine),
                "change": sum(w.nats for w in mine) / sum(w.nats for w in full) - 1.0,
            }
        )
    return rows
