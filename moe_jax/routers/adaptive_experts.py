"""DynMoE's adding and removing of experts: between training steps, from what tokens used."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_array, check_instance
from moe_jax.routers.top_any import TopAny
from moe_jax.types import Array, Params, Routing, pytree


@pytree
class ExpertRecord:
    """What the steps since the last change used."""

    tokens_per_expert: Array  # f32[E]
    unrouted: Array  # f32[D]: sum of the tokens that used no expert


def empty_record(num_experts: int, d_model: int) -> ExpertRecord:
    """Returns the record before the first step."""
    return ExpertRecord(
        tokens_per_expert=jnp.zeros((num_experts,), jnp.float32),
        unrouted=jnp.zeros((d_model,), jnp.float32),
    )


def record_experts(record: ExpertRecord, routing: Routing, x: Array) -> ExpertRecord:
    """Returns the record with one more batch; works under ``jit``.

    Records of devices or micro-batches add up: sum their fields. Tokens with NaN or inf, which use no
    expert either, do not count as unrouted: their sum would leave an expert's column without numbers.

    Args:
        record: of the steps before.
        routing: of a ``TopAny`` with ``min_k=0``.
        x: float[T, D], the tokens that were routed.
    """
    check_array(
        "x", x, "T D", sizes={"T": routing.token_mask.shape[0]}, fix="Pass what was routed."
    )
    empty = routing.token_mask & (routing.num_experts_per_token == 0)
    wide = x.astype(jnp.float32)
    empty = empty & jnp.isfinite(wide).all(axis=1)
    lost = jnp.where(empty[:, None], wide, 0.0).sum(axis=0)
    return ExpertRecord(
        tokens_per_expert=record.tokens_per_expert
        + routing.expert_mask.sum(axis=0, dtype=jnp.float32),
        unrouted=record.unrouted + lost,
    )


def adapt_experts(router: TopAny, params: Params, record: ExpertRecord) -> tuple[TopAny, Params]:
    """Removes experts that no token used, and adds one for the tokens that used none.

    Algorithm 1 of DynMoE (Guo et al. 2024, arXiv:2405.14297), in the order of the authors' code:
    first every expert without tokens is removed; then, if some tokens used no expert, the first
    removed expert returns, with the direction of these tokens' sum as its column of the kernel and
    threshold 0.

    Removed experts are ``gate.disabled_experts``. The rule has places for ``num_experts``; disable some
    at the start to leave room. The parameters of experts stay: one that returns goes on with its own. A
    changed rule compiles again, so call this every few hundred steps, on the host, and start a new
    record.

    Args:
        router: a top-any rule with ``min_k=0``. With 1 every token uses an expert.
        params: the router's parameters.
        record: since the last change; of all devices.

    Returns:
        The rule and the parameters to go on with.

    Raises:
        ValueError: ``min_k`` is not 0, or the record is empty.

    Example:
        >>> import jax
        >>> router = TopAny(num_experts=2, min_k=0)
        >>> params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 0.1]]), "thresholds": jnp.full(2, 0.5)}
        >>> x = jnp.array([[1.0, 0.0], [-2.0, 0.0]])  # the second token is no expert's
        >>> routing = router(params, router.init_state(), x)
        >>> record = record_experts(empty_record(2, 2), routing, x)
        >>> router, params = adapt_experts(router, params, record)
        >>> params["kernel"].tolist(), router.gate.disabled_experts
        ([[1.0, -1.0], [0.0, 0.0]], ())
    """
    check_instance("router", router, TopAny, fix="Other rules have no thresholds.")
    used = np.asarray(record.tokens_per_expert)
    lost = np.asarray(record.unrouted, np.float32)
    if router.min_k != 0:
        raise ValueError(
            f"router: expected min_k=0, got {router!r}. Otherwise every token uses an expert, and "
            "nothing says where one is missing."
        )
    length = float(np.linalg.norm(lost))
    if not used.any() and not length:
        raise ValueError(
            "record: expected tokens of at least one step, got none. Pass what record_experts returned."
        )
    off = set(router.gate.disabled_experts) | {int(e) for e in np.flatnonzero(used == 0)}
    if length and off:
        new = min(off)
        off.remove(new)
        params = {
            **params,
            "kernel": params["kernel"].at[:, new].set(jnp.asarray(lost / length)),
            "thresholds": params["thresholds"].at[new].set(0.0),
        }
    gate = dataclasses.replace(router.gate, disabled_experts=tuple(sorted(off)))
    return dataclasses.replace(router, gate=gate), params
