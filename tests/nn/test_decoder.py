"""The decoder as an NNX and as a Linen module: one model with the pure functions, trained, resumed."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from moe_jax.checkpoint import CheckpointError
from moe_jax.lab import language_model as pure
from moe_jax.lab import model_files
from moe_jax.lab import optimizer as optimizers
from moe_jax.lab import training as train
from moe_jax.nn.patching import patch_model_with_dynamic_routing
from moe_jax.routers import DynamicK

CONFIG = pure.LMConfig(
    num_layers=2,
    moe_every=2,
    d_model=16,
    num_heads=2,
    num_experts=4,
    k=2,
    d_ff=8,
    length=16,
    batch_size=2,
    balance_rate=1e-2,
    router_rate=0.5,
    expert_rate=2.0,
    router_decay=0.0,
    implementation="dense",  # compiles fastest
)
DEEP = dataclasses.replace(CONFIG, num_layers=4)  # two groups of a plain layer and one with experts
STEPS = 6
TOKENS = jax.random.randint(jax.random.key(0), (STEPS, 2, 17), 0, 256)


def _example(name):
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


linen = _example("linen_decoder")
nnx_decoder = _example("nnx_decoder")
Decoder = nnx_decoder.Decoder


@pytest.fixture(scope="module")
def start():
    return train.init_training(CONFIG, STEPS, 0)


def _module(state):
    # A copy: train_step donates its state.
    params, states = jax.tree.map(jnp.copy, (state.params, state.router_states))
    decoder = Decoder(CONFIG, params=params, states=states)
    return decoder, nnx.Optimizer(decoder, optimizers.optimizer(CONFIG, STEPS), wrt=nnx.Param)


def _equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


def test_pure_nnx_and_linen_are_one_model():
    tokens = TOKENS[0, :, :-1]
    params, states = pure.init(DEEP, jax.random.key(0)), pure.init_states(DEEP)
    want = jax.jit(pure.forward, static_argnums=0)(DEEP, params, states, tokens)
    decoder = Decoder(DEEP, params=params, states=states)
    assert [hasattr(layer, "moe") for layer in decoder.layers] == [False, True, False, True]
    _equal(decoder.params(), params)  # there and back
    _equal(decoder.states(), states)
    _equal(Decoder(DEEP, rngs=nnx.Rngs(0)).params()["norm"], params["norm"])
    got = nnx.jit(lambda m, t: m(t))(decoder, tokens)
    twin = linen.Decoder(DEEP)
    shapes = nn.meta.unbox(jax.eval_shape(twin.init, jax.random.key(0), tokens))
    assert jax.tree.structure(shapes["params"]) == jax.tree.structure(params)
    assert jax.tree.map(jnp.shape, shapes["params"]) == jax.tree.map(jnp.shape, params)
    variables = {
        "params": params,
        "router_state": linen.router_state(states),
    }
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    again = jax.jit(twin.apply)(variables, tokens)
    for other in (got, again):
        np.testing.assert_allclose(other.logits, want.logits, rtol=1e-5, atol=1e-5)
        for a, b in zip(other.layers, want.layers, strict=True):
            np.testing.assert_array_equal(a.routing.expert_indices, b.routing.expert_indices)


def test_they_are_trained_alike_and_resumed_bit_for_bit(tmp_path, start):
    decoder, optimizer = _module(start)
    state = jax.tree.map(jnp.copy, start)
    variables = jax.tree.map(
        jnp.copy,
        {"params": start.params, "router_state": linen.router_state(start.router_states)},
    )
    opt_state = jax.tree.map(jnp.copy, start.optimizer_state)
    for i in range(STEPS):
        if i == 3:
            nnx_decoder.save_decoder(tmp_path / "half", decoder, optimizer)
        state, metrics = train.train_step(CONFIG, STEPS, state, TOKENS[i])
        stepped = nnx_decoder.decoder_step(decoder, optimizer, TOKENS[i])
        # The examples draw no budgets, so they have no metrics of a second pass.
        assert metrics.pop("distillation") == 0
        assert metrics.pop("computed_experts_per_token") == CONFIG.k
        _close(stepped, metrics)
        variables, opt_state, same = linen.step(CONFIG, STEPS, variables, opt_state, TOKENS[i])
        _close(same, metrics)
    _close(decoder.params(), state.params)
    _close(decoder.states(), state.router_states)
    _close(variables["params"], state.params)
    assert float(jnp.abs(decoder.states()[0].expert_bias).max()) > 0

    resumed, its_optimizer = nnx_decoder.load_decoder(
        tmp_path / "half", optimizers.optimizer(CONFIG, STEPS)
    )
    for i in range(3, STEPS):
        nnx_decoder.decoder_step(resumed, its_optimizer, TOKENS[i])
    _equal(resumed.params(), decoder.params())
    _equal(resumed.states(), decoder.states())
    # The checkpoint is one that the pure model and the command line take.
    assert model_files.load_model(tmp_path / "half").config == CONFIG
    other = dataclasses.replace(CONFIG, max_grad_norm=1.0, weight_decay=0.0)
    bare = nnx_decoder.save_decoder(tmp_path / "bare", decoder)
    with pytest.raises(CheckpointError, match="expected extra 'nnx_optimizer'"):
        nnx_decoder.load_decoder(bare, optimizers.optimizer(other, STEPS))


def _second_update(config, params, grads):
    """The optimiser's second step: the first of a warm-up has rate 0."""

    @jax.jit
    def both(params, grads):
        tx = optimizers.optimizer(config, STEPS)
        _, opt_state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, opt_state, params)[0]

    with jax.numpy_dtype_promotion("standard"):
        return jax.tree_util.tree_leaves_with_path(both(params, grads))


@pytest.mark.parametrize("part", ["router", "experts"])
def test_routers_and_experts_have_rates_of_their_own(start, part):
    field = {"router": "router_rate", "experts": "expert_rate"}[part]
    config = dataclasses.replace(CONFIG, **{field: 0.0})
    grads = jax.tree.map(jnp.ones_like, start.params)
    for path, update in _second_update(config, start.params, grads):
        assert bool((update == 0).all()) == (part == optimizers.part_of(path)), path


def test_experts_have_a_decay_of_their_own_and_norms_have_none(start):
    config = dataclasses.replace(CONFIG, weight_decay=0.5, expert_decay=0.0, router_decay=None)
    for path, update in _second_update(
        config, start.params, jax.tree.map(jnp.zeros_like, start.params)
    ):
        name = jax.tree_util.keystr(path)
        assert bool((update != 0).any()) == ("norm" not in name and "experts" not in name), name


def test_what_works_on_an_nnx_model_works_on_the_decoder(start):
    decoder, _ = _module(start)
    report = patch_model_with_dynamic_routing(
        decoder, 0.25, 0.5, calibration=TOKENS[:, 0, :-1], target_mean_k=1.5
    )
    assert list(report) == ["layers/1/moe"]
    assert all(isinstance(rule, DynamicK) for rule in decoder.routers())
    out = decoder(TOKENS[:, 0, :-1])
    for aux in out.layers:
        assert float(aux.stats.mean_experts_per_token) == pytest.approx(1.5, rel=0.02)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="moe_every: expected a divisor of num_layers=2, got 3"):
        dataclasses.replace(CONFIG, moe_every=3)
    with pytest.raises(ValueError, match="router_decay: expected at least 0, got -1"):
        dataclasses.replace(CONFIG, router_decay=-1.0)
    with pytest.raises(ValueError, match=r"rngs: expected nnx\.Rngs or params=, got neither"):
        Decoder(CONFIG)
    with pytest.raises(ValueError, match="routers: expected one for each of the 1 layers"):
        Decoder(CONFIG, rngs=nnx.Rngs(0), routers=[])


@pytest.mark.parametrize("example", [linen, nnx_decoder], ids=["linen", "nnx"])
def test_the_examples_run(example, capsys):
    example.main(CONFIG, STEPS)
    bits = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(bits) == 3
    assert bits[-1] < bits[0]
