"""The guide's words to the library's, and the guide's advice as presets."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe_jax.config.kinds import ESTIMATOR_WORDS
from moe_jax.config.settings import Config, PerformanceConfig, RouterConfig
from moe_jax.routers import DynamicK, ExpertThreshold, Router
from moe_jax.routing.gate import Gate

# Step of the loss-free bias that "load_balancing": true runs; DeepSeek-V3's (arXiv:2412.19437).
_BALANCE_RATE = 1e-3


def build_router(config: Config) -> Router:
    """The router that a configuration describes. The only place that maps the guide's words.

    ``routing_strategy`` ``top_k`` gives ``DynamicK``: each token's difficulty decides how many of
    its best experts it uses. ``threshold`` gives ``ExpertThreshold``: each expert takes the tokens
    that score above its own calibrated threshold, aimed at the mean of min and max experts.

    ``complexity_estimator`` is mapped to the library's difficulty estimators:

    ======================= =======================================================
    the guide               the library
    ======================= =======================================================
    gradient_norm           ``activation_norm``
    perplexity_proxy        ``surprisal``
    threshold               ``large_activation_share``
    attention_entropy       ``attention_entropy``
    any other               the registered estimator of this name
    ======================= =======================================================

    The guide's ``gradient_norm`` stands for a norm of the activations: a request for inference has
    no gradients to take the norm of. The true per-token gradient norm is
    ``DynamicK(difficulty="gradient_norm")``, for callers that pass gradients.

    ``load_balancing`` switches ``DynamicK``'s bias controller, which acts in ``update`` and so
    never while serving. ``ExpertThreshold`` balances by its thresholds, with the switch or without.

    Example:
        >>> from moe_jax.config import load_config
        >>> router = build_router(load_config(env={}, max_experts=3))
        >>> router.min_k, router.max_k, router.difficulty
        (1, 3, 'activation_norm')
    """
    words = config.router_config
    gate = Gate(noise=words.noise_factor)
    if words.routing_strategy == "threshold":
        return ExpertThreshold(
            num_experts=words.num_experts,
            target_k=(words.min_experts + words.max_experts) / 2,
            min_k=words.min_experts,
            max_k=words.max_experts,
            gate=gate,
        )
    return DynamicK(
        num_experts=words.num_experts,
        min_k=words.min_experts,
        max_k=words.max_experts,
        difficulty=ESTIMATOR_WORDS.get(words.complexity_estimator, words.complexity_estimator),
        gate=gate,
        balance_rate=_BALANCE_RATE if words.load_balancing else 0.0,
    )


PRESETS: Mapping[str, Config] = MappingProxyType(
    {
        "balanced": Config(router_config=RouterConfig(max_experts=3)),
        "low_latency": Config(router_config=RouterConfig(num_experts=6, max_experts=2)),
        "high_accuracy": Config(
            router_config=RouterConfig(num_experts=16, min_experts=2, max_experts=6)
        ),
        "production": Config(router_config=RouterConfig(max_experts=3), environment="production"),
        "training": Config(performance=PerformanceConfig(enable_caching=False)),
        "mixed": Config(performance=PerformanceConfig(cache_size=5000)),
    }
)
"""The guide's advice as named configurations; ``configs/<name>.json`` holds the same."""
