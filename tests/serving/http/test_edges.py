"""What Triton refuses is refused, what it accepts is answered: over real HTTP, case by case."""

import http.client
import json
import socket

import pytest

from tests.serving.http.edge_cases import (
    ACCEPTED,
    INFER,
    LENGTH,
    MODEL,
    REFUSED,
    STRICTER,
    TEXT,
    X,
    binary,
    one,
)
from tests.serving.served import served, small_engine


@pytest.fixture(scope="module")
def service():
    with served(small_engine()) as started:
        yield started


@pytest.fixture(scope="module")
def expected(service):
    arrays = service.engine.infer("router", X).arrays
    return arrays["expert_indices"].reshape(-1).tolist()


def sent(service, ask):
    status, headers, body = service.request(ask.method, ask.path, ask.body, ask.headers)
    return status, headers, body


def refused(service, ask):
    status, headers, body = sent(service, ask)
    assert 400 <= status < 500, body
    answer = json.loads(body)
    assert set(answer) == {"error", "code"}
    assert len(answer["error"]) < 400  # a message is no echo of the request
    assert int(headers["content-length"]) == len(body)
    return status


def of(cases):
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("ask", "source"), of(REFUSED))
def test_what_triton_refuses_is_refused(service, ask, source):
    refused(service, ask)


@pytest.mark.parametrize(("ask", "source"), of(ACCEPTED))
def test_what_triton_accepts_is_answered(service, expected, ask, source):
    status, headers, body = sent(service, ask)
    assert status == 200, body
    answer = json.loads(body[: int(headers.get(LENGTH.lower(), len(body)))])
    outputs = {one["name"]: one for one in answer["outputs"]}
    assert outputs["expert_indices"]["data"] == expected
    assert answer["model_version"] == service.engine.snapshot.version


@pytest.mark.parametrize(("ask", "status", "source"), of(STRICTER))
def test_what_triton_lets_through_and_should_not_is_refused(service, ask, status, source):
    assert refused(service, ask) == status


def test_no_edge_case_was_taken_for_a_fault_of_ours(service):
    # Whatever came before left no mark.
    codes = set(service.engine.get_metrics()["errors_by_code"])
    assert codes <= {
        "malformed",
        "method_not_allowed",
        "not_found",
        "invalid_values",
        "too_large",
        "unsupported_media_type",
    }
    assert service.engine.breaker.state == "closed"
    assert service.server.transport.account.held == 0
    assert service.json("GET", "/ready")[0] == 200


@pytest.mark.parametrize("binary_data", [False, True], ids=["JSON", "binary"])
def test_a_chunked_body_is_a_body(
    service, binary_data
):  # qa, test_content_encoding_chunked_manually
    ask = binary() if binary_data else one()
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    pieces = (ask.body[i : i + 100] for i in range(0, len(ask.body), 100))
    headers = ask.headers | {"Transfer-Encoding": "chunked"}
    connection.request("POST", INFER, pieces, headers, encode_chunked=True)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer


def test_a_client_that_asks_before_it_sends_is_told_to_go_on(
    service,
):  # RFC 9110, 10.1.1; curl does
    body = TEXT.encode()
    head = (
        f"POST {INFER} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}"
    )
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as sock:
        sock.sendall(head.encode() + b"\r\n\r\n")
        with sock.makefile("rb") as stream:
            assert b" 100 " in stream.readline()
            assert stream.readline() == b"\r\n"
            sock.sendall(body)
            assert b" 200 " in stream.readline()


def test_every_version_that_metadata_lists_may_be_asked_for(service):  # protocol, Model Metadata
    status, metadata = service.json("GET", MODEL)
    assert status == 200
    assert metadata["versions"] == [service.engine.snapshot.version, "1"]
    for version in metadata["versions"]:
        path = f"{MODEL}/versions/{version}"
        assert service.json("GET", path)[1]["name"] == "router"
        assert service.request("GET", f"{path}/ready")[0] == 200
        assert service.request("POST", f"{path}/infer", TEXT.encode())[0] == 200
