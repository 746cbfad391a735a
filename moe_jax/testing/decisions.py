"""Promises about a rule's decisions: what comes out, and what it may depend on."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.testing.case import (
    D_MODEL,
    TOKENS,
    RouterCase,
    changed_from,
    everything_measured,
    expert_weights,
    require,
    same,
    same_routing,
)
from moe_jax.types import ExpertChoice


def shapes_and_dtypes(case: RouterCase, tokens: int = 7, dtype: str = "bfloat16") -> None:
    """Every field of the routing has its documented shape and dtype, whatever the dtype of x."""
    router, experts = case.router, case.router.num_experts
    x = jax.ShapeDtypeStruct((tokens, D_MODEL), jnp.dtype(dtype))
    out = jax.eval_shape(
        lambda x: router(case.params, case.state, x, context=case.context_of(x)), x
    )
    wanted = {
        "router_logits": ((tokens, experts), jnp.float32),
        "router_probs": ((tokens, experts), jnp.float32),
        "token_mask": ((tokens,), jnp.bool_),
    }
    if isinstance(out, ExpertChoice):
        require(out.token_indices.shape[0] == experts, "token_indices: expected a row an expert")
        require(out.num_tokens == tokens, f"num_tokens: expected {tokens}, got {out.num_tokens}")
        wanted["token_indices"] = (out.combine_weights.shape, jnp.int32)
    else:
        require(out.num_experts == experts, f"num_experts: expected {experts}")
        wanted["expert_indices"] = ((tokens, router.max_k), jnp.int32)
        wanted["combine_weights"] = ((tokens, router.max_k), jnp.float32)
        if out.residual_weight is not None:  # only rules with zero-computation experts have one
            wanted["residual_weight"] = ((tokens,), jnp.float32)
    for name, (shape, kind) in wanted.items():
        leaf = getattr(out, name)
        require(
            (leaf.shape, leaf.dtype) == (shape, kind),
            f"{name}: expected {jnp.dtype(kind)}{list(shape)}, got {leaf.dtype}{list(leaf.shape)}",
        )


def probabilities_sum_to_one(case: RouterCase) -> None:
    """``router_probs`` sums to 1 over a token's experts."""
    np.testing.assert_allclose(case().router_probs.sum(axis=-1), np.ones(TOKENS), rtol=1e-5)


def k_lies_within_its_bounds(case: RouterCase) -> None:
    """A token uses between ``min_k`` and ``max_k`` experts, or none if the traits allow it."""
    routing, router = case(), case.router
    k = np.asarray(routing.num_experts_per_token)
    least = router.min_k if router.traits.may_leave_token_empty else max(1, router.min_k)
    require(
        k.min() >= least and k.max() <= router.max_k,
        f"k: expected {least} to {router.max_k} experts a token, got {k.min()} to {k.max()}",
    )
    # `expert_mask` counts an expert once, so a repeated one would make its count fall short.
    np.testing.assert_array_equal(k, np.asarray(routing.expert_mask).sum(axis=1))
    if isinstance(routing, ExpertChoice):
        for row in np.asarray(routing.token_indices):
            real = row[row < TOKENS]
            require(len(set(real)) == len(real), "an expert took a token twice")


def exact_budgets_are_exact(case: RouterCase) -> None:
    """A rule with an exact budget makes exactly as many assignments as its budget says."""
    router: Any = case.router
    if router.traits.budget != "exact":
        return
    want = router.mean_k if hasattr(router, "mean_k") else router.k
    # Expert choice rounds to whole rows of an expert's buffer.
    rows = math.ceil(want * TOKENS / router.num_experts) * router.num_experts
    routing = case()
    got = int(np.asarray(routing.num_experts_per_token).sum())
    total = rows if isinstance(routing, ExpertChoice) else want * TOKENS
    require(got == total, f"expected exactly {total} assignments, got {got}")


def unused_slots_hold_the_sentinel(case: RouterCase) -> None:
    """Unused slots come last and hold the index one past the last expert (or token) and weight 0."""
    routing = case()
    if isinstance(routing, ExpertChoice):
        indices, none = np.asarray(routing.token_indices), routing.num_tokens
    else:
        indices, none = np.asarray(routing.expert_indices), case.router.num_experts
    used = indices < none
    require((indices >= 0).all(), "indices: expected none below 0")
    require((indices[~used] == none).all(), f"unused slots: expected index {none}")
    weights = np.asarray(routing.combine_weights)
    require((weights[~used] == 0).all(), "unused slots: expected weight 0")
    require((np.diff(used.astype(int), axis=1) <= 0).all(), "used slots: expected a prefix")


def a_disabled_expert_stays_out(case: RouterCase) -> None:
    """Balancing sees that nobody uses it and would bring it back: by bias, by cutoff, by threshold."""
    if case.router.num_experts in (1, case.router.min_k):
        return
    last = min(5, case.router.num_experts - 1)
    gate = dataclasses.replace(case.router.gate, disabled_experts=(last,))
    rule: Any = case.router
    router = dataclasses.replace(rule, gate=gate)
    favour = {"expert_bias": 100.0, "cutoffs": -100.0}
    names = [name for name in favour if hasattr(case.state, name)]
    state = case.state
    if names:
        state = dataclasses.replace(
            state, **{n: getattr(state, n).at[last].set(favour[n]) for n in names}
        )
    params = dict(case.params)
    if "thresholds" in params:
        params["thresholds"] = params["thresholds"].at[last].set(-1.0)
    routing = dataclasses.replace(case, router=router)(params=params, state=state)
    used = np.asarray(routing.expert_mask)
    require(not used[:, last].any(), f"expert {last} is disabled and was used")
    require(used.any(), "no expert was used at all")


# --- promises: what it may not depend on ----------------------------------------------------


def jit_equals_eager(case: RouterCase) -> None:
    """Compiled and eager calls make the same decisions."""
    eager = case.router(
        case.params,
        case.state,
        case.x,
        token_mask=jnp.ones((TOKENS,), bool),
        context=case.context_of(case.x),
    )
    same_routing(case(), eager, rtol=1e-6)
    np.testing.assert_allclose(case().router_logits, eager.router_logits, rtol=1e-5, atol=1e-6)


def vmap_equals_a_loop(case: RouterCase) -> None:
    """``jax.vmap`` over batches makes the decisions of one call per batch."""
    x = jax.random.normal(jax.random.key(3), (2, TOKENS, D_MODEL), jnp.float32)
    call = jax.jit(
        jax.vmap(lambda x: case.router(case.params, case.state, x, context=case.context_of(x)))
    )
    both = call(x)
    for i in range(2):
        same_routing(jax.tree.map(lambda leaf, i=i: leaf[i], both), case(x[i]), rtol=1e-5)


def permuting_tokens_permutes_the_answer(case: RouterCase) -> None:
    """Tokens in another order use the same experts with the same weights."""
    traits = case.router.traits
    if traits.causal and not traits.batch_invariant:
        return  # what came before a token decides, so order matters
    order = np.random.default_rng(0).permutation(TOKENS)
    a, b = case(), case(case.x[order])
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[order], np.asarray(b.expert_mask))
    np.testing.assert_allclose(expert_weights(a)[order], expert_weights(b), rtol=1e-6)


def relabelling_experts_relabels_the_answer(case: RouterCase) -> None:
    """Experts have no identity beyond their parameters. Groups are relabelled as blocks.

    Experts that are pairs of keys (``key_counts``) are relabelled by their keys.
    """
    experts = case.router.num_experts
    if hasattr(case.router, "key_counts"):
        _relabelling_keys_relabels_pairs(case)
        return
    groups = getattr(getattr(case.router, "scoring", None), "num_groups", 1)
    rng = np.random.default_rng(0)
    blocks = np.arange(experts).reshape(groups, -1)[rng.permutation(groups)]
    order = np.concatenate([rng.permutation(block) for block in blocks])

    def relabel(leaf: Any) -> Any:
        square = leaf.ndim == 2 and leaf.shape == (experts, experts)
        leaf = leaf[order] if square else leaf
        return leaf[..., order] if leaf.ndim and leaf.shape[-1] == experts else leaf

    fit = getattr(case.state, "fit", None)
    state = jax.tree.map(relabel, case.state)
    if fit is not None:
        state = dataclasses.replace(state, fit=fit)
    a, b = case(), case(params=jax.tree.map(relabel, case.params), state=state)
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[:, order], np.asarray(b.expert_mask))
    np.testing.assert_allclose(expert_weights(a)[:, order], expert_weights(b), rtol=1e-5, atol=1e-6)


def _relabelling_keys_relabels_pairs(case: RouterCase) -> None:
    rule: Any = case.router
    rng = np.random.default_rng(0)
    first, second = (rng.permutation(n) for n in rule.key_counts)
    order = (first[:, None] * len(second) + second[None, :]).ravel()
    params = {
        **case.params,
        "keys_1": case.params["keys_1"][:, first],
        "keys_2": case.params["keys_2"][:, second],
    }
    a, b = case(), case(params=params)
    np.testing.assert_array_equal(np.asarray(a.expert_mask)[:, order], np.asarray(b.expert_mask))
    np.testing.assert_allclose(expert_weights(a)[:, order], expert_weights(b), rtol=1e-5, atol=1e-6)


def batch_invariance_as_the_traits_say(case: RouterCase) -> None:
    """Other tokens change a token's experts if and only if the traits say so."""
    whole = case()
    if case.router.traits.batch_invariant:
        # Every other token replaced: the rest is the same bit for bit. Tokens of little and of much
        # confidence move what a rule may compute from the batch, such as a mean, far enough.
        half = jnp.arange(TOKENS) % 2 == 1
        few = case(case.x[4:7])  # another batch size: the same up to the product's rounding
        try:
            for scale in (1.0, 1e-3, 30.0):
                others = scale * changed_from(case.x, 0)
                mixed = case(jnp.where(half[:, None], case.x, others))
                same_routing(whole, mixed, rows=np.asarray(half))
            np.testing.assert_array_equal(few.expert_mask, np.asarray(whole.expert_mask)[4:7])
            np.testing.assert_allclose(
                expert_weights(few), expert_weights(whole)[4:7], rtol=1e-5, atol=1e-6
            )
        except AssertionError as error:
            raise AssertionError(
                "other tokens change a token's experts or weights, and the traits say "
                "batch_invariant=True. Decide from the token's own row, or let the rule's traits say "
                f"batch_invariant=False (moe_jax.routers.contracts.WholeBatch). {error}"
            ) from None
    else:

        def matters(x: Any) -> bool:
            mask, others = np.asarray(case(x).expert_mask), changed_from(x, 0)
            return any(
                not np.array_equal(
                    mask[t],
                    np.asarray(case(others.at[t].set(x[t])).expert_mask)[t],
                )
                for t in range(len(x))
            )

        require(
            any(matters(x) for x in _batches(case)),
            "a trait says that neighbours matter, and they never do",
        )


def causality_as_the_traits_say(case: RouterCase) -> None:
    """Later tokens change an earlier token's experts if and only if the traits say so."""

    def before_and_after(x: Any) -> tuple[Any, Any, slice]:
        half = len(x) // 2
        return case(x), case(changed_from(x, half)), slice(0, half)

    if case.router.traits.causal:
        before, after, rows = before_and_after(case.x)
        same_routing(before, after, rows=rows)
    else:
        changes = (
            not np.array_equal(
                np.asarray(before.expert_mask)[rows], np.asarray(after.expert_mask)[rows]
            )
            for before, after, rows in map(before_and_after, _batches(case))
        )
        require(any(changes), "a trait says that later tokens matter, and they do not")


def _batches(case: RouterCase) -> tuple[Any, ...]:
    """All tokens, and four: where many tokens load every expert, a rule of a batch drops none."""
    return case.x, case.x[:4]


def padding_counts_in_nothing(case: RouterCase) -> None:
    """Whatever sits in padding, NaN and inf included: answers, statistics and losses are equal."""
    mask = jnp.arange(TOKENS) % 3 != 1
    a = case(jnp.where(mask[:, None], case.x, 0.0), mask=mask)
    measured = everything_measured(a)
    require(not np.asarray(a.expert_mask)[~np.asarray(mask)].any(), "padding uses an expert")
    require(float(measured["stats"].token_count) == float(mask.sum()), "padding is counted")
    for value in (jnp.nan, jnp.inf, 1e30):
        b = case(jnp.where(mask[:, None], case.x, value), mask=mask)
        same_routing(a, b)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6),
            everything_measured(b),
            measured,
        )
        same(case.router.observe(case.state, b), case.router.observe(case.state, a))
        regularization = functools.partial(case.router.regularization, case.params, case.state)
        np.testing.assert_allclose(regularization(b), regularization(a), rtol=1e-6)
    finite = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(measured))
    require(finite, "statistics or losses are not finite")


def a_batch_of_padding_alone_is_measured_without_nan(case: RouterCase) -> None:
    """Statistics and losses of a batch without any real token are finite."""
    nothing = jnp.full((TOKENS, D_MODEL), jnp.nan, jnp.float32)
    routing = case(nothing, mask=jnp.zeros((TOKENS,), bool))
    require(not np.asarray(routing.expert_mask).any(), "padding uses an expert")
    for leaf in jax.tree.leaves(everything_measured(routing)):
        require(np.isfinite(leaf).all(), "statistics or losses are not finite")


def a_nan_token_poisons_no_other(case: RouterCase) -> None:
    """Holds for rules whose tokens do not depend on each other."""
    if not case.router.traits.batch_invariant:
        return
    routing = case(case.x.at[3].set(jnp.nan))
    rest = np.arange(TOKENS) != 3
    same_routing(case(), routing, rows=rest)
    require(np.isfinite(expert_weights(routing)[rest]).all(), "another token's weights are NaN")
