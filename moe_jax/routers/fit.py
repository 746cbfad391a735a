"""The two ends of every calibration: which tokens it may see, and what it records."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from moe_jax.checks import check_array
from moe_jax.routers import registry
from moe_jax.routing.budget import Fit, record_fit
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import check_token_mask
from moe_jax.types import Array, Params


def real_tokens(token_mask: Array | None, x: Array) -> np.ndarray:
    """Returns bool[T] on the host; refuses calibration data without a finite real token."""
    check_array("x", x, "T D", fix="Pass calibration data flattened to [tokens, d_model].")
    mask = np.ones(x.shape[0], bool)
    if token_mask is not None:
        check_token_mask(token_mask, x.shape[0])
        mask = np.asarray(token_mask)
    rows = np.asarray(x).astype(np.float32)[mask]
    if not mask.any():
        raise ValueError(
            "token_mask: expected at least one real token, got only padding. "
            "Calibrate on real tokens; True in the mask marks them."
        )
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=-1)).sum())
        raise ValueError(
            f"x: expected finite calibration data, got {bad} of {len(rows)} tokens with NaN or "
            "inf. Drop those tokens, or mask them with token_mask."
        )
    return mask


def finish_fit(
    router: Any,
    params: Params,
    state: Any,
    x: Array,
    *,
    target_mean_k: float,
    token_mask: Array | None,
    context: Context | None,
) -> Any:
    """Routes the calibration data with the fitted state and records what was reached."""
    routing = jax.jit(type(router).__call__, static_argnums=0)(
        router, params, state, x, token_mask=token_mask, context=context
    )
    mask = np.ones(x.shape[0], bool) if token_mask is None else np.asarray(token_mask)
    counts = np.asarray(routing.num_experts_per_token)[mask]
    fit: Fit = record_fit(
        data=np.asarray(x)[mask],
        router_parts=(
            registry.identity(router),
            *[np.asarray(p) for p in jax.tree.leaves(params)],
        ),
        target_mean_k=target_mean_k,
        counts=counts,
        max_k=router.max_k,
    )
    return dataclasses.replace(state, fit=fit)
