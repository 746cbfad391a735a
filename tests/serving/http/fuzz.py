"""Requests straight into the ASGI application, and ways to spoil them."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy as np

from tests.serving.served import WIDTH

Request = tuple[str, str, list[tuple[bytes, bytes]], bytes]


async def ask(app: Any, request: Request, pieces: int = 1) -> tuple[int, bytes]:
    """Status and body of an answer; the request's body comes in so many pieces."""
    method, path, headers, body = request
    step = max(1, -(-len(body) // pieces))
    chunks = [body[i : i + step] for i in range(0, len(body), step)] or [b""]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not chunks:
            return {"type": "http.disconnect"}
        chunk = chunks.pop(0)
        return {"type": "http.request", "body": chunk, "more_body": bool(chunks)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode("utf-8", "replace"),
        "query_string": query.encode(),
        "root_path": "",
        "scheme": "http",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    starts = [m for m in sent if m["type"] == "http.response.start"]
    assert len(starts) == 1, sent[:3]
    assert not sent[-1].get("more_body")
    return starts[0]["status"], b"".join(bytes(m.get("body", b"")) for m in sent)


def good(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A request that is answered: its JSON, and its binary data."""
    x = np.full((1, rng.randint(1, 4), WIDTH), rng.uniform(-2, 2), np.float32)
    tensor: dict[str, Any] = {"name": "hidden_states", "shape": list(x.shape), "datatype": "FP32"}
    data = b""
    if rng.random() < 0.5:
        tensor["parameters"] = {"binary_data_size": x.nbytes}
        data = x.tobytes()
    else:
        tensor["data"] = x.reshape(-1).tolist()
    head: dict[str, Any] = {"id": "a", "inputs": [tensor]}
    if rng.random() < 0.5:
        head["outputs"] = [{"name": "expert_indices", "parameters": {"binary_data": True}}]
    return head, data


_VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    2**64,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "a",
    "FP32",
    "INT32",
    "BOOL",
    "\ud800",
    "\0",
    "é" * 50,
    [],
    [[]],
    {},
    {"a": 1},
    [1, [2]],
    [None],
    "hidden_states",
    "token_mask",
    "router_logits",
    [-1],
    [0],
    [2**62, 2**62],
]
_KEYS = [
    "id",
    "inputs",
    "outputs",
    "parameters",
    "name",
    "shape",
    "datatype",
    "data",
    "binary_data_size",
    "binary_data",
    "binary_data_output",
    "classification",
    "shared_memory_region",
    "timeout",
    "priority",
    "sequence_id",
    "x",
]
_TOKENS = [
    b"NaN",
    b"Infinity",
    b"-",
    b"[",
    b"]",
    b"{",
    b"}",
    b",",
    b'"',
    b"\\",
    b"\xff",
    b"\0",
    b"1e999",
    b"9" * 400,
    b"\\ud800",
    b"\xef\xbb\xbf",
    b"//",
    b"'",
    b"null",
]


def _holders(value: Any) -> list[Any]:
    """Every object and array inside, itself included."""
    containers = [value] if isinstance(value, dict | list) else []
    for item in value.values() if isinstance(value, dict) else (containers and value) or ():
        containers += _holders(item)
    return containers


def spoil(rng: random.Random) -> tuple[Request, int]:
    """A request with one to three faults, and in how many pieces its body comes."""
    head, data = good(rng)
    for _ in range(rng.randint(1, 3)):
        holder = rng.choice(_holders(head))
        value = copy.deepcopy(rng.choice(_VALUES))
        if isinstance(holder, dict):
            key = rng.choice([*holder, *_KEYS])
            if rng.random() < 0.3:
                holder.pop(key, None)
            else:
                holder[key] = value
        elif holder and rng.random() < 0.7:
            holder[rng.randrange(len(holder))] = value
        else:
            holder.append(value)
    text = json.dumps(head).encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(_TOKENS) + text[at + rng.choice([0, 0, 1, 5]) :]
    if rng.random() < 0.2:
        data = rng.choice([data[:-1], data + b"\0", b"", data * 2, rng.randbytes(64)])
    body = text + data
    headers: list[tuple[bytes, bytes]] = []
    if data or rng.random() < 0.1:
        length = str(len(text)).encode()
        if rng.random() < 0.2:
            length = rng.choice(
                [
                    b"",
                    b"0",
                    b"-1",
                    b"9" * 25,
                    b"x",
                    b"1.0",
                    b"\xff",
                    b"1",
                    str(len(body) + 1).encode(),
                ]
            )
        headers.append((b"inference-header-content-length", length))
    if rng.random() < 0.2:
        headers.append(
            rng.choice(
                [
                    (b"content-encoding", b"gzip"),
                    (b"content-encoding", b"br"),
                    (b"content-type", b"text/plain"),
                    (b"content-length", b"-5"),
                    (b"content-length", b"9" * 30),
                    (b"accept-encoding", b"gzip;q=x,,;"),
                    (b"authorization", b"Bearer \xff"),
                    (b"traceparent", b"00-zz"),
                    (b"x-forwarded-for", b",,1.2.3.4.5"),
                    (b"x-request-id", b"\r\nx: y"),
                ]
            )
        )
    path = "/v2/models/router/infer"
    if rng.random() < 0.1:
        path = rng.choice(
            [
                "/v2/models/moe/infer",
                "/v2/models/x/infer",
                "/v2/models//infer",
                "/v2/models/router/versions/9/infer",
                "/v2/models/router/routes/é",
                "/v2/models/%00/infer",
                "/admin/reload",
                "/nowhere",
            ]
        )
    method = rng.choice(["POST"] * 30 + ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
    return (method, path, headers, body), rng.choice([1, 1, 1, 2, 7])


async def run(app: Any, count: int, seed: int) -> dict[int, int]:
    """Sends so many spoilt requests; how often each status came back."""
    rng = random.Random(seed)
    seen: dict[int, int] = {}
    for i in range(count):
        request, pieces = spoil(rng)
        status, body = await ask(app, request, pieces)
        assert status < 500, (i, status, request, body[:500])
        if status >= 400 and request[0] != "HEAD":
            answer = json.loads(body)
            assert set(answer) == {"error", "code"}, answer
            assert len(body) < 2000
        seen[status] = seen.get(status, 0) + 1
    return seen
