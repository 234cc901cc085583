"""The report's section about engines: what it says, with any part of engines.json absent, wrong or hostile."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from report_runs import HOSTILE, ages_run, hostile_engines, write
from suanli.core.errors import DamagedFile
from suanli.core.types import Difference
from suanli.engines.candidates import Candidate, Estimate, SearchResult, Speed
from suanli.verbs.report import report
from test_report import Page, circles, page


def speeds(ms: float, *, joules: float | None = None) -> tuple[Speed, ...]:
    """One input on one thread takes three times as long as on two; 64 at once take 20 times one."""
    each = [(1, 1, 3.0), (1, 2, 1.0), (64, 2, 20.0)]
    return tuple(
        Speed(batch=batch, threads=threads, calls=50, joules=joules, **paces(ms * times / 1000))
        for batch, threads, times in each
    )


def paces(p50_s: float) -> dict[str, float]:
    return {"p50_s": p50_s, "p95_s": p50_s * 1.5, "p99_s": p50_s * 2}


EAGER = Candidate(
    engine="eager",
    precision="float32",
    state="accepted",
    reason="reference",
    score=0.9375,
    difference=Difference(median=0.0, low=-0.0004, high=0.0004),
    drift=0.0,
    build_s=1.02,
    load_s=1.15,
    size_bytes=1_200_000,
    memory_bytes=322_000_000,
    speeds=speeds(0.8, joules=0.004),
)
INT8 = replace(
    EAGER,
    engine="openvino",
    precision="int8",
    reason="",
    score=0.9356,
    difference=Difference(median=-0.0019, low=-0.0045, high=0.0007),
    drift=0.02,
    build_s=2.3,
    load_s=0.166,
    size_bytes=360_000,
    memory_bytes=None,
    speeds=speeds(0.2, joules=0.001),
    best=True,
)
RESCUED = replace(INT8, engine="onnxruntime", kept=("a", "b"), score=0.9369, speeds=speeds(0.25), best=True)
SLOW = replace(EAGER, engine="inductor", reason="", speeds=speeds(1.0))
REFUSED = replace(
    INT8, engine="onnxruntime", state="refused", reason="accuracy -6.10 points (-7.00 to -5.20)", speeds=(), best=False
)
LOST = Candidate(engine="aot_inductor", precision="int8", state="lost", reason="while it was timed: gone", build_s=9.0)
IMPOSSIBLE = Candidate(engine="tensorrt", precision="float16", state="impossible", reason="needs an NVIDIA GPU")

SEARCH = SearchResult(
    candidates=(EAGER, REFUSED, RESCUED, INT8, SLOW, LOST, IMPOSSIBLE),
    chosen=INT8,
    goal="latency",
    examples=4000,
    of_examples=5107,
    labelled=True,
    tolerance=0.005,
    graph=None,
    budget_s=180.0,
    seconds=175.7,
)


def engines(search: SearchResult = SEARCH) -> Any:
    """As `optimize` writes it."""
    machine = {"device": "AMD EPYC 9R14", "type": "cpu", "cores": 2, "instruction_sets": ["avx2"]}
    return {"format": 1, "headline": "accuracy", "machine": machine, "found": search.to_json()}


def run_with(path: Path, index: Any) -> Path:
    write(path / "recipe.json", {"model": "speednet"})
    write(path / "model" / "engines" / "engines.json", index)
    return path


def page_of(path: Path, search: SearchResult = SEARCH) -> Page:
    return page(run_with(path, engines(search)))


# --- what it says ----------------------------------------------------------------------------


def test_the_choice_has_its_gain_and_its_score(tmp_path: Path) -> None:
    seen = page_of(tmp_path)
    assert "Engines" in seen.headings()
    assert ("a", {"href": "#engines"}) in seen.tags
    assert seen.says(
        "Chosen for latency: openvino int8, 4.00× faster with one example than the baseline, eager float32. "
        "On 4,000 of 5,107 validation examples its accuracy is 93.56 %, −0.19 points against the reference "
        "(95 % interval −0.45 to +0.07). Measured on AMD EPYC 9R14 with 2 cores."
    )
    assert seen.says("a loss of up to 0.5 points of accuracy is tolerated.")
    assert seen.says("The search took 2 min 56 s of the 3 min 00 s that were allowed.")
    assert not seen.says("can't show a loss")


def test_every_candidate_is_listed_the_best_first(tmp_path: Path) -> None:
    seen = page_of(tmp_path)
    head = "# engine p50 ms p95 p99 examples/s batch, threads energy an example size memory load build accuracy"
    assert seen.says(head)
    rows = [
        "1 openvino int8 chosen, Pareto-optimal 0.2 0.3 0.4 16,000 64, 2 1 mJ 360.0 kB – 166 ms 2.3 s "
        "93.56 % −0.19 (−0.45 to +0.07)",
        "2 onnxruntime int8 (2 layers in float32) Pareto-optimal 0.25 0.375 0.5 12,800 64, 2 – 360.0 kB – 166 ms 2.3 s "
        "93.69 %",
        "3 eager float32 reference 0.8 1.2 1.6 4,000 64, 2 4 mJ 1.2 MB 322.0 MB 1.1 s 1.0 s 93.75 %",
        "4 inductor float32 1 1.5 2 3,200 64, 2 –",
        "5 onnxruntime int8 rejected: accuracy -6.10 points (-7.00 to -5.20) – – – – – 360.0 kB",
        "6 aot_inductor int8 crashed or timed out: while it was timed: gone – – – – – – – – 9.0 s –",
    ]
    places = [" ".join(seen.words.split()).find(row) for row in rows]
    assert -1 not in places
    assert places == sorted(places)
    assert seen.says("Layers in float32: the number of most sensitive layers that stayed in that precision.")
    assert seen.says("1 engine not tried, and why")
    assert seen.says("tensorrt float16 unsupported: needs an NVIDIA GPU")


def test_a_figure_without_measurements_has_no_column(tmp_path: Path) -> None:
    plain = [replace(one, speeds=speeds(0.5)) if one.speeds else one for one in SEARCH.candidates]
    assert not page_of(tmp_path, replace(SEARCH, candidates=tuple(plain))).says("energy")


@pytest.mark.parametrize(
    ("goal", "gain"),
    [
        ("latency", "{:.2f}× faster with one example than"),
        ("throughput", "{:.2f}× the throughput of"),
        ("size", "{:.1f} % of the size of"),
        ("energy", "{:.1f} % of the energy of"),
    ],
)
def test_the_gain_is_that_of_the_search(tmp_path: Path, goal: str, gain: str) -> None:
    times = EAGER.cost(goal) / INT8.cost(goal)
    seen = page_of(tmp_path, replace(SEARCH, goal=goal))
    assert seen.says(f"Chosen for {goal}: openvino int8, {gain.format(100 / times if '%' in gain else times)} the base")


def test_the_order_is_that_of_the_goal(tmp_path: Path) -> None:
    small = replace(SLOW, size_bytes=1000)
    seen = page_of(tmp_path, replace(SEARCH, candidates=(EAGER, INT8, small), goal="size"))
    assert seen.says("1 inductor float32 1 1.5 2")
    assert seen.says("2 openvino int8 chosen")


def test_the_reference_may_be_the_best(tmp_path: Path) -> None:
    seen = page_of(tmp_path, replace(SEARCH, chosen=EAGER, examples=5107))
    assert seen.says("Chosen for latency: eager float32, the baseline itself; no other engine is clearly better.")
    assert seen.says("On all 5,107 validation examples its accuracy is 93.75 %. Measured")


def test_too_few_examples_are_mentioned(tmp_path: Path) -> None:
    unsure = replace(INT8, difference=Difference(median=0.0, low=-0.0106, high=0.0106))
    seen = page_of(tmp_path, replace(SEARCH, chosen=unsure, candidates=(EAGER, unsure)))
    assert seen.says("So few examples can't show a loss as small as that: the interval is ±1.1 points wide.")


def test_without_labels_there_is_no_score(tmp_path: Path) -> None:
    reference, other = (replace(one, score=None, difference=None) for one in (EAGER, SLOW))
    search = replace(
        SEARCH, candidates=(reference, other), chosen=reference, labelled=False, examples=64, of_examples=64
    )
    seen = page_of(tmp_path, replace(search, graph="not installed: onnx"))
    assert seen.says("Without labelled data only float32 was tried, and answers were compared on 64 random inputs.")
    assert seen.says("There is no ONNX graph: Not installed: onnx.")
    assert seen.says("vertical: examples per second")
    assert not seen.says("accuracy")
    ups = [float(dot["cy"] or 0) for dot in circles(seen, "area")]
    assert ups[0] < ups[1]  # the reference has more inputs per second


def test_without_labels_lower_precision_is_compared_with_the_reference(tmp_path: Path) -> None:
    same = Estimate(name="answers", value=0.993, low=0.981, high=0.9975)
    away = Estimate(name="probabilities", value=0.021, low=0.019, high=0.023)
    reference = replace(EAGER, score=None, difference=None)
    other = replace(INT8, score=None, difference=None, drift=0.021, drifts=(away,), agreement=same)
    search = replace(SEARCH, candidates=(reference, other), chosen=other, labelled=False, origin="unlabelled")
    seen = page_of(tmp_path, search)
    assert seen.says(
        "On 4,000 of 5,107 examples without labels its answers differ from the reference's by 0.021 on average, and "
        "99.30 % get the same decision (95 % interval 98.1 % to 99.8 %)."
    )
    assert seen.says("differs by same answer 1 openvino int8")
    assert seen.says("0.021 99.30 %")
    assert seen.says("An engine may decide otherwise than the reference on up to 0.5 % of examples.")
    drawn = replace(
        search, chosen=replace(other, agreement=None), candidates=(reference, replace(other, agreement=None))
    )
    assert page_of(tmp_path, drawn).says("its answers differ from the reference's by 0.021 on average. Measured")


# --- the plot --------------------------------------------------------------------------------


def test_accepted_engines_have_a_dot_and_the_unbeaten_a_name(tmp_path: Path) -> None:
    seen = page_of(tmp_path)
    assert seen.says("1: openvino int8, 0.2 ms, 93.56")
    assert seen.says("3: eager float32, 0.8 ms, 93.75")
    dots = circles(seen, "area")
    assert len(dots) == 4  # neither refused nor failed ones
    others, unbeaten = dots[:2], dots[2:]
    assert sorted(float(dot["r"] or 0) for dot in unbeaten) == [4.0, 6.0]  # the chosen one is larger
    assert {dot["r"] for dot in others} == {"4.0"}
    across = {dot["r"]: float(dot["cx"] or 0) for dot in dots}
    assert across["6.0"] == min(across.values())
    # 0.2 to 0.8 ms is as far as 0.25 to 1 ms: the axis is logarithmic
    x = sorted(float(dot["cx"] or 0) for dot in dots)
    assert x[2] - x[0] == pytest.approx(x[3] - x[1], abs=0.3)
    caption = re.search(r"<figcaption>Every accepted engine.*?</figcaption>", seen.source)
    assert caption is not None
    assert re.findall(r"<strong>(\d)&nbsp;<bdi>(.*?)</bdi>", caption[0]) == [
        ("1", "openvino int8"),
        ("2", "onnxruntime int8 (2 layers in float32)"),
    ]


def test_the_lowest_score_that_is_tolerated_is_a_line_below_the_reference(tmp_path: Path) -> None:
    seen = page_of(tmp_path)
    assert seen.says("lowest tolerated")
    line = re.search(r'<g class="rule-line"><path d="M[\d.]+ ([\d.]+)L[\d.]+ ([\d.]+)"', seen.source)
    assert line is not None
    assert line[1] == line[2]
    heights = [float(dot["cy"] or 0) for dot in circles(seen, "area")]
    assert float(line[1]) > max(heights)
    assert not page_of(tmp_path, replace(SEARCH, tolerance=math.nan)).says("lowest tolerated")


def test_a_lower_score_may_be_the_better_one(tmp_path: Path) -> None:
    reference = replace(EAGER, score=3.4)
    int8 = replace(INT8, score=3.42, difference=Difference(median=-0.02, low=-0.09, high=0.05))
    search = replace(SEARCH, candidates=(reference, int8), chosen=int8, tolerance=0.034)
    path = ages_run(tmp_path)
    write(path / "model" / "engines" / "engines.json", engines(search) | {"headline": "mean_absolute_error"})
    seen = page(path)
    assert seen.says("its mean absolute error is 3.42 years, +0.02 years against the reference (95 % interval −0.05 to")
    assert seen.says("a loss of up to 0.034 years of mean absolute error is tolerated.")
    assert seen.says("a loss as small as that: the interval is ±0.07 years wide.")
    assert seen.says("mean absolute error difference, years 1 openvino int8")
    assert seen.says("3.42 years +0.02 (−0.05 to +0.09)")
    assert seen.says("mean absolute error, years ms for one example")
    assert seen.says("highest tolerated")
    line = re.search(r'<g class="rule-line"><path d="M[\d.]+ ([\d.]+)L', seen.source)
    assert line is not None
    assert float(line[1]) < min(float(dot["cy"] or 0) for dot in circles(seen, "area"))


def test_engines_of_one_speed_and_no_other_can_be_drawn(tmp_path: Path) -> None:
    seen = page_of(tmp_path, replace(SEARCH, candidates=(EAGER,), chosen=EAGER))
    assert len(circles(seen, "area")) == 1
    assert seen.says("0.5 1 accuracy, % ms for one example (p50)")  # ticks on both sides


# --- what is missing, wrong or hostile -------------------------------------------------------


def test_no_file_no_section(tmp_path: Path) -> None:
    write(tmp_path / "recipe.json", {"model": "speednet"})
    assert "Engines" not in page(tmp_path).headings()


@pytest.mark.parametrize("index", [{}, {"found": None}, {"found": {}}, {"found": {"candidates": []}}])
def test_a_file_without_candidates_has_no_section(tmp_path: Path, index: Any) -> None:
    assert "Engines" not in page(run_with(tmp_path, index)).headings()


@pytest.mark.parametrize("content", [b"", b'{"found": ', b"[1, 2]", b"\xff\xfe\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    (run_with(tmp_path, {}) / "model" / "engines" / "engines.json").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"engines\.json"):
        report(tmp_path)


def test_a_field_of_the_wrong_type_is_named(tmp_path: Path) -> None:
    index = engines()
    index["found"]["candidates"][1]["score"] = "high"
    with pytest.raises(DamagedFile, match=r"engines\.json.*found\.candidates\.1\.score"):
        report(run_with(tmp_path, index))


def parts(value: Any, *path: Any) -> list[tuple[Any, ...]]:
    """The ways to every field, those of the first of a list only."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return [way for key, item in items for way in ((*path, key), *parts(item, *path, key))]


def test_any_field_may_be_missing(tmp_path: Path) -> None:
    whole = json.dumps(engines())
    for *way, last in parts(json.loads(whole)):
        index = holder = json.loads(whole)
        for key in way:
            holder = holder[key]
        if isinstance(holder, dict):  # what stands in a list is a record, not a field
            del holder[last]
            assert not re.search(r"\b(nan|inf|None)\b", page(run_with(tmp_path, index)).words), (*way, last)


def test_hostile_names_and_numbers_are_only_shown(tmp_path: Path) -> None:
    hostile_engines(run_with(tmp_path, {}))
    seen = page(tmp_path)
    assert "<script" not in seen.source
    assert "onerror" not in {key for _, attrs in seen.tags for key in attrs}
    assert seen.count("img") == 0
    section = seen.source.partition('<section id="engines"')[2].partition("</section>")[0]
    assert section.count("&lt;script&gt;") > 20
    assert seen.says(f"Chosen for {HOSTILE}: {HOSTILE} {'x' * 400}")
    assert not re.search(r"\b(nan|inf|None)\b", seen.words)
