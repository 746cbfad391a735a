"""The contract of a routing rule: a table of rules times a table of promises.

Promises R02, R06, R07, R09, R12 and the traits that each rule states of itself. A rule joins the
table by a line in ``CASES``; ``test_every_shipped_rule_is_in_the_table`` sees to it that it does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop.rules import (
    CapacityTopK,
    DepthRouter,
    JointShared,
    MoEPlusPlus,
    ProductKeys,
    SparseMixer,
    TokenTable,
    ZeroExperts,
)
from moe_jax.routers import (
    DynamicK,
    Elastic,
    ExpertChoiceRouter,
    ExpertThreshold,
    MinP,
    RandomSkip,
    ReLURouter,
    Router,
    TopAny,
    TopK,
    TopP,
    Traits,
    router_from_json,
)
from moe_jax.routers.base import TokenChoice
from moe_jax.routers.registry import LAZY_RULES, register_rule, registered_rules, rule_class
from moe_jax.routing.budget import fit_knots
from moe_jax.routing.difficulty import ESTIMATORS, raw_difficulty, register_estimator
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import LossWeights, aux_loss
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import first_k
from moe_jax.routing.stats import routing_stats
from moe_jax.types import ExpertChoice, Routing, pytree

pytestmark = pytest.mark.compile_cheaply

T, D, E = 24, 16, 8
ALL_LOSSES = LossWeights(load_balancing=1.0, router_z=1.0, entropy=1.0, importance=1.0)


# --- a new rule is only a class -------------------------------------------------------------


@pytree
class NoState:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneIfSure(TokenChoice):
    """One expert where its probability is above one half, else two."""

    num_experts: int
    min_k: int = 1
    max_k: int = 2
    gate: Gate = Gate()
    scoring: Scoring = Scoring()

    @property
    def traits(self) -> Traits:
        return Traits(causal=True, batch_invariant=True, may_leave_token_empty=False, budget="none")

    def init_state(self) -> NoState:
        return NoState()

    def select(self, params, state, slots, x, context):
        sure = slots.slot_probs[:, 0] > 0.5
        return first_k(jnp.where(sure, 1, 2), 2), slots.scores


# --- the table of rules ---------------------------------------------------------------------


def spread(x, context):
    """A difficulty estimator of the user's own."""
    return x.astype(jnp.float32).max(axis=-1) - x.astype(jnp.float32).min(axis=-1)


DEEPSEEK_V3 = Scoring(score="sigmoid", norm="sum_eps", scale=2.5, num_groups=4, top_groups=2)
DEEPSEEK_V2 = Scoring(num_groups=4, top_groups=2, group_score="max", group_fill="zero", scale=16.0)

CASES: dict[str, Router] = {
    "TopK: softmax": TopK(num_experts=E, k=2),
    "TopK: k=1, Switch": TopK(num_experts=E, k=1),
    "TopK: k=E": TopK(num_experts=E, k=E),
    "TopK: renormalised": TopK(num_experts=E, k=2, scoring=Scoring(norm="sum")),
    "TopK: softmax after selection": TopK(
        num_experts=E, k=3, scoring=Scoring(score="identity", post="softmax")
    ),
    "TopK: sigmoid after selection": TopK(
        num_experts=E, k=1, scoring=Scoring(score="identity", post="sigmoid")
    ),
    "TopK: sigmoid, groups, bias, scale": TopK(
        num_experts=E, k=3, scoring=DEEPSEEK_V3, balance_rate=1e-3
    ),
    "TopK: quantile-balanced": TopK(
        num_experts=E, k=2, scoring=Scoring(score="sigmoid"), balance="quantile", balance_rate=0.5
    ),
    "TopK: group max, filled with 0": TopK(num_experts=E, k=3, scoring=DEEPSEEK_V2),
    "TopK: sqrtsoftplus, bias on the logit": TopK(
        num_experts=E, k=2, scoring=Scoring(score="sqrtsoftplus", select_by="logit", norm="clamp")
    ),
    "TopK: biased gate, softcap, noise": TopK(
        num_experts=E,
        k=2,
        gate=Gate(use_bias=True, multiplier=1.5, softcap=20.0, jitter=0.2, noise=0.5),
    ),
    "TopK: p-norm, normalised gate input, learned scale": TopK(
        num_experts=E,
        k=2,
        use_expert_scale=True,
        gate=Gate(input_norm_eps=1e-6),
        scoring=Scoring(norm="p", norm_p=2.0),
    ),
    **{
        f"DynamicK: {name}": DynamicK(num_experts=E, min_k=1, max_k=4, difficulty=name)
        for name in sorted(ESTIMATORS)
    },
    "DynamicK: own estimator, min_k=0": DynamicK(
        num_experts=E, min_k=0, max_k=3, difficulty=spread
    ),
    "DynamicK: renormalised from 2, bias": DynamicK(
        num_experts=E, min_k=2, max_k=4, scoring=Scoring(norm="sum"), balance_rate=1e-3
    ),
    "DynamicK: renormalised from 0": DynamicK(
        num_experts=E, min_k=0, max_k=4, scoring=Scoring(score="identity", post="softmax")
    ),
    "TopP": TopP(num_experts=E, p=0.4),
    "TopP: steered, 2 to 4, renormalised": TopP(
        num_experts=E, p=0.5, min_k=2, max_k=4, target_mean_k=3.0, scoring=Scoring(norm="sum")
    ),
    "TopP: sigmoid, bias": TopP(num_experts=E, p=0.3, scoring=Scoring(score="sigmoid")),
    "MinP": MinP(num_experts=E, ratio=0.3),
    "MinP: of two, renormalised": MinP(
        num_experts=E, ratio=0.6, max_k=2, scoring=Scoring(norm="sum")
    ),
    "ExpertThreshold: min_k=1": ExpertThreshold(num_experts=E, target_k=2.0, max_k=4),
    "ExpertThreshold: min_k=0": ExpertThreshold(num_experts=E, target_k=1.0, min_k=0),
    "ExpertThreshold: softmax": ExpertThreshold(
        num_experts=E, target_k=2.0, scoring=Scoring(score="softmax")
    ),
    "ExpertChoice": ExpertChoiceRouter(num_experts=E, mean_k=2.0),
    "ExpertChoice: sigmoid": ExpertChoiceRouter(
        num_experts=E, mean_k=1.5, scoring=Scoring(score="sigmoid", scale=2.0)
    ),
    "RandomSkip: lowest": RandomSkip(num_experts=E, k=2, mean_k=1.5),
    "RandomSkip: random": RandomSkip(num_experts=E, k=3, mean_k=1.5, drop="random"),
    "Elastic: k, all drawn": Elastic(num_experts=E, k=4, share=1.0),
    "Elastic: min-p, half drawn, rescaled": Elastic(
        num_experts=E, k=3, draw="min_p", share=0.5, rescale=True
    ),
    "Elastic: 2 to 4, renormalised": Elastic(
        num_experts=E, k=4, min_k=2, share=0.5, scoring=Scoring(norm="sum")
    ),
    "ReLU": ReLURouter(num_experts=E, target_k=2.0),
    "ReLU: at most 3, scaled": ReLURouter(
        num_experts=E, target_k=2.0, max_k=3, scoring=Scoring(score="relu", scale=2.0)
    ),
    "TopAny": TopAny(num_experts=E, efficiency=0.1),
    "TopAny: none to 3, scaled": TopAny(num_experts=E, min_k=0, max_k=3, scale=10.0),
    "defined in this file": OneIfSure(num_experts=E),
}


def test_every_shipped_rule_is_in_the_table():
    rules = registered_rules().values()
    shipped = {cls for cls in rules if cls.__module__.startswith("moe_jax.routers")}
    assert shipped, "the registry of rules is empty"
    missing = shipped - {type(router) for router in CASES.values()}
    assert not missing, f"add a line to CASES for {missing}"


def context_for(x: jax.Array) -> dict[str, jax.Array]:
    """Something of every kind that an estimator may ask for, a function of each token alone."""
    wide = x.astype(jnp.float32)
    return {
        "gradients": wide[:, ::-1] * wide[:, :1],
        "attention": jax.nn.softmax(wide, axis=-1),
        "logits": 2.0 * wide,
        "targets": jnp.argmax(wide[:, ::-1], axis=-1).astype(jnp.int32),
    }


@partial(jax.jit, static_argnums=0)
def route(router, params, state, x, mask, context):
    """The one compiled function of a case that most promises below are checked through."""
    return router(params, state, x, token_mask=mask, context=context)


@dataclasses.dataclass
class Case:
    router: Router
    params: Any
    state: Any
    x: jax.Array

    def __call__(self, x=None, *, params=None, state=None, mask=None, context=None):
        x = self.x if x is None else x
        return route(
            self.router,
            self.params if params is None else params,
            self.state if state is None else state,
            x,
            jnp.ones((x.shape[0],), bool) if mask is None else mask,
            context_for(x) if context is None else context,
        )


def build(router: Router) -> Case:
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)
    params = router.init(jax.random.key(0), D)
    params = {**params, "kernel": 2.0 * params["kernel"]}
    if "expert_scale" in params:
        params["expert_scale"] = jnp.linspace(0.5, 2.0, E)
    state = router.init_state()
    if isinstance(router, DynamicK):  # as fit does; unfitted scores need not lie in [0, 1]
        known = {**context_for(x), "router_logits": router.gate(params, x)}
        raw = raw_difficulty(router.difficulty, x, known)
        state = dataclasses.replace(state, knots=fit_knots(np.asarray(raw)))
    if hasattr(state, "expert_bias") and getattr(router, "balance_rate", 1.0):
        bias = 0.1 * jax.random.normal(jax.random.key(2), (E,), jnp.float32)
        state = dataclasses.replace(state, expert_bias=bias)
    return Case(router, params, state, x)


# Module scope, so that pytest runs a case's tests together and each case compiles once a worker.
@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return build(CASES[request.param])


@pytest.fixture(scope="module")
def learner(case: Case) -> Case:
    """A case, but not every estimator: for promises in which difficulty is only a number."""
    if getattr(case.router, "difficulty", "router_entropy") not in ("router_entropy", spread):
        pytest.skip("as with router_entropy")
    return case


def scoring_of(router: Router) -> Scoring:
    return Scoring(score="sigmoid") if isinstance(router, TopAny) else router.scoring


def expert_weights(routing: Routing | ExpertChoice) -> np.ndarray:
    """f32[T, E]: every expert's weight on every token, 0 where unused; what the model feels."""
    dense = np.zeros(np.shape(routing.router_logits), np.float32)
    if isinstance(routing, ExpertChoice):
        for e, (tokens, weights) in enumerate(
            zip(np.asarray(routing.token_indices), np.asarray(routing.combine_weights), strict=True)
        ):
            dense[tokens[tokens < routing.num_tokens], e] = weights[tokens < routing.num_tokens]
        return dense
    indices, weights = np.asarray(routing.expert_indices), np.asarray(routing.combine_weights)
    for t, e in np.ndindex(indices.shape):
        if indices[t, e] < routing.num_experts:
            dense[t, indices[t, e]] = weights[t, e]
    return dense


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def same_routing(a, b, *, rows=slice(None), rtol: float = 0.0) -> None:
    """The same experts with the same weights for these tokens."""
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[rows], np.asarray(b.expert_mask)[rows])
    wa, wb = expert_weights(a)[rows], expert_weights(b)[rows]
    np.testing.assert_allclose(wa, wb, rtol=rtol, atol=rtol)


# --- promises: what comes out ---------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "float32"), (7, "bfloat16"), (T, "float16")])
def test_shapes_and_dtypes(case: Case, tokens, dtype):
    router = case.router
    x = jax.ShapeDtypeStruct((tokens, D), dtype)
    out = jax.eval_shape(lambda x: router(case.params, case.state, x, context=context_for(x)), x)
    assert (out.router_logits.shape, out.router_logits.dtype) == ((tokens, E), jnp.float32)
    assert (out.router_probs.shape, out.router_probs.dtype) == ((tokens, E), jnp.float32)
    assert (out.token_mask.shape, out.token_mask.dtype) == ((tokens,), jnp.bool_)
    assert out.combine_weights.dtype == jnp.float32
    if isinstance(out, ExpertChoice):
        assert out.token_indices.dtype == jnp.int32
        assert out.token_indices.shape == out.combine_weights.shape
        assert out.token_indices.shape[0] == E
        assert out.num_tokens == tokens
    else:
        assert (out.expert_indices.shape, out.expert_indices.dtype) == (
            (tokens, router.max_k),
            jnp.int32,
        )
        assert out.combine_weights.shape == (tokens, router.max_k)
        if out.residual_weight is not None:  # only rules with zero-computation experts have one
            assert out.residual_weight.shape == (tokens,)
            assert out.residual_weight.dtype == jnp.float32
        assert out.num_experts == E


def test_probabilities_sum_to_one(case: Case):
    np.testing.assert_allclose(case().router_probs.sum(axis=-1), np.ones(T), rtol=1e-5)


def test_k_lies_within_its_bounds_and_no_expert_is_used_twice(case: Case):
    routing, router = case(), case.router
    k = np.asarray(routing.num_experts_per_token)
    assert k.min() >= router.min_k
    assert k.max() <= router.max_k
    # `expert_mask` counts an expert once, so a repeated one would make its count fall short.
    np.testing.assert_array_equal(k, np.asarray(routing.expert_mask).sum(axis=1))
    if isinstance(routing, ExpertChoice):
        for row in np.asarray(routing.token_indices):
            real = row[row < T]
            assert len(set(real)) == len(real)
    if not router.traits.may_leave_token_empty:
        assert k.min() >= 1


def test_exact_budgets_are_exact(case: Case):
    if case.router.traits.budget != "exact":
        pytest.skip("the rule does not promise it")
    want = case.router.mean_k if hasattr(case.router, "mean_k") else case.router.k
    # Expert choice rounds to whole rows of an expert's buffer.
    per_expert = math.ceil(want * T / E)
    got = np.asarray(case().num_experts_per_token).sum()
    assert got == (per_expert * E if isinstance(case(), ExpertChoice) else want * T)


def test_used_slots_are_a_prefix_and_the_rest_holds_the_sentinel(case: Case):
    routing = case()
    if isinstance(routing, ExpertChoice):
        indices, none = np.asarray(routing.token_indices), routing.num_tokens
    else:
        indices, none = np.asarray(routing.expert_indices), E
    used = indices < none
    assert (indices >= 0).all()
    assert (indices[~used] == none).all()
    assert (np.asarray(routing.combine_weights)[~used] == 0).all()
    assert (np.diff(used.astype(int), axis=1) <= 0).all()


def test_slots_are_ordered_by_selection_score(case: Case):
    routing, router = case(), case.router
    scoring = scoring_of(router)
    scores = scoring.scores(routing.router_logits)
    if isinstance(routing, ExpertChoice):
        w = np.asarray(routing.combine_weights)
        assert (np.diff(w, axis=1) <= 0).all()
        return
    if isinstance(router, ExpertThreshold):
        by = scores - case.state.cutoffs[None, :]
    else:
        bias = getattr(case.state, "expert_bias", jnp.zeros((E,), jnp.float32))
        by = (routing.router_logits if scoring.select_by == "logit" else scores) + bias[None]
    by = np.concatenate([np.asarray(by), np.full((T, 1), -np.inf)], axis=1)  # "no expert" is last
    slots = np.take_along_axis(by, np.asarray(routing.expert_indices), axis=1)
    used = np.asarray(routing.expert_indices) < E
    falls = slots[:, 1:] <= slots[:, :-1]
    assert falls[used[:, 1:]].all()


def test_weights_are_what_the_scoring_promises(case: Case):
    """Written out again in numpy: raw scores, or weights that sum to the scale."""
    routing, scoring = case(), scoring_of(case.router)
    z = np.asarray(routing.router_logits, np.float64)
    s = {
        "softmax": lambda: np.exp(z) / np.exp(z).sum(axis=1, keepdims=True),
        "sigmoid": lambda: 1 / (1 + np.exp(-z)),
        "sqrtsoftplus": lambda: np.sqrt(np.log1p(np.exp(z))),
        "relu": lambda: np.maximum(z, 0),
        "identity": lambda: z,
    }[scoring.score]()
    used = np.asarray(routing.expert_mask)
    if getattr(case.router, "rescale", False):  # sums to what the k best weigh
        whole = np.sort(s, axis=1)[:, -case.router.k :].sum(axis=1, keepdims=True)
        s = s * whole / np.where(used, s, 0.0).sum(axis=1, keepdims=True)
    if isinstance(case.router, TopAny):  # its scores select and send gradients, and weigh nothing
        s = np.ones_like(z) / np.maximum(used.sum(axis=1, keepdims=True), 1)
    if scoring.post == "softmax":
        s = np.exp(s)
    elif scoring.post == "sigmoid":
        s = 1 / (1 + np.exp(-s))
    want = np.where(used, s, 0.0)
    if scoring.renormalizes:
        p = scoring.norm_p if scoring.norm == "p" else 1.0
        total = (want**p).sum(axis=1, keepdims=True) ** (1 / p)
        want = want / np.where(total > 0, total, 1.0)
        if p == 1:
            sums, some = expert_weights(routing).sum(axis=1), used.any(axis=1)
            np.testing.assert_allclose(sums[some], scoring.scale, rtol=1e-5)
    want = want * np.asarray(case.params.get("expert_scale", np.ones(E)))[None, :]
    np.testing.assert_allclose(expert_weights(routing), scoring.scale * want, rtol=2e-5, atol=1e-6)


def test_a_disabled_expert_stays_out_whatever_was_learned(learner: Case):
    """Balancing sees that nobody uses it and would bring it back: by bias, by cutoff, by threshold."""
    if learner.router.min_k == E:
        pytest.skip("it uses every expert")
    if getattr(learner.router, "balance", "sign") == "quantile":
        pytest.skip("it refuses disabled experts")
    gate = dataclasses.replace(learner.router.gate, disabled_experts=(5,))
    router = dataclasses.replace(learner.router, gate=gate)
    favour = {"expert_bias": 100.0, "cutoffs": -100.0}
    state = dataclasses.replace(
        learner.state,
        **{
            n: getattr(learner.state, n).at[5].set(v)
            for n, v in favour.items()
            if hasattr(learner.state, n)
        },
    )
    params = dict(learner.params)
    if "thresholds" in params:
        params["thresholds"] = params["thresholds"].at[5].set(-1.0)
    used = np.asarray(
        dataclasses.replace(learner, router=router)(params=params, state=state).expert_mask
    )
    assert not used[:, 5].any()
    assert used.any()


def test_ties_go_to_the_lowest_index(case: Case):
    if isinstance(case.router, ExpertChoiceRouter):
        routing = case(jnp.ones((T, D), jnp.float32))
        c = routing.token_indices.shape[1]
        assert routing.token_indices.tolist() == [list(range(c))] * E
        return
    state = case.state
    if hasattr(state, "expert_bias"):
        state = dataclasses.replace(state, expert_bias=jnp.zeros((E,), jnp.float32))
    routing = case(jnp.zeros((T, D), jnp.float32), state=state)
    for row in np.asarray(routing.expert_indices):
        used = list(row[row < E])
        # A control that drops at random may leave holes, never another order.
        assert used == sorted(used)
        if getattr(case.router, "drop", "lowest") == "lowest":
            assert used == list(range(len(used)))


# --- promises: what it may not depend on ----------------------------------------------------


def test_jit_equals_eager(case: Case):
    eager = case.router(
        case.params,
        case.state,
        case.x,
        token_mask=jnp.ones((T,), bool),
        context=context_for(case.x),
    )
    same_routing(case(), eager, rtol=1e-6)
    np.testing.assert_allclose(case().router_logits, eager.router_logits, rtol=1e-5, atol=1e-6)


def test_vmap_equals_a_loop(learner: Case):
    x = jax.random.normal(jax.random.key(3), (2, T, D), jnp.float32)
    call = jax.jit(
        jax.vmap(lambda x: learner.router(learner.params, learner.state, x, context=context_for(x)))
    )
    both = call(x)
    for i in range(2):
        same_routing(jax.tree.map(lambda leaf, i=i: leaf[i], both), learner(x[i]), rtol=1e-5)


def test_permuting_tokens_permutes_the_answer(case: Case):
    order = np.random.default_rng(0).permutation(T)
    a, b = case(), case(case.x[order])
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[order], np.asarray(b.expert_mask))
    np.testing.assert_allclose(expert_weights(a)[order], expert_weights(b), rtol=1e-6)


def test_relabelling_experts_relabels_the_answer(case: Case):
    """Experts have no identity beyond their parameters. Groups are relabelled as blocks."""
    groups = scoring_of(case.router).num_groups
    rng = np.random.default_rng(0)
    blocks = np.arange(E).reshape(groups, -1)[rng.permutation(groups)]
    order = np.concatenate([rng.permutation(block) for block in blocks])

    def relabel(leaf):
        return leaf[..., order] if leaf.ndim and leaf.shape[-1] == E else leaf

    fit = getattr(case.state, "fit", None)
    state = jax.tree.map(relabel, case.state)
    if fit is not None:
        state = dataclasses.replace(state, fit=fit)
    a, b = case(), case(params=jax.tree.map(relabel, case.params), state=state)
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[:, order], np.asarray(b.expert_mask))
    np.testing.assert_allclose(expert_weights(a)[:, order], expert_weights(b), rtol=1e-5, atol=1e-6)


OTHER = jax.random.normal  # tokens that share nothing with a case's own


def changed_from(x: jax.Array, first: int) -> jax.Array:
    """x with every token from ``first`` on replaced."""
    fresh = 3.0 * OTHER(jax.random.key(9), x.shape, jnp.float32)
    return jnp.where(jnp.arange(T)[:, None] < first, x, fresh)


def test_batch_invariance_as_the_traits_say(case: Case):
    alone = jnp.where(jnp.arange(T)[:, None] == 5, case.x, changed_from(case.x, 0))
    if case.router.traits.batch_invariant:
        same_routing(case(), case(alone), rows=5)  # bit for bit
        few = case(case.x[4:7])  # another batch size: the same up to the product's rounding
        np.testing.assert_array_equal(few.expert_mask, np.asarray(case().expert_mask)[4:7])
        np.testing.assert_allclose(
            expert_weights(few), expert_weights(case())[4:7], rtol=1e-5, atol=1e-6
        )
    else:
        assert not np.array_equal(expert_weights(case()), expert_weights(case(alone)))
        rows = [
            np.array_equal(
                np.asarray(case().expert_mask)[t],
                np.asarray(
                    case(
                        jnp.where(jnp.arange(T)[:, None] == t, case.x, changed_from(case.x, 0))
                    ).expert_mask
                )[t],
            )
            for t in range(T)
        ]
        assert not all(rows), "a trait says that neighbours matter, and they never do"


def test_causality_as_the_traits_say(case: Case):
    half = slice(0, T // 2)
    before, after = case(), case(changed_from(case.x, T // 2))
    if case.router.traits.causal:
        same_routing(before, after, rows=half)
    else:
        assert not np.array_equal(
            np.asarray(before.expert_mask)[half], np.asarray(after.expert_mask)[half]
        ), "a trait says that later tokens matter, and they do not"


@jax.jit
def everything_measured(routing) -> dict[str, Any]:
    plan = plan_dispatch(to_assignments(routing))
    _, terms = aux_loss(routing, ALL_LOSSES)
    return {"stats": routing_stats(routing, plan), **terms}


def test_padding_counts_in_nothing(case: Case):
    """Whatever sits in padding, NaN and inf included: answers, statistics and losses are equal."""
    mask = jnp.arange(T) % 3 != 1
    clean = jnp.where(mask[:, None], case.x, 0.0)
    a = case(clean, mask=mask)
    measured = everything_measured(a)
    assert not np.asarray(a.expert_mask)[~np.asarray(mask)].any()
    assert float(measured["stats"].token_count) == float(mask.sum())
    for value in (jnp.nan, jnp.inf, 1e30):
        dirty = jnp.where(mask[:, None], case.x, value)
        b = case(dirty, mask=mask)
        same_routing(a, b)
        jax.tree.map(
            partial(np.testing.assert_allclose, rtol=1e-6), everything_measured(b), measured
        )
        same(case.router.observe(case.state, b), case.router.observe(case.state, a))
        own = partial(case.router.regularization, case.params, case.state)
        np.testing.assert_allclose(own(b), own(a), rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(measured))


def test_a_batch_of_padding_alone_is_measured_without_nan(case: Case):
    routing = case(jnp.full((T, D), jnp.nan, jnp.float32), mask=jnp.zeros((T,), bool))
    assert not np.asarray(routing.expert_mask).any()
    for leaf in jax.tree.leaves(everything_measured(routing)):
        assert np.isfinite(leaf).all()


def test_a_nan_token_poisons_no_other(case: Case):
    if not case.router.traits.batch_invariant:
        pytest.skip("the other tokens of this rule may move when one is taken away")
    routing = case(case.x.at[3].set(jnp.nan))
    rest = np.arange(T) != 3
    same_routing(case(), routing, rows=rest)
    assert np.isfinite(expert_weights(routing)[rest]).all()


def test_expert_choice_never_takes_a_nan_token():
    case = build(CASES["ExpertChoice"])
    routing = case(case.x.at[3].set(jnp.nan))
    assert not np.asarray(routing.expert_mask)[3].any()
    assert np.isfinite(np.asarray(routing.combine_weights)).all()


# --- promises: gradients --------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def gradients(router, params, state, x, mask):
    def loss(params, x):
        routing = router(params, state, x, token_mask=mask, context=context_for(x))
        ramp = jnp.cos(jnp.arange(routing.combine_weights.size, dtype=jnp.float32))
        weighed = (routing.combine_weights * ramp.reshape(routing.combine_weights.shape)).sum()
        own = router.regularization(params, state, routing)
        return weighed + aux_loss(routing, ALL_LOSSES)[0] + own

    return jax.grad(loss, argnums=(0, 1))(params, x)


def gradients_of(case: Case, x, mask=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "router: expected raw weights for training")
        mask = jnp.ones((T,), bool) if mask is None else mask
        return gradients(case.router, case.params, case.state, x, mask)


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 30.0, 1e4])
def test_gradients_are_finite(learner: Case, scale):
    """At ties (scale 0) and at logits of tens, where float32 underflows, to ten thousands."""
    got = gradients_of(learner, scale * learner.x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
    # One token whose scores all underflow, one whose scores all saturate.
    kernel = learner.params["kernel"]
    for sign in (-1.0, 1.0):
        push = sign * scale * kernel.mean(axis=1)[None, :] / jnp.square(kernel.mean(axis=1)).sum()
        got = gradients_of(learner, jnp.broadcast_to(push, (T, D)))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus", "relu"])
def test_probabilities_of_tiny_scores_have_finite_gradients(score):
    """Between scores that are 0 and scores whose square is not: where float32 had 1 / 0."""
    scoring = Scoring(score=score)
    near = 1e-25 if score == "relu" else -60.0
    logits = near * jnp.array([[1.0, 1.01, 0.99]])
    pull = jnp.array([[1.0, 2.0, 3.0]])
    value, grads = jax.value_and_grad(lambda z: (scoring.probs(z, scoring.scores(z)) * pull).sum())(
        logits
    )
    assert 1.0 < value < 3.0
    assert np.isfinite(grads).all()


def test_the_router_learns(learner: Case):
    kernel = gradients_of(learner, learner.x)[0]["kernel"]
    assert (np.abs(kernel).max(axis=0) > 0).all()


def test_padding_sends_no_gradient(learner: Case):
    mask = jnp.arange(T) % 3 != 1
    want = gradients_of(learner, jnp.where(mask[:, None], learner.x, 0.0), mask)
    got = gradients_of(learner, jnp.where(mask[:, None], learner.x, jnp.nan), mask)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), got, want)
    assert not np.asarray(got[1])[~np.asarray(mask)].any()


def test_renormalised_weights_warn_in_training_where_k_may_be_one():
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)
    for min_k, warns in ((1, True), (2, False)):
        for scoring in (Scoring(norm="sum"), Scoring(score="identity", post="softmax"), Scoring()):
            router = DynamicK(num_experts=E, min_k=min_k, max_k=4, scoring=scoring)
            params, state = router.init(jax.random.key(0), D), router.init_state()

            def loss(params, router=router, state=state):
                return router(params, state, x).combine_weights.sum()

            if warns and scoring.renormalizes:
                jax.eval_shape(loss, params)  # inference says nothing
                with pytest.warns(UserWarning, match=r"no gradient.*norm='none', or min_k=2"):
                    jax.eval_shape(jax.grad(loss), params)
            else:
                jax.eval_shape(jax.grad(loss), params)


# --- promises: precision, noise, state, identity --------------------------------------------


def test_logits_are_float32_whatever_x_is(case: Case):
    """bfloat16 x gives the answer of the same numbers in float32, not of a rounded product."""
    rounded = case.x.astype(jnp.bfloat16)
    plain = dataclasses.replace(case.router.gate, jitter=0.0, noise=0.0)
    half = plain(case.params, rounded)
    assert half.dtype == jnp.float32
    np.testing.assert_array_equal(half, plain(case.params, rounded.astype(jnp.float32)))


def test_noise_acts_only_with_a_key(case: Case):
    gate = case.router.gate
    quiet = dataclasses.replace(case.router, gate=dataclasses.replace(gate, jitter=0.0, noise=0.0))
    context = context_for(case.x)
    without = quiet(case.params, case.state, case.x, context=context)
    same(case.router(case.params, case.state, case.x, context=context), without)
    one, two = (
        case.router(case.params, case.state, case.x, key=jax.random.key(i), context=context)
        for i in range(2)
    )
    noisy = bool(gate.jitter or gate.noise)
    assert np.array_equal(one.router_logits, without.router_logits) != noisy
    assert np.array_equal(one.router_logits, two.router_logits) != noisy


def test_nothing_retraces_when_an_equal_router_is_rebuilt_or_the_state_changes(case: Case):
    case()
    before = route._cache_size()
    rebuilt = dataclasses.replace(case.router)
    assert rebuilt is not case.router
    assert rebuilt == case.router
    assert hash(rebuilt) == hash(case.router)
    state = jax.tree.map(lambda leaf: leaf + jnp.ones((), leaf.dtype), case.state)
    Case(rebuilt, case.params, state, case.x)()
    assert route._cache_size() == before


def test_a_state_is_small_and_keeps_its_shape_under_update(case: Case):
    router = case.router
    wide = dataclasses.replace(router, num_experts=256)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(wide.init_state()))
    assert nbytes < 4096

    def step(state, routing):
        stats = routing_stats(
            routing, plan_dispatch(to_assignments(routing)), observed=router.observe(state, routing)
        )
        return router.update(state, stats)

    after = jax.eval_shape(step, case.state, case())
    assert jax.tree.structure(after) == jax.tree.structure(case.state)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(case.state), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


SINGLE_MODELS: dict[str, Router] = {
    "CapacityTopK": CapacityTopK(num_experts=E, k=2, capacity=9),
    "DepthRouter": DepthRouter(num_experts=E, k=2, hidden_size=6),
    "JointShared": JointShared(num_experts=E, num_shared=2, k=2),
    "MoEPlusPlus": MoEPlusPlus(num_experts=E),
    "ProductKeys": ProductKeys(num_experts=9, k=2),
    "SparseMixer": SparseMixer(num_experts=E),
    "TokenTable": TokenTable(num_experts=E, k=2, vocab_size=5),
    "ZeroExperts": ZeroExperts(num_experts=E, num_zero_experts=4, k=2),
}
REGISTERED = {**CASES, **SINGLE_MODELS}


def test_every_rule_of_a_single_model_is_in_the_table():
    assert set(SINGLE_MODELS) == set(LAZY_RULES)


@pytest.mark.parametrize("name", list(REGISTERED))
def test_the_state_of_another_rule_is_refused(name):
    router = REGISTERED[name]
    params, x = router.init(jax.random.key(0), D), jnp.ones((T, D), jnp.float32)
    other = TopK(num_experts=E, k=2).init_state()
    if type(other) is type(router.init_state()):
        other = TopP(num_experts=E).init_state()
    said = (
        rf"state: expected a \w+State for {type(router).__name__}\(.*got a {type(other).__name__}"
    )
    for wrong, words in ((other, said), (None, "got a NoneType"), ({}, "got a dict")):
        with pytest.raises(TypeError, match=words):
            jax.eval_shape(partial(router, params, wrong), x)


@pytest.mark.parametrize("name", list(REGISTERED))
def test_a_state_of_other_sizes_is_refused(name):
    router = REGISTERED[name]
    state = router.init_state()
    params, x = router.init(jax.random.key(0), D), jnp.ones((T, D), jnp.float32)
    stats = jax.eval_shape(statistics, jax.random.normal(jax.random.key(0), (T, D)))
    for i, leaf in enumerate(jax.tree.leaves(state)):
        leaves, structure = jax.tree.flatten(state)
        leaves[i] = jnp.zeros((*leaf.shape, 2), leaf.dtype)
        wrong = jax.tree.unflatten(structure, leaves)
        words = r"state: expected the sizes of .*instead of \["
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(partial(router, params, wrong), x)
        if router.num_experts == E:
            with pytest.raises(ValueError, match=words):
                router.update(wrong, stats)


def statistics(x):
    router = TopK(num_experts=E, k=2)
    routing = router(router.init(jax.random.key(0), D), router.init_state(), x)
    return routing_stats(routing, plan_dispatch(to_assignments(routing)))


def test_a_state_fitted_for_another_k_is_refused():
    wide = DynamicK(num_experts=E, min_k=1, max_k=4)
    params = wide.init(jax.random.key(0), D)
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)
    state = wide.fit(params, wide.init_state(), x, target_mean_k=1.7)
    narrow = dataclasses.replace(wide, max_k=2)
    with pytest.raises(ValueError, match=r"thresholds of shape \[3\] instead of \[1\]"):
        narrow(params, state, x)
    with pytest.raises(ValueError, match=r"thresholds of shape \[3\] instead of \[1\]"):
        narrow.fit(params, state, x, target_mean_k=1.5)
    other = TopP(num_experts=4)
    with pytest.raises(ValueError, match=r"expert_bias of shape \[4\] instead of \[8\]"):
        TopP(num_experts=E)(params, other.init_state(), x)


def test_statistics_of_another_number_of_experts_are_refused():
    stats = statistics(jnp.ones((T, D), jnp.float32))
    router = TopK(num_experts=4, k=2, balance_rate=0.1)
    with pytest.raises(ValueError, match=r"num_experts=4 experts, got .*\[8\]"):
        router.update(router.init_state(), stats)


def donate(tree):
    """A step that gives its argument's memory away, as training steps do."""
    return jax.jit(
        lambda t: jax.tree.map(lambda v: v + jnp.ones((), v.dtype), t), donate_argnums=0
    )(tree)


@pytest.mark.parametrize("name", list(REGISTERED))
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_no_array_is_in_a_tree_twice(name):
    """What init, update and fit return can be donated, outside jit as well."""
    router = REGISTERED[name]
    donate(router.init(jax.random.key(0), D))
    donate(router.init_state())
    if router.num_experts != E:
        return
    donate(router.update(router.init_state(), statistics(jnp.ones((T, D), jnp.float32))))
    if router.traits.budget != "expected":
        return
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)
    params = router.init(jax.random.key(0), D)
    target = min(router.min_k + 0.6, (router.min_k + router.max_k) / 2)
    donate(router.fit(params, router.init_state(), x, target_mean_k=target, context=context_for(x)))


def test_an_unknown_context_key_is_refused_by_name(case: Case):
    if callable(getattr(case.router, "difficulty", None)):
        pytest.skip("a function of the user's own may read anything")
    wrong = {**context_for(case.x), "gradiants": case.x}
    with pytest.raises(ValueError, match=r"context: expected keys among .*, got gradiants\."):
        jax.eval_shape(lambda: case.router(case.params, case.state, case.x, context=wrong))
    with pytest.raises(TypeError, match=r"context: expected a mapping .*got float32"):
        case.router(case.params, case.state, case.x, context=case.x)


def test_an_estimator_that_says_what_it_reads_is_held_to_it():
    def by_speaker(x, context):
        return context["speaker"]

    by_speaker.context_keys = ("speaker",)
    router = DynamicK(num_experts=E, min_k=1, max_k=2, difficulty=by_speaker)
    params, state = router.init(jax.random.key(0), D), router.init_state()
    x, speaker = jnp.ones((T, D), jnp.float32), jnp.linspace(0.0, 1.0, T)
    k = router(params, state, x, context={"speaker": speaker}).num_experts_per_token
    assert k.min() == 1
    assert k.max() == 2
    with pytest.raises(ValueError, match=r"expected keys among .*speaker.*, got speakers"):
        router(params, state, x, context={"speakers": speaker})


def test_init_works_under_eval_shape(case: Case):
    shapes = jax.eval_shape(lambda key: case.router.init(key, D), jax.random.key(0))
    real = case.router.init(jax.random.key(0), D)
    assert jax.tree.structure(shapes) == jax.tree.structure(real)
    assert shapes["kernel"].shape == real["kernel"].shape == (D, E)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    state = jax.eval_shape(case.router.init_state)
    assert jax.tree.structure(state) == jax.tree.structure(case.router.init_state())


def test_json_round_trip(case: Case):
    router = case.router
    if callable(getattr(router, "difficulty", None)):
        with pytest.raises(TypeError, match=r"difficulty: expected .* got .* Register it"):
            router.to_json()
        return
    data = json.loads(json.dumps(router.to_json()))
    back = router_from_json(data)
    assert back == router
    assert hash(back) == hash(router)
    assert back.fingerprint() == router.fingerprint()
    assert repr(back) == repr(router)


def test_fingerprints_tell_routers_apart():
    written = [r for r in CASES.values() if not callable(getattr(r, "difficulty", None))]
    prints = {router.fingerprint() for router in written}
    assert len(prints) == len(written)
    assert all(len(p) == 32 and int(p, 16) >= 0 for p in prints)


def test_a_registered_estimator_travels_by_name():
    register_estimator("test_rules_spread", spread)
    router = DynamicK(num_experts=E, min_k=1, max_k=2, difficulty="test_rules_spread")
    assert router_from_json(router.to_json()) == router


def test_rules_are_frozen(case: Case):
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.router.num_experts = 3


def test_a_rule_cannot_inherit_from_a_rule():
    rules = registered_rules()
    with pytest.raises(TypeError, match=r"expected a direct subclass of Router.*compose"):
        type("MyTopK", (TopK,), {})
    assert registered_rules() == rules


def test_a_rule_that_lacks_a_method_is_refused_by_its_name():
    rules = registered_rules()
    with pytest.raises(TypeError, match=r"Half: expected a complete rule, got none of .*select"):
        type("Half", (TokenChoice,), {"init_state": lambda self: None})
    assert registered_rules() == rules


def test_a_new_rule_is_only_a_class():
    assert rule_class("OneIfSure") is OneIfSure
    assert router_from_json(CASES["defined in this file"].to_json()) == OneIfSure(num_experts=E)


def test_the_last_definition_of_a_rule_wins():
    """A notebook cell may be run again."""
    again = type("OneIfSure", (TokenChoice,), dict(OneIfSure.__dict__, __module__=__name__))
    try:
        assert rule_class("OneIfSure") is again
    finally:
        register_rule(OneIfSure)


def test_fixed_and_dynamic_rules_choose_differently():
    """R07: both strategies are there, vectorised, and they are not the same."""
    top_k, dynamic = build(CASES["TopK: softmax"]), build(CASES["DynamicK: router_entropy"])
    assert len(set(np.asarray(top_k().num_experts_per_token).tolist())) == 1
    # R02: k is a token's own, never the batch's.
    assert len(set(np.asarray(dynamic().num_experts_per_token).tolist())) >= 3


def test_a_printed_rule_shows_what_differs_from_the_defaults():
    rule = TopK(num_experts=8, k=2, scoring=Scoring(norm="sum"))
    assert repr(rule) == "TopK(num_experts=8, k=2, scoring=Scoring(norm='sum'))"
