"""The methods of the gRPC service: from a call and its message to the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import moe_jax
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.app import EXTENSIONS, SERVER_NAME
from moe_jax.serving.http.datatypes import DATATYPES, NO_JSON, datatype_of
from moe_jax.serving.http.grpc_call import GrpcCall
from moe_jax.serving.http.grpc_messages import MESSAGES
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


GrpcMethod = Callable[[GrpcCall, Any], Any]
METHODS: dict[str, GrpcMethod] = {
    "ServerLive": _server_live,
    "ServerReady": _server_ready,
    "ModelReady": _model_ready,
    "ServerMetadata": _server_metadata,
    "ModelMetadata": _model_metadata,
    "ModelInfer": _model_infer,
}
# Methods that count against a client's limits.
LIMITED = frozenset({"ModelInfer"})
# Methods whose message has no field: it is not received at all.
UNREAD = frozenset({"ServerLive", "ServerReady", "ServerMetadata"})
