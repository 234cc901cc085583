"""What holds for every file of tasks/. A new one needs a sample in tests/task_samples.py."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import suanli
from served import serving
from short_timing import time_shortly
from suanli.core import registry
from suanli.core.compare import difference, intervals
from suanli.core.errors import DataError, UsageError
from suanli.core.schema import Arrays, Geometry, Stored, example_of, take
from suanli.core.sections import Matrix, Plot, Table
from suanli.core.task import Answer, Records, Task
from suanli.core.types import Json
from suanli.engines.backends import onnxruntime
from task_samples import SAMPLES, encode, make_task

# A task without an annotation, of graphs that suanli didn't train, has neither targets nor scores.
NAMES = [name for name, task in registry.load_all("tasks").items() if task.annotation]
COUNT = 60


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    assert request.param in SAMPLES, "add a sample to tests/task_samples.py"
    return str(request.param)


@pytest.fixture
def task(name: str) -> Task:
    task = make_task(name)
    assert task.name == name
    return task


def draw(task: Task, count: int) -> dict[str, Stored]:
    return encode(task, SAMPLES[task.name].draw(np.random.default_rng(1), count))


def answer(task: Task, targets: dict[str, Stored], seed: int = 1, share: float = 0.1) -> dict[str, np.ndarray]:
    """What a model answers that is wrong on this share of the examples."""
    count = len(next(iter(targets.values())))
    return SAMPLES[task.name].answer(targets, np.random.default_rng(seed).random(count) < share)


@pytest.fixture
def targets(task: Task) -> dict[str, Stored]:
    return draw(task, COUNT)


@pytest.fixture
def answers(task: Task, targets: dict[str, Stored]) -> Arrays:
    return answer(task, targets, share=0.3)


@pytest.fixture
def records(task: Task, answers: Arrays, targets: dict[str, Stored]) -> Records:
    return task.records(answers, targets)


def select(records: Records, which: np.ndarray) -> Records:
    return {name: column[which] for name, column in records.items()}


# --- targets and settings -------------------------------------------------------------------


def test_a_task_survives_json(task: Task) -> None:
    assert type(task).of(task.classes, json.loads(json.dumps(task.settings))) == task


def test_an_unknown_setting_is_a_usage_error(task: Task) -> None:
    with pytest.raises(UsageError, match="unheard_of"):
        type(task).of(task.classes, {"unheard_of": 1})


def test_targets_fit_their_schema(task: Task, targets: dict[str, Stored]) -> None:
    assert targets.keys() == task.targets.keys()
    (one,) = SAMPLES[task.name].draw(np.random.default_rng(0), 1)
    for column, array in task.encode(one, SAMPLES[task.name].geometry).items():
        assert array.dtype == task.targets[column].dtype
        assert len(array.shape) == len(task.targets[column].shape)
        assert all(side in (None, size) for side, size in zip(task.targets[column].shape, array.shape, strict=True))


def test_every_split_counts_the_same_names(task: Task) -> None:
    raw = SAMPLES[task.name].draw(np.random.default_rng(0), 40)
    counts = task.count_targets({"train": raw, "val": raw[:3], "test": []})
    assert counts["train"].keys() == counts["val"].keys() == counts["test"].keys()
    assert sum(counts["train"].values()) >= 40
    assert not any(counts["test"].values())
    assert all(isinstance(line, str) for line in task.describe_counts(counts))


# --- learning and answers -------------------------------------------------------------------


def raw(task: Task, count: int) -> Any:
    """What a network might return: a tensor or several."""
    return SAMPLES[task.name].raw(count)


def batch(task: Task, count: int) -> dict[str, torch.Tensor]:
    columns = [take(column, np.arange(count), name) for name, column in draw(task, count).items()]
    return {name: torch.from_numpy(array) for arrays in columns for name, array in arrays.items()}


def test_going_down_the_loss_makes_it_smaller(task: Task) -> None:
    torch.manual_seed(0)
    leaves, spec = tree_flatten(raw(task, 8))
    outputs, targets = tree_unflatten([leaf.requires_grad_() for leaf in leaves], spec), batch(task, 8)
    counts = task.counts(targets) if task.has_counts else dict.fromkeys(task.loss(outputs, targets), 8)

    def total(outputs: Any) -> torch.Tensor:
        sums = task.loss(outputs, targets)
        assert all(one.shape == () for one in sums.values())
        assert counts.keys() == sums.keys()
        return sum(one / counts[name] for name, one in sums.items())

    before = total(outputs)
    before.backward()
    moved = [leaf if leaf.grad is None else leaf - 0.01 * leaf.grad for leaf in leaves]
    assert total(tree_unflatten(moved, spec)) < before
    assert 0 < task.guessing_loss() < math.inf


def test_the_loss_of_a_batch_is_the_sum_of_its_parts(task: Task) -> None:
    torch.manual_seed(0)
    outputs, targets = raw(task, 8), batch(task, 8)
    sums = task.loss(outputs, targets)
    halves = [task.loss(*tree_map(itemgetter(half), (outputs, targets))) for half in (slice(0, 4), slice(4, 8))]
    for name, one in sums.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], one)


def test_predictions_fit_the_schema_of_outputs(task: Task) -> None:
    predictions = task.predict(tree_map(torch.Tensor.bfloat16, raw(task, 5)))
    assert list(predictions) == list(task.outputs)
    for name, tensor in predictions.items():
        assert str(tensor.dtype).removeprefix("torch.") == task.outputs[name].dtype
        assert tuple(tensor.shape) == (5, *task.outputs[name].shape)


def test_answers_are_plain_values(task: Task, answers: Arrays, targets: dict[str, Stored]) -> None:
    geometry = SAMPLES[task.name].geometry
    given = task.answer({name: array[0] for name, array in answers.items()}, geometry, top=2)
    true = task.describe_target({name: array[0] for name, array in targets.items()}, geometry)
    for one in (given, true):
        assert isinstance(one, Answer)
        assert json.loads(json.dumps(one.values, allow_nan=False)) == one.values
        assert set(one.columns) <= one.values.keys() if one.rows() is None else True
        assert all(row.keys() <= set(one.columns) for row in one.rows() or ())
        assert one.text
        assert "\n" not in one.text
    assert given.kind == true.kind
    assert set(task.text_outputs) <= {*given.values, "answer"}


def test_clients_get_answers_in_the_coordinates_of_their_inputs(task: Task, answers: Arrays) -> None:
    geometry = SAMPLES[task.name].geometry
    given = task.to_input(answers, [geometry] * COUNT)
    assert {name: (array.dtype, array.shape) for name, array in given.items()} == {
        name: (array.dtype, array.shape) for name, array in answers.items()
    }
    unchanged = Geometry.unchanged([10_000] * len(geometry.size))
    for name, array in task.to_input(answers, [unchanged] * COUNT).items():
        np.testing.assert_allclose(array.clip(0), answers[name].clip(0), rtol=1e-6)


def test_a_verdict_is_all_that_the_target_adds(task: Task, answers: Arrays, targets: dict[str, Stored]) -> None:
    geometry, verdicts = SAMPLES[task.name].geometry, set()
    for i in range(COUNT):
        one, true = example_of(answers, i), example_of(targets, i)
        beside = task.answer_beside_target(one, true, geometry, top=100)
        for judged, plain in zip(
            beside, (task.answer(one, geometry, top=100), task.describe_target(true, geometry)), strict=True
        ):
            for row in judged.rows() or ():
                verdicts.add(row.get("verdict"))
            assert json.loads(json.dumps(judged.values)) == judged.values
            assert json.dumps(_without_verdicts(judged.values)) == json.dumps(_without_verdicts(plain.values))
    if task.name == "detection":
        assert verdicts == {"right", "wrong class", "missed"}


def _without_verdicts(value: Json) -> Json:
    if isinstance(value, dict):
        return {name: _without_verdicts(one) for name, one in value.items() if name != "verdict"}
    return [_without_verdicts(one) for one in value] if isinstance(value, list) else value


def test_a_threshold_of_the_user(task: Task, answers: Arrays) -> None:
    """The higher it is, the fewer entries there are; or answers depend on none."""
    if type(task).with_threshold is Task.with_threshold:
        with pytest.raises(UsageError, match="depend on no threshold"):
            task.with_threshold(0.5)
        return
    if task.name == "classification":
        with pytest.raises(UsageError, match="two classes"):
            task.with_threshold(0.5)
        return
    changed = [task.with_threshold(threshold) for threshold in (0.0, 0.5, 1.0)]
    geometry = SAMPLES[task.name].geometry
    given = [[one.answer(example_of(answers, i), geometry, top=100) for i in range(COUNT)] for one in changed]
    lengths = [sum(len(json.dumps(one.values)) for one in several) for several in given]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
    assert type(task).of(task.classes, changed[1].settings) == changed[1]


def test_equal_answers_have_no_drift(task: Task, answers: Arrays, targets: dict[str, Stored]) -> None:
    assert task.drift(answers, answers).tolist() == [0] * COUNT
    assert task.drift(answers, answer(task, targets, seed=2, share=0.9)).max() > 0.1


# --- scores ---------------------------------------------------------------------------------


def test_the_metric_is_among_the_scores(task: Task, records: Records) -> None:
    scores = task.scores(records)
    assert task.metric.name in scores
    assert 0 <= task.metric.tolerance < 0.1
    assert task.distances <= scores.keys()
    assert all(type(value) is float and math.isfinite(value) for value in scores.values())


def test_better_answers_are_a_gain(task: Task, targets: dict[str, Stored]) -> None:
    name = task.metric.name
    worse, better = (task.scores(task.records(answer(task, targets, share=s), targets))[name] for s in (0.9, 0.0))
    assert task.metric.gain(worse, better) > 0


def test_errors_are_those_of_wrong_answers(task: Task, targets: dict[str, Stored]) -> None:
    wrong = np.arange(COUNT) % 2 == 0
    errors = task.errors(task.records(SAMPLES[task.name].answer(targets, wrong), targets))
    assert errors.shape == (COUNT,)
    assert errors[wrong].mean() > 2 * errors[~wrong].mean()


def test_figures_are_json_and_become_sections(task: Task, records: Records) -> None:
    figures = task.evaluate(records)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert all(isinstance(one, Table | Plot | Matrix) for one in task.sections(figures))
    assert task.sections({}) == []


def test_a_few_examples_have_scores_and_figures(task: Task) -> None:
    """Of some classes or ranges there are none."""
    targets = draw(task, 2)
    records = task.records(answer(task, targets), targets)
    scores = task.scores(records)
    assert math.isfinite(scores[task.metric.name])
    assert not any(map(math.isinf, scores.values()))
    json.dumps(task.evaluate(records), allow_nan=False)


def test_an_empty_split_is_bad_data(task: Task) -> None:
    targets = encode(task, [])
    with pytest.raises(DataError):
        task.records(answer(task, targets), targets)


# --- weights --------------------------------------------------------------------------------


def test_every_record_is_a_row(records: Records) -> None:
    assert {len(column) for column in records.values()} == {COUNT}


def test_weights_of_one_equal_no_weights_to_the_last_bit(task: Task, records: Records) -> None:
    assert task.scores(records, np.ones(COUNT)) == task.scores(records)


@given(st.lists(st.integers(0, 3), min_size=COUNT, max_size=COUNT).filter(any))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_weight_counts_an_example_so_often(task: Task, records: Records, weights: list[int]) -> None:
    repeated = select(records, np.repeat(np.arange(COUNT), weights))
    assert task.scores(records, np.array(weights)) == pytest.approx(task.scores(repeated), nan_ok=True)


def test_only_the_proportion_of_weights_matters(task: Task, records: Records) -> None:
    weights = np.random.default_rng(0).random(COUNT)
    assert task.scores(records, 7 * weights) == pytest.approx(task.scores(records, weights))


def test_the_order_of_examples_changes_nothing(task: Task, records: Records) -> None:
    order, weights = np.random.default_rng(0).permutation(COUNT), np.arange(COUNT)
    assert task.scores(select(records, order), weights[order]) == pytest.approx(task.scores(records, weights))


def test_many_resamples_at_once_score_like_one_after_another(task: Task, records: Records) -> None:
    weights = np.random.default_rng(0).integers(0, 4, (9, COUNT)).astype(float)
    expected = Task.resampled_scores(task, records, weights)
    scores = task.resampled_scores(records, weights)
    assert scores.keys() == expected.keys()
    for name, values in scores.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-12)
    np.testing.assert_allclose(task.resampled_metric(records, weights), expected[task.metric.name], rtol=1e-12)


# --- intervals and the gate -----------------------------------------------------------------


def test_every_score_has_an_interval(task: Task, records: Records) -> None:
    scores, bounds = task.scores(records), intervals(task, records)
    assert bounds.keys() == scores.keys()
    for name, (low, high) in bounds.items():
        assert low <= high
        assert name in task.distances or low <= scores[name] <= high


def test_a_closed_form_agrees_with_the_bootstrap(task: Task, records: Records) -> None:
    many = select(records, np.arange(600) % COUNT)
    by_bootstrap = intervals(task, many, groups=np.arange(600))
    for name, bounds in task.closed_intervals(many).items():
        assert bounds == pytest.approx(by_bootstrap[name], abs=0.01)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("loss", "refused"), [(0.0, False), (1.0, False), (8.0, True)])
def test_the_gate_refuses_a_loss_well_over_the_tolerance_only(
    task: Task, loss: float, refused: bool, grouped: bool
) -> None:
    """The second model loses so many tolerances."""
    count = SAMPLES[task.name].many
    targets, groups = draw(task, count), np.arange(count) // 3 if grouped else None
    before = answer(task, targets)
    after = SAMPLES[task.name].worsen(before, targets, loss * task.metric.tolerance)
    sides = [task.records(side, targets) for side in (before, after)]
    allowed = task.metric.allowed_loss(task.scores(sides[0])[task.metric.name])
    assert difference(task, *sides, groups).exceeds(allowed) == refused


def test_the_gate_does_not_refuse_noise(task: Task) -> None:
    """Equally good models that err on different examples."""
    targets = draw(task, min(400, SAMPLES[task.name].many))
    sides = [task.records(answer(task, targets, seed=seed), targets) for seed in (1, 3)]
    change = difference(task, *sides)
    assert change.low <= change.median <= change.high
    assert not change.exceeds(task.metric.allowed_loss(task.scores(sides[0])[task.metric.name]))


# --- baselines ------------------------------------------------------------------------------


def test_the_constant_baseline_is_worse_than_good_answers(task: Task, targets: dict[str, Stored]) -> None:
    given = task.constant_baseline(targets)
    if given is None:
        pytest.skip(f"{task.name} has none")
    text, records = given
    assert text.startswith("always answering")
    name = task.metric.name
    good = task.scores(task.records(answer(task, targets, share=0), targets))[name]
    assert task.metric.gain(task.scores(records)[name], good) > 0
    assert type(task).of(task.classes, {}).constant_baseline(targets) is None  # it isn't fitted


def test_the_linear_baseline_learns_from_features(task: Task, targets: dict[str, Stored]) -> None:
    """From right answers, which no linear model can miss."""
    right = [one.reshape(COUNT, -1) for one in answer(task, targets, share=0).values()]
    features = np.concatenate(right, axis=1)
    features = features / np.abs(features).max()
    given = task.linear_baseline(features, targets, features, targets)
    if given is None:
        pytest.skip(f"{task.name} has none")
    constant = task.constant_baseline(targets)
    assert constant is not None
    name = task.metric.name
    scores = [task.scores(records)[name] for _, records in (constant, given)]
    assert task.metric.gain(*scores) > 0


# --- all verbs ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_task_goes_through_all_verbs(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    time_shortly(monkeypatch, batches=(1, 4))
    monkeypatch.setattr(onnxruntime, "ENGINE", replace(onnxruntime.ENGINE, precisions=("float32",)))

    sample = SAMPLES[task.name]
    (tmp_path / "data").mkdir()
    data, picture, metric = sample.write(tmp_path / "data"), tmp_path / "data" / "000.png", task.metric
    prepared = suanli.prepare(data, settings=sample.settings, draw=tmp_path / "samples")
    assert len(list((tmp_path / "samples").iterdir())) == 24
    assert sum(sum(counts.values()) for counts in prepared.findings["class_counts"].values()) >= 150

    run = suanli.train(data, settings=sample.settings, speedups="none", threads=1, out=tmp_path / "run")
    evaluation = suanli.evaluate(run)
    assert evaluation.metric == metric.name
    assert metric.gain(sample.reaches, evaluation.scores[metric.name]) > 0, evaluation.scores
    assert evaluation.scores.keys() == evaluation.units.keys()
    defined = {name for name, score in evaluation.scores.items() if score is not None}
    assert defined == evaluation.intervals.keys()

    (plain,) = suanli.predict(run, picture, draw=tmp_path / "drawn")
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["000.png"]
    optimized = suanli.optimize(run, engines="onnxruntime", time_budget="60s")
    judged = [one for one in optimized.search.candidates if one.state in ("accepted", "refused")]
    assert {one.precision for one in judged} == {"float32"}
    assert all(one.score is not None and one.difference is not None for one in judged)
    accepted = {(one.engine, one.precision) for one in judged if one.state == "accepted"}
    assert accepted >= {("eager", "float32"), ("onnxruntime", "float32")}, optimized.search
    (optimal,) = suanli.predict(run, picture)
    assert plain.answer is not None
    assert plain.answer.kind == optimal.answer.kind
    check_values(optimal.values, plain.values)

    (graph,) = run.model_path.rglob("*.onnx")  # as suanli.export writes it
    assert [output.name for output in onnx.load(graph).graph.output] == list(task.outputs)

    with serving(run.path) as server:
        reply = server.ask("POST", "/predict", picture.read_bytes())
    assert reply.status == 200, reply.body
    (served,) = reply.json()["predictions"]
    check_values({name: served[name] for name in plain.values}, plain.values)

    page = suanli.report(run).read_text(encoding="utf-8")
    assert "A sample of the training split" in page
    assert metric.name.replace("_", " ") in page
    for section in task.sections(evaluation.details):
        assert section.title in page


def check_values(given: Json, expected: Json) -> None:
    """Answers of two engines, up to rounding."""
    if isinstance(expected, dict):
        assert given.keys() == expected.keys()
        for name, value in expected.items():
            check_values(given[name], value)
    elif isinstance(expected, list):
        assert len(given) == len(expected)
        for one, other in zip(given, expected, strict=True):
            check_values(one, other)
    else:
        assert given == (pytest.approx(expected, rel=0.02, abs=0.02) if isinstance(expected, float) else expected)
