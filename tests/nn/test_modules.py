"""Flax modules add nothing to the pure function: same trees, same bits, state only where told."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import moe_jax
from moe_jax.nn import linen as moe_linen
from moe_jax.nn import nnx as moe_nnx

D, F, E = 8, 16, 4
FFN = moe_jax.FeedForward(activation="silu", gated=True, use_bias=True)
RULES = {
    "top_k": moe_jax.TopK(num_experts=E, k=2, balance_rate=0.1),
    "dynamic_k": moe_jax.DynamicK(num_experts=E, min_k=1, max_k=3, balance_rate=0.1),
    "top_p": moe_jax.TopP(num_experts=E, max_k=3, target_mean_k=1.5),
    "expert_threshold": moe_jax.ExpertThreshold(num_experts=E, target_k=2.0, decay=0.5),
    "top_any": moe_jax.TopAny(num_experts=E),
    "expert_choice": moe_jax.ExpertChoiceRouter(num_experts=E),
}
X = jax.random.normal(jax.random.key(9), (2, 12, D))


@pytest.fixture(params=sorted(RULES))
def rule(request):
    return RULES[request.param]


# Eager calls compile every operation by itself.
moe_layer = jax.jit(moe_jax.moe_layer, static_argnums=(0, 1))
call_nnx = nnx.jit(lambda module, x: module(x))
call_nnx_with_aux = nnx.jit(lambda module, x: module(x, return_aux=True))
gradients_nnx = nnx.jit(nnx.grad(lambda module: (module(X) ** 2).sum()))


def _equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _nnx(rule, **kwargs):
    kwargs = {"d_model": D, "d_ff": F, "expert_fn": FFN, "shared_d_ff": 4} | kwargs
    return moe_nnx.MoE(rule, rngs=nnx.Rngs(0), **kwargs)


def _linen(rule):
    return moe_linen.MoE(rule, d_model=D, d_ff=F, expert_fn=FFN, shared_d_ff=4)


def test_pure_nnx_and_linen_have_one_tree_and_give_the_same_bits(rule):
    module = _nnx(rule)
    params, state = module.params(), module.router_state.get_value()
    pure, _ = moe_layer(rule, FFN, params, state, X)

    np.testing.assert_array_equal(call_nnx(module, X), pure)

    layer = _linen(rule)
    variables = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), X))
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
    own = {"params": params, "router_state": {"state": state}}
    np.testing.assert_array_equal(jax.jit(layer.apply)(own, X), pure)


def test_only_update_router_writes_the_state(rule):
    module = _nnx(rule)
    before = jax.tree.map(np.asarray, module.router_state.get_value())
    _, aux = call_nnx_with_aux(module, X)
    _equal(before, module.router_state.get_value())
    expected = rule.update(module.router_state.get_value(), aux.stats)
    module.update_router(aux)
    _equal(expected, module.router_state.get_value())

    layer = _linen(rule)
    variables = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), X))
    apply = partial(layer.apply, return_aux=True, mutable=["router_state"])
    (_, aux), changed = jax.jit(apply)(variables, X)
    _equal(variables["router_state"], changed["router_state"])
    with pytest.raises(ValueError, match="mutable"):
        layer.apply(variables, aux, method="update_router")
    _, changed = layer.apply(variables, aux, method="update_router", mutable=["router_state"])
    expected = rule.update(variables["router_state"]["state"], aux.stats)
    _equal(expected, changed["router_state"]["state"])


@pytest.mark.parametrize(
    "own",
    [RULES["top_any"], moe_jax.ReLURouter(num_experts=E, target_k=2.0, l1_coefficient=1.0)],
    ids=["top_any", "relu"],
)
def test_the_rules_own_loss_is_a_method_of_both_modules(own):
    """Equal to the pure function, with a gradient for the router, in Linen's boxes as out of them."""
    module = _nnx(own)
    params, state = module.params(), module.router_state.get_value()

    def pure(params):
        _, aux = moe_jax.moe_layer(own, FFN, params, state, X)
        return own.regularization(params["router"], state, aux.routing)

    def of_nnx(module):
        _, aux = module(X, return_aux=True)
        return module.regularization(aux)

    layer = _linen(own)

    def of_linen(params):
        variables = {"params": params, "router_state": {"state": state}}
        _, aux = layer.apply(variables, X, return_aux=True)
        return layer.apply(variables, aux, method="regularization")

    value, gradient = jax.jit(jax.value_and_grad(pure))(params)
    assert float(value) > 0
    assert float(jnp.abs(gradient["router"]["kernel"]).max()) > 0
    got, held = nnx.jit(nnx.value_and_grad(of_nnx))(module)
    np.testing.assert_allclose(got, value, rtol=1e-6)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        nnx.to_pure_dict(held)["router"],
        gradient["router"],
    )
    boxed = jax.eval_shape(layer.init, jax.random.key(0), X)["params"]
    boxed = nn.meta.replace_boxed(boxed, params)
    assert isinstance(boxed["router"]["kernel"], nn.LogicallyPartitioned)
    for given in (params, boxed):
        got, held = jax.jit(jax.value_and_grad(of_linen))(given)
        np.testing.assert_allclose(got, value, rtol=1e-6)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            nn.meta.unbox(held)["router"],
            gradient["router"],
        )


def test_update_router_works_inside_nnx_jit():
    module = _nnx(RULES["top_k"])

    @nnx.jit
    def step(module, x):
        _, aux = module(x, return_aux=True)
        module.update_router(aux)

    step(module, X)
    assert float(jnp.abs(module.router_state.get_value().expert_bias).max()) > 0


def test_router_state_is_no_parameter():
    module = _nnx(RULES["dynamic_k"])
    assert "router_state" not in nnx.to_pure_dict(nnx.state(module, nnx.Param))
    assert "router_state" in nnx.to_pure_dict(nnx.state(module, moe_nnx.RouterState))
    grads = gradients_nnx(module)
    assert set(nnx.to_pure_dict(grads)) == {"router", "experts", "shared"}


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_no_array_of_a_module_is_in_it_twice(rule):
    """A training step may donate the whole module, its routing state included."""
    step = jax.jit(
        lambda tree: jax.tree.map(lambda v: v + jnp.ones((), v.dtype), tree), donate_argnums=0
    )
    params_and_state = (nnx.Param, moe_nnx.RouterState)
    step(nnx.to_pure_dict(nnx.state(_nnx(rule), params_and_state)))
    step(nn.meta.unbox(_linen(rule).init(jax.random.key(0), X)))


@pytest.mark.parametrize("name", ["dynamic_k", "expert_choice"])  # one of each kind of routing
def test_gradients_equal_those_of_the_pure_function(name):
    rule = RULES[name]
    module = _nnx(rule)
    params, state = module.params(), module.router_state.get_value()

    def loss(p):
        return (moe_jax.moe_layer(rule, FFN, p, state, X)[0] ** 2).sum()

    pure = jax.jit(jax.grad(loss))(params)
    held = nnx.to_pure_dict(gradients_nnx(module))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), held, pure)


def test_kernels_carry_the_names_of_their_axes():
    spec = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(_nnx(RULES["top_k"]), nnx.Param)))
    expected = jax.sharding.PartitionSpec("expert", "embed", "mlp")
    assert spec["experts"]["up"] == expected
    assert spec["router"]["kernel"] == jax.sharding.PartitionSpec("embed", None)
    boxed = _linen(RULES["top_k"]).init(jax.random.key(0), X)
    assert nn.get_partition_spec(boxed)["params"]["experts"]["up"] == expected


def test_nnx_scan_over_layers_equals_a_loop():
    rule = RULES["dynamic_k"]

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return moe_nnx.MoE(rule, d_model=D, d_ff=F, expert_fn=FFN, rngs=rngs)

    layers = stack(nnx.Rngs(0))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return x + layer(x)

    y = X
    graph, state = nnx.split(layers)
    for i in range(3):
        y = y + call_nnx(nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)), y)
    np.testing.assert_allclose(nnx.jit(run)(layers, X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [nnx.remat, jax.checkpoint], ids=["nnx.remat", "jax.checkpoint"])
def test_rematerialised_gradients_are_equal(remat):
    module = _nnx(RULES["dynamic_k"])
    if remat is nnx.remat:
        loss = lambda m: (nnx.remat(lambda m, x: m(x))(m, X) ** 2).sum()  # noqa: E731
        again = nnx.jit(nnx.grad(loss))(module)
    else:
        graph, state = nnx.split(module)
        call = jax.checkpoint(lambda s, x: nnx.merge(graph, s)(x))
        params, rest = nnx.split_state(state, nnx.Param, ...)
        loss = lambda p: (call(nnx.merge_state(p, rest), X) ** 2).sum()  # noqa: E731
        again = jax.jit(jax.grad(loss))(params)
    plain = gradients_nnx(module)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        nnx.to_pure_dict(again),
        nnx.to_pure_dict(plain),
    )


def test_linen_scan_and_remat():
    rule = RULES["dynamic_k"]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            layer = nn.remat(moe_linen.MoE)(rule, d_model=D, d_ff=F, expert_fn=FFN)
            return x + layer(x), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "router_state": 0}
            scanned = nn.scan(
                Block,
                variable_axes=axes,
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layer"},
            )
            return scanned(name="layers")(x, None)[0]

    variables = nn.meta.unbox(jax.jit(Stack().init)(jax.random.key(0), X))
    inside = variables["params"]["layers"]
    (name,) = inside
    assert inside[name]["experts"]["up"].shape == (3, E, D, F)
    y = X
    for i in range(3):
        params = jax.tree.map(lambda a, i=i: a[i], inside[name])
        state = jax.tree.map(
            lambda a, i=i: a[i], variables["router_state"]["layers"][name]["state"]
        )
        y = y + moe_layer(rule, FFN, params, state, y)[0]
    np.testing.assert_allclose(jax.jit(Stack().apply)(variables, X), y, rtol=1e-5, atol=1e-5)
    loss = lambda v: (Stack().apply({**variables, "params": v}, X) ** 2).sum()  # noqa: E731
    grads = jax.jit(jax.grad(loss))(variables["params"])
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


def test_mixed_precision_keeps_the_router_in_float32():
    module = _nnx(RULES["top_k"])
    y, aux = call_nnx_with_aux(module, X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert aux.routing.router_logits.dtype == jnp.float32


def test_the_guides_dynamic_moe_holds_its_range_and_its_budget():
    layer = moe_nnx.DynamicMoE(8, FFN, 1, 3, d_model=D, d_ff=F, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2000, D))
    layer.fit_router(x.reshape(4, 500, D), target_mean_k=1.6)  # shaped as the layer takes it
    _, aux = call_nnx_with_aux(layer, x)
    assert float(aux.stats.mean_experts_per_token) == pytest.approx(1.6, rel=0.01)
    assert aux.stats.experts_per_token_histogram[1:].min() > 0
    assert float(layer.router_state.get_value().fit.achieved_mean_k) == pytest.approx(1.6, rel=0.01)

    twin = moe_linen.DynamicMoE(8, FFN, 1, 3, d_model=D, d_ff=F)
    own = {"params": layer.params(), "router_state": {"state": layer.router_state.get_value()}}
    np.testing.assert_array_equal(jax.jit(twin.apply)(own, x), call_nnx(layer, x))


def test_experts_of_ones_own():
    def expert(params, rows):
        return jnp.tanh(rows * params["scale"][None, :])

    def init(key, num_experts):
        return {"scale": jax.random.normal(key, (num_experts, D))}

    rule = RULES["top_k"]
    layer = moe_nnx.MoE(
        rule, d_model=D, expert_fn=expert, expert_init=init, rngs=nnx.Rngs(0), capacity_factor=1.0
    )
    twin = moe_linen.MoE(rule, d_model=D, expert_fn=expert, expert_init=init, capacity_factor=1.0)
    own = {
        "params": layer.params(),
        "router_state": {"state": layer.router_state.get_value()},
    }
    np.testing.assert_array_equal(twin.apply(own, X), layer(X))


def test_router_modules_route():
    rule = RULES["top_p"]
    layer = moe_nnx.Router(rule, D, rngs=nnx.Rngs(0))
    x = X.reshape(-1, D)
    layer.fit_router(x, target_mean_k=1.5)
    routing = layer(x)
    assert float(routing.num_experts_per_token.mean()) == pytest.approx(1.5, rel=0.05)
    twin = moe_linen.Router(rule, D)
    variables = nn.meta.unbox(twin.init(jax.random.key(0), x))
    state = {"state": layer.router_state.get_value()}
    params = {"router": {"kernel": layer.router["kernel"].get_value()}}
    assert jax.tree.structure(params) == jax.tree.structure(variables["params"])
    _equal(
        dataclasses.asdict(twin.apply({"params": params, "router_state": state}, x)),
        dataclasses.asdict(routing),
    )


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"d_ff": None}, "d_ff"),
        ({"expert_fn": lambda p, r: r}, "expert_init"),
        ({"expert_fn": lambda p, r: r, "expert_init": lambda k, n: {}}, "shared_d_ff"),
    ],
)
def test_bad_specs_say_what_to_do(kwargs, said):
    with pytest.raises(ValueError, match=said):
        _nnx(RULES["top_k"], **kwargs)


def test_every_module_takes_what_a_layer_reports_or_its_statistics():
    rule = RULES["top_k"]
    layer, router = _nnx(rule), moe_nnx.Router(rule, D, rngs=nnx.Rngs(0))
    _, aux = layer(X, return_aux=True)
    want = rule.update(layer.router_state.get_value(), aux.stats)
    for module in (layer, router):
        for reported in (aux, aux.stats):
            module.router_state.set_value(rule.init_state())
            module.update_router(reported)
            _equal(module.router_state.get_value(), want)
