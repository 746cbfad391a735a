"""Another checkpoint between two requests: loaded, compiled and tried first, or refused."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.checkpoint import CheckpointError
from moe_jax.serving.engine.answering import rewarm
from moe_jax.serving.engine.opening import build_of
from moe_jax.serving.engine.snapshot import Snapshot, build_snapshot, load_weights, version_of
from moe_jax.serving.errors import ServingError

if TYPE_CHECKING:
    from moe_jax.serving.engine.core import RouterEngine


def reload(engine: RouterEngine, checkpoint: str | None) -> dict[str, Any]:
    """See ``RouterEngine.reload``; the caller holds the lock."""
    start = time.perf_counter()
    old = engine.snapshot
    try:
        weights = load_weights(engine.config, checkpoint)
        new = build_snapshot(engine.config, weights, host_fallback=engine._host_fallback)
        _check_compatible(old, new)
        new.warm()
        _canary(new)
    except Exception as error:
        engine.log.error(
            "reload_refused", checkpoint=checkpoint, serving=old.version,
            error=f"{type(error).__name__}: {error}",
        )  # fmt: skip
        raise
    engine._snapshot = new
    engine.recorder.relabel(build_of(new))
    if engine.cache is not None:
        engine.cache.clear()
    seconds = time.perf_counter() - start
    engine.log.info(
        "reloaded", version=new.version, previous=old.version, trained=new.trained,
        seconds=round(seconds, 3),
    )  # fmt: skip
    warmed = _rewarm(engine)
    return {
        "version": new.version,
        "previous": old.version,
        "trained": new.trained,
        "source": new.weights.source,
        "rewarmed": warmed,
        "seconds": seconds,
    }


def _check_compatible(old: Snapshot, new: Snapshot) -> None:
    """Clients keep sending what they sent, and dashboards keep their experts."""
    # Seeded experts are promised to nobody: a checkpoint may come without any.
    before, after = sorted(old.models), sorted(new.models)
    for name, wanted, found in (
        ("width (input_dim)", old.width, new.width),
        ("num_experts", old.router.num_experts, new.router.num_experts),
        ("models", before if old.trained else after, after),
    ):
        if wanted != found:
            raise CheckpointError(
                f"reload: expected {name} {wanted} as it is served now, got {found}. Start another "
                "instance for it instead."
            )


def _canary(snapshot: Snapshot) -> None:
    """Routes a seeded batch and checks what comes out, and that the device holds what was loaded."""
    if version_of(snapshot.weights) != snapshot.version:
        raise ServingError("internal", "reload: the weights changed while they were loaded.")
    x = np.random.default_rng(0).standard_normal((64, snapshot.width)).astype(np.float32)
    router = snapshot.router
    found = snapshot.models["router"].run(x, None, logits=True)
    indices, weights = found["expert_indices"], found["expert_weights"]
    counts = found["num_experts_per_token"]
    problems = []
    if not all(np.isfinite(found[name]).all() for name in ("expert_weights", "router_logits")):
        problems.append("values that are not finite")
    if ((indices < -1) | (indices >= router.num_experts)).any():
        problems.append("experts that do not exist")
    if (counts < router.min_k).any() or (counts > router.max_k).any():
        problems.append(f"experts per token outside of {router.min_k} to {router.max_k}")
    if not ((weights >= 0).all() and (weights[indices < 0] == 0).all()):
        problems.append("weights that are negative or of no expert")
    if (
        "moe" in snapshot.models
        and not np.isfinite(snapshot.models["moe"].run(x, None)["output"]).all()
    ):
        problems.append("outputs of experts that are not finite")
    if problems:
        raise CheckpointError(
            f"reload: expected sound answers to a canary batch, got {'; '.join(problems)}. "
            "The old weights go on serving; calibrate or train again."
        )


def _rewarm(engine: RouterEngine) -> int:
    """Computes the hottest inputs anew, so that the swap costs no misses; how many."""
    if engine._hot is None:
        return 0
    done = 0
    for x, options in engine._hot.hottest():
        model, mask, logits, client = options  # type: ignore[misc]
        rewarm(engine, model, x, mask, logits, client)
        done += 1
    return done
