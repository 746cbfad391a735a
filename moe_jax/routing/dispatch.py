"""Decides which assignments of a routing are kept, and in which row each is computed."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp

from moe_jax.checks import check_choice, check_count, check_finite, check_instance, holds
from moe_jax.routing.numerics import divide, exact
from moe_jax.types import Array, Assignments, DispatchPlan, ExpertChoice, Routing

PRIORITIES = ("score", "order", "choice")


def expert_capacity(num_tokens: int, num_experts: int, k: float, capacity_factor: float) -> int:
    """Rows of one expert's buffer: ``ceil(capacity_factor * T * k / E)``, between 1 and T.

    The capacity grows with k. Libraries differ in this: for ``capacity_factor=1.25, T=4096, E=8,
    k=2`` this function, V-MoE and MaxText give 1280 rows. Flaxformer, praxis and axlearn leave k out
    and give 640 rows, which drops 37.5 % of the assignments even under perfect balance.

    Args:
        num_tokens: T.
        num_experts: E.
        k: experts per token; a mean such as 1.3 is fine.
        capacity_factor: head room over perfect balance; 1.0 is no head room. The decimal counts as
            written: 1.1 times 10 rows are 11 rows, although the float 1.1 is slightly above 1.1.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is not positive and finite.

    Example:
        >>> expert_capacity(4096, 8, 2, 1.25)
        1280
    """
    check_count("num_tokens", num_tokens, fix="It is the number of tokens of a batch.")
    check_count("num_experts", num_experts, fix="It is router.num_experts.")
    check_finite("k", k)
    check_finite("capacity_factor", capacity_factor)
    if not capacity_factor > 0 or not k > 0:
        raise ValueError(
            f"capacity_factor, k: expected positive numbers, got {capacity_factor}, {k}. "
            "1.25 is a usual capacity factor; leave capacity out for dropless routing."
        )
    # Floats would round 1.1 * 10 rows up to 12. `exact` takes the decimals as they were written.
    share = exact(capacity_factor) * exact(k) / num_experts
    # Integer arithmetic alone, which symbolic sizes have too: -(-a // b) rounds up.
    rows = -(-share.numerator * num_tokens // share.denominator)
    # More than T rows can never be in use: a token takes an expert once.
    return jax.core.max_dim(1, jax.core.min_dim(num_tokens, rows))


def to_assignments(routing: Routing | ExpertChoice) -> Assignments:
    """Flattens token choice or expert choice into ``Assignments``, which all later steps take.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params = router.init(jax.random.key(0), 8)
        >>> routing = router(params, router.init_state(), jnp.ones((3, 8)))
        >>> to_assignments(routing).token_indices.tolist()
        [0, 0, 1, 1, 2, 2]
    """
    check_instance(
        "routing",
        routing,
        (Routing, ExpertChoice),
        fix="Pass the routing that the router returned; moe_layer returns it as aux.routing.",
    )
    if isinstance(routing, Routing):
        num_tokens, k = routing.expert_indices.shape
        experts = routing.expert_indices.reshape(-1)
        return Assignments(
            token_indices=jnp.arange(num_tokens * k, dtype=jnp.int32) // k,
            expert_indices=experts,
            weights=routing.combine_weights.reshape(-1),
            # The sentinel of unused slots is the only index that is not below E.
            valid=experts < routing.num_experts,
            num_tokens=num_tokens,
            num_experts=routing.num_experts,
            slots_per_token=k,
        )
    num_experts, capacity = routing.token_indices.shape
    tokens = routing.token_indices.reshape(-1)
    # An empty slot holds the token index T. It becomes token 0, so that gathers stay in bounds, and
    # expert E, which `_count` ignores.
    valid = tokens < routing.num_tokens
    experts = jnp.arange(num_experts * capacity, dtype=jnp.int32) // capacity
    return Assignments(
        token_indices=jnp.where(valid, tokens, 0),
        expert_indices=jnp.where(valid, experts, num_experts),
        weights=routing.combine_weights.reshape(-1),
        valid=valid,
        num_tokens=routing.num_tokens,
        num_experts=num_experts,
        slots_per_token=0,
    )


def _stable_argsort(keys: Array, bound: int) -> Array:
    """``argsort(keys, stable)`` for ``0 <= keys < bound``.

    Packing key and index into one int32 makes it a sort of a single operand, which on CPU is
    about three times as fast as a sort of (key, index) pairs. If the packed value could overflow,
    the function sorts pairs; so it does for a symbolic n without an upper bound.
    """
    n = keys.shape[0]
    if not holds(lambda: bound * n < 2**31):
        return jnp.argsort(keys, stable=True).astype(jnp.int32)
    packed = keys * n + jnp.arange(n, dtype=jnp.int32)
    return jax.lax.sort(packed, is_stable=False) % n


def _rank(order: Array) -> Array:
    """Returns the inverse permutation of ``order``."""
    # A scatter of distinct indices is cheaper than sorting a second time.
    n = order.shape[0]
    return (
        jnp.zeros((n,), jnp.int32)
        .at[order]
        .set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    )


def _count(experts: Array, counted: Array, num_experts: int) -> Array:
    """i32[E]: the number of assignments of each expert for which ``counted`` bool[N] is True."""
    # Padding holds the index E, past the end of the counts, which "drop" ignores.
    return (
        jnp.zeros((num_experts,), jnp.int32).at[experts].add(counted.astype(jnp.int32), mode="drop")
    )


def _sort_by_expert(experts: Array, kept: Array, group_sizes: Array) -> tuple[Array, Array]:
    """``order`` and ``position`` of the kept assignments, in batch order within an expert."""
    num_experts = group_sizes.shape[0]
    # Dropped assignments take the key E, so they sort behind all kept ones. `starts` has an entry E
    # too, because padding holds the expert index E.
    order = _stable_argsort(jnp.where(kept, experts, num_experts), num_experts + 1)
    starts = jnp.concatenate([jnp.cumsum(group_sizes) - group_sizes, jnp.zeros((1,), jnp.int32)])
    return order, _rank(order) - starts[experts]


def plan_dispatch(
    assignments: Assignments,
    *,
    capacity: int | None = None,
    max_rows: int | None = None,
    priority: str = "score",
) -> DispatchPlan:
    """Decides which assignments are computed and in which row. One stable sort by expert.

    Without ``capacity`` and ``max_rows`` nothing is dropped. With ``capacity`` an expert keeps its
    first C assignments. ``priority`` sets their order: by descending weight (``"score"``), by
    position in the batch (``"order"``, as in Switch), or all first choices by position, then all
    second ones, and so on (``"choice"``, as in GShard and DeepSpeed).

    With ``max_rows`` at most R assignments are kept in all. For token choice, the row budget never
    drops a token's first expert. With R < N, capacity also drops first choices last: an expert loses
    them only after all other choices in its queue.

    ``kept_weights(renormalize=True)`` gives the weight of a token's dropped experts to its kept
    ones, as DeepSpeed does; the GShard paper (arXiv:2006.16668) normalises before it drops.

    Args:
        assignments: N assignments.
        capacity: C, most rows of one expert; None for no bound.
        max_rows: R, most rows in all; None for no bound. For token choice R must be at least T.
        priority: ``"score"``, ``"order"`` or ``"choice"``.

    Returns:
        The plan. Ties in weight go to the earlier assignment.

    Raises:
        ValueError: a bound below 1, a row budget that would drop first experts, or an unknown
            priority.

    Example:
        >>> a = Assignments(
        ...     token_indices=jnp.array([0, 1, 2]), expert_indices=jnp.array([1, 0, 1]),
        ...     weights=jnp.array([0.2, 0.5, 0.9]), valid=jnp.ones(3, bool),
        ...     num_tokens=3, num_experts=2, slots_per_token=1)
        >>> plan_dispatch(a, capacity=1).kept.tolist()
        [False, True, True]
    """
    check_instance("assignments", assignments, Assignments, fix="Pass to_assignments(routing).")
    check_choice("priority", priority, PRIORITIES)
    for name, bound in (("capacity", capacity), ("max_rows", max_rows)):
        if bound is not None:
            check_count(name, bound, fix="None means nothing is dropped.")
    n, e = assignments.expert_indices.shape[0], assignments.num_experts
    slots = assignments.slots_per_token
    rows, tokens = max_rows, assignments.num_tokens
    # A budget of N rows or more drops nothing. Without it the plan needs no ranking.
    if rows is not None and holds(lambda: rows >= n):
        max_rows = None
    if rows is not None and slots and holds(lambda: rows >= tokens) is None:
        raise ValueError(
            f"max_rows: expected a bound on the symbolic number of tokens {tokens}, got none that "
            f"shows that it is at most max_rows={rows}. Pass it to jax.export.symbolic_shape, e.g. "
            f"constraints=['{tokens} <= {rows}']."
        )
    if rows is not None and slots and not holds(lambda: rows >= tokens):
        raise ValueError(
            f"max_rows: expected at least T={assignments.num_tokens}, so that no token loses its "
            f"first expert, got {max_rows}. Raise it, or use capacity to drop more."
        )

    experts, valid = assignments.expert_indices, assignments.valid
    # Before anything is dropped: balancing follows what tokens ask for, not what they get.
    demand = _count(experts, valid, e)

    if capacity is None and max_rows is None:
        order, position = _sort_by_expert(experts, valid, demand)
        return DispatchPlan(
            assignments=assignments,
            order=order,
            position=position,
            kept=valid,
            group_sizes=demand,
            demand=demand,
            capacity=None,
            max_rows=None,
        )

    # `second` is 0 for a token's first expert: under a row budget these go before everything else,
    # in the whole batch and in each expert's queue alike. Both bounds then cut the tail of the same
    # queue, which is what keeps `position` gapless.
    index = jnp.arange(n, dtype=jnp.int32)
    if max_rows is not None and slots:
        second = (index % slots > 0).astype(jnp.int32)
    else:
        second = jnp.zeros((n,), jnp.int32)
    # Both sorts are ascending, so the highest weight has the lowest cost. Which assignments are kept
    # is a discrete decision: no gradient flows through it.
    if priority == "score":
        cost = -jax.lax.stop_gradient(assignments.weights)
    elif priority == "choice" and slots:
        cost = (index % slots).astype(jnp.float32)
    else:
        cost = jnp.zeros((n,), jnp.float32)

    def within_budget(kept: Array, rows: int) -> Array:
        # Assignments that capacity dropped already rank last: they must not use up the budget.
        unkept = (~kept).astype(jnp.int32)
        ranked = jax.lax.sort((unkept, second, cost, index), num_keys=4, is_stable=False)[3]
        return kept & (_rank(ranked) < rows)

    if capacity is None and max_rows is not None:
        # Most batches need at most `max_rows` rows. Ranking everything is a slow
        # sort, whose cost does not fall with k, so it runs only if something must be dropped.
        # `lax.cond` inside `shard_map` needs both branches to vary over the same mesh axes.
        # `cost > inf` is always False; it only ties this branch to the axes of `cost`.
        kept = jax.lax.cond(
            demand.sum() > max_rows,
            lambda kept: within_budget(kept, max_rows),
            lambda kept: kept,
            valid & ~(cost > jnp.inf),
        )
        group_sizes = _count(experts, kept, e)
        order, position = _sort_by_expert(experts, kept, group_sizes)
        return DispatchPlan(
            assignments=assignments,
            order=order,
            position=position,
            kept=kept,
            group_sizes=group_sizes,
            demand=demand,
            capacity=None,
            max_rows=max_rows,
        )

    # One queue an expert: sorted by expert, then first choices, then priority. The index is the last
    # key, so ties go to the earlier assignment and the sort need not be stable.
    queue = jax.lax.sort((experts, second, cost, index), num_keys=4, is_stable=False)[3]
    starts = jnp.concatenate([jnp.cumsum(demand) - demand, jnp.zeros((1,), jnp.int32)])
    position = _rank(queue) - starts[experts]
    kept = valid if capacity is None else valid & (position < capacity)
    if max_rows is not None:
        kept = within_budget(kept, max_rows)
    group_sizes = _count(experts, kept, e)
    starts = jnp.concatenate([jnp.cumsum(group_sizes) - group_sizes, jnp.zeros((1,), jnp.int32)])
    # Kept rows come first, without gaps; the dropped ones follow in batch order.
    after = group_sizes.sum() + jnp.cumsum(~kept, dtype=jnp.int32) - 1
    row = jnp.where(kept, starts[experts] + position, after)
    return DispatchPlan(
        assignments=assignments,
        order=_rank(row),
        position=position,
        kept=kept,
        group_sizes=group_sizes,
        demand=demand,
        capacity=capacity,
        max_rows=max_rows,
    )


def plan_in_groups(
    assignments: Assignments,
    groups: int,
    *,
    capacity: int | None = None,
    max_rows: int | None = None,
    priority: str = "score",
) -> DispatchPlan:
    """Returns the plan of ``plan_dispatch`` with both bounds held in each group of tokens.

    It reproduces on one device what ``groups`` devices drop when each plans for its share of the
    tokens alone, so it is the reference for ``moe_jax.parallel.sharding``.

    Args:
        assignments: of token choice, N assignments.
        groups: number of equal, consecutive token groups; must divide T.
        capacity: most rows of one expert from one group; None for no bound.
        max_rows: most rows of one group; None for no bound.
        priority: as in ``plan_dispatch``.

    Raises:
        ValueError: ``groups`` does not divide T, the assignments are of expert choice, or
            ``plan_dispatch`` rejects an argument.

    Example:
        >>> a = Assignments(
        ...     token_indices=jnp.arange(4), expert_indices=jnp.array([0, 0, 0, 1]),
        ...     weights=jnp.ones(4), valid=jnp.ones(4, bool),
        ...     num_tokens=4, num_experts=2, slots_per_token=1)
        >>> plan_in_groups(a, 2, capacity=1).kept.tolist()
        [True, False, True, True]
    """
    check_instance("assignments", assignments, Assignments, fix="Pass to_assignments(routing).")
    check_count("groups", groups, fix="1 plans for the whole batch at once.")
    tokens, slots = assignments.num_tokens, assignments.slots_per_token
    experts = assignments.num_experts
    if tokens % groups or not slots:
        raise ValueError(
            f"groups: expected token choice and a divisor of T={tokens}, got groups={groups}, "
            f"slots_per_token={slots}. Pad the batch, give jax.export a size such as '{groups}*b', or "
            "use groups=1."
        )
    if groups == 1 or (capacity is None and max_rows is None):
        return plan_dispatch(assignments, capacity=capacity, max_rows=max_rows, priority=priority)
    each = tokens // groups

    def kept_of(group: Assignments) -> Array:
        return plan_dispatch(group, capacity=capacity, max_rows=max_rows, priority=priority).kept

    # Groups are consecutive, so the flat arrays split by a reshape. Each group numbers its tokens from
    # 0; only `kept` is taken from its plan, because rows are numbered over the whole batch.
    token = jnp.tile(jnp.arange(each * slots, dtype=jnp.int32) // slots, groups)
    split = Assignments(
        token_indices=token.reshape(groups, -1),
        expert_indices=assignments.expert_indices.reshape(groups, -1),
        weights=assignments.weights.reshape(groups, -1),
        valid=assignments.valid.reshape(groups, -1),
        num_tokens=each,
        num_experts=experts,
        slots_per_token=slots,
    )
    # Decide per group, then number the rows over the whole batch, because all groups run together.
    kept = jax.vmap(kept_of)(split).reshape(-1)
    group_sizes = _count(assignments.expert_indices, kept, experts)
    order, position = _sort_by_expert(assignments.expert_indices, kept, group_sizes)
    return DispatchPlan(
        assignments=assignments,
        order=order,
        position=position,
        kept=kept,
        group_sizes=group_sizes,
        demand=_count(assignments.expert_indices, assignments.valid, experts),
        # The bounds of the plan size buffers, and an expert's buffer holds its rows of every group.
        capacity=None if capacity is None else capacity * groups,
        max_rows=None if max_rows is None else max_rows * groups,
    )


def kept_weights(plan: DispatchPlan, *, renormalize: bool = False) -> Array:
    """f32[N]: combine weights of the kept assignments, 0 elsewhere.

    With ``renormalize`` the kept weights of a token are scaled so that they add up to what its
    weights added up to before anything was dropped (token choice only).

    Args:
        plan: of one routing.
        renormalize: whether the kept weights of a token take over the weights of its dropped ones.

    Raises:
        TypeError: not a plan.
        ValueError: ``renormalize`` with expert choice.

    Example:
        >>> from moe_jax import TopK, to_assignments
        >>> router = TopK(num_experts=2, k=2)
        >>> routing = router({"kernel": jnp.zeros((4, 2))}, router.init_state(), jnp.ones((2, 4)))
        >>> plan = plan_dispatch(to_assignments(routing), capacity=1)
        >>> kept_weights(plan).tolist()
        [0.5, 0.5, 0.0, 0.0]
    """
    check_instance("plan", plan, DispatchPlan, fix="Pass what plan_dispatch returned.")
    weights = jnp.where(plan.kept, plan.assignments.weights, 0.0)
    if not renormalize:
        return weights
    slots = plan.assignments.slots_per_token
    if not slots:
        raise ValueError(
            "renormalize: expected token choice, got expert choice, whose weights are not "
            "normalized over a token. Leave renormalize off."
        )
    before = plan.assignments.weights.reshape(-1, slots).sum(axis=1, keepdims=True)
    after = weights.reshape(-1, slots).sum(axis=1, keepdims=True)
    # The inner `where` keeps the division, and so its gradient, finite for tokens that keep nothing.
    scale = jnp.where(after > 0, divide(before, jnp.where(after > 0, after, 1.0)), 0.0)
    return (weights.reshape(-1, slots) * scale).reshape(-1)


def combine(plan: DispatchPlan, outputs: Array, weights: Array) -> Array:
    """Adds up every token's expert outputs: ``y[t] = sum over its kept n of weights[n]*outputs[n]``.

    Args:
        plan: the plan of N assignments.
        outputs: [N, D] in assignment order; rows of assignments that are not kept are ignored,
            whatever they hold (NaN included).
        weights: f32[N], from ``kept_weights``.

    Returns:
        f32[T, D].
    """
    a = plan.assignments
    # A weight of 0 is not enough to ignore a row: 0 * NaN is NaN.
    rows = jnp.where(plan.kept[:, None], outputs.astype(jnp.float32), 0.0) * weights[:, None]
    # Slots of one token are neighbours in token choice: the sum over them needs no scatter.
    if a.slots_per_token:
        return rows.reshape(a.num_tokens, a.slots_per_token, -1).sum(axis=1)
    empty = jnp.zeros((a.num_tokens, rows.shape[1]), jnp.float32)
    return empty.at[a.token_indices].add(rows)
