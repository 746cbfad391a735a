"""The real client, over HTTP and gRPC: binary and JSON in and out, compressed, asynchronous, errors."""

import gc
import gzip
import json

import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from moe_jax.serving.http.grpc_server import GrpcServer
from tests.serving.served import WIDTH, served, small_engine, tensor

OUTPUTS = ("expert_indices", "expert_weights", "num_experts_per_token", "complexity_scores")


@pytest.fixture(scope="module")
def service():
    with served(small_engine()) as started:
        yield started


@pytest.fixture(scope="module")
def client(service):
    with triton_http.InferenceServerClient(service.address, concurrency=8) as started:
        yield started


@pytest.fixture(scope="module")
def grpc_client(service):
    server = GrpcServer(service.server.transport, "127.0.0.1", 0)
    server.start()
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.port}") as started:
        yield started
    server.stop(1.0).wait()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).standard_normal((2, 3, WIDTH), dtype=np.float32)


@pytest.fixture(scope="module")
def expected(service, x):
    return service.engine.infer("router", x, return_router_logits=True).arrays


def given(kind, x, binary=True):
    datatype = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}[str(x.dtype)]
    tensor = kind.InferInput("hidden_states", list(x.shape), datatype)
    if kind is triton_http:
        tensor.set_data_from_numpy(x, binary_data=binary)
    else:
        tensor.set_data_from_numpy(x)
    return [tensor]


@pytest.mark.parametrize("packed", [None, "gzip", "deflate"])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("binary_in", [True, False])
def test_tritonclient_binary_and_json_in_and_out(
    client, x, expected, binary_in, binary_out, packed
):
    asked = [
        triton_http.InferRequestedOutput(n, binary_data=binary_out)
        for n in (*OUTPUTS, "router_logits")
    ]
    result = client.infer(
        "router",
        given(triton_http, x, binary_in),
        outputs=asked,
        request_id="mine",
        timeout=5_000_000,
        priority=1,
        request_compression_algorithm=packed,
        response_compression_algorithm=packed,
    )
    assert result.get_response()["id"] == "mine"
    for name, array in expected.items():
        actual = result.as_numpy(name)
        assert (actual.dtype, actual.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(actual, array)


def test_without_named_outputs_the_router_gives_its_decisions(client, x, expected):
    result = client.infer("router", given(triton_http, x))
    assert [o["name"] for o in result.get_response()["outputs"]] == list(OUTPUTS)
    assert result.as_numpy("router_logits") is None
    np.testing.assert_array_equal(result.as_numpy("expert_indices"), expected["expert_indices"])
    facts = result.get_response()["parameters"]
    assert {"cached", "fallback_used", "degraded", "sanitized", "processing_time_ms"} <= set(facts)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_floats_come_as_binary_data(client, grpc_client, service, x, dtype):
    small = x.astype(dtype)
    wanted = service.engine.infer("router", small).arrays["expert_indices"]
    for kind, asked in ((triton_http, client), (triton_grpc, grpc_client)):
        actual = asked.infer("router", given(kind, small)).as_numpy("expert_indices")
        np.testing.assert_array_equal(actual, wanted)


def test_the_layer_itself(client, grpc_client, service, x):
    wanted = service.engine.infer("moe", x).arrays["output"]
    assert wanted.shape == x.shape
    for kind, asked in ((triton_http, client), (triton_grpc, grpc_client)):
        actual = asked.infer("moe", given(kind, x)).as_numpy("output")
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_token_mask_leaves_tokens_out(client, x):
    mask = triton_http.InferInput("token_mask", [2, 3], "BOOL")
    mask.set_data_from_numpy(np.array([[True, True, False], [True, False, False]]))
    result = client.infer("router", [*given(triton_http, x), mask])
    counts = result.as_numpy("num_experts_per_token")
    assert (counts > 0).tolist() == [[True, True, False], [True, False, False]]


def test_asynchronous_requests_answer_their_own_question(client, x):
    batches = [x * (i + 1) for i in range(8)]
    waiting = [
        client.async_infer("router", given(triton_http, b), request_id=str(i))
        for i, b in enumerate(batches)
    ]
    # All answers are read before the client asks again: an answer that is not read keeps its
    # connection, and another call would wait for one for ever.
    results = [asked.get_result() for asked in waiting]
    for i, (result, batch) in enumerate(zip(results, batches, strict=True)):
        assert result.get_response()["id"] == str(i)
        direct = client.infer("router", given(triton_http, batch))
        np.testing.assert_array_equal(
            result.as_numpy("expert_indices"), direct.as_numpy("expert_indices")
        )


def test_health_and_metadata(client, grpc_client):
    for each in (client, grpc_client):
        assert each.is_server_live()
        assert each.is_server_ready()
        assert each.is_model_ready("router")
    server = client.get_server_metadata()
    assert server["name"] == "moe_jax"
    assert "binary_tensor_data" in server["extensions"]
    assert grpc_client.get_server_metadata().version == server["version"]
    model = client.get_model_metadata("router")
    assert model["inputs"] == [
        {"name": "hidden_states", "datatype": "FP32", "shape": [-1, -1, WIDTH]}
    ]
    assert [o["name"] for o in model["outputs"]] == [*OUTPUTS, "router_logits"]
    over_grpc = grpc_client.get_model_metadata("router")
    assert [o.name for o in over_grpc.outputs] == [*OUTPUTS, "router_logits"]
    version = model["versions"][0]
    assert client.is_model_ready("router", version)
    assert client.get_model_metadata("moe", version)["name"] == "moe"
    assert not client.is_model_ready("router", "999")


def test_a_version_may_be_named(client, grpc_client, x):
    served, current = client.get_model_metadata("router")["versions"]
    assert current == "1"  # what clients of Triton ask for where they ask for any
    assert list(grpc_client.get_model_metadata("router").versions) == [served, current]
    for kind, asked in ((triton_http, client), (triton_grpc, grpc_client)):
        for version in (served, current):
            assert asked.is_model_ready("router", version)
            result = asked.infer("router", given(kind, x), model_version=version)
            assert result.as_numpy("expert_indices") is not None
            response = result.get_response()
            response = response["model_version"] if kind is triton_http else response.model_version
            assert response == served
        with pytest.raises(InferenceServerException, match="version"):
            asked.infer("router", given(kind, x), model_version="999")


def test_errors_reach_the_client_with_status_and_text(client, grpc_client, x):
    for model, arrays, said, status, code in [
        ("nobody", x, "nobody", "404", "NOT_FOUND"),
        ("router", x[..., :8], "shape", "400", "INVALID_ARGUMENT"),
        ("router", x[0], "dimensions", "400", "INVALID_ARGUMENT"),
    ]:
        with pytest.raises(InferenceServerException, match=said) as caught:
            client.infer(model, given(triton_http, arrays))
        assert caught.value.status() == status
        with pytest.raises(InferenceServerException, match=said) as caught:
            grpc_client.infer(model, given(triton_grpc, arrays))
        assert caught.value.status() == f"StatusCode.{code}"
    asked = [triton_http.InferRequestedOutput("expert_weights", class_count=3)]
    with pytest.raises(InferenceServerException, match="labels"):
        client.infer("router", given(triton_http, x), outputs=asked)
    shared = triton_http.InferInput("hidden_states", list(x.shape), "FP32")
    shared.set_shared_memory("region", x.nbytes)
    with pytest.raises(InferenceServerException, match="Shared memory"):
        client.infer("router", [shared])


def test_grpc_takes_typed_contents_and_echoes_the_id(service, grpc_client, x, expected):
    messages = triton_grpc.service_pb2
    request = messages.ModelInferRequest(model_name="router", id="mine")
    sent = request.inputs.add(name="hidden_states", datatype="FP32", shape=x.shape)
    sent.contents.fp32_contents.extend(x.reshape(-1).tolist())
    answer = grpc_client._client_stub.ModelInfer(request)
    assert answer.id == "mine"
    actual = np.frombuffer(answer.raw_output_contents[0], np.int32).reshape(2, 3, -1)
    np.testing.assert_array_equal(actual, expected["expert_indices"])


def spoilt(change):
    messages = triton_grpc.service_pb2
    request = messages.ModelInferRequest(model_name="router")
    request.inputs.add(name="hidden_states", datatype="FP32", shape=[1, 1, WIDTH])
    request.raw_input_contents.append(bytes(4 * WIDTH))
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.raw_input_contents.append(b""), "one an input"),
        (lambda r: r.raw_input_contents.__setitem__(0, b"1234"), "bytes"),
        (lambda r: r.inputs[0].contents.fp32_contents.append(1), "both"),
        (lambda r: r.inputs.add(name="x"), "does not take"),
        (lambda r: r.inputs.add(name="hidden_states"), "once"),
        (lambda r: r.inputs[0].__setattr__("datatype", "INT32"), "datatype"),
        (lambda r: r.inputs[0].shape.__setitem__(0, -1), "at least 1"),
        (lambda r: r.inputs[0].shape.__setitem__(0, 2**62), "too large"),
        (lambda r: r.outputs.add(name="logits"), "expected some of"),
        (lambda r: r.parameters["timeout"].__setattr__("int64_param", -1), "at least 0"),
        (lambda r: r.parameters["triton_x"].__setattr__("bool_param", True), "reserved"),
        (lambda r: r.parameters["empty"].SetInParent(), "a value"),
        (lambda r: r.__setattr__("model_name", "nobody"), "nobody"),
        (lambda r: r.ClearField("raw_input_contents"), "elements"),
    ],
)
def test_grpc_refuses_what_http_refuses(grpc_client, change, said):
    import grpc

    with pytest.raises(grpc.RpcError) as caught:
        grpc_client._client_stub.ModelInfer(spoilt(change))
    assert said in caught.value.details()
    assert caught.value.code().name in ("INVALID_ARGUMENT", "NOT_FOUND")
    trailers = dict(caught.value.trailing_metadata())
    assert trailers["moe-code"] in ("malformed", "not_found")


def test_ours_and_tritonclients_messages_live_in_one_process():
    from google.protobuf import descriptor_pool

    from moe_jax.serving.http.grpc_messages import MESSAGES

    ours = MESSAGES["ModelInferRequest"](model_name="router", id="1")
    theirs = triton_grpc.service_pb2.ModelInferRequest.FromString(ours.SerializeToString())
    assert (theirs.model_name, theirs.id) == ("router", "1")
    everyone = descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert everyone is triton_grpc.service_pb2.ModelInferRequest.DESCRIPTOR
    for name, message in MESSAGES.items():
        if "." in name:
            continue
        other = getattr(triton_grpc.service_pb2, name).DESCRIPTOR.fields_by_name
        for field in message.DESCRIPTOR.fields:
            twin = other[field.name]
            assert (field.number, field.type) == (twin.number, twin.type), (name, field.name)


def test_a_digest_brings_the_answer_back_without_the_tensor(service, client, x):
    facts = client.infer("router", given(triton_http, x)).get_response()["parameters"]
    digest = facts["digest"]
    path = f"/v2/models/router/routes/{digest}"
    status, headers, body = service.request("GET", path)
    assert status == 200
    length = int(headers["inference-header-content-length"])
    assert json.loads(body[:length])["parameters"]["cached"] is True
    status, answer = service.json("GET", path + "?binary=false")
    actual = np.array(answer["outputs"][0]["data"]).reshape(answer["outputs"][0]["shape"])
    wanted = service.engine.infer("router", x).arrays["expert_indices"]
    np.testing.assert_array_equal(actual, wanted)
    assert service.json("GET", "/v2/models/router/routes/" + "0" * 32)[0] == 404
    assert service.json("GET", "/v2/models/router/routes/ab")[0] == 400


def test_answers_are_compressed_only_for_those_who_can_read_it(service):
    x = np.ones((1, 64, WIDTH), np.float32)
    body = json.dumps({"inputs": [tensor(x)]}).encode()
    path = "/v2/models/router/infer"
    _, plain, data = service.request("POST", path, body)
    assert "content-encoding" not in plain
    _, headers, packed = service.request("POST", path, body, {"Accept-Encoding": "gzip;q=0.5"})
    assert headers["content-encoding"] == "gzip"
    outputs = [json.loads(text)["outputs"] for text in (data, gzip.decompress(packed))]
    assert outputs[0] == outputs[1]
    _, headers, _ = service.request("POST", path, body, {"Accept-Encoding": "gzip;q=0, br"})
    assert "content-encoding" not in headers


@pytest.fixture(scope="module", autouse=True)
def _no_sockets_left_to_the_collector():
    # tritonclient's greenlets hold sockets in cycles; collected later they warn in another's test.
    yield
    gc.collect()
