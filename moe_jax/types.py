"""The values that flow through the library.

Axis letters, used in every docstring and field comment of this package:

====== =============================================================
T      tokens
D      model width
F      expert width
E      experts
K      most experts one token may use (static)
C      expert capacity: most tokens one expert may take (static)
N      assignments, ``T * K`` for token choice, ``E * C`` for expert choice
R      row budget: rows computed, at most N (static)
====== =============================================================

Every type is a frozen, keyword-only, slotted dataclass registered as a pytree.
Array fields are leaves; fields marked ``static`` are part of the tree structure,
so they are Python values under ``jit`` and a change of one retraces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.core
import jax.export
import jax.numpy as jnp

Array = jax.Array
Params = Any  # a pytree of arrays: plain dicts, so optax, orbax, nnx and linen take it as it is

_T = TypeVar("_T")


def static() -> Any:
    """Marks a dataclass field as part of the tree structure instead of a leaf."""
    return dataclasses.field(metadata={"static": True})


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(static,))
def pytree(cls: type[_T]) -> type[_T]:
    """Makes ``cls`` a frozen, keyword-only, slotted dataclass and registers it with JAX.

    Functions that take or return it can be exported and serialised (``jax.export``). The process that
    runs them needs the module of ``cls`` imported; a function of plain dicts and arrays needs nothing.

    Example:
        >>> @pytree
        ... class Pair:
        ...     left: Array
        ...     size: int = static()
        >>> jax.tree.leaves(Pair(left=1, size=2))
        [1]
    """
    frozen: Any = dataclasses.dataclass(frozen=True, kw_only=True, slots=True)(cls)
    fields = dataclasses.fields(frozen)
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    registered = jax.tree_util.register_dataclass(frozen, data_fields=data, meta_fields=meta)
    _register_serialization(registered, meta)
    _CLASSES.append(registered)
    for listener in _LISTENERS:
        listener(registered)
    return registered


_CLASSES: list[type[Any]] = []
_LISTENERS: list[Callable[[type[Any]], None]] = []


def on_pytree(listener: Callable[[type[Any]], None]) -> None:
    """Calls ``listener`` with every class that ``pytree`` made, and with those that it will make.

    For libraries with a registry of their own, such as Flax, which this module does not import.
    """
    _LISTENERS.append(listener)
    for cls in _CLASSES:
        listener(cls)


def _register_serialization(cls: type[Any], meta: list[str]) -> None:
    """Registers ``cls`` with ``jax.export``; its static fields ``meta`` are written as JSON."""

    def write(values: Sequence[Any]) -> bytes:
        for field, value in zip(meta, values, strict=True):
            if isinstance(value, bool | int | float | str | None):
                continue
            if jax.export.is_symbolic_dim(value):
                fix = "Return its arrays instead, or export for one fixed batch size."
            else:
                fix = "Export a function of its arrays instead."
            raise ValueError(
                f"{cls.__name__}.{field}: expected a number, text or None to serialise, got "
                f"{value}. {fix}"
            )
        return json.dumps(list(values)).encode()

    # A notebook cell that runs twice defines its class twice. JAX raises for a name that is taken.
    name = f"{cls.__module__}.{cls.__qualname__}"
    for repetition in itertools.count(1):
        with contextlib.suppress(ValueError):
            jax.export.register_pytree_node_serialization(
                cls,
                serialized_name=name if repetition == 1 else f"{name}#{repetition}",
                serialize_auxdata=write,
                deserialize_auxdata=lambda data: tuple(json.loads(bytes(data).decode())),
            )
            return


@pytree
class Routing:
    """Token choice: which experts each token uses, and with what weight.

    Slots of a token are ordered by descending selection score. An unused slot holds expert
    index ``num_experts`` (the "no expert" sentinel, which is also what Hugging Face transformers
    and vLLM use) with weight 0, so *the number of experts per token is in this field and nowhere else*.
    A masked (padding) token has only unused slots.

    Example:
        >>> from moe_jax import TopP
        >>> router = TopP(num_experts=4, max_k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> routing = router(params, state, jnp.ones((3, 8)))
        >>> routing.expert_indices.shape, routing.num_experts_per_token.dtype
        ((3, 2), dtype('int32'))
    """

    expert_indices: Array  # i32[T, K]
    combine_weights: Array  # f32[T, K]
    router_logits: Array  # f32[T, E]
    router_probs: Array  # f32[T, E]: rows sum to 1
    token_mask: Array  # bool[T]: True for real tokens, False for padding
    # f32[T]: the share of x itself that zero-computation experts return; None without such experts.
    residual_weight: Array | None = None
    num_experts: int = static()

    @property
    def num_experts_per_token(self) -> Array:
        """i32[T]: how many experts each token uses."""
        return (self.expert_indices < self.num_experts).sum(axis=-1, dtype=jnp.int32)

    @property
    def expert_mask(self) -> Array:
        """bool[T, E]: True where the token uses the expert."""
        one_hot = self.expert_indices[:, :, None] == jnp.arange(self.num_experts)[None, None, :]
        return one_hot.any(axis=1)


@pytree
class ExpertChoice:
    """Expert choice: which tokens each expert takes. An unused slot holds token index T.

    Example:
        >>> choice = ExpertChoice(
        ...     token_indices=jnp.array([[0, 1], [1, 3]], jnp.int32), num_tokens=3,
        ...     combine_weights=jnp.ones((2, 2)), router_logits=jnp.zeros((3, 2)),
        ...     router_probs=jnp.full((3, 2), 0.5), token_mask=jnp.ones(3, bool))
        >>> choice.num_experts_per_token.tolist()  # expert 1 leaves a slot unused
        [1, 2, 0]
    """

    token_indices: Array  # i32[E, C]
    combine_weights: Array  # f32[E, C]
    router_logits: Array  # f32[T, E]
    router_probs: Array  # f32[T, E]: rows sum to 1
    token_mask: Array  # bool[T]
    num_tokens: int = static()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.token_indices.shape[0]

    @property
    def expert_mask(self) -> Array:
        """bool[T, E]: True where the expert took the token."""
        experts = jnp.broadcast_to(jnp.arange(self.num_experts)[:, None], self.token_indices.shape)
        empty = jnp.zeros((self.num_tokens, self.num_experts), bool)
        return empty.at[self.token_indices, experts].set(True, mode="drop")

    @property
    def num_experts_per_token(self) -> Array:
        """i32[T]: how many experts took each token."""
        return self.expert_mask.sum(axis=-1, dtype=jnp.int32)


@pytree
class Assignments:
    """A flat list of (token, expert, weight), which every routing decision becomes: the waist.

    With ``slots_per_token = K > 0`` the list is token-major (assignment ``t * K + j`` is slot j of
    token t), which lets ``combine`` be a reshape. ``slots_per_token = 0`` says that the order
    carries no meaning.

    Example:
        >>> two = Assignments(
        ...     token_indices=jnp.array([0, 1], jnp.int32), weights=jnp.array([0.7, 0.0]),
        ...     expert_indices=jnp.array([3, 4], jnp.int32), valid=jnp.array([True, False]),
        ...     num_tokens=2, num_experts=4, slots_per_token=1)
        >>> two.valid.sum().item()  # token 1 uses no expert
        1
    """

    token_indices: Array  # i32[N]
    expert_indices: Array  # i32[N]; num_experts where invalid
    weights: Array  # f32[N]; 0 where invalid
    valid: Array  # bool[N]
    num_tokens: int = static()
    num_experts: int = static()
    slots_per_token: int = static()


@pytree
class DispatchPlan:
    """Which assignments are computed, and in which row. Drops are decided in the plan, once.

    ``order`` lists all assignments: the kept ones first, grouped by expert and within an expert in
    order of priority where a capacity cuts the queue, else in batch order; then everything dropped
    or unused. So ``order[:sum(group_sizes)]`` is a gapless, expert-sorted row list, and a kept
    assignment n sits in row ``group_offsets[expert_indices[n]] + position[n]`` of it.

    Example:
        >>> from moe_jax.routing.dispatch import plan_dispatch
        >>> assignments = Assignments(
        ...     token_indices=jnp.arange(3, dtype=jnp.int32), weights=jnp.ones(3),
        ...     expert_indices=jnp.array([1, 0, 1], jnp.int32), valid=jnp.ones(3, bool),
        ...     num_tokens=3, num_experts=2, slots_per_token=1)
        >>> plan = plan_dispatch(assignments, capacity=1)
        >>> plan.group_sizes.tolist(), plan.demand.tolist(), plan.kept.tolist()
        ([1, 1], [1, 2], [True, True, False])
    """

    assignments: Assignments
    order: Array  # i32[N], a permutation
    position: Array  # i32[N]: rank within the expert; meaningful where kept
    kept: Array  # bool[N]
    group_sizes: Array  # i32[E]: kept assignments of each expert
    demand: Array  # i32[E]: valid assignments of each expert, before anything was dropped
    capacity: int | None = static()  # C, or None for dropless
    max_rows: int | None = static()  # R, or None for no row budget

    @property
    def group_offsets(self) -> Array:
        """i32[E]: first row of each expert in ``order``."""
        return jnp.cumsum(self.group_sizes) - self.group_sizes

    @property
    def num_rows(self) -> int:
        """Static upper bound on the kept assignments: ``min(N, R, E * C)``."""
        bound = self.order.shape[0]
        if self.max_rows is not None:
            bound = jax.core.min_dim(bound, self.max_rows)
        if self.capacity is not None:
            bound = jax.core.min_dim(bound, self.capacity * self.assignments.num_experts)
        return bound

    @property
    def max_group(self) -> int:
        """Static upper bound on one expert's kept assignments.

        No rule gives a token the same expert twice, so an expert never sees more than T rows.
        """
        bound = jax.core.min_dim(self.num_rows, self.assignments.num_tokens)
        return bound if self.capacity is None else jax.core.min_dim(bound, self.capacity)


@pytree
class RoutingStats:
    """A few hundred bytes that say how a batch was routed. All float32, all over real tokens.

    The only thing that monitoring copies to the host. ``observed`` is what a router's controller may
    ask for beyond the counts (see ``Router.observe``): a vector, or a histogram for each expert.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> routing = router(params, state, jnp.ones((3, 8)))  # equal tokens: two experts for all
        >>> stats = moe_jax.routing_stats(
        ...     routing, moe_jax.plan_dispatch(moe_jax.to_assignments(routing)))
        >>> float(stats.distinct_experts), float(stats.load_balance_score)
        (2.0, 0.5)
    """

    token_count: Array  # f32[]: real tokens
    tokens_per_expert: Array  # f32[E]: assignments asked for, before dropping
    mean_experts_per_token: Array  # f32[]
    experts_per_token_histogram: Array  # f32[K + 1]: share of tokens that use 0..K experts
    dropped_fraction: Array  # f32[]: share of assignments that the plan dropped
    empty_fraction: Array  # f32[]: share of tokens left without any expert
    slots_used: Array  # f32[]: rows that carried an assignment
    slots_executed: Array  # f32[]: rows that the implementation computed
    max_over_mean_load: Array  # f32[]: 1 when balanced
    load_balance_score: Array  # f32[]: 1 / (1 + CV^2) = effective experts / E, 1 when balanced
    router_entropy: Array  # f32[]: mean entropy of router_probs, in nats
    observed: Array  # f32[E], or f32[E, B] for rules that observe histograms
    implementation: str = static()  # what ran the experts; empty where nothing did

    @property
    def distinct_experts(self) -> Array:
        """f32[]: experts that at least one token asked for. At decode a step reads their weights."""
        return (self.tokens_per_expert > 0).astype(jnp.float32).sum(axis=-1)
