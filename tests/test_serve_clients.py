"""Clients that others wrote, or that people have at hand, against `suanli serve` in a process of its own.

Triton's and KServe's clients for HTTP, curl, and `suanli predict --url`; what they get is what `suanli.load` and
`suanli predict` say of the same inputs on this machine.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hostile
import suanli
from served import Served, digits_run, serving
from suanli.core.errors import SuanliError, pip_install
from suanli.engines.predictor import Prediction

for package in ("uvicorn", "httptools", "starlette", "grpc"):
    pytest.importorskip(package, reason=f"needs: {pip_install('suanli[serve]')}")

CURL = shutil.which("curl")
RESIZED = 2e-3  # the server has no torch, so that Pillow resizes: one level of 255 apart
PATIENT = ("--p99-ms", "10000")  # on a busy machine nobody is turned away


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return digits_run(tmp_path_factory)


@pytest.fixture
def server(digits_server: Served) -> Served:
    """Of the digits alone, so that no request needs to name its model."""
    return digits_server


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Twelve real digits at the size of the model, (12, 8, 8, 1) uint8."""
    from sklearn.datasets import load_digits

    result: np.ndarray = np.rint(load_digits().images[:12, ..., None] * (255 / 16)).astype(np.uint8)
    return result


@pytest.fixture(scope="module")
def local(run: Path, pixels: np.ndarray) -> list[Prediction]:
    """What the model says on this machine, without a server."""
    return suanli.load(run).predict(pixels, top=10)


def png(picture: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(picture[..., 0]).save(written, "png")
    return written.getvalue()


def labels(predictions: list[Prediction]) -> list[str | None]:
    return [prediction.label for prediction in predictions]


# --- Triton's client ---


@pytest.fixture(scope="module")
def triton() -> ModuleType:
    return pytest.importorskip("tritonclient.http", reason=f"needs: {pip_install('tritonclient[http]')}")


@pytest.fixture
def client(triton: ModuleType, server: Served) -> Iterator[Any]:
    with triton.InferenceServerClient(f"{server.host}:{server.port}", concurrency=4) as connection:
        yield connection


def sent(triton: ModuleType, values: np.ndarray, datatype: str = "UINT8", *, binary: bool = True) -> Any:
    tensor = triton.InferInput("image", list(values.shape), datatype)
    tensor.set_data_from_numpy(values, binary_data=binary)
    return tensor


def test_triton_reads_the_server_and_the_model(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    assert not client.is_model_ready("digits", "2")
    assert not client.is_model_ready("nobody")
    about = client.get_server_metadata()
    assert (about["name"], about["version"]) == ("suanli", suanli.__version__)
    assert "binary_tensor_data" in about["extensions"]
    model = client.get_model_metadata("digits")
    assert (model["name"], model["versions"]) == ("digits", ["1"])
    assert model["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    assert [(o["name"], o["datatype"], o["shape"]) for o in model["outputs"]] == [
        ("probabilities", "FP32", [-1, 10]),
        ("label", "BYTES", [-1]),
    ]
    config = client.get_model_config("digits")
    assert config["input"] == [{"name": "image", "data_type": "TYPE_UINT8", "dims": [8, 8, 1]}]
    assert config["max_batch_size"] > 1


@pytest.mark.parametrize("binary_input", [False, True], ids=["JSON in", "bytes in"])
@pytest.mark.parametrize("binary_output", [False, True, None], ids=["JSON out", "bytes out", "no word of outputs"])
def test_triton_gets_the_answers_of_predict(
    client: Any,
    triton: ModuleType,
    pixels: np.ndarray,
    local: list[Prediction],
    binary_input: bool,
    binary_output: bool | None,
) -> None:
    names = ("probabilities", "label")
    outputs = (
        None
        if binary_output is None
        else [triton.InferRequestedOutput(name, binary_data=binary_output) for name in names]
    )
    result = client.infer("digits", [sent(triton, pixels, binary=binary_input)], outputs=outputs, request_id="number 7")
    about = result.get_response()
    assert (about["id"], about["model_name"], about["model_version"]) == ("number 7", "digits", "1")
    assert all(("data" in output) == (binary_output is False) for output in about["outputs"])
    says = result.as_numpy("label")
    assert [label.decode() if isinstance(label, bytes) else label for label in says] == labels(local)
    probabilities = result.as_numpy("probabilities")
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (12, 10))
    np.testing.assert_allclose(probabilities.max(1), [answer.probability for answer in local], atol=1e-5)


def test_triton_asks_for_one_output_of_each_kind(client: Any, triton: ModuleType, pixels: np.ndarray) -> None:
    outputs = [
        triton.InferRequestedOutput("label", binary_data=False),
        triton.InferRequestedOutput("probabilities", binary_data=True),
    ]
    result = client.infer("digits", [sent(triton, pixels)], outputs=outputs, model_version="1")
    assert ["data" in output for output in result.get_response()["outputs"]] == [True, False]
    only = client.infer("digits", [sent(triton, pixels)], outputs=outputs[:1])
    assert [output["name"] for output in only.get_response()["outputs"]] == ["label"]
    assert only.as_numpy("probabilities") is None


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_triton_compresses(client: Any, triton: ModuleType, pixels: np.ndarray, algorithm: str) -> None:
    plain = client.infer("digits", [sent(triton, pixels)]).as_numpy("probabilities")
    result = client.infer(
        "digits",
        [sent(triton, pixels)],
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    np.testing.assert_allclose(result.as_numpy("probabilities"), plain, atol=1e-6)


@pytest.mark.parametrize("binary", [False, True])
def test_triton_asks_for_classes(
    client: Any, triton: ModuleType, pixels: np.ndarray, local: list[Prediction], binary: bool
) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)]
    result = client.infer("digits", [sent(triton, pixels)], outputs=outputs).as_numpy("probabilities")
    assert result.shape == (12, 3)
    for row, answer in zip(result, local, strict=True):
        texts = [text.decode() if isinstance(text, bytes) else text for text in row]
        values, _, names = zip(*(text.split(":") for text in texts), strict=True)
        assert [*names] == [*answer.probabilities][:3]
        np.testing.assert_allclose([float(value) for value in values], [*answer.probabilities.values()][:3], atol=1e-5)


def test_triton_sends_files(client: Any, triton: ModuleType, pixels: np.ndarray, local: list[Prediction]) -> None:
    files = np.array([png(picture) for picture in pixels], dtype=object)
    result = client.infer("digits", [sent(triton, files, "BYTES")])
    assert [label.decode() for label in result.as_numpy("label")] == labels(local)
    files[3] = b"hello"
    with pytest.raises(triton.InferenceServerException, match="Input 3 can't be read"):
        client.infer("digits", [sent(triton, files, "BYTES")])


def test_triton_sends_pictures_of_another_size(client: Any, triton: ModuleType, pixels: np.ndarray) -> None:
    large = pixels.repeat(4, axis=1).repeat(4, axis=2)
    result = client.infer("digits", [sent(triton, large)])
    files = np.array([png(picture) for picture in large], dtype=object)
    expected = client.infer("digits", [sent(triton, files, "BYTES")])
    np.testing.assert_allclose(result.as_numpy("probabilities"), expected.as_numpy("probabilities"), atol=1e-5)


def test_triton_asks_many_at_once(client: Any, triton: ModuleType, pixels: np.ndarray, local: list[Prediction]) -> None:
    requests = [
        client.async_infer("digits", [sent(triton, pixels[i % 12][None])], request_id=str(i)) for i in range(40)
    ]
    for i, answer in enumerate(requests):
        result = answer.get_result()
        assert result.get_response()["id"] == str(i)
        assert result.as_numpy("label")[0].decode() == local[i % 12].label


def test_triton_sees_statistics(client: Any, triton: ModuleType, pixels: np.ndarray) -> None:
    def entry(*which: str) -> dict[str, Any]:
        (result,) = client.get_inference_statistics(*which)["model_stats"]
        return dict(result)

    before = entry("digits", "1")
    client.infer("digits", [sent(triton, pixels)])
    after = entry("digits")
    assert after["inference_count"] == before["inference_count"] + 12
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["inference_stats"]["success"]["ns"] > before["inference_stats"]["success"]["ns"]
    assert after["last_inference"] >= before["last_inference"]
    assert sum(stats["compute_infer"]["count"] for stats in after["batch_stats"]) == after["execution_count"]
    assert entry()["name"] == "digits"


def test_triton_gets_the_reasons_of_refusals(client: Any, triton: ModuleType, pixels: np.ndarray) -> None:
    tensor = sent(triton, pixels)
    other = triton.InferInput("picture", list(pixels.shape), "UINT8")
    other.set_data_from_numpy(pixels)
    nothing = [triton.InferRequestedOutput("nothing")]
    cases: dict[str, tuple[str, str, dict[str, Any]]] = {
        "no model": ("404", "no model nobody", {"model_name": "nobody", "inputs": [tensor]}),
        "no version": ("404", "version 9", {"model_name": "digits", "model_version": "9", "inputs": [tensor]}),
        "no output": ("400", "not 'nothing'", {"model_name": "digits", "inputs": [tensor], "outputs": nothing}),
        "no input": ("400", "one input, 'image'", {"model_name": "digits", "inputs": [other]}),
        "floats": ("400", "BYTES", {"model_name": "digits", "inputs": [sent(triton, pixels / np.float32(1), "FP32")]}),
        "too late": ("504", "deadline", {"model_name": "digits", "inputs": [tensor], "timeout": 1}),
    }
    for what, (status, says, arguments) in cases.items():
        with pytest.raises(triton.InferenceServerException, match=says) as caught:
            client.infer(**arguments)
        assert caught.value.status() == status, what
    with pytest.raises(triton.InferenceServerException):
        client.get_system_shared_memory_status()


def test_triton_unloads_and_loads(client: Any, triton: ModuleType) -> None:
    ready = {"name": "digits", "version": "1", "state": "READY", "reason": ""}
    assert client.get_model_repository_index() == [ready]
    client.unload_model("digits")
    assert not client.is_model_ready("digits")
    assert not client.is_server_ready()
    client.load_model("digits")
    assert client.is_model_ready("digits", "1")
    assert client.is_server_ready()
    assert client.get_model_repository_index() == [ready]
    with pytest.raises(triton.InferenceServerException, match="no model nobody") as caught:
        client.load_model("nobody")
    assert caught.value.status() == "404"
    with pytest.raises(triton.InferenceServerException, match="as its folder says") as caught:
        client.load_model("digits", config="{}")
    assert caught.value.status() == "400"


# --- KServe's client ---


KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main(url, grpc):
    pixels = np.load("pixels.npy")
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    said = {"health": [await client.is_server_live(url), await client.is_server_ready(url),
                       await client.is_model_ready(url, "digits")], "labels": [], "ids": []}
    remote = InferenceGRPCClient(grpc)
    for way in ("JSON", "bytes", "gRPC"):
        tensor = InferInput("image", list(pixels.shape), "UINT8")
        tensor.set_data_from_numpy(pixels, binary_data=way != "JSON")
        request = InferRequest(model_name="digits", infer_inputs=[tensor], request_id="7")
        found = await (remote.infer(request) if way == "gRPC" else client.infer(url, request, model_name="digits"))
        outputs = {output.name: output.as_numpy() for output in found.outputs}
        assert outputs["probabilities"].shape == (12, 10), way
        said["labels"].append([x.decode() if isinstance(x, bytes) else str(x) for x in outputs["label"].tolist()])
        said["ids"].append(found.id)
    await remote.close()
    try:
        await client.infer(url, request, model_name="nobody")
    except Exception as error:
        said["error"] = str(error)
    print(json.dumps(said))

asyncio.run(main(*sys.argv[1:]))
"""


def test_kserve_gets_the_answers_of_predict(
    server: Served, pixels: np.ndarray, local: list[Prediction], tmp_path: Path
) -> None:
    """Its client wants other versions of our packages, so it runs where $KSERVE_PYTHON says that it is installed."""
    python = os.environ.get("KSERVE_PYTHON") or (sys.executable if importlib.util.find_spec("kserve") else None)
    if python is None:
        pytest.skip("needs kserve: python -m venv E; E/bin/pip install kserve; then set KSERVE_PYTHON=E/bin/python")
    np.save(tmp_path / "pixels.npy", pixels)
    command = [python, "-c", KSERVE, server.url, f"{server.host}:{server.grpc_port}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["health"] == [True, True, True]
    assert report["labels"] == [labels(local)] * 3
    assert report["ids"] == ["7"] * 3
    assert "no model nobody" in report["error"]


# --- curl ---


def curl(*arguments: str, data: bytes = b"") -> Any:
    if CURL is None:
        pytest.skip("there is no curl: apt-get install curl adds it")
    command = [CURL, "--silent", "--show-error", "--max-time", "60", *arguments]
    return subprocess.run(command, input=data, capture_output=True, timeout=90, check=True).stdout


@pytest.fixture
def files(pixels: np.ndarray, tmp_path: Path) -> list[Path]:
    result = []
    for i, picture in enumerate(pixels[:3]):
        result.append(tmp_path / f"photo{i}.png")
        result[-1].write_bytes(png(picture))
    return result


def test_curl_sends_a_form(server: Served, files: list[Path], local: list[Prediction]) -> None:
    (prediction,) = json.loads(curl("-F", f"file=@{files[0]}", f"{server.url}/predict"))["predictions"]
    assert (prediction["name"], prediction["label"], prediction["error"]) == ("photo0.png", local[0].label, None)
    assert prediction["probability"] == pytest.approx(local[0].probability, abs=1e-5)
    assert [*prediction["probabilities"]] == [*local[0].probabilities][:5]
    several = [word for file in files for word in ("-F", f"pictures=@{file}")]
    answer = json.loads(curl(*several, f"{server.url}/predict?top=2"))
    assert [prediction["label"] for prediction in answer["predictions"]] == labels(local[:3])
    assert all(len(prediction["probabilities"]) == 2 for prediction in answer["predictions"])
    assert (answer["model"], answer["version"]) == ("digits", "1")


def test_curl_sends_a_file_as_it_is(server: Served, files: list[Path], local: list[Prediction]) -> None:
    for kind in ([], ["-H", "Content-Type: image/png"], ["-H", "Content-Type: application/octet-stream"]):
        answer = json.loads(curl(*kind, "--data-binary", f"@{files[0]}", f"{server.url}/predict"))
        assert [prediction["label"] for prediction in answer["predictions"]] == [local[0].label]
    piped = curl("--data-binary", "@-", f"{server.url}/predict", data=files[1].read_bytes())
    assert json.loads(piped)["predictions"][0]["label"] == local[1].label


def test_curl_sends_a_raw_binary_request(server: Served, files: list[Path], local: list[Prediction]) -> None:
    header = ("-H", "Inference-Header-Content-Length: 0", "-H", "Content-Type: application/octet-stream")
    answer = curl(*header, "--data-binary", f"@{files[0]}", f"{server.url}/v2/models/digits/infer")
    head = json.JSONDecoder().raw_decode(answer.decode("latin-1"))[0]
    assert [output["name"] for output in head["outputs"]] == ["probabilities", "label"]
    assert answer.endswith(b"\1\0\0\0" + str(local[0].label).encode())


def test_curl_sends_json(server: Served, pixels: np.ndarray, local: list[Prediction]) -> None:
    inputs = [{"name": "image", "datatype": "UINT8", "shape": [1, 8, 8, 1], "data": pixels[0].ravel().tolist()}]
    answer = curl("--json", json.dumps({"id": "7", "inputs": inputs}), f"{server.url}/v2/models/digits/infer")
    response = json.loads(answer)
    assert (response["id"], response["outputs"][1]["data"]) == ("7", [local[0].label])


def test_curl_gets_the_status_and_the_reason(server: Served, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("hello")
    reply = curl("-i", "-F", f"file=@{tmp_path / 'bad.png'}", f"{server.url}/predict").decode()
    assert reply.startswith("HTTP/1.1 400")
    answer = json.loads(reply.split("\r\n\r\n")[-1])
    (prediction,) = answer["predictions"]
    assert prediction["label"] is None
    assert answer["error"] == f"bad.png: {prediction['error']}"
    assert "it is text that starts with 'hello'" in prediction["error"]
    for path, status in (("predict?model=nobody", 404), ("predict?top=0", 400), ("v2/models/digits/infer", 400)):
        reply = curl("-i", "--data-binary", "hello", f"{server.url}/{path}").decode()
        assert reply.startswith(f"HTTP/1.1 {status}")
        assert json.loads(reply.split("\r\n\r\n")[-1])["error"].endswith(".")
    reply = curl("-i", "-X", "DELETE", f"{server.url}/v2/models/digits").decode()
    assert reply.startswith("HTTP/1.1 405")
    assert "\r\nallow: GET, HEAD\r\n" in reply
    assert "suanli_inputs_total" in curl(f"{server.url}/metrics").decode()
    assert curl("-I", f"{server.url}/v2").decode().startswith("HTTP/1.1 200")


# --- suanli predict --url ---


def equal(remote: list[Prediction], here: list[Prediction], *, within: float = 1e-5) -> None:
    assert [(one.name, one.label, one.error) for one in remote] == [(one.name, one.label, one.error) for one in here]
    for one, other in zip(remote, here, strict=True):
        assert len(one.probabilities) == len(other.probabilities)
        assert one.probability == pytest.approx(other.probability, abs=within)
        for (_, high), (_, same) in zip(one.probabilities.items(), other.probabilities.items(), strict=True):
            assert high == pytest.approx(same, abs=within)


@pytest.fixture
def folder(pixels: np.ndarray, tmp_path: Path) -> Path:
    """Pictures of several formats and sizes, and among them files that are none."""
    place = tmp_path / "pictures"
    (place / "more").mkdir(parents=True)
    for i, picture in enumerate(pixels):
        grown = Image.fromarray(picture[..., 0]).resize((8 + 5 * i, 8 + 3 * i))
        name = ("{}.png", "{}.bmp", "{}.gif", "more/{}.jpg")[i % 4].format(f"{i:02}")
        grown.save(place / name)
    (place / "empty.png").write_bytes(b"")
    (place / "text.png").write_text("hello")
    (place / "short.jpg").write_bytes((place / "more" / "03.jpg").read_bytes()[:200])
    return place


@pytest.mark.parametrize("name", ["", "/", "/v2/models/digits", "/v2/models/digits/versions/1"])
def test_the_server_and_this_machine_give_the_same_answers(server: Served, run: Path, folder: Path, name: str) -> None:
    here = suanli.predict(run, folder)
    assert sum(answer.error is not None for answer in here) == 3
    equal(suanli.predict(None, folder, url=server.url + name), here, within=RESIZED)


def test_files_patterns_and_how_many_classes(server: Served, run: Path, folder: Path) -> None:
    inputs = [folder / "00.png", f"{folder}/*.bmp", folder / "empty.png"]
    equal(suanli.predict(None, inputs, url=server.url, top=2), suanli.predict(run, inputs, top=2), within=RESIZED)
    with pytest.raises(suanli.DataError, match="nothing at"):
        suanli.predict(None, folder / "missing.png", url=server.url)


def command(*arguments: str | Path, stdin: bytes | None = None, code: int = 0) -> str:
    words = [sys.executable, "-m", "suanli", "predict", *map(str, arguments)]
    done = subprocess.run(words, input=stdin, capture_output=True, timeout=120, check=False)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode() if code == 0 else done.stderr.decode()


def test_the_command_line_and_standard_input(server: Served, run: Path, folder: Path) -> None:
    (expected,) = suanli.predict(run, folder / "00.png")
    table = command("--url", server.url, "-", "--csv", stdin=(folder / "00.png").read_bytes())
    (row,) = csv.DictReader(io.StringIO(table))
    assert (row["name"], row["label"], row["error"]) == ("-", expected.label, "")
    assert float(row["probability"]) == pytest.approx(expected.probability, abs=1e-5)
    files = sorted(map(str, folder.glob("*.png")))
    there = json.loads(command("--url", server.url, "-", "--json", stdin="\n".join(files).encode()))
    assert there["model"] == server.url
    here = suanli.predict(run, files)
    assert [(p["label"], p["error"]) for p in there["predictions"]] == [(p.label, p.error) for p in here]
    assert len(here) == 5


def test_errors_of_the_command_line_say_what_to_do(server: Served, folder: Path) -> None:
    picture = folder / "00.png"
    with pytest.raises(SuanliError, match="not the address"):
        suanli.predict(None, picture, url="digits")
    with pytest.raises(SuanliError, match="doesn't answer"):
        suanli.predict(None, picture, url="http://127.0.0.1:9")
    with pytest.raises(SuanliError, match="The models at .* are"):
        suanli.predict(None, picture, url=f"{server.url}/v2/models/nobody")
    with pytest.raises(SuanliError, match="refused: There is no model"):
        suanli.predict(None, picture, url=f"{server.url}/v2/models/digits/versions/9")
    assert "doesn't answer" in command("--url", "http://127.0.0.1:9", picture, code=4)


def test_texts_are_sent_too(make_reviews: Callable[[], Path], tmp_path: Path) -> None:
    run = make_reviews()
    lines = tmp_path / "lines.txt"
    lines.write_text("a great lovely fine film\n\nawful dull poor plot\n演员很好。\n", encoding="utf-8")
    with serving(run, *PATIENT) as server:
        equal(suanli.predict(None, lines, url=server.url), suanli.predict(run, lines))
        texts = ["a great lovely film", "an awful dull plot"]
        expected = labels(suanli.load(run).predict(texts))
        answer = json.loads(curl("--json", json.dumps({"inputs": texts}), f"{server.url}/predict"))
        assert [prediction["label"] for prediction in answer["predictions"]] == expected
        plain = ("-H", "Content-Type: text/plain", "--data-binary", texts[0])
        answer = json.loads(curl(*plain, f"{server.url}/predict"))
        assert [prediction["label"] for prediction in answer["predictions"]] == expected[:1]
        for body, status in (('{"inputs": ["\\ud800"]}', 200), ('{"inputs": [""]}', 400)):
            assert server.ask("POST", "/predict", body, {"Content-Type": "application/json"}).status == status
        for body in ('{"inputs": [1]}', '{"inputs": []}', "[]", "{"):
            assert server.ask("POST", "/predict", body, {"Content-Type": "application/json"}).status == 400
        assert server.ask("POST", "/predict", b"\x89PNG", {"Content-Type": "image/png"}).status == 415
        text = {"name": "text", "datatype": "BYTES", "shape": [2], "data": texts}
        answer = server.ask("POST", f"/v2/models/{run.name}/infer", json.dumps({"inputs": [text]}))
        assert answer.json()["outputs"][1]["data"] == expected


@pytest.fixture
def make_reviews(text_table: Path, tmp_path: Path) -> Callable[[], Path]:
    def make() -> Path:
        return suanli.train(text_table, epochs=1, speedups="none", threads=1, out=tmp_path / "reviews").path

    return make


def test_a_server_with_a_key_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(hostile.pictures((hostile.GOOD, 3))[0]).save(picture)
    run = hostile.engines(tmp_path / "odd")
    with (
        hostile.register() as environment,
        serving(run, *PATIENT, environment=environment | {"SUANLI_API_KEY": "secret-7"}) as server,
    ):
        monkeypatch.delenv("SUANLI_API_KEY", raising=False)
        with pytest.raises(SuanliError, match="needs an API key") as caught:
            suanli.predict(None, picture, url=server.url)
        assert "SUANLI_API_KEY" in str(caught.value.fix)
        reply = curl("-i", "-F", f"file=@{picture}", f"{server.url}/predict").decode()
        assert reply.startswith("HTTP/1.1 401")
        assert "\r\nwww-authenticate: Bearer\r\n" in reply
        for header in ("Authorization: Bearer secret-7", "X-API-Key: secret-7"):
            reply = curl("-i", "-H", header, "-F", f"file=@{picture}", f"{server.url}/predict").decode()
            assert reply.startswith("HTTP/1.1 200")
        for header in ("Authorization: Bearer secret-8", "Authorization: Basic secret-7", "X-API-Key: secret-70"):
            assert "401" in curl("-i", "-H", header, f"{server.url}/v2").decode()[:20]
        document = server.ask("GET", "/openapi.json", headers={"X-API-Key": "secret-7"}).json()
        assert document["security"]
        assert "401" in document["paths"]["/v2"]["get"]["responses"]
        monkeypatch.setenv("SUANLI_API_KEY", "secret-7")
        equal(suanli.predict(None, picture, url=server.url), suanli.predict(run, picture))
