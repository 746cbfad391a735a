"""The engine: admission, cache, resilience and metrics around one snapshot.

The order of a request: shape and size, cache, values, a place on the device, circuit breaker, bucket,
compiled function, check of the output, answer. Callers apply limits and blocks first, with ``admit``.
Where the level rejects no values, they are checked while the device works (``engine.device``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.config import Config
from moe_jax.serving import admission, cache
from moe_jax.serving.engine import inference, report
from moe_jax.serving.engine.parts import build_parts
from moe_jax.serving.engine.requests import (
    LOCAL,
    Client,
    Query,
    Result,
    guide_result,
    routing_info,
)
from moe_jax.serving.engine.results import Results
from moe_jax.serving.engine.served import Served
from moe_jax.serving.engine.snapshot import Snapshot
from moe_jax.serving.errors import ServingError
from moe_jax.serving.resilience import Call

# How long a shutdown waits for a compilation. Nobody's request depends on it, and orchestrators kill
# a process that takes too long to end.
_LOADING_SECONDS = 5.0


class RouterEngine:
    """Routes hidden states behind a cache, limits, a circuit breaker and metrics.

    Built by ``RouterFactory``. Safe to use from many threads. ``with`` shuts it down.

    Args:
        config: the configuration.
        clock: monotonic clock in seconds, injectable for tests.
        background: whether to return before the weights are loaded and compiled; ``readiness`` says
            ``warming`` until then, ``params_missing`` if they cannot be loaded, or ``params_unsound``
            if they fail the canary batch.
        host_fallback: whether a failing device is covered by the host's CPU; None is wherever that
            is another device.
        logger: a structlog logger; None writes JSON lines to standard error at ``log_level``.

    Attributes:
        parts: the parts that live as long as the engine.
        results: the cached results.
        served: the model.

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
        self.parts = parts = build_parts(config, clock=clock, logger=logger)
        self.log, self.clock, self.access = parts.log, parts.clock, parts.access
        self.device, self.breaker, self.bulkhead = parts.device, parts.breaker, parts.bulkhead
        self.recorder, self.system = parts.recorder, parts.system
        self.results = Results(parts)
        self.served = Served(parts, host_fallback=host_fallback)
        self._ended = True  # whether `shutdown` saw the end of all work
        if background:
            self.served.load_in_background()
        else:
            self.served.load()
        self.system.start(self.check_alerts)

    # --- who asks

    @property
    def level(self) -> admission.Level:
        """The security level in force."""
        return self.parts.level

    def identify(
        self, *, api_key: str | None = None, peer: str = "unknown", forwarded_for: str | None = None
    ) -> Client:
        """Returns the client behind a remote request.

        Args:
            api_key: the key it presented, or None.
            peer: address of the connection.
            forwarded_for: the ``X-Forwarded-For`` header, believed from trusted proxies only.

        Raises:
            ServingError: ``unauthorized``: the key is wrong, or missing although the level requires
                one. It counts as a violation of the address, which may be ``blocked`` for it.
        """
        return self.access.identify(api_key, peer, forwarded_for)

    def is_admin(self, bearer: str | None) -> bool:
        """Returns whether this is the admin key; False if none is configured."""
        return self.access.is_admin(bearer)

    def authorize_admin(
        self, bearer: str | None, *, peer: str = "unknown", forwarded_for: str | None = None
    ) -> None:
        """Checks that a remote request presents the admin key.

        Args:
            bearer: the key that it presents, or None.
            peer: address of the connection.
            forwarded_for: the ``X-Forwarded-For`` header, believed from trusted proxies only.

        Raises:
            ServingError: ``unauthorized``: the key is wrong or missing, or the service has none. A
                wrong or missing key counts as a violation of the address. A block keeps the address
                from inference; the right admin key passes all the same.
        """
        self.access.authorize_admin(bearer, peer, forwarded_for)

    def admit(self, client: Client, *, tokens: int = 0, requests: int = 1) -> None:
        """Counts a request, or its tokens once they are known, against the client's limits.

        Call it with the defaults before reading a body, and with ``tokens=B * S, requests=0`` once
        the size is known.

        Raises:
            ServingError: ``blocked``, ``rate_limited`` (which is a violation) or ``draining``.
        """
        try:
            self.parts.lifecycle.check_open()
        except ServingError as error:
            raise self.access.refused(error, client) from None
        self.access.admit(client, tokens=tokens, requests=requests)

    def violation(self, client: Client, kind: str) -> None:
        """Counts a request that a transport refused, by its error code: in metrics, and towards a
        block if it is the client's fault.

        ``identify``, ``admit`` and ``infer`` count their own refusals.
        """
        self.access.violation(client, kind)

    # --- answers

    @property
    def snapshot(self) -> Snapshot:
        """What is served now. Raises ServingError ``warming`` before there is anything."""
        return self.served.snapshot

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
        call: Call | None = None,
    ) -> Result:
        """Returns the answer for hidden states.

        Args:
            model: ``router`` (decisions) or ``moe`` (the layer's output). Of a checkpoint with the
                layers of one model, also ``layer_3`` and the like (decisions of that layer), and
                ``layers`` (decisions of all of them).
            hidden_states: float32, float16 or bfloat16 [B, S, D], what reaches that layer; for
                ``layers`` [L, B, S, D], in the order of the layers. Routed in float32.
            token_mask: bool[B, S], False for padding; None is no padding.
            return_router_logits: whether ``router_logits`` are among the arrays.
            client: who asks.
            request_id: for logs and the answer; None draws one.
            timeout_seconds: deadline; None is the configured one. With None, no ``client`` and
                recent work far below the deadline, the work runs on the caller's thread, which
                saves a hand-over. If the device then hangs, the caller waits past the deadline.
                Pass a value to be released on time.
            use_cache: whether a cached answer will do.
            call: pass it where another thread, such as an event loop, waits for this one. The
                work is then done on the caller's thread, which saves a hand-over, and whoever waits
                calls ``call.leave()`` at the deadline.

        Returns:
            For ``router``: expert_indices i32[B, S, K] (-1 is none), expert_weights f32[B, S, K],
            num_experts_per_token i32[B, S], complexity_scores f32[B, S], on request router_logits
            f32[B, S, E]. For ``moe``: output f32[B, S, D]. For ``layers`` with a leading axis L; a
            layer of fewer experts, or fewer per token, is filled with -1, 0 and logits of -inf.
            Masked tokens have no expert.

        Raises:
            ServingError: see ``moe_jax.serving.errors.CODES``.
        """
        query = Query(
            model=model,
            hidden_states=hidden_states,
            token_mask=token_mask,
            return_router_logits=return_router_logits,
            client=client,
            request_id=request_id,
            timeout_seconds=timeout_seconds,
            use_cache=use_cache,
            call=call,
        )
        return self._answer(query)[0]

    def _answer(self, query: Query) -> tuple[Result, cache.Entry]:
        return inference.answer(self.parts, self.results, self.served, query)

    def lookup(self, model: str, digest: str, *, client: Client = LOCAL) -> Result | None:
        """Returns the cached answer with this digest, or None: send the hidden states then.

        ``digest`` is that of an earlier answer's ``info``. Under strict only the client that was
        given the answer finds it.
        """
        return inference.lookup(self.parts, self.results, self.served, model, digest, client)

    def route(
        self,
        hidden_states: Any,
        return_router_logits: bool = False,
        *,
        layer: str | None = None,
        token_mask: Any = None,
        client: Client = LOCAL,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        use_cache: bool = True,
    ) -> dict[str, Any]:
        """Returns the guide's dictionary of decisions for hidden states [B, S, D].

        ``layer`` names a layer such as ``layer_3`` where several are served; None is the first. The
        other options are those of ``infer``. Calls in process are not limited, unless they name a
        ``client``: its limits and blocks then hold as they do for remote requests.
        """
        if client != LOCAL:
            shape = getattr(hidden_states, "shape", ())
            tokens = math.prod(int(s) for s in shape[:2]) if shape else 0
            self.admit(client, tokens=tokens)
        model = "router"
        if layer is not None:
            model = self.snapshot.check_layer(layer)
        query = Query(
            model=model,
            hidden_states=hidden_states,
            token_mask=token_mask,
            return_router_logits=return_router_logits,
            client=client,
            request_id=request_id,
            timeout_seconds=timeout_seconds,
            use_cache=use_cache,
        )
        result, entry = self._answer(query)
        info = entry.memo.get("routing_info")
        if info is None:
            router = self.snapshot.router_of(model)
            info = routing_info(entry.arrays, min_k=router.min_k, max_k=router.max_k)
            entry.memo["routing_info"] = info
        return guide_result(result, info, logits=return_router_logits)

    # --- state

    @property
    def cache(self) -> cache.ResultCache | None:
        """The results in memory, or None where caching is off."""
        return self.results.cache

    @property
    def load_error(self) -> str | None:
        """Why the start failed, or None."""
        return self.served.load_error

    @property
    def cannot_start(self) -> bool:
        """Whether the weights cannot be loaded, so that only another start may help.

        False for weights that load and are unsound: a reload with another checkpoint ends that.
        """
        return self.load_error is not None and self.served.reason in (
            "params_missing",
            "misconfigured",
        )

    @property
    def compilations(self) -> int:
        """XLA compilations in this process since this engine was built."""
        return self.parts.compilations

    def readiness(self) -> tuple[bool, list[str]]:
        """Returns whether requests should be sent to this engine, and if not, why not: warming,
        params_missing, misconfigured, params_unsound, draining, circuit_open, overloaded."""
        return report.readiness(self.parts, self.served)

    def live(self) -> bool:
        """Returns False if only a restart may help: the device is stuck, or fails for good.

        Overload and an open circuit are no reason to restart.
        """
        return report.live(self.parts)

    def describe(self, model: str) -> Mapping[str, Any]:
        """Returns a model's metadata in the words of the Open Inference Protocol.

        The mapping is built once for each snapshot; do not change it.

        Raises:
            ServingError: ``not_found`` for a model that is not served; ``warming``.
        """
        snapshot = self.snapshot
        snapshot.check_model(model)
        return snapshot.metadata[model]

    def health_check(self) -> dict[str, Any]:
        """Returns the guide's health: status, uptime_seconds, components, configuration, memory,
        recent performance, alerts. Changes no statistic."""
        return report.health(self.parts, self.results, self.served)

    def check_alerts(self) -> list[dict[str, Any]]:
        """Returns the active alerts. Runs every few seconds, and in ``health_check``."""
        return report.check_alerts(self.parts)

    def get_metrics(self) -> dict[str, Any]:
        """Returns the guide's metrics: router_stats, cache_hit_ratio, latency percentiles,
        throughput and more."""
        return report.metrics_report(self.parts, self.results)

    def metrics_text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return report.exposition(self.parts, self.results, self.served)

    def diagnostics(self) -> dict[str, Any]:
        """Returns everything that support needs, without secrets and tensors: plain JSON values."""
        return report.diagnostics(self.parts, self.results, self.served)

    def reload(self, checkpoint: str | None = None) -> dict[str, Any]:
        """Replaces the served checkpoint by another one between two requests.

        The other one is loaded, compiled and tried on a canary batch first. If any step
        fails, the call raises and the old checkpoint stays in service.

        Args:
            checkpoint: the folder; None is the configured one, read again.

        Returns:
            version, previous, trained, source, seconds, rewarmed.

        Raises:
            CheckpointError, ConfigError, ValueError: it cannot be used; see the message.
            ServingError: ``internal``: the weights changed in memory.
        """
        replaced = self.served.reload(checkpoint)
        self.results.clear()
        rewarmed = inference.rewarm(self.parts, self.results, self.served)
        return {**replaced, "rewarmed": rewarmed}

    # --- the end

    def begin_drain(self) -> None:
        """Makes readiness say no, and ends a start or a reload before its next compilation.

        Requests are still answered.
        """
        self.parts.lifecycle.draining = True
        self.log.info("draining", pending=self.bulkhead.pending, inflight=self.bulkhead.inflight)

    def shutdown(self, timeout_seconds: float | None = None) -> bool:
        """Refuses new requests and waits for those under way, and for a start that still compiles.

        May be called twice.

        Args:
            timeout_seconds: how long to wait; None is the request timeout.

        Returns:
            Whether all of it ended in time. If not, threads are still in native code, and a process
            should end by ``os._exit``: normal exit of the interpreter may crash while they run.
        """
        lifecycle = self.parts.lifecycle
        if lifecycle.closed:
            return self._ended
        lifecycle.draining = lifecycle.closed = True
        if timeout_seconds is None:
            timeout_seconds = self.config.serving.request_timeout_seconds
        end = time.monotonic() + timeout_seconds
        ended = self.bulkhead.close(timeout_seconds)
        left = max(end - time.monotonic(), 0.0)
        ended &= self.served.close(min(left, _LOADING_SECONDS))
        self.system.stop()
        self.results.close()
        self._ended = ended
        self.log.info("stopped", all_ended=ended)
        return ended

    def __enter__(self) -> RouterEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
