"""Compiled functions for a few token counts, and requests of any size run through them.

A request is padded with masked tokens to the next bucket, or cut into the largest one. Every bucket
is compiled before the first request, so that none waits for the compiler. Padding and cutting do not
change an answer if tokens do not depend on each other, and the service accepts no other rules
(``Traits.batch_invariant``).

Fetching an array from the device costs about 25 µs however small it is. So the small outputs come in
one buffer, and the router's logits are fetched only on request.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.experts import FeedForward
from moe_jax.layer import moe_layer
from moe_jax.routers import DynamicK, Router
from moe_jax.routing import budget
from moe_jax.routing.scoring import Scoring
from moe_jax.types import Array, Params, Routing

SMALLEST_BUCKET = 16
_MARGIN = 1e-4  # keeps a complexity score off the edges at which `round` would give another k


def bucket_sizes(largest: int, given: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Returns the token counts to compile, ascending: ``given``, or powers of two to ``largest``.

    Example:
        >>> bucket_sizes(100)
        (16, 32, 64, 128)
    """
    if given:
        return given
    sizes = [SMALLEST_BUCKET]
    while sizes[-1] < largest:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


# --- what is compiled -----------------------------------------------------------------------


def route_tokens(
    router: Router, by_logit: bool, params: Params, state: Any, x: Array, token_mask: Array
) -> dict[str, Array]:
    """Computes the decisions for tokens x f32[T, D], token_mask bool[T].

    Returns:
        The guide's outputs: expert_indices i32[T, K] (-1 is no expert), expert_weights f32[T, K],
        num_experts_per_token i32[T], complexity_scores f32[T], router_logits f32[T, E].
    """
    # Masked tokens may hold NaN, which 0 * NaN would carry on.
    x = jnp.where(token_mask[:, None], x, 0.0)
    routing = router(params, state, x, token_mask=token_mask)
    assert isinstance(routing, Routing)
    used = routing.expert_indices < routing.num_experts
    indices = jnp.where(used, routing.expert_indices, -1)
    weights = routing.combine_weights
    if by_logit:
        chosen = jnp.take_along_axis(routing.router_logits, jnp.where(used, indices, 0), axis=-1)
        order = jnp.argsort(jnp.where(used, -chosen, jnp.inf), axis=-1, stable=True)
        indices = jnp.take_along_axis(indices, order, axis=-1)
        weights = jnp.take_along_axis(weights, order, axis=-1)
    return {
        "expert_indices": indices,
        "expert_weights": weights,
        "num_experts_per_token": used.sum(axis=-1, dtype=jnp.int32),
        "complexity_scores": _complexity(router, params, state, x, routing),
        "router_logits": routing.router_logits,
    }


def _complexity(router: Router, params: Params, state: Any, x: Array, routing: Routing) -> Array:
    """Returns scores f32[T] in [0, 1] with ``k == round(min_k + (max_k - min_k) * score)``.

    For ``DynamicK`` it is the calibrated difficulty, its thresholds mapped to those of rounding. For
    rules without a difficulty it is the entropy of the router's probabilities, clipped to the scores
    that round to the token's k.
    """
    if isinstance(router, DynamicK):
        level = router.difficulty_of(params, state, x)
        # A piecewise linear map that takes the calibrated thresholds to those of rounding.
        ends = jnp.array([0.0], jnp.float32), jnp.array([1.0], jnp.float32)
        steps = budget.rounding_thresholds(router.min_k, router.max_k)
        if router.min_k < router.max_k:
            level = jnp.interp(
                level,
                jnp.concatenate([ends[0], state.thresholds, ends[1]]),
                jnp.concatenate([ends[0], steps, ends[1]]),
            )
    else:
        p = routing.router_probs
        entropy = -(p * jnp.log(jnp.where(p > 0, p, 1.0))).sum(axis=-1)
        level = jnp.clip(entropy / np.log(max(routing.num_experts, 2)), 0.0, 1.0)
    span = router.max_k - router.min_k
    if span:
        rank = (routing.num_experts_per_token - router.min_k).astype(jnp.float32)
        low, high = (rank - 0.5) / span + _MARGIN, (rank + 0.5) / span - _MARGIN
        level = jnp.clip(level, jnp.maximum(low, 0.0), jnp.minimum(high, 1.0))
    return jnp.where(routing.token_mask, level, 0.0)


def layer_output(
    router: Router, experts: FeedForward, params: Params, state: Any, x: Array, token_mask: Array
) -> dict[str, Array]:
    """Computes the ``moe`` model's output f32[T, D] for tokens x f32[T, D], token_mask bool[T].

    ``expert_indices`` i32[T, K] come along, for the counts of the metrics.
    """
    y, aux = moe_layer(router, experts, params, state, x, token_mask=token_mask)
    routing = aux.routing
    assert isinstance(routing, Routing)
    used = routing.expert_indices < routing.num_experts
    return {"output": y, "expert_indices": jnp.where(used, routing.expert_indices, -1)}


# --- one buffer for the small outputs -------------------------------------------------------

Column = tuple[str, tuple[int, ...], Any]  # name, shape after [T], dtype of 4 bytes


def columns_of(router: Router, *, decisions: bool) -> tuple[Column, ...]:
    """Returns the columns of the buffer: the decisions of ``route_tokens``, or only the indices."""
    indices: Column = ("expert_indices", (router.max_k,), np.int32)
    if not decisions:
        return (indices,)
    return (
        indices,
        ("expert_weights", (router.max_k,), np.float32),
        ("num_experts_per_token", (), np.int32),
        ("complexity_scores", (), np.float32),
    )


def pack(
    function: Callable[..., dict[str, Array]], columns: tuple[Column, ...], *args: Any
) -> tuple[Array, dict[str, Array]]:
    """Returns the function's columns in one i32[...], one after the other, and its other outputs."""
    outputs = function(*args)
    small = [outputs.pop(name) for name, _, _ in columns]
    for array, (name, shape, dtype) in zip(small, columns, strict=True):
        assert (array.shape[1:], array.dtype) == (shape, dtype), name
    bits = [jax.lax.bitcast_convert_type(array, jnp.int32).reshape(-1) for array in small]
    return jnp.concatenate(bits), outputs


def unpack(packed: np.ndarray, columns: tuple[Column, ...]) -> dict[str, np.ndarray]:
    """Returns views [T, ...] into a buffer of ``pack``.

    Example:
        >>> columns = ("a", (2,), np.int32), ("b", (), np.float32)
        >>> packed, _ = pack(lambda x: {"a": jnp.int32([[1, 2]]), "b": x}, columns, jnp.ones(1))
        >>> {name: v.tolist() for name, v in unpack(np.asarray(packed), columns).items()}
        {'a': [[1, 2]], 'b': [1.0]}
    """
    tokens = len(packed) // sum(math.prod(shape) for _, shape, _ in columns)
    views, at = {}, 0
    for name, shape, dtype in columns:
        views[name] = array = np.ndarray((tokens, *shape), dtype, packed, at)
        at += array.nbytes
    return views


# --- compiling ------------------------------------------------------------------------------


class CompileCounter:
    """Counts the compilations of XLA in this process, of whatever function."""

    _EVENT = "/jax/core/compile/backend_compile_duration"

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == self._EVENT:
            with self._lock:
                self.count += 1


@functools.cache
def compile_counter() -> CompileCounter:
    """Returns the one counter of this process: JAX's listeners cannot be unregistered."""
    return CompileCounter()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What to compile, except for the number of tokens. Hashable, so equal programs compile once.

    Attributes:
        router: the rule.
        experts: of the model ``moe``; None for the model ``router``.
        by_logit: whether the slots must be sorted by their logits.
        width: D.
        device: where it runs.
    """

    router: Router
    experts: FeedForward | None
    by_logit: bool
    width: int
    device: Any  # a jax.Device

    @functools.cached_property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the buffer of small outputs."""
        return columns_of(self.router, decisions=self.experts is None)


# A lock for each executable, so that engines that start at the same time compile it once.
_compiling: dict[object, threading.Lock] = {}


def compiled(program: Program, params: Params, state: Any, tokens: int) -> Any:
    """Returns the executable for ``tokens`` tokens, compiled unless this process has it."""
    leaves, tree = jax.tree.flatten((params, state))
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    # `lru_cache` alone would let two threads compile the same program at the same time.
    with _compiling.setdefault((program, tree, shapes, tokens), threading.Lock()):
        return _compiled(program, tree, shapes, tokens)


@functools.lru_cache(maxsize=512)
def _compiled(program: Program, tree: Any, shapes: tuple[Any, ...], tokens: int) -> Any:
    where = jax.sharding.SingleDeviceSharding(program.device)

    def spec(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=where)

    # Compiled from shapes alone, so no copy of the parameters is held while the compiler runs.
    params, state = jax.tree.unflatten(tree, [spec(*s) for s in shapes])
    if program.experts is None:
        function = functools.partial(route_tokens, program.router, program.by_logit)
    else:
        function = functools.partial(layer_output, program.router, program.experts)
    lowered = jax.jit(functools.partial(pack, function, program.columns)).lower(
        params, state, spec((tokens, program.width), "float32"), spec((tokens,), "bool")
    )
    return lowered.compile()


# --- running --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The executables of one model on one device, with the arrays that they take.

    Attributes:
        program: what is compiled.
        params, state: device arrays.
        sizes: ascending token counts; more tokens than the largest are cut into it.
        table: executable of each size.
        masks: a mask bool[size] of True on the device, for each size.
    """

    program: Program
    params: Params
    state: Any
    sizes: tuple[int, ...]
    table: dict[int, Any] = dataclasses.field(default_factory=dict)
    masks: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def compile(self, size: int) -> None:
        """Compiles the bucket of this size."""
        self.table[size] = compiled(self.program, self.params, self.state, size)

    def warm(self) -> None:
        """Runs every bucket once, and compiles those that are not compiled."""
        for size in self.sizes:
            if size not in self.table:
                self.compile(size)
            # A full bucket needs a mask too. It stays on the device, so that no request sends one.
            self.masks[size] = jax.device_put(np.ones(size, bool), self.program.device)
            # The first run of an executable is slower than the others. No request should be the
            # first.
            jax.device_get(self._start(np.zeros((size, self.program.width), np.float32), None))

    def run(
        self,
        x: np.ndarray,
        token_mask: np.ndarray | None,
        *,
        logits: bool = False,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> dict[str, np.ndarray]:
        """Returns the outputs for x f32[T, D], token_mask bool[T] as arrays [T, ...] on the host.

        Errors of the device are raised by this method and by no other.

        Args:
            x: tokens.
            token_mask: None is no padding.
            logits: whether ``router_logits`` are among the outputs.
            meanwhile: called while the device works.
        """
        largest = self.sizes[-1]
        starts = range(0, len(x), largest)
        # All parts are started before the first is fetched, so the device does not wait for the
        # host.
        parts = [
            self._start(
                x[i : i + largest], None if token_mask is None else token_mask[i : i + largest]
            )
            for i in starts
        ]
        meanwhile()
        if not logits:
            for _, apart in parts:
                # Not fetched unless asked for: logits are most of the bytes of an answer.
                apart.pop("router_logits", None)
        columns = self.program.columns
        outputs = [{**unpack(packed, columns), **apart} for packed, apart in _on_host(parts)]
        # A bucket of just this size has no padding to cut off.
        if len(outputs) == 1 and len(x) in self.table:
            return outputs[0]
        sizes = [min(largest, len(x) - i) for i in starts]
        return {
            name: np.concatenate([part[name][:n] for part, n in zip(outputs, sizes, strict=True)])
            for name in outputs[0]
        }

    def _start(
        self, x: np.ndarray, token_mask: np.ndarray | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens = len(x)
        size = next(s for s in self.sizes if s >= tokens)
        if size != tokens:
            padded = np.zeros((size, x.shape[1]), np.float32)
            padded[:tokens] = x
            mask = np.zeros(size, bool)
            mask[:tokens] = True if token_mask is None else token_mask
            x = padded
        else:
            mask = self.masks[size] if token_mask is None else token_mask
        return self.table[size](self.params, self.state, x, mask)


def _on_host(
    parts: list[tuple[jax.Array, dict[str, jax.Array]]],
) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    packed, apart = parts[0]
    if len(parts) > 1 or apart:
        return jax.device_get(parts)
    return [
        (np.asarray(packed), {})
    ]  # as `device_get` does for one array, without flattening trees


def slots_follow_logits(state: Any, scoring: Scoring | None) -> bool:
    """Returns whether a rule's slots are in the order of their logits: no bias moves them."""
    bias = getattr(state, "expert_bias", None)
    return scoring is not None and bias is not None and not np.any(np.asarray(bias))
