"""The protocol over gRPC: Triton's client against `suanli serve` of real digits, and plain calls to a server in here.

What a healthy model never does, a repository of the test's own does, behind the same code.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import queue
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

import hostile
import suanli
from hostile import GOOD, engines, register
from served import Served, digits_run, serving
from suanli.core.errors import MachineError, UsageError, pip_install
from suanli.serving import messages
from suanli.serving.log import Log
from suanli.serving.protocol import DATATYPES, InferRequest, InferResponse, Refusal, Tensor, bad_request, join_bytes

for package in ("uvicorn", "httptools", "starlette"):
    pytest.importorskip(package, reason=f"needs: {pip_install('suanli[serve]')}")
grpc = pytest.importorskip("grpc", reason=f"needs: {pip_install('suanli[serve]')}")
pytest.importorskip("google.protobuf", reason=f"needs: {pip_install('suanli[serve]')}")

from suanli.serving.grpc import SERVICE, GrpcServer, serve_grpc  # noqa: E402  # after the check
from suanli.serving.messages import HEALTH, message_class, to_message, to_request  # noqa: E402

CODE = grpc.StatusCode


# --- servers ---


class Loop:
    """A loop in a thread, where servers run while the test asks them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Awaitable[Any]) -> Any:
        async def whole() -> Any:
            return await work

        return asyncio.run_coroutine_threadsafe(whole(), self._loop).result(120)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


Infer = Callable[[InferRequest, float | None], Awaitable[InferResponse]]


class OneModel:
    """What a server needs of a repository, with one model, whose answers are the test's."""

    ready = True
    draining = False

    def __init__(self, infer: Infer) -> None:
        self.model = SimpleNamespace(name="model", version="1", ready=True, infer=self.infer)
        self.answer = infer
        self.requests: list[InferRequest] = []

    async def infer(self, request: InferRequest, *, deadline: float | None = None) -> InferResponse:
        self.requests.append(request)
        return await self.answer(request, deadline)

    def find(self, name: str, version: str | None = None) -> Any:
        if name != "model" or version not in (None, "1"):
            raise Refusal(404, f"There is no model {name}.")
        return self.model


async def echo(request: InferRequest, _: float | None) -> InferResponse:
    return InferResponse(id=request.id, model_name="model", model_version="1", outputs=request.inputs)


@pytest.fixture
def serve(loop: Loop) -> Iterator[Callable[..., tuple[GrpcServer, OneModel]]]:
    """Serves one model that answers with what it is given, unless the test says otherwise."""
    servers = []

    def start(infer: Infer = echo, **options: Any) -> tuple[GrpcServer, OneModel]:
        repository = OneModel(infer)
        server = loop.run(serve_grpc(repository, port=0, **options))  # type: ignore[arg-type]
        servers.append(server)
        return server, repository

    yield start
    for server in servers:
        loop.run(server.stop(0))


def ask(
    server: GrpcServer,
    method: str,
    request: Any,
    answer: Any,
    *,
    metadata: tuple[tuple[str, str], ...] = (),
    channel: Any = None,
    **options: Any,
) -> Any:
    """The answer to one call."""
    opened = channel or grpc.insecure_channel(f"127.0.0.1:{server.port}")
    with opened if channel is None else contextlib.nullcontext():
        call = opened.unary_unary(
            method, request_serializer=lambda sent: sent.SerializeToString(), response_deserializer=answer.FromString
        )
        return call(request, metadata=metadata, timeout=options.pop("timeout", 60), **options)


def infer(server: GrpcServer, request: Any, **options: Any) -> Any:
    return ask(server, f"/{SERVICE}/ModelInfer", request, message_class("ModelInferResponse"), **options)


def inputs(**tensors: tuple[str, list[int], bytes | None]) -> Any:
    """A request with an input for each name: datatype, shape and raw bytes."""
    request = message_class("ModelInferRequest")(model_name="model")
    for name, (datatype, shape, raw) in tensors.items():
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        if raw is not None:
            request.raw_input_contents.append(raw)
    return request


def refused(code: Any, work: Callable[[], Any], match: str) -> Any:
    """The error of a call that has to fail with this status."""
    with pytest.raises(grpc.RpcError, match=match) as caught:
        work()
    assert caught.value.code() == code
    return caught.value


# --- Triton's client and real digits ---


@pytest.fixture(scope="module")
def triton() -> ModuleType:
    return pytest.importorskip("tritonclient.grpc", reason=f"needs: {pip_install('tritonclient[grpc]')}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory)


@pytest.fixture
def client(triton: ModuleType, digits_server: Served) -> Iterator[Any]:
    with triton.InferenceServerClient(f"{digits_server.host}:{digits_server.grpc_port}") as made:
        yield made


@pytest.fixture(scope="module")
def versions(triton: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Triton's client of a server with two versions of `odd`."""
    models = tmp_path_factory.mktemp("models")
    with register() as environment:
        for version in ("1", "2"):
            engines(models / "odd" / version)
        with (
            serving(models, "--grpc-port", "0", "--p99-ms", "60000", environment=environment) as server,
            triton.InferenceServerClient(f"{server.host}:{server.grpc_port}") as made,
        ):
            yield made


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Ten real digits at the size of the model."""
    from sklearn.datasets import load_digits

    result = load_digits().images[:10, ..., None]
    return (result * 255 / 16).round().astype(np.uint8)


def test_triton_reads_the_server_and_the_model(versions: Any) -> None:
    assert versions.is_server_live()
    assert versions.is_server_ready()
    assert versions.is_model_ready("odd")
    assert versions.is_model_ready("odd", "2")
    assert not versions.is_model_ready("odd", "3")
    assert not versions.is_model_ready("nobody")
    about = versions.get_server_metadata(as_json=True)
    assert (about["name"], about["version"]) == ("suanli", suanli.__version__)
    assert "classification" in about["extensions"]
    model = versions.get_model_metadata("odd", as_json=True)
    assert model["versions"] == ["1", "2"]
    assert [output["name"] for output in model["outputs"]] == ["probabilities", "label"]
    config = versions.get_model_config("odd", as_json=True)["config"]
    assert config["input"][0]["data_type"] == "TYPE_UINT8"
    assert config["max_batch_size"] > 1
    assert "dynamic_batching" in config
    index = versions.get_model_repository_index(as_json=True)["models"]
    assert [(model["name"], model["version"], model["state"]) for model in index] == [
        ("odd", "1", "READY"),
        ("odd", "2", "READY"),
    ]


def test_triton_gets_the_answers_of_predict(client: Any, triton: ModuleType, run: Path, pictures: np.ndarray) -> None:
    (about,) = client.get_model_metadata("digits").inputs
    sent = triton.InferInput(about.name, list(pictures.shape), about.datatype)
    sent.set_data_from_numpy(pictures)
    result = client.infer("digits", [sent], request_id="number 7")
    expected = suanli.load(run).predict(pictures)
    assert result.get_response().id == "number 7"
    assert result.get_response().model_version == "1"
    assert result.as_numpy("label").tolist() == [answer.label.encode() for answer in expected if answer.label]
    best = result.as_numpy("probabilities").max(1)
    np.testing.assert_allclose(best, [answer.probability for answer in expected], atol=1e-5)

    files = np.empty(len(pictures), object)
    for i, picture in enumerate(pictures):
        written = io.BytesIO()
        Image.fromarray(picture[..., 0]).save(written, "png")
        files[i] = written.getvalue()
    sent = triton.InferInput(about.name, [len(files)], "BYTES")
    sent.set_data_from_numpy(files)
    wanted = [triton.InferRequestedOutput("probabilities", class_count=3)]
    again = client.infer("digits", [sent], model_version="1", outputs=wanted)
    classes = again.as_numpy("probabilities")
    assert classes.shape == (10, 3)
    assert [row[0].decode().split(":")[2] for row in classes] == [answer.label for answer in expected]
    assert again.as_numpy("label") is None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_compresses(client: Any, triton: ModuleType, pictures: np.ndarray, algorithm: str) -> None:
    sent = triton.InferInput("image", list(pictures.shape), "UINT8")
    sent.set_data_from_numpy(pictures)
    plain = client.infer("digits", [sent]).as_numpy("probabilities")
    result = client.infer("digits", [sent], compression_algorithm=algorithm).as_numpy("probabilities")
    np.testing.assert_allclose(result, plain, atol=1e-6)


def test_triton_asks_many_at_once(client: Any, triton: ModuleType, pictures: np.ndarray) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    sent = triton.InferInput("image", [1, *pictures.shape[1:]], "UINT8")
    for i in range(50):
        sent.set_data_from_numpy(pictures[i % 10][None])
        client.async_infer(
            "digits", [sent], lambda result, error: answers.put((result, error)), request_id=str(i)
        )  # fmt: skip
    result = [answers.get(timeout=60) for _ in range(50)]
    assert [error.message() for _, error in result if error is not None] == []
    assert sorted(int(result.get_response().id) for result, _ in result) == list(range(50))


def test_triton_streams_in_order_past_a_bad_request(client: Any, triton: ModuleType, pictures: np.ndarray) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for i in range(70):
        sent = triton.InferInput("image" if i != 3 else "picture", [1, *pictures.shape[1:]], "UINT8")
        sent.set_data_from_numpy(pictures[i % 10][None])
        client.async_stream_infer("digits", [sent], request_id=str(i))
    result = [answers.get(timeout=60) for _ in range(70)]
    client.stop_stream()
    assert "'image'" in result[3][1].message()
    assert [result.get_response().id for result, error in result if error is None] == [
        str(i) for i in range(70) if i != 3
    ]


def test_triton_sees_statistics(versions: Any, triton: ModuleType) -> None:
    def counted() -> int:
        stats = versions.get_inference_statistics("odd", "2").model_stats
        assert [entry.version for entry in stats] == ["2"]
        return int(stats[0].inference_count)

    before = counted()
    rows = hostile.pictures(*[(GOOD, i) for i in range(10)])
    sent = triton.InferInput("image", list(rows.shape), "UINT8")
    sent.set_data_from_numpy(rows)
    assert versions.infer("odd", [sent], model_version="2").get_response().model_version == "2"
    assert counted() == before + 10
    everything = versions.get_inference_statistics().model_stats
    assert [(entry.name, entry.version) for entry in everything] == [("odd", "1"), ("odd", "2")]
    assert everything[1].inference_stats.success.ns > 0


def test_triton_gets_the_reasons_of_refusals(client: Any, triton: ModuleType, pictures: np.ndarray) -> None:
    sent = triton.InferInput("image", list(pictures.shape), "UINT8")
    sent.set_data_from_numpy(pictures)
    for arguments, status in (
        ({"model_name": "nobody", "inputs": [sent]}, "NOT_FOUND"),
        ({"model_name": "digits", "model_version": "9", "inputs": [sent]}, "NOT_FOUND"),
        (
            {"model_name": "digits", "inputs": [sent], "outputs": [triton.InferRequestedOutput("nothing")]},
            "INVALID_ARGUMENT",
        ),
    ):
        with pytest.raises(triton.InferenceServerException, match="There is no|has the outputs") as caught:
            client.infer(**arguments)
        assert caught.value.status() == f"StatusCode.{status}"
    with pytest.raises(triton.InferenceServerException, match="raw_input_contents") as caught:
        client.register_system_shared_memory("region", "/region", 64)
    assert caught.value.status() == "StatusCode.UNIMPLEMENTED"
    with pytest.raises(triton.InferenceServerException, match="(?i)deadline") as caught:
        client.infer("digits", [sent], client_timeout=1e-6)


def test_triton_unloads_and_loads(versions: Any, triton: ModuleType) -> None:
    versions.unload_model("odd")
    assert not versions.is_model_ready("odd")
    versions.load_model("odd")
    assert versions.is_model_ready("odd", "1")
    with pytest.raises(triton.InferenceServerException, match="as its folder says"):
        versions.load_model("odd", config="{}")
    with pytest.raises(triton.InferenceServerException, match="no model nobody") as caught:
        versions.load_model("nobody")
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_triton_beside_the_server_in_one_process(
    triton: ModuleType, serve: Callable[..., tuple[GrpcServer, OneModel]]
) -> None:
    server, _ = serve(api_key="open sesame")
    sent = triton.InferInput("x", [2], "BYTES")
    sent.set_data_from_numpy(np.array([b"one", b"another"], object))
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        result = client.infer("model", [sent], headers={"authorization": "Bearer open sesame"})
        assert result.as_numpy("x").tolist() == [b"one", b"another"]
        with pytest.raises(triton.InferenceServerException, match="key"):
            client.infer("model", [sent])


def test_kserve_gets_the_same_raw_and_typed(digits_server: Served, pictures: np.ndarray, run: Path) -> None:
    kserve = pytest.importorskip("kserve", reason=f"needs: {pip_install('kserve')}, in an environment of its own")

    async def work() -> list[list[bytes]]:
        result = []
        async with kserve.InferenceGRPCClient(url=f"{digits_server.host}:{digits_server.grpc_port}") as client:
            assert await client.is_server_ready()
            assert await client.is_model_ready("digits")
            for raw in (True, False):
                tensor = kserve.InferInput("image", list(pictures.shape), "UINT8")
                tensor.set_data_from_numpy(pictures, binary_data=raw)
                request = kserve.InferRequest(model_name="digits", infer_inputs=[tensor], request_id="7")
                answer = await client.infer(request)
                assert answer.id == "7"
                result.append(answer.outputs[1].as_numpy().tolist())
        return result

    expected = [answer.label.encode() for answer in suanli.load(run).predict(pictures) if answer.label]
    assert asyncio.run(work()) == [expected, expected]


# --- the messages ---


def test_the_compiled_messages_are_those_of_the_text(tmp_path: Path) -> None:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    protoc = pytest.importorskip("grpc_tools.protoc", reason=f"needs: {pip_install('suanli[test]')}")
    folder, made = Path(messages.__file__).parent, tmp_path / "made"
    words = ["protoc", f"--proto_path={folder}", f"--descriptor_set_out={made}", "inference.proto", "health.proto"]
    assert protoc.main(words) == 0
    new, kept = (FileDescriptorSet.FromString(file.read_bytes()) for file in (made, folder / "messages.binpb"))
    assert new == kept, "make proto"


# Such as no other type of number would read; bytes are in base64.
VALUES = {
    "INT32": -7, "INT64": -(2**40), "UINT32": 2**31 + 7, "UINT64": 2**63 + 7, "FLOAT": 0.5, "DOUBLE": 0.1, "BOOL": True,
    "STRING": "算", "BYTES": "/w==",
}  # fmt: skip


def samples(kind: Any) -> list[dict[str, Any]]:
    """JSON of messages with every field filled, one for each member of a oneof."""
    members = [field.number for group in kind.oneofs for field in group.fields] or [0]
    return [
        {f.name: sample(f) for f in kind.fields if f.containing_oneof is None or f.number == member}
        for member in members
    ]


def sample(field: Any) -> Any:
    if field.message_type is None:
        known = {getattr(field, f"TYPE_{name}"): value for name, value in VALUES.items()}
        result = [known[field.type] if field.enum_type is None else field.enum_type.values[-1].name]
    elif field.message_type.GetOptions().map_entry:
        return {f"key{i}": v for i, v in enumerate(samples(field.message_type.fields_by_name["value"].message_type))}
    else:
        result = samples(field.message_type)
    return result if field.is_repeated else result[-1]


@pytest.mark.usefixtures("triton")
def test_triton_reads_our_messages_and_we_read_its() -> None:
    from google.protobuf.json_format import ParseDict
    from tritonclient.grpc import model_config_pb2, service_pb2

    for name in message_class("ModelInferRequest").DESCRIPTOR.file.message_types_by_name:
        ours = message_class(name)
        theirs = getattr(service_pb2, name, None) or getattr(model_config_pb2, name)
        for values in samples(ours.DESCRIPTOR):
            our, their = ParseDict(values, ours()), ParseDict(values, theirs())
            assert ours.FromString(their.SerializeToString()) == our, name
            assert theirs.FromString(our.SerializeToString()) == their, name


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from([*DATATYPES, "BYTES"]))
    shape = draw(npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    data: np.ndarray | list[bytes]
    if datatype == "BYTES":
        count = int(np.prod(shape))
        data = draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
    else:
        data = draw(npst.arrays(DATATYPES[datatype], shape))
    return Tensor(name=draw(st.text(min_size=1, max_size=9)), datatype=datatype, shape=shape, data=data)


def typed(contents: Any, tensor: Tensor) -> None:
    """Fills the field of a tensor's datatype."""
    values = tensor.data if isinstance(tensor.data, list) else tensor.data.ravel().tolist()
    fields = {"BOOL": "bool", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes"}
    usual = "uint" if tensor.datatype.startswith("U") else "int"
    getattr(contents, f"{fields.get(tensor.datatype, usual)}_contents").extend(values)


def same(result: Tensor, tensor: Tensor) -> None:
    assert (result.name, result.datatype, result.shape) == (tensor.name, tensor.datatype, tensor.shape)
    if isinstance(tensor.data, list):
        assert result.data == tensor.data
    else:
        assert isinstance(result.data, np.ndarray)
        assert result.data.dtype == tensor.data.dtype
        np.testing.assert_array_equal(result.data, tensor.data)


@given(st.lists(tensors(), min_size=1, max_size=4, unique_by=lambda tensor: tensor.name), st.booleans())
def test_tensors_come_through_raw_and_typed(sent: list[Tensor], raw: bool) -> None:
    request = message_class("ModelInferRequest")(id="7")
    response = to_message(InferResponse(id="7", model_name="m", model_version="1", outputs=tuple(sent)))
    if not raw:
        sent = [tensor for tensor in sent if tensor.datatype != "FP16"] or [
            Tensor(name="a", datatype="UINT8", shape=(), data=np.array(3, np.uint8))
        ]
    for tensor in sent:
        tensor_message = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if not raw:
            typed(tensor_message.contents, tensor)
    if raw:
        request.raw_input_contents.extend(response.raw_output_contents)
    result = to_request(type(request).FromString(request.SerializeToString()))
    assert result.id == "7"
    for one, tensor in zip(result.inputs, sent, strict=True):
        same(one, tensor)


def test_raw_bytes_are_not_copied() -> None:
    (tensor,) = to_request(inputs(x=("FP32", [2, 3], bytes(24)))).inputs
    assert isinstance(tensor.data, np.ndarray)
    assert not tensor.data.flags.owndata
    assert not tensor.data.flags.writeable


def test_parameters_and_outputs_are_read() -> None:
    request = inputs(x=("UINT8", [1], b"a"))
    request.parameters["timeout"].int64_param = 5
    request.parameters["share"].double_param = 0.5
    request.parameters["large"].uint64_param = 2**63
    request.parameters["flag"].bool_param = False
    request.parameters["word"].string_param = "yes"
    request.outputs.add(name="probabilities").parameters["classification"].int64_param = 3
    request.outputs.add(name="label")
    result = to_request(request)
    assert result.parameters == {"timeout": 5, "share": 0.5, "large": 2**63, "flag": False, "word": "yes"}
    assert [(wanted.name, wanted.binary, wanted.class_count) for wanted in result.outputs] == [
        ("probabilities", True, 3),
        ("label", True, 0),
    ]


def contradiction(change: Callable[[Any], Any], **tensors: tuple[str, list[int], bytes | None]) -> Any:
    request = inputs(**tensors)
    change(request)
    return request


WRONG = {
    "no inputs": (inputs(), "inputs is missing"),
    "raw for one of two": (inputs(a=("UINT8", [1], b"a"), b=("UINT8", [1], None)), "1 elements for 2 inputs"),
    "raw and typed": (
        contradiction(lambda r: r.inputs[0].contents.uint_contents.append(1), a=("UINT8", [1], b"a")),
        "both contents and raw",
    ),
    "too short": (inputs(a=("FP32", [2, 2], bytes(15))), "must have 16 bytes, not 15"),
    "too long": (inputs(a=("INT64", [1], bytes(9))), "must have 8 bytes, not 9"),
    "negative": (inputs(a=("UINT8", [-1, 4], bytes(4))), "0 or more"),
    "two negatives": (inputs(a=("UINT8", [-2, -2], bytes(4))), "0 or more"),
    "overflow": (inputs(a=("FP64", [2**32, 2**32], b"")), "larger than any"),
    "empty and huge": (inputs(a=("UINT8", [0, 2**62, 2**62], b"")), "larger than any"),
    "many dimensions": (inputs(a=("UINT8", [1] * 40, b"a")), "not up to 8 numbers"),
    "unknown datatype": (inputs(a=("BF16", [1], b"ab")), "'BF16'; there are BOOL"),
    "no datatype": (inputs(a=("", [1], b"ab")), "''; there are BOOL"),
    "a name twice": (
        contradiction(lambda r: r.inputs.add(name="a", datatype="UINT8") and r.raw_input_contents.append(b"b"),
                      a=("UINT8", [], b"a")),
        "the same name",
    ),
    "no name": (inputs(**{"": ("UINT8", [1], b"a")}), "no name"),
    "BOOL of 2": (inputs(a=("BOOL", [1], b"\x02")), "0 or 1"),
    "BYTES cut in a length": (inputs(a=("BYTES", [1], b"\x01\x00")), "cut short"),
    "BYTES cut in an element": (inputs(a=("BYTES", [1], b"\x05\x00\x00\x00ab")), "says 5 bytes"),
    "BYTES of another count": (inputs(a=("BYTES", [3], join_bytes([b"a", b"b"]))), "has 2 elements"),
    "typed of another count": (
        contradiction(lambda r: r.inputs[0].contents.fp32_contents.append(1), a=("FP32", [2], None)),
        "1 elements in fp32_contents",
    ),
    "typed elsewhere": (
        contradiction(lambda r: r.inputs[0].contents.int_contents.append(1), a=("FP32", [1], None)),
        "0 elements in fp32_contents",
    ),
    "typed FP16": (
        contradiction(lambda r: r.inputs[0].contents.fp32_contents.append(1), a=("FP16", [1], None)),
        "no field in contents",
    ),
    "typed too large": (
        contradiction(lambda r: r.inputs[0].contents.uint_contents.append(256), a=("UINT8", [1], None)),
        "fit into UINT8",
    ),
    "typed too small": (
        contradiction(lambda r: r.inputs[0].contents.int_contents.append(-(2**15) - 1), a=("INT16", [1], None)),
        "fit into INT16",
    ),
    "shared memory": (
        contradiction(
            lambda r: setattr(r.inputs[0].parameters["shared_memory_region"], "string_param", "x"),
            a=("UINT8", [1], None),
        ),
        "not supported",
    ),
    "classification of a word": (
        contradiction(
            lambda r: setattr(r.outputs.add(name="o").parameters["classification"], "string_param", "x"),
            a=("UINT8", [1], b"a"),
        ),
        "classification of output 'o'",
    ),
    "many inputs": (inputs(**{f"i{i}": ("UINT8", [1], b"a") for i in range(65)}), "64 are the most"),
}  # fmt: skip


def test_contradictory_requests_are_refused(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, repository = serve()
    for request, message in WRONG.values():
        refused(CODE.INVALID_ARGUMENT, lambda request=request: infer(server, request), message)
    assert repository.requests == []
    assert infer(server, inputs(x=("UINT8", [1], b"a"))).raw_output_contents == [b"a"]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    from google.protobuf.message import DecodeError

    with contextlib.suppress(DecodeError, Refusal):
        to_request(message_class("ModelInferRequest").FromString(body))


# --- calls ---


def test_every_refusal_has_its_status(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    async def refuse(request: InferRequest, _: float | None) -> InferResponse:
        raise Refusal(int(request.parameters["status"]), "The reason.", retry_after_s=0.25)

    server, _ = serve(refuse)
    statuses = {
        400: CODE.INVALID_ARGUMENT,
        404: CODE.NOT_FOUND,
        413: CODE.RESOURCE_EXHAUSTED,
        415: CODE.INVALID_ARGUMENT,
        429: CODE.RESOURCE_EXHAUSTED,
        499: CODE.CANCELLED,
        500: CODE.INTERNAL,
        503: CODE.UNAVAILABLE,
        504: CODE.DEADLINE_EXCEEDED,
    }
    for status, code in statuses.items():
        request = inputs(x=("UINT8", [1], b"a"))
        request.parameters["status"].int64_param = status
        error = refused(code, lambda request=request: infer(server, request), "The reason")
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "250"


def test_only_the_log_has_the_reason_of_an_unexpected_error(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    async def fail(_: InferRequest, __: float | None) -> InferResponse:
        raise ZeroDivisionError("a secret")

    log_text = io.StringIO()
    server, _ = serve(fail, log=Log("json", stream=log_text))
    request = inputs(x=("UINT8", [1], b"a"))
    request.id = "number 7"
    error = refused(CODE.INTERNAL, lambda: infer(server, request), "internal error")
    assert "secret" not in error.details()
    line = json.loads(log_text.getvalue())
    assert (line["level"], line["request_id"], line["status"]) == ("error", "number 7", "INTERNAL")
    assert "secret" in line["reason"]


def test_a_log_of_requests_has_a_line_for_each(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    log_text = io.StringIO()
    server, _ = serve(log=Log("json", stream=log_text, requests=True))
    infer(server, inputs(x=("UINT8", [1], b"a")))
    refused(CODE.INVALID_ARGUMENT, lambda: infer(server, inputs()), "missing")
    lines = [json.loads(line) for line in log_text.getvalue().splitlines()]
    assert [line["status"] for line in lines] == ["OK", "INVALID_ARGUMENT"]
    assert lines[0]["path"] == f"/{SERVICE}/ModelInfer"
    assert lines[0]["ms"] > 0


def test_a_long_reason_fits_into_a_header(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    async def refuse(_: InferRequest, __: float | None) -> InferResponse:
        raise bad_request("不" * 100_000)

    server, _ = serve(refuse)
    refused(CODE.INVALID_ARGUMENT, lambda: infer(server, inputs(x=("UINT8", [1], b"a"))), "不不不")


def test_a_deadline_is_passed_on(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    left: queue.Queue[float | None] = queue.Queue()

    async def note(request: InferRequest, deadline: float | None) -> InferResponse:
        left.put(None if deadline is None else deadline - asyncio.get_running_loop().time())
        return await echo(request, deadline)

    server, _ = serve(note)
    infer(server, inputs(x=("UINT8", [1], b"a")), timeout=None)
    assert left.get(timeout=10) is None
    infer(server, inputs(x=("UINT8", [1], b"a")), timeout=7)
    assert 5 < (left.get(timeout=10) or 0) < 8


@pytest.mark.parametrize("how", ["cancelled", "too late", "gone"])
def test_a_client_that_leaves_withdraws_its_request(
    serve: Callable[..., tuple[GrpcServer, OneModel]], how: str
) -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def hang(_: InferRequest, __: float | None) -> InferResponse:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    server, _ = serve(hang)
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
    call = channel.unary_unary(f"/{SERVICE}/ModelInfer", request_serializer=lambda sent: sent.SerializeToString())
    answer = call.future(inputs(x=("UINT8", [1], b"a")), timeout=0.3 if how == "too late" else 60)
    assert begun.wait(10)
    if how == "cancelled":
        answer.cancel()
    elif how == "gone":
        channel.close()
    assert cancelled.wait(10)
    channel.close()


def test_a_key_is_needed(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, repository = serve(api_key="open sesame")
    request = inputs(x=("UINT8", [1], b"a"))
    for metadata in (
        (),
        (("x-api-key", "no"),),
        (("authorization", "Bearer no"),),
        (("authorization", "open sesame"),),
    ):
        refused(CODE.UNAUTHENTICATED, lambda metadata=metadata: infer(server, request, metadata=metadata), "key")
    assert repository.requests == []
    for metadata in ((("x-api-key", "open sesame"),), (("authorization", "bearer open sesame"),)):
        assert infer(server, request, metadata=metadata).raw_output_contents == [b"a"]
    live = ask(
        server, f"/{SERVICE}/ServerLive", message_class("ServerLiveRequest")(), message_class("ServerLiveResponse")
    )
    ready = ask(
        server, f"/{SERVICE}/ServerReady", message_class("ServerReadyRequest")(), message_class("ServerReadyResponse")
    )
    assert (live.live, ready.ready) == (True, True)
    assert health(server) == "SERVING"


def test_without_a_key_no_body_is_read(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, _ = serve(api_key="open sesame")

    def never() -> Iterator[bytes]:
        time.sleep(30)
        yield b""

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_unary(f"/{SERVICE}/ModelInfer")
        refused(CODE.UNAUTHENTICATED, lambda: call.future(never(), timeout=20).result(), "key")


def test_a_request_that_never_comes_is_ended(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, _ = serve(receive_s=0.2)
    done = threading.Event()

    def never() -> Iterator[bytes]:
        done.wait(30)
        yield b""

    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_unary(f"/{SERVICE}/ModelInfer")
        refused(CODE.DEADLINE_EXCEEDED, lambda: call.future(never(), timeout=20).result(), "did not arrive within")
        done.set()


def test_large_messages_are_refused_however_they_are_sent(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, repository = serve(max_message_bytes=1 << 20)
    small, large = (inputs(x=("UINT8", [size], bytes(size))) for size in (900_000, 20_000_000))
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert infer(server, small, compression=compression).outputs[0].shape == [900_000]
        refused(
            CODE.RESOURCE_EXHAUSTED,
            lambda compression=compression: infer(server, large, compression=compression),
            "larger than max|more than 1048576 bytes",
        )
    assert len(repository.requests) == 3


def test_broken_bodies_are_refused(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, _ = serve()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        for body, message in (
            (b"\xff\xff\xff", "not a ModelInferRequest"),
            (b"\x1f\x8b\x08 nonsense", "nor compressed"),
            (b"\x1f\x8b", "cut short"),
            (b"\x0a\x02\xff\xfe", "not a ModelInferRequest"),  # a name that isn't UTF-8
            (b"", "no model"),
        ):
            refused(
                CODE.INVALID_ARGUMENT if message != "no model" else CODE.NOT_FOUND,
                lambda b=body: call(b, timeout=20),
                message,
            )


def test_large_typed_contents(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, _ = serve()
    request = inputs(x=("FP32", [100_000], None))
    request.inputs[0].contents.fp32_contents.extend(range(100_000))
    answer = infer(server, request)
    np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[0], np.float32), np.arange(100_000))


def health(server: GrpcServer, service: str = "") -> str:
    answer = ask(
        server,
        f"/{HEALTH}.Health/Check",
        message_class("HealthCheckRequest", HEALTH)(service=service),
        message_class("HealthCheckResponse", HEALTH),
    )
    return str(answer.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number[answer.status].name)


def test_health(serve: Callable[..., tuple[GrpcServer, OneModel]], loop: Loop) -> None:
    server, repository = serve()
    assert health(server) == health(server, SERVICE) == "SERVING"
    refused(CODE.NOT_FOUND, lambda: health(server, "another"), "no service 'another'")
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        watch = channel.unary_stream(f"/{HEALTH}.Health/Watch")(b"", timeout=60)
        assert next(watch) == b"\x08\x01"
        repository.ready = False
        assert next(watch) == b"\x08\x02"
        assert health(server) == "NOT_SERVING"
        repository.ready = True
        assert next(watch) == b"\x08\x01"
        loop.run(server.stop(5))
        assert list(watch) == [b"\x08\x02"]


def test_methods_that_are_not_offered(serve: Callable[..., tuple[GrpcServer, OneModel]]) -> None:
    server, _ = serve()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for name, message in (
            ("TraceSetting", "change traces"),
            ("CudaSharedMemoryStatus", "raw_input_contents"),
            ("No", "not found"),
        ):
            refused(
                CODE.UNIMPLEMENTED,
                lambda name=name: channel.unary_unary(f"/{SERVICE}/{name}")(b"", timeout=20),
                message,
            )


def test_stopping_answers_open_requests(serve: Callable[..., tuple[GrpcServer, OneModel]], loop: Loop) -> None:
    begun = threading.Event()

    async def slow(request: InferRequest, deadline: float | None) -> InferResponse:
        begun.set()
        await asyncio.sleep(0.5)
        return await echo(request, deadline)

    server, _ = serve(slow)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        body = inputs(x=("UINT8", [1], b"a")).SerializeToString()
        answer = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(body, timeout=20)
        requests: queue.Queue[bytes] = queue.Queue()
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(requests.get, b""), timeout=20)
        requests.put(body)
        assert begun.wait(10)
        time.sleep(0.1)
        started = time.monotonic()
        loop.run(server.stop(20))
        assert time.monotonic() - started < 5  # a stream that a client leaves open is ended, not waited for
        assert message_class("ModelInferResponse").FromString(answer.result()).raw_output_contents == [b"a"]
        last = message_class("ModelStreamInferResponse").FromString(next(stream))
        assert last.infer_response.raw_output_contents == [b"a"]
        refused(CODE.UNAVAILABLE, lambda: next(stream), "is stopping")
        requests.put(b"")


def test_stopping_cancels_requests_that_take_too_long(
    serve: Callable[..., tuple[GrpcServer, OneModel]], loop: Loop
) -> None:
    begun = threading.Event()

    async def hang(request: InferRequest, deadline: float | None) -> InferResponse:
        begun.set()
        await asyncio.sleep(60)
        return await echo(request, deadline)

    server, _ = serve(hang)
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        body = inputs(x=("UINT8", [1], b"a")).SerializeToString()
        answer = channel.unary_unary(f"/{SERVICE}/ModelInfer").future(body, timeout=20)
        assert begun.wait(10)
        loop.run(server.stop(0.1))
        assert answer.code() in (CODE.CANCELLED, CODE.UNAVAILABLE)


def test_a_stream_that_is_left_ends_quietly(
    serve: Callable[..., tuple[GrpcServer, OneModel]], caplog: pytest.LogCaptureFixture
) -> None:
    server, repository = serve()
    body = inputs(x=("UINT8", [1], b"a")).SerializeToString()
    for _ in range(5):
        channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
        stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter(lambda: body, b""), timeout=20)
        next(stream)
        channel.close()
    time.sleep(0.3)
    count = len(repository.requests)
    time.sleep(0.2)
    assert len(repository.requests) == count
    assert [record for record in caplog.records if record.levelname in ("ERROR", "WARNING")] == []


# --- starting ---


def test_tls(serve: Callable[..., tuple[GrpcServer, OneModel]], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs: openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    server, _ = serve(tls_cert=tmp_path / "cert.pem", tls_key=tmp_path / "key.pem", host="localhost")
    trusted = grpc.ssl_channel_credentials((tmp_path / "cert.pem").read_bytes())
    with grpc.secure_channel(f"localhost:{server.port}", trusted) as channel:
        assert infer(server, inputs(x=("UINT8", [1], b"a")), channel=channel).raw_output_contents == [b"a"]
    refused(CODE.UNAVAILABLE, lambda: infer(server, inputs(x=("UINT8", [1], b"a")), timeout=5), ".")


def test_a_port_that_is_in_use(loop: Loop) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(MachineError, match="can't be opened"):
        loop.run(serve_grpc(OneModel(echo), port=taken.getsockname()[1]))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="can't be read.*nowhere.pem"):
        loop.run(serve_grpc(OneModel(echo), port=0, tls_cert=Path("no.pem"), tls_key=Path("nowhere.pem")))  # type: ignore[arg-type]


def test_two_servers_do_not_share_a_port(serve: Callable[..., tuple[GrpcServer, OneModel]], loop: Loop) -> None:
    server, _ = serve()
    with pytest.raises(MachineError, match="can't be opened"):
        loop.run(serve_grpc(OneModel(echo), port=server.port))  # type: ignore[arg-type]


def test_without_grpcio_the_error_says_how_to_install_it(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(MachineError, match=r"suanli\[serve\]"):
        loop.run(serve_grpc(OneModel(echo), port=0))  # type: ignore[arg-type]


UVLOOP = """
import asyncio, subprocess, sys, uvloop
from types import SimpleNamespace
from suanli.serving.grpc import serve_grpc
from suanli.serving.protocol import InferResponse

async def infer(request, *, deadline=None):
    await asyncio.to_thread(subprocess.check_call, ["true"])  # as an engine starts: a child beside gRPC's threads
    return InferResponse(id=request.id, model_name="model", model_version="1", outputs=request.inputs)

async def main():
    model = SimpleNamespace(infer=infer)
    server = await serve_grpc(SimpleNamespace(ready=True, find=lambda name, version: model), port=0)
    print(server.port, type(asyncio.get_running_loop()).__module__, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(5)

uvloop.run(main())
"""


def test_under_uvloop_in_another_process() -> None:
    pytest.importorskip("uvloop", reason=f"needs: {pip_install('suanli[serve]')}")
    with subprocess.Popen(
        [sys.executable, "-c", UVLOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port, module = process.stdout.readline().split()
        assert module == "uvloop"
        server = SimpleNamespace(port=int(port))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for size in (1, 150_000, 1_000_000):
                answer = infer(server, inputs(x=("UINT8", [size], bytes(size))), channel=channel)  # type: ignore[arg-type]
                assert len(answer.raw_output_contents[0]) == size
            calls = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            body = inputs(x=("UINT8", [1], b"a")).SerializeToString()
            assert len([call.result() for call in [calls.future(body, timeout=60) for _ in range(40)]]) == 40
        output, errors = process.communicate(timeout=30)
        assert (output, errors, process.returncode) == ("", "", 0)
