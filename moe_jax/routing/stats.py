"""Statistics of one batch's routing, in a few hundred bytes, and its cost in FLOPs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp

from moe_jax.checks import (
    check_array,
    check_at_least_0,
    check_choice,
    check_count,
    check_finite,
    check_instance,
)
from moe_jax.routing.numerics import entropy
from moe_jax.types import Array, DispatchPlan, ExpertChoice, Params, Routing, RoutingStats

BASELINES = ("trained_k", "top_max", "dense", "mean_k")


def load_balance_score(tokens_per_expert: Array) -> Array:
    """f32[]: ``1 / (1 + CV^2)``, which is (effective number of experts) / E: 1 balanced, 1/E worst.

    Does not depend on how many tokens were counted; 1 where nothing was.

    Example:
        >>> float(load_balance_score(jnp.array([4.0, 4.0, 0.0, 0.0])))
        0.5
    """
    total = tokens_per_expert.sum()
    squares = jnp.square(tokens_per_expert).sum() * tokens_per_expert.shape[0]
    return jnp.where(total > 0, jnp.square(total) / jnp.maximum(squares, 1e-20), 1.0)


def routing_stats(
    routing: Routing | ExpertChoice,
    plan: DispatchPlan,
    *,
    slots_executed: Array | None = None,
    observed: Array | None = None,
    implementation: str = "",
) -> RoutingStats:
    """Returns the statistics of one batch: arrays of a few hundred bytes, cheap beside the experts.

    Args:
        routing: the decision of the router.
        plan: the dispatch plan of this routing, which says what was dropped.
        slots_executed: f32[] rows the implementation computes; the kept rows when not given.
        observed: f32[E], or f32[E, B], from ``router.observe``; zeros f32[E] when not given.
        implementation: name of what runs the experts.

    Example:
        >>> import jax
        >>> from moe_jax import TopK, plan_dispatch, to_assignments
        >>> router = TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> routing = router(params, state, jnp.ones((3, 8)))
        >>> stats = routing_stats(routing, plan_dispatch(to_assignments(routing), capacity=2))
        >>> float(stats.mean_experts_per_token), round(float(stats.dropped_fraction), 2)
        (2.0, 0.33)
    """
    check_instance(
        "routing",
        routing,
        (Routing, ExpertChoice),
        fix="Pass what the router returned; of what moe_layer reports that is aux.routing.",
    )
    check_instance("plan", plan, DispatchPlan, fix="Pass plan_dispatch(to_assignments(routing)).")
    if observed is not None:
        check_array(
            "observed",
            observed,
            "E" if jnp.ndim(observed) < 2 else "E B",
            sizes={"E": routing.num_experts},
            fix="Pass what router.observe returned for this routing.",
        )
    mask = routing.token_mask.astype(jnp.float32)
    kept = plan.group_sizes.astype(jnp.float32).sum()
    k = routing.num_experts_per_token
    most = routing.expert_indices.shape[1] if isinstance(routing, Routing) else routing.num_experts
    bins = jnp.arange(most + 1, dtype=jnp.int32)
    # A comparison with every bin has a static shape, and padding counts in none, not even in bin 0.
    hits = (k[:, None] == bins[None, :]).astype(jnp.float32) * mask[:, None]
    if observed is None:
        observed = jnp.zeros((routing.num_experts,), jnp.float32)
    totals = _Totals(
        tokens=mask.sum(),
        # What tokens asked for. The difference to the kept rows is what was dropped.
        load=plan.demand.astype(jnp.float32),
        used=kept,
        executed=kept if slots_executed is None else slots_executed,
        histogram=hits.sum(axis=0),
        entropy=jnp.where(mask > 0, entropy(routing.router_probs), 0.0).sum(),
        observed=observed * mask.sum(),
    )
    # The vector itself: multiplying and dividing by the token count could change its last bit.
    return dataclasses.replace(_of_totals(totals, implementation), observed=observed)


class _Totals(NamedTuple):
    """What adds up over parts of a batch. Every field of ``RoutingStats`` follows from it."""

    tokens: Array  # f32[]
    load: Array  # f32[E]
    used: Array  # f32[]
    executed: Array  # f32[]
    histogram: Array  # f32[K + 1], tokens
    entropy: Array  # f32[], summed over tokens
    observed: Array  # f32[E] or f32[E, B], weighted by tokens


def _totals_of(stats: RoutingStats) -> _Totals:
    n = stats.token_count
    return _Totals(
        tokens=n,
        load=stats.tokens_per_expert,
        used=stats.slots_used,
        executed=stats.slots_executed,
        histogram=stats.experts_per_token_histogram * n,
        entropy=stats.router_entropy * n,
        observed=stats.observed * n,
    )


def _of_totals(t: _Totals, implementation: str) -> RoutingStats:
    count = jnp.maximum(t.tokens, 1.0)
    asked = t.load.sum()
    histogram = t.histogram / count
    return RoutingStats(
        token_count=t.tokens,
        tokens_per_expert=t.load,
        mean_experts_per_token=asked / count,
        experts_per_token_histogram=histogram,
        dropped_fraction=(asked - t.used) / jnp.maximum(asked, 1.0),
        empty_fraction=histogram[0],
        slots_used=t.used,
        slots_executed=t.executed,
        max_over_mean_load=jnp.where(
            asked > 0, t.load.max() / jnp.maximum(t.load.mean(), 1e-20), 1.0
        ),
        load_balance_score=load_balance_score(t.load),
        router_entropy=t.entropy / count,
        observed=t.observed / count,
        implementation=implementation,
    )


def merge_stats(parts: Sequence[RoutingStats]) -> RoutingStats:
    """The statistics of one batch from those of its parts, e.g. micro-batches.

    Counts add up; shares and means are weighted by tokens, and so is ``observed``, which for a
    quantile is an approximation of the whole batch's. The order of the parts does not matter.

    Raises:
        ValueError: no parts.

    Example:
        >>> import jax, moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> def of(x):
        ...     routing = router(params, state, x)
        ...     return routing_stats(routing, moe_jax.plan_dispatch(moe_jax.to_assignments(routing)))
        >>> x = jax.random.normal(jax.random.key(1), (6, 8))
        >>> float(merge_stats([of(x[:2]), of(x[2:])]).token_count)
        6.0
    """
    if isinstance(parts, RoutingStats):
        raise TypeError(
            "parts: expected a sequence of RoutingStats, got one RoutingStats. Write "
            "merge_stats([stats])."
        )
    for part in parts:
        check_instance(
            "parts", part, RoutingStats, fix="Pass aux.stats of what moe_layer returned."
        )
    if not parts:
        raise ValueError(
            "parts: expected the statistics of at least one part, got an empty sequence. Pass one "
            "RoutingStats a micro-batch."
        )
    # Means are turned back into sums, which add up exactly for parts of different sizes.
    added = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *map(_totals_of, parts))
    return _of_totals(added, parts[0].implementation)


def global_stats(stats: RoutingStats, axis_name: str | tuple[str, ...]) -> RoutingStats:
    """The statistics of the whole batch, equal on all devices, from those of each device's tokens.

    For use inside ``shard_map``. One ``psum`` of one vector; ``merge_stats`` says what is summed.
    Controllers fed with it (``router.update``) move alike on every device.
    """
    flat, rebuild = jax.flatten_util.ravel_pytree(_totals_of(stats))
    return _of_totals(rebuild(jax.lax.psum(flat, axis_name)), stats.implementation)


def bytes_read(stats: RoutingStats, expert_params: Params) -> Array:
    """f32[]: bytes of expert weights that a batch reads if each distinct expert is read once.

    What a decoding step costs with the ``active`` implementation.

    Args:
        stats: of the batch.
        expert_params: parameters of all experts, with a leading axis E.

    Example:
        >>> import jax, moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> routing = router(params, state, jnp.ones((1, 8)))
        >>> plan = moe_jax.plan_dispatch(moe_jax.to_assignments(routing))
        >>> float(bytes_read(routing_stats(routing, plan), {"up": jnp.zeros((4, 8, 16))}))
        1024.0
    """
    each = sum(leaf.nbytes // leaf.shape[0] for leaf in jax.tree.leaves(expert_params))
    return stats.distinct_experts * each


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopsReport:
    """Floating-point operations of a layer for a batch, against a stated baseline. Host numbers.

    ``saving_used`` counts rows that carried an assignment, ``saving_executed`` rows that were really
    computed (padding included); only the second can become time. Both count the router and the
    difficulty estimator as cost.
    """

    baseline: str
    baseline_flops: float
    router_flops: float
    estimator_flops: float
    used_flops: float
    executed_flops: float

    @property
    def saving_used(self) -> float:
        """Share of the baseline's FLOPs saved, counting rows that carried an assignment."""
        return 1.0 - self.used_flops / self.baseline_flops

    @property
    def saving_executed(self) -> float:
        """Share of the baseline's FLOPs saved, counting rows that were computed."""
        return 1.0 - self.executed_flops / self.baseline_flops

    def summary(self) -> str:
        """One line for people."""
        return (
            f"{self.saving_used:+.1%} of the FLOPs of {self.baseline} saved by what was used, "
            f"{self.saving_executed:+.1%} by what was executed"
        )


def flops_report(
    stats: RoutingStats,
    *,
    baseline: str,
    d_model: int,
    flops_per_row: float,
    max_k: int,
    trained_k: int | None = None,
    mean_k: float | None = None,
    estimator_flops_per_token: float = 0.0,
) -> FlopsReport:
    """What a batch cost, against a baseline that must be named.

    Args:
        stats: of the batch.
        baseline: ``trained_k`` (what the model ran at before), ``top_max`` (the same rule with every
            token at max_k), ``dense`` (every expert on every token) or ``mean_k`` (a stated budget:
            what a fixed, possibly fractional k of that size would cost).
        d_model: D.
        flops_per_row: cost of one expert on one token, see ``FeedForward.flops_per_row``.
        max_k: K.
        trained_k: k that the model was trained with; needed for that baseline.
        mean_k: experts per token on average; needed for that baseline.
        estimator_flops_per_token: cost of the difficulty estimator, if it is not negligible.

    Returns:
        A report in which every number is operations over the whole batch. The baseline pays for the
        router too, except ``dense``, which uses every expert and needs no router.

    Raises:
        ValueError: an unknown baseline, or ``trained_k`` or ``mean_k`` missing.

    Example:
        >>> import jax, moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> routing = router(params, state, jnp.ones((3, 8)))
        >>> plan = moe_jax.plan_dispatch(moe_jax.to_assignments(routing))
        >>> report = flops_report(routing_stats(routing, plan), baseline="dense",
        ...                       d_model=8, flops_per_row=2 * 8 * 16 * 2, max_k=2)
        >>> round(report.saving_used, 3)
        0.469
    """
    check_instance("stats", stats, RoutingStats, fix="Pass aux.stats of what moe_layer returned.")
    check_choice("baseline", baseline, BASELINES)
    check_count("d_model", d_model, fix="It is the width of a token.")
    check_count("max_k", max_k, fix="It is router.max_k.")
    if trained_k is not None:
        check_count("trained_k", trained_k, fix="It is the k of the trained model.")
    if mean_k is not None:
        check_finite("mean_k", mean_k)
    for name, cost in (
        ("flops_per_row", flops_per_row),
        ("estimator_flops_per_token", estimator_flops_per_token),
    ):
        check_at_least_0(name, cost)
    if baseline == "trained_k" and trained_k is None:
        raise ValueError(
            "trained_k: expected the k that the model was trained with, got None. Pass trained_k=, "
            "or choose baseline='top_max' or 'dense'."
        )
    if baseline == "mean_k" and (mean_k is None or not mean_k > 0):
        raise ValueError(
            f"mean_k: expected experts per token above 0 for baseline='mean_k', got {mean_k}. Pass "
            "the budget, such as the target_mean_k of a fit."
        )
    tokens = float(stats.token_count)
    experts = stats.tokens_per_expert.shape[0]
    # Two operations a multiply-add, as in `flops_per_row`.
    router = tokens * 2.0 * d_model * experts
    estimator = tokens * estimator_flops_per_token
    k_of = {"trained_k": trained_k, "top_max": max_k, "dense": experts, "mean_k": mean_k}
    k = k_of[baseline] or 0
    base = tokens * k * flops_per_row + (0.0 if baseline == "dense" else router)
    return FlopsReport(
        baseline=f"{baseline}={k:g}",
        baseline_flops=base,
        router_flops=router,
        estimator_flops=estimator,
        used_flops=float(stats.slots_used) * flops_per_row + router + estimator,
        executed_flops=float(stats.slots_executed) * flops_per_row + router + estimator,
    )


def observed_by_group(observe: Callable[[Any], Array], routing: Any, groups: int) -> Array:
    """Returns what a rule observes of a routing: one value a group, averaged by tokens as devices do.

    Args:
        observe: of a routing, such as ``Router.observe`` with its state bound.
        routing: of T tokens.
        groups: equal, consecutive groups of tokens.
    """
    if groups == 1:
        return observe(routing)
    split = jax.tree.map(lambda leaf: leaf.reshape(groups, -1, *leaf.shape[1:]), routing)
    tokens = split.token_mask.sum(axis=1, dtype=jnp.float32)
    seen = jax.vmap(observe)(split)
    weights = tokens.reshape(-1, *(1 for _ in seen.shape[1:]))
    return (seen * weights).sum(axis=0) / jnp.maximum(tokens.sum(), 1.0)
