"""Arrays to the protocol's answer: JSON, or JSON followed by binary tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.serving.http.datatypes import NO_JSON, datatype_of
from moe_jax.serving.http.protocol import InferRequest, ModelSpec
from moe_jax.serving.http.strict_json import malformed

Part = bytes | memoryview


def encode_response(
    spec: ModelSpec,
    version: str,
    request: InferRequest,
    arrays: Mapping[str, np.ndarray],
    parameters: Mapping[str, str | bool | int | float],
) -> tuple[list[Part], int | None]:
    """An answer as parts of a body, and the length of its JSON where binary data follows.

    Numbers that are not finite, which JSON has not, become ``null``; binary data holds them as
    they are.

    Args:
        spec: the model.
        version: the version that answered.
        request: what was asked.
        arrays: the model's outputs by name.
        parameters: facts about the answer.

    Raises:
        ServingError: ``malformed`` where an output of 16-bit floats was asked for as JSON.

    Example:
        >>> request = InferRequest(id="7", inputs={}, outputs=(("y", True),), timeout_seconds=None)
        >>> spec = ModelSpec(name="m", inputs=(), outputs=())
        >>> parts, length = encode_response(spec, "1", request, {"y": np.zeros(2, np.int32)}, {})
        >>> len(parts[0]) == length, bytes(parts[1])
        (True, b'\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00')
    """
    outputs: list[dict[str, Any]] = []
    parts: list[Part] = []
    for name, binary in request.outputs:
        array = np.ascontiguousarray(arrays[name])
        datatype = datatype_of(array)
        description: dict[str, Any] = {
            "name": name,
            "datatype": datatype,
            "shape": list(array.shape),
        }
        if binary:
            description["parameters"] = {"binary_data_size": array.nbytes}
            parts.append(memoryview(array.reshape(-1).view(np.uint8).data))
        else:
            description["data"] = _json_numbers(array, datatype, name)
        outputs.append(description)
    answer: dict[str, Any] = {"model_name": spec.name, "model_version": version}
    if request.id is not None:
        answer["id"] = request.id
    if parameters:
        answer["parameters"] = dict(parameters)
    answer["outputs"] = outputs
    head = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
    return [head, *parts], len(head) if parts else None


def _json_numbers(array: np.ndarray, datatype: str, name: str) -> list[Any]:
    if datatype in NO_JSON:
        raise malformed(
            f"output {name}: {datatype} is answered as binary data only, and JSON was asked for. "
            "Set its parameter binary_data to true, or send FP32."
        )
    flat = array.reshape(-1)
    if datatype[0] == "F" and not (finite := np.isfinite(flat)).all():
        return [v if ok else None for v, ok in zip(flat.tolist(), finite.tolist(), strict=True)]
    return flat.tolist()
