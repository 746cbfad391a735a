"""The OpenAPI document of the service, written by hand and held to the routes by a test."""

from __future__ import annotations

from typing import Any

import moe_jax
from moe_jax.serving.errors import CODES
from moe_jax.serving.http.compression import ENCODINGS
from moe_jax.serving.http.datatypes import DATATYPES

_MODEL = {
    "name": "model",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^(router|moe|layers|layer_[0-9]+)$"},
    "description": "router; moe if experts are served; layer_3 and the like, and layers for all of "
    "them, if the checkpoint holds the layers of one model.",
}
_VERSION = {
    "name": "version",
    "in": "path",
    "required": True,
    "schema": {"type": "string"},
    "description": "One that metadata lists; 1 is whatever is served now.",
}
_DIGEST = {
    "name": "digest",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[0-9A-Za-z]{8,128}$"},
}
_HEADER_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "description": "Bytes of JSON where binary data follows it.",
    "schema": {"type": "integer", "minimum": 1},
}
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _reply(text: str, schema: str | None = None, binary: bool = False) -> dict[str, Any]:
    reply: dict[str, Any] = {"description": text}
    if schema:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        reply["content"] = content | ({"application/octet-stream": _BINARY} if binary else {})
    return reply


def _errors(*codes: str) -> dict[str, Any]:
    statuses: dict[str, list[str]] = {}
    for code in codes:
        statuses.setdefault(str(CODES[code]), []).append(code)
    return {s: _reply(" or ".join(words), "Error") for s, words in sorted(statuses.items())}


def _get(summary: str, good: dict[str, Any], *parameters: Any, codes: tuple[str, ...] = ()) -> Any:
    responses = {"200": good, **_errors(*codes)}
    return {"get": {"summary": summary, "parameters": list(parameters), "responses": responses}}


def _infer(*parameters: Any) -> dict[str, Any]:
    request = {"$ref": "#/components/schemas/InferRequest"}
    return {
        "post": {
            "summary": "Route hidden states (router, layer_N, layers), or run the layer (moe).",
            "description": "JSON, or JSON followed by binary tensors. Content-Encoding: "
            + " or ".join(ENCODINGS)
            + ".",
            "parameters": [*parameters, _HEADER_LENGTH],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": request},
                    "application/octet-stream": _BINARY,
                },
            },
            "responses": {"200": _reply("The answer.", "InferResponse", True)}
            | _errors(*(code for code in CODES if code not in ("method_not_allowed",))),
        }
    }


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties}


def _array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _FLAG, _INTEGER = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
_PARAMETERS = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
_DATA = {
    "type": "array",
    "description": "Row-major elements, flat or nested as the shape.",
    "items": {},
}

_SCHEMAS = {
    "Error": _object(["error", "code"], error=_TEXT, code={"type": "string", "enum": list(CODES)}),
    "InferRequest": _object(
        ["inputs"],
        id=_TEXT,
        parameters=_PARAMETERS,
        inputs={
            "type": "array",
            "minItems": 1,
            "maxItems": 2,
            "description": "hidden_states [batch, sequence, width] FP32, FP16 or BF16, and, where "
            "tokens are to be left out, token_mask [batch, sequence] BOOL.",
            "items": _object(
                ["name", "shape", "datatype"],
                name={"type": "string", "enum": ["hidden_states", "token_mask"]},
                shape=_array({"type": "integer", "minimum": 1}),
                datatype={"type": "string", "enum": ["FP32", "FP16", "BF16", "BOOL"]},
                parameters=_PARAMETERS,
                data=_DATA,
            ),
        },
        outputs=_array(_object(["name"], name=_TEXT, parameters=_PARAMETERS)),
    ),
    "InferResponse": _object(
        ["model_name", "model_version", "outputs"],
        model_name=_TEXT,
        model_version=_TEXT,
        id=_TEXT,
        parameters=_PARAMETERS,
        outputs=_array(
            _object(
                ["name", "shape", "datatype"],
                name=_TEXT,
                shape=_array(_INTEGER),
                datatype={"type": "string", "enum": list(DATATYPES)},
                parameters=_PARAMETERS,
                data=_DATA,
            )
        ),
    ),
    "ServerMetadata": _object(
        ["name", "version", "extensions"], name=_TEXT, version=_TEXT, extensions=_array(_TEXT)
    ),
    "ModelMetadata": _object(
        ["name", "platform", "inputs", "outputs"],
        name=_TEXT,
        versions=_array(_TEXT),
        platform=_TEXT,
        inputs=_array(_object(["name"], name=_TEXT, datatype=_TEXT, shape=_array(_INTEGER))),
        outputs=_array(_object(["name"], name=_TEXT, datatype=_TEXT, shape=_array(_INTEGER))),
    ),
    "Readiness": _object(["ready", "reasons"], ready=_FLAG, reasons=_array(_TEXT)),
    "Health": {"type": "object", "required": ["status"], "properties": {"status": _TEXT}},
    "Reload": _object([], checkpoint=_TEXT),
    "Object": {"type": "object"},
}


def document(body_limit: int) -> dict[str, Any]:
    """The document, as JSON values.

    Args:
        body_limit: most bytes of a request's body.

    Example:
        >>> "/v2/health/live" in document(1)["paths"]
        True
    """
    said_no = {"503": _reply("Not ready, with the reasons.", "Readiness")}
    ready = _get("Whether requests should be sent here.", _reply("Ready.", "Readiness"))
    ready["get"]["responses"] |= said_no
    model_ready = _get(
        "The same, for one model.", _reply("Ready.", "Readiness"), _MODEL, codes=("not_found",)
    )
    model_ready["get"]["responses"] |= said_no
    version_ready = {"get": {**model_ready["get"], "parameters": [_MODEL, _VERSION]}}
    live = _get("Whether the process should be left alone.", _reply("Live."))
    live["get"]["responses"]["503"] = _reply("To be restarted.")
    health = _get("State, uptime, components, memory, recent latency.", _reply("Live.", "Health"))
    health["get"]["responses"]["503"] = _reply("To be restarted.", "Health")
    metadata = _get(
        "What a model takes and gives.",
        _reply("Metadata.", "ModelMetadata"),
        _MODEL,
        codes=("unauthorized", "not_found", "warming"),
    )
    version_metadata = {"get": {**metadata["get"], "parameters": [_MODEL, _VERSION]}}
    text = {"description": "Prometheus text.", "content": {"text/plain": {"schema": _TEXT}}}
    paths = {
        "/v2": _get("The server.", _reply("Metadata.", "ServerMetadata"), codes=("unauthorized",)),
        "/v2/health/live": live,
        "/v2/health/ready": ready,
        "/v2/models/{model}": metadata,
        "/v2/models/{model}/versions/{version}": version_metadata,
        "/v2/models/{model}/ready": model_ready,
        "/v2/models/{model}/versions/{version}/ready": version_ready,
        "/v2/models/{model}/infer": _infer(_MODEL),
        "/v2/models/{model}/versions/{version}/infer": _infer(_MODEL, _VERSION),
        "/v2/models/{model}/routes/{digest}": _get(
            "An earlier answer by its digest; 404 where it is not held.",
            _reply("The answer.", "InferResponse", True),
            _MODEL,
            _DIGEST,
            {"name": "binary", "in": "query", "required": False, "schema": _FLAG},
            codes=(
                "malformed",
                "unauthorized",
                "blocked",
                "not_found",
                "rate_limited",
                "queue_full",
                "warming",
            ),
        ),
        "/health": health,
        "/ready": ready,
        "/metrics": _get("Metrics for Prometheus.", text, codes=("unauthorized",)),
        "/openapi.json": _get("This document.", _reply("OpenAPI 3.1.", "Object")),
        "/admin/reload": {
            "post": {
                "summary": "Swap in another checkpoint between requests.",
                "description": "Needs the admin key; 404 where the service has none. The checkpoint "
                "is a folder below the reload folder; without one, the configured one is read again.",
                "requestBody": {
                    "required": False,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Reload"}}
                    },
                },
                "responses": {"200": _reply("What serves now.", "Object")}
                | _errors(
                    "malformed",
                    "unauthorized",
                    "not_found",
                    "too_large",
                    "request_timeout",
                    "invalid_values",
                    "warming",
                ),
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "moe_jax",
            "version": moe_jax.__version__,
            "description": "Open Inference Protocol v2 with the binary tensor data extension. "
            f"Bodies of at most {body_limit} bytes.",
        },
        "paths": paths,
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    }
