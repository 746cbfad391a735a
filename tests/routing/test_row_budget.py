"""A row budget holds what it promises: the share of batches that overflow, first experts kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.bench.workload import sample_routing
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.row_budget import batch_design_effect, row_budget

HISTOGRAM = np.array([0.0, 0.6, 0.25, 0.1, 0.05])


def test_the_tolerated_share_of_batches_overflows():
    rng = np.random.default_rng(0)
    tokens, batches = 512, 4000
    rows = row_budget(HISTOGRAM, num_tokens=tokens, overflow_probability=0.05)
    totals = rng.choice(5, size=(batches, tokens), p=HISTOGRAM).sum(axis=1)
    share = (totals > rows).mean()
    assert 0.035 < share < 0.065  # 4.4 standard errors around 5 %


def test_correlated_tokens_need_the_design_effect():
    rng = np.random.default_rng(1)
    tokens, batches, run = 512, 2000, 16
    counts = np.repeat(rng.choice(5, size=batches * tokens // run, p=HISTOGRAM), run)
    effect = batch_design_effect(counts, num_tokens=tokens)
    assert 14 < effect < 18  # runs of 16 equal tokens
    totals = counts.reshape(batches, tokens).sum(axis=1)
    blind = row_budget(HISTOGRAM, num_tokens=tokens, overflow_probability=0.05)
    aware = row_budget(
        HISTOGRAM, num_tokens=tokens, overflow_probability=0.05, design_effect=effect
    )
    assert (totals > blind).mean() > 0.2
    assert 0.03 < (totals > aware).mean() < 0.07


def test_overflow_is_counted_and_spares_every_first_expert():
    routing = sample_routing(tokens=300, experts=8, k=4, load="zipf", mean_k=2.2)
    plan = plan_dispatch(to_assignments(routing), max_rows=400)
    assert int(plan.group_sizes.sum()) == 400
    assert bool(plan.kept.reshape(300, 4)[:, 0].all())
    dropped = int(to_assignments(routing).valid.sum()) - 400
    assert dropped == int(plan.demand.sum() - plan.group_sizes.sum()) > 0
    kept, weights = plan.kept.reshape(300, 4)[:, 1:], routing.combine_weights[:, 1:]
    used = routing.expert_indices[:, 1:] < 8
    lowest_kept = jnp.where(kept, weights, jnp.inf).min()
    assert float(jnp.where(used & ~kept, weights, 0.0).max()) <= float(lowest_kept)


def test_a_budget_lies_between_one_and_k_rows_a_token():
    assert row_budget(np.array([0.5, 0.5, 0.0]), num_tokens=64) == 64
    assert row_budget(np.array([0.0, 0.0, 1.0]), num_tokens=64) == 128
    assert row_budget(np.array([0.0, 1.0]), num_tokens=9) == 9
    few = row_budget(np.array([0.0, 0.5, 0.3, 0.2]), num_tokens=2, overflow_probability=1e-9)
    assert few == 6, "never above T * K"


def test_the_design_effect_sees_that_neighbours_are_alike():
    rng = np.random.default_rng(0)
    lone = rng.integers(1, 4, 64 * 200)
    alike = np.repeat(rng.integers(1, 4, 4 * 200), 16)
    assert batch_design_effect(lone, num_tokens=64) < 1.5
    assert 10 < batch_design_effect(alike, num_tokens=64) < 24


@pytest.mark.parametrize(
    ("histogram", "probability", "said"),
    [([0.5, 0.2], 0.01, "summing to 1"), ([0.0, 1.0], 0.0, "0 < overflow_probability < 1")],
)
def test_bad_input_is_refused(histogram, probability, said):
    with pytest.raises(ValueError, match=said):
        row_budget(np.array(histogram), num_tokens=8, overflow_probability=probability)


def test_rounding_adds_no_row():
    """100 tokens of mean 1.1 need 110 rows, though the product is 110.00000000000001."""
    for tenths in range(1, 10):
        shares = np.array([0.0, 1 - tenths / 10, tenths / 10])
        rows = row_budget(shares, num_tokens=100, overflow_probability=0.5)
        assert rows == 100 + 10 * tenths
