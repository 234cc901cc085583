"""Learning curves in the terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from report_runs import ages_run, digits_run
from suanli.reporting.comparison import compare_runs
from suanli.reporting.comparison_views import text
from suanli.reporting.text_chart import ROWS, TextChart

RISING = [(float(i), 1 - 0.5**i) for i in range(9)]


def printed(renderable: object, width: int = 80, colour: bool = False) -> str:
    colours = {"force_terminal": True, "color_system": "standard"} if colour else {}
    console = Console(width=width, file=io.StringIO(), highlight=False, **colours)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawing(*curves: list[tuple[float, float]], **options: object) -> TextChart:
    named = [(f"run{i}", points) for i, points in enumerate(curves)]
    return TextChart(curves=named, x_label="epoch", show="{:.3g}".format, **options)  # type: ignore[arg-type]


def grid(output: str) -> list[str]:
    """Its cells, by rows from the top."""
    return [line.partition("|")[2] for line in output.splitlines() if "|" in line]


def test_a_curve_goes_from_its_first_point_to_its_last() -> None:
    output = printed(drawing(RISING))
    cells = grid(output)
    assert len(cells) == ROWS
    assert cells[-1].startswith("a")
    assert cells[0].rstrip().endswith("a")
    heights = [next(ROWS - row for row in range(ROWS) if cells[row][column] == "a") for column in range(64)]
    assert heights == sorted(heights)
    assert "a  run0: 0.996 at epoch 8\n" in output
    assert re.search(r"^ +0 +epoch +8$", output, re.MULTILINE)


def test_what_is_best_depends_on_the_score() -> None:
    falling = [(1.0, 3.0), (2.0, 1.0), (3.0, 2.0)]
    assert "run0: 1 at epoch 2, 2 at the end" in printed(drawing(falling, best=min))
    assert "run0: 3 at epoch 1, 2 at the end" in printed(drawing(falling))


def test_a_bad_start_leaves_room_for_the_rest() -> None:
    output = printed(drawing([(1.0, 0.0), (2.0, 0.9), (3.0, 0.92), (4.0, 0.94)]))
    assert grid(output)[-1].startswith("  ")  # nothing at epoch 0
    assert "<= 0.9 |" in output
    assert "\n" in output
    assert output.splitlines()[0].lstrip().startswith("0.94 |")


@pytest.mark.parametrize("width", [80, 40, 31])
def test_lines_are_no_wider_than_the_terminal(width: int) -> None:
    output = printed(drawing(RISING, RISING[:3], [], [(4.0, 0.5)], RISING[2:5]), width)
    assert all(len(line) <= width for line in output.splitlines())
    assert len(grid(output)) == ROWS
    assert "run2: no validations" in " ".join(output.split())


def test_where_there_is_no_room_scores_are_only_listed() -> None:
    output = printed(drawing(RISING), 16)
    assert not grid(output)
    assert "0.996" in output


def test_curves_that_meet_are_marked() -> None:
    assert set("".join(grid(printed(drawing(RISING, RISING))))) == {" ", "*"}


def test_colours_are_for_terminals_only() -> None:
    assert "\x1b[" not in printed(drawing(RISING))
    assert "\x1b[36ma\x1b[0m" in printed(drawing(RISING), colour=True)


points = st.lists(st.tuples(st.floats(0, 1e4), st.floats(-1e6, 1e6)), max_size=30).map(
    lambda pairs: sorted(pairs, key=lambda point: point[0])
)


@given(st.lists(points, min_size=1, max_size=30), st.integers(1, 200))
def test_any_curves_can_be_drawn(curves: list[list[tuple[float, float]]], width: int) -> None:
    output = printed(drawing(*curves), width)
    for number, curve in enumerate(curves[:3]):
        if curve and grid(output):
            assert "abc"[number] in "".join(grid(output)) or "*" in "".join(grid(output))


# --- of runs --------------------------------------------------------------------------------


def test_runs_are_compared_by_their_validation_scores(tmp_path: Path) -> None:
    runs = [digits_run(tmp_path / f"run{i}") for i in range(6)]
    for i, run in enumerate(runs):
        lines = [
            {"step": s, "epoch": s, "split": "val", "scores": {"accuracy": 0.5 + 0.05 * s + 0.02 * i}}
            for s in range(1, 3 + i)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[: 6 * i]))
    output = printed(text(compare_runs(runs)), 80)
    chart = output[output.index("Validation accuracy") :]
    assert "a  run0: no validations" in chart
    assert all(letter in "".join(grid(chart)) for letter in "bcdef")
    assert "f  run5: 95.0" in chart
    for run in runs:
        shutil.rmtree(run / "evaluation")
    assert "Validation accuracy" in printed(text(compare_runs(runs)))  # before they are evaluated, too
    (runs[1] / "metrics.jsonl").write_text("")
    assert "Validation" not in printed(text(compare_runs(runs[:2])))


def test_scores_of_different_kinds_share_no_chart(tmp_path: Path) -> None:
    runs = [digits_run(tmp_path / "digits"), ages_run(tmp_path / "ages")]
    assert "Validation" not in printed(text(compare_runs(runs)))
    assert "Validation mean absolute error" in printed(text(compare_runs([runs[1], runs[1]])))
