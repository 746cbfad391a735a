"""The engine: admission, cache, resilience and metrics around one snapshot.

The order of a request: shape and size, cache, values, a place on the device, circuit breaker, bucket,
compiled function, check of the output, answer. Limits and blocks come before all of it, by ``admit``.
"""

from __future__ import annotations

import functools
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import moe_jax
from moe_jax.config import Config
from moe_jax.serving import admission, cache, metrics, resilience
from moe_jax.serving.engine import describing, reloading
from moe_jax.serving.engine.alerts import Alerts
from moe_jax.serving.engine.buckets import compile_counter
from moe_jax.serving.engine.device import Device, Order
from moe_jax.serving.engine.gate import Gate
from moe_jax.serving.engine.logs import make_logger
from moe_jax.serving.engine.recording import Recorder
from moe_jax.serving.engine.requests import LOCAL, Client, Result, guide_result
from moe_jax.serving.engine.snapshot import Snapshot, build_snapshot, load_weights
from moe_jax.serving.errors import CODES, ServingError

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
        logger: a structlog logger; None writes JSON lines to standard output at ``log_level``.

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
        self.log = make_logger(config.log_level) if logger is None else logger
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
            self._open_cache()
        if background:
            threading.Thread(target=self._load_quietly, name="moe-load", daemon=True).start()
        else:
            self._load()

    # --- building

    def _open_cache(self) -> None:
        serving, performance = self.config.serving, self.config.performance
        shared = None
        if serving.redis_url:
            shared = cache.SharedCache(
                serving.redis_url, ttl_seconds=performance.cache_ttl_seconds,
                clock=self.clock, notify=self._notify,
            )  # fmt: skip
            # Replicas that share results must give a request the same name.
            secret = shared.secret()
            self._keyer = cache.Keyer(keyed=self.level.keyed_cache, secret=secret)
        self.cache = found = cache.ResultCache(
            max_entries=performance.cache_size,
            max_bytes=serving.cache_max_bytes,
            ttl_seconds=performance.cache_ttl_seconds,
            clock=self.clock,
            shared=shared,
            on_found=lambda digest: self._prefetcher.found(digest) if self._prefetcher else None,
        )
        if not serving.prefetch:
            return
        self._hot = cache.HotInputs()
        if shared is not None:

            def bring(digest: str) -> bool:
                entry = shared.get(digest)
                if entry is not None:
                    found.put(digest, entry)
                return entry is not None

            self._prefetcher = cache.Prefetcher(bring, lambda d: found.peek(d) is not None)

    def _load_quietly(self) -> None:
        try:
            self._load()
        except Exception as error:
            self.load_error = f"{type(error).__name__}: {error}"
            self.log.error("load_failed", error=self.load_error)

    def _load(self) -> None:
        start = time.perf_counter()
        weights = load_weights(self.config)
        snapshot = build_snapshot(self.config, weights, host_fallback=self._host_fallback)
        snapshot.warm()
        router = snapshot.router
        if self.config.performance.enable_monitoring:
            experts = router.num_experts
            self.recorder.open(
                metrics.Exporter(
                    num_experts=experts, codes=tuple(CODES), build=self.build_of(snapshot)
                ),
                # A reload may bring another largest k, so there is room for any.
                metrics.Traffic(num_experts=experts, max_k=experts, clock=self.clock),
            )
        self.system.sample()
        self.limits = admission.Limits(
            width=snapshot.width,
            max_batch_size=self.limits.max_batch_size,
            max_tensor_size=self.limits.max_tensor_size,
            max_tokens=self.limits.max_tokens,
        )
        self._snapshot = snapshot
        self.system.start(self.check_alerts)
        self.log.info(
            "engine_ready", version=snapshot.version, router=type(router).__name__,
            trained=snapshot.trained, models=sorted(snapshot.models), backend=jax.default_backend(),
            seconds=round(time.perf_counter() - start, 3),
        )  # fmt: skip
        if not snapshot.trained:
            self.log.warning(
                "untrained_weights",
                told="serving seeded weights that nobody trained. Set MOE_CHECKPOINT to a folder "
                "from moe-jax train or calibrate.",
                seed=self.config.serving.seed,
            )

    def build_of(self, snapshot: Snapshot) -> dict[str, str]:
        """The labels of ``moe_build_info``."""
        return {
            "version": moe_jax.__version__,
            "jax": jax.__version__,
            "backend": jax.default_backend(),
            "params": snapshot.version if snapshot.trained else f"untrained-{snapshot.version}",
        }

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
        """Counts a request that a transport refused, by its error code.

        ``identify``, ``admit`` and ``infer`` count their own.
        """
        self.gate.violation(client, kind)

    def _check_open(self, client: Client) -> None:
        if self._closed:
            raise self.gate.refused(_shut(), client)

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
            timeout_seconds: deadline; None is the configured one.
            use_cache: whether a cached answer will do.

        Returns:
            For ``router``: expert_indices i32[B, S, K] (-1 is none), expert_weights f32[B, S, K],
            num_experts_per_token i32[B, S], complexity_scores f32[B, S], on request router_logits
            f32[B, S, E]. For ``moe``: output f32[B, S, D]. Masked tokens have no expert.

        Raises:
            ServingError: see ``moe_jax.serving.errors.CODES``.
        """
        start = time.perf_counter()
        request_id = request_id or secrets.token_hex(8)
        try:
            entry, result, digest = self._infer(
                model, hidden_states, token_mask, return_router_logits, client, timeout_seconds,
                use_cache, start,
            )  # fmt: skip
        except Exception as error:
            raise self._failed(error, client, request_id, start) from error.__cause__
        seconds = time.perf_counter() - start
        self.recorder.answered(entry, seconds)
        self.log.debug(
            "answered", request_id=request_id, model=model, shape=list(hidden_states.shape),
            result=result, ms=round(1e3 * seconds, 3),
        )  # fmt: skip
        return self._result(entry, request_id, 1e3 * seconds, result, digest)

    def _infer(
        self, model: str, hidden_states: Any, token_mask: Any, logits: bool, client: Client,
        timeout: float | None, use_cache: bool, start: float,
    ) -> tuple[cache.Entry, str, str]:  # fmt: skip
        if self._closed:
            raise _shut()
        snapshot = self.snapshot
        if model not in snapshot.models:
            raise _no_model(model, snapshot)
        admission.check_array(hidden_states, self.limits)
        batch, sequence, width = (int(s) for s in hidden_states.shape)
        x = np.ascontiguousarray(hidden_states)
        mask = None
        if token_mask is not None:
            mask = admission.check_mask(token_mask, x.shape)
        allowed = self.config.serving.request_timeout_seconds
        deadline = start + (allowed if timeout is None else min(timeout, allowed))
        owner = client.id if self.level.keyed_cache else ""
        digest = functools.cache(
            lambda: self._keyer.digest(
                (snapshot.version, self._config_hash, model, logits), x, mask, client=client.id
            )
        )

        def compute() -> cache.Entry:
            flat = x.reshape(-1, width)
            rows = flat if flat.dtype == np.float32 else flat.astype(np.float32)
            order = Order(
                snapshot=snapshot, model=model, shape=(batch, sequence), logits=logits,
                checked=self._check_values(rows, mask), deadline=deadline, owner=owner,
            )  # fmt: skip
            return self.device.answer(order, self._cached(digest, snapshot, client))

        found = self.cache
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
        if self._hot is not None and result == "hit":
            self._hot.hit(name, x, (model, mask, logits, client))
        if self._prefetcher is not None:
            self._prefetcher.asked(client.id, name)
        return entry, result, name

    def _check_values(self, rows: np.ndarray, mask: np.ndarray | None) -> admission.Checked:
        flat_mask = None if mask is None else mask.reshape(-1)
        if not self.config.security.enable_validation:
            return admission.Checked(x=rows, token_mask=flat_mask)
        return admission.check_values(
            rows, flat_mask, nonfinite=self.level.nonfinite, magnitude=self.level.magnitude,
            max_magnitude=self.config.serving.max_magnitude,
        )  # fmt: skip

    def _cached(
        self, digest: Callable[[], str], snapshot: Snapshot, client: Client
    ) -> Callable[[], cache.Entry | None]:
        """The cached answer of the same version, for when the device fails."""

        def look() -> cache.Entry | None:
            entry = None if self.cache is None else self.cache.peek(digest())
            if entry is None or entry.version != snapshot.version:
                return None
            return entry if entry.owner in ("", client.id) else None

        return look

    def lookup(self, model: str, digest: str, *, client: Client = LOCAL) -> Result | None:
        """The cached answer with this digest, or None: send the hidden states then.

        ``digest`` is that of an earlier answer's ``info``. Under strict only its own client finds it.
        """
        start = time.perf_counter()
        snapshot = self.snapshot
        if model not in snapshot.models:
            raise self.gate.refused(_no_model(model, snapshot), client)
        if self.cache is None or len(digest) != 32:
            return None
        entry = self.cache.find(digest)
        right = "output" if model == "moe" else "expert_indices"
        if (
            entry is None
            or entry.version != snapshot.version
            or entry.owner not in ("", client.id)
            or right not in entry.arrays
        ):
            return None
        seconds = time.perf_counter() - start
        self.recorder.answered(entry, seconds)
        return self._result(entry, secrets.token_hex(8), 1e3 * seconds, "hit", digest)

    def route(
        self, hidden_states: Any, return_router_logits: bool = False, **options: Any
    ) -> dict[str, Any]:
        """The guide's ``route``: decisions for hidden states [B, S, D] as a dictionary.

        Takes the options of ``infer``. Calls in process are not limited, unless they name a
        ``client``: its limits and blocks then hold as they do for remote requests.
        """
        client = options.get("client", LOCAL)
        if client != LOCAL:
            shape = getattr(hidden_states, "shape", ())
            tokens = int(np.prod([int(s) for s in shape[:2]], dtype=object)) if shape else 0
            self.admit(client, tokens=tokens)
        result = self.infer(
            "router", hidden_states, return_router_logits=return_router_logits, **options
        )
        router = self.snapshot.router
        return guide_result(
            result, min_k=router.min_k, max_k=router.max_k, num_experts=router.num_experts,
            logits=return_router_logits,
        )  # fmt: skip

    def _result(
        self, entry: cache.Entry, request_id: str, ms: float, result: str, digest: str
    ) -> Result:
        about = entry.about
        info = {
            "request_id": request_id,
            "processing_time_ms": ms,
            "router_health": "healthy" if self.breaker.state == "closed" else "degraded",
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
        self, model: str, x: np.ndarray, mask: np.ndarray | None, logits: bool, client: Client
    ) -> None:
        """Computes an answer into the cache; no request of anybody's, so no statistic counts it."""
        snapshot, found = self.snapshot, self.cache
        if found is None:
            return
        flat = x.reshape(-1, x.shape[-1]).astype(np.float32, copy=False)
        order = Order(
            snapshot=snapshot, model=model, shape=(x.shape[0], x.shape[1]), logits=logits,
            checked=self._check_values(flat, mask), owner=client.id if self._keyer.keyed else "",
            deadline=time.perf_counter() + self.config.serving.request_timeout_seconds,
        )  # fmt: skip
        entry = self.device.answer(order, lambda: None)
        if entry.cacheable:
            parts = (snapshot.version, self._config_hash, model, logits)
            found.put(self._keyer.digest(parts, x, mask, client=client.id), entry)

    def _failed(
        self, error: Exception, client: Client, request_id: str, start: float
    ) -> ServingError:
        """Records a failure; what is not a refusal becomes ``internal`` and keeps its traceback in the
        log, not in the answer."""
        if not isinstance(error, ServingError):
            self.log.error("internal_error", request_id=request_id, exc_info=error)
            error = ServingError(
                "internal",
                f"a fault of ours ({type(error).__name__}). The operator's log has it under "
                f"request id {request_id}.",
            )
        self.gate.refused(error, client)
        if error.status >= 500:
            self.recorder.failed(time.perf_counter() - start)
        told = self.log.warning if error.status >= 500 else self.log.info
        told(
            "refused", request_id=request_id, code=error.code, status=error.status,
            client=client.id, message=error.message,
        )  # fmt: skip
        return error

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
            raise _no_model(model, snapshot)
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


def _shut() -> ServingError:
    return ServingError("draining", "shutting down. Ask another instance.", retry_after=1)


def _no_model(model: str, snapshot: Snapshot) -> ServingError:
    hint = "" if "moe" in snapshot.models else " MOE_SERVE_MOE=on serves moe."
    return ServingError(
        "not_found",
        f"model: expected one of {', '.join(snapshot.models)}, got {str(model)[:64]!r}.{hint}",
    )
