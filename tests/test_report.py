"""The report: what it says, that nothing in a run can harm it, and how it looks to a browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from report_runs import (
    HOSTILE,
    TEXTS,
    ages_run,
    boxes_entry,
    digits_run,
    hostile_engines,
    hostile_run,
    in_older_form,
    many_classes_run,
    png,
    text_preview,
    text_run,
    write,
    write_lines,
)
from speed_runs import bench, bench_run, diagnosis, fallbacks, hostile_speed, plan, plan_changes, roofline
from suanli.core.errors import DamagedFile, DataError, StorageError
from suanli.core.sections import Line, Matrix, Plot, Table
from suanli.reporting import words
from suanli.reporting.bars import Step, waterfall
from suanli.reporting.charts import Series, chart, decades, thin, ticks
from suanli.reporting.section_views import section_views
from suanli.verbs.report import report


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = digits_run(tmp_path_factory.mktemp("runs") / "digits-1")
    edit(path / "summary.json", plan=plan(), diagnosis=diagnosis(), fallbacks=fallbacks(), plan_changes=plan_changes())
    write(path / "roofline.json", roofline())
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "digits-1", ignore=shutil.ignore_patterns("report.html")))


# --- reading a page --------------------------------------------------------------------------


class Page(HTMLParser):
    """The tags, addresses and words of a page, and whether its tags are balanced."""

    VOID = {"meta", "link", "img", "br"}
    INLINE = {"bdi", "span", "strong", "small", "code"}
    SHAPES = {"line", "circle", "path", "rect"}

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source, self.words, self.open = source, "", []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.words += " " if tag in ("small", "br", "summary") else ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.SHAPES
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.words += "" if tag in self.INLINE else " "

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    def count(self, tag: str) -> int:
        return sum(1 for name, _ in self.tags if name == tag)

    def headings(self) -> list[str]:
        headings = re.findall(r"<h[23][^>]*>([^<]+)", self.source)
        return [html.unescape(one).strip() for one in headings]

    def says(self, words: str) -> bool:
        return words in " ".join(self.words.split())


def page(path: Path, **options: Any) -> Page:
    return Page(report(path, **options).read_text(encoding="utf-8"))


def worst_run(path: Path) -> Path:
    hostile_speed(hostile_run(path))
    hostile_engines(path)
    return path


MAKERS = {
    "digits": digits_run,
    "text": text_run,
    "many": many_classes_run,
    "hostile": worst_run,
    "ages": ages_run,
    "bench": bench_run,
}


@pytest.fixture(scope="session", params=MAKERS)
def any_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("runs") / request.param)


def edit(path: Path, **changes: Any) -> None:
    write(path, json.loads(path.read_text(encoding="utf-8")) | changes)


# --- what it says ----------------------------------------------------------------------------


def test_a_finished_run_is_reported_in_full(finished: Path) -> None:
    seen = page(finished)
    sections = ["Data", "Training", "Scores", "Examples", "Speed", "Time and memory", "Recipe", "Repeat this run"]
    assert [one for one in seen.headings() if one in sections] == sections
    score = json.loads((finished / "evaluation" / "test.json").read_text())["scores"]["accuracy"]
    assert seen.says(f"accuracy is {100 * score:.1f} %")
    assert seen.says(f"(95 % interval {100 * (score - 0.02):.1f} % to {100 * (score + 0.02):.1f} %)")
    assert seen.says("89.1 % to 93.4 %")  # of another score, in the table
    assert seen.says("0.231 to 0.322")
    assert seen.says("speednet was trained on digits (1,257 training examples in 10 classes) for 20 epochs in 18 s.")
    assert seen.says("Test, test-time augmentation mean of 4 views")
    assert seen.says("suanli run digits --set epochs=20 --out 'runs/digits 1'")
    assert seen.says("train/3/0007.png cut short after 112 of 230 bytes")
    assert seen.says("training time 17 s 18 s +9 %")
    assert not seen.says("has not finished")
    pictures = [attrs for tag, attrs in seen.tags if tag == "img"]
    assert len(pictures) == 36
    assert all(one["alt"] and (one["src"] or "").startswith("data:image/png;base64,") for one in pictures)
    assert seen.count("svg") == 6


def test_the_data_check_begins_with_what_makes_scores_untrue(finished: Path) -> None:
    words_seen = page(finished).words
    order = ["in more than one split", "under more than one label", "can't be decoded", "more than once in one split"]
    assert sorted(order, key=words_seen.index) == order


def test_a_clean_data_check_says_so(run: Path) -> None:
    write(run / "check.json", {"total": 1797, "imbalance": 1.0})
    assert page(run).says("Nothing to act on")


def test_texts_are_shown_as_texts(tmp_path: Path) -> None:
    seen = page(text_run(tmp_path / "run"))
    assert seen.count("img") == 0
    assert seen.says(TEXTS[0])
    assert seen.says("演员很好，故事很差。")
    assert seen.says("…")
    assert seen.says("The largest class is 9 times the smallest")


def test_many_classes_fold_away(tmp_path: Path) -> None:
    seen = page(many_classes_run(tmp_path / "run"))
    assert seen.says("The other 980 classes")  # of the data
    assert seen.says("The other 980 rows")  # of the scores
    assert seen.says("Most confused classes")
    assert "heat" not in {attrs.get("class") for tag, attrs in seen.tags if tag == "table"}
    assert len(seen.source) < 3_000_000


def test_an_evaluation_of_an_older_version_looks_the_same(run: Path) -> None:
    whole = page(run).source
    for path in (run / "evaluation").iterdir():
        write(path, in_older_form(json.loads(path.read_text(encoding="utf-8"))))
    assert page(run).source == whole


def test_mistakes_show_what_their_answers_rest_on(run: Path) -> None:
    path = run / "evaluation" / "test.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    for one in values["mistakes"]:
        one["saliency"] = {"method": "Grad-CAM", "picture": png(np.zeros((8, 8))), "words": []}
    write(path, values)
    seen = page(run)
    assert seen.says("Below each image: the regions that the answer rests on, from yellow to red (Grad-CAM).")
    assert seen.source.count('class="marked"') == len(values["mistakes"])
    for one in values["mistakes"]:
        one["preview"] = text_preview("a text")
        one["saliency"] = {"method": "gradients", "picture": None, "words": [["good", 1.0], [HOSTILE, -0.5]]}
    write(path, values)
    seen = page(run)
    assert seen.says("Blue words speak for the answer, orange ones against it (gradients).")
    assert HOSTILE not in seen.source
    assert '<span class="for" style="--v:1.0">good</span>' in seen.source
    assert '<span class="against" style="--v:0.5">' in seen.source


def test_a_task_of_another_version_is_shown_with_its_units_and_answers(tmp_path: Path) -> None:
    seen = page(ages_run(tmp_path / "run"))
    assert seen.says("resnet18 was trained on faces (120 training examples).")
    assert seen.says("mean absolute error is 3.422 years (95 % interval 3.1 to 3.75 years).")
    assert seen.says(
        "3.422 years mean absolute error, test split, 12 examples 95 % interval 3.1 to 3.75 years Lower is"
    )
    assert seen.says("score Test, single view mean absolute error years 3.422 3.1 to 3.75 r2 −21.0 % −40.0 %")
    assert seen.says("Examples by value in each split. values training test all 0 to 20 50 5 55")
    assert seen.says("Ranges of targets without training examples: 60 to 80.")
    assert seen.says("31.5 is 30 face0.png")
    assert seen.says("✓ 44 face1.png")
    assert seen.says("The answers that are most wrong, the worst first.")
    for absent in ("class", "✗", "accuracy", "Each class", "None"):
        assert absent not in seen.words
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "mean absolute error: 3.422 years (95 % interval 3.1 to 3.75 years), lower is better" in card.replace(
        words.SPACE, " "
    )
    assert "class" not in card


def test_boxes_are_drawn_over_the_picture(tmp_path: Path) -> None:
    path = ages_run(tmp_path / "run")
    edit(path / "evaluation" / "test.json", samples=[boxes_entry(png(np.zeros((50, 50))))], mistakes=[])
    seen = page(path)
    (drawing,) = [attrs for tag, attrs in seen.tags if tag == "svg" and "role" not in attrs]
    assert drawing["viewbox"] == "0 0 50.0 50.0"
    (transform,) = [attrs["transform"] for tag, attrs in seen.tags if "transform" in attrs]
    assert transform == "matrix(0.25 0 0 0.25 0.0 12.5)"
    expected, answered = [attrs for tag, attrs in seen.tags if tag == "rect"]
    assert [expected[side] for side in ("class", "x", "y", "width", "height")] == [
        "expected",
        "20.0",
        "10.0",
        "40.0",
        "80.0",
    ]
    assert [answered[side] for side in ("class", "x", "y", "width", "height")] == [
        "answered",
        "24.0",
        "10.0",
        "36.0",
        "70.0",
    ]
    assert seen.says("ant 90.0 %")
    assert seen.says("1 ant 90% is 1 ant")
    assert seen.says("Solid boxes are predicted, dashed ones are true.")


def test_what_is_right_wrong_and_missed_has_strokes_of_its_own(tmp_path: Path) -> None:
    path = ages_run(tmp_path / "run")
    boxes = [([20, 10, 60, 90], "ant"), ([100, 10, 120, 30], "bee"), ([150, 50, 170, 70], "ant")]

    def side(*verdicts: str | None) -> Any:
        pairs = zip(boxes, verdicts, strict=True)
        entries = [{"box": box, "label": label, "verdict": verdict} for (box, label), verdict in pairs]
        return {"kind": "boxes", "text": "", "values": {"boxes": entries}}

    answered, true = side("right", "duplicate", None), side("right", "missed", "missed")
    picture = png(np.zeros((50, 50)))
    entry = boxes_entry(picture, answer=answered, expected=true)
    edit(path / "evaluation" / "test.json", samples=[], mistakes=[entry])
    write(path / "samples.json", [boxes_entry(picture, name=f"{HOSTILE}.png")])
    seen = page(path)
    strokes = [attrs["class"] for tag, attrs in seen.tags if tag == "rect"]
    assert strokes == [
        "answered",  # of the sample of the training split, which has its target alone
        *("expected fine", "expected mistake", "expected mistake"),
        *("answered fine", "answered mistake", "answered"),
    ]
    assert seen.says("1 right, 1 duplicate, 2 missed")
    assert seen.says("bee: duplicate")
    assert seen.says("Thick ones are mistakes")
    assert seen.says("A sample of the training split, with its targets.")
    assert not [tag for tag, _ in seen.tags if tag == "script"]


def test_figures_that_the_task_cannot_read_are_named(run: Path) -> None:
    edit(run / "evaluation" / "test.json", per_class=[{"name": "0", "f1": "high"}, {"name": "1", "f1": 0.5}])
    with pytest.raises(DamagedFile, match=r"test\.json.*figures.*classification"):
        report(run)


def test_a_task_shows_what_it_likes() -> None:
    table = Table(
        title="Ranges", columns=("range", "error"), formats=("text", "number"), rows=(("0 to 1", 0.25), (None, None))
    )
    beside = Plot(title="", x_label="true", lines=(Line(label="all", points=((1, 2), (3, 4)), weights=(1, 4)),))
    empty = Plot(title="Nothing", x_label="x", lines=(Line(label="none", points=()),))
    matrix = Matrix(title="Confusion", names=("a", "a"), counts=((3, 1), (0, 0)))
    (first, second), (third,) = section_views([table, beside, empty, matrix])
    assert first.table is not None
    assert first.table.columns == [("range", False), ("error", True)]
    assert first.table.rows == [["0 to 1", "0.25"], ["–", "–"]]
    assert first.table.bars == []
    assert second.chart is not None
    assert [dot.radius for dot in second.chart.lines[0].dots] == [4, 6]  # by area
    assert second.chart.lines[0].path == ""
    assert third.heat_map is not None
    (_, cells), (_, none) = third.heat_map
    assert [(cell.count, cell.right, cell.strength) for cell in cells] == [(3, True, 0.866), (1, False, 0.5)]
    assert [cell.strength for cell in none] == [0, 0]


def test_the_primary_metric_is_the_one_that_the_evaluation_names(run: Path) -> None:
    edit(run / "evaluation" / "test.json", headline="balanced_accuracy", interval=None, intervals={})
    seen = page(run)
    assert seen.says("balanced accuracy is")
    assert not seen.says("(95 % interval")


# --- what it says about speed ----------------------------------------------------------------


def test_what_limits_the_run_and_what_would_help(finished: Path) -> None:
    seen = page(finished)
    assert seen.says("Limited by computing: 83 % of the step is the forward and backward pass.")
    assert seen.says("would make a step cheaper. At most, a step becomes 1.30 times as fast.")
    assert seen.says("backward pass 109 ms 52.0 %")
    assert seen.says("One training step of 210 ms, from 25 timed steps. Not distinguished here: copying to the device")
    assert seen.says("After step 120: memory ran out; going on from step 100 without graphs")
    assert seen.says("In use from then on: channels_last, bf16")


def test_every_trial_has_its_measurement(finished: Path) -> None:
    seen = page(finished)
    assert seen.says("In use: channels_last, bf16, 2 CPU threads. Chosen by trials on this machine")
    assert seen.says("which took 3.2 s.")
    assert seen.says("bf16 in use 1.42 ± 0.03 5 0.004")
    assert seen.says("fused_optimizer not used 0.98 ± 0.02 5 0")
    assert seen.says("float16 outputs differ by 0.31")
    assert seen.says("1 thread not used 0.63 ± 0.05 3 –")
    assert seen.says("without bf16 and tf32 not possible on a CPU not used – – –")
    assert seen.says("compile would cost 45 s and win 3 s")
    assert not seen.says("0.98 times as fast")  # the figure is in its own column
    assert not seen.says("measured 2 % slower here")  # its trial says it
    assert seen.says("graphs it failed in training: memory ran out not used 1.31 ± 0.02 5 0")  # kept, then lost


PLAN = {"device": "cpu", "speedups": ["bf16"]}


def test_a_plan_without_trials(run: Path) -> None:
    edit(run / "summary.json", plan=PLAN | {"dropped": {"graphs": "needs a GPU"}}, diagnosis=None)
    seen = page(run)
    assert seen.says("In use: bf16.")
    assert seen.says("1 speedup not tried, and why")
    assert seen.says("graphs needs a GPU")
    assert not seen.says("times as fast rounds")


def test_a_gain_within_the_spread_is_named_as_such(run: Path) -> None:
    reason = "1.02 times as fast (spread 0.03, 6 rounds)"
    trial = {"change": "+compile", "kept": False, "reason": reason, "ratio": 1.02, "spread": 0.03, "rounds": 6}
    edit(run / "summary.json", plan=PLAN | {"trials": [trial]})
    assert page(run).says("compile not clearly faster not used 1.02 ± 0.03 6 –")


def test_the_verdict_of_an_older_run_stays(run: Path) -> None:
    edit(run / "summary.json", limited_by="computing: it was busy", diagnosis=None, input_share=0.3)
    assert page(run).says("Computing: it was busy.")


def circles(seen: Page, kind: str) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in seen.tags if tag == "circle" and attrs.get("class") == kind]


def test_the_roofline_places_every_layer_with_operations(finished: Path) -> None:
    seen = page(finished)
    dots = circles(seen, "area")
    assert len(dots) == 8  # layers with operations and bytes
    radii = [float(one["r"] or 0) for one in dots]
    assert radii[0] == max(radii)
    assert seen.says("1: groups.0.0 (Conv2d), 25.5 % of the forward pass, 277 GFLOP/s at 123 FLOP per byte, 68 %")
    assert seen.says("bfloat16, at most 410 GFLOP/s")
    assert seen.says("float32, at most 210 GFLOP/s")  # the better of matrix product and convolution
    assert seen.says("groups.0.1 MaxPool2d 2.48 ms 10.3 % – 3.92 G 26 % memory")
    assert seen.says("(model) SpeedNet 1.61 ms 6.7 % – – – –")
    assert seen.says("One forward pass of 128 examples takes 24.1 ms, at 39.8 MFLOP an example.")
    assert not seen.says("suanli device --probe")


@pytest.mark.parametrize("ceilings", [None, {}, {"memory_bytes_per_s": 1e10}, {"matmul_flops": {"float32": 1e11}}])
def test_without_measured_ceilings_there_are_dots_and_the_command(run: Path, ceilings: Any) -> None:
    write(run / "roofline.json", roofline(ceilings))
    seen = page(run)
    assert seen.says("To measure it: suanli device --probe")
    assert len(circles(seen, "area")) == 8
    assert not seen.says("of the roof")


def test_a_bench_is_reported_in_full(tmp_path: Path) -> None:
    seen = page(bench_run(tmp_path / "cifar10-bench-1"))
    assert seen.says("speednet bench on cifar10")
    assert seen.says(
        "Plain PyTorch and 6 changes, added one after the other: speednet on cifar10, measured on AMD EPYC 9R14"
    )
    assert seen.says("Training reaches 1,980 examples per second, 2.83 times plain PyTorch.")
    assert seen.says("Evaluation reaches 5,015 examples per second, 2.22 times plain PyTorch.")
    assert seen.says("Rejected for its score: int4_weights.")
    assert seen.says("Doesn't run here: graphs.")
    assert seen.says("+ graphs failed: needs an NVIDIA GPU")
    assert seen.says("1,000 validation examples can't show a loss as small as that: intervals are up to ±1.1 points")
    assert seen.says("Time allowed 100 of 120 steps")
    assert seen.says("2.83 × as fast as plain PyTorch, training ± 0.06, half the interquartile range")
    assert seen.headings()[0] == "Speed"  # what a bench is about comes first
    assert seen.says("A dashed bar was rejected for its score.")
    assert seen.says("Of ceiling: the share of the FLOP/s")
    assert seen.says("+ bf16 1,490 ± 25 2.13 ± 0.04 336 / 356 900.0 MB 62 % 61.5 % +0.3 (−0.9 to +1.4)")
    assert seen.says("+ int4_weights refused: accuracy falls 6.1 points 2,100 ± 36")
    assert seen.words.count("accuracy falls 6.1 points") == 1
    assert not seen.says("energy an example")  # nobody measured it
    assert not seen.says("has not finished")
    assert not seen.says("no evaluation of this run")
    assert seen.count("svg") == 2
    card = (tmp_path / "cifar10-bench-1" / "README.md").read_text(encoding="utf-8")
    assert "2.83 times plain PyTorch" in card
    assert "trained with suanli" not in card


def test_a_bench_of_a_score_that_is_better_when_lower(tmp_path: Path) -> None:
    figures = bench() | {"headline": "mean_absolute_error", "unit": "years", "tolerance": 0.034}
    for one in figures["rungs"]:
        one["scores"] = {"mean_absolute_error": 3.4}
    write(ages_run(tmp_path) / "bench.json", figures)
    seen = page(tmp_path)
    assert seen.says("mean absolute error difference to plain, years plain PyTorch")
    assert seen.says("3.4 years −0.003 (−0.014 to +0.009)")  # a gain of 0.003
    assert seen.says("the task tolerates a loss of 0.034 years.")


def test_a_bench_of_another_version_is_to_be_run_again(tmp_path: Path) -> None:
    write(tmp_path / "recipe.json", {"model": "speednet"})
    write(tmp_path / "bench.json", {})
    assert page(tmp_path).says("no figures here that this version of suanli can show. Run `suanli bench` again.")


@pytest.mark.parametrize("part", ["train", "evaluate", "difference", "refused", "scores", "speedups", "name"])
def test_any_part_of_a_variant_may_be_absent(tmp_path: Path, part: str) -> None:
    figures = bench()
    figures["rungs"] = [{key: value for key, value in one.items() if key != part} for one in figures["rungs"]]
    write(tmp_path / "recipe.json", {"model": "speednet"})
    write(tmp_path / "bench.json", figures)
    seen = page(tmp_path)
    assert seen.says("speednet bench on unknown data")
    needed = part in ("scores", "speedups", "name")  # a variant without one isn't there
    assert seen.says("Run `suanli bench` again.") == needed
    assert seen.says("+ channels_last") != needed


# --- what is missing -------------------------------------------------------------------------

PARTS = ["environment", "data", "check", "metrics", "ledger", "summary", "evaluation", "model", "roofline"]


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_absent(run: Path, part: str) -> None:
    for path in run.glob(f"{part}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert page(run).says("speednet")


def test_an_interrupted_run_says_what_to_do(run: Path) -> None:
    for name in ("evaluation", "model"):
        shutil.rmtree(run / name)
    edit(run / "summary.json", status="interrupted")
    seen = page(run)
    assert seen.says(f"This run was interrupted after step 400. To resume it: suanli train {run}")
    assert seen.says("There is no evaluation of this run yet. It needs a trained model first.")
    assert "Scores" not in seen.headings()


def test_a_run_with_nothing_but_a_recipe(tmp_path: Path) -> None:
    write(tmp_path / "recipe.json", {})
    seen = page(tmp_path)
    assert seen.says("has not finished")


def test_validation_scores_are_never_taken_for_test_scores(run: Path) -> None:
    (run / "evaluation" / "test.json").unlink()
    seen = page(run)
    assert seen.says("These are validation scores, and training uses that split")
    assert seen.says(f"suanli evaluate {run}")
    assert not seen.says("which took no part in training")


def test_every_field_may_be_absent(run: Path) -> None:
    for path in [*run.glob("*.json"), *run.glob("evaluation/*.json")]:
        write(path, {})
    write_lines(run / "metrics.jsonl", [{}])
    write_lines(run / "ledger.jsonl", [{}])
    assert page(run).says("A model was trained on the data.")


def test_null_is_the_same_as_absent(run: Path) -> None:
    for path in [*run.glob("*.json"), *run.glob("evaluation/*.json")]:
        write(path, dict.fromkeys(json.loads(path.read_text(encoding="utf-8"))))
    assert page(run).says("A model was trained on the data.")


def test_unknown_numbers_are_dashes(run: Path) -> None:
    nan, inf = math.nan, math.inf
    exam_path = run / "evaluation" / "test.json"
    scores = {"accuracy": nan, "top5": None, "balanced_accuracy": inf}
    per_class = [{"name": "0", "count": 0, "precision": nan, "recall": None, "f1": nan}]
    edit(exam_path, scores=scores, interval=[nan, nan], per_class=per_class, mistakes=[], samples=[], reliability=[])
    forecast = {"train_seconds": nan, "memory_bytes": None, "disk_bytes": inf}
    edit(run / "summary.json", seconds={"train": nan, "total": None}, forecast=forecast, peak_memory_bytes=inf)
    edit(run / "check.json", imbalance=inf, bad_share=nan)
    lines = [{"step": i, "epoch": i, "loss": (nan, inf, None)[i % 3], "lr": 0.1} for i in range(9)]
    write_lines(run / "metrics.jsonl", lines)
    seen = page(run)
    assert seen.says("accuracy is –")
    assert not re.search(r"\b(nan|inf|None)\b", seen.words)


def test_a_line_that_was_cut_short_is_left_out(run: Path) -> None:
    whole = page(run).source
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 401, "epo')
    assert page(run).source == whole


def test_steps_done_again_after_a_resume_count_once(run: Path) -> None:
    whole = page(run).source
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    wrong = ['{"step": 100, "epoch": 5, "loss": 99}\n', '{"step": 137, "epoch": 6.8, "loss": 99}\n']
    (run / "metrics.jsonl").write_text("".join([*lines[:60], *wrong, *lines[60:]]))
    assert page(run).source == whole


# --- what is wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["summary.json", "data.json", "evaluation/test.json", "recipe.json"])
@pytest.mark.parametrize("content", [b"", b'{"scores": ', b"[1, 2]", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(DamagedFile, match=Path(name).name):
        report(run)
    assert not (run / "report.html").exists()


def test_a_field_of_the_wrong_type_is_named(run: Path) -> None:
    edit(run / "summary.json", seconds={"train": "long"})
    with pytest.raises(DamagedFile, match=r"summary\.json.*seconds\.train"):
        report(run)


@pytest.mark.parametrize("where", ["nowhere", "empty", "file"])
def test_what_is_no_run_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="not a run directory") as refused:
        report(tmp_path / where)
    assert "runs/" in refused.value.fix


def test_where_nothing_can_be_written(run: Path) -> None:
    with pytest.raises(StorageError):
        report(run, out=run / "recipe.json" / "new" / "report.html")


def test_the_report_goes_where_out_says(run: Path, tmp_path: Path) -> None:
    assert report(str(run)) == run / "report.html"
    assert report(run, out=tmp_path) == tmp_path / "report.html"
    assert report(run, out=tmp_path / "new" / "mine.html").read_bytes() == (run / "report.html").read_bytes()


def test_many_at_once_write_the_same_page(run: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        pages = {path.read_bytes() for path in pool.map(report, [run] * 8)}
    assert len(pages) == 1
    assert not list(run.glob(".report*"))


# --- what is hostile -------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_elsewhere(any_run: Path) -> None:
    seen = page(any_run)
    assert not {"script", "iframe", "object", "embed", "base", "form", "audio", "video"} & {t for t, _ in seen.tags}
    policy = next(attrs for tag, attrs in seen.tags if "http-equiv" in attrs)
    assert "default-src 'none'" in (policy["content"] or "")
    for _, attrs in seen.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("srcset", "action", "formaction")]
        for key in ("src", "href"):
            assert (attrs.get(key) or "#").startswith(("#", "data:"))
    style = seen.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_names_are_only_shown(tmp_path: Path) -> None:
    seen = page(worst_run(tmp_path / "run"))
    assert "<script" not in seen.source
    assert "onerror" not in {key for _, attrs in seen.tags for key in attrs}
    assert seen.says(HOSTILE)
    assert seen.says("{{ 7 * 7 }}")
    assert seen.count("img") == 6  # none but those of boxes


def test_a_name_that_is_no_unicode(run: Path) -> None:
    text = '{"total": 1, "notes": ["caf\\udce9.png \\u0000 ok"]}'
    (run / "check.json").write_text(text)
    assert page(run).says("caf\\udce9.png")


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_any_class_name_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    path = tmp_path_factory.mktemp("run")
    write(path / "recipe.json", {})
    (path / "data.json").write_text(json.dumps({"classes": [name], "counts": {"train": {name: 1}}}))
    source = report(path).read_text(encoding="utf-8")
    cell = re.search(r'<th scope="row" class="name"><bdi>(.*?)</bdi></th>', source, re.DOTALL)
    assert cell is not None
    assert "<" not in cell[1]
    safe = name.encode("utf-8", "backslashreplace").decode()
    assert html.unescape(cell[1]) == html.unescape(html.escape(safe)).replace("\r\n", "\n").replace("\r", "\n")


# --- charts and words ------------------------------------------------------------------------

numbers = st.floats(-1e12, 1e12)


@given(numbers, numbers)
def test_ticks_hold_every_value(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    values = ticks(low, high)
    slack = (values[-1] - values[0]) * 1e-6
    assert values[0] - slack <= low
    assert values[-1] + slack >= high
    assert 2 <= len(values) <= 12


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30))
def test_a_chart_stays_in_its_frame_whatever_the_values(points: list[tuple[float, float]]) -> None:
    drawn = chart("Loss", [Series(label="a", points=points, dots=True)], x_label="step")
    usable = [p for p in points if all(abs(v) < 1e100 for v in p)]
    assert (drawn is None) == (not usable)
    if drawn is None:
        return
    places = [float(v) for v in re.findall(r"-?[\d.]+(?:e-?\d+)?", drawn.lines[0].path)]
    assert len(places) == 2 * len(usable)
    assert all(0 <= x <= 360 and 0 <= y <= 220 for x, y in zip(places[::2], places[1::2], strict=True))
    assert "nan" not in drawn.text


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_an_axis_of_shares_ends_at_100_percent(values: list[float]) -> None:
    drawn = chart("Accuracy", [Series(label="a", points=list(enumerate(values)))], x_label="epoch", y_most=1.0)
    assert drawn is not None
    assert max(float(tick.label) for tick in drawn.y_ticks) <= 1
    assert all(0 <= float(y) <= 220 for _, y in re.findall(r"([\d.]+) ([\d.]+)", drawn.lines[0].path))


positive = st.floats(1e-30, 1e30)


@given(positive, positive)
def test_decades_lie_between_the_bounds_and_are_few(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    values = decades(low, high)
    assert all(low <= value <= high for value in values)
    assert values == sorted(values)
    assert len(values) <= 9
    assert values or high < 2.6 * low


def test_a_line_of_one_point_is_drawn_as_a_dot() -> None:
    drawn = chart("Loss", [Series(label="training", points=[(0.5, 2.0)])], x_label="epoch")
    assert drawn is not None
    assert [dot.text for dot in drawn.lines[0].dots] == ["training: 2 at epoch 0.5"]


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30), st.sampled_from(["x", "xy"]))
def test_a_logarithmic_chart_stays_in_its_frame(points: list[tuple[float, float]], log: str) -> None:
    drawn = chart("Roofline", [Series(label="a", points=points, dots=True)], x_label="x", log=log)
    least = 1e-100 if log == "xy" else -1e100
    usable = [(x, y) for x, y in points if 1e-100 < x < 1e100 and least < y < 1e100]
    assert (drawn is None) == (not usable)
    if drawn is not None:
        assert len(drawn.lines[0].dots) == len(usable)
        assert all(0 <= dot.x <= 360 and 0 <= dot.y <= 220 for dot in drawn.lines[0].dots)


def test_marks_stand_where_they_hide_neither_dots_nor_one_another() -> None:
    places = [(10.0, 1.0), (10.4, 1.0), (10.8, 1.0), (100.0, 1.0), (50.0, 9.0)]
    marks = ["1", "2", "3", "4", "5"]
    series = Series(label="a", points=places, dots=True, line=False, marks=marks)
    drawn = chart("a", [series], x_label="x", x_range=(5.0, 100.0), log="x")
    assert drawn is not None
    first, second, third, last, top = drawn.lines[0].dots
    assert [dot.mark for dot in drawn.lines[0].dots] == marks
    assert first.mark_y < first.y - first.radius  # above: at its right is the next one
    assert second.mark_y - 8 > second.y + second.radius  # below
    assert third.mark_x > third.x + third.radius  # at its right
    assert last.mark_x + 7 <= 360
    assert top.mark_x > top.x


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12))
def test_marks_never_hide_one_another_and_those_on_top_stay(points: list[tuple[float, float]]) -> None:
    marks = [str(number) for number in range(len(points))]
    series = [Series(label=label, points=points, dots=True, line=False, marks=marks) for label in ("below", "on top")]
    drawn = chart("a", series, x_label="x")
    assert drawn is not None
    visible = [dot for line in drawn.lines for dot in line.dots if dot.mark]
    for number, one in enumerate(visible):
        for other in visible[:number]:
            wide = 7 * len(one.mark if one.mark_x < other.mark_x else other.mark)
            assert abs(one.mark_x - other.mark_x) >= wide - 0.2 or abs(one.mark_y - other.mark_y) >= 7.8
    assert drawn.lines[1].dots[0].mark == "0"


maybe = st.one_of(st.none(), st.floats())


@given(st.lists(st.tuples(maybe, maybe, st.booleans()), max_size=8))
def test_a_waterfall_stays_in_its_frame_and_builds_on_what_was_measured(
    steps: list[tuple[float | None, float | None, bool]],
) -> None:
    drawn_steps = [Step(name="a", value=value, half_iqr=half, refused=refused) for value, half, refused in steps]
    drawn = waterfall("Training", drawn_steps, x_label="x")
    if drawn is None:
        return
    base = 0.0
    for step, bar in zip(drawn_steps, drawn.bars, strict=True):
        measured = step.value is not None and 0 <= step.value < 1e100
        assert (bar.strong is not None) == measured
        edges = [bar.pale, bar.strong]
        assert all(one[0] >= 0 and one[0] + one[1] <= 360 for one in edges if one)
        assert not bar.whisker or 0 <= bar.whisker[0] <= bar.whisker[1] <= 360
        if measured:
            assert bar.kind == "refused" or bar.kind == ("first" if (step.value or 0.0) >= base else "second")
            base = step.value or 0.0


def test_a_waterfall_shows_gain_loss_and_refusal() -> None:
    steps = [
        Step(name="plain", value=100.0),
        Step(name="+ a", value=400.0, half_iqr=10.0),
        Step(name="+ b", value=500.0, refused=True),
        Step(name="+ c", value=None, refused=True),
        Step(name="+ d", value=300.0),
    ]
    drawn = waterfall("Training", steps, x_label="x")
    assert drawn is not None
    plain, gain, refused, failed, loss = drawn.bars
    assert [bar.kind for bar in drawn.bars] == ["first", "first", "refused", "refused", "second"]
    assert gain.pale == plain.strong  # it begins where plain ends
    assert failed.strong is None

    def ends(edge: tuple[float, float] | None) -> float:
        assert edge is not None
        return edge[0] + edge[1]

    assert ends(gain.pale) < ends(gain.strong) < ends(refused.strong)
    assert ends(refused.pale) == pytest.approx(ends(gain.strong), abs=0.2)
    assert ends(loss.pale) < ends(loss.strong)  # from 300 up to the 500 before
    assert ends(loss.strong) == pytest.approx(ends(refused.strong), abs=0.2)


@given(st.lists(st.tuples(numbers, numbers), max_size=900), st.integers(1, 300))
def test_thinning_keeps_the_course(points: list[tuple[float, float]], limit: int) -> None:
    thinned = thin(points, limit)
    assert len(thinned) == min(len(points), limit)
    if points:
        ys = [y for _, y in points]
        assert all(min(ys) - 1e-3 <= y <= max(ys) + 1e-3 for _, y in thinned)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (-math.inf, "–"), (1437, "1,437"), (0.03124, "0.03124"), (8412.4, "8,412")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (4.1e11, "410 GB"),
        (999.9, "1 kB"),
        (-1500, "−1.5 kB"),
        (2.5e-4, "250 µB"),
        (1.234e19, "1.23e+04 PB"),
    ],
)
def test_prefixes(value: float | None, text: str) -> None:
    assert words.si(value, "B").replace("\N{NO-BREAK SPACE}", " ") == text


@given(st.one_of(st.none(), st.floats()))
def test_words_take_any_number(value: float | None) -> None:
    for write_value in (words.number, words.percent, words.seconds, words.memory, words.span, words.si, words.ratio):
        assert not re.search("nan|inf", write_value(value))


# --- how it looks ----------------------------------------------------------------------------

CSS = (Path(report.__code__.co_filename).parents[1] / "reporting" / "templates" / "report.css").read_text()


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_colours_have_the_contrast_that_small_text_needs(mode: int) -> None:
    """WCAG 2.2, success criterion 1.4.3: 4.5 to 1."""
    block = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)[mode]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    for ground in ("paper", "raised"):
        for ink in ("ink", "muted", "first", "second", "good", "bad"):
            light, dark = sorted((luminance(colours[ground]), luminance(colours[ink])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ground, ink)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FRAME = """<!doctype html><iframe style="width:{width}px;height:800px;border:0"></iframe><output></output><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{
  const page = frame.contentDocument, root = page.documentElement;
  const broken = [...page.images].filter(i => i.complete && !i.naturalWidth).length;
  const captions = [...page.querySelectorAll(".caption")].map(one => one.getBoundingClientRect().width);
  const measured = {{scroll: root.scrollWidth, client: root.clientWidth, broken, alerts: page.scripts.length}};
  document.querySelector("output").textContent = JSON.stringify({{...measured, caption: Math.min(999, ...captions)}});
}};
frame.srcdoc = {source};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")
@pytest.mark.parametrize("width", [375, 1280])
def test_a_browser_shows_it_without_errors_or_sideways_scrolling(any_run: Path, tmp_path: Path, width: int) -> None:
    source = json.dumps(report(any_run, out=tmp_path).read_text(encoding="utf-8")).replace("</", "<\\/")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, source=source), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    switches = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
    switches += ["disable-component-update", "disable-sync", "enable-logging=stderr", "dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *(f"--{one}" for one in switches), "--virtual-time-budget=4000", profile, frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    measured = json.loads(html.unescape(done.stdout.rpartition("<output>")[2].partition("</output>")[0]))
    assert measured["scroll"] <= measured["client"] <= width
    assert measured["broken"] == measured["alerts"] == 0
    assert measured["caption"] >= 280  # px: also above a small confusion matrix
