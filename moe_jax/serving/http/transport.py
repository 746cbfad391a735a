"""What HTTP and gRPC share: the engine, worker threads, the account of bytes, texts of errors."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from moe_jax.serving.engine import Call, RouterEngine
from moe_jax.serving.errors import ServingError, out_of_memory
from moe_jax.serving.http.byte_account import ByteAccount
from moe_jax.serving.http.protocol import HEADER_LIMIT, JSON_LIMIT, ModelSpec, TensorSpec
from moe_jax.serving.http.strict_json import shown

T = TypeVar("T")

# Under strict a client learns what kind of fault it was and no more.
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
"""The version under which clients may ask for whatever is served now: Triton's versions are whole
numbers, so its clients ask for 1 where a model has one version. Answers name the fingerprint."""

# All requests and answers together, compressed bodies as what they become.
_ACCOUNT_LIMIT = 512 * 1024 * 1024
_MOST_THREADS = 512
# Beyond those that answer or wait: for requests that a full queue refuses, or makes room for.
_SPARE_THREADS = 16
# Parsing holds the interpreter's lock, so more requests at once would be no faster.
_JSON_AT_ONCE = 2


class TransportContext:
    """The engine as transports see it.

    Args:
        engine: what answers. Its configuration says who may ask and how much at once.

    Attributes:
        account: bytes of all requests and unread answers.
        body_limit: most bytes of one request.
        capacity: most inference requests that are answered or wait at once.
    """

    def __init__(self, engine: RouterEngine) -> None:
        serving, security = engine.config.serving, engine.config.security
        self.engine = engine
        self.level = engine.level
        # Four bytes an element, as FP32, and the JSON beside them.
        self.body_limit = max(
            JSON_LIMIT, min(4 * security.max_tensor_size + HEADER_LIMIT, _ACCOUNT_LIMIT // 2)
        )
        self.account = ByteAccount(_ACCOUNT_LIMIT)
        self.capacity = min(serving.max_inflight + serving.max_queue, _MOST_THREADS)
        self.json_turn = threading.BoundedSemaphore(_JSON_AT_ONCE)
        self.pending = 0
        self.draining = False
        self._workers = ThreadPoolExecutor(
            self.capacity + _SPARE_THREADS, thread_name_prefix="moe-infer"
        )
        self._models: dict[str, tuple[Mapping[str, Any], dict[str, Any], ModelSpec]] = {}
        # Probes and metrics never wait behind inference.
        self._side = ThreadPoolExecutor(2, thread_name_prefix="moe-side")

    def close(self) -> None:
        """Ends the threads, after what they are doing."""
        self._workers.shutdown(wait=True)
        self._side.shutdown(wait=True)

    # --- threads ---

    async def work(
        self, function: Callable[[], T], *, call: Call | None = None, seconds: float | None = None
    ) -> T:
        """Runs ``function`` on a worker thread and returns its result.

        Args:
            function: the work.
            call: left at the deadline, so that the work ends soon or holds up nobody else.
            seconds: deadline from now; None waits as long as the work takes.

        Raises:
            ServingError: ``queue_full`` if all threads are taken; ``deadline_exceeded``, while the
                thread still works.
        """
        if self.pending >= self.capacity + _SPARE_THREADS:
            raise ServingError(
                "queue_full",
                f"{self.pending} requests are being answered or wait. Try again soon.",
                retry_after=1.0,
            )
        self.pending += 1
        context = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(
            self._workers, lambda: context.run(function)
        )
        future.add_done_callback(self._on_done)
        done, _ = await asyncio.wait((future,), timeout=seconds)
        if done:
            try:
                return future.result()
            finally:
                # An error's traceback holds this frame, and the future holds the error: without these
                # names no cycle keeps the request's bytes until the garbage collector runs.
                del future, done
        if call is not None:
            call.leave()
        raise ServingError(
            "deadline_exceeded",
            f"expected an answer within {seconds:g} s, got none. Allow more time, or send less.",
        )

    def _on_done(self, future: asyncio.Future[Any]) -> None:
        self.pending -= 1
        if not future.cancelled():
            future.exception()  # retrieved, or asyncio would log that of a call that was left

    async def aside(self, function: Callable[..., T], *args: Any) -> T:
        """Runs ``function`` on a thread that inference never takes."""
        return await asyncio.get_running_loop().run_in_executor(self._side, lambda: function(*args))

    # --- texts ---

    def message(self, error: ServingError) -> str:
        """Returns the text of an error for a client."""
        return _TERSE[error.code] if self.level.terse_errors else error.message

    def spec(self, model: str, version: str | None = None) -> ModelSpec:
        """Returns the inputs and outputs of a model.

        Raises:
            ServingError: ``not_found`` if the model or the version is not served.
        """
        metadata, spec = self._model(model)
        if version is not None and version not in metadata["versions"]:
            raise ServingError(
                "not_found",
                f"model {model}: expected version {' or '.join(metadata['versions'])}, got "
                f"{shown(version)}. Leave it out to ask for what is served.",
            )
        return spec

    def describe(self, model: str) -> dict[str, Any]:
        """Returns ``RouterEngine.describe`` with every version that clients may ask for.

        Raises:
            ServingError: ``not_found`` if the model is not served.
        """
        return self._model(model)[0]

    def _model(self, model: str) -> tuple[dict[str, Any], ModelSpec]:
        described = self.engine.describe(model)
        cached = self._models.get(model)
        # The engine builds the metadata once for each snapshot, so another object is another model.
        if cached is None or cached[0] is not described:
            metadata = {**described, "versions": [*described["versions"], CURRENT]}
            cached = self._models[model] = described, metadata, model_spec(metadata)
        return cached[1], cached[2]


def as_serving_error(error: Exception) -> ServingError | None:
    """Returns the refusal that an exception of a transport amounts to; None if it is a defect.

    Too little memory for one request is a state of the host, as a full queue is, and no defect.
    """
    if isinstance(error, ServingError):
        return error
    if isinstance(error, MemoryError):
        return out_of_memory()
    return None


def retry_after(error: ServingError) -> str | None:
    """Returns ``Retry-After`` in whole seconds, or None.

    Example:
        >>> retry_after(ServingError("queue_full", "busy", retry_after=0.2))
        '1'
    """
    if error.retry_after is None:
        return None
    return str(max(1, math.ceil(error.retry_after)))


def model_spec(metadata: Mapping[str, Any]) -> ModelSpec:
    """Returns ``RouterEngine.describe`` as the codec reads it."""

    def tensor(entry: Mapping[str, Any]) -> TensorSpec:
        name = entry["name"]
        return TensorSpec(
            name=name,
            datatypes=_HIDDEN if name == "hidden_states" else (entry["datatype"],),
            shape=tuple(entry["shape"]),
            optional=name in _ON_REQUEST,
        )

    return ModelSpec(
        name=metadata["name"],
        inputs=(*(tensor(t) for t in metadata["inputs"] if t["name"] != "token_mask"), _MASK),
        outputs=tuple(tensor(t) for t in metadata["outputs"]),
    )
