"""runs and compare: what there is, and which of two runs is better."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import suanli
from report_runs import HOSTILE, ages_run, digits_run, write
from suanli.cli import main
from suanli.core.compare import difference
from suanli.core.run import Run
from suanli.core.scored_examples import ScoredExamples
from suanli.reporting.overview import read_overview


@pytest.fixture(scope="module")
def two(trained_on_pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs on the same data, evaluated."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(trained_on_pictures / "made", folder / "first")
    options = {"speedups": "none", "cache_dir": trained_on_pictures / "cache"}
    suanli.train(trained_on_pictures / "pictures", epochs=1, seed=1, out=folder / "second", **options)
    for run in (folder / "first", folder / "second"):
        suanli.evaluate(run, augmented_views=False, cache_dir=trained_on_pictures / "cache")
    return folder / "first", folder / "second"


def out_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main([str(one) for one in arguments])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


# --- runs -----------------------------------------------------------------------------------


def test_states_and_scores(two: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(two[0], tmp_path / "runs" / "good")
    shutil.copytree(two[1], tmp_path / "runs" / "deeper" / "inside" / "other")
    digits_run(tmp_path / "runs" / "digits")
    ages_run(tmp_path / "runs" / "ages")
    write(tmp_path / "runs" / "ages" / "summary.json", {"status": "interrupted"})
    write(tmp_path / "runs" / "bench" / "recipe.json", {"model": "speednet"})
    write(tmp_path / "runs" / "bench" / "bench.json", {})
    write(tmp_path / "runs" / "half" / "data.json", {"name": "x"})
    write(tmp_path / "runs" / "half" / "environment.json", {})
    (tmp_path / "runs" / "empty").mkdir()
    found = {one.name: one for one in suanli.runs()}
    assert found.keys() == {"good", "other", "digits", "ages", "bench", "half"}
    good = found["good"]
    assert (good.state, good.data, good.model, good.metric, good.split) == (
        "finished",
        "pictures",
        good.model,
        "accuracy",
        "test",
    )
    assert good.score == Run(two[0]).scores["accuracy"]
    assert good.interval is not None
    assert good.interval[0] <= good.score <= good.interval[1]
    assert good.train_seconds is not None
    assert (found["ages"].state, found["ages"].resumable, found["ages"].unit) == ("interrupted", True, "years")
    assert found["bench"].is_bench
    assert found["half"].state == "broken"
    assert "recipe.json" in str(found["half"].problem)


def test_the_list_fits_the_terminal(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pictures-1", "pictures-2"):
        shutil.copytree(two[0], tmp_path / "runs" / name)

    def shown(columns: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", columns)
        return out_of(capsys, "runs")[1].splitlines()

    narrow = shown("80")
    assert len(narrow) == 3
    assert max(map(len, narrow)) <= 80
    ages_run(tmp_path / "runs" / "ages")  # of another task
    wide = shown("160")
    assert len(wide) == 4
    assert " task " in wide[0]
    assert any(re.search(r"accuracy [\d.]+.% \([\d.]+ to [\d.]+\)", line) for line in wide)


def test_a_run_that_is_being_written_is_running(two: tuple[Path, Path], tmp_path: Path) -> None:
    run = Run(shutil.copytree(two[0], tmp_path / "runs" / "now"))
    run.write("summary.json", {"status": "running"})
    with run.lock():
        assert suanli.runs()[0].state == "running"
    assert suanli.runs()[0].state == "interrupted"


def test_without_an_evaluation_the_score_is_validations(trained_on_pictures: Path) -> None:
    (one,) = suanli.runs(trained_on_pictures / "made")
    assert one.split == "val"
    assert one.score == Run(trained_on_pictures / "made").scores["accuracy"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b'{"status": 5}', b"\xff\xfe", b"[" * 100_000])
def test_damage_is_never_a_traceback(content: bytes, two: tuple[Path, Path], tmp_path: Path) -> None:
    run = shutil.copytree(two[0], tmp_path / "run")
    for name in ("recipe.json", "data.json", "environment.json", "summary.json", "evaluation/test.json"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(content)
        one = read_overview(run)
        assert one.state in ("broken", "finished", "interrupted")
        assert one.state != "broken" or one.problem
        (run / name).write_bytes(before)


def test_order(two: tuple[Path, Path], tmp_path: Path) -> None:
    for number, score in ((2, 0.5), (10, 0.9), (1, 0.7)):
        run = shutil.copytree(two[0], tmp_path / "runs" / f"r-{number}")
        values = json.loads((run / "evaluation" / "test.json").read_text())
        values["scores"]["accuracy"] = score
        write(run / "evaluation" / "test.json", values)
        environment = json.loads((run / "environment.json").read_text())
        write(run / "environment.json", environment | {"time": f"2026-01-{number:02d}T00:00:00+00:00"})
    orders = {order: [one.name for one in suanli.runs(sort=order)] for order in ("name", "score", "time")}
    assert orders["name"] == ["r-1", "r-2", "r-10"]
    assert orders["score"] == ["r-10", "r-1", "r-2"]
    assert orders["time"] == ["r-10", "r-2", "r-1"]
    with pytest.raises(suanli.UsageError, match="Unknown order"):
        suanli.runs(sort="size")


def test_on_the_command_line(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = out_of(capsys, "runs", two[0].parent)
    assert code == 0
    assert "first" in out
    assert "accuracy" in out
    code, out, _ = out_of(capsys, "runs", two[0], "--json")
    assert [one["state"] for one in json.loads(out)["runs"]] == ["finished"]
    assert out_of(capsys, "runs", "nowhere")[0] == 3
    code, out, _ = out_of(capsys, "runs", two[0] / "model")
    assert (code, out) == (0, "There are no runs here. To make one: suanli train DATA.\n")
    assert out_of(capsys, "compare", two[0])[0] == 2
    assert out_of(capsys, "compare", two[0], "nowhere")[0] == 3


def test_both_verbs_are_quick_because_torch_is_not_loaded(two: tuple[Path, Path]) -> None:
    script = (
        "import sys, suanli; suanli.runs(sys.argv[1]); suanli.compare(*sys.argv[1:], html='c.html');"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *two], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


# --- compare --------------------------------------------------------------------------------


def test_the_difference_is_paired_on_the_same_examples(two: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = suanli.compare(*two, html=tmp_path / "page.html")
    (change,) = comparison.changes
    assert change.paired
    first, second = (ScoredExamples.read(Run(run).scored_examples("test")) for run in two)
    assert first is not None
    assert second is not None
    assert first.keys.tolist() == second.keys.tolist()
    task = suanli.load(two[0]).task
    gain = difference(task, first.records, second.records)
    assert change.changes["accuracy"] == (gain.median, gain.low, gain.high)
    assert change.changes.keys() == Run(two[0]).scores.keys()
    for name, (measured, low, high) in change.changes.items():
        assert measured == pytest.approx(Run(two[1]).scores[name] - Run(two[0]).scores[name])
        assert low <= measured <= high
    (back,) = suanli.compare(two[1], two[0]).changes
    assert back.changes["log_loss"][0] == -change.changes["log_loss"][0]
    assert {row.name for row in comparison.differences["recipe"]} == {"epochs", "seed"}
    assert comparison.differences["data"] == ()
    assert [cost.parameters for cost in comparison.costs] == [suanli.Run(run).summary["parameters"] for run in two]
    page = (tmp_path / "page.html").read_text()
    assert "second compared with" not in page or "first" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_records_come_back_as_they_were(two: tuple[Path, Path]) -> None:
    scored = ScoredExamples.read(Run(two[0]).scored_examples("test"))
    assert scored is not None
    scores = suanli.load(two[0]).task.scores(scored.records)
    assert scores == pytest.approx(Run(two[0]).scores)
    assert scored.classes == ("class0", "class1")


def test_other_examples_are_not_paired(
    two: tuple[Path, Path], picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    other = suanli.train(picture_folder("others", each=20), epochs=1, speedups="none", out=tmp_path / "other")
    assert other.scores_split == "val"
    suanli.evaluate(other, augmented_views=False)
    (change,) = suanli.compare(two[0], other).changes
    assert not change.paired
    assert "examples" in change.note
    measured, low, high = change.changes["accuracy"]
    assert low <= measured <= high
    Run(two[0]).scored_examples("test")
    without = shutil.copytree(two[1], tmp_path / "older")
    (without / "evaluation" / "test.safetensors").unlink()
    (change,) = suanli.compare(two[0], without).changes
    assert not change.paired
    assert "evaluate again" in change.note


def test_damaged_records_are_named(two: tuple[Path, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(two[1], tmp_path / "broken")
    file = broken / "evaluation" / "test.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(suanli.DataError, match=r"test.safetensors can't be used"):
        suanli.compare(two[0], broken)


def test_any_runs_can_be_compared(two: tuple[Path, Path], tmp_path: Path) -> None:
    digits, ages = digits_run(tmp_path / "digits"), ages_run(tmp_path / HOSTILE.replace("/", "_"))
    comparison = suanli.compare(two[0], digits, ages, html=tmp_path)
    assert comparison.metric is None
    assert [change.paired for change in comparison.changes] == [False, False]
    page = (tmp_path / "compare.html").read_text()
    assert "<script" not in page
    assert "<img" not in page


def test_runs_that_are_not_evaluated_have_no_scores(trained_on_pictures: Path, two: tuple[Path, Path]) -> None:
    comparison = suanli.compare(two[0], trained_on_pictures / "made", html="page.html")
    assert (comparison.scores, comparison.changes, comparison.split) == ((), (), None)
    assert [curve.run for curve in comparison.curves] == [str(two[0]), str(trained_on_pictures / "made")]
    page = Path("page.html").read_text()
    assert "not evaluated yet: " in page
    assert "Learning curves" in page


def test_groups_stay_together(two: tuple[Path, Path], tmp_path: Path) -> None:
    runs = [shutil.copytree(run, tmp_path / run.name) for run in two]
    for run in runs:
        scored = ScoredExamples.read(Run(run).scored_examples("test"))
        assert scored is not None
        grouped = ScoredExamples(**{**vars(scored), "groups": np.zeros(len(scored), np.int64)})
        grouped.write(Run(run).scored_examples("test"))
    (change,) = suanli.compare(*runs).changes
    measured, low, high = change.changes["log_loss"]  # all examples are of one group: every resample is the same
    assert low == pytest.approx(measured)
    assert high == pytest.approx(measured)
