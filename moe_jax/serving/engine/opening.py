"""How an engine comes up: its cache, its weights, its metrics."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import jax

import moe_jax
from moe_jax.serving import admission, cache, metrics
from moe_jax.serving.engine.snapshot import Snapshot, build_snapshot, load_weights
from moe_jax.serving.errors import CODES

if TYPE_CHECKING:
    from moe_jax.serving.engine.core import RouterEngine


def open_cache(engine: RouterEngine) -> None:
    serving, performance = engine.config.serving, engine.config.performance
    shared = None
    if serving.redis_url:
        shared = cache.SharedCache(
            serving.redis_url, ttl_seconds=performance.cache_ttl_seconds,
            clock=engine.clock, notify=engine._notify,
        )  # fmt: skip
        # Replicas that share results must give a request the same name.
        secret = shared.secret()
        engine._keyer = cache.Keyer(keyed=engine.level.keyed_cache, secret=secret)
    engine.cache = found = cache.ResultCache(
        max_entries=performance.cache_size,
        max_bytes=serving.cache_max_bytes,
        ttl_seconds=performance.cache_ttl_seconds,
        clock=engine.clock,
        shared=shared,
        on_found=lambda digest: engine._prefetcher.found(digest) if engine._prefetcher else None,
    )
    if not serving.prefetch:
        return
    engine._hot = cache.HotInputs()
    if shared is not None:

        def bring(digest: str) -> bool:
            entry = shared.get(digest)
            if entry is not None:
                found.put(digest, entry)
            return entry is not None

        engine._prefetcher = cache.Prefetcher(bring, lambda d: found.peek(d) is not None)


def load(engine: RouterEngine) -> None:
    start = time.perf_counter()
    weights = load_weights(engine.config)
    snapshot = build_snapshot(engine.config, weights, host_fallback=engine._host_fallback)
    snapshot.warm()
    router = snapshot.router
    if engine.config.performance.enable_monitoring:
        experts = router.num_experts
        engine.recorder.open(
            metrics.Exporter(num_experts=experts, codes=tuple(CODES), build=build_of(snapshot)),
            # A reload may bring another largest k, so there is room for any.
            metrics.Traffic(num_experts=experts, max_k=experts, clock=engine.clock),
        )
    engine.system.sample()
    engine.limits = admission.Limits(
        width=snapshot.width,
        max_batch_size=engine.limits.max_batch_size,
        max_tensor_size=engine.limits.max_tensor_size,
        max_tokens=engine.limits.max_tokens,
    )
    engine._snapshot = snapshot
    engine.system.start(engine.check_alerts)
    engine.log.info(
        "engine_ready", version=snapshot.version, router=type(router).__name__,
        trained=snapshot.trained, models=sorted(snapshot.models), backend=jax.default_backend(),
        seconds=round(time.perf_counter() - start, 3),
    )  # fmt: skip
    told_of = engine.config.router_config
    served = snapshot.served_as()
    differing = {k: v for k, v in served.items() if snapshot.trained and v != getattr(told_of, k)}
    if differing:
        engine.log.warning(
            "configuration_superseded",
            told="the checkpoint says what its router is; these settings of router_config are not "
            "in force. Give the configuration the checkpoint's values.",
            served=differing,
        )
    if (
        snapshot.trained
        and "moe" not in snapshot.models
        and engine.config.serving.serve_moe != "off"
    ):
        engine.log.info(
            "moe_not_served",
            told="the checkpoint has no experts, or its metadata does not say what they are: "
            'experts={"activation": ..., "gated": ...}.',
        )
    if not snapshot.trained:
        production = engine.config.environment == "production"
        told = engine.log.error if production else engine.log.warning
        told(
            "untrained_weights",
            told="serving seeded weights that nobody trained. Set MOE_CHECKPOINT to a folder "
            "from moe-jax train or calibrate.",
            seed=engine.config.serving.seed,
        )


def build_of(snapshot: Snapshot) -> dict[str, str]:
    """The labels of ``moe_build_info``."""
    return {
        "version": moe_jax.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "params": snapshot.version if snapshot.trained else f"untrained-{snapshot.version}",
    }
