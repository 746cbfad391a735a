"""The optimiser of the small language model, in any tree that names its parts alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import optax

from moe_jax.lab.lm_config import LMConfig

PARTS = ("router", "experts", "rest")


def part_of(path: Sequence[Any]) -> str:
    """Returns the part of ``PARTS`` that the parameter at this tree path belongs to.

    Takes paths of ``jax.tree_util`` in trees of dicts and in those of Flax modules.

    Example:
        >>> tree = {"moe": {"router": {"kernel": 1.0}, "experts": {"up": 2.0}}, "qkv": 3.0}
        >>> jax.tree_util.tree_map_with_path(lambda path, leaf: part_of(path), tree)
        {'moe': {'experts': {'up': 'experts'}, 'router': {'kernel': 'router'}}, 'qkv': 'rest'}
    """
    names = [_name(step) for step in path]
    return next((part for part in ("router", "experts") if part in names), "rest")


def _name(step: Any) -> str:
    return str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", step))))


def optimizer(config: LMConfig, steps: int) -> optax.GradientTransformation:
    """Returns AdamW with warm-up and cosine, behind clipped gradients.

    Routers and experts have a rate and a weight decay of their own (``optax.partition``). Works on
    the trees of ``moe_jax.lab.language_model`` as well as for ``nnx.Optimizer(decoder, ...)``.
    """
    warmup = max(1, round(config.warmup * steps))
    factors = {"router": config.router_rate, "experts": config.expert_rate, "rest": 1.0}
    decays = {"router": config.router_decay, "experts": config.expert_decay, "rest": None}

    def adamw(part: str) -> optax.GradientTransformation:
        peak = config.learning_rate * factors[part]
        decay = config.weight_decay if decays[part] is None else decays[part]
        return optax.adamw(
            optax.warmup_cosine_decay_schedule(
                0.0, peak, warmup, max(steps, warmup + 1), peak / 10
            ),
            b1=0.9,
            b2=0.98,
            weight_decay=decay,
            mask=_decayed,
        )

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: part_of(path), params)

    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.partition({part: adamw(part) for part in PARTS}, labels),
    )


def _decayed(params: Any) -> Any:
    # By name: stacked layers give the scales of norms a second axis.
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: not any(_name(step).endswith("norm") for step in path), params
    )
