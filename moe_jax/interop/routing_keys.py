"""Checks the keys of a config that change the mathematics of a block but that its family ignores.

Such a key must state what the family does in any case; otherwise the config is rejected. A model
whose setting is silently ignored would route differently from the trained one. The rule that was
built for the config shows what the family does, so the table below names keys, not families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moe_jax.experts import ExpertFn
from moe_jax.interop.expert_functions import HF_ACTIVATIONS
from moe_jax.interop.family import Family
from moe_jax.interop.model_config import ALIASES, HFConfig
from moe_jax.interop.rules import CapacityTopK, JointShared, ProductKeys, ZeroExperts
from moe_jax.interop.value_kinds import in_words
from moe_jax.routers import Router
from moe_jax.routing.scoring import Scoring

# A key with one of these words is about routing ...
_ROUTING_WORD = re.compile(r"(?:^|_)(router|routing|topk|scoring)(?:_|$)")
# ... unless it is about training, precision, what a model reports, or sparse attention.
_NO_ROUTING = re.compile(
    r"(?:^|_)(aux|loss|coef|coeff|lambda|alpha|dtype|fp32|init|std|lr|rate|output|index|ignore"
    r"|add|type|load|balancing|padding|indexer)(?:_|$)"
)


def check_router_keys(family: Family, c: HFConfig, router: Router) -> None:
    """Rejects a stated routing key that the family ignores and that differs from ``router``.

    Args:
        family: the family of the config.
        c: the config, after ``family.router(c)`` has read its keys.
        router: the rule that the family built from the config.

    Raises:
        ValueError: a key contradicts the rule; the message names the key.
    """
    scoring = _scoring(router)
    scale = scoring.scale * float(family.output_scale(c))
    tables: dict[str, tuple[Any, ...]] = {
        "score": _score_names(scoring, family),
        "norm": (scoring.renormalizes,),
        "scale": (scale, *_off(math.isclose(scale, 1.0))),
        "groups": (scoring.num_groups, *_off(scoring.num_groups == 1)),
        "top_groups": (scoring.top_groups, *_off(scoring.num_groups == 1)),
        "topk_method": (_method(scoring, family),),
        "group_limited_greedy": (scoring.num_groups > 1,),
        # A single group is the same whether it counts as grouping or not.
        "use_grouped_topk": (True, *_off(scoring.num_groups == 1)),
        "k": (getattr(router, "k", router.max_k),),
        "selection_bias": (True, False) if family.bias == "optional" else (family.bias != "none",),
        "router_bias": (router.gate.use_bias,),
        "moe_router_bias": (router.gate.use_bias,),
        "use_router_bias": (router.gate.use_bias,),
        "moe_router_use_sigmoid": (scoring.score == "sigmoid",),
        "softcap": (router.gate.softcap, *_off(router.gate.softcap is None)),
        "jitter": (router.gate.jitter, *_off(router.gate.jitter == 0)),
        "weight_on_input": (family.weight_on_input,),
        "zero_experts": _off(not isinstance(router, ZeroExperts)),
        "zero_expert_type": ("identity",) if isinstance(router, ZeroExperts) else _off(True),
        "shared_expert_sink": (isinstance(router, JointShared),),
        "expert_capacity": _off(not isinstance(router, CapacityTopK)),
        "batch_prioritized_routing": (False,),
        "moe_drop_tokens": (False,),
        "moe_random_routing_dropped_token": (False,),
        "moe_use_hard_gate": (False,),
    }
    table_keys = set()
    for meaning, accepted in tables.items():
        for key in ALIASES.get(meaning, (meaning,)):
            table_keys.add(key)
            _check(c, key, family.accepts.get(key, accepted))
    # A key that the table lacks may still change the routing: only values that mean "not used" are
    # accepted, unless the family lists others.
    for key, value in c.stated.items():
        if not isinstance(key, str):
            continue
        about = _ROUTING_WORD.search(key) and not _NO_ROUTING.search(key)
        unread = key not in table_keys and key not in c.read
        if about and unread and not isinstance(value, Mapping):
            _check(c, key, family.accepts.get(key, _off(True)))


def check_expert_keys(family: Family, c: HFConfig, expert_fn: ExpertFn) -> None:
    """Rejects a stated key of the experts that the family ignores and that differs from ``expert_fn``.

    Raises:
        ValueError: a key contradicts the experts; the message names the key.
    """
    activation = getattr(expert_fn, "activation", None)
    names = tuple(hf for hf, ours in HF_ACTIVATIONS.items() if ours == activation)
    if activation == "swish":  # x * sigmoid(alpha * x), which configs also call SiLU
        names = ("silu", "swish", "swigluoai", "swiglu_oai")
    for key in ALIASES["activation"]:
        _check(c, key, names)
    for key in ("swiglu_limit", "swiglu_alpha", "swiglu_limits", "swiglu_limits_shared"):
        _check(c, key, _off(True))
    for key in ("mlp_gate_softcap", "mlp_up_softcap", "moe_token_dropout"):
        _check(c, key, _off(True))
    _check(c, "shared_expert_combination_strategy", ("sum",))


def _off(holds: bool) -> tuple[Any, ...]:
    """Returns the values that mean "not used" if ``holds``, else no values."""
    return (None, False, 0, 0.0, "") if holds else ()


def _check(c: HFConfig, key: str, accepted: tuple[Any, ...]) -> None:
    if key in c.read or c.stated.get(key) is None:
        return
    value = c.value(key)
    if value is None or any(_same(value, a) for a in accepted):
        return
    # The message lists the "off" values only if nothing else is accepted.
    does = [a for a in accepted if a not in _off(True)] or list(accepted[:1])
    wanted = "no such setting" if does == [None] or not does else " or ".join(map(in_words, does))
    raise ValueError(
        f"config of {c.model_type!r}, {key}: expected {wanted}, since models of this type do not read "
        f"the key, got {in_words(value)}. If the weights were trained with this value, this library "
        "has no rule for them; if not, correct config.json."
    )


def _same(value: Any, accepted: Any) -> bool:
    """Compares numbers up to a relative 1e-6, and a bool with a bool only: 1 is not True."""
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    if isinstance(value, (int, float)) and isinstance(accepted, (int, float)):
        return math.isclose(value, accepted, rel_tol=1e-6)
    return type(value) is type(accepted) and value == accepted


def _scoring(router: Router) -> Scoring:
    """Returns the rule's ``Scoring``, or an equivalent one for a rule that has none."""
    if isinstance(router, JointShared):
        return Scoring(score="sigmoid", norm="sum", scale=router.scale)
    if isinstance(router, ProductKeys):
        return Scoring(score="identity", post="softmax")
    return getattr(router, "scoring", Scoring())


def _score_names(scoring: Scoring, family: Family) -> tuple[str, ...]:
    name = scoring.post if scoring.score == "identity" else scoring.score
    # Some configs name the whole method: sigmoid scores, selected with a bias.
    biased = ("noaux_tc",) if name == "sigmoid" and family.bias == "required" else ()
    return (name, *biased)


def _method(scoring: Scoring, family: Family) -> str:
    if family.bias == "required":
        return "noaux_tc"
    if scoring.num_groups == 1:
        return "greedy"
    return "group_limited_greedy" if scoring.group_score == "max" else "none"
