"""predict: the same answers as evaluate, from the model folder alone."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import suanli
from suanli.cli import main
from suanli.compute import infer
from suanli.core.errors import DamagedFile
from suanli.core.types import Step
from suanli.models import model_folder


@pytest.fixture
def run(trained_on_pictures: Path, tmp_path: Path) -> suanli.Run:
    shutil.copytree(trained_on_pictures, tmp_path, dirs_exist_ok=True)
    return suanli.Run(tmp_path / "made")


def test_the_model_folder_alone_is_enough(run: suanli.Run, tmp_path: Path) -> None:
    shutil.copytree(run.model_path, tmp_path / "elsewhere")
    before = suanli.predict(run, "pictures")
    shutil.rmtree(run.path)
    shutil.rmtree(tmp_path / "cache")
    assert suanli.predict(tmp_path / "elsewhere", "pictures") == before
    assert len(before) == 60


def test_it_answers_as_evaluate_does(run: suanli.Run) -> None:
    evaluation = suanli.evaluate(run)
    for sample in evaluation.samples:
        (answer,) = suanli.predict(run, Path("pictures") / sample["name"], top=2)
        expected = sample["answer"]["values"]
        assert answer.label == expected["label"]
        assert answer.probability == pytest.approx(expected["probability"], abs=1e-5)
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)


def test_answers_do_not_depend_on_the_batch(run: suanli.Run) -> None:
    together = suanli.predict(run, "pictures")
    alone = [suanli.predict(run, p.name if Path(p.name).exists() else f"pictures/{p.name}")[0] for p in together[:3]]
    for a, b in zip(together, alone, strict=False):
        assert a.label == b.label
        assert a.probability == pytest.approx(b.probability, abs=1e-5)


def test_patterns_and_several_arguments(run: suanli.Run) -> None:
    assert len(suanli.predict(run, ["pictures/class0/00*.png", "pictures/class1/000.png"])) == 11
    with pytest.raises(suanli.DataError, match="nothing at"):
        suanli.predict(run, "pictures/*.jpeg")


def test_a_bad_file_among_good_ones(run: suanli.Run) -> None:
    Path("mixed").mkdir()
    shutil.copy("pictures/class0/000.png", "mixed/a.png")
    Path("mixed/b.png").write_bytes(b"")
    Path("mixed/c.png").write_text("hello")
    answers = suanli.predict(run, "mixed")
    assert [a.error is None for a in answers] == [True, False, False]
    assert answers[1].label is None


def test_standard_input(run: suanli.Run) -> None:
    picture = Path("pictures/class0/000.png").read_bytes()
    command = [sys.executable, "-m", "suanli", "predict", str(run.path), "-", "--csv"]
    process = subprocess.run(command, input=picture, capture_output=True, timeout=120, check=True)
    rows = process.stdout.decode().splitlines()
    assert rows[0] == "name,label,probability,error"
    assert rows[1].split(",")[1] in ("class0", "class1")


def test_text_from_standard_input(
    text_table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = suanli.train(text_table, epochs=6, batch_size=32, speedups="none")
    lines = b"a great lovely fine film\nawful dull poor plot\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    with pytest.raises(SystemExit):
        main(["predict", str(run.path), "-", "--json"])
    assert [p["label"] for p in json.loads(capsys.readouterr().out)["predictions"]] == ["good", "bad"]


@pytest.mark.parametrize("damage", ["cut", "swap", "missing", "format", "rubbish"])
def test_a_damaged_model_is_noticed(run: suanli.Run, damage: str) -> None:
    weights, card = run.model_path / "weights.safetensors", run.model_path / "model.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "swap":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    elif damage == "format":
        card.write_text(card.read_text().replace('"format": 1', '"format": 99'))
    else:
        card.write_text("{")
    with pytest.raises(DamagedFile):
        suanli.predict(run, "pictures")


def test_other_data_with_labels(run: suanli.Run, picture_folder: Callable[..., Path]) -> None:
    other = picture_folder("unseen pictures", each=20)
    evaluation = suanli.evaluate(run, data=other)
    assert evaluation.count == 40  # all of it, since nothing is split
    (other / "class7").mkdir()
    shutil.copy(other / "class0" / "000.png", other / "class7")
    with pytest.raises(suanli.DataError, match="doesn't know the class 'class7'"):
        suanli.evaluate(run, data=other)


def test_other_data_is_encoded_as_the_training_data_was(text_table: Path, tmp_path: Path) -> None:
    """Words get the numbers of the model's own vocabulary, not of the new data's."""
    run = suanli.train(text_table, epochs=6, batch_size=32, speedups="none")
    own = suanli.evaluate(run, split="train").scores["accuracy"]
    lines = text_table.read_text().splitlines()
    (tmp_path / "again.tsv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert own > 0.95
    assert suanli.evaluate(run, data=tmp_path / "again.tsv").scores["accuracy"] > 0.95


def test_probabilities_do_not_depend_on_the_batch(run: suanli.Run) -> None:
    model = model_folder.load_model(run.model_path)
    rows = torch.randint(0, 256, (9, *model.preprocess.inputs["image"].fixed_shape), dtype=torch.uint8)
    step = Step(model=model.module)
    batches = [{"image": part} for part in rows.split(4)]  # type: ignore[no-untyped-call]
    together = infer.infer(step, model.preprocess, model.task, [{"image": rows}])
    parts = infer.infer(step, model.preprocess, model.task, batches)
    np.testing.assert_allclose(together["probabilities"], parts["probabilities"], atol=1e-5)
