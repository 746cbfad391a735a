"""Work on the device, guarded: breaker, deadline, one retry, a check of the output, and fallbacks.

Where the check of values refuses nothing it is made while the device works, which hides a tenth of a
millisecond for 1.5 MB. What the check then puts in the place of bad values is routed once more.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable

import numpy as np

from moe_jax.serving.admission import Checked
from moe_jax.serving.cache import Entry
from moe_jax.serving.engine.requests import Order, expert_counts, read_only
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.errors import ServingError
from moe_jax.serving.resilience import (
    BadOutput,
    Bulkhead,
    CircuitBreaker,
    Ticket,
    is_transient,
    retry_once,
)

ROUTER_OUTPUTS = (
    "expert_indices", "expert_weights", "num_experts_per_token", "complexity_scores",
)  # fmt: skip

# What stands in the way of an answer without being the device's fault: no fallback helps.
_NO_FALLBACK = ("queue_full", "draining", "deadline_exceeded", "warming")

# Finite values that no product with sound weights turns into infinity.
_SOUND_BELOW = 1e6

Values = tuple[np.ndarray, np.ndarray | None]  # x f32[T, D], token_mask bool[T]
Meanwhile = Callable[[], object]
Run = Callable[[Snapshot, str, Values, bool, Meanwhile], dict[str, np.ndarray]]


def run_on_device(
    snapshot: Snapshot, model: str, values: Values, logits: bool, meanwhile: Meanwhile
) -> dict[str, np.ndarray]:
    """The one place where device work happens, and where drills put their faults."""
    return snapshot.models[model].run(*values, logits=logits, meanwhile=meanwhile)


class Checking:
    """The check of a request's values, made once, by whoever comes first.

    Args:
        sent: the values as they were sent.
        check: makes the check.
    """

    def __init__(self, sent: Values, check: Callable[[], Checked]) -> None:
        self._check = check
        self._made: Checked | None = None
        self._error: Exception | None = None
        self.values = sent  # those to use: once the check is made, what it made of them

    def make(self) -> None:
        """Makes the check if nobody did. It raises nothing here: a device at work is not at fault."""
        if self._made is not None or self._error is not None:
            return
        try:
            self._made = made = self._check()
        except Exception as error:
            self._error = error
        else:
            if made.x is not self.values[0] or made.token_mask is not self.values[1]:
                self.values = made.x, made.token_mask

    def result(self) -> Checked:
        """What came of it. Raises what the check raised."""
        self.make()
        if self._made is None:
            assert self._error is not None
            raise self._error
        return self._made


class Device:
    """Answers orders.

    Args:
        bulkhead: the workers.
        breaker: guards the device.
        static_top_k: whether the last fallback is allowed.
        observe: called as ``observe(metric, value)`` for histograms.
        notify: called as ``notify(event, **facts)``.
    """

    def __init__(
        self,
        *,
        bulkhead: Bulkhead,
        breaker: CircuitBreaker,
        static_top_k: bool,
        observe: Callable[[str, float], None],
        notify: Callable[..., None],
    ) -> None:
        self.bulkhead = bulkhead
        self.breaker = breaker
        self.run: Run = run_on_device
        self._static_top_k = static_top_k
        self._observe = observe
        self._notify = notify
        self._host = threading.BoundedSemaphore(2)
        self._first_failure: float | None = None

    @property
    def failing_seconds(self) -> float:
        """For how long the device has done nothing but fail; 0 after a success."""
        first = self._first_failure
        return 0.0 if first is None else time.perf_counter() - first

    def answer(self, order: Order, checking: Checking, cached: Callable[[], Entry | None]) -> Entry:
        """The answer, from the device or, where that fails, from the first fallback that has one.

        Raises:
            ServingError: queue full, deadline passed, or the device and every fallback failed.
        """
        try:
            found, seconds = self._on_device(order, checking)
        except ServingError as error:
            if error.code in _NO_FALLBACK:
                raise
            return self._fallback(order, checking, cached, error)
        except Exception as error:
            return self._fallback(order, checking, cached, error)
        return self._entry(order, checking, found, seconds)

    def _on_device(self, order: Order, checking: Checking) -> tuple[dict[str, np.ndarray], float]:
        if not self.breaker.would_admit():  # no place in the queue for what would be refused
            self.breaker.acquire().cancel()
        ticket: list[Ticket] = []
        begun = time.perf_counter()

        def work() -> tuple[dict[str, np.ndarray], float]:
            own = self.breaker.acquire()
            ticket.append(own)
            start = time.perf_counter()
            try:
                found = retry_once(
                    lambda: self._checked_run(order, checking),
                    seconds_left=lambda: order.deadline - time.perf_counter(),
                    on_retry=lambda error: self._notify("retry", error=_short(error)),
                )
            except Exception:
                own.failure(time.perf_counter() - start)
                if self._first_failure is None:
                    self._first_failure = start
                raise
            seconds = time.perf_counter() - start
            own.success(seconds)
            self._first_failure = None
            return found, seconds

        def abandoned() -> None:
            for own in ticket:
                own.failure(time.perf_counter() - begun)

        left = order.deadline - begun
        if left <= 0:
            raise ServingError(
                "deadline_exceeded", "the deadline passed before the work began. Allow more time."
            )
        (found, seconds), queued = self.bulkhead.run(
            work, timeout=left, on_abandon=abandoned, here=order.may_run_inline
        )
        self._observe("moe_queue_duration_seconds", queued)
        self._observe("moe_route_duration_seconds", seconds)
        return found, seconds

    def _checked_run(self, order: Order, checking: Checking) -> dict[str, np.ndarray]:
        used = checking.values
        found = self._run(order, checking)
        if checking.values is not used:  # the check put others in their place meanwhile
            used = checking.values
            found = self._run(order, checking)
        for name in ("expert_weights", "output"):
            if name in found and not math.isfinite(np.add.reduce(found[name], axis=None)):
                bad = ~np.isfinite(found[name]).all(axis=-1)
                # What a client sent is no fault of the device, overflow of huge values included.
                sound = bad & (np.abs(used[0]) < _SOUND_BELOW).all(axis=-1)  # False for NaN
                if sound.any():
                    raise BadOutput(
                        f"{name}: not finite for {int(sound.sum())} of {len(used[0])} tokens"
                    )
        return found

    def _run(self, order: Order, checking: Checking) -> dict[str, np.ndarray]:
        found = self.run(order.snapshot, order.model, checking.values, order.logits, checking.make)
        checking.make()  # for a ``run`` that left it out
        return found

    # --- fallbacks

    def _fallback(
        self,
        order: Order,
        checking: Checking,
        cached: Callable[[], Entry | None],
        error: Exception,
    ) -> Entry:
        if not isinstance(error, ServingError):
            self._notify("device_error", error=_short(error), transient=is_transient(error))
        entry = cached()
        if entry is not None:
            return self._fallen_back(entry, "cache", degraded=False)
        host = order.snapshot.host_models
        if host is not None and order.model in host:
            entry = self._on_host(order, checking)
            if entry is not None:
                return self._fallen_back(entry, "host", degraded=False)
        if self._static_top_k and order.model == "router":
            found = static_top_k(order.snapshot, checking.result())
            if found is not None:
                entry = self._entry(order, checking, found, 0.0)
                return self._fallen_back(entry, "static_top_k", degraded=True)
        if isinstance(error, ServingError):
            raise error
        raise ServingError(
            "device_error",
            f"the device failed and no fallback had an answer ({_short(error)}). Try again as "
            "Retry-After says.",
            retry_after=1.0,
        ) from error

    def _on_host(self, order: Order, checking: Checking) -> Entry | None:
        if not self._host.acquire(timeout=max(order.deadline - time.perf_counter(), 0.0)):
            return None
        try:
            start = time.perf_counter()
            assert order.snapshot.host_models is not None
            buckets = order.snapshot.host_models[order.model]
            checked = checking.result()
            found = buckets.run(checked.x, checked.token_mask, logits=order.logits)
            return self._entry(order, checking, found, time.perf_counter() - start)
        except Exception as error:
            self._notify("host_fallback_failed", error=_short(error))
            return None
        finally:
            self._host.release()

    def _fallen_back(self, entry: Entry, kind: str, *, degraded: bool) -> Entry:
        self._notify("fallback", kind=kind)
        about = {**entry.about, "fallback": kind, "degraded": degraded}
        return dataclasses.replace(entry, about=about, cacheable=False)

    def _entry(
        self, order: Order, checking: Checking, found: dict[str, np.ndarray], seconds: float
    ) -> Entry:
        router, checked = order.snapshot.router, checking.result()
        load = expert_counts(found["expert_indices"], router.num_experts)
        used = found.get("num_experts_per_token")
        if used is None:
            used = (found["expert_indices"] >= 0).sum(axis=-1)
        mask = checked.token_mask
        real = used if mask is None else used[mask]
        histogram = np.bincount(real, minlength=router.max_k + 1)
        wanted = ROUTER_OUTPUTS if order.model == "router" else ("output",)
        if order.logits and order.model == "router":
            wanted = (*wanted, "router_logits")
        arrays = read_only({name: found[name] for name in wanted}, order.shape)
        arrays["_load"], arrays["_histogram"] = load, histogram
        return Entry(
            arrays=arrays,
            about={
                "sanitized": checked.sanitized,
                "nonfinite_tokens": checked.nonfinite_tokens,
                "large_tokens": checked.large_tokens,
                "fallback": "",
                "degraded": False,
            },
            seconds=seconds,
            version=order.snapshot.version,
            owner=order.owner,
        )


def static_top_k(snapshot: Snapshot, checked: Checked) -> dict[str, np.ndarray] | None:
    """Plain top-k in numpy, for a device that is gone: every token uses the middle of min and max.

    None where the router is more than a plain product with a kernel [D, E].
    """
    params, router = snapshot.weights.params, snapshot.router
    if set(params) != {"kernel"}:
        return None
    logits = checked.x @ np.asarray(params["kernel"], np.float32)
    k = max(1, round((router.min_k + router.max_k) / 2))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k].astype(np.int32)
    top = np.take_along_axis(logits, order, axis=-1)
    weights = np.exp(top - top[:, :1])
    weights /= weights.sum(axis=-1, keepdims=True)
    indices = np.full((len(logits), router.max_k), -1, np.int32)
    filled = np.zeros((len(logits), router.max_k), np.float32)
    indices[:, :k], filled[:, :k] = order, weights
    counts = np.full(len(logits), k, np.int32)
    if checked.token_mask is not None:
        gone = ~checked.token_mask
        indices[gone], filled[gone], counts[gone] = -1, 0.0, 0
    span = router.max_k - router.min_k
    score = np.where(counts > 0, (k - router.min_k) / span if span else 0.5, 0.0)
    return {
        "expert_indices": indices,
        "expert_weights": filled,
        "num_experts_per_token": counts,
        "complexity_scores": score.astype(np.float32),
        "router_logits": logits,
    }


def _short(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."
