"""The ASGI application: routes around one engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

import moe_jax
from moe_jax.checkpoint.archive import releases_of
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.http_request import HttpRequest
from moe_jax.serving.http.infer import infer, lookup
from moe_jax.serving.http.middleware import RequestMiddleware
from moe_jax.serving.http.openapi import document
from moe_jax.serving.http.request_body import RequestBody
from moe_jax.serving.http.strict_json import malformed, parse_object
from moe_jax.serving.http.transport import TransportContext

SERVER_NAME = "moe_jax"
EXTENSIONS = ("binary_tensor_data",)
_RELOAD_LIMIT = 16 * 1024

_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(engine: RouterEngine) -> RequestMiddleware:
    """Returns the service as an ASGI application.

    The application does not shut the engine down: whoever made the engine does.

    Args:
        engine: what answers.

    Returns:
        An ASGI application; ``app.transport`` is what its endpoints share.
    """
    transport = TransportContext(engine)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        transport.close()

    # The bare router: Starlette's handlers of errors would answer before the middleware can.
    routes = Router(ROUTES, redirect_slashes=False, lifespan=lifespan)
    return RequestMiddleware(routes, transport)


def _json(value: Any, status: int = 200) -> Response:
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Response(text, status, media_type="application/json")


def _moe_request(request: Request) -> HttpRequest:
    return request.scope["moe_request"]


# --- metadata -------------------------------------------------------------------------------


async def server_metadata(request: Request) -> Response:
    """Answers with the service's name, version and protocol extensions."""
    _moe_request(request).admitted_client()
    return _json(
        {"name": SERVER_NAME, "version": moe_jax.__version__, "extensions": list(EXTENSIONS)}
    )


async def model_metadata(request: Request) -> Response:
    """Answers with the tensors that a model takes and returns."""
    asked = _moe_request(request)
    asked.admitted_client()
    model, version = request.path_params["model"], request.path_params.get("version")
    spec = asked.transport.spec(model, version)
    metadata = asked.transport.describe(model)
    return _json(
        {
            "name": metadata["name"],
            "versions": list(metadata["versions"]),
            "platform": metadata["platform"],
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
    """Answers 200 while the process can serve at all, and 503 otherwise."""
    alive = _moe_request(request).transport.engine.live()
    return Response(status_code=200 if alive else 503)


def _readiness(asked: HttpRequest) -> Response:
    is_ready, reasons = asked.transport.engine.readiness()
    response = _json({"ready": is_ready, "reasons": list(reasons)}, 200 if is_ready else 503)
    if not is_ready:
        response.headers["retry-after"] = "1"
    return response


async def ready(request: Request) -> Response:
    """Answers 200 if requests may be sent here, and 503 with the reasons otherwise."""
    return _readiness(_moe_request(request))


async def model_ready(request: Request) -> Response:
    """Answers as ``ready`` does, and 404 for a model or version that is not served."""
    asked = _moe_request(request)
    asked.transport.spec(request.path_params["model"], request.path_params.get("version"))
    return _readiness(asked)


async def health(request: Request) -> Response:
    """Answers with the parts' state: to operators alone where metrics need a key."""
    asked = _moe_request(request)
    transport = asked.transport
    report = await transport.aside(transport.engine.health_check)
    if transport.level.metrics_need_bearer and not _is_operator(asked):
        report = {"status": report["status"]}
    return _json(_finite(report), 200 if transport.engine.live() else 503)


def _is_operator(asked: HttpRequest) -> bool:
    """Returns whether the admin key was sent. A probe sends none, which is no violation."""
    if asked.key is None:
        return False
    try:
        asked.require_admin()
    except ServingError:
        return False
    return True


def _finite(value: Any) -> Any:
    """Returns the value with null in place of what JSON cannot hold."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return None
    return value.item() if isinstance(value, np.generic) else value


# --- for operators --------------------------------------------------------------------------


async def metrics(request: Request) -> Response:
    """Answers with all metrics in the Prometheus text format."""
    asked = _moe_request(request)
    transport = asked.transport
    if transport.level.metrics_need_bearer:
        asked.require_admin()
    text = await transport.aside(transport.engine.metrics_text)
    return Response(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})


async def reload(request: Request) -> Response:
    """Swaps in another checkpoint: ``{"checkpoint": folder}``, or nothing for the configured one.

    Answers hold nothing of the disk: not which folders there are, nor what is in them.
    """
    asked = _moe_request(request)
    transport = asked.transport
    serving = transport.engine.config.serving
    if not serving.admin_key:
        # A proxy on this machine would pass on anybody's request, so the peer's address is no proof.
        raise ServingError(
            "not_found",
            "reload over HTTP is off, because this service has no admin key. Set MOE_ADMIN_KEY, or "
            "send SIGHUP to the process.",
        )
    asked.require_admin()
    with transport.account.lease() as lease:
        body = RequestBody(
            declared=asked.headers.get("content-length"), limit=_RELOAD_LIMIT, lease=lease
        )
        data = await body.read(request.receive, serving.request_timeout_seconds)
        asked.body_complete = True
        options = parse_object(data, "the body") if len(data) else {}
        del data
    checkpoint = options.get("checkpoint")
    if not isinstance(checkpoint, str | None) or set(options) - {"checkpoint"}:
        raise malformed('the body: expected {"checkpoint": "FOLDER"}, or nothing.')
    report = await transport.aside(_reload, transport.engine, checkpoint or None)
    return _json(_finite(report))


def _reload(engine: RouterEngine, name: str | None) -> dict[str, Any]:
    refusal = ServingError(
        "invalid_values",
        "not reloaded: the old checkpoint stays in service. The reason is in the service's log: a "
        "damaged or unfit checkpoint, or a folder that is not below MOE_RELOAD_FOLDER. Without one "
        "that is the folder of releases of the configured checkpoint, or the folder it lies in.",
    )
    folder = None
    if name is not None:
        serving = engine.config.serving
        root = serving.reload_folder or _default_reload_folder(serving.checkpoint)
        try:
            folder = str(checkpoint_below(root, name))
        except (ValueError, OSError, RuntimeError) as error:
            engine.log.error("reload_refused", checkpoint=name[:200], error=str(error))
            raise refusal from None
    try:
        report = engine.reload(folder)
    except ServingError:
        raise
    except Exception:  # the engine has logged it
        raise refusal from None
    return {key: value for key, value in report.items() if key != "source"}


def _default_reload_folder(checkpoint: str) -> str | Path:
    """Returns the folder of releases that the configured checkpoint lies in, else its parent."""
    # The parent of a checkpoint in a release is that release, which holds no other checkpoint.
    return checkpoint and (releases_of(checkpoint) or Path(checkpoint).parent)


def checkpoint_below(root: str | Path, name: str) -> Path:
    """Returns the folder of a checkpoint that may be named in a request.

    Links are followed first, so that none leads out of ``root``.

    Args:
        root: the folder that holds the checkpoints; "" holds none.
        name: a path below it: absolute, or relative to it.

    Raises:
        ValueError: the path is not below ``root``.
        OSError: the path cannot be resolved.
    """
    if not root:
        raise ValueError(
            "reload: expected MOE_RELOAD_FOLDER or a configured checkpoint, got neither, so that no "
            "folder may be named. Set MOE_RELOAD_FOLDER."
        )
    top = Path(root).resolve()
    path = (top / name).resolve()
    if top not in path.parents:
        raise ValueError(f"reload: expected a checkpoint below {top}, got {path}.")
    return path


async def openapi(request: Request) -> Response:
    """Answers with the OpenAPI document of this service."""
    return _json(document(_moe_request(request).transport.body_limit))


def _asset(name: str, media_type: str) -> Any:
    async def asset(request: Request) -> Response:
        data = resources.files("moe_jax.serving.http").joinpath("page", name).read_bytes()
        headers = {"content-security-policy": _PAGE_POLICY, "referrer-policy": "no-referrer"}
        return Response(data, media_type=media_type, headers=headers)

    return asset


class _AsgiEndpoint:
    """Wraps an ASGI callable in an object, because ``Route`` treats plain functions as views."""

    def __init__(self, function: ASGIApp) -> None:
        self.function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.function(scope, receive, send)


# One table for the router and for the test that holds the OpenAPI document to it.
ROUTES = (
    Route("/v2/models/{model}/infer", _AsgiEndpoint(infer), methods=["POST"]),
    Route("/v2/models/{model}/versions/{version}/infer", _AsgiEndpoint(infer), methods=["POST"]),
    Route("/v2/models/{model}/routes/{digest}", _AsgiEndpoint(lookup), methods=["GET"]),
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
