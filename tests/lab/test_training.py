"""The small language model: it learns, it is causal, and what is restored or resumed is the same."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoint, restore, save
from moe_jax.lab import language_model as model_of
from moe_jax.lab import model_files
from moe_jax.lab import training as lm
from moe_jax.lab.data import load_corpus
from moe_jax.lab.lm_config import LMConfig
from moe_jax.routers import DynamicK

TINY = LMConfig(
    num_layers=2,
    d_model=32,
    num_heads=2,
    num_experts=8,
    k=4,
    d_ff=16,
    length=32,
    batch_size=8,
    learning_rate=1e-2,
    balance_rate=1e-3,
)
STEPS = 30
forward = jax.jit(model_of.forward, static_argnums=0, static_argnames="routers")
TOKENS = jax.random.randint(jax.random.key(0), (2, 32), 0, 256)


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("lm") / "model"
    return lm.train(TINY, path, STEPS, 0, False, corpus=corpus)


def test_the_loss_falls(trained):
    bits = [h["bits_per_byte"] for h in trained[1]["history"]]
    assert bits[0] > 6.0
    assert np.mean(bits[-5:]) < 5.2
    assert trained[1]["history"][-1]["mean_experts_per_token"] == TINY.k


def test_the_loss_free_bias_moves_with_the_load(trained):
    bias = model_files.load_model(trained[0]).states[0].expert_bias
    assert float(jnp.abs(bias).max()) >= 2e-3


def test_restored_is_what_was_trained(trained, corpus, monkeypatch, tmp_path):
    """Every bit of the state that training holds when it saves, and the logits it would give."""
    saved = []
    save_model = lm.save_model

    def kept(path, model, **options):
        saved.append((jax.device_get((model.params, model.states)), options["extra"]))
        return save_model(path, model, **options)

    monkeypatch.setattr(lm, "save_model", kept)
    path, summary = lm.train(TINY, tmp_path / "model", STEPS, 0, False, until=3, corpus=corpus)
    [((params, states), extra)] = saved
    model = model_files.load_model(path)
    assert (model.config, model.routers) == (TINY, (TINY.router(),) * 2)
    assert model.metadata["training"] == summary
    assert summary["step"] == 3
    expected = Checkpoint(params=params, extra=jax.device_get(extra))
    optimizer = restore(path, expected=expected).extra
    wanted, actual = (params, states, extra), (model.params, model.states, optimizer)
    assert jax.tree.structure(wanted) == jax.tree.structure(actual)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(actual), strict=True):
        np.testing.assert_array_equal(a, b)
    started = model_of.init(TINY, jax.random.key(0))
    assert any(
        (np.asarray(a) != b).any()
        for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(params), strict=True)
    ), "three steps change something"


def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, trained, corpus):
    half, _ = lm.train(TINY, tmp_path / "half", STEPS, 0, False, until=12, corpus=corpus)
    path, report = lm.train(TINY, tmp_path / "rest", STEPS, 0, False, resume=half, corpus=corpus)
    one, two = model_files.load_model(trained[0]), model_files.load_model(path)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        assert (a == b).all()
    for a, b in zip(jax.tree.leaves(one.states), jax.tree.leaves(two.states), strict=True):
        assert (a == b).all()
    assert report["step"] == STEPS
    with pytest.raises(ValueError, match=r"resume: expected a checkpoint of the same run.*seed=0"):
        lm.train(TINY, tmp_path / "no", STEPS, 1, False, resume=half, corpus=corpus)
    # A calibrated checkpoint has the same metadata, and no state to train on from.
    saved = restore(half)
    bare = save(tmp_path / "bare", dataclasses.replace(saved, extra={}))
    with pytest.raises(ValueError, match=r"resume: .* got one without the state of the optimizer"):
        lm.train(TINY, tmp_path / "no", STEPS, 0, False, resume=bare, corpus=corpus)


def test_a_byte_sees_only_what_came_before(trained):
    model = model_files.load_model(trained[0])
    changed = TOKENS.at[0, 10].add(1) % 256
    one = forward(TINY, model.params, model.states, TOKENS).logits
    two = forward(TINY, model.params, model.states, changed).logits
    np.testing.assert_array_equal(one[:, :10], two[:, :10])
    assert (one[:, 10:] != two[:, 10:]).any()


def test_padding_changes_nothing_before_it(trained):
    model = model_files.load_model(trained[0])
    mask = jnp.ones((2, 32), bool).at[1, 8:].set(False)
    full = forward(TINY, model.params, model.states, TOKENS)
    part = forward(TINY, model.params, model.states, TOKENS, mask=mask)
    np.testing.assert_allclose(full.logits[1, :8], part.logits[1, :8], atol=1e-5)
    assert float(part.layers[0].stats.token_count) == 40


def test_other_rules_at_evaluation(trained):
    model = model_files.load_model(trained[0])
    dynamic = DynamicK(num_experts=8, min_k=1, max_k=2)
    mixed = (model.routers[0], dynamic)
    states = (model.states[0], dynamic.init_state())
    out = forward(TINY, model.params, states, TOKENS, routers=mixed)
    assert float(out.layers[0].stats.mean_experts_per_token) == TINY.k
    assert float(out.layers[1].stats.mean_experts_per_token) <= 2
    assert out.layers[1].routing.expert_indices.shape == (64, 2)
    assert [x.shape for x in out.router_inputs] == [(64, 32)] * 2
    with pytest.raises(
        ValueError, match="routers: expected one for each of the 2 layers with experts, got 1"
    ):
        forward(TINY, model.params, states, TOKENS, routers=mixed[:1])


def test_one_rule_in_a_loop_equals_the_layers_one_by_one(trained):
    model = model_files.load_model(trained[0])
    # Equal in what it does, yet not an equal value: takes the path of layers one by one.
    twin = dataclasses.replace(TINY.router(), balance_rate=0.5)
    loop = forward(TINY, model.params, model.states, TOKENS)
    each = forward(TINY, model.params, model.states, TOKENS, routers=(model.routers[0], twin))
    np.testing.assert_allclose(loop.logits, each.logits, atol=1e-4)


def test_variants_share_the_parameters(tmp_path, trained):
    model = model_files.load_model(trained[0])
    rule = DynamicK(num_experts=8, min_k=1, max_k=2)
    variant = ((rule,) * 2, (rule.init_state(),) * 2)
    path = model_files.save_model(tmp_path / "both", model, variants={"dynamic": variant})
    actual = model_files.load_variants(path)
    assert list(actual) == ["", "dynamic"]
    assert actual["dynamic"].routers == (rule, rule)
    assert actual["dynamic"].params is actual[""].params
    with pytest.raises(ValueError, match="variant: expected one of dynamic, got 'other'"):
        model_files.load_model(path, "other")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"num_layers": 0}, "num_layers: expected an integer of at least 1, got 0"),
        ({"d_model": 30}, "expected heads of even width"),
        ({"k": 9}, "k: expected"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(TINY, **wrong)


def test_configuration_as_json():
    assert LMConfig.from_json(TINY.to_json()) == TINY
    with pytest.raises(ValueError, match=r"LMConfig: expected fields among.*got depth"):
        LMConfig.from_json({"depth": 3})
    both = r"(?s)got num_layer\. Did you mean num_layers\?.*d_model: expected .*'64'"
    with pytest.raises(ValueError, match=both):
        LMConfig.from_json({"num_layer": 2, "d_model": "64"})
    with pytest.raises(ValueError, match="expected 1 <= until <= steps"):
        lm.train(TINY, "unused", 3, until=4)
