"""Plain files for use without suanli: each is read here by a process without suanli."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import suanli
from pair_model import saved_pair
from served import digits_run
from suanli.cli import main
from suanli.core.errors import MachineError, StorageError, pip_install
from suanli.core.schema import random_inputs
from suanli.core.types import Recipe
from suanli.data.preprocess.image import ImagePreprocess
from suanli.engines.inference_module import InferenceModule, without_predictions
from suanli.models.model_folder import build_task, load_model, save_model

module = importlib.import_module("suanli.verbs.export")

SUFFIXES = {
    "onnx": ".onnx",
    "openvino": "-openvino",
    "pt2": ".pt2",
    "litert": ".tflite",
    "safetensors": ".safetensors",
}
GRAPHS = ("onnx", "openvino", "pt2", "litert")

# As a user would read them; not the source that the verb runs.
READERS = {
    "onnx": """
import onnx, onnxruntime
for item in onnx.load(path).metadata_props:
    about[item.key] = item.value
(name,) = json.loads(about["inputs"])
answers = onnxruntime.InferenceSession(path).run(["probabilities"], {name: rows})[0]
""",
    "openvino": """
sys.modules["openvino_telemetry"] = None
import xml.etree.ElementTree as tree
import openvino
for item in tree.parse(path + "/model.xml").find("rt_info"):
    about[item.tag] = item.get("value")
answers = openvino.compile_model(path + "/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(rows)[0]
""",
    "pt2": """
import torch
from PIL import Image
about = {name + ".json": "" for name in ("classes", "preprocess", "rows", "inputs", "outputs", "task")}
program = torch.export.load(path, extra_files=about)
about = {name.split(".")[0]: text for name, text in about.items()}
answers = program.module()(torch.from_numpy(rows)).numpy()
""",
    "litert": """
from ai_edge_litert import schema_py_generated
from ai_edge_litert.interpreter import Interpreter
model = schema_py_generated.ModelT.InitFromPackedBuf(open(path, "rb").read())
about = {item.name.decode(): bytes(model.buffers[item.buffer].data).decode() for item in model.metadata}
interpreter = Interpreter(model_path=path)
interpreter.allocate_tensors()
answers = []
for row in rows:
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], row[None])
    interpreter.invoke()
    answers.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0])
""",
    "safetensors": """
from safetensors import safe_open
with safe_open(path, framework="np") as file:
    about = file.metadata()
    answers = file.get_tensor("head.weight")
""",
}


def read_apart(form: str, path: Path, rows: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Probabilities (weights of the head for safetensors) and metadata, by a process without suanli."""
    np.save("rows.npy", rows)
    code = (
        f"import json, sys, numpy\npath, about, rows = sys.argv[1], {{}}, numpy.load('rows.npy')\n{READERS[form]}\n"
        "numpy.save('answers.npy', answers)\n"
        "assert 'suanli' not in sys.modules\n"
        "json.dump(about, open('about.json', 'w'))\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return np.load("answers.npy"), json.loads(Path("about.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> suanli.Run:
    return suanli.Run(shutil.copytree(digits_run(tmp_path_factory), tmp_path_factory.mktemp("trained") / "digits-1"))


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Real inputs, (40, 8, 8) uint8."""
    from sklearn.datasets import load_digits

    return np.rint(load_digits().images[:40] * (255 / 16)).astype(np.uint8)


@pytest.fixture
def form(request: pytest.FixtureRequest) -> str:
    for package in module.FORMATS[request.param].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: {pip_install(f'suanli[{module.FORMATS[request.param].extra}]')}")
    return str(request.param)


@pytest.fixture
def untouched() -> Iterator[None]:
    """The current directory is the same afterwards."""
    before = sorted(os.listdir("."))
    yield
    assert sorted(os.listdir(".")) == before


every_form = pytest.mark.parametrize("form", list(SUFFIXES), indirect=True)


@every_form
def test_the_file_answers_as_the_model_without_suanli(form: str, run: suanli.Run, digits: np.ndarray) -> None:
    exported = suanli.export(run, to=form)
    assert exported.path == Path(f"digits-1{SUFFIXES[form]}")
    assert sorted(os.listdir(".")) == [exported.path.name]  # the temporary folder is gone
    files = [exported.path] if exported.path.is_file() else list(exported.path.iterdir())
    assert exported.size_bytes == sum(file.stat().st_size for file in files) > 1_000_000
    here = str(Path(suanli.__file__).parent).encode()
    assert not any(here in file.read_bytes() for file in files)  # names no files of this machine

    answers, about = read_apart(form, exported.path, digits[..., None])
    assert json.loads(about["classes"]) == [str(i) for i in range(10)]
    preprocess = json.loads(about["preprocess"])
    assert preprocess == load_model(run.model_path).card["preprocess"]
    assert [preprocess["settings"][name] for name in ("height", "width", "channels")] == [8, 8, 1]
    if form == "safetensors":
        assert exported.difference is None
        assert np.array_equal(answers, load_model(run.model_path).module.state_dict()["head.weight"].numpy())
        assert about["model"] == "speednet"
        assert json.loads(about["model_args"]) == {"classes": 10, "in_channels": 1, "image_size": [8, 8]}
        return
    assert exported.difference is not None
    assert exported.difference < 1e-4
    assert json.loads(about["rows"])["shape"] == [8, 8, 1]
    assert json.loads(about["inputs"]) == {"image": {"shape": [8, 8, 1], "dtype": "uint8", "role": "image"}}
    assert json.loads(about["outputs"]) == {
        "probabilities": {"shape": [10], "dtype": "float32", "role": "probabilities"}
    }
    assert json.loads(about["task"])["name"] == "classification"
    predictor = suanli.load(run, engine="reference", device="cpu", threads=1)
    rows = np.stack([predictor.encode(picture).arrays["image"] for picture in digits])
    assert np.array_equal(rows, digits[..., None])  # at their own size pictures are rows already
    expected = predictor.answer({"image": rows})["probabilities"]
    assert answers.shape == (40, 10)
    assert np.abs(answers - expected).max() < 1e-4
    assert np.ptp(expected, axis=0).min() > 0.5  # answers that differ from input to input


def test_without_predictions_a_classifier_gives_logits(run: suanli.Run, digits: np.ndarray) -> None:
    saved = load_model(run.model_path)
    raw = without_predictions(saved)
    assert {name: column.shape for name, column in raw.task.outputs.items()} == {"logits": (10,)}
    rows = torch.from_numpy(digits[..., None])
    with torch.inference_mode():
        (logits,), (probabilities,) = InferenceModule(raw)(rows), InferenceModule(saved)(rows)
    torch.testing.assert_close(logits.softmax(1), probabilities)


# Of a model with the inputs "image" and "tokens"; answers are "price" and "boxes".
PAIR_READERS = {
    "onnx": """
import onnxruntime
answers = onnxruntime.InferenceSession(path).run(["price", "boxes"], inputs)
""",
    "openvino": """
import openvino
model = openvino.compile_model(path + "/model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
answers = [model(inputs)[name] for name in ("price", "boxes")]
""",
    "pt2": """
import torch
from PIL import Image
answers = torch.export.load(path).module()(*(torch.from_numpy(inputs[name]) for name in ("image", "tokens")))
""",
    "litert": """
from ai_edge_litert.interpreter import Interpreter
runner = Interpreter(path).get_signature_runner()
pairs = [
    runner(args_0=inputs["image"][i : i + 1], args_1=inputs["tokens"][i : i + 1]) for i in range(len(inputs["image"]))
]
answers = [numpy.concatenate([pair[name] for pair in pairs]) for name in ("output_0", "output_1")]
""",
}


@pytest.mark.parametrize("form", list(GRAPHS), indirect=True)
def test_several_inputs_and_outputs(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pair").mkdir()
    with saved_pair(tmp_path / "pair") as folder:
        exported = suanli.export(folder / "model", to=form, trust_code=True)
        saved = load_model(folder / "model", trust_code=True)
        inputs = random_inputs(saved.preprocess.inputs, 5)
        inference = InferenceModule(saved)
        with torch.inference_mode():
            expected = inference(*map(torch.from_numpy, inputs.values()))
        calls = ("'image': image, 'tokens': tokens", "torch.from_numpy(tokens)", "args_0=image, args_1=tokens")
        assert any(call in exported.use for call in calls)
        assert "image: uint8 (B, 8, 8, 1), tokens: int32 (B, 5)" in exported.use
        # One of the outputs is wrong: the prices, by a hundredth of their range.
        write, bias = module.FORMATS[form].write, saved.module.price.bias

        def write_other_prices(saved: Any, *rest: Any) -> None:
            with torch.no_grad():
                saved.module.price.bias += 0.01 * np.ptp(expected[0].numpy()) / 50_000
            write(saved, *rest)
            with torch.no_grad():
                saved.module.price.bias.copy_(bias)

        monkeypatch.setitem(module.FORMATS, form, replace(module.FORMATS[form], write=write_other_prices))
        with pytest.raises(suanli.GateError, match=r"other answers than the model: up to 0\.0\d+ apart"):
            suanli.export(folder / "model", to=form, out="other", trust_code=True)
    np.savez("inputs.npz", **inputs)
    code = (
        "import sys, numpy\nsys.modules['openvino_telemetry'] = None\npath = sys.argv[1]\n"
        f"inputs = dict(numpy.load('inputs.npz'))\n{PAIR_READERS[form]}\n"
        "numpy.savez('answers.npz', price=answers[0], boxes=answers[1])\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(exported.path)], check=True)
    answers = np.load("answers.npz")
    for name, tensor in zip(inference.outputs, expected, strict=True):
        np.testing.assert_allclose(answers[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["openvino"], indirect=True)
def test_a_text_model_with_the_vocabulary_in_its_metadata(form: str, text_table: Path) -> None:
    run = suanli.train(text_table, epochs=2, speedups="none", threads=1, out="reviews-1")
    exported = suanli.export(run.model_path, to=form)  # a model folder has the name of its run
    assert exported.path.name == f"reviews-1{SUFFIXES[form]}"

    texts = ["great lovely fine film", "dull awful story", "zebra , poor plot"]
    # From words to rows by the metadata alone: padding is 0, what is unknown 1, the vocabulary follows.
    settings = load_model(run.model_path).card["preprocess"]["settings"]
    ids = {word: i for i, word in enumerate(settings["vocabulary"], start=2)}
    rows = np.zeros((len(texts), settings["length"]), np.int32)
    for row, text in zip(rows, texts, strict=True):
        words = text.split()[: settings["length"]]
        row[: len(words)] = [ids.get(word, 1) for word in words]
    answers, about = read_apart(form, exported.path, rows)
    assert json.loads(about["preprocess"]) == {"kind": "text", "settings": settings}
    predictions = suanli.load(run, engine="reference", device="cpu", threads=1).predict(texts)
    classes = json.loads(about["classes"])
    expected = [[prediction.probabilities[name] for name in classes] for prediction in predictions]
    assert np.abs(answers - expected).max() < 1e-4


@every_form
@pytest.mark.usefixtures("untouched")
@pytest.mark.long
def test_a_file_whose_weights_were_spoiled_after_writing_is_refused(
    form: str, run: suanli.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sign of the output layer is turned on disk; the file can still be read."""
    check = module.check_export
    weights = load_model(run.model_path).module.state_dict()["head.weight"].numpy()

    def spoil_and_check(saved: Any, path: Path, *rest: Any) -> Any:
        file = path / "model.bin" if path.is_dir() else path
        content = file.read_bytes()
        spoiled = content.replace(weights.tobytes(), (-weights).tobytes())
        assert spoiled != content
        file.write_bytes(spoiled)
        return check(saved, path, *rest)

    monkeypatch.setattr(module, "check_export", spoil_and_check)
    says = r"up to 0\.\d+ apart" if form in GRAPHS else "weights are not the model's"
    with pytest.raises(suanli.GateError, match=says):
        suanli.export(run, to=form)


@pytest.mark.parametrize("form", [pytest.param("onnx", marks=pytest.mark.long), "safetensors"], indirect=True)
@pytest.mark.usefixtures("untouched")
def test_a_file_that_was_cut_short_is_refused(form: str, run: suanli.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check = module.check_export

    def cut_and_check(saved: Any, path: Path, *rest: Any) -> Any:
        os.truncate(path, path.stat().st_size // 2)
        return check(saved, path, *rest)

    monkeypatch.setattr(module, "check_export", cut_and_check)
    with pytest.raises(MachineError, match="can't be used without suanli"):
        suanli.export(run, to=form)


@pytest.mark.usefixtures("untouched")
def test_a_file_that_needs_suanli_is_refused(run: suanli.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    form = module.FORMATS["safetensors"]
    monkeypatch.setitem(module.FORMATS, "safetensors", replace(form, read=f"import suanli\n{form.read}"))
    with pytest.raises(MachineError, match="reading it needs suanli"):
        suanli.export(run, to="safetensors")


BRANCHES = """
import torch
from PIL import Image
from torch import nn

class Branches(nn.Module):
    '''Which way it goes depends on the values of a batch, which no graph can hold.'''

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        x = x.flatten(1)
        return self.head(x) if x.sum() > 0 else -self.head(x)

def build(*, classes):
    return Branches(classes)
"""


@every_form
def test_a_network_that_no_graph_can_hold(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(os.getcwd())
    Path("branching.py").write_text(BRANCHES)
    sys.modules.pop("branching", None)
    network = importlib.import_module("branching").build(classes=2)
    preprocess = ImagePreprocess(height=8, width=8, channels=1)
    recipe = Recipe(name="own", model="branching:build")
    task = build_task("classification", ("a", "b"), {})
    save_model(Path("net"), network, recipe=recipe, preprocess=preprocess, task=task, data={})
    with pytest.raises(suanli.UsageError, match="--trust-code"):
        suanli.export("net", to=form)
    before = sorted(os.listdir("."))
    if form == "safetensors":  # has no graph
        assert suanli.export("net", to=form, trust_code=True).path.name == "net.safetensors"
        return
    with pytest.raises(MachineError, match=r"can't be written as .*\(.*data-dependent.*\).* --to") as failed:
        suanli.export("net", to=form, trust_code=True)
    assert "safetensors" in failed.value.fix
    assert sorted(os.listdir(".")) == before


@pytest.mark.parametrize("form", ["onnx"], indirect=True)
def test_a_graph_for_one_size_of_batch_is_refused(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`len` of a batch is a plain number, which the exporter silently takes for a constant."""
    monkeypatch.syspath_prepend(os.getcwd())
    Path("fixed.py").write_text(
        BRANCHES.replace("x.flatten(1)", "x.reshape(len(x), 64)").replace("if x.sum() > 0", "if 1")
    )
    network = importlib.import_module("fixed").build(classes=2)
    preprocess = ImagePreprocess(height=8, width=8, channels=1)
    recipe = Recipe(name="own", model="fixed:build")
    task = build_task("classification", ("a", "b"), {})
    save_model(Path("net"), network, recipe=recipe, preprocess=preprocess, task=task, data={})
    with pytest.raises(MachineError, match="it fixes the batch size"):
        suanli.export("net", to=form, trust_code=True)
    assert not [name for name in os.listdir(".") if "export" in name or name.endswith(".onnx")]


@every_form
def test_an_occupied_target_is_refused(form: str, run: suanli.Run) -> None:
    target = Path(f"digits-1{SUFFIXES[form]}")
    target.write_text("mine")
    with pytest.raises(suanli.UsageError, match="exists"):
        suanli.export(run, to=form)
    assert target.read_text() == "mine"
    folder = Path("folder")
    (folder / "inner").mkdir(parents=True)
    with pytest.raises(suanli.UsageError, match="exists"):
        suanli.export(run, to=form, out=folder)
    Path("nowhere").symlink_to("gone")
    with pytest.raises(suanli.UsageError, match="exists"):
        suanli.export(run, to=form, out="nowhere")


@pytest.mark.parametrize("form", ["openvino"], indirect=True)
def test_an_empty_folder_is_filled_and_another_writer_is_noticed(
    form: str, run: suanli.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("empty").mkdir()
    exported = suanli.export(run, to=form, out="empty")
    assert sorted(p.name for p in exported.path.iterdir()) == ["model.bin", "model.xml"]

    def check_while_another_writes(*_: Any) -> None:
        Path("late").mkdir()
        Path("late/theirs").touch()

    monkeypatch.setattr(module, "check_export", check_while_another_writes)
    with pytest.raises(suanli.UsageError, match="late exists"):
        suanli.export(run, to=form, out="late")
    assert os.listdir("late") == ["theirs"]


@pytest.mark.parametrize(
    "form", ["onnx", pytest.param("openvino", marks=pytest.mark.long), "pt2", "safetensors"], indirect=True
)
@pytest.mark.usefixtures("untouched")
def test_where_nothing_can_be_written(form: str, run: suanli.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="Can't write /proc/nothing/model"):
        suanli.export(run, to=form, out="/proc/nothing/model")
    # A disk that is full, for this process alone: no file may grow beyond 200 kB.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write: Callable[..., None] = module.FORMATS[form].write

    def write_little(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setitem(module.FORMATS, form, replace(module.FORMATS[form], write=write_little))
    with pytest.raises(StorageError, match="File too large"):
        suanli.export(run, to=form, out="new/folder/model")


@pytest.mark.usefixtures("untouched")
def test_wrong_options(run: suanli.Run) -> None:
    with pytest.raises(suanli.UsageError, match=r"Did you mean 'onnx'\? Allowed: litert, onnx, openvino, pt2"):
        suanli.export(run, to="onx")
    with pytest.raises(suanli.DataError, match="There is nothing at"):
        suanli.export("nowhere", to="onnx")


def test_a_run_without_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos-1").mkdir(parents=True)
    with pytest.raises(suanli.DataError, match=r"There is nothing at photos-1\. Did you mean runs.photos-1\?"):
        suanli.export("photos-1", to="onnx")


@pytest.mark.parametrize(("to", "package"), [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("openvino", "openvino")])
@pytest.mark.usefixtures("untouched")
def test_a_missing_package_is_named(to: str, package: str, run: suanli.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MachineError, match=rf"needs .*{package}.*pip install 'suanli\[engines\]'"):
        suanli.export(run, to=to)


def test_the_command(run: suanli.Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.path), "--to", "safetensors", "--out", "weights.safetensors"])
    assert not ended.value.code
    output = capsys.readouterr().out
    assert "weights.safetensors (1.1 MB): every tensor equals the model's." in output
    assert "Use it: safetensors.torch.load_file('weights.safetensors')" in output
    with pytest.raises(SystemExit) as ended:
        main(["export", str(run.path), "--to", "safetensors", "--out", "weights.safetensors", "--json"])
    assert ended.value.code == 2
    assert "exists" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
@pytest.mark.parametrize(("size", "mode"), [((61, 40), "RGB"), ((17, 83), "RGB"), ((24, 32), "L"), ((50, 49), "P")])
def test_the_code_in_a_file_prepares_an_image_as_suanli_does(
    resize: str, size: tuple[int, int], mode: str, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3)).astype(np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).convert(mode).save(path)
    for channels in (1, 3):
        preprocess = ImagePreprocess(height=24, width=31, channels=channels, resize=resize)  # type: ignore[arg-type]
        names: dict[str, Any] = {"path": path}
        exec(preprocess.encoding_code, names)
        expected = preprocess.encode(path.read_bytes()).arrays["image"].astype(int)
        assert names["image"].shape == (1, *expected.shape)
        assert np.abs(names["image"][0] - expected).max() <= 1
