"""The contract of a routing rule as functions, for tests of your own rules.

``check_router(rule)`` runs the whole contract. Each promise is also a function of a ``RouterCase``, so
that a test suite can report them one by one::

    @pytest.mark.parametrize("promise", moe_jax.testing.PROMISES)
    def test_my_rule(promise):
        moe_jax.testing.PROMISES[promise](moe_jax.testing.build_case(MyRule(num_experts=8)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moe_jax.routers import Router
from moe_jax.routers.catalog import example_rule
from moe_jax.testing import decisions, values
from moe_jax.testing.case import ContextOf, RouterCase, build_case, example_context

__all__ = [
    "PROMISES",
    "RouterCase",
    "build_case",
    "check_router",
    "example_context",
    "example_rule",
]

PROMISES: dict[str, Callable[[RouterCase], None]] = {
    promise.__name__: promise
    for promise in (
        values.rules_are_frozen,
        values.init_works_under_eval_shape,
        decisions.shapes_and_dtypes,
        decisions.probabilities_sum_to_one,
        decisions.k_lies_within_its_bounds,
        decisions.exact_budgets_are_exact,
        decisions.unused_slots_hold_the_sentinel,
        decisions.a_disabled_expert_stays_out,
        decisions.jit_equals_eager,
        decisions.vmap_equals_a_loop,
        decisions.permuting_tokens_permutes_the_answer,
        decisions.relabelling_experts_relabels_the_answer,
        decisions.batch_invariance_as_the_traits_say,
        decisions.causality_as_the_traits_say,
        decisions.padding_counts_in_nothing,
        decisions.a_batch_of_padding_alone_is_measured_without_nan,
        decisions.a_nan_token_poisons_no_other,
        values.gradients_are_finite,
        values.the_router_learns,
        values.padding_sends_no_gradient,
        values.logits_are_float32,
        values.noise_acts_only_with_a_key,
        values.nothing_retraces,
        values.a_state_is_small_and_keeps_its_shape,
        values.the_state_of_another_rule_is_refused,
        values.no_array_is_in_a_tree_twice,
        values.fit_reaches_its_target,
        values.an_unknown_context_key_is_refused,
        values.json_round_trip,
    )
}


def check_router(
    rule: Router | type[Router],
    *,
    params: Any = None,
    state: Any = None,
    context_of: ContextOf = example_context,
    skip: Sequence[str] = (),
) -> tuple[str, ...]:
    """Checks that a rule keeps the contract that every routing rule of the library keeps.

    Shapes and dtypes, bounds of k, the sentinel of unused slots, padding, NaN, gradients, ``jit`` and
    ``vmap``, retracing, states, JSON, calibration, and the rule's ``traits``.

    Args:
        rule: a rule, or a class of rules, which is then built for 8 experts by ``example_rule``.
        params, state: parameters and state to check with instead of new ones; tokens are of width 16.
        context_of: tokens f32[T, D] to the ``context`` that the rule reads; the library's own keys by
            default.
        skip: names in ``PROMISES`` that the rule is not meant to keep.

    Returns:
        The names of the promises that were checked.

    Raises:
        TypeError: not a rule, or a class that cannot be built by itself.
        ValueError: an unknown name in ``skip``.
        AssertionError: a promise is broken; the message lists each with its reason.

    Example:
        >>> import moe_jax
        >>> len(check_router(moe_jax.TopK(num_experts=8, k=2))) > 20
        True
    """
    router = example_rule(rule) if isinstance(rule, type) else rule
    if not isinstance(router, Router):
        raise TypeError(
            f"rule: expected a routing rule or its class, got {router!r}. Derive it from "
            "moe_jax.routers.TokenChoice."
        )
    unknown = sorted(set(skip) - set(PROMISES))
    if unknown:
        raise ValueError(
            f"skip: expected names among {', '.join(PROMISES)}, got {', '.join(unknown)}."
        )
    case = build_case(router, params=params, state=state, context_of=context_of)
    checked: list[str] = []
    broken: dict[str, list[str]] = {}  # a reason that several promises share is printed once
    for name, promise in PROMISES.items():
        if name in skip:
            continue
        try:
            promise(case)
        except Exception as error:  # whatever a broken rule raises is its report
            lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
            reason = f"{type(error).__name__}: {'; '.join(lines[:6])}"
            broken.setdefault(reason, []).append(name)
        checked.append(name)
    if broken:
        raise AssertionError(
            f"{router!r} breaks {sum(map(len, broken.values()))} of {len(checked)} promises:\n"
            + "\n".join(f"{', '.join(names)}: {reason}" for reason, names in broken.items())
        )
    return tuple(checked)
