"""The rules there are: their traits, their papers, and whose numbers they are compared with."""

from __future__ import annotations

import dataclasses
from typing import Any

from moe_jax.routers import registry
from moe_jax.routers.base import Router, Traits

# Rule: (paper or origin, what its decisions are compared with in tests/goldens). "by hand" are small
# cases written out in a test; "" is nothing beyond the contract.
_SOURCES: dict[str, tuple[str, str]] = {
    "AdaK": ("arXiv:2410.10456; PPO, arXiv:1707.06347", "by hand"),
    "BalancedAssignment": ("BASE layers, arXiv:2103.16716", "scipy's linear_sum_assignment"),
    "CapacityTopK": ("Switch, arXiv:2101.03961; NLLB, arXiv:2207.04672", "transformers; DeepSpeed"),
    "Cosine": ("XMoE, arXiv:2204.09179, as in Tutel", "the authors' formula, by hand"),
    "DepthRouter": ("Zaya (transformers)", "transformers"),
    "DynamicK": ("this library: k from a calibrated difficulty", "by hand"),
    "Elastic": ("EMoE, arXiv:2509.21892; M-MoE, arXiv:2509.26520", "by hand"),
    "ExpertChoiceRouter": ("arXiv:2202.09368", "by hand"),
    "ExpertRetrieval": ("PEER, arXiv:2407.04153; arXiv:1907.05242", "the authors' search, by hand"),
    "ExpertThreshold": ("arXiv:2603.11535", "by hand"),
    "JointShared": ("Inkling (transformers)", "transformers"),
    "MinP": ("llama.cpp issue 4470", "by hand"),
    "MixtureOfDepths": ("arXiv:2404.02258", "by hand"),
    "MoEPlusPlus": ("MoE++, arXiv:2410.07348", "the authors' code"),
    "NullExperts": ("AdaMoE, arXiv:2406.13233", "by hand"),
    "Piggyback": ("OEA, arXiv:2511.02237", "by hand"),
    "ProductKeys": ("arXiv:1907.05242, as in Doge", "transformers"),
    "RandomSecond": ("GShard, arXiv:2006.16668; ST-MoE, arXiv:2202.08906", "by hand"),
    "RandomSkip": ("a control: drops experts by chance", "by hand"),
    "ReLURouter": ("ReMoE, arXiv:2412.14711", "the authors' code"),
    "Reroute": ("SERE, arXiv:2602.07616", "by hand"),
    "SeqTopK": ("arXiv:2511.06494", "by hand"),
    "SharedBudget": ("XShare, arXiv:2602.07265", "by hand"),
    "Sinkhorn": ("S-BASE, arXiv:2202.01169", "Megatron-LM's iteration, by hand"),
    "SkipSecond": ("NAEE, arXiv:2402.14800", "the authors' formula, by hand"),
    "SparseMixer": ("arXiv:2409.12136", "transformers"),
    "TokenTable": ("hash layers, arXiv:2106.04426, as in DeepSeek-V4", "transformers"),
    "TopAny": ("DynMoE, arXiv:2405.14297", "the authors' code"),
    "TopK": ("arXiv:1701.06538", "transformers; Megatron-LM"),
    "TopP": ("arXiv:2403.07652; steered as DTop-p, arXiv:2512.13996", "the authors' code"),
    "ZeroExperts": ("LongCat-Flash, arXiv:2509.01322", "transformers"),
}

# Values for fields without a default, of a rule that serves as an example.
_EXAMPLE: dict[str, Any] = {
    "num_experts": 8,
    "k": 2,
    "min_k": 1,
    "max_k": 3,
    "mean_k": 1.5,
    "target_k": 2.0,
    "hidden_size": 8,
    "num_shared": 1,
    "num_zero_experts": 4,
    "num_null_experts": 4,
    "vocab_size": 256,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """A row of the catalogue.

    Attributes:
        name: of the class.
        traits: of the example.
        calibrated: whether ``fit`` holds it to a mean number of experts.
        source: paper or origin.
        golden: whose numbers its decisions are compared with.
        summary: first line of its docstring.
        module: where it is defined.
        example: a rule for a few experts.
    """

    name: str
    traits: Traits
    calibrated: bool
    source: str
    golden: str
    summary: str
    module: str
    example: Router


def catalog() -> dict[str, CatalogEntry]:
    """Returns every rule by name: the library's, those of single models, and yours that are imported.

    Example:
        >>> entry = catalog()["TopP"]
        >>> entry.traits.batch_invariant, entry.calibrated
        (True, True)
    """
    rules = {name: registry.rule_class(name) for name in registry.known_kinds()}
    return {name: entry_of(rule) for name, rule in rules.items()}


def entry_of(rule: type[Router] | Router) -> CatalogEntry:
    """Returns the row of one rule; a class needs usual values alone, see ``example_rule``."""
    cls = rule if isinstance(rule, type) else type(rule)
    example = example_rule(rule) if isinstance(rule, type) else rule
    source, golden = _SOURCES.get(cls.__name__, ("", ""))
    return CatalogEntry(
        name=cls.__name__,
        traits=example.traits,
        calibrated=cls.calibrates(),
        source=source,
        golden=golden,
        summary=(cls.__doc__ or "").strip().split("\n")[0],
        module=cls.__module__,
        example=example,
    )


def example_rule(cls: type[Any], **values: Any) -> Router:
    """Builds a rule of this class for 8 experts, with usual values for fields without a default.

    Args:
        cls: the class.
        **values: values instead of the usual ones.

    Raises:
        TypeError: the class is no rule, or has another field without a default.

    Example:
        >>> import moe_jax
        >>> example_rule(moe_jax.TopK)
        TopK(num_experts=8, k=2)
    """
    if not issubclass(cls, Router) or not dataclasses.is_dataclass(cls):
        raise TypeError(
            f"rule: expected a class of rules, got {cls.__name__}. Derive it from "
            "moe_jax.routers.TokenChoice and decorate it with "
            "@dataclasses.dataclass(frozen=True, kw_only=True)."
        )
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    usual = {**_EXAMPLE, **values}
    if cls.__name__ == "ProductKeys":  # a square number
        usual["num_experts"] = 9
    other = [name for name in needed if name not in usual]
    if other:
        raise TypeError(
            f"rule: expected defaults for {', '.join(other)} of {cls.__name__}, got none. Pass a rule "
            f"instead of its class: {cls.__name__}(num_experts=8, ...)."
        )
    return cls(**{**{name: usual[name] for name in needed}, **values})
