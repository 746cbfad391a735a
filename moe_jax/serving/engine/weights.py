"""Where the served weights come from: a checkpoint, or random numbers from a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax.checkpoint import CheckpointError, OpenCheckpoint, StoredLayer, open_checkpoint
from moe_jax.checkpoint.archive import release_of
from moe_jax.checkpoint.layers import layers_of_rule, rule_of
from moe_jax.config import Config, ConfigError, build_router
from moe_jax.experts import FeedForward
from moe_jax.layer import init_moe_layer
from moe_jax.routers import DynamicK, ExpertChoiceRouter, RandomSkip, Router
from moe_jax.routing import budget
from moe_jax.types import Params

# Estimators that need more than hidden states; a request brings nothing else.
_NEED_CONTEXT = ("attention_entropy", "gradient_norm", "surprisal", "prediction_entropy")
_CALIBRATION_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A router with what it needs to run, on the host.

    Attributes:
        router: the rule.
        params: its parameters.
        state: its state.
        experts: the expert of the model ``moe``, or None without experts.
        layer: parameters of ``moe_layer``, or None.
        trained: whether they come from a checkpoint.
        source: the checkpoint folder or the seed, for reports.
        name: name of the router in the checkpoint, such as ``layer_0``; ``untrained`` without one.
        names: names of all routers in the checkpoint.
        rules: names of its further rules that are no control.
        chosen_by: what chose this router: ``MOE_CHECKPOINT_ROUTER``, ``default`` (the checkpoint's), or
            ``no checkpoint``.
        checkpoint: 16 digits of the checkpoint's checksum; "" without one.
        release: name of the release or export that the checkpoint lies in; "" outside of one.
        layers: weights by model name, ``layer_3``, in the order of the layers, if the whole model is
            served; the router itself is among them. Empty if one router is served.
    """

    router: Router
    params: Params
    state: Any
    experts: FeedForward | None
    layer: dict[str, Params] | None
    trained: bool
    source: str
    name: str = "untrained"
    names: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()
    chosen_by: str = "no checkpoint"
    checkpoint: str = ""
    release: str = ""
    layers: Mapping[str, Weights] = dataclasses.field(default_factory=dict)


def load_weights(config: Config, checkpoint: str | None = None) -> Weights:
    """Returns the weights that a configuration names: a checkpoint's, or random ones from a seed.

    Raises:
        CheckpointError, ValueError: the checkpoint cannot be used; see the message.
        ConfigError: the configured rule cannot be served.
    """
    folder = config.serving.checkpoint if checkpoint is None else checkpoint
    weights = _from_checkpoint(config, folder) if folder else _seeded(config)
    check_servable(weights.router)
    return weights


def router_width(weights: Weights) -> int:
    """Returns D, the first axis of the router's kernel f32[D, E]."""
    return int(weights.params["kernel"].shape[0])


def _seeded(config: Config) -> Weights:
    """Returns weights from a seed, with a budget that is calibrated on normal data from the same seed.

    Without a calibration a raw score would not spread over [0, 1], and every token would have the same
    k. The combine weights are the softmax over the experts that a token uses, as the guide says. A
    checkpoint's rule keeps the weights that it was trained with.
    """
    router = _summing_to_one(build_router(config))
    check_servable(router)
    width = config.router_config.input_dim
    keys = jax.random.split(jax.random.key(config.serving.seed), 3)
    # Drawn apart from the experts, so that decisions are the same with experts and without.
    params = router.init(keys[0], width)
    experts, layer = None, None
    if config.serving.serve_moe != "off":
        experts = FeedForward()
        hidden = config.serving.expert_hidden_dim or 2 * width
        layer = init_moe_layer(router, experts, keys[2], d_model=width, d_ff=hidden)
        layer = {**layer, "router": params}
    state = router.init_state()
    if router.min_k < router.max_k:
        x = jax.random.normal(keys[1], (_CALIBRATION_TOKENS, width), jnp.float32)
        middle = (router.min_k + router.max_k) / 2
        state = router.fit(params, state, x, target_mean_k=middle)
        if isinstance(router, DynamicK):
            # Calibrated difficulty is uniform on [0, 1], so rounding gives the middle as its mean.
            steps = budget.rounding_thresholds(router.min_k, router.max_k)
            state = dataclasses.replace(state, thresholds=steps)
    return Weights(
        router=router,
        params=params,
        state=state,
        experts=experts,
        layer=layer,
        trained=False,
        source=f"untrained, seed {config.serving.seed}",
    )


def _summing_to_one(router: Router) -> Router:
    """Returns the rule with each token's weights divided by their sum.

    With softmax scores that is the softmax over the selected experts. Only for serving: in training it
    would starve the router of gradients (``warn_starved_router``).
    """
    scoring = getattr(router, "scoring", None)
    if scoring is None or scoring.renormalizes:
        return router
    return dataclasses.replace(router, scoring=dataclasses.replace(scoring, norm="sum"))  # type: ignore[type-var]


def _from_checkpoint(config: Config, folder: str) -> Weights:
    try:
        opened = open_checkpoint(folder)
    except CheckpointError as error:
        if folder != config.serving.checkpoint:
            raise
        # The message names the folder only; the operator has to know which setting named it.
        raise type(error)(f"MOE_CHECKPOINT (or --checkpoint): {error}") from error
    try:
        layer = opened.layer(config.serving.checkpoint_router or None)
    except ValueError as error:
        if not config.serving.checkpoint_router:
            raise
        raise ConfigError(
            f"MOE_CHECKPOINT_ROUTER: {str(error).removeprefix('router: ')}"
        ) from error
    served = config.serving.serve_moe != "off" and layer.layer is not None
    if config.serving.serve_moe == "on" and not served:
        raise ConfigError(
            f"serve_moe: expected a checkpoint with experts, got {folder} without any that this "
            "service can read. Set MOE_SERVE_MOE=auto, or save them with moe-jax train."
        )
    weights = _stored(opened, layer, folder)
    return dataclasses.replace(
        weights,
        experts=layer.experts if served else None,
        layer=layer.layer if served else None,
        chosen_by="MOE_CHECKPOINT_ROUTER" if config.serving.checkpoint_router else "default",
        checkpoint=str(opened.about["checksum"])[:16],
        release=release_of(opened.path),
        # A router that is named is served alone; a rule that is named, with all its layers.
        layers=(
            {} if config.serving.checkpoint_router == layer.name else _layers_of(opened, weights)
        ),
    )


def _stored(opened: OpenCheckpoint, layer: StoredLayer, folder: str) -> Weights:
    """Returns a layer of a checkpoint, without its experts."""
    routers = opened.content.routers
    rules = (rule_of(name) for name, rule in routers.items() if not isinstance(rule, RandomSkip))
    return Weights(
        router=layer.router,
        params=layer.params,
        state=layer.state,
        experts=None,
        layer=None,
        trained=True,
        source=folder,
        name=layer.name,
        names=tuple(routers),
        rules=tuple(dict.fromkeys(filter(None, rules))),
    )


def _layers_of(opened: OpenCheckpoint, weights: Weights) -> dict[str, Weights]:
    """Returns the layers that belong to the same model and rule as ``weights``, by their model names.

    Empty if there is one layer, or layers of different width: one tensor could not hold their inputs.
    """
    layers: dict[str, Weights] = {}
    for name, model in layer_models(opened.content.routers, weights.name).items():
        stored = weights if name == weights.name else None
        if stored is None:
            stored = _stored(opened, opened.layer(name), weights.source)
            check_servable(stored.router)
        layers[model] = stored
    same = len({router_width(layer) for layer in layers.values()}) == 1
    return layers if same and len(layers) > 1 else {}


def layer_models(routers: Iterable[str], chosen: str) -> dict[str, str]:
    """Returns the routers of the model that ``chosen`` is a layer of, in their order, as served.

    Example:
        >>> layer_models(["min_p/layer_10", "min_p/layer_2", "top_p/layer_2"], "min_p/layer_10")
        {'min_p/layer_2': 'layer_2', 'min_p/layer_10': 'layer_10'}
        >>> layer_models(["router"], "router")
        {}
    """
    rule = rule_of(chosen)
    if rule is None:
        return {}
    return {name: name.rpartition("/")[2] for name in layers_of_rule(routers, rule)}


def check_servable(router: Router) -> None:
    """Raises ConfigError for a rule that reads the batch, or more than a request brings."""
    if isinstance(router, ExpertChoiceRouter) or not router.traits.batch_invariant:
        raise ConfigError(
            f"router: expected a rule whose tokens do not depend on each other, got "
            f"{type(router).__name__}. Requests are padded, cut and cached, which would change its "
            "answers: use TopK, DynamicK, TopP, MinP, ExpertThreshold, ReLURouter or TopAny."
        )
    estimator = getattr(router, "difficulty", None)
    if estimator in _NEED_CONTEXT:
        raise ConfigError(
            f"complexity_estimator: expected one that looks at hidden states only, got {estimator!r}"
            f", which needs what a request does not bring. Use router_entropy, router_margin, "
            "activation_norm or large_activation_share."
        )
