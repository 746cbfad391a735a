"""How a request is answered: shape, cache, values, device; and what is told and counted after.

The functions belong to ``RouterEngine``, whose parts they use.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.serving import admission, cache
from moe_jax.serving.engine.device import Checking, Order
from moe_jax.serving.engine.requests import LOCAL, Client, Result
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.errors import ServingError

if TYPE_CHECKING:
    from moe_jax.serving.engine.core import RouterEngine


_ids = random.Random()  # names, not secrets: the system's own source costs a call each time


def _new_id() -> str:
    return f"{_ids.getrandbits(64):016x}"


def answer(
    engine: RouterEngine, model: str, hidden_states: Any, token_mask: Any, logits: bool, client: Client,
    request_id: str | None, timeout: float | None, use_cache: bool,
) -> tuple[Result, cache.Entry]:  # fmt: skip
    """See ``RouterEngine.infer``; the entry beside the result is what is kept."""
    start = time.perf_counter()
    request_id = request_id or _new_id()
    try:
        entry, result, digest = _infer(
            engine, model, hidden_states, token_mask, logits, client, timeout, use_cache, start
        )
    except Exception as error:
        raise _failed(engine, error, client, request_id, start) from error.__cause__
    seconds = time.perf_counter() - start
    engine.recorder.answered(entry, seconds)
    engine.log.debug(
        "answered", request_id=request_id, model=model, shape=hidden_states.shape,
        result=result, ms=round(1e3 * seconds, 3),
    )  # fmt: skip
    return _result(engine, entry, request_id, 1e3 * seconds, result, digest), entry


def _infer(
    engine: RouterEngine, model: str, hidden_states: Any, token_mask: Any, logits: bool, client: Client,
    timeout: float | None, use_cache: bool, start: float,
) -> tuple[cache.Entry, str, str]:  # fmt: skip
    if engine._closed:
        raise shut()
    snapshot = engine.snapshot
    if model not in snapshot.models:
        raise no_model(model, snapshot)
    admission.check_array(hidden_states, engine.limits)
    batch, sequence, width = (int(s) for s in hidden_states.shape)
    x = np.ascontiguousarray(hidden_states)
    mask = None
    if token_mask is not None:
        mask = admission.check_mask(token_mask, x.shape)
    allowed = engine.config.serving.request_timeout_seconds
    deadline = start + (allowed if timeout is None else min(timeout, allowed))
    owner = client.id if engine._keyer.keyed else ""
    found, name = engine.cache, ""

    def digest() -> str:
        parts = (snapshot.version, engine._config_hash, model, logits)
        return name or engine._keyer.digest(parts, x, mask, client=client.id)

    def compute() -> cache.Entry:
        order = Order(
            snapshot=snapshot, model=model, shape=(batch, sequence), logits=logits,
            checking=checking(engine, x.reshape(-1, width), mask), deadline=deadline, owner=owner,
            here=timeout is None and client == LOCAL,
        )  # fmt: skip
        return engine.device.answer(order, _cached(engine, digest, snapshot, client))

    if found is None:
        return compute(), "off", ""
    if not use_cache:
        found.bypass()
        return compute(), "bypass", ""
    if not found.takes_part():
        return compute(), "stand_aside", ""
    begun = time.perf_counter()
    name = digest()
    hashing = time.perf_counter() - begun
    entry, result = found.fetch(
        name, compute, wait_seconds=deadline - time.perf_counter(), hashing_seconds=hashing
    )
    if engine._hot is not None and result == "hit":
        engine._hot.hit(name, x, (model, mask, logits, client))
    if engine._prefetcher is not None:
        engine._prefetcher.asked(client.id, name)
    return entry, result, name


def checking(engine: RouterEngine, flat: np.ndarray, mask: np.ndarray | None) -> Checking:
    """The check of hidden states [T, D]: made already where it may refuse them, which comes before
    any work on the device; otherwise left for when that is under way."""
    rows = flat if flat.dtype == np.float32 else flat.astype(np.float32)
    flat_mask = None if mask is None else mask.reshape(-1)
    made = Checking((rows, flat_mask), lambda: check_values(engine, rows, flat_mask))
    if "reject" in (engine.level.nonfinite, engine.level.magnitude):
        made.result()
    return made


def check_values(
    engine: RouterEngine, rows: np.ndarray, mask: np.ndarray | None
) -> admission.Checked:
    if not engine.config.security.enable_validation:
        return admission.Checked(x=rows, token_mask=mask)
    return admission.check_values(
        rows, mask, nonfinite=engine.level.nonfinite, magnitude=engine.level.magnitude,
        max_magnitude=engine.config.serving.max_magnitude,
    )  # fmt: skip


def _cached(
    engine: RouterEngine, digest: Callable[[], str], snapshot: Snapshot, client: Client
) -> Callable[[], cache.Entry | None]:
    """The cached answer of the same version, for when the device fails."""

    def look() -> cache.Entry | None:
        entry = None if engine.cache is None else engine.cache.peek(digest())
        if entry is None or entry.version != snapshot.version:
            return None
        return entry if entry.owner in ("", client.id) else None

    return look


def lookup(engine: RouterEngine, model: str, digest: str, client: Client) -> Result | None:
    """See ``RouterEngine.lookup``."""
    start = time.perf_counter()
    snapshot = engine.snapshot
    if model not in snapshot.models:
        raise engine.gate.refused(no_model(model, snapshot), client)
    if engine.cache is None or len(digest) != 32:
        return None
    entry = engine.cache.find(digest)
    right = "output" if model == "moe" else "expert_indices"
    if (
        entry is None
        or entry.version != snapshot.version
        or entry.owner not in ("", client.id)
        or right not in entry.arrays
    ):
        return None
    seconds = time.perf_counter() - start
    engine.recorder.answered(entry, seconds)
    return _result(engine, entry, _new_id(), 1e3 * seconds, "hit", digest)


def _result(
    engine: RouterEngine, entry: cache.Entry, request_id: str, ms: float, result: str, digest: str
) -> Result:
    about = entry.about
    info = {
        "request_id": request_id,
        "processing_time_ms": ms,
        "router_health": "healthy" if engine.breaker.state == "closed" else "degraded",
        "cached": result in ("hit", "coalesced") or about["fallback"] == "cache",
        "fallback_used": bool(about["fallback"]),
        "fallback": about["fallback"],
        "degraded": about["degraded"],
        "sanitized": about["sanitized"],
        "nonfinite_tokens": about["nonfinite_tokens"],
        "digest": digest,
        "model_version": entry.version,
    }
    return Result({k: v for k, v in entry.arrays.items() if k[0] != "_"}, info)


def rewarm(
    engine: RouterEngine,
    model: str,
    x: np.ndarray,
    mask: np.ndarray | None,
    logits: bool,
    client: Client,
) -> None:
    """Computes an answer into the cache. It is nobody's request and is not counted as one."""
    snapshot, found = engine.snapshot, engine.cache
    if found is None:
        return
    order = Order(
        snapshot=snapshot, model=model, shape=(x.shape[0], x.shape[1]), logits=logits,
        checking=checking(engine, x.reshape(-1, x.shape[-1]), mask),
        owner=client.id if engine._keyer.keyed else "",
        deadline=time.perf_counter() + engine.config.serving.request_timeout_seconds,
    )  # fmt: skip
    entry = engine.device.answer(order, lambda: None)
    if entry.cacheable:
        parts = (snapshot.version, engine._config_hash, model, logits)
        found.put(engine._keyer.digest(parts, x, mask, client=client.id), entry)


def _failed(
    engine: RouterEngine, error: Exception, client: Client, request_id: str, start: float
) -> ServingError:
    """Records a failure; what is not a refusal becomes ``internal`` and keeps its traceback in the
    log, not in the answer."""
    if not isinstance(error, ServingError):
        engine.log.error("internal_error", request_id=request_id, exc_info=error)
        error = ServingError(
            "internal",
            f"a fault of ours ({type(error).__name__}). The operator's log has it under "
            f"request id {request_id}.",
        )
    engine.gate.refused(error, client)
    if error.status >= 500:
        engine.recorder.failed(time.perf_counter() - start)
    told = engine.log.warning if error.status >= 500 else engine.log.info
    told(
        "refused", request_id=request_id, code=error.code, status=error.status,
        client=client.id, message=error.message,
    )  # fmt: skip
    return error


def no_model(model: str, snapshot: Snapshot) -> ServingError:
    hint = (
        "" if "moe" in snapshot.models else " moe needs experts and MOE_SERVE_MOE other than off."
    )
    return ServingError(
        "not_found",
        f"model: expected one of {', '.join(snapshot.models)}, got {str(model)[:64]!r}.{hint}",
    )


def shut() -> ServingError:
    """What an engine that was shut down answers."""
    return ServingError("draining", "shutting down. Ask another instance.", retry_after=1)
