"""Requests from bytes and answers to bytes: valid ones come through unchanged, wrong ones get a one-sentence error."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from suanli.serving.codec import parse, render
from suanli.serving.protocol import DATATYPES, InferRequest, InferResponse, Refusal, Tensor, join_bytes

FUZZ = Path(__file__).parents[1] / "benchmarks" / "fuzz_protocol.py"
FUZZ_CASES = 20_000


# --- valid requests ---


@st.composite
def tensors(draw: st.DrawFn, *, text: bool = False, finite: bool = False) -> Tensor:
    """A tensor of any datatype; with `text`, BYTES are UTF-8 and can stand in JSON."""
    datatype = draw(st.sampled_from([*DATATYPES, "BYTES"]))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=8, min_side=0, max_side=3))
    name = draw(st.text(min_size=1, max_size=9).filter(lambda name: name.isprintable()))
    data: np.ndarray | list[bytes]
    if datatype == "BYTES":
        element = st.text(max_size=9).map(str.encode) if text else st.binary(max_size=9)
        count = math.prod(shape)
        data = draw(st.lists(element, min_size=count, max_size=count))
    else:
        dtype = DATATYPES[datatype]
        limits = {"allow_nan": False, "allow_infinity": False} if finite and dtype.kind == "f" else {}
        data = draw(npst.arrays(dtype, shape, elements=npst.from_dtype(dtype, **limits)))
    return Tensor(name=name, datatype=datatype, shape=shape, data=data)


def several(**options: bool) -> st.SearchStrategy[list[Tensor]]:
    return st.lists(tensors(**options), min_size=1, max_size=4, unique_by=lambda tensor: tensor.name)


def nested(values: list[Any], shape: tuple[int, ...]) -> Any:
    """A flat list as lists in lists."""
    if not shape:
        return values[0]
    size = math.prod(shape[1:])
    return [nested(values[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def as_json(tensor: Tensor, *, nest: bool) -> dict[str, Any]:
    if isinstance(tensor.data, list):
        values: list[Any] = [element.decode() for element in tensor.data]
    else:
        values = tensor.data.ravel().tolist()
    data = nested(values, tensor.shape) if nest and tensor.shape else values
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape), "data": data}


def raw(tensor: Tensor) -> bytes:
    """Little-endian bytes, by the words of the extension."""
    if isinstance(tensor.data, list):
        return b"".join(len(element).to_bytes(4, "little") + element for element in tensor.data)
    return tensor.data.astype(tensor.data.dtype.newbyteorder("<")).tobytes()


def binary(sent: list[Tensor], **more: Any) -> tuple[bytes, int]:
    inputs = [
        {"name": t.name, "datatype": t.datatype, "shape": t.shape, "parameters": {"binary_data_size": len(raw(t))}}
        for t in sent
    ]
    head = json.dumps({"inputs": inputs} | more).encode()
    return head + b"".join(map(raw, sent)), len(head)


def same(result: Tensor, sent: Tensor) -> None:
    assert (result.name, result.datatype, result.shape) == (sent.name, sent.datatype, sent.shape)
    if isinstance(sent.data, list):
        assert result.data == sent.data
    else:
        assert isinstance(result.data, np.ndarray)
        assert (result.data.dtype, result.data.shape) == (DATATYPES[sent.datatype], sent.shape)
        np.testing.assert_array_equal(result.data, sent.data)


@given(several(text=True, finite=True), st.booleans(), st.none() | st.text(max_size=9))
def test_json_comes_through(sent: list[Tensor], nest: bool, identity: str | None) -> None:
    body = {"inputs": [as_json(tensor, nest=nest) for tensor in sent], "parameters": {"a": 1}, "unknown": []}
    result = parse(json.dumps(body | ({} if identity is None else {"id": identity})).encode())
    assert (result.id, result.parameters, result.outputs, result.binary_output) == (identity, {"a": 1}, (), False)
    for one, other in zip(result.inputs, sent, strict=True):
        same(one, other)


@given(several())
def test_bytes_come_through(sent: list[Tensor]) -> None:
    result = parse(*binary(sent, id="7"))
    assert result.id == "7"
    for one, other in zip(result.inputs, sent, strict=True):
        same(one, other)


@given(tensors(), tensors(text=True, finite=True))
def test_one_input_is_binary_and_the_next_is_not(first: Tensor, second: Tensor) -> None:
    second = replace(second, name=f"{first.name}+")  # two tensors can't share a name
    about = {"name": first.name, "datatype": first.datatype, "shape": first.shape}
    inputs = [about | {"parameters": {"binary_data_size": len(raw(first))}}, as_json(second, nest=False)]
    head = json.dumps({"inputs": inputs}).encode()
    result = parse(head + raw(first), len(head))
    same(result.inputs[0], first)
    same(result.inputs[1], second)


def test_raw_bytes_are_not_copied() -> None:
    pixels = np.arange(1 << 20, dtype=np.uint8)
    body, header = binary([Tensor(name="a", datatype="UINT8", shape=pixels.shape, data=pixels)])
    (result,) = parse(body, header).inputs
    assert isinstance(result.data, np.ndarray)
    assert np.shares_memory(result.data, np.frombuffer(body, np.uint8))
    assert not result.data.flags.writeable


def test_a_raw_body_is_one_element() -> None:
    result = parse(b"\x89PNG", 0)
    assert result.binary_output
    assert [(t.name, t.datatype, t.shape, t.data) for t in result.inputs] == [("", "BYTES", (1,), [b"\x89PNG"])]


def test_large_and_small_integers_keep_every_digit() -> None:
    values = {"UINT64": [2**64 - 1, 0, 2**53 + 1], "INT64": [-(2**63), 2**63 - 1, 2**53 + 1]}
    inputs = [{"name": n, "datatype": n, "shape": [3], "data": data} for n, data in values.items()]
    for tensor in parse(json.dumps({"inputs": inputs}).encode()).inputs:
        assert isinstance(tensor.data, np.ndarray)
        assert tensor.data.tolist() == values[tensor.datatype]


@given(several(), st.none() | st.text(max_size=9))
def test_a_binary_answer_comes_through(sent: list[Tensor], identity: str | None) -> None:
    options = InferRequest(inputs=(), binary_output=True)
    parts, head = render(InferResponse(id=identity, model_name="m", model_version="3", outputs=tuple(sent)), options)
    assert head == len(parts[0])
    answer = json.loads(parts[0])
    assert (answer["model_name"], answer["model_version"], answer.get("id")) == ("m", "3", identity)
    assert ("id" in answer) == (identity is not None)
    at = head
    body = b"".join(parts)
    for output, tensor in zip(answer["outputs"], sent, strict=True):
        assert "data" not in output
        size = output["parameters"]["binary_data_size"]
        assert body[at : at + size] == raw(tensor)
        at += size
        assert (output["name"], output["datatype"], output["shape"]) == (tensor.name, tensor.datatype, [*tensor.shape])
    assert at == len(body)


@given(several(text=True, finite=True))
def test_a_json_answer_comes_through(sent: list[Tensor]) -> None:
    parts, head = render(
        InferResponse(id=None, model_name="m", model_version="1", outputs=tuple(sent)), InferRequest(inputs=())
    )
    assert head is None
    answer = json.loads(b"".join(parts))
    assert answer["outputs"] == [as_json(tensor, nest=False) for tensor in sent]


ONE = Tensor(name="one", datatype="FP32", shape=(2,), data=np.array([0.5, 0.25], np.float32))
TWO = Tensor(name="two", datatype="BYTES", shape=(1,), data=[b"cat"])


@pytest.mark.parametrize(
    ("options", "is_binary"),
    [
        ({}, []),
        ({"parameters": {"binary_data_output": True}}, ["one", "two"]),
        ({"outputs": [{"name": "one", "parameters": {"binary_data": True}}, {"name": "two"}]}, ["one"]),
        (
            {
                "outputs": [{"name": "one", "parameters": {"binary_data": False}}, {"name": "two"}],
                "parameters": {"binary_data_output": True},
            },
            ["two"],
        ),
    ],
    ids=["not said", "all of them", "one of them", "all but one"],
)
def test_outputs_are_binary_where_that_is_asked_for(options: dict[str, Any], is_binary: list[str]) -> None:
    inputs = [{"name": "a", "datatype": "BOOL", "shape": [1], "data": [True]}]
    request = parse(json.dumps({"inputs": inputs} | options).encode())
    parts, head = render(InferResponse(id=None, model_name="m", model_version="1", outputs=(ONE, TWO)), request)
    answer = json.loads(parts[0])
    assert [output["name"] for output in answer["outputs"] if "data" not in output] == is_binary
    assert (head is None) == (not is_binary)
    assert parts[1:] == [raw({"one": ONE, "two": TWO}[name]) for name in is_binary]


# --- wrong requests ---


def body(**changes: Any) -> bytes:
    """A request with one input of four bytes, with something else in it."""
    sent: dict[str, Any] = {"name": "a", "datatype": "UINT8", "shape": [2, 2], "data": [1, 2, 3, 4]}
    sent = {key: value for key, value in (sent | changes).items() if value is not ...}
    return json.dumps({"inputs": [sent]}).encode()


def sized(size: Any, data: bytes = b"1234", **changes: Any) -> tuple[bytes, int]:
    head = body(data=..., parameters={"binary_data_size": size}, **changes)
    return head + data, len(head)


def refused(sent: bytes, header: int | None = None) -> str:
    """The error that a wrong request gets."""
    with pytest.raises(Refusal) as caught:
        parse(sent, header)
    assert caught.value.status == 400
    assert caught.value.message.endswith(".")
    assert len(caught.value.message) < 1000
    return caught.value.message


BIG = b"9" * 5000  # more digits than Python reads
WRONG_JSON: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not JSON"),
    "not JSON": (b"\x89PNG\r\n", "not JSON"),
    "not UTF-8": (b'{"inputs": "\xff\xfe"}', "not JSON"),
    "a list": (b"[]", "JSON object, not a list"),
    "null": (b"null", "JSON object, not null"),
    "two values": (b"{} {}", "not JSON"),
    "no inputs": (b"{}", "inputs is missing"),
    "empty inputs": (b'{"inputs": []}', "inputs is missing"),
    "inputs are an object": (b'{"inputs": {"a": 1}}', "inputs is missing"),
    "an input is a text": (b'{"inputs": ["a"]}', "inputs[0] must be an object, not a string"),
    "too many inputs": (json.dumps({"inputs": [{}] * 65}).encode(), "65 inputs"),
    "two inputs of one name": (
        json.dumps({"inputs": json.loads(body())["inputs"] * 2}).encode(),
        "Two inputs have the same name",
    ),
    "a number as id": (b'{"id": 7, "inputs": []}', "id must be a string"),
    "half a character as id": (b'{"id": "\\ud800", "inputs": []}', "id is not text"),
    "half a character as name": (body(name="\ud800"), "not text that UTF-8"),
    "parameters are a list": (b'{"parameters": [], "inputs": [{}]}', "parameters must be an object"),
    "binary_data_output is a number": (b'{"parameters": {"binary_data_output": 1}}', "true or false"),
    "no name": (body(name=...), "has no name"),
    "an empty name": (body(name=""), "has no name"),
    "a number as name": (body(name=7), "has no name"),
    "no datatype": (body(datatype=...), "there are BOOL"),
    "an unknown datatype": (body(datatype="BF16"), "'BF16'; there are BOOL"),
    "a list as datatype": (body(datatype=["UINT8"]), "there are BOOL"),
    "a long datatype": (body(datatype="U" * 100_000), "there are BOOL"),
    "no shape": (body(shape=...), "shape of inputs[0]"),
    "a number as shape": (body(shape=4), "shape of inputs[0]"),
    "a negative side": (body(shape=[-1, 4]), "0 or more"),
    "true as a side": (body(shape=[True, 4]), "0 or more"),
    "a fraction as a side": (body(shape=[2.0, 2.0]), "0 or more"),
    "a text as a side": (body(shape=["2", "2"]), "0 or more"),
    "a list as a side": (body(shape=[[2], 2]), "0 or more"),
    "a long list as shape": (body(shape=["x"] * 100_000), "0 or more"),
    "nine dimensions": (body(shape=[1] * 8 + [4]), "9 dimensions"),
    "a huge shape": (body(shape=[2**40, 2**40]), "larger than any request"),
    "a huge shape beside a 0": (body(shape=[0, 2**62, 2**62], data=[]), "larger than any request"),
    "an endless side": (body(shape=[0, 10**4000], data=[]), "larger than any request"),
    "endless sides": (body(shape=[10**4000] * 8), "larger than any request"),
    "too many digits": (body().replace(b"[2, 2]", b"[" + BIG + b"]"), "not JSON"),
    "too few elements": (body(data=[1, 2, 3]), "has 3 elements"),
    "too many elements": (body(data=[1, 2, 3, 4, 5]), "has 5 elements"),
    "no elements": (body(data=[]), "has 0 elements"),
    "no data": (body(data=...), "has no data"),
    "a text as data": (body(data="1234"), "has no data"),
    "an object as data": (body(data={"0": 1}), "has no data"),
    "other sides": (body(data=[[1], [2], [3], [4]]), "has data of shape [4, 1]"),
    "ragged": (body(data=[[1, 2, 3], [4]]), "different lengths"),
    "a number beside a list": (body(data=[[1, 2], 3, 4]), "different lengths"),
    "ragged texts": (body(datatype="BYTES", data=[["a", "b", "c"], ["d"]]), "different lengths"),
    "nested too deep": (body(shape=[1], data=[[[[[[[[[1]]]]]]]]]), "more than 8 deep"),
    "nested 900 deep": (body().replace(b"[1, 2, 3, 4]", b"[" * 900 + b"]" * 900), "deep"),
    "a shape 900 deep": (body().replace(b"[2, 2]", b"[" * 900 + b"]" * 900), "0 or more"),
    "lists 100,000 deep": (b"[" * 100_000, "nested too deeply"),
    "objects 100,000 deep": (b'{"a":' * 100_000, "nested too deeply"),
    "true among numbers": (body(data=[1, 2, 3, True]), "not UINT8"),
    "numbers that are true": (body(datatype="BOOL", data=[1, 0, 1, 0]), "not BOOL"),
    "fractions as integers": (body(data=[1.0, 2.0, 3.0, 4.0]), "not UINT8"),
    "texts as numbers": (body(data=["1", "2", "3", "4"]), "not UINT8"),
    "one long text among numbers": (body(data=[1, 2, 3, "x" * 100_000]), "not UINT8"),
    "null among numbers": (body(data=[1, 2, 3, None]), "not UINT8"),
    "an object among numbers": (body(data=[1, 2, 3, {}]), "not UINT8"),
    "numbers as texts": (body(datatype="BYTES"), "must be strings"),
    "texts that UTF-8 can't write": (body(datatype="BYTES", data=["\ud800"] * 4), "UTF-8"),
    "too many texts": (body(datatype="BYTES", shape=[70_000], data=["a"] * 70_000), "70000 elements"),
    "256 as a byte": (body(data=[0, 0, 0, 256]), "0 to 255"),
    "-1 as a byte": (body(data=[0, 0, 0, -1]), "0 to 255"),
    "2**64 as UINT64": (body(datatype="UINT64", data=[0, 0, 0, 2**64]), "doesn't fit"),
    "2**63 as INT64": (body(datatype="INT64", data=[-1, 0, 0, 2**63]), "doesn't fit"),
    "NaN": (body(datatype="FP32").replace(b"4]", b"NaN]"), "NaN is not a number in JSON"),
    "Infinity": (body(datatype="FP32").replace(b"4]", b"-Infinity]"), "not a number in JSON"),
    "1e999": (body(datatype="FP64").replace(b"4]", b"1e999]"), "doesn't fit into FP64"),
    "1e39 as FP32": (body(datatype="FP32", data=[0, 0, 0, 1e39]), "doesn't fit into FP32"),
    "70000 as FP16": (body(datatype="FP16", data=[0, 0, 0, 70000]), "doesn't fit into FP16"),
    "10**400 as FP64": (body(datatype="FP64", data=[0, 0, 0, 10**400]), "doesn't fit into FP64"),
    "a size without a header": (sized(4)[0][: sized(4)[1]], "no header Inference-Header-Content-Length"),
}


@pytest.mark.parametrize("case", WRONG_JSON)
def test_wrong_json_gets_an_error(case: str) -> None:
    sent, says = WRONG_JSON[case]
    assert says in refused(sent)


WRONG_OUTPUTS = {
    "an object": ({}, "outputs must be a list"),
    "too many": ([{"name": "a"}] * 65, "at most 64"),
    "a text": (["a"], "outputs[0] must be an object"),
    "no name": ([{}], "outputs[0] has no name"),
    "classes below 0": ([{"name": "a", "parameters": {"classification": -1}}], "0 or more"),
    "true classes": ([{"name": "a", "parameters": {"classification": True}}], "0 or more"),
    "binary by number": ([{"name": "a", "parameters": {"binary_data": 1}}], "true or false"),
}


@pytest.mark.parametrize("case", WRONG_OUTPUTS)
def test_wrong_outputs_get_an_error(case: str) -> None:
    outputs, says = WRONG_OUTPUTS[case]
    assert says in refused(json.dumps(json.loads(body()) | {"outputs": outputs}).encode())


STRINGS = join_bytes([b"a", b"", b"ccc", b"dd"])
WRONG_BYTES: dict[str, tuple[tuple[bytes, int], str]] = {
    "a header below 0": ((body(), -1), "is -1, but"),
    "a header past the end": ((body(), len(body()) + 1), "but the body has"),
    "a huge header": ((body(), 2**70), "but the body has"),
    "a header that cuts the JSON": ((body(), 10), "not JSON"),
    "a header past the JSON": ((sized(4)[0], sized(4)[1] + 1), "not JSON"),
    "bytes that belong to nothing": ((body() + b"1", len(body())), "1 bytes after the JSON"),
    "a size below 0": (sized(-4), "is -4; 4 bytes are left"),
    "a size past the end": (sized(5), "is 5; 4 bytes are left"),
    "a huge size": (sized(2**64), "4 bytes are left"),
    "an endless size": (sized(10**4000), "4 bytes are left"),
    "a smaller size": (sized(3), "must have 4 bytes, not 3"),
    "true as a size": (sized(True, b"1"), "is True; 1 bytes"),
    "a fraction as a size": (sized(4.0), "is 4.0; 4 bytes"),
    "a text as a size": (sized("4"), "is '4'; 4 bytes"),
    "a list as a size": (sized([4] * 100_000), "4 bytes are left"),
    "data too": ((lambda h: (h + b"1234", len(h)))(body(parameters={"binary_data_size": 4})), "both data and"),
    "another count of bytes": (sized(4, datatype="FP32"), "must have 16 bytes, not 4"),
    "bytes for a huge shape": (sized(4, shape=[2**20, 2**20]), "bytes, not 4"),
    "a BOOL that is 2": (sized(4, b"\0\1\0\2", datatype="BOOL"), "bytes are 0 or 1"),
    "a length cut short": (sized(2, b"\0\0", datatype="BYTES", shape=[1]), "cut short in the length of element 0"),
    "an element cut short": (sized(6, b"\3\0\0\0ab", datatype="BYTES", shape=[1]), "says 3 bytes; 2 are left"),
    "an element of 4 GB": (sized(5, b"\xff\xff\xff\xffa", datatype="BYTES", shape=[1]), "says 4294967295 bytes"),
    "too few elements": (sized(len(STRINGS), STRINGS, datatype="BYTES", shape=[5]), "has 4 elements"),
    "too many elements": (sized(len(STRINGS), STRINGS, datatype="BYTES", shape=[3]), "more than the 3 elements"),
    "a million empty elements": (
        sized(4_000_000, bytes(4_000_000), datatype="BYTES", shape=[1_000_000]),
        "65536 of BYTES are the most",
    ),
}


@pytest.mark.parametrize("case", WRONG_BYTES)
def test_wrong_bytes_get_an_error(case: str) -> None:
    sent, says = WRONG_BYTES[case]
    assert says in refused(*sent)


WHOLE, HEADER = binary(
    [
        Tensor(name="算", datatype="BYTES", shape=(2,), data=[b"abc", b"\xff"]),
        Tensor(name="b", datatype="INT16", shape=(3,), data=np.array([1, -2, 300], np.int16)),
    ],
    id="7",
    outputs=[{"name": "o"}],
)


def test_a_request_cut_short_anywhere_gets_an_error() -> None:
    for end in range(len(WHOLE)):
        refused(WHOLE[:end], HEADER)
        refused(WHOLE[:end], min(end, HEADER) or None)
    for end in range(len(body())):
        refused(body()[:end])


@given(st.binary(min_size=1, max_size=40))
@example(b"\0")
@example(b"{}")
def test_a_request_with_more_after_it_gets_an_error(more: bytes) -> None:
    refused(WHOLE + more, HEADER)
    refused(body() + more, len(body()))
    if more.strip(b" \t\r\n"):
        refused(body() + more)


@given(st.binary(max_size=200), st.none() | st.integers(min_value=1, max_value=300))
def test_noise_gets_an_error(noise: bytes, header: int | None) -> None:
    assume(noise[:1] not in (b"{", b"[", b'"'))
    refused(noise, header)


@pytest.mark.parametrize(
    ("sent", "header", "times"),
    [
        (body(shape=[2**20, 2**20]), None, 10),
        (*sized(4, shape=[2**20, 2**20]), 10),
        (*sized(1_000_000, bytes(1_000_000), datatype="BYTES", shape=[65_000]), 4),
        (*sized(1_000_004, b"\xff\xff\xff\x7f" + bytes(1_000_000), datatype="BYTES", shape=[1]), 4),
        (b"[" * 1_000_000, None, 4),
        (b'{"inputs": "' + b"x" * 1_000_000, None, 4),
        (body(datatype="x" * 1_000_000), None, 10),
        (body(shape=["x" * 1_000_000]), None, 10),
        (body(shape=list(range(200_000))), None, 20),
        (body(data=[0] * 100_000), None, 30),
        (body(data=[[[0]]] * 20_000), None, 60),  # 72 bytes each list of one, by Python's own reader
        (body(data=["x" * 10_000] + [1] * 100_000), None, 30),
        (*sized([1] * 100_000), 30),
    ],
    ids=[
        "a huge shape", "a huge binary shape", "many empty elements", "an element that isn't there", "deep", "no end",
        "a long datatype", "a long side", "a long shape", "long data", "nested data", "one long text", "a long size",
    ],
)  # fmt: skip
def test_a_wrong_request_takes_no_memory(sent: bytes, header: int | None, times: int) -> None:
    refused(sent, header)  # what is kept for good is there now
    tracemalloc.start()
    try:
        refused(sent, header)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < times * len(sent) + 1_000_000


def test_large_json_is_read_without_copies_of_each_number() -> None:
    sent = body(shape=[100, 1000], data=np.zeros((100, 1000), int).tolist())
    tracemalloc.start()
    try:
        parse(sent)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15 * len(sent) + 100_000


# --- nearly right ---


@pytest.fixture(scope="module")
def fuzzer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_protocol", FUZZ)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_nearly_right_requests_are_read_or_refused(fuzzer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzer, "SLOW_MS", 5_000.0)  # a busy machine is not a failure
    result = fuzzer.fuzz(FUZZ_CASES, seed=20261126)
    assert result.failures == []
    assert result.cases == FUZZ_CASES
    assert result.accepted > FUZZ_CASES / 20  # it goes deep
    assert len(result.refused) > 30


def test_every_valid_request_of_the_fuzz_is_read(fuzzer: ModuleType) -> None:
    for sent, header in fuzzer.VALID:
        fuzzer.agrees(parse(sent, header))


def test_the_fuzz_repeats_itself(fuzzer: ModuleType) -> None:
    cases = [fuzzer.case(3, n) for n in range(200)]
    assert cases == [fuzzer.case(3, n) for n in range(200)]
    assert len(set(cases)) > 150
