"""Admission of requests: security levels, checks, rate limits, blocks, identity. No JAX."""

from moe_jax.serving.admission.client_blocks import ClientBlocks
from moe_jax.serving.admission.identity import Keys, TrustedProxies, client_id, parse_address
from moe_jax.serving.admission.levels import LEVELS, Level, level_for
from moe_jax.serving.admission.limiter import RateLimiter
from moe_jax.serving.admission.validation import (
    DTYPES,
    Checked,
    Limits,
    check_array,
    check_layers,
    check_mask,
    check_shape,
    check_values,
)

__all__ = [
    "DTYPES",
    "LEVELS",
    "Checked",
    "ClientBlocks",
    "Keys",
    "Level",
    "Limits",
    "RateLimiter",
    "TrustedProxies",
    "check_array",
    "check_layers",
    "check_mask",
    "check_shape",
    "check_values",
    "client_id",
    "level_for",
    "parse_address",
]
