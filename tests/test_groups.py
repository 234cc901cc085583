"""Groups are never divided between splits, and with times the latest examples are for testing."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

import suanli
from suanli.cli import main
from suanli.core.compare import wilson_interval
from suanli.core.errors import DataError, UsageError
from suanli.core.run import Run
from suanli.core.types import SPLITS, Columns, Example, Source
from suanli.data.readers import table
from suanli.data.splits import assign_splits, content_digest, group_by_pattern
from suanli.reporting.findings import list_findings
from suanli.reporting.records import Check
from suanli.training.prepare import DataOptions, resolve

FRACTIONS = st.floats(0.05, 0.4)
GROUPS = st.lists(st.sampled_from([f"patient {i}" for i in range(30)]), min_size=1, max_size=80)
TIMES = st.lists(st.floats(-1e9, 1e9) | st.integers(0, 9).map(float), min_size=12, max_size=80)
WEATHER = {"input_column": "temp_max", "label_column": "weather"}


def make_rows(
    count: int,
    *,
    groups: Sequence[str] | None = None,
    times: Sequence[float] | None = None,
    splits: Sequence[str | None] | None = None,
) -> list[Example]:
    return [
        Example(
            name=f"row{i}",
            target="ab"[i % 2],
            split=splits[i] if splits else None,
            read=lambda i=i: f"text {i}",  # type: ignore[misc]
            group=groups[i] if groups else None,
            time=times[i] if times else None,
        )
        for i in range(count)
    ]


def assign(rows: Sequence[Example], val: float, test: float) -> list[str]:
    return assign_splits(
        rows, lambda at: [content_digest(rows[i].read()) for i in at], val_fraction=val, test_fraction=test
    ).splits


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def talks(path: Path, *, speakers: int = 40, each: int = 6, split: Callable[[int, int], str] | None = None) -> Path:
    """Texts of two classes by several speakers on consecutive days; `split` decides by speaker and number."""
    words = ("red apple pear", "blue sea wave")
    rows = [
        [f"{words[k % 2]} number{s} {k}", "ab"[k % 2], f"s{s}", f"2024-{1 + s // 28:02}-{1 + s % 28:02}"]
        + ([split(s, k)] if split else [])
        for s in range(speakers)
        for k in range(each)
    ]
    return write_table(path, ["text", "label", "speaker", "day", *(["split"] if split else [])], rows)


# --- how splits are made ---------------------------------------------------------------------


@given(GROUPS, FRACTIONS, FRACTIONS, st.data())
def test_no_group_is_ever_divided(groups: list[str], val: float, test: float, data: st.DataObject) -> None:
    times = data.draw(st.none() | st.lists(st.floats(-1e9, 1e9), min_size=len(groups), max_size=len(groups)))
    try:
        splits = assign(make_rows(len(groups), groups=groups, times=times), val, test)
    except DataError:
        assert times is not None
        return
    splits_of = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        splits_of[group].add(split)
    assert all(len(in_splits) == 1 for in_splits in splits_of.values())


@given(GROUPS, GROUPS, FRACTIONS, FRACTIONS)
def test_a_new_file_joins_its_group_and_moves_none(old: list[str], new: list[str], val: float, test: float) -> None:
    before = assign(make_rows(len(old), groups=old), val, test)
    after = assign(make_rows(len(old + new), groups=old + new), val, test)
    assert after[: len(old)] == before
    known = dict(zip(old, before, strict=True))
    joined = zip(new, after[len(old) :], strict=True)
    assert all(split == known[group] for group, split in joined if group in known)


@given(GROUPS, st.data(), FRACTIONS, FRACTIONS)
def test_rows_without_a_split_join_the_stated_split_of_their_group(
    groups: list[str], data: st.DataObject, val: float, test: float
) -> None:
    names = sorted(set(groups))
    stated = data.draw(st.fixed_dictionaries({name: st.sampled_from([*SPLITS, None]) for name in names}))
    blank = data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups)))
    splits = [None if b else stated[g] for g, b in zip(groups, blank, strict=True)]
    assigned = assign(make_rows(len(groups), groups=groups, splits=splits), val, test)
    splits_of = defaultdict(set)
    for group, split in zip(groups, assigned, strict=True):
        splits_of[group].add(split)
    assert all(len(in_splits) == 1 for in_splits in splits_of.values())
    kept = zip(splits, assigned, strict=True)
    assert all(after == before for before, after in kept if before in ("val", "test"))


@given(TIMES, FRACTIONS, FRACTIONS)
def test_no_test_example_is_earlier_than_a_training_example(times: list[float], val: float, test: float) -> None:
    try:
        splits = assign(make_rows(len(times), times=times), val, test)
    except DataError:
        assert len(set(times)) < len(times)  # only ties can leave nothing to train on
        return
    by_split = {s: [t for t, own in zip(times, splits, strict=True) if own == s] for s in SPLITS}
    assert max(by_split["train"]) < min(by_split["val"])
    assert max(by_split["val"]) < min(by_split["test"])
    if len(set(times)) == len(times):
        assert len(by_split["test"]) == max(1, round(test * len(times)))
        assert len(by_split["val"]) == max(1, round(val * len(times)))


def test_a_published_test_split_stays_and_validation_is_the_latest_of_the_rest() -> None:
    times = [float(i) for i in range(20)]
    splits: list[str | None] = ["test" if i < 5 else "train" for i in range(20)]
    assigned = assign(make_rows(20, times=times, splits=splits), 0.2, 0.2)
    assert assigned == ["test"] * 5 + ["train"] * 12 + ["val"] * 3


def test_groups_with_times_are_ordered_by_their_latest_time() -> None:
    groups = ["old", "new", "middle", "old", "new", "middle"]
    times = [1.0, 0.0, 2.0, 3.0, 9.0, 5.0]
    assigned = assign(make_rows(6, groups=groups, times=times), 0.3, 0.3)
    assert dict(zip(groups, assigned, strict=True)) == {"old": "train", "middle": "val", "new": "test"}


def test_times_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(DataError, match="2 different times"):
        assign(make_rows(20, times=[0.0] * 10 + [1.0] * 10), 0.1, 0.1)


# --- without these options nothing changes ---------------------------------------------------


def test_splits_and_bits_of_digits_are_as_ever() -> None:
    prepared = suanli.prepare("digits")
    assert prepared.digest == "7756b07635a09dc6846d"
    assert {name: len(split) for name, split in prepared.splits.items()} == {"train": 1414, "val": 183, "test": 200}
    assert all(split.groups is None for split in prepared.splits.values())
    assert not (prepared.path / "groups.npy").exists()


def test_splits_of_a_real_table_are_as_ever(shared_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "weather.csv"
    shutil.copy(shared_data / "tables" / "seattle_weather.csv", file)
    os.utime(file, (1000, 1000))
    old = replace(DataOptions.of(file, data_dir=None, cache_dir=None, **WEATHER), stratified=False)
    prepared = resolve(old, recipe=None, settings={})[1]  # as a run of an older version finds it
    assert prepared.digest == "27e326e3334dab9eab35"
    assert set(prepared.findings["counts"]) == {
        *("bad", "duplicates_across_splits", "duplicates_within", "label_conflicts")
    }


# --- tables ----------------------------------------------------------------------------------


def test_real_weather_is_split_by_day(shared_data: Path) -> None:
    file = shared_data / "tables" / "seattle_weather.csv"
    prepared = suanli.prepare(file, **WEATHER, time_column="date")
    lines = {name: [int(n.split(":")[1]) for n in split.names] for name, split in prepared.splits.items()}
    assert max(lines["train"]) < min(lines["val"])  # the file is in order of days
    assert max(lines["val"]) < min(lines["test"])
    assert (len(lines["test"]), len(lines["val"])) == (146, 146)
    assert prepared.findings["test_before_train"] == 0


def test_real_penguins_stay_together(shared_data: Path) -> None:
    file = shared_data / "tables" / "penguins_raw.csv"
    columns = {"input_column": "Species", "label_column": "Sex", "group_column": "Individual ID"}
    prepared = suanli.prepare(file, **columns)
    with file.open(newline="") as stream:
        ids = [row["Individual ID"] for row in csv.DictReader(stream)]
    own = {name: {ids[int(n.split(":")[1]) - 2] for n in split.names} for name, split in prepared.splits.items()}
    assert not own["train"] & own["test"]
    assert not own["train"] & own["val"]
    assert {name: len(groups) for name, groups in own.items()} == prepared.findings["groups"]
    for name, split in prepared.splits.items():
        assert split.groups is not None
        assert (split.groups.dtype, len(split.groups)) == (np.dtype(np.int64), len(split))
        pairs = {(ids[int(n.split(":")[1]) - 2], int(g)) for n, g in zip(split.names, split.groups, strict=True)}
        assert len(pairs) == len(own[name]) == len(set(split.groups.tolist()))
    again = suanli.prepare(file, **columns)
    assert again.reused
    assert again.splits["test"].groups is not None
    assert suanli.prepare(file, **(columns | {"group_column": "Sample Number"})).path != again.path


def test_a_group_in_several_stated_splits_is_reported_and_not_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = talks(tmp_path / "t.csv", speakers=12, split=lambda s, k: "test" if s == 3 and k == 0 else SPLITS[s % 3])
    prepared = suanli.prepare(file, group_column="speaker")
    assert prepared.findings["groups_across_splits"] == [{"group": "s3", "splits": ["train", "test"]}]
    assert prepared.findings["counts"]["groups_across_splits"] == 1
    assert prepared.findings["groups"] == {"train": 4, "val": 4, "test": 5}
    shown = list_findings(TypeAdapter(Check).validate_python(prepared.findings))
    (severe,) = [finding for finding in shown if finding.weight == "severe"]
    assert severe.title == "1 group in more than one split"
    assert severe.groups[0].names == ("s3",)
    output = capsys.readouterr().err
    assert "1 group in more than one split" in output
    assert "few groups (4 in train, 4 in val)" in output


def test_test_examples_that_are_earlier_than_training_are_reported(tmp_path: Path) -> None:
    file = talks(tmp_path / "t.csv", speakers=12, split=lambda s, k: SPLITS[s % 3])  # noqa: ARG005
    findings = suanli.prepare(file, time_column="day").findings
    assert findings["test_before_train"] == 3 * 6  # the test speakers 2, 5 and 8 are before 9, who is for training


@pytest.mark.parametrize(
    "cells",
    [
        ["3", "1.5", "-2e3", "1e9", "20240101"],
        ["2024-03-01", "2023-12-31", "2024-02-29"],
        ["2024-03-01T10:00:00Z", "2024-03-01T10:00:00+02:00"],
        ["2024-03-01 10:00", "2024-03-01 09:59:59.5"],
        ["2012/01/02", "2011/12/31"],
        ["31.12.2023", "01.01.2023 ", "05.02.2023"],
        ["13/01/2024", "02/03/2023"],
        ["01/13/2024", "02/03/2023"],
        ["5 Feb 2024", "17 Jan 2024"],
        ["Mon, 05 Feb 2024 10:00:00 +0000", "Sun, 04 Feb 2024 10:00:00 +0000"],
        ["2024-02", "2023-11"],
    ],
)
def test_numbers_and_usual_dates_are_times(cells: list[str], tmp_path: Path) -> None:
    source = table.read(
        write_table(tmp_path / "t.csv", ["text", "label", "at"], [["x", "ab"[i % 2], c] for i, c in enumerate(cells)]),
        Columns(time="at"),
    )
    times = [row.time for row in source.examples]
    assert None not in times
    expected = {
        "13/01/2024": [1, 0],
        "01/13/2024": [1, 0],
        "2024-03-01T10:00:00Z": [1, 0],
        "3": [2, 1, 0, 4, 3],
        "31.12.2023": [1, 2, 0],
    }.get(cells[0], None if len(cells) != 2 else [1, 0])
    if expected is not None:
        assert sorted(range(len(times)), key=lambda i: times[i] or 0.0) == expected


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        (["2024-01-02", "5", "2024-01-03"], "'5' in t.csv:3, and '2024-01-02' in t.csv:2"),
        (["2024-01-02", "", "2024-01-03"], "an empty cell in t.csv:3"),
        (["yesterday", "today", "now"], "'yesterday' in t.csv:2"),
        (["1", "nan", "2"], "'nan' in t.csv:3"),
        (["2024-01-02T10:00:00", "2024-01-02T10:00:00Z", "2024-01-02T11:00:00"], "Z' in t.csv:3"),
        (["13/01/2024", "01/13/2024", "01/01/2024"], "'01/13/2024' in t.csv:3"),
        (["01/02/2024", "02/03/2024", "05/04/2024"], "the day or the month first"),
    ],
)
def test_times_without_an_order_are_refused(cells: list[str], says: str, tmp_path: Path) -> None:
    rows = [["x", "ab"[i % 2], cell] for i, cell in enumerate(cells)]
    with pytest.raises(DataError, match="Allowed are numbers, or dates") as caught:
        table.read(write_table(tmp_path / "t.csv", ["text", "label", "at"], rows), Columns(time="at"))
    assert says in caught.value.message


def test_a_table_without_the_group_of_a_row_is_refused(tmp_path: Path) -> None:
    file = write_table(tmp_path / "t.csv", ["text", "label", "who"], [["x", "a", "p"], ["y", "b", " "]])
    with pytest.raises(DataError, match="'who' of .* has an empty cell in line 3"):
        suanli.prepare(file, group_column="who")
    with pytest.raises(UsageError, match="Did you mean 'who'"):
        suanli.prepare(file, group_column="whom")


def test_every_table_of_a_folder_needs_the_group_column(tmp_path: Path) -> None:
    folder = tmp_path / "talks"
    folder.mkdir()
    write_table(folder / "train.csv", ["text", "label", "who"], [["x", "a", "p"], ["y", "b", "q"]])
    write_table(folder / "test.csv", ["text", "label"], [["x", "a"], ["y", "b"]])
    with pytest.raises(UsageError, match=r"group column of test\.csv"):
        suanli.prepare(folder, group_column="who")


# --- names of files --------------------------------------------------------------------------


def test_a_pattern_groups_real_faces_by_their_lighting(shared_data: Path) -> None:
    settings = {"val_fraction": 0.3, "test_fraction": 0.3, "preprocess.size": 16}
    file = shared_data / "yaleb_cropped_faces.zip"
    prepared = suanli.prepare(file, group_pattern=r"_P00(A[^/]+)\.pgm$", settings=settings)
    lightings = {s: {name.partition("_P00")[2] for name in prepared.splits[s].names} for s in SPLITS}
    assert all(lightings.values())
    assert not lightings["train"] & lightings["test"]
    assert prepared.findings["groups"] == {s: len(names) for s, names in lightings.items()}


def test_speakers_are_found_in_real_names(shared_data: Path) -> None:
    import zipfile

    names = [n for n in zipfile.ZipFile(shared_data / "emodb_2s_4speakers.zip").namelist() if n.endswith(".wav")]
    rows = [Example(name=name, target=name[-6], split=None, read=lambda: b"") for name in names]
    source = Source(name="emodb", kind="image", examples=rows, classes=("a",), fingerprint="x")
    grouped = group_by_pattern(source, r"wav/(\d\d)")
    assert {row.group for row in grouped.examples} == {"03", "08", "10", "13"}
    assert grouped.fingerprint != source.fingerprint


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "not a regular expression"),
        (r"\d+", "0 capture groups; one is needed"),
        (r"(\d)(\d)", "2 capture groups; one is needed"),
        (r"class0/(\d+)", "finds no group in 30 of 60 names: class1/"),
        (r"class\d/(x?)", "finds no group in 60 of 60 names"),
    ],
)
def test_patterns_that_cannot_be_used(pattern: str, says: str, picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="--group-pattern") as caught:
        suanli.prepare(picture_folder(), group_pattern=pattern)
    assert says in caught.value.message
    assert "parentheses" in caught.value.fix


def test_options_that_the_data_has_no_use_for(picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    pictures = picture_folder()
    with pytest.raises(UsageError, match="--group-pattern takes the group"):
        suanli.prepare(pictures, group_column="speaker")
    with pytest.raises(UsageError, match="--time-column is for tables"):
        suanli.prepare(pictures, time_column="day")
    with pytest.raises(UsageError, match="Leave one out"):
        suanli.prepare(talks(tmp_path / "t.csv"), group_column="speaker", group_pattern="(.)")


# --- a run keeps them ------------------------------------------------------------------------


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    return int(stopped.value.code or 0)


def test_a_run_remembers_groups_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = talks(tmp_path / "talks.csv", speakers=80)
    options = ["--group-column", "speaker", "--time-column", "day"]
    small = ["--epochs", "1", "--device", "cpu", "--speedups", "none"]
    assert call("train", file, *options, *small, "--out", "run") == 0
    saved = Run.open("run").data["options"]
    assert (saved["group_column"], saved["time_column"], saved["group_pattern"]) == ("speaker", "day", None)
    assert call("train", "run", "--more-epochs", "1", "--device", "cpu") == 0
    assert call("train", "run", "--more-epochs", "1", "--time-column", "day") == 2
    capsys.readouterr()
    assert call("evaluate", "run", "--json", "--device", "cpu") == 0
    scores = json.loads(capsys.readouterr().out)
    # Speakers are drawn, not single talks: the closed form for independent examples doesn't hold.
    right = round(scores["scores"]["accuracy"] * scores["count"])
    assert tuple(scores["intervals"]["accuracy"]) != wilson_interval(right, scores["count"])
    assert scores["count"] == len(suanli.prepare(file, group_column="speaker", time_column="day").splits["test"])
    assert call("evaluate", "run", "--data", talks(tmp_path / "more.csv", speakers=3), "--device", "cpu") == 0
    assert "without groups" not in capsys.readouterr().err
    ungrouped = write_table(tmp_path / "plain.csv", ["text", "label"], [["red apple", "a"], ["blue sea", "b"]])
    assert call("evaluate", "run", "--data", ungrouped, "--device", "cpu") == 0
    assert "is evaluated without groups" in capsys.readouterr().err
    assert call("report", "run") == 0
    assert "Groups: " in Path("run/report.html").read_text()


def test_a_job_for_a_cluster_gets_them_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given_options = ["--group-pattern", r"([^/]+)_\d+\.png", "--time-column", "day"]
    assert call("train", tmp_path, *given_options, "--out", "run", "--emit", "slurm") == 0
    output = capsys.readouterr().out
    assert r"'--group-pattern=([^/]+)_\d+\.png'" in output
    assert "--time-column=day" in output
