"""Keys of a config that change the mathematics of a block and that its family does not read.

Such a key must say what the family does anyway, or the config is refused: a setting that is silently
ignored is a model that routes differently. What the family does is taken from the rule that was built
for the config, so the table below names keys, not families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from moe_jax.experts import ExpertFn
from moe_jax.interop.expert_functions import HF_ACTIVATIONS
from moe_jax.interop.family import Family
from moe_jax.interop.model_config import ALIASES, HFConfig, in_words
from moe_jax.interop.rules import CapacityTopK, JointShared, ProductKeys, ZeroExperts
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
    """Refuses routing keys that are stated, not read, and not what ``router`` does.

    Args:
        family: of the config.
        c: the config, after ``family.router(c)`` has read its keys.
        router: the rule that came out.

    Raises:
        ValueError: a key says something else than the rule does; it is named.
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
    known = set()
    for meaning, accepted in tables.items():
        for key in ALIASES.get(meaning, (meaning,)):
            known.add(key)
            _check(c, key, family.accepts.get(key, accepted))
    for key, value in c.stated.items():
        if not isinstance(key, str):
            continue
        about = _ROUTING_WORD.search(key) and not _NO_ROUTING.search(key)
        if about and key not in known and key not in c.read and not isinstance(value, Mapping):
            _check(c, key, family.accepts.get(key, _off(True)))


def check_expert_keys(family: Family, c: HFConfig, expert_fn: ExpertFn) -> None:
    """Refuses keys of the experts that are stated, not read, and not what ``expert_fn`` does.

    Raises:
        ValueError: a key says something else than the experts do; it is named.
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
    """The values that say "not used", where that is what the family does."""
    return (None, False, 0, 0.0, "") if holds else ()


def _check(c: HFConfig, key: str, accepted: tuple[Any, ...]) -> None:
    if key in c.read or c.stated.get(key) is None:
        return
    value = c.value(key)
    if value is None or any(_same(value, a) for a in accepted):
        return
    does = [a for a in accepted if a not in _off(True)] or list(accepted[:1])
    wanted = "no such setting" if does == [None] or not does else " or ".join(map(in_words, does))
    raise ValueError(
        f"config of {c.model_type!r}, {key}: expected {wanted}, since models of this type do not read "
        f"the key, got {in_words(value)}. If the weights were trained with that, this library has no "
        "rule for them; if not, correct config.json."
    )


def _same(value: Any, accepted: Any) -> bool:
    """Equality in which 1 is not true, and 2.5 is 2.5000001."""
    if isinstance(value, bool) or isinstance(accepted, bool):
        return value is accepted
    if isinstance(value, (int, float)) and isinstance(accepted, (int, float)):
        return math.isclose(value, accepted, rel_tol=1e-6)
    return type(value) is type(accepted) and value == accepted


def _scoring(router: Router) -> Scoring:
    """How the rule makes weights; for the rules without a ``Scoring``, the one that says the same."""
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
