"""Per-token difficulty: raw scores that say how much compute a token deserves.

An estimator is any function ``(x float[T, D], context) -> f32[T]``, larger meaning harder. Its scale
does not matter: ``budget.calibrated_difficulty`` maps raw scores to [0, 1] by the quantiles that were
seen at calibration. (The guide calls this a complexity estimator.)

``context`` is a mapping of what the model can offer beyond x. ``CONTEXT_KEYS`` lists the keys that the
library reads; the router adds ``"router_logits"`` itself, the rest comes from the caller. A key that
nothing reads is refused, since it is probably misspelt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moe_jax.checks import check_array, check_instance
from moe_jax.routing.numerics import entropy, entropy_of_log
from moe_jax.types import Array

Context = Mapping[str, Array]
Estimator = Callable[[Array, Context], Array]

# Slices of x that one loop adds up on a CPU. With 12 of them instead of 24 it took 1.1 times as long
# (4096 x 768, float32). Other dtypes are converted first: if more than 15 slices need that, XLA
# converts the whole of x and writes it out.
_SLICES = 24
_CONVERTED_SLICES = 12
_LANES = 16  # float32 values of the widest vector register
_MOST_COLUMNS_IN_TURN = 128  # of router probabilities; the program grows with each
_FEWEST_COLUMNS = 64  # of x, below which the sum is not split

# What the estimators below and the rules of single models read, with the shape of each.
CONTEXT_KEYS: dict[str, str] = {
    "router_logits": "f32[T, E]; the router adds it",
    "gradients": "float[T, D], dLoss/dx: gradient_norm",
    "attention": "float[T, S] or [H, T, S], rows sum to 1: attention_entropy",
    "attention_mask": "bool[T, S], visible keys, optional: attention_entropy",
    "logits": "float[T, V], the model's own prediction: surprisal, prediction_entropy",
    "targets": "int[T], the tokens that came: surprisal",
    "token_ids": "int[T]: the rule TokenTable",
    "router_states": "float[T, H], of the MoE layer before: the rule DepthRouter",
    "logits_before": "float[T, E + Z], of the MoE layer before: the rule MoEPlusPlus",
}


def activation_norm(x: Array, context: Context) -> Array:
    """f32[T]: root mean square of each token's activations.

    The production guide's "gradient_norm" at inference, where gradients do not exist. During training
    see ``gradient_norm``.
    """
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean(axis=-1))


def large_activation_share(x: Array, context: Context) -> Array:
    """f32[T]: share of a token's activations that exceed the batch-independent bound 1.

    (The guide's "threshold" estimator.) Suits normalised activations, as after RMSNorm. NaN exceeds
    nothing; it counts as one of the D.
    """
    if x.shape[-1] < _FEWEST_COLUMNS:
        return _large_share(x)
    logits = context.get("router_logits")
    if logits is None:
        return jax.lax.platform_dependent(x, cpu=_large_share_in_slices, default=_large_share)
    return jax.lax.platform_dependent(
        x,
        logits,
        cpu=lambda x, logits: _large_share_in_slices(x, _one_after(logits)),
        default=lambda x, logits: _large_share(x),
    )


def _is_large(x: Array, bound: Array | float = 1.0) -> Array:
    return jnp.abs(x.astype(jnp.float32)) > bound


def _large_share(x: Array) -> Array:
    return _is_large(x).mean(axis=-1, dtype=jnp.float32)


def _one_after(logits: Array) -> Array:
    """f32[T, 1] of ones that depend on the logits f32[T, E].

    XLA for CPU may run operations that do not depend on each other at the same time. Beside the loop
    of ``_large_share_in_slices`` the router's product often ran on one core only, in twice the time.
    """
    bits = jax.lax.bitcast_convert_type(logits[:, :1].astype(jnp.float32), jnp.int32)
    # Never true, whatever the logits are, but XLA does not know that.
    return jnp.where((bits | 1) == 0, 2.0, 1.0)


def _large_share_in_slices(x: Array, bound: Array | float = 1.0) -> Array:
    """``large_activation_share`` for CPUs: the same values, without an array as large as x.

    XLA for CPU hands a sum over the last axis to a library that has no comparisons, so it first writes
    the results of all comparisons to memory. Comparisons and the sum of neighbouring slices become one
    loop of vector instructions instead. A product with ones sums the remaining columns, because XLA
    would merge a second sum with the first. Counts up to 2^24 are exact in float32, in any order.
    """
    width = x.shape[-1]
    slices = _SLICES if x.dtype == jnp.float32 else _CONVERTED_SLICES
    columns = -(-width // (slices * _LANES)) * _LANES
    rest = width % columns

    def ones(part: Array) -> Array:
        return jnp.where(_is_large(part, bound), 1.0, 0.0)

    partial = functools.reduce(
        jnp.add, [ones(x[..., i : i + columns]) for i in range(0, width - rest, columns)]
    )
    counts = partial @ jnp.ones((columns,), jnp.float32)
    if rest:
        counts = counts + ones(x[..., width - rest :]) @ jnp.ones((rest,), jnp.float32)
    return counts / width


def gradient_norm(x: Array, context: Context) -> Array:
    """f32[T]: norm of the loss gradient at each token, from ``context["gradients"]`` [T, D]."""
    gradients = _need(
        context, "gradients", "gradient_norm", "the gradient of the loss at x, [T, D]"
    )
    return jnp.linalg.norm(gradients.astype(jnp.float32), axis=-1)


def router_entropy(x: Array, context: Context) -> Array:
    """f32[T]: entropy of softmax(router logits) / log E, in [0, 1]."""
    logits = _need(context, "router_logits", "router_entropy", "f32[T, E]")
    return entropy_of_log(jax.nn.log_softmax(logits, axis=-1)) / _log_size(logits)


def router_margin(x: Array, context: Context) -> Array:
    """f32[T]: 1 - (p1 - p2), where p1 and p2 are the two largest router probabilities."""
    logits = _need(context, "router_logits", "router_margin", "f32[T, E]")
    if logits.shape[-1] < 2:
        return jnp.zeros(logits.shape[:-1], jnp.float32)
    p = jax.nn.softmax(logits, axis=-1)
    if logits.shape[-1] > _MOST_COLUMNS_IN_TURN:
        return _margin(p)
    return jax.lax.platform_dependent(p, cpu=_margin_in_turn, default=_margin)


def _margin(p: Array) -> Array:
    # Two maxima, because XLA sorts whole rows for the two largest of each. Of equal maxima only one is
    # masked, so the second is then the same and the margin 0.
    best = jnp.argmax(p, axis=-1)
    others = jnp.where(jnp.arange(p.shape[-1])[None, :] == best[:, None], -1.0, p)
    return 1.0 - (p.max(axis=-1) - others.max(axis=-1))


def _margin_in_turn(p: Array) -> Array:
    """``_margin`` for CPUs: the same values in a ninth of the time (4096 x 64).

    XLA for CPU searches for a row's maximum and its place one value at a time. Here each column in turn
    updates the two largest values of many tokens, by vector instructions.
    """
    first, second = jnp.maximum(p[:, 0], p[:, 1]), jnp.minimum(p[:, 0], p[:, 1])
    for column in range(2, p.shape[-1]):
        second = jnp.maximum(second, jnp.minimum(first, p[:, column]))
        first = jnp.maximum(first, p[:, column])
    return 1.0 - (first - second)


def attention_entropy(x: Array, context: Context) -> Array:
    """f32[T]: entropy of real attention weights / log(visible keys), averaged over heads.

    Takes ``context["attention"]`` of [T, S] or [H, T, S]. Keys hidden by
    ``context["attention_mask"]`` [T, S] count in neither part, and the remaining weights are
    rescaled to sum to 1. Without a mask, keys of weight 0 (as causal masks leave) count as hidden.
    A token that sees one key has entropy 0.
    """
    weights = _need(
        context, "attention", "attention_entropy", "attention weights [T, S] or [heads, T, S]"
    )
    weights = weights.astype(jnp.float32)
    if weights.ndim == 2:
        weights = weights[None]
    check_array(
        "attention",
        weights,
        "H T S",
        sizes={"T": x.shape[0]},
        fix="Pass attention weights [T, S] or [heads, T, S] with one row a token.",
    )
    visible = context.get("attention_mask")
    visible = weights > 0 if visible is None else jnp.broadcast_to(visible[None], weights.shape)
    weights = jnp.where(visible, weights, 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    p = weights / jnp.where(total > 0, total, 1.0)
    keys = visible.sum(axis=-1)
    most = jnp.log(jnp.maximum(keys, 2).astype(jnp.float32))
    return jnp.where(keys > 1, entropy(p) / most, 0.0).mean(axis=0)


def surprisal(x: Array, context: Context) -> Array:
    """f32[T]: -log p(target) / log V, from the model's own ``logits`` [T, V] and ``targets`` [T]."""
    logits = _need(context, "logits", "surprisal", "the model's logits [T, V]")
    targets = _need(context, "targets", "surprisal", "the tokens that came, int[T]")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_p_target = jnp.take_along_axis(log_p, targets[:, None], axis=-1)[:, 0]
    return -log_p_target / _log_size(logits)


def prediction_entropy(x: Array, context: Context) -> Array:
    """f32[T]: entropy of the model's own prediction / log V, from ``logits`` [T, V]; no targets."""
    logits = _need(context, "logits", "prediction_entropy", "the model's logits [T, V]")
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return entropy_of_log(log_p) / _log_size(logits)


ESTIMATORS: dict[str, Estimator] = {
    f.__name__: f
    for f in (
        activation_norm,
        attention_entropy,
        gradient_norm,
        large_activation_share,
        prediction_entropy,
        router_entropy,
        router_margin,
        surprisal,
    )
}


_BUILT_IN = frozenset(ESTIMATORS.values())


def register_estimator(name: str, estimator: Estimator) -> None:
    """Makes ``estimator`` available by name, so that routers using it can be written to JSON.

    Raises:
        TypeError: the name is not text, or the estimator is not a function.
        ValueError: the name is taken by another function.
    """
    check_instance("estimator name", name, str, fix="Give the name that routers refer to it by.")
    if not callable(estimator):
        raise TypeError(
            f"estimator: expected a function (x, context) -> f32[T], got a "
            f"{type(estimator).__name__}. Write a function of x [T, D] and context."
        )
    # Checkpoints hold the name alone, so it may never mean another function.
    if ESTIMATORS.get(name, estimator) is not estimator:
        raise ValueError(f"estimator name: expected a free name, got {name!r}. Choose another.")
    ESTIMATORS[name] = estimator


def resolve_estimator(estimator: str | Estimator) -> Estimator:
    """Returns the function registered under a name; a function is returned unchanged.

    Raises:
        ValueError: an unknown name. The message lists the registered ones.
        TypeError: neither a name nor a function.
    """
    if callable(estimator):
        return estimator
    if not isinstance(estimator, str):
        raise TypeError(
            f"difficulty: expected a name or a function (x, context) -> f32[T], "
            f"got a {type(estimator).__name__}. Known names: {', '.join(sorted(ESTIMATORS))}."
        )
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"difficulty: expected one of {', '.join(sorted(ESTIMATORS))}, got {estimator!r}. "
            "Use one of these, or register_estimator(name, function)."
        )
    return ESTIMATORS[estimator]


def context_keys_of(estimator: str | Estimator) -> frozenset[str] | None:
    """Returns the context keys that an estimator reads beyond ``CONTEXT_KEYS``; None is any.

    The library's estimators read keys of ``CONTEXT_KEYS`` alone. Your own function may say what it
    reads, ``estimator.context_keys = ("speaker",)``; without that it may read anything.
    """
    function = resolve_estimator(estimator)
    if function in _BUILT_IN:
        return frozenset()
    declared = getattr(function, "context_keys", None)
    return None if declared is None else frozenset(declared)


def raw_difficulty(estimator: str | Estimator, x: Array, context: Context) -> Array:
    """f32[T]: runs an estimator and checks what it returns. No gradient flows through it.

    Raises:
        ValueError, TypeError: the estimator is unknown, lacks context, or returns the wrong shape.
    """
    raw = resolve_estimator(estimator)(x, context)
    check_array(
        "difficulty",
        raw,
        "T",
        sizes={"T": x.shape[0]},
        fix="An estimator returns one float a token: (x [T, D], context) -> f32[T].",
    )
    # A difficulty with a gradient would train the model to look easy.
    return jax.lax.stop_gradient(raw.astype(jnp.float32))


def _log_size(logits: Array) -> float:
    """log of the number of classes; 1 for a single class, whose entropy is 0 anyway."""
    return math.log(logits.shape[-1]) if logits.shape[-1] > 1 else 1.0


def _need(context: Context, key: str, who: str, what: str) -> Array:
    if context.get(key) is None:
        have = ", ".join(sorted(context)) or "nothing"
        raise ValueError(
            f"{who}: expected context[{key!r}] ({what}), got {have}. "
            f"Pass context={{{key!r}: ...}}, or choose an estimator that needs only x."
        )
    return context[key]
