"""gRPC, optional: the same engine, limits and errors behind the protocol's gRPC service.

Requests arrive as bytes and are parsed after the client's limits are checked, as over HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
from moe_jax.serving.http.client_address import presented_key, request_id
from moe_jax.serving.http.datatypes import DATATYPES, NO_JSON, datatype_of
from moe_jax.serving.http.door import Door, retry_after
from moe_jax.serving.http.grpc_messages import MESSAGES, SERVICE
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
from moe_jax.serving.http.strict_json import malformed, shown

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents",
    "INT32": "int_contents", "INT64": "int64_contents", "UINT8": "uint_contents",
    "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip
_Call = Callable[["_Caller", Any], Any]


class GrpcServer:
    """The gRPC service on its own port.

    Args:
        door: what it shares with HTTP.
        address: ``host:port``; port 0 takes a free one.

    Attributes:
        port: the port in use.

    Raises:
        ValueError: nothing can listen there.
    """

    def __init__(self, door: Door, address: str) -> None:
        self.door = door
        self._server = grpc.server(
            ThreadPoolExecutor(door.capacity + 4, thread_name_prefix="moe-grpc"),
            maximum_concurrent_rpcs=door.capacity + 4,
            options=[
                ("grpc.max_receive_message_length", door.body_limit),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._handler(name, method), response_serializer=_serialized
            )
            for name, method in _METHODS.items()
        }
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, handlers),)
        )
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise ValueError(f"{address}: gRPC cannot listen there. Give another --grpc-port.") \
                from error  # fmt: skip

    def start(self) -> None:
        """Starts taking requests."""
        self._server.start()

    def stop(self, seconds: float) -> threading.Event:
        """Takes no more requests; those in flight have ``seconds``. The event is set at the end."""
        return self._server.stop(seconds)

    def _handler(self, name: str, method: _Call) -> Callable[[bytes, Any], Any]:
        def handle(data: bytes, context: grpc.ServicerContext) -> Any:
            started = time.monotonic()
            caller: _Caller | None = None
            code = "ok"
            try:
                caller = _Caller(self.door, context, started)
                if name in _LIMITED:
                    self.door.engine.admit(caller.client())
                    caller.refuses = True
                request = MESSAGES[f"{name}Request"].FromString(data)
                return method(caller, request)
            except DecodeError:
                error = malformed("the message: expected the protocol's, got other bytes.")
            except ServingError as raised:
                error = raised
            except Exception:
                self.door.engine.log.exception("failed", method=name)
                error = ServingError("internal", "an internal error, which is in the log.")
            code = error.code
            if caller is not None and caller.refuses:
                self.door.engine.violation(caller.client(), error.code)
            trailing = [("moe-code", code)]
            if (seconds := retry_after(error)) is not None:
                trailing.append(("retry-after", seconds))
            context.set_trailing_metadata(tuple(trailing))
            context.abort(_CODES[error.status], self.door.told(error))
            raise AssertionError("unreachable")

        return handle


def _serialized(message: Any) -> bytes:
    return message.SerializeToString()


class _Caller:
    """Who calls: its address and key from the call's metadata."""

    def __init__(self, door: Door, context: grpc.ServicerContext, started: float) -> None:
        self.door, self.context, self.started = door, context, started
        metadata = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        self.request_id = request_id(metadata.get("x-request-id"))
        self.forwarded_for = metadata.get("x-forwarded-for")
        self.refuses = False  # whether a refusal would be this transport's, and not the engine's
        self.key = presented_key(metadata.get("authorization"), metadata.get("x-api-key"))
        self._client: Client | None = None

    def client(self) -> Client:
        if self._client is None:
            self._client = self.door.engine.identify(
                api_key=self.key, peer=_peer(self.context.peer()), forwarded_for=self.forwarded_for
            )
        return self._client


def _peer(text: str) -> str:
    """The address in ``ipv4:127.0.0.1:4242`` or ``ipv6:%5B::1%5D:4242``."""
    family, _, rest = unquote(text).partition(":")
    if family not in ("ipv4", "ipv6"):
        return "unknown"
    return rest.rpartition(":")[0].strip("[]")


# --- methods --------------------------------------------------------------------------------


def _server_live(caller: _Caller, request: Any) -> Any:
    return MESSAGES["ServerLiveResponse"](live=caller.door.engine.live())


def _server_ready(caller: _Caller, request: Any) -> Any:
    return MESSAGES["ServerReadyResponse"](ready=caller.door.engine.readiness()[0])


def _model_ready(caller: _Caller, request: Any) -> Any:
    caller.door.spec(request.name, request.version or None)
    return MESSAGES["ModelReadyResponse"](ready=caller.door.engine.readiness()[0])


def _server_metadata(caller: _Caller, request: Any) -> Any:
    caller.client()
    return MESSAGES["ServerMetadataResponse"](
        name=SERVER_NAME, version=moe_jax.__version__, extensions=EXTENSIONS
    )


def _model_metadata(caller: _Caller, request: Any) -> Any:
    caller.client()
    spec = caller.door.spec(request.name, request.version or None)
    described = caller.door.describe(request.name)

    def tensors(specs: Any) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.datatypes[0], "shape": t.shape} for t in specs]

    return MESSAGES["ModelMetadataResponse"](
        name=spec.name,
        versions=described["versions"],
        platform=described["platform"],
        inputs=tensors(t for t in spec.inputs if not t.optional),
        outputs=tensors(spec.outputs),
    )


def _model_infer(caller: _Caller, request: Any) -> Any:
    spec = caller.door.spec(request.model_name, request.model_version or None)
    parameters = _parameters(request.parameters, "the request")
    asked = InferRequest(
        id=request.id or None,
        inputs=_inputs(request, spec),
        outputs=_outputs(request, spec),
        timeout_seconds=_timeout(caller, parameters),
    )
    caller.refuses = False
    result = run(caller.door, caller.client(), spec, asked, caller.request_id, caller.started)
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


def _timeout(caller: _Caller, parameters: Mapping[str, Any]) -> float | None:
    asked = [request_timeout(parameters), caller.context.time_remaining()]
    # grpc gives a deadline of years where the client gave none.
    found = [seconds for seconds in asked if seconds is not None and seconds < 1e6]
    return min(found) if found else None


def _parameters(given: Any, what: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, parameter in given.items():
        kind = parameter.WhichOneof("parameter_choice")
        if kind is None:
            raise malformed(f"{what}: expected parameter {shown(name)} to have a value.")
        if name.startswith("shared_memory"):
            raise malformed(f"{what}: shared memory is not served here. Send the data itself.")
        if name.startswith("triton_"):
            raise malformed(f"{what}: parameter {shown(name)} is reserved. Name it otherwise.")
        found[name] = getattr(parameter, kind)
    return found


def _inputs(request: Any, spec: ModelSpec) -> dict[str, np.ndarray]:
    names = [tensor.name for tensor in request.inputs]
    if len(set(names)) != len(names):
        raise malformed("inputs: expected every name once, got one again.")
    check_names(names, spec.inputs, spec.name)
    raw: Sequence[bytes] = request.raw_input_contents
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
    known = [tensor.name for tensor in spec.outputs]
    names: list[str] = []
    for tensor in request.outputs:
        if tensor.name not in known:
            raise malformed(
                f"outputs: expected some of {', '.join(known)}, got {shown(tensor.name)}."
            )
        if tensor.name in names:
            raise malformed(f"outputs: expected every name once, got {shown(tensor.name)} again.")
        check_classification(_parameters(tensor.parameters, f"output {tensor.name}"), tensor.name)
        names.append(tensor.name)
    return tuple((n, True) for n in names or [s.name for s in spec.outputs if not s.optional])


_METHODS: dict[str, _Call] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelInfer": _model_infer,
}
_LIMITED = frozenset({"ModelInfer"})
