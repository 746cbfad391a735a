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
import numpy as np

from moe_jax.checkpoint.description import router_sizes
from moe_jax.config import Config
from moe_jax.routers import Router
from moe_jax.routing import budget
from moe_jax.serving.engine.buckets import (
    Buckets,
    Program,
    bucket_sizes,
    slots_follow_logits,
)
from moe_jax.serving.engine.weights import Weights, router_width
from moe_jax.serving.errors import ServingError

_COMPILERS = 4  # threads; XLA compiles outside of Python's lock
ALL_LAYERS = "layers"
"""The model that routes one batch of hidden states for each served layer."""


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

    def warm(
        self,
        check_stop: Callable[[], None] = lambda: None,
        progress: Callable[[int, int], None] = lambda compiled, total: None,
    ) -> None:
        """Compiles everything, several functions at once, and runs it once.

        Args:
            check_stop: called before each compilation and run; what it raises ends the warming, after
                the compilations under way.
            progress: called with the number of programs that are compiled and the number of all, at
                the begin and after each compilation.
        """
        models = [*self.models.values(), *(self.host_models or {}).values()]
        every = list({id(buckets): buckets for buckets in models}.values())

        def compile_one(task: tuple[Buckets, int]) -> None:
            check_stop()
            buckets, size = task
            buckets.compile(size)

        todo = _largest_first(every)
        progress(0, len(todo))
        with ThreadPoolExecutor(_COMPILERS, "moe-compile") as pool:
            for compiled, _ in enumerate(pool.map(compile_one, todo), start=1):
                progress(compiled, len(todo))
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
