"""Who may send what: levels, checks of requests, limits, identity. Knows numpy, not JAX."""

from moe_jax.serving.admission.blocks import Blocks
from moe_jax.serving.admission.identity import Keys, client_id, peer_address
from moe_jax.serving.admission.levels import LEVELS, Level, level_for
from moe_jax.serving.admission.limiter import RateLimiter
from moe_jax.serving.admission.validation import (
    DTYPES,
    Checked,
    Limits,
    check_array,
    check_mask,
    check_shape,
    check_values,
)

__all__ = [
    "DTYPES",
    "LEVELS",
    "Blocks",
    "Checked",
    "Keys",
    "Level",
    "Limits",
    "RateLimiter",
    "check_array",
    "check_mask",
    "check_shape",
    "check_values",
    "client_id",
    "level_for",
    "peer_address",
]
