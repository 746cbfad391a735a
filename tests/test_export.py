"""``jax.export``: every public value serialises, and batch sizes may be symbolic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import DynamicK, ExpertChoiceRouter, FeedForward, LayerOptions, TopK
from moe_jax.experts import IMPLEMENTATIONS
from moe_jax.routers import with_similarity
from moe_jax.routers.registry import registered_rules
from moe_jax.types import Array, pytree, static

pytest.importorskip("flatbuffers", reason="pip install flatbuffers: jax.export serialises with it")

ROOT = Path(__file__).parents[1]
E, D, F = 4, 8, 16
FFN = FeedForward()
TOP2 = TopK(num_experts=E, k=2)


def exported(function, *arguments):
    """The function after a round trip through bytes."""
    data = jax.export.export(jax.jit(function))(*arguments).serialize()
    return jax.export.deserialize(data).call


def batch(constraints=()):
    (b,) = jax.export.symbolic_shape("b", constraints=constraints)
    return jax.ShapeDtypeStruct((b, D), jnp.float32)


def layer(router, **options):
    params = moe_jax.init_moe_layer(router, FFN, jax.random.key(0), d_model=D, d_ff=F)

    def run(x):
        return moe_jax.moe_layer(
            router, FFN, params, router.init_state(), x, options=LayerOptions(**options)
        )

    return run


dense = jax.jit(layer(TOP2, implementation="dense"))


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left, right)


def test_the_state_of_every_rule_passes_through_an_exported_function():
    rules: list[moe_jax.Router] = [
        TOP2,
        DynamicK(num_experts=E, min_k=1, max_k=3),
        ExpertChoiceRouter(num_experts=E),
        moe_jax.ExpertThreshold(num_experts=E, target_k=2),
        moe_jax.AdaK(num_experts=E, max_k=2),
        moe_jax.BalancedAssignment(num_experts=E),
        moe_jax.Cosine(num_experts=E, k=2),
        moe_jax.Elastic(num_experts=E, k=2),
        moe_jax.ExpertRetrieval(num_experts=E, k=2),
        moe_jax.MinP(num_experts=E),
        moe_jax.MixtureOfDepths(),
        moe_jax.Piggyback(num_experts=E, k=2),
        moe_jax.RandomSecond(num_experts=E),
        moe_jax.RandomSkip(num_experts=E, k=2, mean_k=1.5),
        moe_jax.ReLURouter(num_experts=E, target_k=2),
        moe_jax.Reroute(num_experts=E, k=2),
        moe_jax.SeqTopK(num_experts=E, k=2),
        moe_jax.SharedBudget(num_experts=E, k=2),
        moe_jax.Sinkhorn(num_experts=E, k=2),
        moe_jax.SkipSecond(num_experts=E),
        moe_jax.TopAny(num_experts=E),
        moe_jax.TopP(num_experts=E),
    ]
    public = {name for name in registered_rules() if name in moe_jax.__all__}
    assert {type(rule).__name__ for rule in rules} == public
    states = [rule.init_state() for rule in rules]
    same(exported(lambda s: s, states)(states), states)


def test_routing_plan_and_aux_pass_through_an_exported_function():
    x = jax.random.normal(jax.random.key(1), (6, D))
    run = layer(TOP2)
    aux = jax.jit(run)(x)[1]
    plan = moe_jax.plan_dispatch(moe_jax.to_assignments(aux.routing), capacity=3)
    same(exported(lambda a, p: (p, a), aux, plan)(aux, plan), (plan, aux))


@pytest.mark.parametrize("name", [*IMPLEMENTATIONS, None])
def test_every_implementation_lowers_for_a_symbolic_batch(name: str | None):
    run = layer(TOP2, implementation=name, capacity_factor=None if name else 1.25)
    exported = jax.export.export(jax.jit(run))(batch())
    assert str(exported.out_avals[0].shape) == "(b, 8)"


def test_one_exported_layer_takes_every_batch_size():
    run = layer(TOP2)
    call = exported(run, batch())
    for size in (1, 37):
        x = jax.random.normal(jax.random.key(size), (size, D))
        y, aux = call(x)
        wanted, wanted_aux = dense(x)
        np.testing.assert_allclose(y, wanted, atol=1e-6)
        np.testing.assert_array_equal(aux.routing.expert_indices, wanted_aux.routing.expert_indices)


def test_groups_take_a_symbolic_size_that_they_divide():
    run = layer(TOP2, groups=2, capacity_factor=0.5)
    (b,) = jax.export.symbolic_shape("b")
    call = exported(lambda x: run(x)[0], jax.ShapeDtypeStruct((2 * b, D), jnp.float32))
    x = jax.random.normal(jax.random.key(1), (6, D))
    np.testing.assert_allclose(call(x), jax.jit(run)(x)[0], atol=1e-6)
    with pytest.raises(ValueError, match=r"groups: .* divisor of T=b.*'2\*b'"):
        exported(run, batch())


@pytest.mark.parametrize("rule", ["Piggyback", "Reroute", "SharedBudget"])
def test_a_rule_that_looks_at_its_batch_takes_symbolic_sizes_on_both_sides_of_its_limit(rule):
    rule = getattr(moe_jax, rule)(num_experts=E, k=2, max_tokens=4)
    params, state = rule.init(jax.random.key(0), D), rule.init_state()
    if isinstance(rule, moe_jax.Reroute):
        state = with_similarity(state, jnp.ones((E, E)))

    def run(x):
        routing = rule(params, state, x)
        return routing.expert_indices, routing.combine_weights

    call = exported(run, batch())
    for size in (3, 9):
        x = jax.random.normal(jax.random.key(size), (size, D))
        for got, wanted in zip(call(x), jax.jit(run)(x), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_a_row_budget_asks_for_the_bound_that_it_needs():
    run = layer(TOP2, max_rows=64)
    with pytest.raises(ValueError, match=r"max_rows: .*symbolic_shape.*'b <= 64'"):
        exported(run, batch())
    jax.export.export(jax.jit(run))(batch(["b <= 64"]))


def test_a_size_that_stays_symbolic_is_refused_with_its_field():
    run = layer(ExpertChoiceRouter(num_experts=E))
    with pytest.raises(ValueError, match=r"ExpertChoice.num_tokens: .* Return its arrays"):
        exported(run, batch())
    jax.export.export(jax.jit(lambda x: run(x)[0]))(batch()).serialize()


def test_a_class_may_be_defined_twice_as_in_a_notebook():
    def define():
        @pytree
        class State:
            values: Array
            size: int = static()

        return State

    for cls in (define(), define()):
        value = cls(values=jnp.ones(2), size=2)
        same(exported(lambda v: v, value)(value), value)


def test_another_process_runs_the_exported_routing_without_moe_jax(tmp_path: Path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}

    def example(command: str) -> list[str]:
        line = [
            sys.executable,
            "examples/export_routing.py",
            command,
            str(tmp_path / "routing.bin"),
        ]
        done = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.splitlines()

    here, there = example("export"), example("run")
    assert there == [here[0], "moe_jax imported: False"]
