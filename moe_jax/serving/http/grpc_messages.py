"""The Open Inference Protocol's gRPC messages, built from a table.

Their descriptors live in a pool of their own: a process may also hold the generated messages of
``tritonclient``, which have the same full names, and protobuf's default pool takes a name once.

Names and numbers of the fields are the protocol's (kserve/open-inference-protocol,
open_inference_grpc.proto).
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

SERVICE = "inference.GRPCInferenceService"

_MAP = "map"
# message -> fields in order of their numbers, from 1: name, type, how often.
# A type that starts with a capital letter is a message; "map" is map<string, InferParameter>.
_TABLE: dict[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live:bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready:bool",
    "ModelReadyRequest": "name:string version:string",
    "ModelReadyResponse": "ready:bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name:string version:string extensions:string*",
    "ModelMetadataRequest": "name:string version:string",
    "ModelMetadataResponse.TensorMetadata": "name:string datatype:string shape:int64*",
    "ModelMetadataResponse": (
        "name:string versions:string* platform:string inputs:ModelMetadataResponse.TensorMetadata* "
        "outputs:ModelMetadataResponse.TensorMetadata*"
    ),
    "InferParameter": (
        "bool_param:bool int64_param:int64 string_param:string double_param:double "
        "uint64_param:uint64"
    ),
    "InferTensorContents": (
        "bool_contents:bool* int_contents:int32* int64_contents:int64* uint_contents:uint32* "
        "uint64_contents:uint64* fp32_contents:float* fp64_contents:double* bytes_contents:bytes*"
    ),
    "ModelInferRequest.InferInputTensor": (
        "name:string datatype:string shape:int64* parameters:map contents:InferTensorContents"
    ),
    "ModelInferRequest.InferRequestedOutputTensor": "name:string parameters:map",
    "ModelInferRequest": (
        "model_name:string model_version:string id:string parameters:map "
        "inputs:ModelInferRequest.InferInputTensor* "
        "outputs:ModelInferRequest.InferRequestedOutputTensor* raw_input_contents:bytes*"
    ),
    "ModelInferResponse.InferOutputTensor": (
        "name:string datatype:string shape:int64* parameters:map contents:InferTensorContents"
    ),
    "ModelInferResponse": (
        "model_name:string model_version:string id:string parameters:map "
        "outputs:ModelInferResponse.InferOutputTensor* raw_output_contents:bytes*"
    ),
}
_ONEOF = {"InferParameter": "parameter_choice"}


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(
        name="moe_jax/open_inference.proto", package="inference", syntax="proto3"
    )
    messages: dict[str, descriptor_pb2.DescriptorProto] = {}
    for top in [n for n in _TABLE if "." not in n]:
        messages[top] = file.message_type.add(name=top)
    for nested in [n for n in _TABLE if "." in n]:
        outer, name = nested.split(".")
        messages[nested] = messages[outer].nested_type.add(name=name)
    for name, fields in _TABLE.items():
        message = messages[name]
        if name in _ONEOF:
            message.oneof_decl.add(name=_ONEOF[name])
        for number, field in enumerate(fields.split(), start=1):
            _add_field(message, name, number, field)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file) if hasattr(pool, "Add") else pool.AddSerializedFile(file.SerializeToString())
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"inference.{name}"))
        for name in _TABLE
    }


def _add_field(message: Any, name: str, number: int, field: str) -> None:
    kinds = descriptor_pb2.FieldDescriptorProto
    word, kind = field.removesuffix("*").split(":")
    many = field.endswith("*") or kind == _MAP
    added = message.field.add(
        name=word,
        number=number,
        label=kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL,
    )
    if kind == _MAP:
        entry = message.nested_type.add(name="ParametersEntry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
        entry.field.add(
            name="value",
            number=2,
            label=kinds.LABEL_OPTIONAL,
            type=kinds.TYPE_MESSAGE,
            type_name=".inference.InferParameter",
        )
        added.type, added.type_name = kinds.TYPE_MESSAGE, f".inference.{name}.ParametersEntry"
    elif kind[0].isupper():
        added.type, added.type_name = kinds.TYPE_MESSAGE, f".inference.{kind}"
    else:
        added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    if name in _ONEOF:
        added.oneof_index = 0


MESSAGES: dict[str, Any] = _build()
"""Message classes by name, e.g. ``MESSAGES["ModelInferRequest"]``."""

# The tag of ModelInferRequest.raw_input_contents: field 7, length-delimited.
_RAW_CONTENTS = 7 << 3 | 2


def split_raw_contents(message: bytes) -> tuple[bytes | bytearray, list[memoryview]]:
    """Splits a serialized ``ModelInferRequest`` into its tensors and everything else.

    Parsing copies every tensor, and each look at one copies it again. Views on the message do not.

    Args:
        message: the serialized message.

    Returns:
        The message without ``raw_input_contents``, and those as views on ``message``. Bytes that
        are no message are returned as they are, so that parsing them reports it.

    Example:
        >>> request = MESSAGES["ModelInferRequest"](id="7", raw_input_contents=[b"abc", b""])
        >>> rest, raw = split_raw_contents(request.SerializeToString())
        >>> MESSAGES["ModelInferRequest"].FromString(bytes(rest)).id, [bytes(view) for view in raw]
        ('7', [b'abc', b''])
    """
    view, rest, raw = memoryview(message), bytearray(), []
    at, end = 0, len(message)
    while at < end:
        start = at
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            at += length
            if tag == _RAW_CONTENTS and 0 < at <= end:
                raw.append(view[at - length : at])
                continue
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            return message, []
        if not start < at <= end:
            return message, []
        rest += view[start:at]
    return rest, raw


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Returns the number at ``at`` and where it ends; an end beyond the message if it is broken."""
    value = shift = 0
    while at < len(message) and shift < 64:
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    return 0, len(message) + 1
