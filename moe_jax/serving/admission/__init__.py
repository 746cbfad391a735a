"""Who may send what: levels, checks of requests, limits, identity. Knows numpy, not JAX."""

from moe_jax.serving.admission.levels import LEVELS, Level, level_for
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
    "Checked",
    "Level",
    "Limits",
    "check_array",
    "check_mask",
    "check_shape",
    "check_values",
    "level_for",
]
