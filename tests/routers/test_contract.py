"""The contract of a routing rule: a table of rules times a table of promises.

Promises R02, R06, R07, R09, R12 and the traits that each rule states of itself. A rule joins the
table when it is registered, with usual values; lines in ``CASES`` are for other settings.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import routers
from moe_jax.interop.rules import (
    CapacityTopK,
    DepthRouter,
    JointShared,
    MoEPlusPlus,
    NullExperts,
    ProductKeys,
    SparseMixer,
    TokenTable,
    ZeroExperts,
)
from moe_jax.routers import (
    AdaK,
    BalancedAssignment,
    Cosine,
    DynamicK,
    Elastic,
    ExpertChoiceRouter,
    ExpertThreshold,
    MinP,
    MixtureOfDepths,
    Piggyback,
    RandomSecond,
    RandomSkip,
    ReLURouter,
    Reroute,
    Router,
    SeqTopK,
    SharedBudget,
    Sinkhorn,
    TopAny,
    TopK,
    TopP,
    Traits,
    expert_similarity,
    registry,
    router_from_json,
    with_similarity,
)
from moe_jax.routers.registry import LAZY_RULES, register_rule, registered_rules, rule_class
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routing.budget import fit_knots
from moe_jax.routing.difficulty import ESTIMATORS, raw_difficulty, register_estimator
from moe_jax.routing.dispatch import plan_dispatch, to_assignments
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import LossWeights
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import first_k
from moe_jax.routing.stats import routing_stats
from moe_jax.testing import PROMISES, build_case, check_router, decisions, example_rule, values
from moe_jax.testing import RouterCase as Case
from moe_jax.testing import example_context as context_for
from moe_jax.testing.case import expert_weights
from moe_jax.types import ExpertChoice, pytree

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
    "TopK: histogram-balanced": TopK(
        num_experts=E, k=2, scoring=Scoring(score="sigmoid"), balance="histogram", balance_rate=1.0
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
    "Piggyback": Piggyback(num_experts=E, k=3),
    "SharedBudget": SharedBudget(num_experts=E, k=3, max_distinct=4),
    "Reroute": Reroute(num_experts=E, k=3),
    "Sinkhorn": Sinkhorn(num_experts=E, k=2),
    "BalancedAssignment": BalancedAssignment(num_experts=E),
    "Cosine": Cosine(num_experts=E, k=2, projection_size=D),
    "SeqTopK: a sequence": SeqTopK(num_experts=E, k=2, max_k=4, online=False),
    "SeqTopK: online": SeqTopK(num_experts=E, k=2),
    "MixtureOfDepths": MixtureOfDepths(num_experts=E, capacity=0.25),
    "RandomSecond": RandomSecond(num_experts=E),
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


SHIPPED = [
    cls for cls in registered_rules().values() if cls.__module__.startswith("moe_jax.routers")
]
# A rule enters by its registration; lines above are further settings.
for _cls in SHIPPED:
    if not any(type(router) is _cls for router in CASES.values()):
        CASES[_cls.__name__] = example_rule(_cls)


def test_every_shipped_rule_is_in_the_table():
    public = [getattr(routers, name) for name in routers.__all__]
    rules = {cls for cls in public if isinstance(cls, type) and dataclasses.is_dataclass(cls)}
    rules = {cls for cls in rules if issubclass(cls, Router)}
    assert {AdaK, TopK, TopP} <= rules
    assert rules == {type(router) for router in CASES.values()} - {OneIfSure}


def build(router: Router) -> Case:
    case = build_case(router)
    params, state = dict(case.params), case.state
    if "expert_scale" in params:
        params["expert_scale"] = jnp.linspace(0.5, 2.0, E)
    if isinstance(router, DynamicK):  # as fit does; unfitted scores need not lie in [0, 1]
        context = {**context_for(case.x), "router_logits": router.gate(params, case.x)}
        raw = raw_difficulty(router.difficulty, case.x, context)
        state = dataclasses.replace(state, knots=fit_knots(np.asarray(raw)))
    if isinstance(router, Reroute):
        close = expert_similarity(jax.random.normal(jax.random.key(5), (E, 4, D)))
        state = with_similarity(state, close)
    fields = {field.name for field in dataclasses.fields(router)}
    # A rule with a controller of the bias is tried without one, too, and then has no bias.
    if hasattr(state, "expert_bias") and ("balance_rate" not in fields or router.balance_rate):
        bias = 0.1 * jax.random.normal(jax.random.key(2), (E,), jnp.float32)
        state = dataclasses.replace(state, expert_bias=bias)
    return dataclasses.replace(case, params=params, state=state)


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


def test_numpy_numbers_in_a_rule_are_written_as_python_numbers():
    gate = Gate(disabled_experts=(np.int64(1),))
    rule = MinP(num_experts=np.int64(4), ratio=np.float32(0.5), max_k=np.int32(2), gate=gate)
    plain = MinP(num_experts=4, ratio=0.5, max_k=2, gate=Gate(disabled_experts=(1,)))
    assert json.loads(json.dumps(rule.to_json())) == plain.to_json()
    assert rule.fingerprint() == plain.fingerprint()


def scoring_of(router: Router) -> Scoring:
    if isinstance(router, MixtureOfDepths):
        return Scoring(score="identity")
    return Scoring(score="sigmoid") if isinstance(router, TopAny) else router.scoring


# --- promises: what comes out ---------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "float32"), (7, "bfloat16"), (T, "float16")])
def test_shapes_and_dtypes(case: Case, tokens, dtype):
    decisions.shapes_and_dtypes(case, tokens, dtype)


def test_probabilities_sum_to_one(case: Case):
    decisions.probabilities_sum_to_one(case)


def test_k_lies_within_its_bounds_and_no_expert_is_used_twice(case: Case):
    decisions.k_lies_within_its_bounds(case)


def test_exact_budgets_are_exact(case: Case):
    if case.router.traits.budget != "exact":
        pytest.skip("the rule does not promise it")
    decisions.exact_budgets_are_exact(case)


def test_used_slots_are_a_prefix_and_the_rest_holds_the_sentinel(case: Case):
    decisions.unused_slots_hold_the_sentinel(case)


def test_slots_are_ordered_by_selection_score(case: Case):
    routing, router = case(), case.router
    scoring = scoring_of(router)
    scores = scoring.scores(routing.router_logits)
    if isinstance(routing, ExpertChoice):
        w = np.asarray(routing.combine_weights)
        assert (np.diff(w, axis=1) <= 0).all()
        return
    if isinstance(router, Sinkhorn | BalancedAssignment):  # ordered by what the batch decides
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
    if isinstance(case.router, Reroute):  # an expert takes over the weight of those it stands for
        sums = expert_weights(routing).sum(axis=1)
        np.testing.assert_allclose(sums, np.sort(s, axis=1)[:, -3:].sum(axis=1), rtol=0.3)
        return
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
    if learner.router.min_k == E:
        pytest.skip("it uses every expert")
    if getattr(learner.router, "balance", "sign") != "sign":
        pytest.skip("it refuses disabled experts")
    decisions.a_disabled_expert_stays_out(learner)


def test_ties_go_to_the_lowest_index(case: Case):
    if isinstance(case.router, BalancedAssignment):
        return  # equal tokens are spread over the experts
    if isinstance(case(), ExpertChoice):
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
    decisions.jit_equals_eager(case)


def test_vmap_equals_a_loop(learner: Case):
    decisions.vmap_equals_a_loop(learner)


def test_permuting_tokens_permutes_the_answer(case: Case):
    decisions.permuting_tokens_permutes_the_answer(case)


def test_relabelling_experts_relabels_the_answer(case: Case):
    decisions.relabelling_experts_relabels_the_answer(case)


def test_batch_invariance_as_the_traits_say(case: Case):
    decisions.batch_invariance_as_the_traits_say(case)


def test_causality_as_the_traits_say(case: Case):
    decisions.causality_as_the_traits_say(case)


def test_padding_counts_in_nothing(case: Case):
    decisions.padding_counts_in_nothing(case)


def test_a_batch_of_padding_alone_is_measured_without_nan(case: Case):
    decisions.a_batch_of_padding_alone_is_measured_without_nan(case)


def test_a_nan_token_poisons_no_other(case: Case):
    if not case.router.traits.batch_invariant:
        pytest.skip("the other tokens of this rule may move when one is taken away")
    decisions.a_nan_token_poisons_no_other(case)


def test_expert_choice_never_takes_a_nan_token():
    case = build(CASES["ExpertChoice"])
    routing = case(case.x.at[3].set(jnp.nan))
    assert not np.asarray(routing.expert_mask)[3].any()
    assert np.isfinite(np.asarray(routing.combine_weights)).all()


# --- promises: gradients --------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 30.0, 1e4])
def test_gradients_are_finite(learner: Case, scale):
    """At ties (scale 0) and at logits of tens, where float32 underflows, to ten thousands."""
    values.gradients_are_finite(learner, [scale])


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
    values.the_router_learns(learner)


def test_padding_sends_no_gradient(learner: Case):
    values.padding_sends_no_gradient(learner)


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
    values.logits_are_float32(case)


def test_noise_acts_only_with_a_key(case: Case):
    values.noise_acts_only_with_a_key(case)


def test_nothing_retraces_when_an_equal_router_is_rebuilt_or_the_state_changes(case: Case):
    values.nothing_retraces(case)


def test_a_state_is_small_and_keeps_its_shape_under_update(case: Case):
    router = case.router
    wide = dataclasses.replace(router, num_experts=256)
    # A table of expert pairs is the one thing that may be larger.
    leaves = [leaf for leaf in jax.tree.leaves(wide.init_state()) if leaf.shape != (256, 256)]
    assert sum(leaf.nbytes for leaf in leaves) < 4096

    values.a_state_is_small_and_keeps_its_shape(case)


SINGLE_MODELS: dict[str, Router] = {
    "CapacityTopK": CapacityTopK(num_experts=E, k=2, capacity=9),
    "DepthRouter": DepthRouter(num_experts=E, k=2, hidden_size=6),
    "JointShared": JointShared(num_experts=E, num_shared=2, k=2),
    "MoEPlusPlus": MoEPlusPlus(num_experts=E),
    "NullExperts": NullExperts(num_experts=E, num_null_experts=4, k=4),
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
    stats = statistics(jnp.ones((T, D), jnp.float32))
    if getattr(router, "balance", "sign") == "histogram":
        stats = dataclasses.replace(stats, observed=jnp.zeros((E, 258), jnp.float32))
    donate(router.update(router.init_state(), stats))
    if router.traits.budget != "expected":
        return
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.float32)
    params = router.init(jax.random.key(0), D)
    target = min(router.min_k + 0.6, (router.min_k + router.max_k) / 2)
    donate(router.fit(params, router.init_state(), x, target_mean_k=target, context=context_for(x)))


def test_an_unknown_context_key_is_refused_by_name(case: Case):
    if callable(getattr(case.router, "difficulty", None)):
        pytest.skip("a function of the user's own may read anything")
    values.an_unknown_context_key_is_refused(case)
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
    values.init_works_under_eval_shape(case)
    if not hasattr(case.router, "key_counts"):  # its kernel makes queries
        assert case.params["kernel"].shape == (D, E)


def test_json_round_trip(case: Case):
    router = case.router
    if callable(getattr(router, "difficulty", None)):
        with pytest.raises(TypeError, match=r"difficulty: expected .* got .* Register it"):
            router.to_json()
        return
    values.json_round_trip(case)
    assert repr(router_from_json(router.to_json())) == repr(router)


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
    values.rules_are_frozen(case)


def test_a_rule_cannot_inherit_from_a_rule():
    rules = registered_rules()
    with pytest.raises(TypeError, match=r"expected a direct subclass of Router.*compose"):
        type("MyTopK", (TopK,), {})
    assert registered_rules() == rules


def test_a_rule_that_lacks_a_method_is_refused_by_its_name():
    rules = registered_rules()
    with pytest.raises(
        TypeError, match=r"Half: expected a complete rule, but these are missing: select\."
    ):
        type("Half", (TokenChoice,), {"init_state": lambda self: None})
    assert registered_rules() == rules


def test_check_router_runs_the_whole_contract_on_a_class_of_the_users_own():
    assert set(check_router(OneIfSure)) == set(PROMISES)


def broken(name: str, select, **traits) -> type[Router]:
    """A rule like ``OneIfSure`` that selects in another way, or says another thing of itself."""
    said = dataclasses.replace(OneIfSure(num_experts=E).traits, **traits)
    fields = ("__annotations__", "min_k", "max_k", "gate", "scoring", "init_state")
    body = {field: vars(OneIfSure)[field] for field in fields}
    body |= {"__module__": __name__, "select": select, "traits": property(lambda self: said)}
    cls = type(name, (TokenChoice,), body)
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)  # pyright: ignore


def of_the_batch(self, params, state, slots, x, context):
    sure = slots.slot_probs[:, 0] > slots.slot_probs[:, 0].mean()
    return first_k(jnp.where(sure, 1, 2), 2), slots.scores


def none_at_all(self, params, state, slots, x, context):
    return first_k(jnp.where(slots.slot_probs[:, 0] > 0.5, 0, 2), 2), slots.scores


def without_gradient(self, params, state, slots, x, context):
    keep = first_k(jnp.full((x.shape[0],), 2), 2)
    return keep, jnp.sqrt(slots.scores - slots.scores)


@pytest.mark.parametrize(
    ("select", "traits", "promises"),
    [
        (of_the_batch, {}, ["batch_invariance_as_the_traits_say", "causality_as_the_traits_say"]),
        (OneIfSure.select, {"batch_invariant": False}, ["batch_invariance_as_the_traits_say"]),
        (OneIfSure.select, {"causal": False}, ["causality_as_the_traits_say"]),
        (none_at_all, {}, ["k_lies_within_its_bounds"]),
        (without_gradient, {}, ["gradients_are_finite"]),
    ],
)
def test_check_router_names_the_promise_that_a_rule_breaks(select, traits, promises):
    rules = registered_rules()
    rule = broken("Broken", select, **traits)(num_experts=E)
    others = [name for name in PROMISES if name not in promises]
    with pytest.raises(AssertionError, match=rf"Broken\(.*breaks {len(promises)} of") as caught:
        check_router(rule, skip=[name for name in others if name != "rules_are_frozen"])
    for name in promises:
        assert f"\n{name}: " in str(caught.value)
    assert registered_rules().keys() - rules.keys() <= {"Broken"}


def test_a_mean_over_the_whole_batch_is_no_batch_invariant_rule():
    def above_the_mean(self, params, state, slots, x, context):
        keep = slots.slot_probs > slots.slot_probs.mean()
        return keep.at[:, 0].set(True), slots.scores

    case = build_case(broken("Broken", above_the_mean)(num_experts=E))
    with pytest.raises(AssertionError, match=r"the traits say batch_invariant=True.*WholeBatch"):
        decisions.batch_invariance_as_the_traits_say(case)


def test_a_selection_of_another_form_is_refused_once_with_the_form_that_is_expected():
    def float_mask(self, params, state, slots, x, context):
        return slots.slot_probs, slots.scores

    def too_wide(self, params, state, slots, x, context):
        return jnp.ones((x.shape[0], E), bool), slots.scores

    few = {"rules_are_frozen", "batch_invariance_as_the_traits_say", "causality_as_the_traits_say"}
    for select, got in ((float_mask, r"float32\[24, 2\]"), (too_wide, r"bool\[24, 8\]")):
        form = rf"select: expected keep bool\[24, 2\] and weights float32\[24, 2\].*got keep {got}"
        with pytest.raises(AssertionError, match=form) as caught:
            check_router(broken("Broken", select)(num_experts=E), skip=[*set(PROMISES) - few])
        assert str(caught.value).count("select: expected") == 1


def test_a_rule_without_a_field_that_every_rule_has_is_told_which():
    whole = {field: vars(OneIfSure)[field] for field in ("gate", "scoring", "init_state", "select")}
    cls = type("NoLeast", (TokenChoice,), {**whole, "__module__": __name__, "max_k": 2})
    cls.__annotations__ = {"num_experts": int, "max_k": int, "gate": Gate, "scoring": Scoring}
    rule = dataclasses.dataclass(frozen=True, kw_only=True)(cls)  # pyright: ignore
    registry._registered.pop("NoLeast")  # no other test can build it
    with pytest.raises(TypeError, match=r"NoLeast: expected the fields .*, got none of min_k"):
        rule(num_experts=E)  # pyright: ignore


def test_a_rule_of_decoding_steps_is_judged_on_few_tokens_too():
    case = build_case(Piggyback(num_experts=E, k=3))
    assert case().expert_mask.any(axis=0).all()  # so many tokens load every expert and drop none
    decisions.batch_invariance_as_the_traits_say(case)
    decisions.causality_as_the_traits_say(case)


def test_check_router_says_what_it_needs():
    with pytest.raises(TypeError, match="expected a routing rule or its class, got 3"):
        check_router(3)  # pyright: ignore

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Needy:
        pass

    with pytest.raises(TypeError, match=r"expected a class of rules, got Needy\."):
        check_router(Needy)  # pyright: ignore
    with pytest.raises(ValueError, match=r"skip: expected names among .*, got speed"):
        check_router(OneIfSure, skip=["speed"])


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
