"""Edge cases of the protocol, each with the place that says what Triton does with it.

Three tables: what Triton refuses; what Triton and the protocol accept; what Triton lets through and a
careful server should not, which ``docs/http.md`` lists too. Read for it, and cited by the short names:

- protocol: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md
- binary: github.com/triton-inference-server/server, docs/protocol/extension_binary_data.md
- parameters: the same, docs/protocol/extension_parameters.md
- server: the same, src/http_server.cc, by function
- qa: the same, qa/L0_http/http_test.py, by test
- core: github.com/triton-inference-server/core, src/infer_request.cc, by function
- json: github.com/triton-inference-server/common, include/triton/common/triton_json.h, by function
  (on rapidjson, by its parse errors)

They were read, not run: no Triton server was at hand.
"""

import gzip
import json
import zlib

import numpy as np

from tests.serving.served import WIDTH, tensor

MODEL = "/v2/models/router"
INFER = f"{MODEL}/infer"
LENGTH = "Inference-Header-Content-Length"
X = np.random.default_rng(7).standard_normal((1, 2, WIDTH), dtype=np.float32)
BYTES = X.tobytes()
GOOD = tensor(X)
RAW = {k: v for k, v in GOOD.items() if k != "data"} | {
    "parameters": {"binary_data_size": len(BYTES)}
}
MASK = {"name": "token_mask", "shape": [1, 2], "datatype": "BOOL"}
NUMBERS = GOOD["data"]
TEXT = json.dumps({"inputs": [GOOD]})
FIRST = json.dumps(NUMBERS[0])


class Ask:
    """One request: JSON with binary data behind it, or whatever bytes."""

    def __init__(self, body, binary=b"", *, path=INFER, method="POST", length="right", **headers):
        head = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.method, self.path, self.body = method, path, head + binary
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if length == "right":
            length = str(len(head)) if binary else None
        if length is not None:
            self.headers[LENGTH] = length


def one(**changes):
    """The good request with its input changed; None takes a field away."""
    return Ask({"inputs": [{k: v for k, v in (GOOD | changes).items() if v is not None}]})


def top(**more):
    return Ask({"inputs": [GOOD], **more})


def output(**fields):
    return top(outputs=[fields])


def labels(count):
    return output(name="expert_weights", parameters={"classification": count})


def masked(mask):
    """Both inputs as binary data."""
    return Ask({"inputs": [MASK | {"parameters": {"binary_data_size": 2}}, RAW]}, mask + BYTES)


def binary(data=BYTES, length="right", **changes):
    return Ask({"inputs": [RAW | changes]}, data, length=length)


def sized(size, data=BYTES):
    return binary(data, parameters={"binary_data_size": size})


def text(old, new):
    """The good request with a piece of its text replaced, once."""
    assert old in TEXT
    return Ask(TEXT.replace(old, new, 1).encode())


def number(literal):
    return text(f'"data": [{FIRST}', f'"data": [{literal}')


def nested(levels):
    """The good request with a member that nobody reads, so that the whole is nested so deep."""
    return top(note=json.loads("[" * (levels - 1) + "]" * (levels - 1)))


def at(path, method="POST"):
    return Ask(TEXT.encode() if method == "POST" else b"", path=path, method=method)


REFUSED = {
    # --- JSON: json, Parse
    "no body": (
        Ask(b""),
        "server, EVRequestToTritonRequest: no header is a raw request; core, Normalize",
    ),
    "white space": (Ask(b"  \n "), "rapidjson, kParseErrorDocumentEmpty"),
    "half an object": (
        Ask(TEXT[:-10].encode()),
        "rapidjson, kParseErrorObjectMissCommaOrCurlyBracket",
    ),
    "something after the object": (
        Ask(TEXT.encode() + b" x"),
        "rapidjson, kParseErrorDocumentRootNotSingular",
    ),
    "two objects": (Ask(TEXT.encode() * 2), "rapidjson, kParseErrorDocumentRootNotSingular"),
    "an array": (Ask(b"[]"), "server, ParseJsonTritonIO: 'inputs' of an array"),
    "a string": (Ask(b'"inputs"'), "server, ParseJsonTritonIO"),
    "null": (Ask(b"null"), "server, ParseJsonTritonIO"),
    "a comma too many": (Ask(b'{"inputs": [],}'), "rapidjson, kParseErrorObjectMissName"),
    "single quotes": (Ask(TEXT.replace('"', "'").encode()), "rapidjson, kParseErrorObjectMissName"),
    "a comment": (Ask(b"/* */" + TEXT.encode()), "rapidjson, without kParseCommentsFlag"),
    "a byte order mark": (
        Ask(b"\xef\xbb\xbf" + TEXT.encode()),
        "rapidjson, kParseErrorValueInvalid",
    ),
    "a lone surrogate": (top(id="\ud800"), "rapidjson, kParseErrorStringUnicodeSurrogateInvalid"),
    "a raw control character": (
        text("FP32", "FP\n32"),
        "rapidjson, kParseErrorStringInvalidEncoding",
    ),
    "a bad escape": (text("FP32", "\\xFP32"), "rapidjson, kParseErrorStringEscapeInvalid"),
    "nested 101 deep": (nested(101), "qa, test_json_recursion_depth_limit"),
    "data nested 120 deep": (
        one(shape=[1, 1, 1], data=json.loads("[" * 120 + "1" + "]" * 120)),
        "qa, test_json_recursion_depth_limit",
    ),
    "a number beyond double": (number("1e999"), "rapidjson, kParseErrorNumberTooBig"),
    "an integer of 400 digits": (number("9" * 400), "rapidjson, kParseErrorNumberTooBig"),
    "a leading zero": (number("01"), "rapidjson: 01 is 0 and something after it"),
    "a plus sign": (number("+1"), "rapidjson, kParseErrorValueInvalid"),
    "hexadecimal": (number("0x1"), "rapidjson: 0 and something after it"),
    "a point without digits": (number("1."), "rapidjson, kParseErrorNumberMissFraction"),
    "an exponent without digits": (number("1e"), "rapidjson, kParseErrorNumberMissExponent"),
    "True": (text('"datatype"', '"flag": True, "datatype"'), "rapidjson, kParseErrorValueInvalid"),
    # --- the request
    "no inputs": (Ask({}), "server, ParseJsonTritonIO: MemberAsArray 'inputs'"),
    "inputs null": (Ask({"inputs": None}), "server, ParseJsonTritonIO"),
    "inputs an object": (Ask({"inputs": GOOD}), "server, ParseJsonTritonIO"),
    "no input at all": (Ask({"inputs": []}), "core, Normalize: the number of inputs"),
    "an input that is a string": (Ask({"inputs": ["hidden_states"]}), "server, ParseJsonTritonIO"),
    "an id that is a number": (top(id=7), "server, ParseJsonTritonRequestID"),
    "an id that is null": (top(id=None), "server, ParseJsonTritonRequestID"),
    # --- an input
    "no name": (one(name=None), "server, ParseJsonTritonIO: 'name'"),
    "a name that is a number": (one(name=1), "server, ParseJsonTritonIO: 'name'"),
    "an unknown input": (one(name="x"), "core, Normalize: GetInput"),
    "a name in capitals": (
        one(name="HIDDEN_STATES"),
        "protocol, HTTP/REST: strings are case-sensitive",
    ),
    "an extra input": (Ask({"inputs": [GOOD, GOOD | {"name": "x"}]}), "core, Normalize: GetInput"),
    "an input twice": (Ask({"inputs": [GOOD, GOOD]}), "core, AddOriginalInput: already exists"),
    "only the optional input": (
        Ask({"inputs": [MASK | {"data": [True, True]}]}),
        "core, Normalize: missing required inputs",
    ),
    "batches that differ": (
        Ask({"inputs": [GOOD, MASK | {"shape": [2, 1], "data": [True] * 2}]}),
        "core, Normalize: batch size does not match other inputs",
    ),
    "no datatype": (one(datatype=None), "server, ParseJsonTritonIO: 'datatype'"),
    "a datatype that is a number": (one(datatype=32), "server, ParseJsonTritonIO: 'datatype'"),
    "another datatype": (one(datatype="FP64"), "core, Normalize: data-type"),
    "an integer datatype": (one(datatype="INT32", data=[1] * 32), "core, Normalize: data-type"),
    "an unknown datatype": (one(datatype="FLOAT"), "server, ReadDataFromJson: invalid datatype"),
    "a datatype in small letters": (
        one(datatype="fp32"),
        "server, ReadDataFromJson: invalid datatype",
    ),
    "BYTES": (one(datatype="BYTES", data=["a"] * 32), "core, Normalize: data-type"),
    "FP16 as JSON": (one(datatype="FP16"), "server, ReadDataFromJson: FP16 via JSON"),
    "BF16 as JSON": (one(datatype="BF16"), "server, ReadDataFromJson: BF16 via JSON"),
    "no shape": (one(shape=None), "server, ParseJsonTritonIO: 'shape'"),
    "a shape that is a number": (one(shape=32), "server, ParseJsonTritonIO: 'shape'"),
    "a shape of strings": (one(shape=["1", "2", "16"]), "json, IndexAsUInt"),
    "a shape of floats": (one(shape=[1.0, 2.0, 16.0]), "json, IndexAsUInt"),
    "a nested shape": (one(shape=[[1, 2, 16]]), "json, IndexAsUInt"),
    "an empty shape": (one(shape=[], data=[1]), "core, Normalize: unexpected shape"),
    "a negative dimension": (one(shape=[1, -2, 16]), "qa, test_negative_dimensions"),
    "a dimension of -1": (one(shape=[-1, 2, 16]), "json, IndexAsUInt"),
    "two negative dimensions": (one(shape=[-1, -2, 16]), "json, IndexAsUInt"),
    "a dimension beyond 64 bits": (one(shape=[1, 2**64, 16]), "json, IndexAsUInt"),
    "elements that overflow": (
        one(shape=[2**4, 2**60 + 2, 16], data=[1.0]),
        "qa, test_buffer_size_overflow",
    ),
    "bytes that overflow": (
        one(shape=[2**2, 2**56 + 2, 16], data=[1.0]),
        "qa, test_buffer_size_overflow",
    ),
    "too few dimensions": (one(shape=[2, 16]), "core, Normalize: unexpected shape"),
    "too many dimensions": (one(shape=[1, 1, 2, 16]), "core, Normalize: unexpected shape"),
    "another width": (one(shape=[1, 4, 8]), "core, Normalize: unexpected shape"),
    "a batch too large": (
        one(shape=[2048, 1, WIDTH], data=[0] * 2048 * WIDTH),
        "core, Normalize: batch-size must be <=",
    ),
    # --- data as JSON
    "no data": (one(data=None), "server, ValidateInputContentType: no field is set"),
    "data null": (
        text(json.dumps(NUMBERS), "null"),
        "server, ParseJsonTritonIO: 'data' is no array",
    ),
    "data a string": (one(data="1"), "server, ParseJsonTritonIO: 'data' is no array"),
    "data an object": (one(data={"0": 1}), "server, ParseJsonTritonIO: 'data' is no array"),
    "too few numbers": (one(data=NUMBERS[:-1]), "server, ReadDataFromJson: shape does not match"),
    "too many numbers": (
        one(data=[*NUMBERS, 1.0]),
        "server, ReadDataFromJsonHelper: shape does not match",
    ),
    "too many rows": (one(data=[X[0].tolist(), X[0].tolist()]), "server, ReadDataFromJsonHelper"),
    "a string among numbers": (one(data=["1", *NUMBERS[1:]]), "json, AsDouble"),
    "a boolean among numbers": (one(data=[True, *NUMBERS[1:]]), "json, AsDouble"),
    "null among numbers": (one(data=[None, *NUMBERS[1:]]), "json, AsDouble"),
    "an object among numbers": (one(data=[{}, *NUMBERS[1:]]), "json, AsDouble"),
    "numbers for BOOL": (Ask({"inputs": [GOOD, MASK | {"data": [1, 0]}]}), "json, AsBool"),
    # --- data as bytes
    "data and a size": (
        Ask({"inputs": [RAW | {"data": NUMBERS}]}, BYTES),
        "server, ValidateInputContentType: only one of the fields",
    ),
    "a size that is negative": (sized(-128), "json, AsUInt"),
    "a size that is a float": (sized(128.0), "json, AsUInt"),
    "a size that is a string": (sized("128"), "json, AsUInt"),
    "a size that is true": (sized(True), "json, AsUInt"),
    "a size beyond 64 bits": (sized(2**64), "json, AsUInt"),
    "a size below the shape's": (sized(124), "server, ParseJsonTritonIO: additional input data"),
    "a size above the shape's": (
        sized(132),
        "server, ParseJsonTritonIO: expecting additional bytes",
    ),
    "bytes and size below the shape's": (
        sized(124, BYTES[:124]),
        "binary: native size; core: byte size of inputs",
    ),
    "bytes and size above the shape's": (
        sized(132, BYTES + bytes(4)),
        "binary: native size; core: byte size",
    ),
    "a size of zero": (sized(0), "server, ParseJsonTritonIO: additional input data"),
    "too few bytes": (binary(BYTES[:-1]), "server, ParseJsonTritonIO: expecting additional bytes"),
    "too many bytes": (binary(BYTES + b"\0"), "server, ParseJsonTritonIO: additional input data"),
    "bytes that no input has": (
        Ask({"inputs": [GOOD]}, b"\0" * 8),
        "server, ParseJsonTritonIO: additional input data",
    ),
    "bytes without the header": (
        binary(length=None),
        "server, GetInferenceHeaderLength: all of it is JSON",
    ),
    "a size without bytes": (
        binary(b"", length=None),
        "server, ParseJsonTritonIO: expecting additional bytes",
    ),
    "a header of zero": (
        binary(length="0"),
        "server, EVBufferToRawInput; core: more than one variable dimension",
    ),
    "a header of a word": (
        binary(length="abc"),
        "server, GetInferenceHeaderLength: atoi makes it 0",
    ),
    "an empty header": (binary(length=""), "server, GetInferenceHeaderLength: atoi makes it 0"),
    "a negative header": (binary(length="-1"), "server, GetInferenceHeaderLength: out of range"),
    "a header above the body": (
        binary(length="100000"),
        "server, GetInferenceHeaderLength: out of range",
    ),
    "a header below the JSON": (
        binary(length="20"),
        "rapidjson, kParseErrorObjectMissCommaOrCurlyBracket",
    ),
    "a header above the JSON": (
        binary(length=str(len(json.dumps({"inputs": [RAW]})) + 1)),
        "rapidjson, kParseErrorDocumentRootNotSingular",
    ),
    "only bytes": (Ask(BYTES, length="0"), "core, Normalize: more than one variable dimension"),
    "shared memory nobody registered": (
        one(data=None, parameters={"shared_memory_region": "r", "shared_memory_byte_size": 128}),
        "server, ParseJsonTritonIO: GetMemoryInfo",
    ),
    "shared memory beside data": (
        one(parameters={"shared_memory_region": "r"}),
        "server, ValidateInputContentType",
    ),
    # --- outputs
    "outputs an object": (top(outputs={}), "server, ParseJsonTritonIO: 'outputs'"),
    "outputs null": (top(outputs=None), "server, ParseJsonTritonIO: 'outputs'"),
    "an output that is a string": (top(outputs=["expert_indices"]), "server, ParseJsonTritonIO"),
    "an output without a name": (output(parameters={}), "server, ParseJsonTritonIO: 'name'"),
    "an output's name that is a number": (output(name=1), "server, ParseJsonTritonIO: 'name'"),
    "an unknown output": (output(name="logits"), "core, Normalize: GetOutput"),
    "an output twice": (
        top(outputs=[{"name": "expert_indices"}] * 2),
        "qa, test_duplicate_output_names",
    ),
    "binary_data that is no boolean": (
        output(name="expert_indices", parameters={"binary_data": 1}),
        "json, AsBool",
    ),
    "classification that is no number": (labels("3"), "json, AsUInt"),
    "shared memory and classification": (
        output(
            name="expert_weights", parameters={"shared_memory_region": "r", "classification": 1}
        ),
        "server, ValidateOutputParameter",
    ),
    # --- parameters of the request
    "parameters an array": (top(parameters=[]), "json, Members of no object"),
    "a parameter that is null": (
        top(parameters={"a": None}),
        "server, SetTritonParameterFromJsonParameter",
    ),
    "a parameter that is an array": (
        top(parameters={"a": [1]}),
        "server, SetTritonParameterFromJsonParameter",
    ),
    "a parameter that is an object": (
        top(parameters={"a": {}}),
        "server, SetTritonParameterFromJsonParameter",
    ),
    "a reserved parameter": (
        top(parameters={"triton_enable_empty_final_response": True}),
        "parameters",
    ),
    "a timeout that is a string": (
        top(parameters={"timeout": "1000"}),
        "server, ParseJsonTritonParams",
    ),
    "a timeout that is negative": (
        top(parameters={"timeout": -1}),
        "server, ParseJsonTritonParams",
    ),
    "a timeout that is a float": (
        top(parameters={"timeout": 1.5}),
        "server, ParseJsonTritonParams",
    ),
    "a priority that is a string": (
        top(parameters={"priority": "1"}),
        "server, ParseJsonTritonParams",
    ),
    "a priority that is negative": (
        top(parameters={"priority": -1}),
        "server, ParseJsonTritonParams",
    ),
    "binary_data_output that is text": (
        top(parameters={"binary_data_output": "true"}),
        "server, ParseJsonTritonParams",
    ),
    "sequence_start that is a number": (
        top(parameters={"sequence_start": 1}),
        "server, ParseJsonTritonParams",
    ),
    "sequence_id that is a boolean": (
        top(parameters={"sequence_id": True}),
        "server, ParseJsonTritonParams",
    ),
    "sequence_id that is a float": (
        top(parameters={"sequence_id": 1.5}),
        "server, ParseJsonTritonParams",
    ),
    # --- HTTP
    "an encoding that does not exist": (
        Ask(TEXT.encode(), Content_Encoding="br"),
        "server, DecompressBuffer",
    ),
    "gzip that is none": (Ask(TEXT.encode(), Content_Encoding="gzip"), "server, DecompressBuffer"),
    "deflate that is none": (
        Ask(TEXT.encode(), Content_Encoding="deflate"),
        "server, DecompressBuffer",
    ),
    "deflate that is gzip": (
        Ask(zlib.compress(TEXT.encode()), Content_Encoding="gzip"),
        "server, DecompressBuffer",
    ),
    "half a gzip stream": (
        Ask(gzip.compress(TEXT.encode())[:-9], Content_Encoding="gzip"),
        "server, DecompressBuffer",
    ),
    "GET": (at(INFER, "GET"), "server, HandleInfer: Method Not Allowed"),
    "PUT": (at(INFER, "PUT"), "server, HandleInfer: Method Not Allowed"),
    "POST to the metadata": (at(MODEL), "server, HandleModelMetadata: Method Not Allowed"),
    "POST to a probe": (at("/v2/health/live"), "server, HandleServerHealth: Method Not Allowed"),
    "an unknown model": (
        at("/v2/models/nobody/infer"),
        "server, CheckTransactionPolicy: not found",
    ),
    "a model in capitals": (
        at("/v2/models/ROUTER/infer"),
        "protocol, HTTP/REST: strings are case-sensitive",
    ),
    "no model": (at("/v2/models//infer"), "server, model_regex_"),
    "an unknown version": (
        at(f"{MODEL}/versions/999/infer"),
        "server, CheckTransactionPolicy: not found",
    ),
    "version 0": (at(f"{MODEL}/versions/0/infer"), "server, CheckTransactionPolicy: not found"),
    "a negative version": (at(f"{MODEL}/versions/-1/infer"), "server, model_regex_"),
    "a version beyond 64 bits": (
        at(f"{MODEL}/versions/{10**30}/infer"),
        "server, GetModelVersionFromString",
    ),
    "no version": (at(f"{MODEL}/versions//infer"), "server, model_regex_"),
    "a slash at the end": (at(f"{INFER}/"), "server, model_regex_ is matched in full"),
    "an unknown action": (at(f"{MODEL}/guess"), "server, model_regex_"),
    "an older protocol": (at("/v1/models/router:predict"), "server, Handle: not found"),
    "an unknown version's metadata": (
        at(f"{MODEL}/versions/999", "GET"),
        "server, HandleModelMetadata",
    ),
    "an unknown model's readiness": (
        at("/v2/models/nobody/ready", "GET"),
        "server, HandleModelReady",
    ),
}
ACCEPTED = {
    "flat data": (one(), "protocol, Tensor Data: flattened"),
    "nested data": (one(data=X.tolist()), "protocol, Tensor Data: natural, multi-dimensional"),
    "binary data": (binary(), "binary"),
    "binary data as octets": (
        Ask({"inputs": [RAW]}, BYTES, Content_Type="application/octet-stream"),
        "binary",
    ),
    "a header that is all of the JSON": (
        Ask(TEXT.encode(), length=str(len(TEXT))),
        "server, GetInferenceHeaderLength",
    ),
    "members that nobody knows": (
        top(model_name="router", note={"a": [None]}),
        "binary, Examples: model_name",
    ),
    "nested 100 deep": (nested(100), "qa, test_json_recursion_depth_limit"),
    "white space around": (Ask(f" \r\n\t{TEXT}\n".encode()), "rapidjson, SkipWhitespace"),
    "escapes in names": (text("hidden_states", "hidden\\u005fstates"), "rapidjson, ParseString"),
    "an empty id": (top(id=""), "server, ParseJsonTritonRequestID"),
    "outputs empty": (top(outputs=[]), "core, Normalize: no output asked for is every one"),
    "an output named": (output(name="expert_indices"), "protocol, Request Output"),
    "an output as JSON against the request": (
        top(
            parameters={"binary_data_output": True},
            outputs=[{"name": "expert_indices", "parameters": {"binary_data": False}}],
        ),
        "binary: overrides",
    ),
    "parameters empty": (top(parameters={}), "protocol, Parameters"),
    "parameters of every kind": (
        top(parameters={"a": "b", "c": 1, "d": True, "e": 1.5}),
        "server, SetTritonParameterFromJsonParameter",
    ),
    "priority and timeout": (
        top(parameters={"priority": 3, "timeout": 20_000_000}),
        "server, ParseJsonTritonParams",
    ),
    "a timeout of zero": (top(parameters={"timeout": 0}), "server, ParseJsonTritonParams: none"),
    "no sequence": (
        top(parameters={"sequence_id": 0, "sequence_start": False}),
        "server, ParseJsonTritonParams",
    ),
    "a mask of all tokens": (
        Ask({"inputs": [GOOD, MASK | {"data": [True, True]}]}),
        "core, Normalize: optional inputs",
    ),
    "the mask first": (
        Ask({"inputs": [MASK | {"data": [[True, True]]}, GOOD]}),
        "protocol: inputs go by name",
    ),
    "JSON and binary in one": (
        Ask({"inputs": [MASK | {"data": [True, True]}, RAW]}, BYTES),
        "server, ParseJsonTritonIO",
    ),
    "two binary inputs": (masked(b"\1\1"), "binary: in the order of the inputs"),
    "gzip": (
        Ask(gzip.compress(TEXT.encode()), Content_Encoding="gzip"),
        "server, DecompressBuffer",
    ),
    "deflate": (
        Ask(zlib.compress(TEXT.encode()), Content_Encoding="deflate"),
        "server, DecompressBuffer",
    ),
    "identity": (
        Ask(TEXT.encode(), Content_Encoding="identity"),
        "server, GetRequestCompressionType",
    ),
    "a query": (at(f"{INFER}?trace=1"), "server, Handle: the path alone is matched"),
    "version 1": (
        at(f"{MODEL}/versions/1/infer"),
        "docs/user_guide/model_repository.md: a version is a number",
    ),
}

STRICTER = {
    "NaN": (number("NaN"), 400, "json, Parse: kParseNanAndInfFlag"),
    "Infinity": (number("-Infinity"), 400, "json, Parse: kParseNanAndInfFlag"),
    "a number beyond FP32": (
        number("1e39"),
        422,
        "server, ReadDataFromJsonHelper: becomes infinity",
    ),
    "a key twice": (
        text('"shape"', '"shape": [1, 1, 16], "shape"'),
        400,
        "rapidjson: the first counts",
    ),
    "bytes that are no UTF-8": (
        Ask(TEXT.replace("FP32", "FP32\udcff").encode("utf-8", "surrogateescape")),
        400,
        "rapidjson, without kParseValidateEncodingFlag",
    ),
    "a dimension of zero": (
        one(shape=[1, 0, 16], data=[]),
        400,
        "server, ParseJsonTritonIO: FIXME",
    ),
    "data nested otherwise": (
        one(data=[X[0].tolist()[0], X[0].tolist()[1]]),
        400,
        "server, ReadDataFromJsonHelper",
    ),
    "a header with a word behind": (
        binary(length=f"{len(json.dumps({'inputs': [RAW]}))}x"),
        400,
        "server, GetInferenceHeaderLength: atoi",
    ),
    "BOOL bytes above 1": (masked(b"\1\2"), 400, "binary: 1 is true and 0 is false"),
    "labels": (labels(2), 400, "docs/protocol/extension_classification.md"),
    "a sequence": (top(parameters={"sequence_id": 9}), 400, "docs/protocol/extension_sequence.md"),
    "another content type": (
        Ask(TEXT.encode(), Content_Type="text/html"),
        415,
        "server: not looked at",
    ),
    "version 01": (
        at(f"{MODEL}/versions/01/infer"),
        404,
        "server, GetModelVersionFromString: stoll",
    ),
}
