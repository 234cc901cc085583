"""What a score is worth: beside it stand those of answers that need no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import suanli
from suanli.core.baselines import Baseline
from suanli.core.registry import load
from suanli.core.task import Metric
from suanli.core.types import Difference, TreeColumns
from suanli.data.preprocess.text import TextPreprocess
from suanli.tasks import _linear
from suanli.tasks.classification import Classification
from suanli.verbs.evaluate import table

ACCURACY = Metric(name="accuracy", tolerance=0.005)


def baseline(low: float, high: float, score: float | None = 0.7) -> Baseline:
    gain = Difference(median=(low + high) / 2, low=low, high=high)
    return Baseline(name="constant", description='always answering "dog"', scores={"accuracy": score}, gain=gain)


def test_a_sentence_says_whether_the_model_is_better_beyond_the_interval() -> None:
    than = 'than always answering "dog" (accuracy 70.0 %)'
    assert baseline(0.021, 0.053).describe(ACCURACY) == f"The model is better {than} by 2.1 to 5.3 points."
    assert baseline(-0.01, 0.05).describe(ACCURACY) == f"The model is not better {than}."
    assert baseline(-0.05, -0.01).describe(ACCURACY) == f"The model is worse {than}."
    assert "n/a" in baseline(0, 0, None).describe(ACCURACY)
    years = Metric(name="accuracy", tolerance=0, unit="years", higher_is_better=False)
    assert baseline(1.5, 2.25, 3.4).describe(years).endswith("(accuracy 3.4 years) by 1.5 to 2.25 years.")


@pytest.fixture(scope="module")
def evaluated(trained_on_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> suanli.Run:
    folder = tmp_path_factory.mktemp("baselines") / "made"
    shutil.copytree(trained_on_pictures / "made", folder)
    suanli.evaluate(folder, augmented_views=False)
    return suanli.Run(folder)


def test_both_baselines_stand_beside_every_score(evaluated: suanli.Run) -> None:
    written = json.loads((evaluated.path / "evaluation" / "test.json").read_text())
    constant, linear = written["baselines"]
    assert (constant["name"], linear["name"]) == ("constant", "linear")
    assert constant["scores"].keys() == linear["scores"].keys() == written["scores"].keys()
    assert constant["scores"]["accuracy"] < linear["scores"]["accuracy"]
    page, card = (suanli.report(evaluated), evaluated.path / "README.md")
    for text in (page.read_text(encoding="utf-8"), card.read_text(encoding="utf-8").replace("\\", "")):
        assert "always answering" in text.replace("&#34;", '"')
        assert "logistic regression on the pixels" in text


def test_other_data_has_the_constant_one_from_what_the_model_kept(
    evaluated: suanli.Run, trained_on_pictures: Path
) -> None:
    evaluation = suanli.evaluate(evaluated, data=trained_on_pictures / "pictures", augmented_views=False)
    (one,) = evaluation.baselines
    assert one.name == "constant"
    assert one.describe(evaluation.as_metric()) in table(evaluation)
    row = next(line for line in table(evaluation).splitlines() if line.startswith("  accuracy"))
    assert f"{one.scores['accuracy']:.4f}" in row


def test_an_evaluation_of_an_older_version_is_still_shown(evaluated: suanli.Run, tmp_path: Path) -> None:
    run = tmp_path / "older"
    shutil.copytree(evaluated.path, run)
    file = run / "evaluation" / "test.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "baselines"}))
    assert "always answering" not in suanli.report(run).read_text(encoding="utf-8")


def test_a_model_of_an_older_version_learns_its_baseline_from_the_data(
    evaluated: suanli.Run, trained_on_pictures: Path, tmp_path: Path
) -> None:
    run = tmp_path / "older"
    shutil.copytree(evaluated.path, run)
    card = json.loads((run / "model" / "model.json").read_text())
    del card["task_settings"]["frequencies"]
    (run / "model" / "model.json").write_text(json.dumps(card))
    assert [one.name for one in suanli.evaluate(run, augmented_views=False).baselines] == ["constant", "linear"]
    other = suanli.evaluate(run, data=trained_on_pictures / "pictures", augmented_views=False)
    assert other.baselines == []


def test_words_are_features_of_length_one() -> None:
    kind = TextPreprocess(vocabulary=("good", "bad"), length=4)
    rows = np.stack([kind.encode(text).arrays["tokens"] for text in ("good good", "bad good", "unheard")])
    features = kind.features({"tokens": rows}, np.array([0, 1, 2])).toarray()
    assert np.linalg.norm(features, axis=1) == pytest.approx([1, 1, 0])
    assert features[0, 2] == 1


def test_a_linear_model_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    features, classes = np.eye(6), np.array([0, 1, 2, 0, 1, 2])
    probabilities = _linear.classify(features, classes, 4, features)
    assert probabilities is not None
    assert probabilities.argmax(1).tolist() == classes.tolist()
    assert probabilities[:, 3].tolist() == [0] * 6
    assert _linear.classify(features, np.zeros(6, int), 2, features) is None
    monkeypatch.setattr(_linear, "MOST_WORK", 100)
    assert _linear.classify(features, classes, 4, features) is None
    task = Classification(classes=("a", "b", "c"))
    targets = {"class": classes}
    assert task.linear_baseline(features, targets, features, targets) is None
    assert task.constant_baseline(targets) is None


@pytest.mark.parametrize("name", ["classification", "regression"])
def test_trees_on_the_columns_of_a_table(name: str) -> None:
    """They learn what no linear model of the columns can: a value that depends on two of them together, one of which
    is a category, and on whether a cell is missing."""
    random = np.random.default_rng(0)
    levels, codes = random.normal(size=2000), random.integers(2, 8, 2000)
    levels[::7] = np.nan
    target = np.where(np.isnan(levels), 1, (levels > 0) ^ (codes % 2 == 0))
    rows = np.stack([levels, codes], axis=1)
    columns = [TreeColumns(values=rows[part], cardinalities=(0, 9)) for part in (slice(1500), slice(1500, None))]
    if name == "classification":
        kept: list[dict[str, np.ndarray]] = [{"class": target[:1500].astype(np.int64)}, {"class": target[1500:]}]
        task = load("tasks", name).of(("no", "yes"), {}).fit(kept[0])
    else:
        kept = [{"value": 100.0 * target[:1500]}, {"value": 100.0 * target[1500:]}]
        task = load("tasks", name).of((), {}).fit(kept[0])
    given = task.tree_baseline(columns[0], kept[0], columns[1], kept[1])
    assert given is not None
    assert given[0] == "gradient-boosted trees"
    scores = task.scores(given[1])
    assert scores["accuracy"] > 0.98 if name == "classification" else scores["mean_absolute_error"] < 5
    if name == "classification":
        one_class = {"class": np.zeros(1500, np.int64)}
        assert task.tree_baseline(columns[0], one_class, columns[1], kept[1]) is None


def test_a_category_of_many_values_is_no_obstacle_for_trees() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(2, 1000, 3000)
    columns = TreeColumns(values=codes[:, None].astype(float), cardinalities=(1000,))
    task = load("tasks", "regression").of((), {}).fit({"value": codes.astype(float)})
    given = task.tree_baseline(columns, {"value": codes.astype(float)}, columns, {"value": codes.astype(float)})
    assert given is not None
    assert task.scores(given[1])["mean_absolute_error"] < 20
