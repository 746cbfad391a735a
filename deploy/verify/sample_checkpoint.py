"""A small checkpoint for the checks: a router with random weights, fitted to a mean of two experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WIDTH = 64


def save_sample(folder: Path, *, seed: int = 0) -> tuple[Path, np.ndarray]:
    """Saves a fitted router of width 64.

    Args:
        folder: the checkpoint's folder, which does not exist yet.
        seed: of the router's weights; the inputs that it is fitted to are always the same.

    Returns:
        The folder, and the hidden state f32[64] of the inputs that uses the fewest experts.
    """
    # JAX loads where a checkpoint is made, so that a check's --help needs no JAX.
    import jax
    import jax.numpy as jnp

    from moe_jax.checkpoint import Checkpoint, save
    from moe_jax.config import Config, RouterConfig, build_router

    config = Config(router_config=RouterConfig(input_dim=WIDTH, max_experts=3))
    router = build_router(config)
    params = router.init(jax.random.key(seed), WIDTH)
    x = jax.random.normal(jax.random.key(9), (4096, WIDTH), jnp.float32)
    state = router.fit(params, router.init_state(), x, target_mean_k=2.0)
    checkpoint = Checkpoint(
        params={"router": params},
        routers={"router": router},
        states={"router": state},
        config=config,
    )
    routing = router(params, state, x)
    easiest = int(np.argmin(np.asarray(routing.num_experts_per_token)))
    return save(folder, checkpoint), np.asarray(x[easiest])
