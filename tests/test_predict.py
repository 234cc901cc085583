"""predict: the same answers as evaluate, from the model folder alone."""

from __future__ import annotations

import csv
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
from PIL import Image

import suanli
from suanli.cli import main
from suanli.compute import infer
from suanli.core.errors import DamagedFile
from suanli.core.types import Step
from suanli.engines.answer_formats.csv import lines as csv_lines
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
    Path("mixed/d").write_bytes(Path("mixed/a.png").read_bytes())  # an image, whatever its name says
    Path("mixed/e.pdf").write_bytes(b"%PDF-1.7\n")
    Path("mixed/@eaDir").mkdir()
    Path("mixed/@eaDir/t.png").write_bytes(b"")
    answers = suanli.predict(run, "mixed")
    assert {a.name: a.error for a in answers} == {
        "a.png": None,
        "b.png": "The image is empty (0 bytes).",
        "c.png": "Not an image that suanli can read: it is text that starts with 'hello'.",
        "d": None,
        "e.pdf": "Not an image that suanli can read: it is a PDF.",
    }
    assert answers[1].label is None
    assert [*csv_lines(answers)][-1] == "e.pdf,,,,,Not an image that suanli can read: it is a PDF."


def test_standard_input(run: suanli.Run) -> None:
    picture = Path("pictures/class0/000.png").read_bytes()
    command = [sys.executable, "-m", "suanli", "predict", str(run.path), "-", "--csv"]
    process = subprocess.run(command, input=picture, capture_output=True, timeout=120, check=True)
    rows = process.stdout.decode().splitlines()
    assert rows[0] == "name,label,probability,probabilities.class0,probabilities.class1,error"
    assert rows[1].split(",")[1] in ("class0", "class1")


def test_every_form_of_an_image_gives_the_same_answer(run: suanli.Run) -> None:
    path = Path("pictures/class0/000.png")
    with Image.open(path) as image:
        pixels = np.asarray(image)
    several = [np.stack([pixels] * 2), (form for form in (pixels, path)), np.array([str(path)] * 2), (path, path)]
    expected = suanli.predict(run, path)[0].probability
    with Image.open(path) as image, path.open("rb") as file:
        for form in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), pixels, image, file):
            (answer,) = suanli.predict(run, form)
            assert answer.probability == pytest.approx(expected), type(form)
    for forms in several:
        assert [answer.probability for answer in suanli.predict(run, forms)] == pytest.approx([expected] * 2)
    assert [a.name for a in suanli.predict(run, [pixels, path, pixels])] == ["#0", str(path), "#2"]


@pytest.mark.parametrize(
    ("form", "error", "message"),
    [
        (5, suanli.UsageError, "can't be int"),
        (None, suanli.UsageError, "can't be NoneType"),
        ([[1, 2], [3]], suanli.UsageError, "Input 0 is a list itself"),
        ("a great film", suanli.DataError, "nothing at a great film.*takes a string as a path"),
        ("x" * 5000, suanli.DataError, "nothing at xxx"),
        ("a\0b", suanli.DataError, "nothing at"),
        (Path("nowhere.png"), suanli.DataError, "nothing at nowhere.png"),
    ],
)
def test_what_is_no_image_is_named(run: suanli.Run, form: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        suanli.predict(run, form)


def test_a_form_that_can_not_be_decoded_is_an_answer_with_the_reason(run: suanli.Run) -> None:
    answers = suanli.predict(run, [np.zeros((4, 4)), {"a": np.zeros(3)}, b"text", np.zeros((4, 4), np.uint8)])
    assert [bool(answer.error) for answer in answers] == [True, True, True, False]
    assert "float64" in str(answers[0].error)


def test_data_frames(run: suanli.Run) -> None:
    pandas = pytest.importorskip("pandas")
    paths = [str(path) for path in sorted(Path("pictures/class0").iterdir())[:3]]
    frame = pandas.DataFrame({"path": paths, "age": [1, 2, 3]})
    expected = [answer.label for answer in suanli.predict(run, paths)]
    for form in (frame, frame["path"], frame[["path"]]):
        assert [answer.label for answer in suanli.predict(run, form)] == expected
    with pytest.raises(suanli.UsageError, match="None of the columns"):
        suanli.predict(run, frame.rename(columns={"path": "where"}))


def test_the_table_has_every_probability(run: suanli.Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["predict", str(run.path), "bad.png", "pictures/class0/000.png", "--csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[0]["error"]
    assert rows[0]["probabilities.class1"] == ""
    assert float(rows[1]["probabilities.class0"]) + float(rows[1]["probabilities.class1"]) == pytest.approx(1, abs=1e-5)


def test_texts_in_every_form(
    text_table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = suanli.train(text_table, epochs=6, batch_size=32, speedups="none")
    good, bad = "great lovely fine film", "awful dull poor plot"
    Path("lines.txt").write_text(f"{good}\n{bad}\n")
    forms = [[good, bad], (text for text in (good, bad)), np.array([good, bad]), "lines.txt", Path("lines.txt")]
    for form in (*forms, [good.encode(), bad.encode()]):
        assert [answer.label for answer in suanli.predict(run, form)] == ["good", "bad"], type(form)
    (one,) = suanli.predict(run, good, explain=True)
    assert (one.name, one.label) == (good, "good")
    assert one.saliency is not None
    assert [word for word, _ in one.saliency.marked.words] == [*good.split()]
    with pytest.raises(suanli.DataError, match="a text that looks like a path is ambiguous"):
        suanli.predict(run, "texts/missing.txt")
    assert suanli.load(run).predict("texts/missing.txt")[0].error is None
    with pytest.raises(SystemExit):
        main(["predict", str(run.path), bad, "--json"])
    assert json.loads(capsys.readouterr().out)["predictions"][0]["label"] == "bad"
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
