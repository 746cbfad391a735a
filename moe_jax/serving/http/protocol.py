"""Open Inference Protocol v2 over REST, with the binary tensor data extension: bytes to arrays.

Pure and strict. What a careful server refuses is refused here, with a message that says what was
expected, what came and what to do. Sources: the Open Inference Protocol
(kserve/open-inference-protocol, inference_rest.md) and the binary tensor data extension
(triton-inference-server, extension_binary_data.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.datatypes import DATATYPES, NO_JSON
from moe_jax.serving.http.strict_json import kind, malformed, parse_object, shown

HEADER_LIMIT = 64 * 1024
"""Most bytes of the JSON part of a request that carries binary data."""

JSON_LIMIT = 32 * 1024 * 1024
"""Most bytes of a request that is JSON alone: about 1.5 million numbers. More goes as binary data."""

_INT64_MAX = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """One input or output of a model.

    Args:
        name: its name.
        datatypes: the protocol's names that it may have, the usual one first.
        shape: -1 where any size will do.
        optional: an input that may be left out; an output that comes only when asked for.
    """

    name: str
    datatypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """What a model takes and gives."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class InferRequest:
    """A request that was understood.

    Args:
        id: the client's name for it, to be sent back; None where it gave none.
        inputs: arrays by name, views on the body where the data was binary.
        outputs: (name, as binary data?) in the order in which to answer.
        timeout_seconds: the client's deadline; None where it gave none.
    """

    id: str | None
    inputs: dict[str, np.ndarray]
    outputs: tuple[tuple[str, bool], ...]
    timeout_seconds: float | None


def header_length(value: str | None, body_length: int) -> int | None:
    """``Inference-Header-Content-Length`` as a number; None where the header is missing.

    Example:
        >>> header_length("12", 100), header_length(None, 100)
        (12, None)
    """
    if value is None:
        return None
    what = "Inference-Header-Content-Length"
    if not (value.isascii() and value.isdigit()) or len(value) > 18:
        raise malformed(f"{what}: expected a number of bytes, got {shown(value)}.")
    length = int(value)
    if not 0 < length <= body_length:
        raise malformed(
            f"{what}: expected 1 to {body_length}, the length of the body, got {length}. "
            "Give the length of the JSON part."
        )
    if length > HEADER_LIMIT:
        raise ServingError(
            "too_large",
            f"{what}: expected at most {HEADER_LIMIT} bytes of JSON before binary data, "
            f"got {length}. Send tensors as binary data.",
        )
    return length


def decode_request(
    body: bytes | bytearray | memoryview, length: int | None, spec: ModelSpec
) -> InferRequest:
    """A request body as arrays and options.

    Args:
        body: JSON, or JSON followed by binary data.
        length: bytes of JSON where binary data follows, from ``header_length``; None where the
            whole body is JSON.
        spec: the model that is asked.

    Returns:
        The request. Arrays of binary inputs are views on ``body``: it must not change.

    Raises:
        ServingError: ``malformed``, ``too_large`` or ``invalid_values``.

    Example:
        >>> spec = ModelSpec(
        ...     name="m",
        ...     inputs=(TensorSpec(name="x", datatypes=("FP32",), shape=(-1, 2)),),
        ...     outputs=(TensorSpec(name="y", datatypes=("FP32",), shape=(-1,)),),
        ... )
        >>> body = b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}'
        >>> request = decode_request(body, None, spec)
        >>> request.inputs["x"].tolist(), request.outputs
        ([[1.0, 2.0]], (('y', False),))
    """
    view = memoryview(body)
    if length is None and len(view) > JSON_LIMIT:
        raise ServingError(
            "too_large",
            f"the body: expected at most {JSON_LIMIT} bytes of JSON, got {len(view)}. "
            "Send tensors as binary data.",
        )
    head = parse_object(view if length is None else view[:length], "the request")
    binary = view[len(view) :] if length is None else view[length:]
    parameters = _parameters(head, "the request")
    identity = head.get("id")
    if "id" in head and not isinstance(identity, str):
        raise malformed(f"id: expected a string, got {kind(identity)}.")
    inputs = _inputs(head, binary, spec)
    outputs = _outputs(head, parameters, spec)
    return InferRequest(
        id=identity, inputs=inputs, outputs=outputs, timeout_seconds=request_timeout(parameters)
    )


# --- parameters -----------------------------------------------------------------------------


def _parameters(holder: Mapping[str, Any], what: str) -> dict[str, Any]:
    parameters = holder.get("parameters", {})
    if not isinstance(parameters, dict):
        raise malformed(f"{what}: expected parameters to be an object, got {kind(parameters)}.")
    for name, value in parameters.items():
        if value is None or isinstance(value, dict | list):
            raise malformed(
                f"{what}: expected parameter {shown(name)} to be a string, a number or a boolean, "
                f"got {kind(value)}."
            )
        if name.startswith("shared_memory"):
            raise malformed(
                f"{what}: expected the tensor in the request, got parameter {shown(name)}. "
                "Shared memory is not served here: send the data itself."
            )
        if name.startswith("triton_"):
            raise malformed(f"{what}: parameter {shown(name)} is reserved. Name it otherwise.")
    return parameters


def request_timeout(parameters: Mapping[str, Any]) -> float | None:
    """Checks the request's own parameters; its ``timeout``, which is in microseconds, in seconds."""
    for name in ("priority", "timeout"):
        value = parameters.get(name, 0)
        if type(value) is not int or not 0 <= value <= _INT64_MAX:
            raise malformed(f"{name}: expected a whole number of at least 0, got {kind(value)}.")
    for name in ("sequence_start", "sequence_end", "binary_data_output"):
        if type(parameters.get(name, False)) is not bool:
            raise malformed(f"{name}: expected true or false, got {kind(parameters[name])}.")
    sequence = parameters.get("sequence_id", 0)
    if type(sequence) not in (int, str):
        raise malformed(f"sequence_id: expected a number or a string, got {kind(sequence)}.")
    if sequence not in (0, ""):
        raise malformed("sequence_id: these models keep no state between requests. Leave it out.")
    timeout = parameters.get("timeout", 0)
    return timeout / 1e6 if timeout else None


# --- inputs ---------------------------------------------------------------------------------


def _named(holder: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    """The tensors of ``inputs`` or ``outputs``, each with its name, each name once."""
    tensors = holder.get(key, [])
    if not isinstance(tensors, list):
        raise malformed(f"{key}: expected an array, got {kind(tensors)}.")
    by_name: dict[str, dict[str, Any]] = {}
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, dict):
            raise malformed(f"{key}[{i}]: expected an object, got {kind(tensor)}.")
        name = tensor.get("name")
        if not isinstance(name, str):
            got = kind(name) if "name" in tensor else "nothing"
            raise malformed(f"{key}[{i}].name: expected a string, got {got}.")
        if name in by_name:
            raise malformed(f"{key}: expected every name once, got {shown(name)} again.")
        by_name[name] = tensor
    return list(by_name.items())


def check_names(given: Sequence[str], specs: Sequence[TensorSpec], model: str) -> None:
    """Raises ``malformed`` for unknown inputs, and for missing ones that are not optional."""
    specs_by_name = {spec.name: spec for spec in specs}
    for name in given:
        if name not in specs_by_name:
            raise malformed(
                f"inputs: expected {', '.join(specs_by_name)}, got {shown(name)}, which model {model} "
                "does not take."
            )
    missing = [s.name for s in specs if not s.optional and s.name not in given]
    if missing:
        raise malformed(f"inputs: expected {', '.join(missing)} for model {model}, got none.")


def check_tensor(name: str, datatype: Any, shape: Any, spec: TensorSpec) -> int:
    """Number of elements of a tensor that fits its spec. Raises ``malformed``."""
    if not isinstance(datatype, str) or datatype not in spec.datatypes:
        got = shown(datatype) if isinstance(datatype, str) else kind(datatype)
        raise malformed(
            f"input {name}: expected datatype {' or '.join(spec.datatypes)}, got {got}."
        )
    if not isinstance(shape, list) or any(type(n) is not int for n in shape):
        raise malformed(f"input {name}: expected shape to be an array of whole numbers.")
    # The rank first: the product of a long enough list would take hours.
    if len(shape) != len(spec.shape):
        raise malformed(
            f"input {name}: expected {len(spec.shape)} dimensions {_shape(spec.shape)}, "
            f"got {len(shape)}."
        )
    if any(n < 1 for n in shape):
        raise malformed(f"input {name}: expected dimensions of at least 1, got a smaller one.")
    count = math.prod(shape)
    if count * DATATYPES[datatype].itemsize > _INT64_MAX:
        raise malformed(f"input {name}: expected a tensor that can exist, got a shape too large.")
    if not all(want in (-1, got) for want, got in zip(spec.shape, shape, strict=True)):
        raise malformed(f"input {name}: expected shape {_shape(spec.shape)}, got {_shape(shape)}.")
    return count


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join("any" if n == -1 else str(n) for n in shape[:8]) + "]"


def _inputs(head: Mapping[str, Any], binary: memoryview, spec: ModelSpec) -> dict[str, np.ndarray]:
    if "inputs" not in head:
        raise malformed("inputs: expected an array of tensors, got none.")
    named = _named(head, "inputs")
    check_names([name for name, _ in named], spec.inputs, spec.name)
    specs = {tensor.name: tensor for tensor in spec.inputs}
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for name, tensor in named:
        parameters = _parameters(tensor, f"input {name}")
        datatype, shape = tensor.get("datatype"), tensor.get("shape")
        count = check_tensor(name, datatype, shape, specs[name])
        assert isinstance(datatype, str)
        assert isinstance(shape, list)
        if "binary_data_size" in parameters:
            if "data" in tensor:
                raise malformed(
                    f"input {name}: expected data or binary_data_size, got both. Send one."
                )
            size = parameters["binary_data_size"]
            expected = count * DATATYPES[datatype].itemsize
            if type(size) is not int or size != expected:
                got = size if type(size) is int and abs(size) < 1 << 63 else kind(size)
                raise malformed(
                    f"input {name}: expected binary_data_size {expected} for {datatype} "
                    f"{_shape(shape)}, got {got}."
                )
            if start + size > len(binary):
                raise malformed(
                    f"input {name}: expected {size} bytes of binary data, got "
                    f"{len(binary) - start}. Send them after the JSON, and the length of the JSON "
                    "in Inference-Header-Content-Length."
                )
            arrays[name] = _from_bytes(binary[start : start + size], datatype, shape, name)
            start += size
        elif "data" in tensor:
            arrays[name] = _from_json(tensor["data"], datatype, shape, count, name)
        else:
            raise malformed(f"input {name}: expected data or binary_data_size, got neither.")
    if start != len(binary):
        raise malformed(
            f"the body: expected {start} bytes of binary data, got {len(binary)}. "
            "Remove what follows, or say which input it is."
        )
    return arrays


def _from_bytes(data: memoryview, datatype: str, shape: Sequence[int], name: str) -> np.ndarray:
    array = from_buffer(data, datatype, shape)
    if datatype == "BOOL" and array.view(np.uint8).max() > 1:
        raise malformed(f"input {name}: expected bytes 0 and 1 for BOOL, got others.")
    return array


def from_buffer(data: Any, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """A read-only view on bytes that have the right length."""
    array = np.frombuffer(data, dtype=DATATYPES[datatype]).reshape(shape)
    array.flags.writeable = False
    return array


def _from_json(data: Any, datatype: str, shape: Sequence[int], count: int, name: str) -> np.ndarray:
    if datatype in NO_JSON:
        raise malformed(
            f"input {name}: expected {datatype} as binary data, got JSON, which has no such "
            "numbers. Send it as binary data, or as FP32."
        )
    flat = _flat(data, shape, count, name)
    allowed = {bool} if datatype == "BOOL" else {int, float} if datatype[0] == "F" else {int}
    wrong = set(map(type, flat)) - allowed
    if wrong:
        got = ", ".join(sorted(kind(next(v for v in flat if type(v) is t)) for t in wrong))
        if datatype == "BOOL":
            what = "true and false"
        else:
            what = "numbers" if float in allowed else "whole numbers"
        raise malformed(f"input {name}: expected {what} for {datatype}, got {got}.")
    try:
        with np.errstate(over="ignore"):
            array = np.array(flat, dtype=DATATYPES[datatype])
    except OverflowError:
        raise malformed(f"input {name}: expected numbers that fit {datatype}.") from None
    # JSON has no NaN and no infinity: what is not finite here was too large for the datatype.
    if datatype[0] == "F" and not np.isfinite(array).all():
        raise ServingError(
            "invalid_values",
            f"input {name}: expected numbers that fit {datatype}, got larger ones. Scale them.",
        )
    array.flags.writeable = False
    return array.reshape(shape)


def _flat(data: Any, shape: Sequence[int], count: int, name: str) -> list[Any]:
    """Row-major elements of data that is flat, or nested exactly as its shape."""
    if not isinstance(data, list):
        raise malformed(f"input {name}: expected data to be an array, got {kind(data)}.")
    if data and isinstance(data[0], list):
        level: list[Any] = [data]
        for size in shape:
            if any(type(row) is not list or len(row) != size for row in level):
                raise malformed(
                    f"input {name}: expected data nested as {_shape(shape)}, or flat, "
                    "got rows of other lengths."
                )
            level = [item for row in level for item in row]
        return level
    if len(data) != count:
        raise malformed(
            f"input {name}: expected {count} elements for {_shape(shape)}, got {len(data)}."
        )
    return data


# --- outputs --------------------------------------------------------------------------------


def _outputs(
    head: Mapping[str, Any], parameters: Mapping[str, Any], spec: ModelSpec
) -> tuple[tuple[str, bool], ...]:
    everything = parameters.get("binary_data_output", False)
    asked: list[tuple[str, bool]] = []
    specs_by_name = {tensor.name: tensor for tensor in spec.outputs}
    for name, tensor in _named(head, "outputs"):
        if name not in specs_by_name:
            raise malformed(
                f"outputs: expected some of {', '.join(specs_by_name)}, got {shown(name)}, which model "
                f"{spec.name} does not give."
            )
        options = _parameters(tensor, f"output {name}")
        check_classification(options, name)
        binary = options.get("binary_data", everything)
        if type(binary) is not bool:
            raise malformed(
                f"output {name}: expected binary_data to be true or false, got {kind(binary)}."
            )
        asked.append((name, binary))
    if not asked:
        asked = [(s.name, everything is True) for s in spec.outputs if not s.optional]
    return tuple(asked)


def check_classification(options: Mapping[str, Any], name: str) -> None:
    """Raises ``malformed`` where labels are asked for."""
    if "classification" in options:
        raise malformed(
            f"output {name}: these models have no labels, so classification is not served. "
            "Ask for the tensor."
        )
