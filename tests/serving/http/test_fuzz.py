"""Malformed requests by the thousand: a client's fault is never a 5xx, and memory stays flat."""

import asyncio
import gc
import json
import tracemalloc

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck

from moe_jax.serving.http.app import create_app
from moe_jax.serving.http.openapi import document
from tests.serving.http.fuzz import ask, run
from tests.serving.served import small_engine

SEED = 20_261_125


@pytest.fixture(scope="module")
def app():
    with small_engine(admin_key="operator") as engine:
        started = create_app(engine)
        yield started
        started.transport.close()


@pytest.mark.parametrize("turn", range(4))
def test_10_000_malformed_requests_are_told_so(app, turn):
    seen = asyncio.run(run(app, 2_500, SEED + turn))
    assert sum(seen.values()) == 2_500
    # A fuzzer whose requests are all refused at the first check, or all answered, tests nothing.
    assert seen[400] > 1_000
    assert seen[200] > 50
    assert {404, 405, 415} <= set(seen)
    assert app.transport.account.held == 0
    assert app.transport.pending == 0


def test_memory_stays_flat(app):
    asyncio.run(run(app, 300, SEED))
    gc.collect()
    tracemalloc.start()
    try:
        asyncio.run(run(app, 100, SEED))
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        asyncio.run(run(app, 500, SEED))
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # 500 requests of about 1 KiB: a leak of one body each would show as 500 KiB.
    assert after - before < 150_000


def cases_of(api):
    """A few requests for every operation of an OpenAPI document, as schemathesis makes them."""
    results = []
    for operation in schemathesis.openapi.from_dict(api).get_all_operations():

        @hypothesis.settings(max_examples=6, suppress_health_check=list(HealthCheck))
        @hypothesis.given(case=operation.ok().as_strategy())
        def collect(case):
            results.append(case)

        collect()
    return results


def request_of(case):
    body = case.body
    if not isinstance(body, bytes):
        body = b"" if type(body).__name__ == "NotSet" else json.dumps(body).encode()
    headers = [
        (name.lower().encode(), str(value).encode("latin-1", "replace"))
        for name, value in (case.headers or {}).items()
    ]
    if case.media_type:
        headers.append((b"content-type", case.media_type.encode()))
    return case.method, case.formatted_path, headers, body


def test_answers_have_the_statuses_that_the_openapi_document_lists(app):
    api = document(app.transport.body_limit)
    seen: set[int] = set()

    async def everything():
        for case in cases_of(api):
            request = request_of(case)
            status, _ = await ask(app, request)
            listed = api["paths"][case.path][case.method.lower()]["responses"]
            assert str(status) in listed, (request, status)
            assert status < 500
            seen.add(status)

    asyncio.run(everything())
    assert {200, 400, 401, 404} <= seen
