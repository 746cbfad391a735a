"""A disabled expert is never chosen: by no rule, score, group setting or min_k."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
    DynamicK,
    ExpertChoiceRouter,
    ExpertThreshold,
    Gate,
    MinP,
    RandomSkip,
    ReLURouter,
    Scoring,
    TopAny,
    TopK,
    TopP,
)
from moe_jax.routing.scoring import GROUP_FILLS, GROUP_SCORES, SCORES
from moe_jax.types import ExpertChoice

T, D, E = 5, 8, 4


def routed(router, *, bias: float = 0.0):
    """Routes five random tokens; with ``bias`` the disabled experts are favoured by it."""
    params = router.init(jax.random.key(0), D)
    state = router.init_state()
    if bias and hasattr(state, "expert_bias"):
        off = list(router.gate.disabled_experts)
        state = type(state)(
            **{
                name: getattr(state, name)
                if name != "expert_bias"
                else state.expert_bias.at[jnp.array(off)].set(bias)
                for name in type(state).__dataclass_fields__
            }
        )
    return router(params, state, jax.random.normal(jax.random.key(1), (T, D)))


def uses_only_enabled(router, routing) -> None:
    off = list(router.gate.disabled_experts)
    used = np.asarray(routing.expert_mask)
    assert not used[:, off].any()
    assert used.any()
    assert np.isfinite(np.asarray(routing.combine_weights)).all()
    assert (np.abs(np.asarray(routing.combine_weights)) < 1e3).all()
    if isinstance(routing, ExpertChoice):
        return
    indices = np.asarray(routing.expert_indices)
    assert (np.diff((indices < E).astype(int), axis=1) <= 0).all(), "used slots are a prefix"
    assert (np.asarray(routing.combine_weights)[indices == E] == 0).all()


GROUPED = [
    dict(num_groups=2, top_groups=top, group_score=score, group_fill=fill)
    for top, score, fill in itertools.product((1, 2), GROUP_SCORES, GROUP_FILLS)
]


@pytest.mark.parametrize("score", SCORES)
def test_top_k_with_every_score_and_group_setting(score):
    for groups, off, bias in itertools.product([{}, *GROUPED], [(1,), (0, 1)], (0.0, 100.0)):
        router = TopK(
            num_experts=E,
            k=2,
            gate=Gate(disabled_experts=off),
            scoring=Scoring(score=score, **groups),
        )
        routing = routed(router, bias=bias)
        uses_only_enabled(router, routing)
        k = np.asarray(routing.num_experts_per_token)
        assert k.min() >= router.min_k
        assert k.max() <= 2


def test_the_group_with_one_enabled_expert_gives_it_alone():
    """Two groups, one of which has expert 0 alone: a token that chooses it uses one expert, not two."""
    router = TopK(
        num_experts=E,
        k=2,
        gate=Gate(disabled_experts=(1,)),
        scoring=Scoring(score="sigmoid", num_groups=2, top_groups=1, group_score="max"),
    )
    kernel = jnp.array([[9.0, 0.0, 0.0, 1.0], [0.0, 0.0, 9.0, 1.0]])
    routing = router({"kernel": kernel}, router.init_state(), jnp.eye(2))
    assert routing.expert_indices.tolist() == [[0, E], [2, 3]]
    assert routing.combine_weights[0, 1] == 0
    assert (router.min_k, router.traits.budget) == (1, "none")


def test_a_group_of_disabled_experts_alone_is_never_worth_the_choice():
    for score, group_score in itertools.product(("identity", "sigmoid"), GROUP_SCORES):
        router = TopK(
            num_experts=E,
            k=2,
            gate=Gate(disabled_experts=(0, 1)),
            scoring=Scoring(score=score, num_groups=2, top_groups=1, group_score=group_score),
        )
        kernel = jnp.full((D, E), -1.0)  # every enabled expert scores low
        routing = router({"kernel": kernel}, router.init_state(), jnp.ones((T, D)))
        assert routing.expert_indices.tolist() == [[2, 3]] * T


OTHERS = {
    "DynamicK": lambda gate: DynamicK(num_experts=E, min_k=2, max_k=4, gate=gate),
    "DynamicK, identity": lambda gate: DynamicK(
        num_experts=E, min_k=2, max_k=4, gate=gate, scoring=Scoring(score="identity")
    ),
    "DynamicK, softmax over slots": lambda gate: DynamicK(
        num_experts=E,
        min_k=2,
        max_k=4,
        gate=gate,
        scoring=Scoring(score="identity", post="softmax"),
    ),
    "TopP": lambda gate: TopP(num_experts=E, p=1.0, gate=gate),
    "TopP, renormalised": lambda gate: TopP(
        num_experts=E, p=1.0, min_k=2, gate=gate, scoring=Scoring(norm="sum")
    ),
    "MinP": lambda gate: MinP(num_experts=E, ratio=0.0, gate=gate),
    "MinP, identity": lambda gate: MinP(
        num_experts=E, ratio=0.0, gate=gate, scoring=Scoring(score="identity")
    ),
    "ExpertThreshold": lambda gate: ExpertThreshold(
        num_experts=E, target_k=2.0, min_k=2, gate=gate
    ),
    "ExpertThreshold, identity": lambda gate: ExpertThreshold(
        num_experts=E, target_k=2.0, min_k=2, gate=gate, scoring=Scoring(score="identity")
    ),
    "ExpertChoice": lambda gate: ExpertChoiceRouter(num_experts=E, mean_k=4.0, gate=gate),
    "RandomSkip, lowest": lambda gate: RandomSkip(num_experts=E, k=2, mean_k=1.5, gate=gate),
    "RandomSkip, random": lambda gate: RandomSkip(
        num_experts=E, k=2, mean_k=1.5, drop="random", gate=gate
    ),
    "ReLU": lambda gate: ReLURouter(num_experts=E, target_k=2.0, gate=gate),
    "TopAny": lambda gate: TopAny(num_experts=E, gate=gate),
    "TopAny, none": lambda gate: TopAny(num_experts=E, min_k=0, gate=gate),
}


@pytest.mark.parametrize("rule", list(OTHERS))
def test_every_rule(rule):
    for off in [(0,), (0, 1), (3, 1)]:
        router = OTHERS[rule](Gate(disabled_experts=off))
        for bias in (0.0, 100.0):
            uses_only_enabled(router, routed(router, bias=bias))


def test_renormalised_weights_are_shares_of_the_experts_that_are_left():
    """A slot without an expert takes no share: 1 = 1, not 1/2 and a lost half."""
    for post in ("none", "softmax"):
        norm = "sum" if post == "none" else "none"
        score = "sigmoid" if post == "none" else "identity"
        router = TopK(
            num_experts=E,
            k=2,
            gate=Gate(disabled_experts=(1,)),
            scoring=Scoring(
                score=score, norm=norm, post=post, num_groups=2, top_groups=1, group_score="max"
            ),
        )
        sums = np.asarray(routed(router).combine_weights.sum(axis=-1))
        np.testing.assert_allclose(sums, 1.0, rtol=1e-6)


def test_a_token_of_nan_still_shows_it():
    """Dropping slots hides no fault: NaN logits give NaN weights, on enabled experts."""
    router = TopK(num_experts=E, k=2, gate=Gate(disabled_experts=(0,)))
    params = router.init(jax.random.key(0), D)
    routing = router(params, router.init_state(), jnp.full((T, D), jnp.nan))
    assert np.isnan(np.asarray(routing.combine_weights)).all()
    assert not np.asarray(routing.expert_mask)[:, 0].any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: TopK(
                num_experts=4,
                k=3,
                gate=Gate(disabled_experts=(0, 1)),
                scoring=Scoring(score="identity"),
            ),
            r"k: expected at most 2, .*disabled_experts=\(0, 1\), got 3",
        ),
        (
            lambda: DynamicK(num_experts=4, min_k=3, max_k=4, gate=Gate(disabled_experts=(0, 1))),
            "at most 2.*got 3",
        ),
        (
            lambda: RandomSkip(num_experts=4, k=3, mean_k=1.5, gate=Gate(disabled_experts=(0, 1))),
            "at most 2.*got 3",
        ),
        (
            lambda: TopK(num_experts=2, k=1, gate=Gate(disabled_experts=(0, 1))),
            "at least one expert",
        ),
        (lambda: TopK(num_experts=2, k=1, gate=Gate(disabled_experts=(2,))), r"0\.\.1.*got \(2,\)"),
        (
            lambda: TopK(
                num_experts=8,
                k=3,
                gate=Gate(disabled_experts=(0, 2, 4, 6)),
                scoring=Scoring(num_groups=4, top_groups=2),
            ),
            "at most 2 experts.*without disabled_experts.*got 3",
        ),
    ],
)
def test_more_experts_than_are_enabled_are_refused_at_construction(make, words):
    with pytest.raises(ValueError, match=words):
        make()
