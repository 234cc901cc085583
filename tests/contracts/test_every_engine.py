"""What every engine promises: it says where it can't be used, and elsewhere answers as the model does."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import suanli
from served import digits_run
from suanli.core import registry
from suanli.core.types import Device, Engine, Placement
from suanli.engines.acceptance import DRIFT, STEADY
from suanli.engines.inference_module import write_onnx
from suanli.engines.sandbox import Sandbox
from suanli.machine.device import detect
from suanli.models.model_folder import load_model

HERE = detect("cpu")
DEVICES = (
    HERE,
    Device(name="an old CPU", torch_name="cpu", memory_bytes=None, fast_dtypes=("float32",)),
    Device(name="a GPU", torch_name="cuda:1", memory_bytes=80 << 30, fast_dtypes=("float32", "float16", "bfloat16")),
    Device(name="a Mac's GPU", torch_name="mps", memory_bytes=None, fast_dtypes=("float32", "float16")),
)
ENGINES: dict[str, Engine] = registry.load_all("engines")
SLOW = ("aot_inductor", "inductor")  # they compile, as they do in test_optimize.py: here in `make long`


def marks(engine: Engine) -> list[pytest.MarkDecorator]:
    return [pytest.mark.long] if engine.name in SLOW else []


PAIRS = [
    pytest.param(engine, precision, id=f"{engine.name}-{precision}", marks=marks(engine))
    for engine in ENGINES.values()
    for precision in engine.precisions
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained model, its graph, training rows and rows to answer."""
    place, trained = tmp_path_factory.mktemp("engines"), digits_run(tmp_path_factory)
    run = shutil.copytree(trained, place / "run")
    prepared = suanli.prepare("digits", settings={}, cache_dir=trained.parent / "cache")
    training, validation = prepared.splits["train"], prepared.splits["val"]
    np.save(place / "calibration.npy", training.inputs[training.index[:100]])
    np.save(place / "rows.npy", validation.inputs[validation.index[:40]])
    write_onnx(load_model(run / "model"), place / "model.onnx")
    return place


@pytest.mark.parametrize("name", registry.names("engines"))
def test_has_the_name_of_its_file(name: str) -> None:
    engine = ENGINES[name]
    assert engine.name == name
    assert engine.precisions
    assert len(set(engine.precisions)) == len(engine.precisions)
    assert set(engine.precisions) <= STEADY.keys() & DRIFT.keys()


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_says_where_it_cannot_be_used(engine: Engine, precision: str, device: Device) -> None:
    reason = engine.why_not(device, precision)
    assert reason is None or (reason.strip() == reason and 0 < len(reason) < 300 and not reason.endswith("."))
    if precision not in ("float32", "int8") and precision not in device.fast_dtypes:
        assert reason is not None


@pytest.mark.parametrize(("engine", "precision"), PAIRS)
def test_answers_as_the_model_does(engine: Engine, precision: str, inputs: Path, tmp_path: Path) -> None:
    """In a sandbox: the same answers at every batch size, in the precision that it claims."""
    if reason := engine.why_not(HERE, precision):
        pytest.skip(reason)
    folder = tmp_path / "engine"
    folder.mkdir()
    placement = asdict(Placement(device=HERE, threads=1))
    with Sandbox() as builder:
        builder.ask(
            200,
            "build",
            engine=engine.name,
            precision=precision,
            inputs={
                "model": str(inputs / "run" / "model"),
                "onnx": str(inputs / "model.onnx"),
                "calibration": str(inputs / "calibration.npy"),
                "kept": [],
            },
            folder=str(folder),
            placement=placement,
        )
    assert any(folder.iterdir())
    rows = str(inputs / "rows.npy")
    with Sandbox() as sandbox:
        sandbox.ask(200, "load", engine=engine.name, precision=precision, folder=str(folder), placement=placement)
        answers = {}
        for batch in (1, 3, 40):
            out = tmp_path / f"{batch}.npy"
            sandbox.ask(60, "answer", threads=1, rows=rows, count=40, batch=batch, out=str(out))
            answers[batch] = np.load(out)
        assert sandbox.ask(60, "find_precision", threads=1, rows=rows)["precision"] == precision
        assert sandbox.ask(60, "memory", placement=placement)["bytes"] > 10_000_000
    probabilities = answers[40]
    assert probabilities.shape == (40, 10)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=0.02)
    for batch in (1, 3):
        assert np.abs(answers[batch] - probabilities).max() <= STEADY[precision]
    reference = suanli.load(inputs / "run", engine="reference").probabilities(np.load(rows))
    assert np.abs(probabilities - reference).sum(1).mean() / 2 <= DRIFT[precision]
