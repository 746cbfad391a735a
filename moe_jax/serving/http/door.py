"""What every transport shares: who may ask, which threads answer, how an error is told."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.protocol import HEADER_LIMIT, JSON_LIMIT, ModelSpec, TensorSpec
from moe_jax.serving.http.request_body import Buffers
from moe_jax.serving.http.strict_json import shown

T = TypeVar("T")

# Under strict a client is told what kind of fault it was and no more.
_TERSE = {
    "malformed": "malformed request",
    "unauthorized": "an API key is required",
    "blocked": "blocked",
    "not_found": "not found",
    "method_not_allowed": "method not allowed",
    "request_timeout": "the request did not arrive in time",
    "too_large": "request too large",
    "unsupported_media_type": "unsupported media type",
    "invalid_values": "invalid values",
    "rate_limited": "too many requests",
    "internal": "internal error",
    "queue_full": "busy",
    "circuit_open": "unavailable",
    "draining": "unavailable",
    "warming": "unavailable",
    "device_error": "unavailable",
    "out_of_memory": "unavailable",
    "deadline_exceeded": "deadline exceeded",
}

_HIDDEN = ("FP32", "FP16", "BF16")
_MASK = TensorSpec(name="token_mask", datatypes=("BOOL",), shape=(-1, -1), optional=True)
_ON_REQUEST = frozenset({"router_logits"})

CURRENT = "1"
"""The version under which whatever is served now can be asked for: Triton's versions are whole
numbers, so its clients ask for 1 where a model has but one. Answers name the fingerprint."""

# Bodies of all requests together, compressed ones as what they become.
_BUFFER_LIMIT = 512 * 1024 * 1024
_MOST_THREADS = 512
# Parsing holds the interpreter's lock, so that more at once would be no faster.
_JSON_AT_ONCE = 2


class Door:
    """The engine as transports see it.

    Args:
        engine: what answers. Its configuration says who may ask and how much at once.
    """

    def __init__(self, engine: RouterEngine) -> None:
        serving, security = engine.config.serving, engine.config.security
        self.engine = engine
        self.level = engine.level
        # Four bytes an element, as FP32, and the JSON beside them.
        self.body_limit = max(
            JSON_LIMIT, min(4 * security.max_tensor_size + HEADER_LIMIT, _BUFFER_LIMIT // 2)
        )
        self.buffers = Buffers(_BUFFER_LIMIT)
        self.capacity = min(serving.max_inflight + serving.max_queue, _MOST_THREADS)
        self.json_turn = threading.BoundedSemaphore(_JSON_AT_ONCE)
        self.pending = 0
        self.draining = False
        self._workers = ThreadPoolExecutor(self.capacity, thread_name_prefix="moe-infer")
        # Probes and metrics never wait behind inference.
        self._side = ThreadPoolExecutor(2, thread_name_prefix="moe-side")

    def close(self) -> None:
        """Ends the threads, after what they are doing."""
        self._workers.shutdown(wait=True)
        self._side.shutdown(wait=True)

    # --- who asks ---

    def require_admin(self, peer: str | None, key: str | None) -> None:
        """Raises ``unauthorized`` unless the admin key was given.

        Without an admin key, and not under strict, requests from the machine itself are trusted.
        """
        if self.engine.is_admin(key):
            return
        if self.engine.config.serving.admin_key:
            told = "expected the admin key as a bearer token."
        elif self.level.api_key_required or peer not in ("127.0.0.1", "::1"):
            told = "this service has no admin key: its operator sets MOE_ADMIN_KEY."
        else:
            return
        raise ServingError("unauthorized", told)

    # --- who answers ---

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Runs ``function`` on a worker thread; refuses with ``queue_full`` where all are taken."""
        if self.pending >= self.capacity:
            raise ServingError(
                "queue_full",
                f"{self.pending} requests are being answered or wait. Try again soon.",
                retry_after=1.0,
            )
        self.pending += 1
        context = contextvars.copy_context()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._workers, lambda: context.run(function, *args)
            )
        finally:
            self.pending -= 1

    async def aside(self, function: Callable[..., T], *args: Any) -> T:
        """Runs ``function`` on a thread that inference never takes."""
        return await asyncio.get_running_loop().run_in_executor(self._side, lambda: function(*args))

    # --- what is said ---

    def told(self, error: ServingError) -> str:
        """The error's text for a client."""
        return _TERSE[error.code] if self.level.terse_errors else error.message

    def spec(self, model: str, version: str | None = None) -> ModelSpec:
        """What a model takes and gives.

        Raises:
            ServingError: ``not_found`` for a model or a version that is not served.
        """
        described = self.describe(model)
        if version is not None and version not in described["versions"]:
            raise ServingError(
                "not_found",
                f"model {model}: expected version {' or '.join(described['versions'])}, got "
                f"{shown(version)}. Leave it out to ask what is served.",
            )
        return model_spec(described)

    def describe(self, model: str) -> dict[str, Any]:
        """``RouterEngine.describe`` with every version that may be asked for.

        Raises:
            ServingError: ``not_found`` for a model that is not served.
        """
        described = self.engine.describe(model)
        return {**described, "versions": [*described["versions"], CURRENT]}


def retry_after(error: ServingError) -> str | None:
    """``Retry-After`` in whole seconds, or None.

    Example:
        >>> retry_after(ServingError("queue_full", "busy", retry_after=0.2))
        '1'
    """
    if error.retry_after is None:
        return None
    return str(max(1, math.ceil(error.retry_after)))


def model_spec(described: dict[str, Any]) -> ModelSpec:
    """``RouterEngine.describe`` as the codec wants it."""

    def tensor(told: dict[str, Any]) -> TensorSpec:
        name = told["name"]
        return TensorSpec(
            name=name,
            datatypes=_HIDDEN if name == "hidden_states" else (told["datatype"],),
            shape=tuple(told["shape"]),
            optional=name in _ON_REQUEST,
        )

    return ModelSpec(
        name=described["name"],
        inputs=(*(tensor(t) for t in described["inputs"] if t["name"] != "token_mask"), _MASK),
        outputs=tuple(tensor(t) for t in described["outputs"]),
    )
