"""Parameters and states of other sizes are refused: broadcasting and indexing would hide them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
