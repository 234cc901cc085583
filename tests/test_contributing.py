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
from suanli import plugins

folder, work = Path(sys.argv[1]), Path(sys.argv[2])
for room in folder.iterdir():
    importlib.import_module(f"suanli.{room.name}").__path__.append(str(room))
"""


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rooms")
    for name, code in EXAMPLES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return folder


def with_examples(rooms: Path, work: Path, verb: str) -> dict:
    command = [sys.executable, "-c", USE_THEM + verb, str(rooms), str(work)]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # so small that more threads only wait
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=work, env=one_thread)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_room_but_tasks_has_an_example() -> None:
    """A task is more than one small file: it comes with its own scores and examination."""
    assert {name.partition("/")[0] for name in EXAMPLES} == set(ROOMS) - {"tasks"}


def test_every_example_exports_the_word_of_its_room(rooms: Path, tmp_path: Path) -> None:
    names = [name.removesuffix(".py").split("/") for name in EXAMPLES]
    verb = f"print(json.dumps([plugins.load(room, name) is not None for room, name in {names!r}]))"
    assert all(with_examples(rooms, tmp_path, verb))


def test_a_new_kind_of_data_is_trained_and_examined(rooms: Path, tmp_path: Path) -> None:
    verb = """
import suanli
run = suanli.train("wine", out=work / "run", cache_dir=work / "cache", device="cpu", track=["csv"])
found = suanli.evaluate(run, cache_dir=work / "cache", device="cpu")
print(json.dumps({"scores": dict(found.scores), "tracked": (run.path / "metrics.csv").stat().st_size}))
"""
    result = with_examples(rooms, tmp_path, verb)
    assert result["scores"]["accuracy"] > 0.8
    assert result["tracked"] > 0


def test_a_new_engine_answers_as_the_model_does(rooms: Path, tmp_path: Path) -> None:
    verb = """
import numpy as np
import suanli
from suanli import hardware
from suanli.saved import load_model
from suanli.types import Material, Placement
from suanli.whole import write_onnx

run = suanli.train("wine", epochs=2, out=work / "run", cache_dir=work / "cache", device="cpu", speedups="none")
write_onnx(load_model(run.model_path), work / "model.onnx")
engine = plugins.load("engines", "onnx_reference")
here = Placement(device=hardware.detect("cpu"), threads=1)
material = Material(model=run.model_path, onnx=work / "model.onnx", calibration=None)
(work / "engine").mkdir()
engine.build(material, "float32", work / "engine", here)
loaded = engine.load(work / "engine", "float32", here)
rows = np.random.default_rng(0).normal(size=(5, 13)).astype(np.float32)
apart = np.abs(loaded.answer(rows) - suanli.load(run).probabilities(rows)).max()
print(json.dumps({"apart": float(apart), "ran": loaded.computes_in(rows)}))
"""
    assert with_examples(rooms, tmp_path, verb) == {"apart": pytest.approx(0, abs=1e-5), "ran": "float32"}
