"""Keys and limits hold over gRPC as over HTTP, with gRPC's own words."""

import contextlib

import grpc
import numpy as np
import pytest

from moe_jax.serving.http.grpc_messages import MESSAGES, SERVICE
from moe_jax.serving.http.grpc_server import GrpcServer
from moe_jax.serving.http.transport import TransportContext
from tests.serving.engine.conftest import Log
from tests.serving.served import WIDTH, small_engine

X = np.ones((1, 2, WIDTH), np.float32)


@pytest.fixture(scope="module")
def call():
    with small_engine(
        security_level="strict", api_keys="alice,bob", rate_limit_requests=3
    ) as engine:
        transport = TransportContext(engine)
        server = GrpcServer(transport, "127.0.0.1", 0)
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:

            def ask(method, message, key=None, raw=None):
                answer = MESSAGES[f"{method}Response"]
                made = channel.unary_unary(
                    f"/{SERVICE}/{method}", response_deserializer=answer.FromString
                )
                metadata = [] if key is None else [("authorization", f"Bearer {key}")]
                data = message.SerializeToString() if raw is None else raw
                return made(data, metadata=metadata, timeout=60)

            yield ask
        server.stop(1.0).wait()
        transport.close()


def test_every_call_has_a_log_line_and_a_refused_one_its_reason():
    lines = Log()
    with small_engine(logger=lines, security_level="strict", api_keys="alice") as engine:
        transport = TransportContext(engine)
        server = GrpcServer(transport, "127.0.0.1", 0)
        server.start()
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            made = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            key = ("authorization", "Bearer alice")
            for data, metadata in (
                (request().SerializeToString(), [key, ("x-request-id", "seven")]),
                (b"", [key]),
                (b"", []),
            ):
                with contextlib.suppress(grpc.RpcError):
                    made(data, metadata=metadata, timeout=60)
        server.stop(1.0).wait()
        transport.close()
    good, bad, unknown = [facts for _, event, facts in lines.lines if event == "request"]
    assert (good["method"], good["code"], good["request_id"]) == ("ModelInfer", "ok", "seven")
    assert "error" not in good
    assert bad["code"] != "ok"
    assert "expected" in bad["error"]
    assert bad["client"] == good["client"] != unknown["client"]
    assert (unknown["code"], unknown["client"]) == ("unauthorized", "127.0.0.1")


def request():
    message = MESSAGES["ModelInferRequest"](model_name="router")
    message.inputs.add(name="hidden_states", datatype="FP32", shape=X.shape)
    message.raw_input_contents.append(X.tobytes())
    return message


def refused(call, *args, **options):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **options)
    return caught.value.code().name, dict(caught.value.trailing_metadata()), caught.value.details()


@pytest.mark.parametrize("key", [None, "alice"])
def test_a_model_that_is_not_served_is_not_ready(call, key):
    """An answer, not an error: with a key or without, for an unknown name as for an unknown version."""

    def ready(**asked):
        return call("ModelReady", MESSAGES["ModelReadyRequest"](**asked), key=key).ready

    assert ready(name="router")
    assert ready(name="router", version="1")
    for asked in ({"name": "unknown"}, {"name": ""}, {"name": "router", "version": "999"}):
        assert not ready(**asked), asked


def test_keys_and_limits(call):
    assert call("ServerLive", MESSAGES["ServerLiveRequest"]()).live
    assert call("ServerReady", MESSAGES["ServerReadyRequest"]()).ready
    metadata = MESSAGES["ModelMetadataRequest"](name="router")
    assert refused(call, "ModelMetadata", metadata)[0] == "UNAUTHENTICATED"
    assert call("ModelMetadata", metadata, key="alice").name == "router"
    assert refused(call, "ModelInfer", request(), key="mallory")[0] == "UNAUTHENTICATED"
    for _ in range(3):
        assert len(call("ModelInfer", request(), key="alice").raw_output_contents) == 4
    code, trailers, text = refused(call, "ModelInfer", request(), key="alice")
    assert (code, trailers["moe-code"], text) == (
        "RESOURCE_EXHAUSTED",
        "rate_limited",
        "too many requests",
    )
    assert int(trailers["retry-after"]) >= 1
    # The limit is checked before the message is parsed; another client's garbage is.
    assert refused(call, "ModelInfer", None, key="alice", raw=b"\xff")[0] == "RESOURCE_EXHAUSTED"
    code, trailers, text = refused(call, "ModelInfer", None, key="bob", raw=b"\xff")
    assert (code, trailers["moe-code"], text) == (
        "INVALID_ARGUMENT",
        "malformed",
        "malformed request",
    )
