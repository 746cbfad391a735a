"""The dispatch plan: hand tables that a person can check by eye, and properties of every plan.

Promises R10 (capacity counts k, priority by score, drops reported) and the row budget.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moe_jax.routing import dispatch
from moe_jax.routing.dispatch import (
    combine,
    expert_capacity,
    kept_weights,
    plan_dispatch,
    to_assignments,
)
from moe_jax.types import Assignments, DispatchPlan, ExpertChoice


def assign(indices, weights, num_experts: int) -> Assignments:
    """Token choice from tables [T, K]; ``num_experts`` in the indices is "no expert"."""
    indices = np.asarray(indices, np.int32)
    weights = np.asarray(weights, np.float32)
    tokens, k = indices.shape
    valid = (indices < num_experts).reshape(-1)
    return Assignments(
        token_indices=jnp.arange(tokens * k, dtype=jnp.int32) // k,
        expert_indices=jnp.asarray(indices.reshape(-1)),
        weights=jnp.asarray(np.where(valid, weights.reshape(-1), 0.0), jnp.float32),
        valid=jnp.asarray(valid),
        num_tokens=tokens,
        num_experts=num_experts,
        slots_per_token=k,
    )


def rows_of(plan: DispatchPlan) -> list[list[tuple[int, float]]]:
    """For each expert, in buffer order: (token, weight). What the tables below are compared with."""
    a, rows, start = plan.assignments, [], 0
    for size in np.asarray(plan.group_sizes):
        here = np.asarray(plan.order)[start : start + size]
        rows.append([(int(a.token_indices[n]), round(float(a.weights[n]), 3)) for n in here])
        start += size
    return rows


# --- hand tables: 3 tokens, 3 experts, k = 2, capacity 2 ------------------------------------

# Read: token 0 wants expert 0 with weight .6 and expert 1 with .4, and so on. Expert 0 is wanted by
# all three tokens, so with two rows it must turn one away.
#
#           first choice   second choice
# token 0   0  .60         1  .40
# token 1   0  .70         2  .30
# token 2   0  .90         1  .10
EXPERTS = [[0, 1], [0, 2], [0, 1]]
WEIGHTS = [[0.60, 0.40], [0.70, 0.30], [0.90, 0.10]]


@pytest.mark.parametrize(
    ("bounds", "rows"),
    [
        pytest.param(
            {},
            [[(0, 0.6), (1, 0.7), (2, 0.9)], [(0, 0.4), (2, 0.1)], [(1, 0.3)]],
            id="dropless: everything, in batch order",
        ),
        pytest.param(
            {"capacity": 2, "priority": "order"},
            [[(0, 0.6), (1, 0.7)], [(0, 0.4), (2, 0.1)], [(1, 0.3)]],
            id="vanilla: expert 0 turns away token 2, which came last",
        ),
        pytest.param(
            {"capacity": 2, "priority": "score"},
            [[(2, 0.9), (1, 0.7)], [(0, 0.4), (2, 0.1)], [(1, 0.3)]],
            id="priority: expert 0 turns away token 0, which has the least weight",
        ),
        pytest.param(
            {"capacity": 1, "priority": "order"},
            [[(0, 0.6)], [(0, 0.4)], [(1, 0.3)]],
            id="vanilla, capacity 1",
        ),
        pytest.param(
            {"capacity": 1, "priority": "score"},
            [[(2, 0.9)], [(0, 0.4)], [(1, 0.3)]],
            id="priority, capacity 1",
        ),
        pytest.param(
            {"max_rows": 4, "priority": "score"},
            [[(0, 0.6), (1, 0.7), (2, 0.9)], [(0, 0.4)], []],
            id="4 rows: three first choices, then the best second choice (.4)",
        ),
        pytest.param(
            {"max_rows": 4, "priority": "order"},
            [[(0, 0.6), (1, 0.7), (2, 0.9)], [(0, 0.4)], []],
            id="4 rows in batch order: three first choices, then the earliest second choice",
        ),
        pytest.param(
            {"max_rows": 3, "priority": "score"},
            [[(0, 0.6), (1, 0.7), (2, 0.9)], [], []],
            id="3 rows: the first choices alone",
        ),
        pytest.param(
            {"capacity": 2, "max_rows": 3, "priority": "score"},
            [[(2, 0.9), (1, 0.7)], [(0, 0.4)], []],
            id="capacity 2 turns token 0 away from expert 0; its row goes to the best second choice",
        ),
    ],
)
def test_hand_tables(bounds, rows):
    assert rows_of(plan_dispatch(assign(EXPERTS, WEIGHTS, 3), **bounds)) == rows


def test_first_choices_come_before_second_ones():
    """Expert 1 has one row: token 0's second choice is earlier, token 1's first choice goes first."""
    a = assign([[0, 1], [1, 0], [1, 0]], [[0.5, 0.5], [0.6, 0.4], [0.9, 0.1]], 2)
    assert rows_of(plan_dispatch(a, capacity=1, priority="choice")) == [[(0, 0.5)], [(1, 0.6)]]
    assert rows_of(plan_dispatch(a, capacity=1, priority="order")) == [[(0, 0.5)], [(0, 0.5)]]
    two = plan_dispatch(a, capacity=2, priority="choice")
    assert rows_of(two) == [[(0, 0.5), (1, 0.4)], [(1, 0.6), (2, 0.9)]]
    in_all = plan_dispatch(a, max_rows=4, priority="choice")
    assert rows_of(in_all) == [[(0, 0.5)], [(0, 0.5), (1, 0.6), (2, 0.9)]]


def test_hand_table_of_the_output():
    """Expert e returns 10 ** e, so the output's digits say which experts each token got."""
    plan = plan_dispatch(assign(EXPERTS, WEIGHTS, 3), capacity=2)
    outputs = 10.0 ** plan.assignments.expert_indices.astype(jnp.float32)[:, None]
    y = combine(plan, outputs, kept_weights(plan))
    np.testing.assert_allclose(y[:, 0], [4.0, 0.7 + 30.0, 0.9 + 1.0], rtol=1e-6)
    y = combine(plan, outputs, kept_weights(plan, renormalize=True))
    # Token 0 lost its .6; what is left, .4, is scaled back up to the 1.0 that it had.
    np.testing.assert_allclose(y[:, 0], [10.0, 0.7 + 30.0, 0.9 + 1.0], rtol=1e-6)


def test_ties_go_to_the_earlier_assignment():
    plan = plan_dispatch(assign([[0], [0], [0]], [[0.5], [0.5], [0.5]], 2), capacity=2)
    assert plan.kept.tolist() == [True, True, False]


def test_unused_slots_take_no_room():
    plan = plan_dispatch(assign([[0, 2], [2, 2], [0, 1]], [[0.9, 0], [0, 0], [0.8, 0.2]], 2))
    assert rows_of(plan) == [[(0, 0.9), (2, 0.8)], [(2, 0.2)]]
    assert plan.demand.tolist() == [2, 1]
    assert plan.kept.tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize("bounds", [{}, {"capacity": 2}, {"max_rows": 3}])
def test_a_batch_of_padding_alone(bounds):
    plan = plan_dispatch(assign(np.full((3, 2), 4), np.zeros((3, 2)), 4), **bounds)
    assert not plan.kept.any()
    assert plan.group_sizes.tolist() == plan.demand.tolist() == [0, 0, 0, 0]
    assert sorted(plan.order.tolist()) == list(range(6))
    assert kept_weights(plan, renormalize=True).tolist() == [0.0] * 6


# --- capacity -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "experts", "k", "factor", "rows"),
    [
        (4096, 8, 2, 1.25, 1280),  # flaxformer, praxis, axlearn: 640, which forgets k
        (4096, 8, 1, 1.25, 640),
        (3, 3, 2, 1.0, 2),
        (100, 8, 1.3, 1.0, 17),  # a mean k; 16.25 rounds up
        (2, 64, 1, 1.0, 1),  # at least one row
        (4, 2, 2, 9.0, 4),  # at most T: nobody sends a token twice
    ],
)
def test_expert_capacity_counts_k(tokens, experts, k, factor, rows):
    assert expert_capacity(tokens, experts, k, factor) == rows


@pytest.mark.parametrize("k", [1, 2, 1.3, 0.7])
def test_expert_capacity_reads_numbers_as_they_are_written(k):
    """1.1 of 10 rows are 11: no rounding of a binary product adds a row, for any factor."""
    for hundredths in range(1, 300):
        factor = hundredths / 100
        for tokens, experts in ((100, 10), (1000, 8), (96, 64), (7, 3)):
            exact = Fraction(hundredths, 100) * tokens * Fraction(str(k)) / experts
            want = max(1, min(tokens, math.ceil(exact)))
            assert expert_capacity(tokens, experts, k, factor) == want, (tokens, experts, factor)
    assert expert_capacity(100, 10, 1, np.float32(1.1)) == 11
    assert expert_capacity(100, 10, 1, np.float64(1.1)) == 11


def test_capacity_of_perfect_balance_drops_nothing():
    tokens, experts, k = 16, 8, 2
    indices = (np.arange(tokens * k) % experts).reshape(tokens, k)
    plan = plan_dispatch(
        assign(indices, np.ones((tokens, k)), experts),
        capacity=expert_capacity(tokens, experts, k, 1.0),
    )
    assert plan.kept.all()


# --- properties of every plan ---------------------------------------------------------------


@st.composite
def problems(draw):
    # Few distinct shapes: each is compiled once.
    tokens, experts, k = draw(st.sampled_from([(7, 4, 2), (5, 3, 3), (1, 2, 1)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    indices = np.argsort(rng.gumbel(size=(tokens, experts)) + 3.0 * rng.random(experts), axis=1)
    used = rng.integers(0, k + 1, (tokens, 1))
    indices = np.where(np.arange(k)[None, :] < used, indices[:, :k], experts)
    weights = -np.sort(-rng.choice([0.0, 0.25, 0.5, 0.75], (tokens, k)), axis=1)  # with ties
    capacity = draw(st.sampled_from([None, 1, 2, 4]))
    max_rows = draw(st.sampled_from([None, tokens, tokens + 2]))
    return assign(indices, weights, experts), capacity, max_rows, draw(st.booleans())


@given(problems())
def test_plan_invariants(problem):
    a, capacity, max_rows, by_score = problem
    plan = plan_dispatch(
        a, capacity=capacity, max_rows=max_rows, priority="score" if by_score else "order"
    )
    n, slots = a.expert_indices.shape[0], a.slots_per_token
    order, kept, valid = (np.asarray(v) for v in (plan.order, plan.kept, a.valid))
    sizes, experts = np.asarray(plan.group_sizes), np.asarray(a.expert_indices)
    position, offsets = np.asarray(plan.position), np.asarray(plan.group_offsets)

    assert sorted(order) == list(range(n)), "order is a permutation"
    total = sizes.sum()
    assert kept[order[:total]].all(), "kept rows are compact"
    assert not kept[order[total:]].any(), "and the rest comes after"
    assert (np.diff(experts[order[:total]]) >= 0).all(), "and sorted by expert"
    assert not (kept & ~valid).any(), "an unused slot is never kept"
    for e in range(a.num_experts):
        mine = kept & (experts == e)
        assert sizes[e] == mine.sum()
        assert sorted(position[mine]) == list(range(sizes[e])), "position has no gaps"
        assert np.asarray(plan.demand)[e] == (valid & (experts == e)).sum()
    rows = offsets[np.minimum(experts, a.num_experts - 1)] + position
    assert (order[rows[kept]] == np.flatnonzero(kept)).all(), "position is where order has it"

    assert capacity is None or sizes.max() <= capacity
    assert max_rows is None or total <= max_rows
    assert total <= plan.num_rows
    assert sizes.max() <= plan.max_group
    if capacity is None and max_rows is None:
        assert (kept == valid).all(), "dropless drops nothing"
    first = np.arange(n) % slots == 0
    if max_rows is not None and capacity is None:
        assert kept[first & valid].all(), "a row budget never drops a first expert"
        assert total == min(max_rows, valid.sum()), "and leaves no row unused"
    if capacity is not None and max_rows is None:
        want = np.minimum(np.asarray(plan.demand), capacity)
        assert (sizes == want).all(), "capacity leaves no row unused"
    if by_score and max_rows is None:
        weights = np.asarray(a.weights)
        for e in range(a.num_experts):
            lost = valid & ~kept & (experts == e)
            won = kept & (experts == e)
            if lost.any():
                assert weights[won].min() >= weights[lost].max(), "the least weight is dropped"


def test_a_row_budget_plans_where_only_the_weights_differ_between_devices():
    """Whether the budget overflows is decided at run time, and both answers have one type."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    fixed = assign(EXPERTS, WEIGHTS, 3)

    def kept(weights: jax.Array) -> jax.Array:
        return plan_dispatch(dataclasses.replace(fixed, weights=weights), max_rows=4).kept

    across = jax.shard_map(kept, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert across(fixed.weights).tolist() == [True, True, True, False, True, False]


def test_plans_under_jit_equal_eager_plans():
    a = assign(EXPERTS, WEIGHTS, 3)
    for bounds in ({}, {"capacity": 2}, {"capacity": 2, "max_rows": 4}):
        jitted = jax.jit(lambda a, bounds=bounds: plan_dispatch(a, **bounds))(a)
        jax.tree.map(np.testing.assert_array_equal, jitted, plan_dispatch(a, **bounds))


def test_packed_sort_equals_the_stable_argsort():
    keys = jax.random.randint(jax.random.key(0), (257,), 0, 5, jnp.int32)
    packed = dispatch._stable_argsort(keys, 5)
    fallback = dispatch._stable_argsort(keys, 2**31)  # too wide to pack: sorts pairs
    np.testing.assert_array_equal(packed, np.argsort(np.asarray(keys), kind="stable"))
    np.testing.assert_array_equal(packed, fallback)
    assert packed.dtype == fallback.dtype == jnp.int32


# --- expert choice --------------------------------------------------------------------------


def expert_choice() -> ExpertChoice:
    # Expert 0 takes tokens 2 and 0; expert 1 takes token 2 and leaves a slot unused (index T = 3).
    zeros = jnp.zeros((3, 2), jnp.float32)
    return ExpertChoice(
        token_indices=jnp.array([[2, 0], [2, 3]], jnp.int32),
        combine_weights=jnp.array([[0.9, 0.3], [0.8, 0.0]], jnp.float32),
        router_logits=zeros,
        router_probs=zeros + 0.5,
        token_mask=jnp.ones((3,), bool),
        num_tokens=3,
    )


def test_expert_choice_assignments():
    a = to_assignments(expert_choice())
    assert a.token_indices.tolist() == [2, 0, 2, 0]
    assert a.expert_indices.tolist() == [0, 0, 1, 2]  # 2 is "no expert"
    assert a.valid.tolist() == [True, True, True, False]
    assert a.slots_per_token == 0
    plan = plan_dispatch(a)
    assert rows_of(plan) == [[(2, 0.9), (0, 0.3)], [(2, 0.8)]]
    y = combine(plan, jnp.full((4, 1), 10.0), kept_weights(plan))
    np.testing.assert_allclose(y[:, 0], [3.0, 0.0, 17.0], rtol=1e-6)
    assert expert_choice().num_experts_per_token.tolist() == [1, 0, 2]


def test_expert_choice_under_a_row_budget_keeps_the_best():
    plan = plan_dispatch(to_assignments(expert_choice()), max_rows=2)
    assert rows_of(plan) == [[(2, 0.9)], [(2, 0.8)]]
