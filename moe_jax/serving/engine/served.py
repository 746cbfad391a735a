"""The model that an engine serves: its start, its reloads, and the check that both must pass."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import moe_jax
from moe_jax.checkpoint import CheckpointError
from moe_jax.checkpoint.description import set_otherwise
from moe_jax.checkpoint.layers import natural_order, rule_of
from moe_jax.config import ConfigError
from moe_jax.routers import RandomSkip
from moe_jax.serving import admission, metrics
from moe_jax.serving.engine.parts import Parts
from moe_jax.serving.engine.snapshot import Snapshot, build_snapshot, version_of
from moe_jax.serving.engine.weights import Weights, load_weights
from moe_jax.serving.errors import CODES, ServingError

_CANARY_TOKENS = 64
_PROGRESS_SECONDS = 10.0  # between two log lines of a start
_STILL_CONFIGURED = (
    "MOE_CHECKPOINT still leads to the refused checkpoint, and the next start would read it. Run "
    "moe-jax rollback RELEASES, or put a good checkpoint there."
)


class UnsoundWeights(CheckpointError):
    """Raised for weights that load and give unsound answers."""


class Served:
    """Holds the current snapshot, and replaces it between two requests.

    Args:
        parts: configuration, log, recorder and samplers are used.
        host_fallback: whether a failing device is covered by the host's CPU; None is wherever that
            is another device.

    Attributes:
        current: the snapshot that answers; None before the first one is ready.
        limits: size limits of a request, with the width of what is served.
        load_error: why the start failed, or None.
        reason: the word of ``readiness`` while nothing is served: ``warming``, ``params_missing``
            (they cannot be loaded), ``misconfigured`` (a setting rules them out) or
            ``params_unsound`` (they fail the canary batch).
    """

    def __init__(self, parts: Parts, *, host_fallback: bool | None) -> None:
        self.current: Snapshot | None = None
        self.limits: admission.Limits = parts.limits
        self.load_error: str | None = None
        self.reason = "warming"
        self._parts = parts
        self._host_fallback = host_fallback
        self._replacing = threading.Lock()
        self._loader: threading.Thread | None = None

    @property
    def snapshot(self) -> Snapshot:
        """What is served now. Raises ServingError ``warming`` before there is anything."""
        current = self.current
        if current is not None:
            return current
        if self.load_error is None:
            text = "not ready yet: loading and compiling. Try again."
        else:
            text = "not ready: the weights cannot be served, see /health. Ask another instance."
        raise ServingError("warming", text, retry_after=1.0)

    # --- start

    def load(self) -> None:
        """Loads, compiles and checks what is configured, then serves it.

        Raises:
            ConfigError, CheckpointError, ValueError: what is configured cannot be served.
        """
        start = time.perf_counter()
        parts = self._parts
        snapshot = self._prepared(None)
        self._open_metrics(snapshot)
        self._serve(snapshot)
        parts.system.mark_ready()
        parts.log.info(
            "engine_ready",
            **snapshot.ids(),
            router=type(snapshot.router).__name__,
            layer=snapshot.weights.name,
            chosen_by=snapshot.weights.chosen_by,
            trained=snapshot.trained,
            models=sorted(snapshot.names, key=natural_order),
            backend=jax.default_backend(),
            seconds=round(time.perf_counter() - start, 3),
        )
        self._log_hints(snapshot)

    def _open_metrics(self, snapshot: Snapshot) -> None:
        parts = self._parts
        if parts.recorder.exporter is None and parts.config.performance.enable_monitoring:
            experts = snapshot.num_experts
            parts.recorder.open(
                metrics.Exporter(
                    num_experts=experts, codes=tuple(CODES), build=_build_of(snapshot)
                ),
                # A reload may bring another largest k, so there is room for any.
                metrics.Traffic(num_experts=experts, max_k=experts, clock=parts.clock),
            )
        # Also after a reload, which may bring the first checkpoint, and with it several layers.
        layers = snapshot.layers.items()
        parts.recorder.track({name: layer.router.num_experts for name, layer in layers})

    def load_in_background(self) -> None:
        """Starts ``load`` on a thread; ``load_error`` says why it failed."""
        self._loader = threading.Thread(target=self._load_quietly, name="moe-load", daemon=True)
        self._loader.start()

    def _load_quietly(self) -> None:
        try:
            self.load()
        except Exception as error:
            if self._parts.lifecycle.draining:
                self._parts.log.info("load_stopped")
                return
            self.reason = "params_missing"
            if isinstance(error, UnsoundWeights):
                self.reason = "params_unsound"
            elif isinstance(error, ConfigError):
                self.reason = "misconfigured"
            # The library's messages are whole sentences; of another error the class says the most.
            own = isinstance(error, CheckpointError | ConfigError)
            self.load_error = str(error) if own else f"{type(error).__name__}: {error}"
            self._parts.log.error("load_failed", reason=self.reason, error=self.load_error)

    def close(self, timeout_seconds: float) -> bool:
        """Waits for the thread that loads the first snapshot; returns whether it ended in time.

        A compilation cannot be cancelled, but once the engine drains no further one begins. A thread
        that is still in XLA's code when the interpreter ends crashes the process.
        """
        loader = self._loader
        if loader is None or loader is threading.current_thread():
            return True
        loader.join(timeout_seconds)
        return not loader.is_alive()

    def _prepared(self, checkpoint: str | None) -> Snapshot:
        """Returns a snapshot that is loaded, compiled and has passed the canary batch."""
        config = self._parts.config
        self._parts.log.info("loading", checkpoint=checkpoint or config.serving.checkpoint or None)
        weights = load_weights(config, checkpoint)
        self._check_stop()
        snapshot = build_snapshot(config, weights, host_fallback=self._host_fallback)
        if self.current is not None:
            _check_compatible(self.current, snapshot)
        snapshot.warm(self._check_stop, self._progress())
        check_canary(snapshot)
        return snapshot

    def _progress(self) -> Callable[[int, int], None]:
        """Returns a function that logs how many programs are compiled, at most every ten seconds."""
        logged_at = -math.inf

        def progress(compiled: int, total: int) -> None:
            nonlocal logged_at
            if time.monotonic() - logged_at >= _PROGRESS_SECONDS:
                logged_at = time.monotonic()
                self._parts.log.info("compiling", compiled=compiled, total=total)

        return progress

    def _check_stop(self) -> None:
        if self._parts.lifecycle.draining:
            raise ServingError(
                "draining", "shutting down, so nothing is loaded. Ask another instance."
            )

    def _serve(self, snapshot: Snapshot) -> None:
        self.limits = dataclasses.replace(self.limits, width=snapshot.width)
        self.current = snapshot
        self.load_error = None

    def _log_hints(self, snapshot: Snapshot) -> None:
        """Logs where what is served differs from what the operator may expect."""
        log, config = self._parts.log, self._parts.config
        differing = set_otherwise(config, snapshot.served_as()) if snapshot.trained else {}
        if differing:
            log.warning(
                "configuration_superseded",
                hint="the checkpoint's values of these settings of router_config are in force, not "
                "the configured ones. Configure the checkpoint's values.",
                served=differing,
            )
        weights = snapshot.weights
        routed = {weights.name, *(layer.name for layer in weights.layers.values())}
        others = [name for name in weights.names if name not in routed]
        if isinstance(snapshot.router, RandomSkip):
            log.warning(
                "control_served",
                hint="this router is a control: it drops experts by chance, to compare rules with. Set "
                "MOE_CHECKPOINT_ROUTER to a rule or a router of moe-jax inspect.",
                serving=weights.name,
            )
        if others and not config.serving.checkpoint_router:
            log.info(
                "serving_one_rule",
                hint=_other_routers(weights),
                serving=snapshot.weights.name,
                others=others[:32],
            )
        if snapshot.trained and "moe" not in snapshot.models and config.serving.serve_moe != "off":
            log.info(
                "moe_not_served",
                hint="the checkpoint has no experts, or its metadata does not say what they are: "
                'experts={"activation": ..., "gated": ...}.',
            )
        if not snapshot.trained:
            write = log.error if config.environment == "production" else log.warning
            write(
                "untrained_weights",
                hint="serving random weights from a seed. Set MOE_CHECKPOINT to a folder that "
                "moe-jax train or moe-jax calibrate wrote.",
                seed=config.serving.seed,
            )

    # --- reload

    def reload(self, checkpoint: str | None) -> dict[str, Any]:
        """Replaces the snapshot by another checkpoint's, see ``RouterEngine.reload``.

        After a start that failed there is no snapshot yet, and a good checkpoint ends that.
        """
        with self._replacing:
            start = time.perf_counter()
            old = self.snapshot if self.load_error is None else self.current
            previous = None if old is None else old.served_version
            log = self._parts.log
            try:
                new = self._prepared(checkpoint)
            except Exception as error:
                # The next start reads the configured folder, which holds what was refused.
                hint = {} if checkpoint is not None else {"hint": _STILL_CONFIGURED}
                log.error(
                    "reload_refused",
                    checkpoint=checkpoint,
                    serving=previous,
                    error=f"{type(error).__name__}: {error}",
                    **hint,
                )
                raise
            self._open_metrics(new)
            self._serve(new)
            self._parts.recorder.relabel(_build_of(new))
            seconds = time.perf_counter() - start
            log.info(
                "reloaded",
                **new.ids(),
                previous=previous,
                layer=new.weights.name,
                trained=new.trained,
                seconds=round(seconds, 3),
            )
            return {
                **new.ids(),
                "previous": previous,
                "trained": new.trained,
                "source": new.weights.source,
                "seconds": seconds,
            }


def _other_routers(weights: Weights) -> str:
    """Returns how to serve another router of a checkpoint, with names that it has."""
    rules = [rule for rule in weights.rules if rule != rule_of(weights.name)]
    rule = f"a rule, such as {rules[0]}, to serve all layers of it, or to " if rules else ""
    return (
        f"the checkpoint has further routers. Set MOE_CHECKPOINT_ROUTER to {rule}a router to serve it "
        "alone."
    )


def _build_of(snapshot: Snapshot) -> dict[str, str]:
    """Returns the labels of ``moe_build_info``."""
    return {
        "version": moe_jax.__version__,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "params": snapshot.served_version if snapshot.trained else f"untrained-{snapshot.version}",
    }


def _check_compatible(old: Snapshot, new: Snapshot) -> None:
    """Raises CheckpointError if a client that the old snapshot answers would be refused by the new."""
    # Nobody relies on seeded experts, so a checkpoint may replace them without having any.
    before, after = (sorted(snapshot.names, key=natural_order) for snapshot in (old, new))
    for name, expected, got in (
        ("width (input_dim)", old.width, new.width),
        ("num_experts", old.num_experts, new.num_experts),
        ("models", before if old.trained else after, after),
    ):
        if expected != got:
            raise CheckpointError(
                f"reload: expected {name} {expected} as it is served now, got {got}. Start another "
                "instance for it instead."
            )


def check_canary(snapshot: Snapshot) -> None:
    """Routes a seeded batch and checks the answers, and that the weights are those that were loaded.

    Raises:
        UnsoundWeights: an answer is unsound.
        ServingError: ``internal``: the weights changed in memory.
    """
    if version_of(snapshot.weights) != snapshot.version:
        raise ServingError("internal", "the weights changed in memory while they were loaded.")
    shape = (_CANARY_TOKENS, snapshot.width)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    problems = []
    for model in snapshot.models:
        if model != "moe":
            layer = "" if model == "router" else f"{model}: "
            problems += [layer + problem for problem in _unsound(snapshot, model, x)]
    if (
        "moe" in snapshot.models
        and not np.isfinite(snapshot.models["moe"].run(x, None)["output"]).all()
    ):
        problems.append("outputs of experts that are not finite")
    if problems:
        raise UnsoundWeights(
            f"weights from {snapshot.weights.source}: expected sound answers to a canary batch, got "
            f"{'; '.join(problems)}. They are not served; calibrate or train again."
        )


def _unsound(snapshot: Snapshot, model: str, x: np.ndarray) -> list[str]:
    """Returns what is wrong with a router's decisions for tokens x f32[T, D]."""
    router = snapshot.router_of(model)
    outputs = snapshot.models[model].run(x, None, logits=True)
    indices, weights = outputs["expert_indices"], outputs["expert_weights"]
    counts = outputs["num_experts_per_token"]
    problems = []
    if not all(np.isfinite(outputs[name]).all() for name in ("expert_weights", "router_logits")):
        problems.append("values that are not finite")
    if ((indices < -1) | (indices >= router.num_experts)).any():
        problems.append("experts that do not exist")
    if (counts < router.min_k).any() or (counts > router.max_k).any():
        problems.append(f"experts per token outside of {router.min_k} to {router.max_k}")
    if not ((weights >= 0).all() and (weights[indices < 0] == 0).all()):
        problems.append("weights that are negative or of no expert")
    return problems
