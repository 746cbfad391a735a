"""The ASGI application: routes around one engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

import moe_jax
from moe_jax.checkpoint import CheckpointError
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.door import Door
from moe_jax.serving.http.exchange import Envelope, Exchange
from moe_jax.serving.http.infer import infer, lookup
from moe_jax.serving.http.openapi import document
from moe_jax.serving.http.request_body import Body
from moe_jax.serving.http.strict_json import malformed, parse_object

SERVER_NAME = "moe_jax"
EXTENSIONS = ("binary_tensor_data",)
_RELOAD_LIMIT = 16 * 1024

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine: RouterEngine) -> Envelope:
    """The service as an ASGI application.

    It does not own the engine: whoever made the engine shuts it down.

    Args:
        engine: what answers.

    Returns:
        An ASGI application; ``app.door`` is what its endpoints share.
    """
    door = Door(engine)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        door.close()

    # The router alone: Starlette's own handlers of errors would answer before the envelope can.
    return Envelope(Router(ROUTES, redirect_slashes=False, lifespan=lifespan), door)


def _json(value: Any, status: int = 200) -> Response:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, status, media_type="application/json")


def _exchange(request: Request) -> Exchange:
    return request.scope["exchange"]


# --- metadata -------------------------------------------------------------------------------


async def server_metadata(request: Request) -> Response:
    exchange = _exchange(request)
    exchange.client()
    return _json(
        {"name": SERVER_NAME, "version": moe_jax.__version__, "extensions": list(EXTENSIONS)}
    )


async def model_metadata(request: Request) -> Response:
    exchange = _exchange(request)
    exchange.client()
    model, version = request.path_params["model"], request.path_params.get("version")
    spec = exchange.door.spec(model, version)
    described = exchange.door.describe(model)
    return _json(
        {
            "name": described["name"],
            "versions": list(described["versions"]),
            "platform": described["platform"],
            "inputs": [
                {"name": t.name, "datatype": t.datatypes[0], "shape": list(t.shape)}
                for t in spec.inputs
                if not t.optional
            ],
            "outputs": [
                {"name": t.name, "datatype": t.datatypes[0], "shape": list(t.shape)}
                for t in spec.outputs
            ],
        }
    )


# --- health ---------------------------------------------------------------------------------


async def live(request: Request) -> Response:
    alive = _exchange(request).door.engine.live()
    return Response(status_code=200 if alive else 503)


def _readiness(exchange: Exchange) -> Response:
    is_ready, reasons = exchange.door.engine.readiness()
    response = _json({"ready": is_ready, "reasons": list(reasons)}, 200 if is_ready else 503)
    if not is_ready:
        response.headers["retry-after"] = "1"
    return response


async def ready(request: Request) -> Response:
    return _readiness(_exchange(request))


async def model_ready(request: Request) -> Response:
    exchange = _exchange(request)
    exchange.door.spec(request.path_params["model"], request.path_params.get("version"))
    return _readiness(exchange)


async def health(request: Request) -> Response:
    exchange = _exchange(request)
    door = exchange.door
    found = await door.aside(door.engine.health_check)
    if door.level.metrics_need_bearer:
        try:
            exchange.require_admin()
        except ServingError:
            found = {"status": found["status"]}
    return _json(_finite(found), 200 if door.engine.live() else 503)


def _finite(value: Any) -> Any:
    """The value with null for what JSON cannot hold."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value.item() if isinstance(value, np.generic) else value


# --- for operators --------------------------------------------------------------------------


async def metrics(request: Request) -> Response:
    exchange = _exchange(request)
    door = exchange.door
    if door.level.metrics_need_bearer:
        exchange.require_admin()
    text = await door.aside(door.engine.metrics_text)
    return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


async def reload(request: Request) -> Response:
    """Swaps in another checkpoint: ``{"checkpoint": folder}``, or nothing for the configured one."""
    exchange = _exchange(request)
    exchange.require_admin()
    door = exchange.door
    with Body(
        declared=exchange.headers.get("content-length"), limit=_RELOAD_LIMIT, buffers=door.buffers
    ) as body:
        data = await body.read(request.receive, door.engine.config.serving.request_timeout_seconds)
        exchange.body_complete = True
        asked = parse_object(data, "the body") if len(data) else {}
        del data
    checkpoint = asked.get("checkpoint")
    if not isinstance(checkpoint, str | None) or set(asked) - {"checkpoint"}:
        raise malformed('the body: expected {"checkpoint": "FOLDER"}, or nothing.')
    try:
        told = await door.aside(door.engine.reload, checkpoint or None)
    except (CheckpointError, OSError, ValueError) as error:
        raise ServingError("invalid_values", f"not reloaded, the old one serves on: {error}") \
            from None  # fmt: skip
    return _json(_finite(told))


async def openapi(request: Request) -> Response:
    exchange = _exchange(request)
    return _json(document(exchange.door.body_limit))


def _asset(name: str, kind: str) -> Any:
    async def asset(request: Request) -> Response:
        data = resources.files("moe_jax.serving.http").joinpath("page", name).read_bytes()
        headers = {"content-security-policy": _PAGE_POLICY, "referrer-policy": "no-referrer"}
        return Response(data, media_type=kind, headers=headers)

    return asset


class _Plain:
    """An ASGI function as Starlette's ``Route`` knows one from a view: it is no function."""

    def __init__(self, function: ASGIApp) -> None:
        self.function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.function(scope, receive, send)


# One table for the router and for the test that holds the OpenAPI document to it.
ROUTES = (
    Route("/v2/models/{model}/infer", _Plain(infer), methods=["POST"]),
    Route("/v2/models/{model}/versions/{version}/infer", _Plain(infer), methods=["POST"]),
    Route("/v2/models/{model}/routes/{digest}", _Plain(lookup), methods=["GET"]),
    Route("/v2", server_metadata, methods=["GET"]),
    Route("/v2/models/{model}", model_metadata, methods=["GET"]),
    Route("/v2/models/{model}/versions/{version}", model_metadata, methods=["GET"]),
    Route("/v2/models/{model}/ready", model_ready, methods=["GET"]),
    Route("/v2/models/{model}/versions/{version}/ready", model_ready, methods=["GET"]),
    Route("/v2/health/live", live, methods=["GET"]),
    Route("/v2/health/ready", ready, methods=["GET"]),
    Route("/health", health, methods=["GET"]),
    Route("/ready", ready, methods=["GET"]),
    Route("/metrics", metrics, methods=["GET"]),
    Route("/admin/reload", reload, methods=["POST"]),
    Route("/openapi.json", openapi, methods=["GET"]),
    Route("/", _asset("status.html", "text/html"), methods=["GET"]),
    Route("/status.css", _asset("status.css", "text/css"), methods=["GET"]),
    Route("/status.js", _asset("status.js", "text/javascript"), methods=["GET"]),
)
