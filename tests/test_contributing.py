"""The examples of CONTRIBUTING.md work: put in their rooms, they train on a kind of data that suanli
doesn't know, through the same verbs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from suanli.plugins import ROOMS

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"
EXAMPLES = dict(re.findall(r"```python\n# (\w+/\w+\.py)\n(.*?)```", GUIDE.read_text(), re.DOTALL))

USE_THEM = """
import importlib, json, sys
from pathlib import Path

import numpy as np

import suanli
from suanli import hardware, plugins
from suanli.saved import load_model
from suanli.types import Material, Placement
from suanli.whole import write_onnx

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
for room in folder.iterdir():
    importlib.import_module(f"suanli.{room.name}").__path__.append(str(room))
loaded = [plugins.load(*name.split("/")) is not None for name in json.loads(sys.argv[3])]

run = suanli.train("wine", out=work / "run", cache_dir=work / "cache", device="cpu", track=["csv"])
found = suanli.evaluate(run, cache_dir=work / "cache", device="cpu")

write_onnx(load_model(run.model_path), work / "model.onnx")
engine = plugins.load("engines", "onnx_reference")
here = Placement(device=hardware.detect("cpu"), threads=1)
(work / "engine").mkdir()
material = Material(model=run.model_path, onnx=work / "model.onnx", calibration=None)
engine.build(material, "float32", work / "engine", here)
ready = engine.load(work / "engine", "float32", here)
rows = np.random.default_rng(0).normal(size=(5, 13)).astype(np.float32)
apart = np.abs(ready.answer(rows) - suanli.load(run).probabilities(rows)).max()
print(json.dumps({"loaded": loaded, "scores": dict(found.scores), "tracked": (run.path / "metrics.csv").stat().st_size,
                  "apart": float(apart), "ran": ready.computes_in(rows)}))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What came of a process that has the examples in its rooms."""
    folder, work = tmp_path_factory.mktemp("rooms"), tmp_path_factory.mktemp("work")
    for name, code in EXAMPLES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    names = json.dumps([name.removesuffix(".py") for name in EXAMPLES])
    command = [sys.executable, "-c", USE_THEM, str(folder), str(work), names]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # so small that more threads only wait
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, env=one_thread)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_room_but_tasks_has_an_example() -> None:
    """A task is more than one small file: it comes with its own scores and examination."""
    assert {name.partition("/")[0] for name in EXAMPLES} == set(ROOMS) - {"tasks"}


def test_every_example_exports_the_word_of_its_room(used: dict) -> None:
    assert used["loaded"] == [True] * len(EXAMPLES)


def test_a_new_kind_of_data_is_trained_and_examined(used: dict) -> None:
    assert used["scores"]["accuracy"] > 0.8
    assert used["tracked"] > 0


def test_a_new_engine_answers_as_the_model_does(used: dict) -> None:
    assert used["apart"] == pytest.approx(0, abs=1e-5)
    assert used["ran"] == "float32"
