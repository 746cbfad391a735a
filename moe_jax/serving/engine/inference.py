"""Answers one request: checks it, asks the cache or the device, counts and logs the outcome."""

from __future__ import annotations

import random
import time

import numpy as np

from moe_jax.serving import admission, cache
from moe_jax.serving.engine.device import Checking
from moe_jax.serving.engine.parts import Parts
from moe_jax.serving.engine.requests import LOCAL, Client, Order, Query, Result
from moe_jax.serving.engine.results import Results
from moe_jax.serving.engine.served import Served
from moe_jax.serving.engine.snapshot import ALL_LAYERS
from moe_jax.serving.engine.stacking import outcome_of, stack_layers
from moe_jax.serving.errors import ServingError, out_of_memory

# Request ids need not be unpredictable; `os.urandom` would cost a system call each.
_ids = random.Random()


def answer(
    parts: Parts, results: Results, served: Served, query: Query
) -> tuple[Result, cache.Entry]:
    """Answers a query, and counts and logs the answer or the failure.

    Returns:
        The result, and the entry that the cache keeps of it.

    Raises:
        ServingError: see ``RouterEngine.infer``.
    """
    start = time.perf_counter()
    request_id = query.request_id or _new_id()
    if query.call is not None:
        # The deadline may pass while the transport decodes the request; the transport counts that.
        if query.call.left:
            raise left_at_deadline()
        # The client gets its answer when the call is left, so the failure is counted at that moment,
        # not when the work ends. The listener lives as long as the call, so it must not hold the
        # query's arrays.
        client = query.client
        query.call.on_leave(lambda: _failed(parts, left_at_deadline(), client, request_id, start))
    try:
        orders = _checked(parts, results, served, query, start)
        fetched = [_fetched(parts, results, order, query.use_cache) for order in orders]
    except Exception as error:
        if query.call is not None and query.call.left:
            raise  # the listener above has counted it
        # `from` keeps the cause of a refusal, and hides the traceback of any other error, which
        # `_failed` has logged.
        raise _failed(parts, error, query.client, request_id, start) from error.__cause__
    if query.call is not None and query.call.left:
        raise left_at_deadline()  # counted above; nobody receives the answer
    entry, outcome, digest = fetched[0]
    if query.model == ALL_LAYERS:
        entry = stack_layers(orders, [each for each, _, _ in fetched])
        outcome, digest = outcome_of([each for _, each, _ in fetched]), ""
    seconds = time.perf_counter() - start
    parts.recorder.answered(entry, seconds)
    for order, (each, _, _) in zip(orders, fetched, strict=True):
        parts.recorder.routed(order.snapshot.layer_of(order.model), each, seconds)
    parts.log.debug(
        "answered",
        request_id=request_id,
        model=query.model,
        shape=query.hidden_states.shape,
        result=outcome,
        ms=round(1e3 * seconds, 3),
    )
    return _result(parts, entry, request_id, seconds, outcome, digest), entry


def _fetched(
    parts: Parts, results: Results, order: Order, use_cache: bool
) -> tuple[cache.Entry, str, str]:
    """Returns ``Results.fetch`` of an order, computed on the device if need be."""

    def compute() -> cache.Entry:
        checking = _checking(parts, order)
        return parts.device.answer(order, checking, lambda: results.peek(order))

    return results.fetch(order, compute, use_cache=use_cache)


def _checked(
    parts: Parts, results: Results, served: Served, query: Query, start: float
) -> list[Order]:
    """Checks a query, except the values in its arrays, and binds it to the current weights.

    Returns:
        One order; for all layers one each, in their order. Each is cached and run by itself.
    """
    parts.lifecycle.check_open()
    # Taken once, so that no answer mixes the weights before and after a reload.
    snapshot = served.snapshot
    snapshot.check_model(query.model)
    if query.model == ALL_LAYERS:
        models = tuple(snapshot.weights.layers)
        admission.check_layers(query.hidden_states, len(models), served.limits)
        states = np.ascontiguousarray(query.hidden_states)
    else:
        models = (query.model,)
        admission.check_array(query.hidden_states, served.limits)
        states = np.ascontiguousarray(query.hidden_states)[None]
    mask = None
    if query.token_mask is not None:
        mask = admission.check_mask(query.token_mask, states.shape[1:])
    allowed, asked = parts.config.serving.request_timeout_seconds, query.timeout_seconds
    deadline = start + (allowed if asked is None else min(asked, allowed))
    return [
        Order(
            snapshot=snapshot,
            model=model,
            x=x,
            token_mask=mask,
            logits=query.return_router_logits,
            client=query.client,
            owner=results.owner(query.client),
            deadline=deadline,
            may_run_inline=asked is None and query.client == LOCAL,
            call=query.call,
        )
        for model, x in zip(models, states, strict=True)
    ]


def _checking(parts: Parts, order: Order) -> Checking:
    """Returns the check of an order's values.

    If the security level may reject values, the check runs now, before any work on the device.
    Otherwise it runs while the device works.
    """
    flat = order.x.reshape(-1, order.x.shape[-1])
    rows = flat if flat.dtype == np.float32 else flat.astype(np.float32)
    mask = None if order.token_mask is None else order.token_mask.reshape(-1)
    checking = Checking((rows, mask), lambda: check_values(parts, rows, mask))
    if "reject" in (parts.level.nonfinite, parts.level.magnitude):
        checking.result()
    return checking


def check_values(parts: Parts, rows: np.ndarray, mask: np.ndarray | None) -> admission.Checked:
    """Applies the level's policy for NaN, inf and huge values to rows f32[T, D], mask bool[T]."""
    if not parts.config.security.enable_validation:
        return admission.Checked(x=rows, token_mask=mask)
    return admission.check_values(
        rows,
        mask,
        nonfinite=parts.level.nonfinite,
        magnitude=parts.level.magnitude,
        max_magnitude=parts.config.serving.max_magnitude,
    )


def lookup(
    parts: Parts, results: Results, served: Served, model: str, digest: str, client: Client
) -> Result | None:
    """Returns the cached answer with this digest, or None; see ``RouterEngine.lookup``."""
    start = time.perf_counter()
    snapshot = served.snapshot
    try:
        snapshot.check_model(model)
    except ServingError as error:
        raise parts.access.refused(error, client) from None
    output = "output" if model == "moe" else "expert_indices"
    version = snapshot.versions[model]
    entry = results.find(digest, version=version, output=output, client=client)
    if entry is None:
        return None
    seconds = time.perf_counter() - start
    parts.recorder.answered(entry, seconds)
    parts.recorder.routed(snapshot.layer_of(model), entry, seconds)
    return _result(parts, entry, _new_id(), seconds, "hit", digest)


def rewarm(parts: Parts, results: Results, served: Served) -> int:
    """Computes the hottest inputs with the current weights, so that they hit after a reload.

    The metrics do not count these computations as requests.

    Returns:
        The number of results computed.
    """
    snapshot = served.snapshot
    hottest = results.hottest()
    for x, options in hottest:
        order = Order(
            snapshot=snapshot,
            model=options.model,
            x=x,
            token_mask=options.token_mask,
            logits=options.logits,
            client=options.client,
            owner=results.owner(options.client),
            deadline=time.perf_counter() + parts.config.serving.request_timeout_seconds,
        )
        results.put(order, parts.device.answer(order, _checking(parts, order), lambda: None))
    return len(hottest)


def _result(
    parts: Parts, entry: cache.Entry, request_id: str, seconds: float, outcome: str, digest: str
) -> Result:
    about = entry.about
    info = {
        "request_id": request_id,
        "processing_time_ms": 1e3 * seconds,
        "router_health": "healthy" if parts.breaker.state == "closed" else "degraded",
        "cached": outcome in ("hit", "coalesced") or about["fallback"] == "cache",
        "fallback_used": bool(about["fallback"]),
        "fallback": about["fallback"],
        "degraded": about["degraded"],
        "sanitized": about["sanitized"],
        "nonfinite_tokens": about["nonfinite_tokens"],
        "digest": digest,
        "model_version": entry.version,
    }
    # Arrays whose names start with an underscore are counts for the metrics, not outputs.
    return Result({k: v for k, v in entry.arrays.items() if k[0] != "_"}, info)


def _failed(
    parts: Parts, error: Exception, client: Client, request_id: str, start: float
) -> ServingError:
    """Counts and logs a failure, and returns the error to raise.

    Lack of memory is a refusal. Any other error that is not a ``ServingError`` becomes ``internal``:
    its traceback goes to the log, not into the answer.
    """
    if isinstance(error, MemoryError):
        error = out_of_memory()
    if not isinstance(error, ServingError):
        parts.log.error("internal_error", request_id=request_id, exc_info=error)
        error = ServingError(
            "internal",
            f"an internal error ({type(error).__name__}). The operator's log describes it under "
            f"request id {request_id}.",
        )
    parts.access.refused(error, client)
    if error.status >= 500:
        parts.recorder.failed(time.perf_counter() - start)
    write = parts.log.warning if error.status >= 500 else parts.log.info
    write(
        "refused",
        request_id=request_id,
        code=error.code,
        status=error.status,
        client=client.id,
        message=error.message,
    )
    return error


def left_at_deadline() -> ServingError:
    """Returns the error for a call that was left at its deadline (``Call.leave``)."""
    return ServingError(
        "deadline_exceeded",
        "expected an answer within the deadline, got none yet. Allow more time, or send less.",
    )


def _new_id() -> str:
    return f"{_ids.getrandbits(64):016x}"
