"""Difficulty estimators (R01, R03 - R06) against numbers worked out by hand."""

from __future__ import annotations

import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing import difficulty
from moe_jax.routing.difficulty import (
    ESTIMATORS,
    raw_difficulty,
    register_estimator,
    resolve_estimator,
)

X = jnp.array([[3.0, 4.0], [0.0, 0.0], [0.5, -2.0]], jnp.float32)


def close(got, want):
    np.testing.assert_allclose(got, np.asarray(want, np.float32), rtol=1e-5, atol=1e-6)


# --- from x alone ---------------------------------------------------------------------------


def test_activation_norm():
    close(difficulty.activation_norm(X, {}), np.sqrt([12.5, 0.0, 2.125]))


def test_large_activation_share():
    close(difficulty.large_activation_share(X, {}), [1.0, 0.0, 0.5])


def values_around_1(width: int, dtype) -> jax.Array:
    """[9, width] with both neighbours of 1 and -1, NaN and infinities; NaN where a dtype has no inf."""
    one = jnp.ones((), dtype)
    more = jnp.finfo(dtype).eps
    edges = [one, -one, one + more, -one - more, one - more / 2, 0.0, jnp.nan, jnp.inf, -jnp.inf]
    edges = jnp.stack([jnp.asarray(e, dtype) for e in edges])
    x = jax.random.normal(jax.random.key(width), (9, width), jnp.float32).astype(dtype)
    places = jax.random.randint(jax.random.key(1), (9, width), 0, 18)
    return jnp.where(places < 9, edges[jnp.minimum(places, 8)], x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("width", [1, 2, 63, 64, 97, 384, 768, 769, 1201])
def test_large_activation_share_is_exact_for_every_width_and_dtype(width, dtype):
    """Also where the sum is split: widths with and without a rest, 1 itself, NaN, infinities."""
    x = values_around_1(width, dtype)
    want = (np.abs(np.asarray(x, np.float32)) > 1).sum(axis=1)
    got = np.asarray(jax.jit(difficulty.large_activation_share)(x, {}))
    np.testing.assert_array_equal(np.rint(got * width), want)
    np.testing.assert_allclose(got, want / width, rtol=2e-7)
    plain = jax.jit(lambda x: (jnp.abs(x.astype(jnp.float32)) > 1).mean(-1, dtype=jnp.float32))
    np.testing.assert_array_equal(got, plain(x))
    # With a router's logits, as in a router, the sum waits for them; no value of theirs changes it.
    logits = jnp.array([0.0, -0.0, 1.0, -1.0, jnp.nan, -jnp.nan, jnp.inf, -jnp.inf, 1e-45])[:, None]
    for value in (logits, logits + jnp.zeros((1, 3))):
        beside = jax.jit(difficulty.large_activation_share)(x, {"router_logits": value})
        np.testing.assert_array_equal(beside, got)
    many = jax.vmap(lambda x: difficulty.large_activation_share(x, {}))(jnp.stack([x, -x, x * 0]))
    np.testing.assert_array_equal(many[:2], np.stack([got, got]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["activation_norm", "large_activation_share"])
def test_estimators_of_x_make_no_array_as_large_as_x_on_a_cpu(name, dtype):
    """The comparisons of 4096 x 768 values, written out, took twice the time of the routing itself."""
    x = jax.ShapeDtypeStruct((4096, 768), dtype)
    f = jax.jit(lambda x: raw_difficulty(name, x, {}))
    memory = f.lower(x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < x.size * x.dtype.itemsize / 4


def test_other_platforms_get_the_plain_share():
    """Their compilers fuse comparison and sum; slices would be in their way."""
    x = jax.ShapeDtypeStruct((64, 768), jnp.float32)
    f = jax.jit(lambda x: difficulty.large_activation_share(x, {}))
    for platform in ("tpu", "cuda"):
        assert "slice" not in f.trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert "slice" in f.trace(x).lower(lowering_platforms=("cpu",)).as_text()


def test_estimators_of_x_take_a_symbolic_number_of_tokens():
    pytest.importorskip("flatbuffers", reason="pip install flatbuffers: jax.export needs it")
    (t,) = jax.export.symbolic_shape("t")
    x = values_around_1(97, jnp.float32)
    for name in ("activation_norm", "large_activation_share"):
        f = jax.jit(lambda x, name=name: raw_difficulty(name, x, {}))
        exported = jax.export.export(f)(jax.ShapeDtypeStruct((t, 97), jnp.float32))
        np.testing.assert_array_equal(
            jax.export.deserialize(exported.serialize()).call(x), f(x), strict=True
        )


# --- from the router ------------------------------------------------------------------------

P = np.array([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.8, 0.1, 0.1]])
LOGITS = jnp.asarray(np.log(np.maximum(P, 1e-30)), jnp.float32)


def test_router_entropy():
    h = [math.log(2), math.log(3), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    close(difficulty.router_entropy(X, {"router_logits": LOGITS}), np.divide(h, math.log(3)))


def test_router_margin():
    close(difficulty.router_margin(X, {"router_logits": LOGITS}), [1.0, 1.0, 0.3])


@pytest.mark.parametrize("experts", [2, 3, 5, 64, 128, 160])
def test_router_margin_is_that_of_the_two_largest_wherever_they_are(experts):
    logits = jax.random.normal(jax.random.key(2), (64, experts)).at[:8, -1].set(9.0)
    logits = logits.at[8:16, :2].set(9.0)  # a tie
    p = jax.jit(lambda z: jax.nn.softmax(z, axis=-1))(logits)
    top = np.sort(np.asarray(p), axis=-1)
    got = jax.jit(difficulty.router_margin)(jnp.zeros((64, 2)), {"router_logits": logits})
    np.testing.assert_array_equal(got, 1.0 - (top[:, -1] - top[:, -2]))
    np.testing.assert_array_equal(got[8:16], 1.0)


def test_router_margin_searches_no_place_on_a_cpu():
    """The place of each row's maximum took a quarter of the time of the product and top-k at E = 64."""
    logits = jax.ShapeDtypeStruct((32, 64), jnp.float32)
    f = jax.jit(lambda z: difficulty.router_margin(z, {"router_logits": z}))
    searches = {
        platform: "stablehlo.compare"
        in f.trace(logits).lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert searches == {"cpu": False, "tpu": True, "cuda": True}


def test_one_expert_is_never_difficult():
    one = jnp.ones((3, 1), jnp.float32)
    for name in ("router_entropy", "router_margin"):
        close(raw_difficulty(name, X, {"router_logits": one}), [0.0, 0.0, 0.0])


# --- from the model -------------------------------------------------------------------------


def test_gradient_norm_is_that_of_the_gradients_given():
    """R03: the true per-token norm, of a real loss's gradient; not of the activations."""
    target = jnp.array([[3.0, 4.0], [1.0, 0.0], [0.5, 0.0]])
    gradients = jax.grad(lambda x: 0.5 * jnp.square(x - target).sum())(X)
    close(raw_difficulty("gradient_norm", X, {"gradients": gradients}), [0.0, 1.0, 2.0])
    assert not np.allclose(difficulty.activation_norm(X, {}), [0.0, 1.0, 2.0])


A = np.array([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]], np.float32)
H3 = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))


def test_attention_entropy():
    """One key: 0. Two of two: 1. Four of four: H / log 4. Weights of 0 are hidden keys."""
    close(
        raw_difficulty("attention_entropy", X, {"attention": jnp.asarray(A)}),
        [0.0, 1.0, H3 / math.log(4)],
    )


def test_attention_entropy_is_averaged_over_heads():
    heads = jnp.stack([jnp.asarray(A), jnp.full((3, 4), 0.25, jnp.float32)])
    close(
        raw_difficulty("attention_entropy", X, {"attention": heads}),
        [0.5, 1.0, (H3 / math.log(4) + 1) / 2],
    )


def test_attention_entropy_respects_the_mask():
    """Hidden keys count neither in the weights, which are rescaled, nor in the number of keys."""
    visible = jnp.array([[True] * 4, [True, True, False, False], [False, True, True, False]])
    close(
        raw_difficulty(
            "attention_entropy", X, {"attention": jnp.asarray(A), "attention_mask": visible}
        ),
        [0.0, 1.0, 1.0],
    )
    nothing = jnp.zeros((3, 4), bool)
    close(
        raw_difficulty(
            "attention_entropy", X, {"attention": jnp.asarray(A), "attention_mask": nothing}
        ),
        [0.0, 0.0, 0.0],
    )


def test_surprisal():
    context = {"logits": LOGITS, "targets": jnp.array([0, 2, 1])}
    want = -np.log([0.5, 1 / 3, 0.1]) / math.log(3)
    close(raw_difficulty("surprisal", X, context), want)


def test_prediction_entropy():
    close(
        raw_difficulty("prediction_entropy", X, {"logits": LOGITS}),
        difficulty.router_entropy(X, {"router_logits": LOGITS}),
    )


NEEDS = {
    "attention_entropy": "attention",
    "gradient_norm": "gradients",
    "prediction_entropy": "logits",
    "router_entropy": "router_logits",
    "router_margin": "router_logits",
    "surprisal": "logits",
}


def test_the_table_of_needs_is_whole():
    shipped = {n for n, f in ESTIMATORS.items() if f.__module__ == "moe_jax.routing.difficulty"}
    assert shipped == {*NEEDS, "activation_norm", "large_activation_share"}


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_missing_context_is_refused_and_never_invented(name):
    with pytest.raises(
        ValueError, match=rf"{name}: expected context\['{NEEDS[name]}'\].*got other"
    ):
        raw_difficulty(name, X, {"other": X})


# --- any function ---------------------------------------------------------------------------


def largest(x, context):
    return x.max(axis=-1)


def test_any_function_plugs_in_by_itself_or_by_name():
    close(raw_difficulty(largest, X, {}), [4.0, 0.0, 0.5])
    register_estimator("test_difficulty_largest", largest)
    register_estimator("test_difficulty_largest", largest)  # again is no conflict
    assert resolve_estimator("test_difficulty_largest") is largest
    close(raw_difficulty("test_difficulty_largest", X, {}), [4.0, 0.0, 0.5])


@pytest.mark.parametrize("name", ["activation_norm", "router_entropy"])
def test_no_gradient_flows_through_difficulty(name):
    def f(x):
        return raw_difficulty(name, x, {"router_logits": jnp.concatenate([x, -x], axis=1)}).sum()

    assert not np.asarray(jax.grad(f)(X)).any()


@pytest.mark.parametrize(
    "name", sorted(NEEDS | {"activation_norm": "", "large_activation_share": ""})
)
def test_estimators_return_float32_for_bfloat16(name):
    half = jnp.ones((3, 4), jnp.bfloat16)
    context = {
        "attention": half,
        "gradients": half,
        "logits": half,
        "router_logits": half.astype(jnp.float32),
        "targets": jnp.zeros((3,), jnp.int32),
    }
    raw = raw_difficulty(name, half, context)
    assert (raw.shape, raw.dtype) == ((3,), jnp.float32)
    assert np.isfinite(raw).all()
