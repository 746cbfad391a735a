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
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError:  # of brackets or of the port
            parts, port = urlsplit(""), -1
        known = parts.scheme in ("http", "https") and parts.hostname
        # Hosts in other scripts are encoded below, but a path has to be percent-encoded already.
        if not known or port == -1 or not parts.path.isascii():
            raise ValueError(
                f"URL: expected one such as http://127.0.0.1:8000, got {url!r}. Correct it."
            )
        if parts.path.rstrip("/").endswith("/v2"):
            raise ValueError(
                f"URL: expected the address without /v2, which is added, got {url!r}. "
                "Leave /v2 out."
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise ValueError(
                "key: expected ASCII characters without spaces, as HTTP headers hold them, got others. "
                "Copy the key again."
            )
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

    def get_json(self, path: str) -> dict[str, Any]:
        """The JSON object at a path. Raises ``Refused`` unless the status is 200."""
        return self._object(path, self._good("GET", path)[1])

    def post_json(self, path: str, value: Any) -> dict[str, Any]:
        """The JSON object that answers a JSON value. Raises ``Refused`` unless the status is 200."""
        content_type = {"Content-Type": "application/json"}
        body = json.dumps(value).encode()
        return self._object(path, self._good("POST", path, body, content_type)[1])

    def sizes(self, model: str) -> tuple[int, int]:
        """D and E of a router, from its metadata."""
        path = f"/v2/models/{quote(model, safe='')}"
        metadata = self.get_json(path)
        try:
            shapes = {t["name"]: t["shape"] for t in (*metadata["inputs"], *metadata["outputs"])}
            return int(shapes["hidden_states"][-1]), int(shapes["router_logits"][-1])
        except (KeyError, TypeError, IndexError, ValueError):
            raise self._other(path, json.dumps(metadata).encode()) from None

    def _object(self, path: str, data: bytes) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):  # JSON may be nested too deep to read
            value = None
        if not isinstance(value, dict):
            raise self._other(path, data)
        return value

    def _other(self, path: str, data: bytes) -> Unreachable:
        shown = data[:60].decode(errors="replace")
        return Unreachable(
            f"{self.url}{path}: expected the answer of this service, got {shown!r}. Something else "
            "listens there: correct the URL."
        )

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
        arrays: dict[str, np.ndarray] = {}
        try:
            length = start = int(headers.get("inference-header-content-length", len(body)))
            answer = json.loads(body[:length])
            for output in answer["outputs"]:
                size = output["parameters"]["binary_data_size"]
                flat = np.frombuffer(body[start : start + size], DATATYPES[output["datatype"]])
                arrays[output["name"]] = flat.reshape(output["shape"])
                start += size
            return arrays, dict(answer.get("parameters", {}))
        except (KeyError, TypeError, IndexError, ValueError, RecursionError):
            raise self._other(f"/v2/models/{model}/infer", body) from None

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
        except (ValueError, KeyError, TypeError, RecursionError):
            code, message = "", f"{method} {path}: expected status 200"
        raise Refused(status, code, message)
