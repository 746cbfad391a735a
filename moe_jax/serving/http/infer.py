"""``POST /v2/models/M/infer`` and the digest-first lookup: the two paths that are hot.

The order of a request: headers and sizes, then who asks and whether they may, then the body, then
one hop to a worker thread, which decodes, routes and encodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.types import Receive, Scope, Send

from moe_jax.serving.engine import Client, Result
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.answer import encode_response
from moe_jax.serving.http.compression import (
    compress,
    decompress,
    request_encoding,
    response_encoding,
)
from moe_jax.serving.http.door import Door
from moe_jax.serving.http.exchange import Exchange, Parts
from moe_jax.serving.http.protocol import (
    InferRequest,
    ModelSpec,
    decode_request,
    header_length,
)
from moe_jax.serving.http.request_body import Body
from moe_jax.serving.http.strict_json import malformed, shown

_MEDIA_TYPES = ("application/json", "application/octet-stream")
_LENGTH = "inference-header-content-length"


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A body that is ready to be sent."""

    parts: Parts
    json_length: int | None
    encoding: str | None


async def infer(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI endpoint of inference."""
    exchange: Exchange = scope["exchange"]
    door, headers = exchange.door, exchange.headers
    client = exchange.client()
    door.engine.admit(client)
    try:
        encoding = _check_headers(headers)
        body = Body(
            declared=headers.get("content-length"),
            limit=door.body_limit,
            buffers=door.buffers,
            json_length=None if encoding else headers.get(_LENGTH),
        )
        model = scope["path_params"]["model"]
        spec = door.spec(model, scope["path_params"].get("version"))
        with body:
            data = await body.read(receive, door.engine.config.serving.request_timeout_seconds)
            exchange.body_complete = True
            answer = await door.work(_answer, exchange, client, spec, data, encoding)
            del data
    except ServingError as error:
        if not exchange.counted:
            door.engine.violation(client, error.code)
        raise
    told: list[tuple[bytes, bytes]] = [(b"vary", b"accept-encoding")]
    if answer.encoding is not None:
        told.append((b"content-encoding", answer.encoding.encode()))
    if answer.json_length is not None:
        told.append((_LENGTH.encode(), str(answer.json_length).encode()))
    kind = b"application/json" if answer.json_length is None else b"application/octet-stream"
    await exchange.send_parts(send, 200, kind, answer.parts, told)


def _check_headers(headers: Mapping[str, str]) -> str | None:
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media and media not in _MEDIA_TYPES:
        raise ServingError(
            "unsupported_media_type",
            f"Content-Type: expected {' or '.join(_MEDIA_TYPES)}, got {shown(media)}.",
        )
    return request_encoding(headers.get("content-encoding"))


def _answer(
    exchange: Exchange, client: Client, spec: ModelSpec, data: memoryview, encoding: str | None
) -> Answer:
    """Everything between the bytes of a request and those of its answer, on a worker thread."""
    door, headers = exchange.door, exchange.headers
    with door.buffers.lease() as take:
        if encoding is not None:
            data = memoryview(decompress(data, encoding, door.body_limit, take))
        length = header_length(headers.get(_LENGTH), len(data))
        # Numbers as JSON become Python objects of many times their size: few requests at a time.
        with door.json_turn if length is None else contextlib.nullcontext():
            request = decode_request(data, length, spec)
        return _routed(exchange, client, spec, request)


def _routed(exchange: Exchange, client: Client, spec: ModelSpec, request: InferRequest) -> Answer:
    door, headers = exchange.door, exchange.headers
    exchange.counted = True  # the engine counts its own refusals
    result = run(door, client, spec, request, exchange.request_id, exchange.started)
    exchange.counted = False
    parts, length = encode_response(
        spec, str(result.info["model_version"]), request, result.arrays, facts(result.info)
    )
    chosen = response_encoding(headers.get("accept-encoding"))
    packed = compress(parts, chosen) if chosen is not None else None
    if packed is not None:
        return Answer([packed], length, chosen)
    return Answer(parts, length, None)


def run(
    door: Door,
    client: Client,
    spec: ModelSpec,
    request: InferRequest,
    request_id: str,
    started: float,
) -> Result:
    """Asks the engine, within what is left of the client's deadline."""
    hidden = request.inputs["hidden_states"]
    door.engine.admit(client, requests=0, tokens=math.prod(hidden.shape[:-1]))
    seconds = request.timeout_seconds
    if seconds is not None:
        seconds -= time.monotonic() - started
        if seconds <= 0:
            raise ServingError("deadline_exceeded", "the request's timeout passed before it began.")
    options: dict[str, Any] = {}
    if (mask := request.inputs.get("token_mask")) is not None:
        options["token_mask"] = mask
    if spec.name == "router" and any(name == "router_logits" for name, _ in request.outputs):
        options["return_router_logits"] = True
    return door.engine.infer(
        spec.name,
        hidden,
        client=client,
        request_id=request_id,
        timeout_seconds=seconds,
        **options,
    )


def facts(info: Mapping[str, Any]) -> dict[str, str | bool | int | float]:
    """What ``production_info`` says, as protocol parameters: scalars, and finite ones."""
    kept: dict[str, str | bool | int | float] = {}
    for name, value in info.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, bool | int | str) or (
            isinstance(plain, float) and math.isfinite(plain)
        ):
            kept[name] = plain
    kept.pop("model_version", None)
    return kept


async def lookup(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI endpoint of ``GET /v2/models/M/routes/{digest}``: an answer without its request."""
    exchange: Exchange = scope["exchange"]
    door = exchange.door
    client = exchange.client()
    door.engine.admit(client)
    model, digest = scope["path_params"]["model"], scope["path_params"]["digest"]
    spec = door.spec(model, scope["path_params"].get("version"))
    if not (8 <= len(digest) <= 128 and digest.isascii() and digest.isalnum()):
        door.engine.violation(client, "malformed")
        raise malformed("digest: expected the hex digits of an earlier answer's digest.")
    if door.engine.config.serving.redis_url:  # a second level on the network may block
        result = await door.work(lambda: door.engine.lookup(model, digest, client=client))
    else:
        result = door.engine.lookup(model, digest, client=client)
    if result is None:
        raise ServingError("not_found", "no answer with this digest is held. Send the tensor.")
    binary = exchange.query.get("binary", "true").lower() not in ("false", "0")
    names = [s.name for s in spec.outputs if s.name in result.arrays]
    request = InferRequest(
        id=None, inputs={}, outputs=tuple((n, binary) for n in names), timeout_seconds=None
    )
    parts, length = encode_response(
        spec, str(result.info["model_version"]), request, result.arrays, facts(result.info)
    )
    kind = b"application/json" if length is None else b"application/octet-stream"
    told = [] if length is None else [(_LENGTH.encode(), str(length).encode())]
    await exchange.send_parts(send, 200, kind, parts, told)
