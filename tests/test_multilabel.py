"""Several labels per input: how they are found in tables, and how they are scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from suanli.core.errors import DataError, UsageError
from suanli.core.schema import Geometry
from suanli.core.types import Columns, Source
from suanli.data.readers import npz
from suanli.data.readers._label_lists import LISTS, find_separator
from suanli.data.readers.table import read
from suanli.tasks.multilabel import Multilabel

CLASSES = ("cat", "dog", "eel")
HERE = Geometry.unchanged((1,))
TASK = Multilabel(classes=CLASSES)


def draw(count: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that are better than chance, and labels (N, 3)."""
    random = np.random.default_rng(seed)
    labels = (random.random((count, 3)) < (0.5, 0.2, 0.1)).astype(np.uint8)
    return (1 / (1 + np.exp(1.5 - random.normal(2 * labels, 1)))).astype(np.float32), labels


# --- labels in tables -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "separator"),
    [
        (["cat", "dog", "cat|dog"], "|"),
        (["cat, dog", "dog, eel", "cat, eel", "eel"], ","),
        (["a;b;c", "a;c", "b;c"], ";"),
        (["cat", "dog", "cat dog"], " "),
        (["agriculture clear primary water", "clear primary", "haze primary water", "haze agriculture clear"], " "),
        (['["a", "b"]', "[]", '["b"]'], LISTS),
        (["['a', 'b']", "['b']"], LISTS),
        (["New York, USA", "Boston, USA", "Paris, France"], None),
        (["New York", "San Francisco", "Paris"], None),
        (["light blue", "dark blue", "light red", "dark red"], None),
        (["1,5", "2,5", "1,7", "2,7"], None),
        (["other, misc", "other", "cat"], None),
        (["cat", "dog"], None),
        (["a good film", "a bad film", "not a good one", "good"], None),
    ],
)
def test_several_labels_in_a_cell_are_found_by_evidence(cells: list[str], separator: str | None) -> None:
    assert find_separator(cells * 5) == separator


def write(folder: Path, text: str, name: str = "table.csv") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def targets_of(source: Source) -> list[object]:
    return [example.target for example in source.examples]


TEXTS = "text,label\nmeow,cat\nwoof,dog\nboth,dog|cat\nnone of them,\n"


def test_a_label_column_of_several_labels_is_found_and_said(tmp_path: Path) -> None:
    source = read(write(tmp_path, TEXTS), Columns())
    assert (source.annotation, source.classes) == ("labels", ("cat", "dog"))
    assert targets_of(source) == [("cat",), ("dog",), ("dog", "cat")]
    assert 'several labels, separated by "|"; --set task=classification' in " ".join(source.notes)


def test_a_user_decides_whether_a_cell_has_one_label_or_several(tmp_path: Path) -> None:
    whole = read(write(tmp_path, TEXTS), Columns(annotation="class"))
    assert (whole.annotation, whole.classes) == ("class", ("cat", "dog", "dog|cat"))
    cities = write(tmp_path, 'text,label\na,"Paris, France"\nb,"Rome, Italy"\n')
    assert read(cities, Columns()).annotation == "class"
    assert targets_of(read(cities, Columns(annotation="labels"))) == [("Paris", "France"), ("Rome", "Italy")]


def test_columns_of_0_and_1_are_labels(tmp_path: Path) -> None:
    table = write(tmp_path, "text,id,eel,dog\nx,1,1,0\ny,2,1,1\nz,3,0,0\n")
    source = read(table, Columns())
    assert (source.annotation, source.classes) == ("labels", ("eel", "dog"))
    assert targets_of(source) == [("eel",), ("eel", "dog"), ()]
    assert "2 columns of 0 and 1" in " ".join(source.notes)
    with pytest.raises(DataError, match="columns of 0 and 1"):
        read(table, Columns(annotation="class"))


def test_columns_of_which_each_row_has_one_are_classes(tmp_path: Path) -> None:
    table = write(tmp_path, "text,eel,dog\nx,1,0\ny,0,1\n")
    source = read(table, Columns())
    assert (source.annotation, targets_of(source)) == ("class", ["eel", "dog"])
    assert read(table, Columns(annotation="labels")).annotation == "labels"


def test_tables_of_other_splits_need_the_same_columns_of_0_and_1(tmp_path: Path) -> None:
    write(tmp_path, "text,eel,dog\nx,1,0\ny,0,1\nz,0,1\n", "train.csv")
    write(tmp_path, "text,eel,dog\nu,1,0\nv,0,0\nw,0,1\n", "test.csv")  # of one row none is set
    assert targets_of(read(tmp_path, Columns())) == ["eel", "dog", "dog", "eel", "dog"]
    write(tmp_path, "text,eel\nu,1\nv,0\n", "test.csv")
    with pytest.raises(DataError, match="no column 'dog'"):
        read(tmp_path, Columns())


def test_lists_in_json_lines_are_labels(tmp_path: Path) -> None:
    lines = [{"text": "x", "labels": ["dog", "cat"]}, {"text": "y", "labels": []}, {"text": "z", "labels": ["cat"]}]
    source = read(write(tmp_path, "\n".join(map(json.dumps, lines)), "table.jsonl"), Columns())
    assert source.annotation == "labels"
    assert targets_of(source) == [("dog", "cat"), (), ("cat",)]


def test_rows_of_0_and_1_in_arrays_are_labels(tmp_path: Path) -> None:
    path, rows = tmp_path / "x.npz", np.array([[1, 1, 0], [0, 0, 0], [0, 0, 1]])
    np.savez(path, images=np.zeros((3, 8, 8), np.uint8), labels=rows, class_names=np.array(CLASSES))
    source = npz.READER.read(path, Columns())
    assert (source.annotation, source.classes) == ("labels", CLASSES)
    assert targets_of(source) == [("cat", "dog"), (), ("eel",)]
    np.savez(path, images=np.zeros((3, 8, 8), np.uint8), labels=np.eye(3, dtype=int))
    assert npz.READER.read(path, Columns()).annotation == "class"
    assert targets_of(npz.READER.read(path, Columns(annotation="labels"))) == [("0",), ("1",), ("2",)]


# --- scores ---------------------------------------------------------------------------------


def records_of(probabilities: np.ndarray, labels: np.ndarray, task: Multilabel = TASK) -> dict[str, np.ndarray]:
    return dict(task.records({"probabilities": probabilities}, {"labels": labels}))


def test_scores_agree_with_scikit_learn() -> None:
    probabilities, labels = draw()
    scores, decided = TASK.scores(records_of(probabilities, labels)), probabilities >= 0.5
    assert scores == {
        "mean_average_precision": pytest.approx(metrics.average_precision_score(labels, probabilities)),
        "f1_micro": pytest.approx(metrics.f1_score(labels, decided, average="micro")),
        "f1_macro": pytest.approx(metrics.f1_score(labels, decided, average="macro")),
        "subset_accuracy": pytest.approx(metrics.accuracy_score(labels, decided)),
        "log_loss": pytest.approx(-np.log(np.where(labels, probabilities, 1 - probabilities)).mean()),
    }


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=6))
def test_any_labels_have_scores(rows: list[list[bool]]) -> None:
    labels = np.array(rows, np.uint8)
    scores = TASK.scores(records_of(np.full(labels.shape, 0.5, np.float32), labels))
    assert all(0 <= value <= 1 for value in scores.values())


def test_each_class_gets_the_threshold_with_the_best_f1_on_validation() -> None:
    probabilities, labels = draw()
    assert TASK.needs_calibration
    task = TASK.calibrate(records_of(probabilities, labels))
    before, after = (
        metrics.f1_score(labels, probabilities >= np.array(thresholds), average=None)
        for thresholds in (0.5, task.thresholds)
    )
    assert (after >= before).all()
    assert after.sum() > before.sum() + 0.05
    labels[:, 2] = 0  # nothing to choose by
    assert TASK.calibrate(records_of(probabilities, labels)).thresholds[2] == 0.5
    with pytest.raises(UsageError, match="goal is"):
        Multilabel.of(CLASSES, {"goal": "best"})


def test_an_answer_has_the_labels_above_their_threshold_and_the_probabilities() -> None:
    task = Multilabel(classes=CLASSES, thresholds=(0.5, 0.2, 0.9))
    prediction = {"probabilities": np.array([0.6, 0.3, 0.8], np.float32)}
    answer = task.answer(prediction, HERE, top=9)
    assert answer.values["labels"] == ["cat", "dog"]
    assert list(answer.values["probabilities"]) == ["eel", "cat", "dog"]
    assert task.answer({"probabilities": np.zeros(3, np.float32)}, HERE, top=9).text == "no label"
    assert task.texts({"probabilities": prediction["probabilities"][None]}, [HERE]) == {"labels": ['["cat", "dog"]']}
    records = records_of(prediction["probabilities"][None], np.array([[1, 1, 0]]), task)
    assert task.scores(records)["subset_accuracy"] == 1
    assert task.errors(records).tolist() == [0]


def test_the_constant_baseline_has_no_skill() -> None:
    probabilities, labels = draw()
    task = TASK.fit({"labels": labels}).calibrate(records_of(probabilities, labels))
    text, records = task.constant_baseline({"labels": labels})
    assert text in ('always answering "cat"', "always answering no label")
    assert task.scores(records)["mean_average_precision"] == pytest.approx(labels.mean())
    name, linear = task.linear_baseline(
        labels.astype(float), {"labels": labels}, labels.astype(float), {"labels": labels}
    )
    assert name == "logistic regression"
    assert task.scores(linear)["mean_average_precision"] > 0.99


def test_classes_that_a_split_lacks_are_said() -> None:
    counts = TASK.count_targets({"train": [("cat", "dog"), ("eel",)], "val": [()], "test": [("cat",)]})
    assert counts["train"] == {"cat": 1, "dog": 1, "eel": 1}
    assert TASK.describe_counts(counts) == ["classes without test examples: dog, eel"]
    with pytest.raises(DataError, match="No training example has a label"):
        TASK.refuse_unlearnable(TASK.count_targets({"train": [()], "val": [], "test": []}))
