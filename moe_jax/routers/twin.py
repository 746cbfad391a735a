"""The dynamic rules that take the place of a trained ``TopK``, and the controls beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.routers import registry
from moe_jax.routers.base import Router
from moe_jax.routers.dynamic_k import DynamicK
from moe_jax.routers.elastic import Elastic
from moe_jax.routers.expert_threshold import ExpertThreshold
from moe_jax.routers.min_p import MinP
from moe_jax.routers.random_skip import RandomSkip
from moe_jax.routers.top_k import TopK
from moe_jax.routers.top_p import TopP
from moe_jax.types import Array, Params

DYNAMIC_RULES = ("TopP", "MinP", "DynamicK", "ExpertThreshold")


def dynamic_twin(
    trained: TopK | Elastic,
    rule: str | Router | type[Router],
    *,
    target_mean_k: float,
    max_k: int | None = None,
    difficulty: str = "router_entropy",
) -> Router:
    """Returns a rule with a budget to fit that gates and weighs experts as ``trained`` does.

    Args:
        trained: the fixed-k rule.
        rule: a name in ``DYNAMIC_RULES``; ``module:Class`` of a rule of your own, or the class itself,
            which is built with the fields of ``trained`` that it has; or a rule that is built, whose
            gate and scoring become those of ``trained`` where they are at their defaults.
        target_mean_k: experts per token on average; only ``ExpertThreshold`` has it in the rule.
        max_k: most experts one token may use; None is the trained k, so that a saving is never
            paid for with experts that the model was not trained to combine.
        difficulty: estimator of ``DynamicK``.

    Raises:
        ValueError: an unknown rule, or one of another number of experts.
        TypeError: no rule, or a class with another field that has no default.

    Example:
        >>> dynamic_twin(TopK(num_experts=8, k=2), "TopP", target_mean_k=1.6).max_k
        2
    """
    rule = find_dynamic_rule(rule)
    if not isinstance(rule, str):
        most = trained.k if max_k is None else max_k
        return _own_rule(trained, rule, target_mean_k=target_mean_k, max_k=most)
    common: dict[str, Any] = {
        "num_experts": trained.num_experts,
        "min_k": 1,
        "max_k": trained.k if max_k is None else max_k,
        "gate": trained.gate,
        "scoring": trained.scoring,
    }
    if rule == "DynamicK":
        return DynamicK(difficulty=difficulty, **common)
    if rule == "ExpertThreshold":
        return ExpertThreshold(target_k=target_mean_k, **common)
    return TopP(**common) if rule == "TopP" else MinP(**common)


def find_dynamic_rule(rule: str | Router | type[Router]) -> str | Router | type[Router]:
    """Returns a name in ``DYNAMIC_RULES``, the class that ``module:Class`` names, or a rule as it is.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor a rule.
    """
    if isinstance(rule, str) and ":" in rule:
        return registry.load_rule(rule)
    if isinstance(rule, str) and rule not in DYNAMIC_RULES:
        raise ValueError(
            f"rule: expected one of {', '.join(DYNAMIC_RULES)}, or module:Class of a rule of your own, "
            f"got {rule!r}. Choose one of these, or see docs/write_a_rule.md."
        )
    known = isinstance(rule, (str, Router))
    if not known and not (isinstance(rule, type) and issubclass(rule, Router)):
        raise TypeError(
            f"rule: expected a name, a routing rule or its class, got {rule!r}. Name one of "
            f"{', '.join(DYNAMIC_RULES)}, or derive a class from moe_jax.routers.TokenChoice."
        )
    return rule


def _own_rule(
    trained: TopK | Elastic, rule: Router | type[Router], *, target_mean_k: float, max_k: int
) -> Router:
    values: dict[str, Any] = {"gate": trained.gate, "scoring": trained.scoring}
    if not isinstance(rule, type):
        if rule.num_experts != trained.num_experts:
            raise ValueError(
                f"rule: expected one of num_experts={trained.num_experts}, got {rule!r}. The model has "
                f"{trained.num_experts} experts."
            )
        fields = {f.name: f.default for f in dataclasses.fields(rule)}  # pyright: ignore
        changes = {n: v for n, v in values.items() if n in fields and getattr(rule, n) == fields[n]}
        return dataclasses.replace(rule, **changes)  # pyright: ignore
    fields = {f.name: f for f in dataclasses.fields(rule)}  # pyright: ignore
    values |= {"num_experts": trained.num_experts, "k": trained.k, "max_k": max_k}
    values |= dict.fromkeys(("mean_k", "target_k", "target_mean_k"), target_mean_k)
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise TypeError(
            f"rule: expected defaults for {', '.join(missing)} of {rule.__name__}, got none. Give them "
            "defaults, or pass a rule that is built."
        )
    return rule(**{name: value for name, value in values.items() if name in fields})


def control_twin(trained: TopK | Elastic, drop: str, *, mean_k: float) -> RandomSkip:
    """Returns the control that drops experts of ``trained`` without looking at the token."""
    return RandomSkip(
        num_experts=trained.num_experts,
        k=trained.k,
        mean_k=mean_k,
        drop=drop,
        gate=trained.gate,
        scoring=trained.scoring,
    )


def starting_state(router: Router, trained_state: Any) -> Any:
    """Returns the unfitted state of a twin, with the selection bias that training learned."""
    state = router.init_state()
    if hasattr(state, "expert_bias") and hasattr(trained_state, "expert_bias"):
        state = dataclasses.replace(state, expert_bias=trained_state.expert_bias)
    return state


def fit_twin(
    router: Router, params: Params, trained_state: Any, x: Array, *, target_mean_k: float
) -> Any:
    """Returns the state of a twin that is fitted to a budget on the inputs of its layer.

    Models are fitted layer by layer in three walks, which differ in what x is. The small language model
    (``lab.calibration.fit_layers``) and published models (``models.fit_budget``, which reads one layer
    at a time and continues after an interruption) fit each layer on what reaches it while the layers
    before it run their fitted rules. ``interop.make_model_dynamic`` has blocks without a model around
    them: x is what the caller recorded in the trained model.

    Args:
        router: the twin.
        params: the router's parameters.
        trained_state: state of the trained rule, whose selection bias is kept.
        x: float[T, D], the inputs of the layer, without padding.
        target_mean_k: experts per token on average.

    Raises:
        ValueError: the target is out of reach of the rule on these inputs.
    """
    state = starting_state(router, trained_state)
    return router.fit(params, state, x, target_mean_k=target_mean_k)
