"""The best experts of each token: on a CPU, and for few experts, without the library's search."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.selection import top_slots


def scores_with_ties(experts: int) -> jax.Array:
    """f32[500, E] of few different values, with both zeros, infinities and subnormals among them."""
    values = jnp.array([-jnp.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, jnp.inf])
    places = jax.random.randint(jax.random.key(experts), (500, experts), 0, values.size)
    return values[places]


@pytest.mark.parametrize(
    ("experts", "k"),
    [(1, 1), (2, 1), (2, 2), (3, 3), (5, 4), (8, 1), (8, 2), (8, 4), (16, 2), (8, 5)],
)
def test_the_best_slots_are_those_of_top_k_bit_for_bit(experts, k):
    """Ties go to the lowest index, and -0.0 is below 0.0, whichever way the search is compiled."""
    scores = scores_with_ties(experts)
    values, indices = jax.lax.top_k(scores, k)
    got_indices, got_values = jax.jit(lambda s: top_slots(s, k))(scores)
    np.testing.assert_array_equal(got_indices, indices, strict=True)
    # Compared as integers: 0.0 and -0.0 are equal as floats.
    np.testing.assert_array_equal(
        np.asarray(got_values).view(np.int32), np.asarray(values).view(np.int32)
    )
    many = jax.vmap(lambda s: top_slots(s, k))(scores.reshape(5, 100, experts))
    np.testing.assert_array_equal(many[0].reshape(500, k), indices)


@pytest.mark.parametrize("experts", [4, 64])
def test_nan_loses_to_everything_but_disabled_experts(experts):
    scores = jnp.full((1, experts), -1.0).at[0, 0].set(jnp.nan).at[0, 1].set(-jnp.inf)
    indices, _ = top_slots(scores, 2)
    assert indices.tolist() == [[2, 3]]
    indices, values = top_slots(scores.at[0, 2:].set(-jnp.inf), 2)
    assert indices.tolist() == [[0, 1]]
    assert values[0, 0] == jnp.finfo(jnp.float32).min


def test_more_slots_than_experts_are_refused():
    with pytest.raises(ValueError, match="k"):
        top_slots(jnp.zeros((3, 4)), 5)


def test_the_search_is_written_out_for_few_experts_on_a_cpu_alone():
    def has_top_k(experts: int, k: int, platform: str) -> bool:
        f = jax.jit(lambda s: top_slots(s, k))
        traced = f.trace(jax.ShapeDtypeStruct((32, experts), jnp.float32))
        return "top_k" in traced.lower(lowering_platforms=(platform,)).as_text()

    assert not has_top_k(8, 2, "cpu")
    assert has_top_k(8, 2, "tpu")
    assert has_top_k(8, 2, "cuda")
    assert has_top_k(64, 8, "cpu")  # the program would grow with E x K
