"""The codec: what a careful server refuses is refused, what the protocol allows comes through."""

import json

import ml_dtypes
import numpy as np
import pytest

from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.compression import compress, decompress, request_encoding
from moe_jax.serving.http.protocol import (
    InferRequest,
    ModelSpec,
    TensorSpec,
    decode_request,
    header_length,
)
from moe_jax.serving.http.response_body import encode_response

SPEC = ModelSpec(
    name="router",
    inputs=(
        TensorSpec(name="hidden_states", datatypes=("FP32", "FP16", "BF16"), shape=(-1, -1, 2)),
        TensorSpec(name="token_mask", datatypes=("BOOL",), shape=(-1, -1), optional=True),
        TensorSpec(name="ids", datatypes=("INT32",), shape=(-1,), optional=True),
    ),
    outputs=(
        TensorSpec(name="expert_indices", datatypes=("INT32",), shape=(-1, -1, 4)),
        TensorSpec(name="router_logits", datatypes=("FP32",), shape=(-1, -1, 8), optional=True),
    ),
)
X = {"name": "hidden_states", "shape": [1, 2, 2], "datatype": "FP32", "data": [1, 2.5, -3, 4]}
RAW = {k: v for k, v in X.items() if k != "data"} | {"parameters": {"binary_data_size": 16}}


def decode(request, binary=b"", length=True):
    head = request if isinstance(request, bytes) else json.dumps(request).encode()
    return decode_request(head + binary, len(head) if binary and length else None, SPEC)


def replaced(**changes):
    return {"inputs": [{k: v for k, v in (X | changes).items() if v is not None}]}


def raw(**changes):
    return {"inputs": [RAW | changes]}


def output(**fields):
    return {"inputs": [X], "outputs": [fields]}


def text(old, new):
    """The good request with a piece of its text replaced."""
    return json.dumps({"inputs": [X]}).encode().replace(old, new)


BYTES = bytes(16)
MASK = {"name": "token_mask", "shape": [1, 2], "datatype": "BOOL"}
IDS = {"name": "ids", "shape": [2], "datatype": "INT32"}
# (what is wrong, request, binary data, piece of the message)
REFUSED = [
    ("no JSON", b"", b"", "JSON"),
    ("half of it", b'{"inputs": [', b"", "JSON"),
    ("an array", b"[]", b"", "a JSON object"),
    ("something after it", b'{"inputs": []} x', b"", "Extra data"),
    ("a byte order mark", b"\xef\xbb\xbf" + text(b"", b""), b"", "JSON"),
    ("UTF-16", json.dumps({"inputs": [X]}).encode("utf-16"), b"", "UTF-8"),
    ("bytes that are no UTF-8", text(b"FP32", b"\xff"), b"", "UTF-8"),
    ("a lone surrogate", text(b"FP32", b"\\ud800"), b"", "surrogate"),
    ("NaN", text(b"2.5", b"NaN"), b"", "NaN"),
    ("Infinity", text(b"2.5", b"-Infinity"), b"", "Infinity"),
    ("a number beyond float64", text(b"2.5", b"1e999"), b"", "fit FP32"),
    ("a number beyond float32", text(b"2.5", b"1e39"), b"", "fit FP32"),
    ("an integer of 5,000 digits", text(b"2.5", b"9" * 5000), b"", "huge"),
    ("an integer of 400 digits", text(b"2.5", b"9" * 400), b"", "fit FP32"),
    ("a key twice", text(b'"shape"', b'"name"'), b"", "more than once"),
    ("a key twice at the top", b'{"id": "a", "id": "b", "inputs": []}', b"", "more than once"),
    ("endless nesting", b'{"inputs": ' + b"[" * 100_000, b"", "nested"),
    ("a control character", text(b"FP32", b"FP\n32"), b"", "control character"),
    ("no inputs", {}, b"", "inputs"),
    ("inputs null", {"inputs": None}, b"", "null"),
    ("inputs an object", {"inputs": X}, b"", "an array"),
    ("no input", {"inputs": []}, b"", "hidden_states"),
    ("an input that is a string", {"inputs": ["hidden_states"]}, b"", "an object"),
    ("an input without a name", replaced(name=None), b"", "name"),
    ("a name that is a number", replaced(name=1), b"", "a number"),
    ("an empty name", replaced(name=""), b"", "does not take"),
    ("an unknown input", replaced(name="x"), b"", "does not take"),
    ("an extra input", {"inputs": [X, X | {"name": "x"}]}, b"", "does not take"),
    ("an input twice", {"inputs": [X, X]}, b"", "once"),
    ("only the optional one", {"inputs": [MASK | {"data": [True, True]}]}, b"", "hidden_states"),
    ("no datatype", replaced(datatype=None), b"", "datatype"),
    ("another datatype", replaced(datatype="FP64"), b"", "FP32"),
    ("an unknown datatype", replaced(datatype="float32"), b"", "FP32"),
    ("BYTES", replaced(datatype="BYTES", data=["a"] * 4), b"", "FP32"),
    ("a datatype that is a number", replaced(datatype=32), b"", "a number"),
    ("no shape", replaced(shape=None), b"", "shape"),
    ("a shape that is a number", replaced(shape=4), b"", "shape"),
    ("a shape of floats", replaced(shape=[1.0, 2.0, 2.0]), b"", "whole numbers"),
    ("a shape of strings", replaced(shape=["1", "2", "2"]), b"", "whole numbers"),
    ("a shape of booleans", replaced(shape=[True, 2, 2]), b"", "whole numbers"),
    ("a nested shape", replaced(shape=[[1, 2, 2]]), b"", "whole numbers"),
    ("a negative dimension", replaced(shape=[-1, 2, 2]), b"", "at least 1"),
    ("two negative dimensions", replaced(shape=[-1, -2, 2]), b"", "at least 1"),
    ("a dimension of zero", replaced(shape=[0, 2, 2], data=[]), b"", "at least 1"),
    ("dimensions that overflow", replaced(shape=[2**62, 2**62, 2]), b"", "too large"),
    ("dimensions that overflow to the right size", replaced(shape=[2**63, 2, 2]), b"", "large"),
    ("too few dimensions", replaced(shape=[2, 2]), b"", "3 dimensions"),
    ("too many dimensions", replaced(shape=[1, 1, 2, 2]), b"", "3 dimensions"),
    ("a million dimensions", replaced(shape=[10**9] * 100_000), b"", "3 dimensions"),
    ("another width", replaced(shape=[1, 1, 4]), b"", "expected shape"),
    ("no data", replaced(data=None), b"", "neither"),
    ("data null", text(b"[1, 2.5, -3, 4]", b"null"), b"", "null"),
    ("data a string", replaced(data="1234"), b"", "a string"),
    ("data an object", replaced(data={"0": 1}), b"", "an object"),
    ("too few elements", replaced(data=[1, 2, 3]), b"", "4 elements"),
    ("too many elements", replaced(data=[1] * 5), b"", "4 elements"),
    ("no elements", replaced(data=[]), b"", "4 elements"),
    ("rows of other lengths", replaced(data=[[[1, 2], [3, 4, 5]]]), b"", "nested"),
    ("rows missing", replaced(data=[[[1, 2]]]), b"", "nested"),
    ("half nested", replaced(data=[[1, 2], [3, 4]]), b"", "nested"),
    ("nested too deep", replaced(data=[[[[1], [2]], [[3], [4]]]]), b"", "an array"),
    ("some nested", replaced(data=[1, [2], 3, 4]), b"", "an array"),
    ("a string among numbers", replaced(data=[1, "2", 3, 4]), b"", "a string"),
    ("a boolean among numbers", replaced(data=[1, True, 3, 4]), b"", "a boolean"),
    ("null among numbers", replaced(data=[1, None, 3, 4]), b"", "null"),
    ("an object among numbers", replaced(data=[1, {}, 3, 4]), b"", "an object"),
    ("FP16 as JSON", replaced(datatype="FP16"), b"", "binary data"),
    ("BF16 as JSON", replaced(datatype="BF16"), b"", "binary data"),
    ("numbers for BOOL", {"inputs": [X, MASK | {"data": [1, 0]}]}, b"", "true and false"),
    ("floats for INT32", {"inputs": [X, IDS | {"data": [1.0, 2]}]}, b"", "whole numbers"),
    ("a boolean for INT32", {"inputs": [X, IDS | {"data": [True, 2]}]}, b"", "whole numbers"),
    ("numbers beyond INT32", {"inputs": [X, IDS | {"data": [2**31, 2]}]}, b"", "fit INT32"),
    ("data and binary data", raw(data=[1, 2, 3, 4]), BYTES, "both"),
    ("binary data that is missing", raw(), b"", "0"),
    ("binary data that is short", raw(), BYTES[:12], "12"),
    ("bytes after it", raw(), BYTES + b"\0", "17"),
    ("bytes that no input asks for", {"inputs": [X]}, b"\0", "1"),
    ("a size below the tensor's", raw(parameters={"binary_data_size": 12}), BYTES, "16"),
    ("a size above the tensor's", raw(parameters={"binary_data_size": 20}), bytes(20), "16"),
    ("a negative size", raw(parameters={"binary_data_size": -16}), BYTES, "-16"),
    ("a size of zero", raw(parameters={"binary_data_size": 0}), BYTES, "16"),
    ("a huge size", raw(parameters={"binary_data_size": 2**80}), BYTES, "16"),
    ("a size that is a float", raw(parameters={"binary_data_size": 16.0}), BYTES, "16"),
    ("a size that is a string", raw(parameters={"binary_data_size": "16"}), BYTES, "a string"),
    ("a size that is true", raw(parameters={"binary_data_size": True}), BYTES, "a boolean"),
    (
        "BOOL bytes above 1",
        {"inputs": [X, MASK | {"parameters": {"binary_data_size": 2}}]},
        b"\x01\x02",
        "0 and 1",
    ),
    ("shared memory in", raw(parameters={"shared_memory_region": "r"}), BYTES, "Shared memory"),
    ("parameters null", replaced(parameters=[]), b"", "an object"),
    ("a parameter that is an array", replaced(parameters={"a": [1]}), b"", "an array"),
    ("a parameter that is null", {"inputs": [X], "parameters": {"a": None}}, b"", "null"),
    ("parameters that are a list", {"inputs": [X], "parameters": []}, b"", "an object"),
    ("a reserved parameter", {"inputs": [X], "parameters": {"triton_x": 1}}, b"", "reserved"),
    ("an id that is a number", {"inputs": [X], "id": 7}, b"", "a number"),
    ("an id that is null", {"inputs": [X], "id": None}, b"", "null"),
    ("a priority that is a string", {"inputs": [X], "parameters": {"priority": "1"}}, b"", "whole"),
    ("a negative timeout", {"inputs": [X], "parameters": {"timeout": -1}}, b"", "at least 0"),
    ("a timeout that is a float", {"inputs": [X], "parameters": {"timeout": 0.5}}, b"", "whole"),
    (
        "binary_data_output as text",
        {"inputs": [X], "parameters": {"binary_data_output": "yes"}},
        b"",
        "true or false",
    ),
    ("a sequence", {"inputs": [X], "parameters": {"sequence_id": 3}}, b"", "no state"),
    ("outputs an object", {"inputs": [X], "outputs": {}}, b"", "an array"),
    ("outputs null", {"inputs": [X], "outputs": None}, b"", "null"),
    ("an output that is a string", {"inputs": [X], "outputs": ["a"]}, b"", "an object"),
    ("an output without a name", output(parameters={}), b"", "name"),
    ("an unknown output", output(name="logits"), b"", "does not give"),
    ("an output twice", {"inputs": [X], "outputs": [{"name": "expert_indices"}] * 2}, b"", "once"),
    (
        "binary_data as a number",
        output(name="expert_indices", parameters={"binary_data": 1}),
        b"",
        "true or false",
    ),
    ("labels", output(name="expert_indices", parameters={"classification": 3}), b"", "labels"),
    (
        "shared memory out",
        output(name="expert_indices", parameters={"shared_memory_region": "r"}),
        b"",
        "Shared memory",
    ),
]


@pytest.mark.parametrize(
    ("request_", "binary", "said"),
    [case[1:] for case in REFUSED],
    ids=[case[0] for case in REFUSED],
)
def test_what_a_careful_server_refuses_is_refused(request_, binary, said):
    with pytest.raises(ServingError) as caught:
        decode(request_, binary)
    assert caught.value.code in ("malformed", "invalid_values", "too_large")
    assert said in caught.value.message
    assert len(caught.value.message) < 400  # a message is no echo of the request


@pytest.mark.parametrize(
    "value",
    ["", "abc", "-5", "+5", "5.0", "0x5", " 5", "5 ", "1e1", "0", "999", "9" * 30, "٥"],
)
def test_a_garbage_header_length_is_refused(value):
    with pytest.raises(ServingError, match="Inference-Header-Content-Length"):
        header_length(value, 100)


def test_the_json_part_before_binary_data_is_bounded():
    with pytest.raises(ServingError) as caught:
        header_length("65537", 10**6)
    assert caught.value.code == "too_large"


def test_a_bomb_of_empty_lists_is_refused_before_it_is_parsed():
    bomb = b'{"inputs": [' + b"[]," * (1 << 20) + b"[]]}"
    with pytest.raises(ServingError) as caught:
        decode(bomb)
    assert caught.value.code == "too_large"


@pytest.mark.parametrize(
    "data",
    [[1, 2.5, -3, 4], [[[1, 2.5], [-3, 4]]], [1e0, 2.5, -3.0, 4]],
    ids=["flat", "nested", "floats"],
)
def test_json_data_may_be_flat_or_nested(data):
    x = decode(replaced(data=data)).inputs["hidden_states"]
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [[[1, 2.5], [-3, 4]]])
    assert not x.flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_binary_data_is_a_view_on_the_body(dtype):
    x = np.array([1, 2.5, -3, 4], dtype)
    name = {4: "FP32", 2: "BF16" if dtype is ml_dtypes.bfloat16 else "FP16"}[x.itemsize]
    tensor = RAW | {"datatype": name, "parameters": {"binary_data_size": x.nbytes}}
    actual = decode({"inputs": [tensor]}, x.tobytes()).inputs["hidden_states"]
    assert actual.dtype == x.dtype
    np.testing.assert_array_equal(actual.reshape(-1), x)
    assert actual.base is not None
    assert not actual.flags.writeable


def test_two_binary_inputs_follow_each_other_in_order():
    mask = MASK | {"parameters": {"binary_data_size": 2}}
    x = np.arange(4, dtype=np.float32)
    actual = decode({"inputs": [mask, RAW]}, b"\x01\x00" + x.tobytes()).inputs
    assert actual["token_mask"].tolist() == [[True, False]]
    np.testing.assert_array_equal(actual["hidden_states"].reshape(-1), x)


def test_what_tritonclient_may_send_comes_through():
    request = decode(
        {
            "id": "a",
            "inputs": [X],
            "parameters": {"priority": 1, "timeout": 250_000, "mine": 1.5, "sequence_id": 0},
            "outputs": [{"name": "router_logits", "parameters": {"binary_data": True}}],
            "something_newer": {"a": None},
        }
    )
    assert request.id == "a"
    assert request.timeout_seconds == 0.25
    assert request.outputs == (("router_logits", True),)


def test_outputs_on_request_come_only_on_request():
    assert decode({"inputs": [X]}).outputs == (("expert_indices", False),)
    asked = {"inputs": [X], "parameters": {"binary_data_output": True}}
    assert decode(asked).outputs == (("expert_indices", True),)
    some = asked | {"outputs": [{"name": "router_logits", "parameters": {"binary_data": False}}]}
    assert decode(some).outputs == (("router_logits", False),)


def answered(array, binary, id=None):
    request = InferRequest(id=id, inputs={}, outputs=(("y", binary),), timeout_seconds=None)
    parts, length = encode_response(SPEC, "1", request, {"y": array}, {"cached": False})
    body = b"".join(parts)
    return json.loads(body[:length], parse_constant=pytest.fail), body[length or len(body) :]


def test_an_answer_never_holds_a_bare_nan():
    head, rest = answered(np.array([1.0, np.nan, np.inf], np.float32), binary=False)
    assert head["outputs"][0]["data"] == [1.0, None, None]
    assert rest == b""
    head, rest = answered(np.array([np.nan], np.float32), binary=True)
    assert np.isnan(np.frombuffer(rest, np.float32)).all()


@pytest.mark.parametrize("binary", [True, False])
def test_answers_hold_every_datatype(binary):
    for dtype, name in [("i4", "INT32"), ("f4", "FP32"), ("?", "BOOL"), ("i8", "INT64")]:
        array = np.array([[0, 1], [1, 0]], dtype)
        head, rest = answered(array, binary, id="x")
        first_output = head["outputs"][0]
        assert (head["id"], first_output["datatype"], first_output["shape"]) == ("x", name, [2, 2])
        data = np.frombuffer(rest, dtype) if binary else np.array(first_output["data"], dtype)
        np.testing.assert_array_equal(data.reshape(2, 2), array)


def test_16_bit_floats_are_answered_as_binary_data_only():
    array = np.ones(2, ml_dtypes.bfloat16)
    assert answered(array, True)[0]["outputs"][0]["parameters"] == {"binary_data_size": 4}
    with pytest.raises(ServingError, match="binary_data"):
        answered(array, False)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies_are_bounded_by_what_they_become(encoding):
    packed = compress([bytes(10_000)], encoding)
    assert packed is not None
    assert bytes(decompress(packed, encoding, 10_000)) == bytes(10_000)
    with pytest.raises(ServingError) as caught:
        decompress(packed, encoding, 9_999)
    assert caught.value.code == "too_large"
    for wrong in (packed[:-1], packed + b"\0", b"", b"no such thing", packed + packed):
        with pytest.raises(ServingError) as caught:
            decompress(wrong, encoding, 100_000)
        assert caught.value.code == "malformed"


@pytest.mark.parametrize("value", ["br", "gzip, gzip", "x-gzip", "zstd", "GZIP deflate", "\0"])
def test_an_unknown_encoding_is_refused(value):
    with pytest.raises(ServingError) as caught:
        request_encoding(value)
    assert caught.value.status == 415
