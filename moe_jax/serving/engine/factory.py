"""The guide's four ways to build an engine."""

from __future__ import annotations

import os
from typing import Any

from moe_jax.config import PRESETS, load_config
from moe_jax.serving.engine.core import RouterEngine


class RouterFactory:
    """Builds a ``RouterEngine``. An argument of a setting's name wins over file and environment.

    Example:
        >>> from moe_jax import RouterFactory
        >>> import numpy as np
        >>> quiet = {"input_dim": 16, "buckets": "16", "log_level": "ERROR"}
        >>> with RouterFactory.create_from_environment(**quiet) as router:
        ...     result = router.route(np.ones((1, 4, 16), np.float32))
        >>> result["expert_indices"].shape
        (1, 4, 4)
    """

    @staticmethod
    def create_optimized_for_inference(**overrides: Any) -> RouterEngine:
        """Returns an engine with preset ``production``: 1 to 3 of 8 experts, 10,000 cached results."""
        return RouterEngine(load_config(base=PRESETS["production"], **overrides))

    @staticmethod
    def create_optimized_for_training(**overrides: Any) -> RouterEngine:
        """Returns an engine with the preset ``training``: no cache, because inputs do not repeat."""
        return RouterEngine(load_config(base=PRESETS["training"], **overrides))

    @staticmethod
    def create_from_environment(**overrides: Any) -> RouterEngine:
        """Returns an engine that is configured by ``MOE_*`` variables and defaults."""
        return RouterEngine(load_config(**overrides))

    @staticmethod
    def create_from_config_file(path: str | os.PathLike[str], **overrides: Any) -> RouterEngine:
        """Returns an engine that is configured by a JSON file such as ``configs/production.json``.

        ``MOE_*`` variables win over the file.
        """
        return RouterEngine(load_config(path, **overrides))
