"""The parts of one engine that live as long as it does, whatever it serves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from moe_jax.config import Config
from moe_jax.serving import admission, metrics, resilience
from moe_jax.serving.engine.access import AccessControl
from moe_jax.serving.engine.alerts import Alerts
from moe_jax.serving.engine.buckets import compile_counter
from moe_jax.serving.engine.device import Device
from moe_jax.serving.engine.logs import make_logger, stream_of
from moe_jax.serving.engine.recorder import Recorder
from moe_jax.serving.errors import ServingError


class Lifecycle:
    """Whether an engine takes requests: it serves, then drains, then is closed.

    Attributes:
        draining: readiness says no; requests are still answered.
        closed: every new request is refused.
    """

    def __init__(self) -> None:
        self.draining = False
        self.closed = False

    def check_open(self) -> None:
        """Raises ServingError ``draining`` once the engine is closed."""
        if self.closed:
            raise ServingError("draining", "shutting down. Ask another instance.", retry_after=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything of an engine except its cached results and the model that it serves.

    Attributes:
        config: the configuration.
        clock: monotonic clock in seconds.
        started: when the engine was built, on ``clock``.
        log: a structlog logger.
        recorder: feeds metrics.
        access: keys, limits, blocks.
        limits: size limits of a request; the width is that of the configuration.
        breaker: guards the device.
        bulkhead: bounds the work on the device.
        device: runs the model, with fallbacks.
        system: samples memory and processor use.
        alerts: active alerts.
        lifecycle: serving, draining or closed.
        compilations_before: XLA compilations of this process before the engine was built.
    """

    config: Config
    clock: Callable[[], float]
    started: float
    log: Any
    recorder: Recorder
    access: AccessControl
    limits: admission.Limits
    breaker: resilience.CircuitBreaker
    bulkhead: resilience.Bulkhead
    device: Device
    system: metrics.SystemSampler
    alerts: Alerts
    lifecycle: Lifecycle
    compilations_before: int

    @property
    def level(self) -> admission.Level:
        """The security level in force."""
        return self.access.level

    @property
    def compilations(self) -> int:
        """XLA compilations in this process since the engine was built."""
        return compile_counter().count - self.compilations_before

    @property
    def log_lines_dropped(self) -> int:
        """Log lines that could not be written."""
        stream = stream_of(self.log)
        return 0 if stream is None else stream.dropped

    @property
    def log_failure(self) -> str:
        """Why the last log line could not be written; "" if it was."""
        stream = stream_of(self.log)
        return "" if stream is None else stream.failure

    def notify(self, event: str, **facts: Any) -> None:
        """Logs an event of a part, such as a lost Redis, as a warning."""
        self.log.warning(event, **facts)


def build_parts(
    config: Config, *, clock: Callable[[], float] = time.monotonic, logger: Any = None
) -> Parts:
    """Builds the parts that a configuration describes.

    Args:
        config: the configuration.
        clock: monotonic clock in seconds, injectable for tests.
        logger: a structlog logger; None writes JSON lines to standard error at ``log_level``.
    """
    serving, security = config.serving, config.security
    log = make_logger(config.log_level, config.environment) if logger is None else logger
    recorder = Recorder()

    def notify(event: str, **facts: Any) -> None:
        log.warning(event, **facts)

    def circuit_moved(state: str) -> None:
        recorder.circuit(state)
        log.warning("circuit", state=state)

    access = AccessControl(config, clock=clock, recorder=recorder, log=log, notify=notify)
    breaker = resilience.CircuitBreaker(
        resilience.BreakerPolicy(slow_seconds=serving.slow_call_seconds),
        clock=clock,
        on_transition=circuit_moved,
    )
    bulkhead = resilience.Bulkhead(workers=serving.max_inflight, queue=serving.max_queue)
    return Parts(
        config=config,
        clock=clock,
        started=clock(),
        log=log,
        recorder=recorder,
        access=access,
        limits=admission.Limits(
            width=config.router_config.input_dim,
            max_batch_size=security.max_batch_size,
            max_tensor_size=security.max_tensor_size,
            max_tokens=access.level.tokens_per_minute,
        ),
        breaker=breaker,
        bulkhead=bulkhead,
        device=Device(
            bulkhead=bulkhead,
            breaker=breaker,
            static_top_k=serving.fallback_static_top_k,
            observe=recorder.observe,
            notify=notify,
        ),
        system=metrics.SystemSampler(),
        alerts=Alerts(clock, notify),
        lifecycle=Lifecycle(),
        compilations_before=compile_counter().count,
    )
