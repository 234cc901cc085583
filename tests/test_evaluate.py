"""evaluate: what it writes for any task, and which data it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import suanli
from suanli.cli import main
from suanli.training.prepare import DataOptions
from suanli.verbs.evaluate import Evaluation, table


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    return int(stopped.value.code or 0)


@pytest.fixture
def run(trained_on_pictures: Path, tmp_path: Path) -> suanli.Run:
    shutil.copytree(trained_on_pictures, tmp_path, dirs_exist_ok=True)
    return suanli.Run(tmp_path / "made")


def test_the_file_has_the_metric_the_units_and_the_answers(run: suanli.Run) -> None:
    evaluation = suanli.evaluate(run)
    written = json.loads((run.path / "evaluation" / "test.json").read_text())
    assert (written["headline"], written["unit"], written["higher_is_better"]) == ("accuracy", "fraction", True)
    assert written["units"].keys() == written["scores"].keys() == evaluation.scores.keys()
    assert written["units"]["log_loss"] == "nats"
    assert len(written["samples"]) == min(24, evaluation.count)
    for one in written["samples"] + written["mistakes"]:
        label = one["name"].split("/")[0]
        assert one["expected"] == {"kind": "classes", "text": label, "values": {"label": label}}
        values = one["answer"]["values"]
        assert one["error"] == pytest.approx(0.0 if values["label"] == label else values["probability"])
        assert one["view"]["size"] == [12, 12]
    assert (
        repr(evaluation)
        == f"Evaluation(test, {evaluation.count} examples, accuracy {evaluation.scores['accuracy']:.2%})"
    )
    assert evaluation._repr_html_().count("95 % interval") == len(evaluation.scores)
    lines = (run.path / "ledger.jsonl").read_text().splitlines()
    units = {one["metric"]: one["unit"] for one in map(json.loads, lines)}
    assert (units["test_accuracy"], units["test_log_loss"]) == ("fraction", "nats")


def test_the_worst_answers_come_first_and_right_ones_are_no_mistakes(run: suanli.Run) -> None:
    classes = sorted(path.name for path in Path("pictures").iterdir())
    for one, other in zip(classes, classes[1:] + classes[:1], strict=True):  # every label becomes another one
        (Path("pictures") / one).rename(Path("pictures") / f"_{other}")
    for name in classes:
        (Path("pictures") / f"_{name}").rename(Path("pictures") / name)
    evaluation = suanli.evaluate(run, data="pictures", augmented_views=False)
    errors = [one["error"] for one in evaluation.mistakes]
    assert len(errors) == 24
    assert errors == sorted(errors, reverse=True)
    assert min(errors) > 0
    assert max(one["error"] for one in evaluation.samples) <= errors[0]


def test_a_score_that_is_not_defined_is_no_number(run: suanli.Run, capsys: pytest.CaptureFixture[str]) -> None:
    for file in Path("pictures/class1").iterdir():
        file.unlink()
    for file in Path("pictures/class0").iterdir():  # copies would be training images
        pixels = np.random.default_rng(int(file.stem)).integers(0, 120, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    assert call("evaluate", str(run.path), "--data", "pictures", "--json", "--device", "cpu") == 0
    written = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["scores"]["accuracy"] is not None
    assert written["scores"]["balanced_accuracy"] is written["scores"]["macro_f1"] is None
    assert written["intervals"].keys() == {name for name, value in written["scores"].items() if value is not None}
    assert call("evaluate", str(run.path), "--data", "pictures", "--device", "cpu") == 0
    output = capsys.readouterr().out
    assert re.search(r"balanced_accuracy +n/a\n", output)
    assert "All examples are of one class, so balanced_accuracy and macro_f1 are not defined." in output


def test_data_with_other_targets_is_refused(run: suanli.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DataOptions.of_run(run).find_source()
    monkeypatch.setattr(DataOptions, "find_source", lambda *_: replace(source, annotation="value"))
    with pytest.raises(suanli.DataError, match="learned 'class' targets, the data has 'value'"):
        suanli.evaluate(run, data="pictures")


def test_the_table_for_people_has_units_behind_scores_that_are_no_fractions() -> None:
    evaluation = Evaluation(
        split="test",
        count=1200,
        metric="mean_absolute_error",
        higher_is_better=False,
        scores={"mean_absolute_error": 1234.5678, "median_absolute_error": 0.5, "r2": 0.91},
        units={"mean_absolute_error": "USD", "median_absolute_error": "", "r2": "fraction"},
        intervals={"mean_absolute_error": (1100.0, 1301.26), "median_absolute_error": (0.0, 1.0), "r2": (0.9, 0.92)},
        with_augmentation={
            "views": 2,
            "scores": {"mean_absolute_error": 0.5},
            "intervals": {"mean_absolute_error": (0.25, 1.0)},
        },
        details={},
        mistakes=[],
        samples=[],
        seconds=1.0,
    )
    assert table(evaluation).splitlines() == [
        "test, 1,200 examples",
        "                          model  95 % interval",
        "  mean_absolute_error     1,235  1,100 to 1,301 USD",
        "  median_absolute_error     0.5  0 to 1",
        "  r2                     0.9100  0.9000 to 0.9200",
        "  with test-time augmentation (2 views): mean_absolute_error 0.5   95 % interval 0.25 to 1 USD",
    ]
