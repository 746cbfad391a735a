"""The engine: admission, cache, resilience and metrics around one snapshot.

The order of a request: shape and size, cache, values, a place on the device, circuit breaker, bucket,
compiled function, check of the output, answer. Limits and blocks come before all of it, by ``admit``.
Where the level refuses no values, they are checked while the device works (``engine.device``).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from moe_jax.config import Config
from moe_jax.serving import admission, cache, metrics, resilience
from moe_jax.serving.engine import answering, describing, opening, reloading
from moe_jax.serving.engine.alerts import Alerts
from moe_jax.serving.engine.buckets import compile_counter
from moe_jax.serving.engine.device import Device
from moe_jax.serving.engine.gate import Gate
from moe_jax.serving.engine.logs import make_logger
from moe_jax.serving.engine.recording import Recorder
from moe_jax.serving.engine.requests import LOCAL, Client, Result, guide_result, routing_info
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.errors import ServingError

WATCHDOG_SECONDS = 120.0


class RouterEngine:
    """The guide's production router: routes, watches itself, and protects itself.

    Built by ``RouterFactory``. Safe to use from many threads. ``with`` shuts it down.

    Args:
        config: the configuration.
        clock: seconds that never go back: of breaker, blocks, cache and windows. For tests.
        background: whether to return before the weights are loaded and compiled; ``readiness`` says
            ``warming`` until then, or ``params_missing`` if they cannot be loaded.
        host_fallback: whether a failing device is covered by the host's CPU; None is wherever that
            is another device.
        logger: a structlog logger; None writes JSON lines to standard error at ``log_level``.

    Raises:
        ConfigError, CheckpointError, ValueError: what is configured cannot be served.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
        background: bool = False,
        host_fallback: bool | None = None,
        logger: Any = None,
    ) -> None:
        self.config = config
        self.clock = clock
        self.started = clock()
        self.log = make_logger(config.log_level, config.environment) if logger is None else logger
        serving, security = config.serving, config.security
        self.recorder = Recorder()
        self.gate = Gate(
            config, clock=clock, recorder=self.recorder, log=self.log, notify=self._notify
        )
        self.limits = admission.Limits(
            width=config.router_config.input_dim,
            max_batch_size=security.max_batch_size,
            max_tensor_size=security.max_tensor_size,
            max_tokens=self.level.tokens_per_minute,
        )
        self.breaker = resilience.CircuitBreaker(
            resilience.BreakerPolicy(slow_seconds=serving.slow_call_seconds),
            clock=clock,
            on_transition=self._circuit_moved,
        )
        self.bulkhead = resilience.Bulkhead(workers=serving.max_inflight, queue=serving.max_queue)
        self.device = Device(
            bulkhead=self.bulkhead,
            breaker=self.breaker,
            static_top_k=serving.fallback_static_top_k,
            observe=self.recorder.observe,
            notify=self._notify,
        )
        self.system = metrics.SystemSampler()
        self.alerts = Alerts(clock, self._notify)
        self.load_error: str | None = None
        self._config_hash = config.config_hash
        self._snapshot: Snapshot | None = None
        self._host_fallback = host_fallback
        self._reloading = threading.Lock()
        self._compiled_before = compile_counter().count
        self._draining = False
        self._closed = False
        self.cache: cache.ResultCache | None = None
        self._keyer = cache.Keyer(keyed=self.level.keyed_cache)
        self._prefetcher: cache.Prefetcher | None = None
        self._hot: cache.HotInputs | None = None
        if config.performance.enable_caching:
            opening.open_cache(self)
        if background:
            threading.Thread(target=self._load_quietly, name="moe-load", daemon=True).start()
        else:
            opening.load(self)

    # --- building

    def _load_quietly(self) -> None:
        try:
            opening.load(self)
        except Exception as error:
            self.load_error = f"{type(error).__name__}: {error}"
            self.log.error("load_failed", error=self.load_error)

    # --- who asks

    @property
    def level(self) -> admission.Level:
        """The security level in force."""
        return self.gate.level

    def identify(
        self, *, api_key: str | None = None, peer: str = "unknown", forwarded_for: str | None = None
    ) -> Client:
        """The client behind a remote request.

        Args:
            api_key: what it presented, or None.
            peer: address of the connection.
            forwarded_for: the ``X-Forwarded-For`` header, believed from trusted proxies only.

        Raises:
            ServingError: ``unauthorized``: a wrong key, or none where the level asks for one. It
                counts as a violation of the address, which may be ``blocked`` for it.
        """
        return self.gate.identify(api_key, peer, forwarded_for)

    def is_admin(self, bearer: str | None) -> bool:
        """Whether this is the admin key; never where none is configured."""
        return self.gate.is_admin(bearer)

    def admit(self, client: Client, *, tokens: int = 0, requests: int = 1) -> None:
        """Counts a request, or its tokens once they are known, against the client's limits.

        Call it with the defaults before reading a body, and with ``tokens=B * S, requests=0`` once
        the size is known.

        Raises:
            ServingError: ``blocked``, ``rate_limited`` (which is a violation) or ``draining``.
        """
        self._check_open(client)
        self.gate.admit(client, tokens=tokens, requests=requests)

    def violation(self, client: Client, kind: str) -> None:
        """Counts a request that a transport refused, by its error code: in metrics, and towards a
        block where it is the client's fault.

        ``identify``, ``admit`` and ``infer`` count their own.
        """
        self.gate.violation(client, kind)

    def _check_open(self, client: Client) -> None:
        if self._closed:
            raise self.gate.refused(answering.shut(), client)

    # --- answering

    @property
    def snapshot(self) -> Snapshot:
        """What is served now. Raises ServingError ``warming`` before there is anything."""
        found = self._snapshot
        if found is None:
            raise ServingError(
                "warming", "not ready yet: loading and compiling. Try again.", retry_after=1.0
            )
        return found

    def infer(
        self,
        model: str,
        hidden_states: Any,
        *,
        token_mask: Any = None,
        return_router_logits: bool = False,
        client: Client = LOCAL,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        use_cache: bool = True,
    ) -> Result:
        """Answers for hidden states.

        Args:
            model: ``router`` (decisions) or ``moe`` (the layer's output).
            hidden_states: float32, float16 or bfloat16 [B, S, D]; routed in float32.
            token_mask: bool[B, S], False for padding; None is no padding.
            return_router_logits: whether ``router_logits`` are among the arrays.
            client: who asks.
            request_id: for logs and the answer; made up if None.
            timeout_seconds: deadline; None is the configured one. Where it is None, no ``client`` is
                named and the deadline is far off what lately ran, the work is done on the caller's own
                thread, which saves a hand-over: should the device hang in that very call, the call
                is held past its deadline. State a deadline to be let go at it.
            use_cache: whether a cached answer will do.

        Returns:
            For ``router``: expert_indices i32[B, S, K] (-1 is none), expert_weights f32[B, S, K],
            num_experts_per_token i32[B, S], complexity_scores f32[B, S], on request router_logits
            f32[B, S, E]. For ``moe``: output f32[B, S, D]. Masked tokens have no expert.

        Raises:
            ServingError: see ``moe_jax.serving.errors.CODES``.
        """
        return answering.answer(
            self, model, hidden_states, token_mask, return_router_logits, client, request_id,
            timeout_seconds, use_cache,
        )[0]  # fmt: skip

    def lookup(self, model: str, digest: str, *, client: Client = LOCAL) -> Result | None:
        """The cached answer with this digest, or None: send the hidden states then.

        ``digest`` is that of an earlier answer's ``info``. Under strict only its own client finds it.
        """
        return answering.lookup(self, model, digest, client)

    def route(
        self,
        hidden_states: Any,
        return_router_logits: bool = False,
        *,
        token_mask: Any = None,
        client: Client = LOCAL,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        use_cache: bool = True,
    ) -> dict[str, Any]:
        """The guide's ``route``: decisions for hidden states [B, S, D] as a dictionary.

        Takes the options of ``infer``. Calls in process are not limited, unless they name a
        ``client``: its limits and blocks then hold as they do for remote requests.
        """
        if client != LOCAL:
            shape = getattr(hidden_states, "shape", ())
            tokens = math.prod(int(s) for s in shape[:2]) if shape else 0
            self.admit(client, tokens=tokens)
        result, entry = answering.answer(
            self, "router", hidden_states, token_mask, return_router_logits, client, request_id,
            timeout_seconds, use_cache,
        )  # fmt: skip
        info = entry.memo.get("routing_info")
        if info is None:
            router = self.snapshot.router
            info = routing_info(entry.arrays, min_k=router.min_k, max_k=router.max_k)
            entry.memo["routing_info"] = info
        return guide_result(result, info, logits=return_router_logits)

    def _notify(self, event: str, **facts: Any) -> None:
        self.log.warning(event, **facts)

    def _circuit_moved(self, state: str) -> None:
        self.recorder.circuit(state)
        self.log.warning("circuit", state=state)

    # --- state, see describing

    @property
    def compilations(self) -> int:
        """XLA compilations in this process since this engine was built."""
        return compile_counter().count - self._compiled_before

    def readiness(self) -> tuple[bool, list[str]]:
        """Whether requests should be sent here, and if not why not: warming, params_missing,
        draining, circuit_open, overloaded."""
        reasons = []
        if self._snapshot is None:
            reasons.append("params_missing" if self.load_error else "warming")
        if self._draining:
            reasons.append("draining")
        if self.breaker.state == "open" and not self.breaker.would_admit():
            reasons.append("circuit_open")
        if self.bulkhead.full:
            reasons.append("overloaded")
        return not reasons, reasons

    def live(self) -> bool:
        """Whether restarting would not help: False for a device that is stuck or gone for good.

        Overload and an open circuit are no reason to restart.
        """
        limit = max(WATCHDOG_SECONDS, 2 * self.config.serving.request_timeout_seconds)
        stuck = self.bulkhead.oldest_seconds() > limit
        return not stuck and self.device.failing_seconds <= limit

    def describe(self, model: str) -> dict[str, Any]:
        """Metadata of a model in the words of the Open Inference Protocol."""
        snapshot = self.snapshot
        if model not in snapshot.models:
            raise answering.no_model(model, snapshot)
        return describing.metadata(snapshot, model)

    def health_check(self) -> dict[str, Any]:
        """The guide's health: status, uptime_seconds, components, configuration, memory, recent
        performance, alerts. Changes no statistic."""
        return describing.health(self)

    def check_alerts(self) -> list[dict[str, Any]]:
        """The alerts that hold now. Run every few seconds, and by ``health_check``."""
        return describing.check_alerts(self)

    def get_metrics(self) -> dict[str, Any]:
        """The guide's metrics: router_stats, cache_hit_ratio, latency percentiles, throughput ..."""
        return describing.metrics_report(self)

    def metrics_text(self) -> bytes:
        """The exposition for Prometheus."""
        return describing.exposition(self)

    def diagnostics(self) -> dict[str, Any]:
        """Everything that support needs, without secrets and tensors: plain JSON values."""
        return describing.diagnostics(self)

    def reload(self, checkpoint: str | None = None) -> dict[str, Any]:
        """Swaps in another checkpoint between two requests.

        It is loaded, compiled and tried on a canary batch first. A bad one is refused and the old
        one goes on serving.

        Args:
            checkpoint: the folder; None is the configured one, read again.

        Returns:
            version, previous, trained, source, seconds.

        Raises:
            CheckpointError, ConfigError, ValueError: it cannot be used; see the message.
            ServingError: ``internal``: it failed on the canary batch.
        """
        with self._reloading:
            return reloading.reload(self, checkpoint)

    # --- the end

    def begin_drain(self) -> None:
        """Readiness says no from now on; requests are still answered."""
        self._draining = True
        self.log.info("draining", pending=self.bulkhead.pending, inflight=self.bulkhead.inflight)

    def shutdown(self, timeout_seconds: float | None = None) -> bool:
        """Refuses new requests and waits for those under way; whether all ended. Safe to call twice.

        Args:
            timeout_seconds: how long to wait; None is the request timeout.
        """
        if self._closed:
            return True
        self._draining = True
        self._closed = True
        if timeout_seconds is None:
            timeout_seconds = self.config.serving.request_timeout_seconds
        ended = self.bulkhead.close(timeout_seconds)
        self.system.stop()
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self.cache is not None and self.cache.shared is not None:
            self.cache.shared.close()
        self.log.info("stopped", all_ended=ended)
        return ended

    def __enter__(self) -> RouterEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
