"""Guarded work on the device: breaker, deadline, one retry, a check of the output, and fallbacks.

Where the check of values rejects nothing, it runs while the device works, which hides a tenth of a
millisecond for 1.5 MB. If it replaces bad values, the request is routed once more with the new ones.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from moe_jax.serving.admission import Checked
from moe_jax.serving.cache import Entry
from moe_jax.serving.engine.requests import Order, expert_counts, read_only
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.engine.weights import Weights
from moe_jax.serving.errors import ServingError, out_of_memory
from moe_jax.serving.resilience import (
    BadOutput,
    Bulkhead,
    CircuitBreaker,
    Ticket,
    is_transient,
    retry_once,
)

ROUTER_OUTPUTS = (
    "expert_indices",
    "expert_weights",
    "num_experts_per_token",
    "complexity_scores",
)

# Errors that say nothing about the device; no fallback helps against them.
_NO_FALLBACK = ("queue_full", "draining", "deadline_exceeded", "warming")

# Finite values of this size never overflow in a product with sound weights.
_SOUND_BELOW = 1e6

# Requests of more tokens are run in pieces of about this many, and others may pass between two pieces.
# Smaller pieces would spend more of their time on launching and fetching.
PIECE_TOKENS = 512

Values = tuple[np.ndarray, np.ndarray | None]  # x f32[T, D], token_mask bool[T]
Meanwhile = Callable[[], object]
Outputs = dict[str, np.ndarray]  # [T, ...] by name
Run = Callable[[Snapshot, str, Values, bool, Meanwhile], Outputs]


def run_on_device(
    snapshot: Snapshot, model: str, values: Values, logits: bool, meanwhile: Meanwhile
) -> dict[str, np.ndarray]:
    """Runs values x f32[T, D], token_mask bool[T] through a model. Drills replace it by faults."""
    return snapshot.models[model].run(*values, logits=logits, meanwhile=meanwhile)


class Checking:
    """The check of a request's values, made at most once, by whichever thread needs it first.

    Args:
        sent: the values as they were sent.
        check: makes the check.

    Attributes:
        values: the values to use. The check may replace them.
    """

    def __init__(self, sent: Values, check: Callable[[], Checked]) -> None:
        self._check = check
        self._checked: Checked | None = None
        self._error: Exception | None = None
        self.values = sent

    def make(self) -> None:
        """Makes the check unless it is made. Raises nothing: an error of the check, which runs while
        the device works, must not count as one of the device."""
        if self._checked is not None or self._error is not None:
            return
        try:
            self._checked = checked = self._check()
        except Exception as error:
            self._error = error
        else:
            if checked.x is not self.values[0] or checked.token_mask is not self.values[1]:
                self.values = checked.x, checked.token_mask

    def result(self) -> Checked:
        """Returns the outcome of the check. Raises what the check raised."""
        self.make()
        if self._checked is None:
            assert self._error is not None
            raise self._error
        return self._checked


class Device:
    """Runs orders on the device, or on a fallback.

    Args:
        bulkhead: bounds the work under way.
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
        """For how long every call of the device has failed; 0 after a success."""
        first = self._first_failure
        return 0.0 if first is None else time.perf_counter() - first

    def answer(self, order: Order, checking: Checking, cached: Callable[[], Entry | None]) -> Entry:
        """Returns the result of an order, from the device or else from the first fallback with one.

        Args:
            order: what to run.
            checking: the order's values and their check.
            cached: returns a cached result of the same order, or None.

        Raises:
            ServingError: the queue is full, the deadline passed, memory ran out, or the device and
                every fallback failed.
        """
        try:
            outputs, seconds = self._on_device(order, checking)
        except ServingError as error:
            if error.code in _NO_FALLBACK:
                raise
            return self._fallback(order, checking, cached, error)
        except Exception as error:
            return self._fallback(order, checking, cached, error)
        return self._entry(order, checking, outputs, seconds)

    def _on_device(self, order: Order, checking: Checking) -> tuple[Outputs, float]:
        """Returns the outputs of an order and the seconds that the device worked on it."""
        if not self.breaker.would_admit():  # no place in the queue for what would be refused
            self.breaker.acquire().cancel()
        begun = time.perf_counter()
        left = order.deadline - begun
        if left <= 0:
            raise ServingError(
                "deadline_exceeded", "the deadline passed before the work began. Allow more time."
            )
        # Large orders are cut, so that a small one waits for a piece of them and not for the whole.
        pieces = pieces_of(order.shape, order.snapshot.models[order.model].sizes[-1])
        tickets: list[Ticket] = []
        spent = 0.0

        def run(piece: slice) -> Outputs:
            nonlocal spent
            if not tickets:
                # Taken when the first piece runs, not when the order queues: the breaker may open
                # meanwhile.
                tickets.append(self.breaker.acquire())
            start = time.perf_counter()
            try:
                outputs = retry_once(
                    lambda: self._checked_run(order, checking, piece),
                    seconds_left=lambda: order.deadline - time.perf_counter(),
                    on_retry=lambda error: self._notify("retry", error=_short(error)),
                )
            except MemoryError:  # the host's memory ran out; the device is not to blame
                tickets[0].cancel()
                raise
            except Exception:
                tickets[0].failure(spent + time.perf_counter() - start)
                if self._first_failure is None:
                    self._first_failure = start
                raise
            spent += time.perf_counter() - start
            return outputs

        def finished(outputs: list[Outputs]) -> tuple[Outputs, float]:
            tickets[0].success(spent)
            self._first_failure = None
            return _joined(outputs), spent

        def run_in_pieces() -> Generator[int, None, tuple[Outputs, float]]:
            outputs = [run(pieces[0])]
            try:
                for piece in pieces[1:]:
                    yield piece.stop - piece.start
                    outputs.append(run(piece))
            except GeneratorExit:  # nobody waits any more, which is no failure of the device
                tickets[0].cancel()
                raise
            return finished(outputs)

        def work() -> Any:
            return run_in_pieces() if len(pieces) > 1 else finished([run(pieces[0])])

        def abandoned() -> None:
            for ticket in tickets:
                # Work that outlasts its deadline is a failure of the device, whatever it returns
                # later.
                ticket.failure(time.perf_counter() - begun)

        (outputs, seconds), queued = self.bulkhead.run(
            work,
            timeout=left,
            client=order.client.id,
            cost=pieces[0].stop,
            on_abandon=abandoned,
            may_run_inline=order.may_run_inline,
            call=order.call,
        )
        self._observe("moe_queue_duration_seconds", queued)
        self._observe("moe_route_duration_seconds", seconds)
        return outputs, seconds

    def _checked_run(self, order: Order, checking: Checking, piece: slice) -> Outputs:
        used = checking.values
        outputs = self._run(order, checking, piece)
        if checking.values is not used:  # the check replaced bad values meanwhile
            outputs = self._run(order, checking, piece)
        for name in ("expert_weights", "output"):
            # One reduction where all is well: the sum of finite values of this size is finite.
            if name in outputs and not math.isfinite(np.add.reduce(outputs[name], axis=None)):
                x = checking.values[0][piece]
                bad = ~np.isfinite(outputs[name]).all(axis=-1)
                # Values that a client sent may overflow; only tokens that cannot are a failure.
                sound = bad & (np.abs(x) < _SOUND_BELOW).all(axis=-1)  # False for NaN
                if sound.any():
                    raise BadOutput(f"{name}: not finite for {int(sound.sum())} of {len(x)} tokens")
        return outputs

    def _run(self, order: Order, checking: Checking, piece: slice) -> Outputs:
        x, mask = checking.values
        values = x[piece], None if mask is None else mask[piece]
        outputs = self.run(order.snapshot, order.model, values, order.logits, checking.make)
        checking.make()  # a replaced `run` may not have called it
        return outputs

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
        # An older answer to the same request is exact, so it comes before every other fallback.
        entry = cached()
        if entry is not None:
            return self._fallen_back(entry, "cache", degraded=False)
        if isinstance(error, MemoryError):  # the other fallbacks need memory of the host too
            raise out_of_memory() from error
        host = order.snapshot.host_models
        if host is not None and order.model in host:
            entry = self._on_host(order, checking)
            if entry is not None:
                return self._fallen_back(entry, "host", degraded=False)
        if self._static_top_k and order.model != "moe":
            outcome = static_top_k(order.snapshot.weights_of(order.model), checking.result())
            if outcome is not None:
                entry = self._entry(order, checking, outcome, 0.0)
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
        # Few at once: the host also decodes requests and answers probes.
        if not self._host.acquire(timeout=max(order.deadline - time.perf_counter(), 0.0)):
            return None
        try:
            start = time.perf_counter()
            assert order.snapshot.host_models is not None
            buckets = order.snapshot.host_models[order.model]
            checked = checking.result()
            outcome = buckets.run(checked.x, checked.token_mask, logits=order.logits)
            return self._entry(order, checking, outcome, time.perf_counter() - start)
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
        self, order: Order, checking: Checking, outcome: dict[str, np.ndarray], seconds: float
    ) -> Entry:
        router, checked = order.router, checking.result()
        load = expert_counts(outcome["expert_indices"], router.num_experts)
        used = outcome.get("num_experts_per_token")
        if used is None:
            used = (outcome["expert_indices"] >= 0).sum(axis=-1)
        mask = checked.token_mask
        real = used if mask is None else used[mask]
        histogram = np.bincount(real, minlength=router.max_k + 1)
        wanted = ("output",) if order.model == "moe" else ROUTER_OUTPUTS
        if order.logits and order.model != "moe":
            wanted = (*wanted, "router_logits")
        arrays = read_only({name: outcome[name] for name in wanted}, order.shape)
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
            version=order.version,
            owner=order.owner,
        )


def pieces_of(shape: tuple[int, int], largest_bucket: int) -> list[slice]:
    """Returns the pieces in which B * S tokens are run: whole buckets, about ``PIECE_TOKENS`` each.

    Example:
        >>> pieces_of((2, 600), 256)
        [slice(0, 512, None), slice(512, 1024, None), slice(1024, 1200, None)]
        >>> pieces_of((2, 600), 2048)
        [slice(0, 1200, None)]
    """
    tokens = shape[0] * shape[1]
    # Whole buckets, so that cutting adds no padding.
    size = max(PIECE_TOKENS // largest_bucket, 1) * largest_bucket
    return [slice(at, min(at + size, tokens)) for at in range(0, tokens, size)]


def _joined(outputs: list[Outputs]) -> Outputs:
    if len(outputs) == 1:
        return outputs[0]
    return {name: np.concatenate([piece[name] for piece in outputs]) for name in outputs[0]}


def static_top_k(weights: Weights, checked: Checked) -> dict[str, np.ndarray] | None:
    """Returns the outputs of plain top-k in numpy, for a device that has failed.

    Every token uses the middle of ``min_k`` and ``max_k`` experts. None if the router is more than a
    product with a kernel [D, E].
    """
    params, router = weights.params, weights.router
    if set(params) != {"kernel"}:
        return None
    logits = checked.x @ np.asarray(params["kernel"], np.float32)
    k = max(1, round((router.min_k + router.max_k) / 2))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k].astype(np.int32)
    top = np.take_along_axis(logits, order, axis=-1)
    # The largest logit is subtracted first, so that no exponential overflows.
    shares = np.exp(top - top[:, :1])
    shares /= shares.sum(axis=-1, keepdims=True)
    indices = np.full((len(logits), router.max_k), -1, np.int32)
    filled = np.zeros((len(logits), router.max_k), np.float32)
    indices[:, :k], filled[:, :k] = order, shares
    counts = np.full(len(logits), k, np.int32)
    if checked.token_mask is not None:
        masked = ~checked.token_mask
        indices[masked], filled[masked], counts[masked] = -1, 0.0, 0
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
