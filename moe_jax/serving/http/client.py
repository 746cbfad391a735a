"""A small client of the service for the command line: standard library and numpy only.

Programs use ``tritonclient``, or any other client of the Open Inference Protocol.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np

from moe_jax.serving.http.datatypes import DATATYPES, datatype_of


class Refused(Exception):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        code: the service's error code; ``""`` if something else answered, such as a proxy.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(f"{message} (HTTP {status})")
        self.status, self.code = status, code


class Unreachable(ValueError):
    """The URL does not answer over HTTP."""


class Service:
    """The service at a URL.

    Args:
        url: ``http://host:port``; a path before ``/v2`` is kept.
        key: API key or admin key, sent as a bearer token.
        timeout_seconds: longest wait for an answer.

    Raises:
        ValueError: the text is not the URL of a service.
    """

    def __init__(self, url: str, *, key: str | None = None, timeout_seconds: float = 60.0) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ValueError(
                f"URL: expected one such as http://127.0.0.1:8000, got {url!r}. Correct it."
            )
        if parts.path.rstrip("/").endswith("/v2"):
            raise ValueError(
                f"URL: expected the address without /v2, which is added, got {url!r}. "
                "Leave /v2 out."
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._parts, self._prefix = parts, parts.path.rstrip("/")
        self._key, self._timeout = key, timeout_seconds

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers with lower-case names, and body. Raises ``Unreachable``."""
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "https":
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=self._timeout, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout)
        sent = dict(headers or {})
        if self._key:
            sent["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request(method, self._prefix + path, body, sent)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return response.status, received, response.read()
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise Unreachable(
                f"{self.url}: expected the service to answer, got {why}. Is it running there?"
            ) from error
        finally:
            connection.close()

    def get_json(self, path: str) -> Any:
        """The JSON at a path. Raises ``Refused`` unless the status is 200."""
        return json.loads(self._good("GET", path)[1])

    def post_json(self, path: str, value: Any) -> Any:
        """The JSON answer to a JSON value. Raises ``Refused`` unless the status is 200."""
        content_type = {"Content-Type": "application/json"}
        return json.loads(self._good("POST", path, json.dumps(value).encode(), content_type)[1])

    def infer(
        self, model: str, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...] = ()
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and the parameters of an answer; everything as binary data.

        Raises:
            Refused: the service said no.
            Unreachable: nothing answers.
        """
        descriptions, parts = [], []
        for name, array in inputs.items():
            data = np.ascontiguousarray(array)
            descriptions.append(
                {
                    "name": name,
                    "shape": list(data.shape),
                    "datatype": datatype_of(data),
                    "parameters": {"binary_data_size": data.nbytes},
                }
            )
            parts.append(data.tobytes())
        asked: dict[str, Any] = {"inputs": descriptions, "parameters": {"binary_data_output": True}}
        if outputs:
            asked["outputs"] = [{"name": n, "parameters": {"binary_data": True}} for n in outputs]
        head = json.dumps(asked).encode()
        headers, body = self._good(
            "POST",
            f"/v2/models/{quote(model, safe='')}/infer",
            b"".join([head, *parts]),
            {
                "Content-Type": "application/octet-stream",
                "Inference-Header-Content-Length": str(len(head)),
            },
        )
        length = int(headers.get("inference-header-content-length", len(body)))
        answer = json.loads(body[:length])
        arrays, start = {}, length
        for output in answer["outputs"]:
            size = output["parameters"]["binary_data_size"]
            flat = np.frombuffer(body[start : start + size], DATATYPES[output["datatype"]])
            arrays[output["name"]] = flat.reshape(output["shape"])
            start += size
        return arrays, answer.get("parameters", {})

    def _good(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[dict[str, str], bytes]:
        status, received, data = self.request(method, path, body, headers)
        if status == 200:
            return received, data
        try:
            said = json.loads(data)
            code, message = str(said["code"]), str(said["error"])
        except (ValueError, KeyError, TypeError):
            code, message = "", f"{method} {path}: expected status 200"
        raise Refused(status, code, message)
