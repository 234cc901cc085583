"""The examples of CONTRIBUTING.md work: put in their folders, they train on a kind of data and for a task that suanli
doesn't know, through the same verbs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import suanli
from suanli.core.registry import FOLDERS

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
EXAMPLES = dict(re.findall(r"```python\n# ([\w/]+\.py)\n(.*?)```", GUIDE.read_text(), re.DOTALL))
RULES = Path(__file__).with_name("contracts") / "test_every_task.py"

USE_THEM = """
import json, sys
from pathlib import Path

import numpy as np

import suanli
from suanli.core import registry
from suanli.machine import device
from suanli.models.model_folder import load_model
from suanli.core.types import EngineInputs, Placement
from suanli.engines.inference_module import write_onnx

work = Path(sys.argv[1])
loaded = [registry.load(kind, name) is not None for kind, name in json.loads(sys.argv[2])]

run = suanli.train("wine", out=work / "run", cache_dir=work / "cache", device="cpu", track=["csv"])
evaluation = suanli.evaluate(run, cache_dir=work / "cache", device="cpu")

write_onnx(load_model(run.model_path), work / "model.onnx")
engine = registry.load("engines", "onnx_reference")
here = Placement(device=device.detect("cpu"), threads=1)
(work / "engine").mkdir()
inputs = EngineInputs(model=run.model_path, onnx=work / "model.onnx", calibration=None)
engine.build(inputs, "float32", work / "engine", here)
ready = engine.load(work / "engine", "float32", here)
arrays = {"features": np.random.default_rng(0).normal(size=(5, 13)).astype(np.float32)}
expected = suanli.load(run).answer(arrays)["probabilities"]
difference = np.abs(ready.answer(arrays)["probabilities"] - expected).max()
print(json.dumps({"loaded": loaded, "scores": dict(evaluation.scores),
                  "tracked": (run.path / "metrics.csv").stat().st_size,
                  "difference": float(difference), "ran": ready.find_precision(arrays)}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """For processes whose suanli has the examples in its folders."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(Path(suanli.__file__).parent, folder / "suanli")
    for name, code in EXAMPLES.items():
        assert not (folder / "suanli" / name).exists()
        (folder / "suanli" / name).write_text(code)
    # So small that more threads only wait.
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
    }


@pytest.fixture(scope="module")
def used(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What came of the examples of a classification."""
    work = tmp_path_factory.mktemp("work")
    kinds = {package.replace(".", "/"): kind for kind, (package, _) in FOLDERS.items()}
    names = json.dumps([(kinds[str(Path(name).parent)], Path(name).stem) for name in EXAMPLES])
    command = [sys.executable, "-c", USE_THEM, str(work), names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_kind_has_an_example() -> None:
    packages = {str(Path(name).parent).replace("/", ".") for name in EXAMPLES}
    assert packages == {package for package, _ in FOLDERS.values()}


def test_every_example_exports_the_constant_of_its_folder(used: dict) -> None:
    assert used["loaded"] == [True] * len(EXAMPLES)


def test_a_new_kind_of_data_is_trained_and_evaluated(used: dict) -> None:
    assert used["scores"]["accuracy"] > 0.8
    assert used["tracked"] > 0


def test_a_new_engine_answers_as_the_model_does(used: dict) -> None:
    assert used["difference"] == pytest.approx(0, abs=1e-5)
    assert used["ran"] == "float32"


@pytest.mark.long
def test_a_new_task_keeps_the_rules_and_goes_through_all_verbs(environment: dict[str, str]) -> None:
    """Without a changed line elsewhere."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(RULES), "-k", "counts"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=GUIDE.parent, env=environment)
    assert done.returncode == 0, done.stdout
