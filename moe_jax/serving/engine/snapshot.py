"""The snapshot: an immutable set of router, parameters, state and compiled buckets.

A request takes the snapshot once and uses nothing else, so a reload between two requests is one
assignment, and no answer mixes two checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checkpoint import CheckpointError, open_checkpoint
from moe_jax.checkpoint.description import router_sizes
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights with their compiled buckets.

    Attributes:
        weights: router, parameters, state.
        version: 16 hex digits over the rule, its parameters and its state, experts included. It
            differs between any two weights.
        models: ``router``, and ``moe`` if it is served.
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
        every = [*self.models.values(), *(self.host_models or {}).values()]

        def compile_one(task: tuple[Buckets, int]) -> None:
            check_stop()
            buckets, size = task
            buckets.compile(size)

        with ThreadPoolExecutor(_COMPILERS, "moe-compile") as pool:
            list(pool.map(compile_one, _largest_first(every)))
        for buckets in every:
            check_stop()
            buckets.warm()

    @property
    def router(self) -> Router:
        """The rule."""
        return self.weights.router

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
        if model in self.models:
            return
        hint = (
            "" if "moe" in self.models else " moe needs experts and MOE_SERVE_MOE other than off."
        )
        raise ServingError(
            "not_found",
            f"model: expected one of {', '.join(self.models)}, got {str(model)[:64]!r}.{hint}",
        )

    @functools.cached_property
    def metadata(self) -> Mapping[str, Mapping[str, Any]]:
        """Each model in the words of the Open Inference Protocol, built once; -1 is any size."""
        return {model: self._described(model) for model in self.models}

    def _described(self, model: str) -> dict[str, Any]:
        router, width = self.router, self.width
        if model == "moe":
            outputs = [("output", "FP32", [-1, -1, width])]
        else:
            outputs = [
                ("expert_indices", "INT32", [-1, -1, router.max_k]),
                ("expert_weights", "FP32", [-1, -1, router.max_k]),
                ("num_experts_per_token", "INT32", [-1, -1]),
                ("complexity_scores", "FP32", [-1, -1]),
                ("router_logits", "FP32", [-1, -1, router.num_experts]),
            ]
        return {
            "name": model,
            "versions": [self.version],
            "platform": "jax",
            "inputs": [{"name": "hidden_states", "datatype": "FP32", "shape": [-1, -1, width]}],
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
    _check_servable(weights.router)
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
    _check_servable(router)
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
    return Weights(
        router=layer.router,
        params=layer.params,
        state=layer.state,
        experts=layer.experts if served else None,
        layer=layer.layer if served else None,
        trained=True,
        source=folder,
        name=layer.name,
        names=tuple(opened.content.routers),
    )


def _check_servable(router: Router) -> None:
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
