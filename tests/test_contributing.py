"""The examples of CONTRIBUTING.md work: put in their folders, they train on a kind of data that suanli
doesn't know, through the same verbs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from suanli.core.registry import FOLDERS

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
EXAMPLES = dict(re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", GUIDE.read_text(), re.DOTALL))

USE_THEM = """
import importlib, json, sys
from pathlib import Path

import numpy as np

import suanli
from suanli.core import registry
from suanli.machine import device
from suanli.models.model_folder import load_model
from suanli.core.types import EngineInputs, Placement
from suanli.engines.inference_module import write_onnx

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
for package, _ in registry.FOLDERS.values():
    importlib.import_module(f"suanli.{package}").__path__.append(str(folder / package.replace(".", "/")))
loaded = [registry.load(kind, name) is not None for kind, name in json.loads(sys.argv[3])]

run = suanli.train("wine", out=work / "run", cache_dir=work / "cache", device="cpu", track=["csv"])
found = suanli.evaluate(run, cache_dir=work / "cache", device="cpu")

write_onnx(load_model(run.model_path), work / "model.onnx")
engine = registry.load("engines", "onnx_reference")
here = Placement(device=device.detect("cpu"), threads=1)
(work / "engine").mkdir()
inputs = EngineInputs(model=run.model_path, onnx=work / "model.onnx", calibration=None)
engine.build(inputs, "float32", work / "engine", here)
ready = engine.load(work / "engine", "float32", here)
rows = np.random.default_rng(0).normal(size=(5, 13)).astype(np.float32)
apart = np.abs(ready.answer(rows) - suanli.load(run).probabilities(rows)).max()
print(json.dumps({"loaded": loaded, "scores": dict(found.scores), "tracked": (run.path / "metrics.csv").stat().st_size,
                  "apart": float(apart), "ran": ready.find_precision(rows)}))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What came of a process that has the examples in its folders."""
    folder, work = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("work")
    for name, code in EXAMPLES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    kinds = {package.replace(".", "/"): kind for kind, (package, _) in FOLDERS.items()}
    names = json.dumps([(kinds[str(Path(name).parent)], Path(name).stem) for name in EXAMPLES])
    command = [sys.executable, "-c", USE_THEM, str(folder), str(work), names]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # so small that more threads only wait
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, env=one_thread)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kind_but_tasks_has_an_example() -> None:
    """A task is more than one small file: it comes with its own scores and evaluation."""
    packages = {str(Path(name).parent).replace("/", ".") for name in EXAMPLES}
    assert packages == {package for package, _ in FOLDERS.values()} - {"tasks"}


def test_every_example_exports_the_constant_of_its_folder(used: dict) -> None:
    assert used["loaded"] == [True] * len(EXAMPLES)


def test_a_new_kind_of_data_is_trained_and_evaluated(used: dict) -> None:
    assert used["scores"]["accuracy"] > 0.8
    assert used["tracked"] > 0


def test_a_new_engine_answers_as_the_model_does(used: dict) -> None:
    assert used["apart"] == pytest.approx(0, abs=1e-5)
    assert used["ran"] == "float32"
