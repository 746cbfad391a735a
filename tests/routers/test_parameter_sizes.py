"""Parameters of other sizes are refused: broadcasting and indexing would hide them.

Parameters and states of the right sizes may be numpy arrays, also those that ``jit`` closes over, and
parameters may be bfloat16 beside bfloat16 tokens: a rule calculates in float32.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import Gate, TopK
from moe_jax.routers import catalog

D = 8
RULES = {
    **{name: entry.example for name, entry in catalog().items()},
    "TopK with every parameter": TopK(
        num_experts=8, k=2, use_expert_scale=True, gate=Gate(use_bias=True, input_norm_eps=1e-6)
    ),
}
CONTEXT = {
    "TokenTable": {"token_ids": jnp.zeros((3,), jnp.int32)},
    "DepthRouter": {"router_states": jnp.zeros((3, D), jnp.float32)},
}


@pytest.mark.parametrize("name", RULES)
def test_a_compiled_function_closes_over_numpy_parameters_and_states(name):
    router = RULES[name]
    params = jax.tree.map(np.asarray, router.init(jax.random.key(0), D))
    state = jax.tree.map(np.asarray, router.init_state())

    def route(x, context):
        return router(params, state, x, context=context)

    shapes = jax.ShapeDtypeStruct((3, D), jnp.float32), CONTEXT.get(name)
    assert jax.eval_shape(route, *shapes).router_logits.shape == (3, router.num_experts)


@pytest.mark.parametrize("name", RULES)
def test_parameters_in_bfloat16_are_raised_to_float32(name):
    router = RULES[name]
    low = functools.partial(jax.tree.map, lambda a: a.astype(jnp.bfloat16))
    params, state = low(router.init(jax.random.key(0), D)), router.init_state()

    def route(params, x):
        routing = router(params, state, x, context=CONTEXT.get(name))
        return router.regularization(params, state, routing), routing

    x = jax.ShapeDtypeStruct((3, D), jnp.bfloat16)
    loss, routing = jax.eval_shape(route, params, x)
    for part in (loss, routing.router_logits, routing.router_probs, routing.combine_weights):
        assert part.dtype == jnp.float32


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_of_another_size_is_refused_while_tracing(name):
    router = RULES[name]
    params, state = router.init(jax.random.key(0), D), router.init_state()
    x = jax.ShapeDtypeStruct((3, D), jnp.float32)

    def route(params, x):
        return router(params, state, x, context=CONTEXT.get(name))

    jax.eval_shape(route, params, x)
    for part, array in params.items():
        shapes = [(*array.shape, 2)]
        for axis, size in enumerate(array.shape):
            if size > 1:
                shapes.append((*array.shape[:axis], 1, *array.shape[axis + 1 :]))
        for shape in shapes:
            wrong = {**params, part: jax.ShapeDtypeStruct(shape, array.dtype)}
            with pytest.raises(ValueError, match=r"expected .*, got .*\. [A-Z]"):
                jax.eval_shape(route, wrong, x)
