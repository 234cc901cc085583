"""Cross-validation: each example is answered once by a model that hasn't seen it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import suanli
from suanli.cli import main
from suanli.core.types import Example, Source
from suanli.data.examples import ExampleTable, rows_of_bytes
from suanli.data.folds import deal_folds, fold_source
from suanli.data.splits import content_digest
from suanli.verbs._folds import parse_folds
from suanli.verbs.evaluate import table

ROWS = st.lists(st.tuples(st.sampled_from("aab"), st.integers(0, 30)), min_size=12, max_size=60)


def make(rows: list[tuple[str, int]], *, grouped: bool = False, times: bool = False) -> tuple[Source, ExampleTable]:
    """Examples of a class with a number: equal numbers are one group, or equal contents."""
    examples = [
        Example(
            name=f"{i}",
            target=label,
            split=None,
            read=lambda: b"",
            group=str(number) if grouped else None,
            time=float(i) if times else None,
        )
        for i, (label, number) in enumerate(rows)
    ]
    digests = [content_digest(f"{i}" if grouped else f"{label}{number}") for i, (label, number) in enumerate(rows)]
    known = ExampleTable(
        names=[one.name for one in examples],
        splits=np.zeros(len(rows), np.uint8),
        digests=rows_of_bytes(digests, 8),
        keys=np.zeros((len(rows), 0), np.uint8),
        units=np.zeros((len(rows), 8), np.uint8),
    )
    return Source(name="made", kind="image", examples=examples, classes=("a", "b"), fingerprint="x"), known


def deal(rows: list[tuple[str, int]], repetition: int = 0, **how: bool) -> list[int | None]:
    return deal_folds(*make(rows, **how), lambda target: (target,), 3, repetition)


@given(ROWS, st.booleans(), st.integers(0, 5))
def test_groups_and_copies_are_in_one_fold_and_classes_in_all(
    rows: list[tuple[str, int]], grouped: bool, repetition: int
) -> None:
    if len({number if grouped else (label, number) for label, number in rows}) < 3:
        return
    folds = deal(rows, repetition, grouped=grouped)
    assert set(folds) == {0, 1, 2}
    together = {}
    for (label, number), fold in zip(rows, folds, strict=True):
        assert together.setdefault(number if grouped else (label, number), fold) == fold
    if not grouped:
        for label in "ab":
            units = {number: fold for (own, number), fold in zip(rows, folds, strict=True) if own == label}
            per_fold = [Counter(units.values())[fold] for fold in range(3)]
            assert max(per_fold) - min(per_fold) <= 1


def test_another_repetition_deals_anew() -> None:
    rows = [("ab"[i % 2], i) for i in range(40)]
    assert deal(rows) == deal(rows)
    assert deal(rows) != deal(rows, 1)


def test_a_stated_test_split_is_in_no_fold() -> None:
    source, known = make([("ab"[i % 2], i) for i in range(20)])
    examples = [
        Example(name=one.name, target=one.target, split="test" if i < 5 else "train", read=one.read)
        for i, one in enumerate(source.examples)
    ]
    source = Source(name="made", kind="image", examples=examples, classes=("a", "b"), fingerprint="x")
    folds = deal_folds(source, known, lambda target: (target,), 3)
    assert folds[:5] == [None] * 5
    parts = [fold_source(source, folds, fold) for fold in range(3)]
    tested = [one.name for part in parts for one in part.examples if one.split == "test"]
    assert sorted(tested, key=int) == [str(i) for i in range(5, 20)]
    assert len({part.fingerprint for part in parts}) == 3


def test_what_cannot_be_divided_into_folds() -> None:
    with pytest.raises(suanli.DataError, match="3 folds need as many different examples, or groups, and there are 2"):
        deal([("a", 0), ("b", 1)] * 6, grouped=True)
    with pytest.raises(suanli.UsageError, match="later than those"):
        deal([("ab"[i % 2], i) for i in range(20)], times=True)


@pytest.mark.parametrize("folds", ["1", "0", "x", "5x0", "-3", "101", "50x3", ""])
def test_numbers_that_are_no_folds(folds: str) -> None:
    with pytest.raises(suanli.UsageError, match="--folds can't be"):
        parse_folds(folds)


def test_folds_by_number_or_with_repetitions() -> None:
    assert parse_folds(5) == (5, 1)
    assert parse_folds("5x3") == (5, 3)


def test_a_run_is_cross_validated(
    trained_on_pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained_on_pictures, tmp_path, dirs_exist_ok=True)
    run = suanli.Run(tmp_path / "made")
    weights = (run.model_path / "weights.safetensors").read_bytes()
    evaluation = suanli.evaluate(run, folds="2x2", device="cpu", cache_dir=tmp_path / "cache")
    assert evaluation.count == 60  # all examples, once
    assert evaluation.folds is not None
    assert (evaluation.folds["count"], evaluation.folds["repetitions"]) == (2, 2)
    assert len(evaluation.folds["scores"]) == 4
    assert evaluation.scores["accuracy"] == pytest.approx(np.mean(evaluation.folds["scores"]), abs=0.05)
    low, high = evaluation.intervals["accuracy"]
    assert low <= evaluation.scores["accuracy"] <= high
    assert "60 examples, each predicted by a model that hasn't seen it (2 folds, 2 repetitions)" in table(evaluation)
    assert (run.model_path / "weights.safetensors").read_bytes() == weights
    assert not (run.path / "folds").exists()
    written = json.loads((run.path / "evaluation" / "cross-validation.json").read_text())
    assert written["scores"] == evaluation.scores == run.cross_validation
    suanli.report(run)
    for name in ("README.md", "report.html"):
        assert "In cross-validation with 2 folds, each of the 60 examples" in (run.path / name).read_text()
    with pytest.raises(suanli.UsageError, match="Leave out --data and --split"):
        suanli.evaluate(run, folds=2, split="val")
    with pytest.raises(SystemExit) as ended:
        main(["run", str(run.path), "--folds", "2", "--device", "cpu", "--cache-dir", str(tmp_path / "cache")])
    assert not ended.value.code
    shown = capsys.readouterr()
    assert "Test accuracy: " in shown.out
    assert "Cross-validation accuracy: " in shown.out
    assert 'always answering "' in shown.err  # whether the model beats its baselines
