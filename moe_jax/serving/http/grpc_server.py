"""gRPC, optional: the same engine, limits and errors behind the protocol's gRPC service.

A call is identified and admitted by its metadata. Only then is its message received, for which the
largest size is taken from the account of bytes first, because gRPC does not say how long a message
is until it is there. Messages stay bytes until the client's limits are checked, as over HTTP.
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import grpc
import numpy as np
from google.protobuf.message import DecodeError

import moe_jax
from moe_jax.serving.engine import Client
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.app import EXTENSIONS, SERVER_NAME
from moe_jax.serving.http.byte_account import Lease, Turns
from moe_jax.serving.http.connection import MIN_RATE, WRITE_SECONDS
from moe_jax.serving.http.datatypes import DATATYPES, NO_JSON, datatype_of
from moe_jax.serving.http.deadlines import Deadlines
from moe_jax.serving.http.grpc_messages import MESSAGES, SERVICE, split_raw_contents
from moe_jax.serving.http.infer import facts, run
from moe_jax.serving.http.protocol import (
    InferRequest,
    ModelSpec,
    check_classification,
    check_names,
    check_tensor,
    from_buffer,
    request_timeout,
)
from moe_jax.serving.http.request_headers import presented_key, request_id
from moe_jax.serving.http.strict_json import malformed, shown
from moe_jax.serving.http.transport import TransportContext, as_serving_error, retry_after

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
# Threads beyond those of inference, so that probes are answered while it is busy.
_SPARE_THREADS = 4
# Lists whose lines are joined; of any other key of metadata one line must come.
_JOINED_KEYS = frozenset({"x-forwarded-for"})
_ONCE_KEYS = frozenset({"authorization", "x-api-key"})


def grpc_address(host: str, port: int) -> str:
    """Returns ``host:port`` as gRPC reads it: an IPv6 address goes in brackets.

    Example:
        >>> grpc_address("127.0.0.1", 80), grpc_address("::1", 80), grpc_address("[::1]", 80)
        ('127.0.0.1:80', '[::1]:80', '[::1]:80')
    """
    try:
        is_version_6 = ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        is_version_6 = False
    return f"[{host}]:{port}" if is_version_6 else f"{host}:{port}"


class GrpcServer:
    """The gRPC service on its own port.

    Args:
        transport: what it shares with HTTP.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.

    Attributes:
        port: the port in use.

    Raises:
        ValueError: nothing can listen there.
    """

    def __init__(self, transport: TransportContext, host: str, port: int) -> None:
        self.transport = transport
        self._turns = Turns()
        self._deadlines = Deadlines()
        self._calls = threading.BoundedSemaphore(transport.capacity)
        threads = transport.capacity + _SPARE_THREADS
        self._server = grpc.server(
            ThreadPoolExecutor(threads, thread_name_prefix="moe-grpc"),
            maximum_concurrent_rpcs=threads,
            options=[
                ("grpc.max_receive_message_length", transport.body_limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", threads),
                ("grpc.so_reuseport", 0),
            ],
        )
        # To gRPC every method takes a stream, which has the same form on the wire for one message:
        # its handler is called before the message is received, and can refuse it unread.
        handlers = {
            name: grpc.stream_unary_rpc_method_handler(self._handler(name, method))
            for name, method in _METHODS.items()
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        address = grpc_address(host, port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ValueError(
                f"{address}: expected an address where gRPC can listen. Give another --host or "
                "--grpc-port."
            ) from error

    def start(self) -> None:
        """Starts taking requests."""
        self._server.start()

    def stop(self, seconds: float) -> threading.Event:
        """Takes no more requests; those in flight have ``seconds``. The event is set at the end."""
        ended = self._server.stop(seconds)
        self._deadlines.close()
        return ended

    def _handler(self, name: str, method: _Method) -> Callable[[Iterator[bytes], Any], bytes]:
        def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            call: GrpcCall | None = None
            try:
                call = GrpcCall(self.transport, context)
                return self._answer(name, method, call, messages)
            except Exception as error:
                refusal = self._refusal(name, call, error, context)
                if refusal is None:
                    raise  # the client has cancelled the call: nobody waits for an answer
            # The error itself is not kept: its traceback holds this frame, and the message in the
            # frames below, until the collector of cycles finds them.
            context.abort(*refusal)
            raise AssertionError("unreachable")

        return handle

    def _refusal(
        self, name: str, call: GrpcCall | None, error: Exception, context: grpc.ServicerContext
    ) -> tuple[grpc.StatusCode, str] | None:
        """Returns the status and text of a refusal, and sets its trailing metadata; None if the call
        was cancelled."""
        if isinstance(error, DecodeError):
            refusal = malformed("the message: expected the protocol's, got other bytes.")
        else:
            refusal = as_serving_error(error)
        if refusal is None:
            if not context.is_active():
                return None
            self.transport.engine.log.exception("failed", method=name)
            refusal = ServingError("internal", "an internal error, which is in the log.")
        if call is not None and call.refuses:
            self.transport.engine.violation(call.client(), refusal.code)
        trailing = [("moe-code", refusal.code)]
        if (seconds := retry_after(refusal)) is not None:
            trailing.append(("retry-after", seconds))
        context.set_trailing_metadata(tuple(trailing))
        return _CODES[refusal.status], self.transport.message(refusal)

    def _answer(
        self, name: str, method: _Method, call: GrpcCall, messages: Iterator[bytes]
    ) -> bytes:
        """Returns the serialized answer of a call."""
        if name in _UNREAD:
            return method(call, None).SerializeToString()
        # A probe of readiness needs no key, as over HTTP.
        if name != "ModelReady" or call.key or not self.transport.level.api_key_required:
            call.admit(requests=int(name in _LIMITED))
        if not self._calls.acquire(blocking=False):
            raise ServingError(
                "queue_full",
                f"{self.transport.capacity} requests are being answered or wait. Try again soon.",
                retry_after=1.0,
            )
        lease = self.transport.account.lease()
        try:
            data = self._receive(call, messages, lease)
            raw: list[memoryview] = []
            if name in _LIMITED:
                # Without a copy of the tensors, which may be nearly all of the message.
                data, raw = split_raw_contents(data)
            request = MESSAGES[f"{name}Request"].FromString(bytes(data))
            call.raw_contents = raw
            answer = method(call, request).SerializeToString()
            del data, raw, request
            call.raw_contents = []
            lease.keep(0)
            lease.take(len(answer))
        except BaseException:
            lease.release()
            raise
        finally:
            self._calls.release()
        self._watch_answer(call.context, lease)
        return answer

    def _receive(self, call: GrpcCall, messages: Iterator[bytes], lease: Lease) -> bytes:
        """Returns the message of a call.

        Raises:
            ServingError: ``queue_full`` if there was no room for it, or not this client's turn, in
                time; ``request_timeout`` if it did not arrive in time; ``malformed`` if none came.
        """
        seconds = self.transport.engine.config.serving.request_timeout_seconds
        allowed = min(seconds, call.context.time_remaining())
        until = call.started + allowed
        turn_until = until - allowed / 2  # a client whose turn comes late has time to send
        client = call.turn
        # One message of a client at a time, so that slow ones of one client do not fill the account.
        if not self._turns.begin(client, turn_until - time.monotonic()):
            raise ServingError(
                "queue_full",
                "an earlier message of this client is still arriving. Try again soon.",
                retry_after=1.0,
            )
        late = threading.Event()

        def cancel() -> None:
            late.set()
            call.context.cancel()

        try:
            lease.take(self.transport.body_limit, turn_until - time.monotonic())
            deadline = self._deadlines.start(max(0.0, until - time.monotonic()), cancel)
            try:
                data = next(messages, None)
            except Exception:
                if late.is_set():
                    raise _late(seconds) from None
                raise
            finally:
                self._deadlines.cancel(deadline)
        finally:
            self._turns.end(client)
        if data is None:
            raise _late(seconds) if late.is_set() else malformed("the call: expected a message.")
        lease.keep(len(data))
        return data

    def _watch_answer(self, context: grpc.ServicerContext, lease: Lease) -> None:
        """Keeps an answer in the account until its client has read it, or is cut off."""
        seconds = WRITE_SECONDS + lease.held / MIN_RATE
        deadline = self._deadlines.start(seconds, context.cancel)

        def ended() -> None:
            self._deadlines.cancel(deadline)
            lease.release()

        if not context.add_callback(ended):
            ended()


def _late(seconds: float) -> ServingError:
    return ServingError(
        "request_timeout",
        f"the message: expected all of it within {seconds:g} seconds, got part. Send faster.",
    )


class GrpcCall:
    """One call: its client and its request id, from the peer's address and the metadata.

    Attributes:
        refuses: whether a refusal would be this transport's, and not the engine's.
        raw_contents: the tensors of ``ModelInfer``, as views on its message.
    """

    def __init__(self, transport: TransportContext, context: grpc.ServicerContext) -> None:
        self.transport, self.context = transport, context
        self.started = time.monotonic()
        self.raw_contents: list[memoryview] = []
        self.refuses = False
        self._client: Client | None = None
        metadata: dict[str, str] = {}
        for key, value in context.invocation_metadata() or ():
            if not isinstance(value, str):
                continue
            if key in metadata and key in _ONCE_KEYS:
                raise malformed(f"{key}: expected once, got more than once.")
            joins = key in metadata and key in _JOINED_KEYS
            metadata[key] = f"{metadata[key]}, {value}" if joins else value
        self.request_id = request_id(metadata.get("x-request-id"))
        self.forwarded_for = metadata.get("x-forwarded-for")
        self.key = presented_key(metadata.get("authorization"), metadata.get("x-api-key"))

    def client(self) -> Client:
        """Returns the client. Raises ``unauthorized`` or ``blocked``."""
        if self._client is None:
            self._client = self.transport.engine.identify(
                api_key=self.key,
                peer=peer_of(self.context.peer()),
                forwarded_for=self.forwarded_for,
            )
        return self._client

    @property
    def turn(self) -> str:
        """Whose messages arrive one at a time: the client's; the peer's until the client is known."""
        return peer_of(self.context.peer()) if self._client is None else self._client.id

    def admit(self, requests: int) -> None:
        """Admits the client, and counts ``requests`` against its limits."""
        self.transport.engine.admit(self.client(), requests=requests)
        self.refuses = requests > 0


def peer_of(text: str) -> str:
    """Returns the address in gRPC's name of a peer; "unknown" if it has none.

    Example:
        >>> peer_of("ipv4:127.0.0.1:4242"), peer_of("ipv6:%5B::1%5D:4242"), peer_of("unix:/x")
        ('127.0.0.1', '::1', 'unknown')
    """
    family, _, rest = unquote(text).partition(":")
    if family not in ("ipv4", "ipv6"):
        return "unknown"
    return rest.rpartition(":")[0].strip("[]")


# --- methods --------------------------------------------------------------------------------


def _server_live(call: GrpcCall, request: Any) -> Any:
    return MESSAGES["ServerLiveResponse"](live=call.transport.engine.live())


def _server_ready(call: GrpcCall, request: Any) -> Any:
    return MESSAGES["ServerReadyResponse"](ready=call.transport.engine.readiness()[0])


def _model_ready(call: GrpcCall, request: Any) -> Any:
    ready = call.transport.engine.readiness()[0]
    if ready:
        try:
            call.transport.spec(request.name, request.version or None)
        except ServingError as error:
            # A model that is not served is not ready; the method has no other word for it.
            if error.code != "not_found":
                raise
            ready = False
    return MESSAGES["ModelReadyResponse"](ready=ready)


def _server_metadata(call: GrpcCall, request: Any) -> Any:
    call.admit(requests=0)
    return MESSAGES["ServerMetadataResponse"](
        name=SERVER_NAME, version=moe_jax.__version__, extensions=EXTENSIONS
    )


def _model_metadata(call: GrpcCall, request: Any) -> Any:
    spec = call.transport.spec(request.name, request.version or None)
    metadata = call.transport.describe(request.name)

    def tensors(specs: Any) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatypes[0], "shape": t.shape} for t in specs]

    return MESSAGES["ModelMetadataResponse"](
        name=spec.name,
        versions=metadata["versions"],
        platform=metadata["platform"],
        inputs=tensors(t for t in spec.inputs if not t.optional),
        outputs=tensors(spec.outputs),
    )


def _model_infer(call: GrpcCall, request: Any) -> Any:
    spec = call.transport.spec(request.model_name, request.model_version or None)
    parameters = _parameters(request.parameters, "the request")
    asked = InferRequest(
        id=request.id or None,
        inputs=_inputs(request, call.raw_contents, spec),
        outputs=_outputs(request, spec),
        timeout_seconds=_timeout(call, parameters),
    )
    call.refuses = False
    result = run(call.transport, call.client(), spec, asked, call.request_id, call.started)
    call.refuses = True
    answer = MESSAGES["ModelInferResponse"](
        model_name=spec.name, model_version=str(result.info["model_version"]), id=request.id
    )
    for name, value in facts(result.info).items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param"}
        setattr(answer.parameters[name], field.get(type(value), "string_param"), value)
    for name, _ in asked.outputs:
        array = np.ascontiguousarray(result.arrays[name])
        answer.outputs.add(name=name, datatype=datatype_of(array), shape=array.shape)
        answer.raw_output_contents.append(array.tobytes())
    return answer


def _timeout(call: GrpcCall, parameters: Mapping[str, Any]) -> float | None:
    asked = [request_timeout(parameters), call.context.time_remaining()]
    # grpc gives a deadline of years where the client gave none.
    limits = [seconds for seconds in asked if seconds is not None and seconds < 1e6]
    return min(limits) if limits else None


def _parameters(given: Any, what: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise malformed(f"{what}: expected parameter {shown(name)} to have a value.")
        if name.startswith("shared_memory"):
            raise malformed(f"{what}: shared memory is not served here. Send the data itself.")
        if name.startswith("triton_"):
            raise malformed(f"{what}: parameter {shown(name)} is reserved. Name it otherwise.")
        values[name] = getattr(parameter, kind)
    return values


def _inputs(request: Any, raw: Sequence[memoryview], spec: ModelSpec) -> dict[str, np.ndarray]:
    names = [tensor.name for tensor in request.inputs]
    if len(set(names)) != len(names):
        raise malformed("inputs: expected every name once, got one again.")
    check_names(names, spec.inputs, spec.name)
    if raw and len(raw) != len(names):
        raise malformed(f"raw_input_contents: expected {len(names)}, one an input, got {len(raw)}.")
    specs = {tensor.name: tensor for tensor in spec.inputs}
    arrays: dict[str, np.ndarray] = {}
    for i, tensor in enumerate(request.inputs):
        name, datatype, shape = tensor.name, tensor.datatype, list(tensor.shape)
        _parameters(tensor.parameters, f"input {name}")
        count = check_tensor(name, datatype, shape, specs[name])
        if raw:
            if tensor.HasField("contents"):
                raise malformed(f"input {name}: expected contents or raw contents, got both.")
            expected = count * DATATYPES[datatype].itemsize
            if len(raw[i]) != expected:
                raise malformed(f"input {name}: expected {expected} bytes, got {len(raw[i])}.")
            arrays[name] = from_buffer(raw[i], datatype, shape)
            if datatype == "BOOL" and arrays[name].view(np.uint8).max() > 1:
                raise malformed(f"input {name}: expected bytes 0 and 1 for BOOL, got others.")
        else:
            arrays[name] = _typed(tensor, datatype, shape, count)
    return arrays


def _typed(tensor: Any, datatype: str, shape: list[int], count: int) -> np.ndarray:
    if datatype in NO_JSON:
        raise malformed(f"input {tensor.name}: {datatype} comes in raw_input_contents only.")
    field = _CONTENTS[datatype]
    filled = [f.name for f, _ in tensor.contents.ListFields()]
    if filled and filled != [field]:
        raise malformed(f"input {tensor.name}: expected {field}, got {', '.join(filled)}.")
    values = getattr(tensor.contents, field)
    if len(values) != count:
        raise malformed(f"input {tensor.name}: expected {count} elements, got {len(values)}.")
    array = np.array(values, dtype=DATATYPES[datatype])
    array.flags.writeable = False
    return array.reshape(shape)


def _outputs(request: Any, spec: ModelSpec) -> tuple[tuple[str, bool], ...]:
    accepted = [tensor.name for tensor in spec.outputs]
    names: list[str] = []
    for tensor in request.outputs:
        if tensor.name not in accepted:
            raise malformed(
                f"outputs: expected some of {', '.join(accepted)}, got {shown(tensor.name)}."
            )
        if tensor.name in names:
            raise malformed(f"outputs: expected every name once, got {shown(tensor.name)} again.")
        check_classification(_parameters(tensor.parameters, f"output {tensor.name}"), tensor.name)
        names.append(tensor.name)
    return tuple((n, True) for n in names or [s.name for s in spec.outputs if not s.optional])


_Method = Callable[[GrpcCall, Any], Any]
_METHODS: dict[str, _Method] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelInfer": _model_infer,
}
# Methods that count against a client's limits.
_LIMITED = frozenset({"ModelInfer"})
# Methods whose message has no field: it is not received at all.
_UNREAD = frozenset({"ServerLive", "ServerReady", "ServerMetadata"})
