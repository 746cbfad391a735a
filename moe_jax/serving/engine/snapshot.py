"""The snapshot: an immutable set of router, parameters, state and compiled buckets.

A request takes the snapshot once and uses nothing else, so a reload between two requests is one
assignment, and no answer mixes two checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import CheckpointError, OpenCheckpoint, StoredLayer, open_checkpoint
from moe_jax.checkpoint.archive import release_of
from moe_jax.checkpoint.description import router_sizes
from moe_jax.checkpoint.layers import layers_of_rule, rule_of
from moe_jax.config import Config, ConfigError, build_router
from moe_jax.experts import FeedForward
from moe_jax.layer import init_moe_layer
from moe_jax.routers import DynamicK, ExpertChoiceRouter, Router
from moe_jax.routing import budget
from moe_jax.serving.engine.buckets import (
    Buckets,
    Program,
    bucket_sizes,
    slots_follow_logits,
)
from moe_jax.serving.errors import ServingError
from moe_jax.types import Params

# Estimators that need more than hidden states; a request brings nothing else.
_NEED_CONTEXT = ("attention_entropy", "gradient_norm", "surprisal", "prediction_entropy")
_CALIBRATION_TOKENS = 4096
_COMPILERS = 4  # threads; XLA compiles outside of Python's lock
ALL_LAYERS = "layers"
"""The model that routes one batch of hidden states for each served layer."""


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
    chosen_by: str = "no checkpoint"
    checkpoint: str = ""
    release: str = ""
    layers: Mapping[str, Weights] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights with their compiled buckets.

    Attributes:
        weights: router, parameters, state.
        version: 16 hex digits over the rule, its parameters and its state, experts included. It
            differs between any two weights.
        models: ``router``; ``moe`` if it is served; and ``layer_3`` and the like if the whole model is.
        host_models: the same on the host's CPU, used if the device fails; None if the device is the
            host's CPU.
    """

    weights: Weights
    version: str
    models: dict[str, Buckets]
    host_models: dict[str, Buckets] | None = None

    def warm(self, check_stop: Callable[[], None] = lambda: None) -> None:
        """Compiles everything, several functions at once, and runs it once.

        Args:
            check_stop: called before each compilation and run; what it raises ends the warming, after
                the compilations under way.
        """
        models = [*self.models.values(), *(self.host_models or {}).values()]
        every = list({id(buckets): buckets for buckets in models}.values())

        def compile_one(task: tuple[Buckets, int]) -> None:
            check_stop()
            buckets, size = task
            buckets.compile(size)

        with ThreadPoolExecutor(_COMPILERS, "moe-compile") as pool:
            list(pool.map(compile_one, _largest_first(every)))
        for buckets in every:
            check_stop()
            buckets.warm()
        self.metadata  # noqa: B018 - with the versions, so that no request waits for their digests

    @property
    def router(self) -> Router:
        """The rule."""
        return self.weights.router

    def router_of(self, model: str) -> Router:
        """The rule of a model."""
        return self.models[model].program.router

    def weights_of(self, model: str) -> Weights:
        """The weights of a model."""
        return self.weights.layers.get(model, self.weights)

    @functools.cached_property
    def versions(self) -> Mapping[str, str]:
        """The version of each model; that of ``layers`` differs if that of any layer does."""
        versions = dict.fromkeys(self.names, self.version)
        for name, weights in self.weights.layers.items():
            versions[name] = version_of(weights)
        if self.weights.layers:
            versions[ALL_LAYERS] = _digits(self.version, *versions.values())
        return versions

    @property
    def served_version(self) -> str:
        """The version of everything that is served: of all layers, or of the one router."""
        return self.versions.get(ALL_LAYERS, self.version)

    def ids(self) -> dict[str, str]:
        """Returns the names of what is served: ``version``, ``checkpoint`` and ``release``."""
        weights = self.weights
        return {
            "version": self.served_version,
            "checkpoint": weights.checkpoint,
            "release": weights.release,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names that requests may ask for."""
        return (*self.models, *((ALL_LAYERS,) if self.weights.layers else ()))

    @property
    def layers(self) -> Mapping[str, Weights]:
        """Every served layer by the name that metrics give it; the one router under its own name."""
        return self.weights.layers or {self.weights.name: self.weights}

    def layer_of(self, model: str) -> str:
        """The name in ``layers`` of the layer that a model routes for."""
        if model in self.weights.layers:
            return model
        name = self.weights.name
        return name.rpartition("/")[2] if self.weights.layers else name

    @property
    def num_experts(self) -> int:
        """The largest number of experts of a served layer."""
        return max(buckets.program.router.num_experts for buckets in self.models.values())

    @property
    def trained(self) -> bool:
        """Whether the weights come from a checkpoint."""
        return self.weights.trained

    @property
    def width(self) -> int:
        """D, the width of the hidden states."""
        return self.models["router"].program.width

    def check_model(self, model: str) -> None:
        """Raises ServingError ``not_found`` unless this model is served."""
        if model in self.names:
            return
        hint = (
            "" if "moe" in self.models else " moe needs experts and MOE_SERVE_MOE other than off."
        )
        raise ServingError(
            "not_found",
            f"model: expected one of {', '.join(self.names)}, got {str(model)[:64]!r}.{hint}",
        )

    def check_layer(self, layer: str) -> str:
        """Returns the layer's name. Raises ServingError ``not_found`` unless it is served."""
        layers = self.weights.layers
        if layer in layers:
            return layer
        if layers:
            expected = f"expected one of {', '.join(layers)}"
        else:
            expected = f"expected none, because one router is served ({self.weights.name})"
        raise ServingError("not_found", f"layer: {expected}, got {str(layer)[:64]!r}.")

    @functools.cached_property
    def metadata(self) -> Mapping[str, Mapping[str, Any]]:
        """Each model in the words of the Open Inference Protocol, built once; -1 is any size."""
        return {model: self._described(model) for model in self.names}

    def _described(self, model: str) -> dict[str, Any]:
        asked = list(self.weights.layers) if model == ALL_LAYERS else [model]
        routers = [self.router_of(name) for name in asked]
        each = [len(asked)] if model == ALL_LAYERS else []
        slots = max(router.max_k for router in routers)
        tokens, width = [*each, -1, -1], self.width
        if model == "moe":
            outputs = [("output", "FP32", [*tokens, width])]
        else:
            outputs = [
                ("expert_indices", "INT32", [*tokens, slots]),
                ("expert_weights", "FP32", [*tokens, slots]),
                ("num_experts_per_token", "INT32", tokens),
                ("complexity_scores", "FP32", tokens),
                ("router_logits", "FP32", [*tokens, max(r.num_experts for r in routers)]),
            ]
        return {
            "name": model,
            "versions": [self.versions[model]],
            "platform": "jax",
            "inputs": [{"name": "hidden_states", "datatype": "FP32", "shape": [*tokens, width]}],
            "outputs": [{"name": n, "datatype": d, "shape": s} for n, d, s in outputs],
        }

    def served_as(self) -> dict[str, int]:
        """Returns the sizes of the router in the words of ``router_config``."""
        return router_sizes(self.router, self.width)


def _largest_first(every: list[Buckets]) -> list[tuple[Buckets, int]]:
    todo = [(buckets, size) for buckets in every for size in buckets.sizes]
    return sorted(todo, key=lambda one: -one[1])


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


def build_snapshot(
    config: Config, weights: Weights, *, device: Any = None, host_fallback: bool | None = None
) -> Snapshot:
    """Puts weights on the device and prepares the buckets; ``Snapshot.warm`` compiles them.

    Args:
        config: the configuration.
        weights: what to serve.
        device: None is JAX's first.
        host_fallback: whether to keep the same functions on the host's CPU; None means if that is
            another device.
    """
    device = jax.devices()[0] if device is None else device
    if host_fallback is None:
        host_fallback = device.platform != "cpu"
    host = jax.local_devices(backend="cpu")[0] if host_fallback else None
    return Snapshot(
        weights=weights,
        version=version_of(weights),
        models=_models(config, weights, device),
        host_models=None if host is None else _models(config, weights, host),
    )


def _models(config: Config, weights: Weights, device: Any) -> dict[str, Buckets]:
    sizes = bucket_sizes(config.performance.parallel_threshold, config.serving.bucket_sizes)
    state = jax.device_put(weights.state, device)
    scoring = getattr(weights.router, "scoring", None)
    program = Program(
        router=weights.router,
        experts=None,
        by_logit=not slots_follow_logits(weights.state, scoring),
        width=router_width(weights),
        device=device,
    )
    models = {"router": Buckets(program, jax.device_put(weights.params, device), state, sizes)}
    for name, layer in weights.layers.items():
        # The same arrays serve under both names; layers of equal rule and shapes compile once.
        models[name] = (
            models["router"]
            if layer.name == weights.name
            else _models(config, dataclasses.replace(layer, experts=None), device)["router"]
        )
    if weights.experts is not None and weights.layer is not None:
        models["moe"] = Buckets(
            dataclasses.replace(program, experts=weights.experts),
            jax.device_put(weights.layer, device),
            state,
            # Untrained demo experts: compile only every third bucket, to start faster.
            sizes if weights.trained or config.serving.bucket_sizes else sizes[::-3][::-1],
        )
    return models


def version_of(weights: Weights) -> str:
    """Returns 16 hex digits that change whenever an answer could."""
    parts: list[object] = [weights.router.fingerprint()]
    for tree in (weights.params, weights.state, weights.layer):
        parts += [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return _digits(*parts)


def _digits(*parts: object) -> str:
    """Returns 16 hex digits that depend on every part."""
    return "".join(f"{int(word):08x}" for word in budget.fingerprint(*parts)[:2])


def router_width(weights: Weights) -> int:
    """Returns D, the first axis of the router's kernel f32[D, E]."""
    return int(weights.params["kernel"].shape[0])


# --- where weights come from ----------------------------------------------------------------


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
    layer = opened.layer(config.serving.checkpoint_router or None)
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
    return Weights(
        router=layer.router,
        params=layer.params,
        state=layer.state,
        experts=None,
        layer=None,
        trained=True,
        source=folder,
        name=layer.name,
        names=tuple(opened.content.routers),
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
