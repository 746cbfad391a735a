"""Auxiliary losses. All over real tokens only; padding counts in nothing.

Pass ``axis_name`` inside ``shard_map`` for the loss of the whole batch, the same on every device:
everything is summed over the shards of these axes, so the result needs no further average, and the
gradient is that of the whole batch. Outside ``shard_map``, where arrays are whole, leave it out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.checks import NamedArguments, check_count, check_finite, check_instance, check_number
from moe_jax.routing.numerics import entropy, unit_vectors
from moe_jax.types import Array, ExpertChoice, Routing

AnyRouting = Routing | ExpertChoice
Axes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights(NamedArguments):
    """Coefficients of the auxiliary losses; 0 leaves a term out of the computation altogether.

    Usual values: load balancing 1e-2 (Switch), router z 1e-3 (ST-MoE), entropy 1e-4 (top-p).

    Raises:
        TypeError, ValueError: a coefficient is not a finite Python number.

    Example:
        >>> LossWeights(entropy=1e-4)
        LossWeights(load_balancing=0.01, router_z=0.001, entropy=0.0001, importance=0.0)
    """

    load_balancing: float = 1e-2
    router_z: float = 1e-3
    entropy: float = 0.0
    importance: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_finite(field.name, getattr(self, field.name))


def _check_routing(routing: AnyRouting) -> None:
    check_instance(
        "routing",
        routing,
        (Routing, ExpertChoice),
        fix="Pass what the router returned; of what moe_layer reports that is aux.routing.",
    )


def _real(routing: AnyRouting) -> tuple[Array, Array]:
    mask = routing.token_mask.astype(jnp.float32)
    return mask, mask.sum()


def _sum(value: Array, axis_name: Axes) -> Array:
    return value if axis_name is None else jax.lax.psum(value, axis_name)


def mean_over_tokens(values: Array, routing: AnyRouting, axis_name: Axes = None) -> Array:
    """f32[]: the mean of ``values`` f32[T] over real tokens."""
    mask, count = _real(routing)
    # Sum and count are added up separately: shards hold different numbers of real tokens.
    total = _sum(jnp.where(mask > 0, values, 0.0).sum(), axis_name)
    return total / jnp.maximum(_sum(count, axis_name), 1.0)


def load_balancing_loss(
    routing: AnyRouting,
    *,
    sequence_length: int | None = None,
    axis_name: Axes = None,
    earlier_counts: Array | None = None,
    expert_cost: tuple[float, ...] | None = None,
) -> Array:
    """f32[]: ``E / (T^2 * mean_k) * sum_e (sum_t p[t, e]) * (sum_t used[t, e])``; 1 at balance.

    Switch Transformer, arXiv:2101.03961 eq. 4-6, with the *realised* mean number of experts in the
    denominator, so that the value of a balanced load is 1 for fixed and dynamic k alike. (At balance
    Levanter has 0.5, Hugging Face k.)

    Args:
        routing: of T tokens.
        sequence_length: number of consecutive tokens in a sequence. The loss is taken per sequence
            and averaged (DeepSeek-V3's sequence-wise loss). Must divide T. None takes the batch as
            one sequence.
        axis_name: mapped axes whose shards count as one batch (the global-batch loss of
            arXiv:2501.11873), or over whose sequences the mean is taken.
        earlier_counts: f32[E], how often each expert was used in earlier micro-batches of the same
            step: the global-batch loss with gradient accumulation. They count beside this batch's in
            the shares of the load; probabilities are this batch's alone, as only they have gradients.
            Pass the sum of ``stats.tokens_per_expert``. Not with ``sequence_length``.
        expert_cost: relative cost of each expert, such as its width: the loss weighs each expert by
            its share of the mean cost, so that large experts are used less (HMoE, arXiv:2408.10681).

    Raises:
        ValueError: ``sequence_length`` does not divide T, or comes with ``earlier_counts``; costs that
            are not E positive numbers.
    """
    _check_routing(routing)
    if earlier_counts is not None and sequence_length is not None:
        raise ValueError(
            "earlier_counts: expected none together with sequence_length, got both. A sequence is "
            "balanced by itself; leave one of them out."
        )
    if sequence_length is not None:
        check_count(
            "sequence_length", sequence_length, fix="Pass the padded length of one sequence."
        )
    probs, used = routing.router_probs, routing.expert_mask.astype(jnp.float32)
    tokens, experts = probs.shape
    mask = routing.token_mask.astype(jnp.float32)
    length = tokens if sequence_length is None else sequence_length
    if tokens % length:
        raise ValueError(
            f"sequence_length: expected a divisor of T={tokens}, got {sequence_length}. "
            "Pass the padded length of one sequence."
        )
    shape = (tokens // length, length, experts)
    within = axis_name if sequence_length is None else None  # a sequence is whole on its shard
    # The counts carry no gradient. It flows through the summed probabilities alone, as in Switch.
    p = jnp.where(routing.token_mask[:, None], probs, 0.0).reshape(shape).sum(axis=1)
    p, counts = _sum(p, within), _sum(used.reshape(shape).sum(axis=1), within)
    real = _sum(mask.reshape(shape[:2]).sum(axis=1), within)
    if earlier_counts is not None:
        counts = counts + jax.lax.stop_gradient(earlier_counts.astype(jnp.float32))[None, :]
    if expert_cost is not None:
        p = p * _relative_costs(expert_cost, experts)[None, :]
    # The mean number of experts per token times T is the number of assignments.
    assigned = counts.sum(axis=1)
    scale = experts / jnp.maximum(real, 1.0)
    value = scale * (p * counts).sum(axis=1) / jnp.where(assigned > 0, assigned, 1.0)
    # A sequence of padding alone has no loss, and must not lower the mean over sequences.
    some = (real > 0).astype(jnp.float32)
    among = None if sequence_length is None else axis_name
    return _sum((value * some).sum(), among) / jnp.maximum(_sum(some.sum(), among), 1.0)


def _relative_costs(expert_cost: tuple[float, ...], experts: int) -> Array:
    """f32[E]: costs divided by their mean."""
    costs = np.asarray(expert_cost, np.float32)
    if costs.shape != (experts,) or not (np.isfinite(costs).all() and (costs > 0).all()):
        raise ValueError(
            f"expert_cost: expected {experts} positive numbers, one an expert, got {expert_cost}. Pass "
            "the widths of the experts, for example."
        )
    return jnp.asarray(costs / costs.mean())


def orthogonality_loss(kernel: Array, *, disabled: tuple[int, ...] = ()) -> Array:
    """f32[]: ``|W'W - 1|^2`` (Frobenius) over columns at unit length; 0 where they are orthogonal.

    The router orthogonalisation of ERNIE 4.5 (Baidu 2025, technical report): it keeps the
    directions of different experts apart. Add ``coefficient * orthogonality_loss(params["kernel"])`` to
    the loss; with more experts than dimensions it cannot reach 0. ``TopAny`` has the same term without
    the square in its ``regularization``.

    Args:
        kernel: f32[D, E], the router's.
        disabled: experts that count for nothing.

    Example:
        >>> float(orthogonality_loss(jnp.array([[2.0, 0.0], [0.0, 3.0]])))
        0.0
    """
    unit = unit_vectors(kernel.astype(jnp.float32), axis=0)
    on = np.ones(kernel.shape[1], np.float32)
    on[list(disabled)] = 0.0
    similar = (unit.T @ unit - jnp.eye(kernel.shape[1])) * np.outer(on, on)
    return jnp.square(similar).sum()


def router_z_loss(routing: AnyRouting, *, axis_name: Axes = None) -> Array:
    """f32[]: mean of ``logsumexp(logits)^2`` (ST-MoE, arXiv:2202.08906 eq. 5)."""
    _check_routing(routing)
    z = jax.nn.logsumexp(routing.router_logits, axis=-1)
    return mean_over_tokens(jnp.square(z), routing, axis_name)


def entropy_loss(routing: AnyRouting, *, axis_name: Axes = None) -> Array:
    """f32[]: mean entropy of the router probabilities, in nats.

    The "dynamic loss" of top-p routing (arXiv:2403.07652), which keeps p from spreading out.
    """
    _check_routing(routing)
    return mean_over_tokens(entropy(routing.router_probs), routing, axis_name)


def importance_loss(routing: AnyRouting, *, axis_name: Axes = None) -> Array:
    """f32[]: squared coefficient of variation of each expert's summed probability; 0 at balance.

    Shazeer et al. 2017, arXiv:1701.06538 eq. 6-7.
    """
    _check_routing(routing)
    masked = jnp.where(routing.token_mask[:, None], routing.router_probs, 0.0)
    # The coefficient of variation is not linear, so the sums of all shards come before it.
    importance = _sum(masked.sum(axis=0), axis_name)
    mean = importance.mean()
    return jnp.square(importance - mean).mean() / jnp.maximum(jnp.square(mean), 1e-20)


def relu_l1_loss(routing: AnyRouting, *, target_k: float, axis_name: Axes = None) -> Array:
    """f32[]: ``E / (target_k * T^2) * sum_e (sum_t relu(z[t, e])) * (sum_t [z[t, e] > 0])``.

    The load-balanced L1 loss of ReMoE (arXiv:2412.14711): busier experts are pushed down
    harder. Unlike ``load_balancing_loss`` it sums weights, not probabilities, and divides by the
    wanted k, not by the realised one, so a smaller mean k gives a smaller loss. It reads every
    positive logit, including those that ``max_k`` cut off.
    """
    _check_routing(routing)
    check_number("target_k", target_k)
    if not target_k > 0:
        raise ValueError(
            f"target_k: expected experts per token above 0, got {target_k}. It is the wanted mean."
        )
    on = jnp.where(routing.token_mask[:, None], jax.nn.relu(routing.router_logits), 0.0)
    experts = on.shape[1]
    weight = _sum(on.sum(axis=0), axis_name)
    load = _sum((on > 0).sum(axis=0, dtype=jnp.float32), axis_name)
    tokens = jnp.maximum(_sum(_real(routing)[1], axis_name), 1.0)
    return experts / (target_k * jnp.square(tokens)) * (weight * load).sum()


def aux_loss(
    routing: AnyRouting,
    weights: LossWeights,
    *,
    sequence_length: int | None = None,
    axis_name: Axes = None,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum f32[], and each term before weighting, of the terms with a weight.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> routing = router(params, state, jax.random.normal(jax.random.key(1), (64, 8)))
        >>> loss, terms = aux_loss(routing, LossWeights())
        >>> sorted(terms)
        ['load_balancing', 'router_z']
    """
    _check_routing(routing)
    check_instance("weights", weights, LossWeights, fix="Write LossWeights(load_balancing=0.01).")
    terms: dict[str, Array] = {}
    # Weights are Python numbers: a term with weight 0 is not traced, so it cannot add a NaN either.
    if weights.load_balancing:
        terms["load_balancing"] = load_balancing_loss(
            routing, sequence_length=sequence_length, axis_name=axis_name
        )
    if weights.router_z:
        terms["router_z"] = router_z_loss(routing, axis_name=axis_name)
    if weights.entropy:
        terms["entropy"] = entropy_loss(routing, axis_name=axis_name)
    if weights.importance:
        terms["importance"] = importance_loss(routing, axis_name=axis_name)
    total = jnp.zeros((), jnp.float32)
    for name, value in terms.items():
        total = total + getattr(weights, name) * value
    return total, terms


def class_balancing_loss(
    probs: Array, chosen: Array, *, cost: Array, token_mask: Array, axis_name: Axes = None
) -> Array:
    """f32[]: ``sum_i cost_i f_i P_i`` over C classes of experts (MoE++, arXiv:2410.07348).

    Args:
        probs: f32[T, C]; ``P_i`` is their mean over real tokens.
        chosen: bool[T, C]; ``f_i`` is the share of real tokens that choose class i.
        cost: f32[C], the paper's eta.
        token_mask: bool[T], False for padding.
        axis_name: as in ``load_balancing_loss``.
    """

    def total(values: Array) -> Array:
        values = jnp.where(token_mask[:, None], values, 0.0).sum(axis=0)
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    tokens = jnp.maximum(total(jnp.ones((probs.shape[0], 1), jnp.float32))[0], 1.0)
    load = total(chosen.astype(jnp.float32)) / tokens
    return (cost * load * total(probs) / tokens).sum()
