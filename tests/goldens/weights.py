"""Random weights that are a function of a tensor's name and shape, so that they need not be stored."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np


def draw(name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns f32[shape]: normal numbers, of norms around 1, so that a forgotten one shows."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.2
    parts = name.split(".")
    centre = 1.0 if "norm" in parts[-2:][0] and parts[-1] == "weight" else 0.0
    return (centre + scale * rng.standard_normal(tuple(shape))).astype(np.float32)
