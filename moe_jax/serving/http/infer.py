"""``POST /v2/models/M/infer`` and the lookup by digest: the two hot paths.

The order of a request: headers and sizes, then who asks and whether they may, then the body, then
one hop to a worker thread, which decodes, routes and encodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from starlette.types import Receive, Scope, Send

from moe_jax.serving.engine import Call, Client, Result
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.compression import (
    compress,
    decompress,
    request_encoding,
    response_encoding,
)
from moe_jax.serving.http.http_request import Headers, HttpRequest, Parts
from moe_jax.serving.http.protocol import (
    InferRequest,
    ModelSpec,
    decode_request,
    header_length,
)
from moe_jax.serving.http.request_body import RequestBody
from moe_jax.serving.http.response_body import encode_response
from moe_jax.serving.http.strict_json import malformed, shown
from moe_jax.serving.http.transport import TransportContext

_MEDIA_TYPES = ("application/json", "application/octet-stream")
_LENGTH = "inference-header-content-length"


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedResponse:
    """A body that is ready to be sent.

    Attributes:
        parts: its bytes.
        json_length: bytes of JSON before binary data; None if it is JSON alone.
        encoding: its ``Content-Encoding``, or None.
    """

    parts: Parts
    json_length: int | None
    encoding: str | None

    @property
    def size(self) -> int:
        """Number of bytes."""
        return sum(len(part) for part in self.parts)

    async def send(self, request: HttpRequest, send: Send, more: Headers) -> None:
        """Sends it with status 200."""
        headers = list(more)
        if self.encoding is not None:
            headers.append((b"content-encoding", self.encoding.encode()))
        if self.json_length is None:
            media_type = b"application/json"
        else:
            media_type = b"application/octet-stream"
            headers.append((_LENGTH.encode(), str(self.json_length).encode()))
        await request.send_parts(send, 200, media_type, self.parts, headers)


async def infer(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI endpoint of inference."""
    request: HttpRequest = scope["moe_request"]
    transport, headers = request.transport, request.headers
    client = request.client()
    transport.engine.admit(client)
    # The lease holds the request's bytes until it is answered, then the answer's until it is read.
    with transport.account.lease() as lease:
        try:
            encoding = _check_headers(headers)
            body = RequestBody(
                declared=headers.get("content-length"),
                limit=transport.body_limit,
                lease=lease,
                json_length=None if encoding else headers.get(_LENGTH),
            )
            model = scope["path_params"]["model"]
            spec = transport.spec(model, scope["path_params"].get("version"))
            seconds = transport.engine.config.serving.request_timeout_seconds
            data = await body.read(receive, seconds)
            request.body_complete = True
            call = Call()
            work = functools.partial(_response, request, client, spec, data, encoding, call)
            response = await transport.work(work, call=call, seconds=seconds)
            del work, call  # they hold the request's arrays and the work's result
            del data
            lease.keep(0)
            lease.take(response.size)
        except ServingError as error:
            if not request.counted:
                transport.engine.violation(client, error.code)
            raise
        await response.send(request, send, [(b"vary", b"accept-encoding")])


def _check_headers(headers: Mapping[str, str]) -> str | None:
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    if media and media not in _MEDIA_TYPES:
        raise ServingError(
            "unsupported_media_type",
            f"Content-Type: expected {' or '.join(_MEDIA_TYPES)}, got {shown(media)}.",
        )
    return request_encoding(headers.get("content-encoding"))


def _response(
    request: HttpRequest,
    client: Client,
    spec: ModelSpec,
    data: memoryview,
    encoding: str | None,
    call: Call,
) -> EncodedResponse:
    """Returns the response to a request's bytes.

    All of it is done on one worker thread, the work on the device included: the event loop watches
    the deadline and leaves the ``call`` then.
    """
    transport, headers = request.transport, request.headers
    with transport.account.lease() as lease:
        if encoding is not None:
            data = memoryview(decompress(data, encoding, transport.body_limit, lease.take))
        length = header_length(headers.get(_LENGTH), len(data))
        # Numbers as JSON become Python objects of many times their size: few requests at a time.
        with transport.json_turn if length is None else contextlib.nullcontext():
            asked = decode_request(data, length, spec)
        request.counted = True  # the engine counts its own refusals
        result = run(transport, client, spec, asked, request.request_id, request.started, call)
        request.counted = False
        return _encoded(spec, asked, result, response_encoding(headers.get("accept-encoding")))


def _encoded(
    spec: ModelSpec, asked: InferRequest, result: Result, encoding: str | None
) -> EncodedResponse:
    version = str(result.info["model_version"])
    parts, length = encode_response(spec, version, asked, result.arrays, facts(result.info))
    packed = compress(parts, encoding) if encoding is not None else None
    if packed is not None:
        return EncodedResponse([packed], length, encoding)
    return EncodedResponse(parts, length, None)


def run(
    transport: TransportContext,
    client: Client,
    spec: ModelSpec,
    request: InferRequest,
    request_id: str,
    started: float,
    call: Call | None = None,
) -> Result:
    """Asks the engine, within what is left of the client's deadline.

    Args:
        transport: what transports share.
        client: who asks.
        spec: the model.
        request: what is asked.
        request_id: for logs and the answer.
        started: ``time.monotonic()`` when the request came.
        call: what the event loop leaves at the service's deadline; None for a caller that waits on
            its own thread.
    """
    hidden = request.inputs["hidden_states"]
    transport.engine.admit(client, requests=0, tokens=math.prod(hidden.shape[:-1]))
    seconds = request.timeout_seconds
    if seconds is not None:
        seconds -= time.monotonic() - started
        if seconds <= 0:
            raise ServingError("deadline_exceeded", "the request's timeout passed before it began.")
    options: dict[str, Any] = {}
    if (mask := request.inputs.get("token_mask")) is not None:
        options["token_mask"] = mask
    if spec.name != "moe" and any(name == "router_logits" for name, _ in request.outputs):
        options["return_router_logits"] = True
    return transport.engine.infer(
        spec.name,
        hidden,
        client=client,
        request_id=request_id,
        timeout_seconds=seconds,
        # A deadline of the client's is watched by the engine, which hands the work to its thread.
        call=call if seconds is None else None,
        **options,
    )


def facts(info: Mapping[str, Any]) -> dict[str, str | bool | int | float]:
    """Returns ``production_info`` as protocol parameters: its finite scalars."""
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
    request: HttpRequest = scope["moe_request"]
    transport = request.transport
    client = request.client()
    transport.engine.admit(client)
    model, digest = scope["path_params"]["model"], scope["path_params"]["digest"]
    spec = transport.spec(model, scope["path_params"].get("version"))
    if not (8 <= len(digest) <= 128 and digest.isascii() and digest.isalnum()):
        transport.engine.violation(client, "malformed")
        raise malformed("digest: expected the hex digits of an earlier answer's digest.")
    if transport.engine.config.serving.redis_url:  # a second level on the network may block
        result = await transport.work(lambda: transport.engine.lookup(model, digest, client=client))
    else:
        result = transport.engine.lookup(model, digest, client=client)
    if result is None:
        raise ServingError("not_found", "no answer with this digest is held. Send the tensor.")
    binary = request.query.get("binary", "true").lower() not in ("false", "0")
    names = [s.name for s in spec.outputs if s.name in result.arrays]
    asked = InferRequest(
        id=None, inputs={}, outputs=tuple((n, binary) for n in names), timeout_seconds=None
    )
    response = _encoded(spec, asked, result, None)
    with transport.account.lease() as lease:
        lease.take(response.size)
        await response.send(request, send, [])
