"""Scaling: a model with the properties that any must have, a real measurement, and a page that tells them apart."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from report_runs import HOSTILE, write
from suanli import hardware, scaling_figures, scaling_groups, scaling_model
from suanli.cli import main
from suanli.errors import DataError, MachineError, UsageError
from suanli.reporting import scaling_views
from suanli.scaling_model import FREE, MOST, Cluster, Link, Work
from suanli.verbs._bench_scaling import bench_scaling
from suanli.verbs.report import report

TINY = {"model": "speednet", "batch_size": 24, "settings": {"model_args.widths": [4, 4, 4]}, "device": "cpu"}
two_cores = pytest.mark.skipif(hardware.cores() < 2, reason="two processes need two cores")

links = st.builds(Link, latency_s=st.floats(0, 1e-3), bytes_per_s=st.floats(1e7, 1e12))
clusters = st.builds(Cluster, within=links, between=st.none() | links, per_host=st.none() | st.integers(1, 16))


@st.composite
def works(draw: st.DrawFn, **fixed: Any) -> Work:
    """Points on a line, as a fixed cost and one for each example make them."""
    first, each = draw(st.floats(0, 0.1)), draw(st.floats(1e-6, 1e-2))
    batches = draw(st.lists(st.integers(1, 4096), min_size=1, max_size=4, unique=True))
    values = {
        "compute": tuple((b, first + each * b) for b in batches),
        "backward_share": draw(st.floats(0, 1)),
        "buckets": tuple(draw(st.lists(st.integers(1, 30 << 20), min_size=1, max_size=6))),
        "relative_spread": draw(st.floats(0, 0.3)),
        "norms": draw(st.integers(0, 30)),
    }
    return Work(**values | fixed)


# --- the model ---


@given(works(), clusters, st.integers(1, 4096))
def test_efficiency_of_a_fixed_batch_is_a_share_and_only_falls(work: Work, cluster: Cluster, batch: int) -> None:
    found = scaling_model.strong(work, cluster, batch, scaling_model.doublings())
    assert [one.processes for one in found] == [n for n in scaling_model.doublings() if n <= batch]
    assert all(0 < one.efficiency <= 1 + 1e-9 for one in found)
    assert all(b.efficiency <= a.efficiency * (1 + 1e-9) for a, b in pairwise(found))
    assert found[0].efficiency == pytest.approx(1)
    assert found[0].exposed_s == found[0].wait_s == found[0].communication_s == 0
    assert found[0].images_per_s == pytest.approx(batch / work.compute_s(batch))


@given(works(), clusters, st.integers(1, 512))
def test_efficiency_of_a_fixed_share_is_a_share_and_only_falls(work: Work, cluster: Cluster, share: int) -> None:
    found = scaling_model.weak(work, cluster, share, scaling_model.doublings())
    assert found[-1].processes == MOST == 1024
    assert all(one.local_batch == share for one in found)
    assert all(0 < one.efficiency <= 1 + 1e-9 for one in found)
    assert all(b.efficiency <= a.efficiency * (1 + 1e-9) for a, b in pairwise(found))


@given(works(relative_spread=0.0), st.integers(1, 512))
def test_a_free_link_and_even_steps_lose_nothing(work: Work, share: int) -> None:
    for one in scaling_model.weak(work, Cluster(within=FREE), share, [1, 8, 1024]):
        assert one.efficiency == pytest.approx(1)


def test_without_a_fixed_cost_a_fixed_batch_loses_nothing_either() -> None:
    work = Work(compute=((64, 0.64),), backward_share=0.6, buckets=(1 << 20,))
    found = scaling_model.strong(work, Cluster(within=FREE), 1024, [1, 2, 1024])
    assert [one.efficiency for one in found] == pytest.approx([1, 1, 1])


@given(works(), links, st.integers(2, 1024), st.floats(1, 100))
def test_a_slower_link_is_never_faster(work: Work, link: Link, processes: int, times: float) -> None:
    slow = Link(latency_s=link.latency_s * times, bytes_per_s=link.bytes_per_s / times)
    one, other = (
        scaling_model.expect(work, Cluster(within=used), processes=processes, batch=4096, alone_s=1.0)
        for used in (link, slow)
    )
    assert other.step_s >= one.step_s * (1 - 1e-9)


def test_a_ring_by_hand() -> None:
    link = Link(latency_s=1e-3, bytes_per_s=1e6)
    assert scaling_model.all_reduce_s(4e6, 1, link) == 0
    assert scaling_model.all_reduce_s(4e6, 4, link) == pytest.approx(6e-3 + 6.0)


def test_a_ring_over_hosts_is_as_fast_as_its_slowest_link() -> None:
    fast, slow = Link(latency_s=1e-6, bytes_per_s=1e11), Link(latency_s=1e-5, bytes_per_s=1e9)
    cluster = Cluster(within=fast, between=slow, per_host=8)
    assert cluster.link(8) == fast
    assert cluster.link(9) == slow
    assert Cluster(within=slow, between=fast, per_host=8).link(9) == slow
    assert Cluster(within=slow, between=fast, per_host=1).link(2) == fast  # no link inside a host is used


@given(links, st.integers(2, 64))
def test_the_fit_finds_the_link_again(link: Link, processes: int) -> None:
    assume(link.latency_s > 1e-6)
    sizes = (4, 4096, 1 << 16, 1 << 20, 8 << 20)
    found = scaling_model.fit_link([(s, scaling_model.all_reduce_s(s, processes, link)) for s in sizes], processes)
    assert found.latency_s == pytest.approx(link.latency_s, rel=1e-3, abs=1e-9)
    whole = scaling_model.all_reduce_s(8 << 20, processes, link)
    assert scaling_model.all_reduce_s(8 << 20, processes, found) == pytest.approx(whole, rel=1e-3)


@given(st.lists(st.tuples(st.floats(1, 1e8), st.floats(1e-6, 10)), min_size=2, max_size=8, unique_by=lambda p: p[0]))
def test_a_fit_is_never_below_nothing(points: list[tuple[float, float]]) -> None:
    assume(max(x for x, _ in points) > 1.01 * min(x for x, _ in points))
    fixed, each = scaling_model.line(points)
    assert fixed >= 0
    assert each >= 0


@pytest.mark.parametrize("points", [[], [(1, 1)], [(1, 1), (1, 2)]])
def test_a_line_needs_two_points(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="two points"):
        scaling_model.line(points)


def test_what_the_backward_pass_hides() -> None:
    assert scaling_model.exposed_s([1.0, 1.0], 10.0) == pytest.approx(1.0)  # all but the last
    assert scaling_model.exposed_s([1.0], 10.0) == pytest.approx(1.0)  # one is the last
    assert scaling_model.exposed_s([6.0, 6.0], 10.0) == pytest.approx(7.0)  # they queue
    assert scaling_model.exposed_s([1.0, 1.0], 0.0) == pytest.approx(2.0)
    assert scaling_model.exposed_s([], 1.0) == 0.0


@given(st.lists(st.integers(1, 60 << 20), max_size=80))
def test_buckets_hold_every_gradient(sizes: list[int]) -> None:
    found = scaling_model.buckets(sizes)
    assert sum(found) == sum(sizes)
    assert all(bucket >= scaling_model.BUCKET for bucket in found[1:-1])


def test_the_slowest_of_n_is_as_late_as_in_a_simulation() -> None:
    normal = statistics.NormalDist(0, 2)
    assert scaling_model.wait_s(2.0, 1) == pytest.approx(0, abs=1e-12)
    for count in (2, 8, 64):
        drawn = [max(normal.samples(count, seed=count * 10_000 + i)) for i in range(2000)]
        assert scaling_model.wait_s(2.0, count) == pytest.approx(statistics.fmean(drawn), rel=0.06)


def test_computing_passes_through_what_was_measured() -> None:
    work = Work(compute=((10, 1.5), (20, 2.0), (40, 3.2)), backward_share=0.6, buckets=())
    assert [work.compute_s(b) for b in (10, 15, 20, 40)] == pytest.approx([1.5, 1.75, 2.0, 3.2])
    assert 0 < work.compute_s(1) < 1.5
    assert work.compute_s(80) > 3.2


@pytest.mark.parametrize("processes", [0, 9])
def test_more_processes_than_examples_are_not_expected_of(processes: int) -> None:
    work = Work(compute=((8, 1.0),), backward_share=0.6, buckets=())
    with pytest.raises(ValueError, match="8 examples"):
        scaling_model.expect(work, Cluster(within=FREE), processes=processes, batch=8, alone_s=1.0)


# --- the figures ---


def told(processes: int, step_s: float, **more: Any) -> dict[str, Any]:
    """A round as a group of processes tells it: even steps of 0.9 of `step_s` without communication."""
    n = processes
    steps = [[0.9 * step_s] * 4] * n
    values = {
        "step_s": [step_s] * n,
        "compute_s": [0.9 * step_s] * n,
        "steps_s": steps,
        "input_s": [0.01 * step_s] * n,
        "backward_share": [0.6] * n,
        "local_batch": [64 // n] * n,
        "small_batch": [16 // n] * n,
        "small_s": [0.3 * step_s] * n,
        "communication_s": [0.04 * step_s if n > 1 else 0.0] * n,
        "batch": 64,
        "steps": 4,
        "threads": 1,
        "speedups": ["bf16"],
        "buckets": [1 << 20, 5 << 20],
        "norms": 0,
        "all_reduce_s": [] if n == 1 else [[4, 1e-4], [1 << 20, 1e-3], [8 << 20, 7e-3]],
    }
    return values | more


def figures(**more: Any) -> tuple[scaling_figures.Size, ...]:
    rounds = {1: [told(1, 1.0), told(1, 1.1)], 2: [told(2, 0.6, **more), told(2, 0.66, **more)]}
    return scaling_figures.sizes(rounds, batch=64, shared=False)


def test_a_step_is_taken_apart_without_a_rest() -> None:
    one, two = figures()
    assert one.efficiency == one.speedup.median == 1
    assert two.speedup.median == pytest.approx(1 / 0.6)
    assert two.efficiency == pytest.approx(1 / 1.2)
    assert two.exposed_s == pytest.approx(0.063)
    assert two.hidden_s == 0  # all of it is exposed, and more
    assert two.compute_s + two.wait_s + two.exposed_s == pytest.approx(two.step_s)
    assert one.exposed_s == one.hidden_s == one.wait_s == 0
    assert one.link is None


def test_waiting_is_not_told_as_communication() -> None:
    steps = [[0.5, 0.5], [0.6, 0.6]]
    _, two = scaling_figures.sizes(
        {1: [told(1, 1.0)], 2: [told(2, 0.6, steps_s=steps, compute_s=[0.5, 0.6])]}, batch=64, shared=False
    )
    assert two.wait_s == pytest.approx(0.05)
    assert two.exposed_s == pytest.approx(0.0, abs=1e-12)
    assert two.hidden_s == pytest.approx(0.024)


@pytest.mark.parametrize(
    ("limit", "more"),
    [
        ("communication", {"compute_s": [0.51, 0.51], "steps_s": [[0.51] * 4] * 2}),
        ("waiting", {"compute_s": [0.51, 0.51], "steps_s": [[0.51 - 0.2] * 4, [0.51 + 0.2] * 4]}),
        ("input", {"input_s": [0.3, 0.3]}),
    ],
)
def test_the_verdict_names_what_costs_most(limit: str, more: dict[str, Any]) -> None:
    found = figures(**more)
    if limit == "input":
        found = figures(**more | {"compute_s": [0.58, 0.58], "steps_s": [[0.58] * 4] * 2})
    said = scaling_figures.verdict(found, shared=False)
    assert said["limited_by"] == limit
    assert scaling_figures.LIMITS[limit][0] in said["said"]


def test_the_verdict_of_shared_cores_and_of_none() -> None:
    rounds = {1: [told(1, 1.0)], 2: [told(2, 1.3, compute_s=[1.28] * 2, steps_s=[[1.28] * 4] * 2)]}
    slow = scaling_figures.sizes(rounds, batch=64, shared=True)
    assert slow[1].efficiency == pytest.approx(1 / 1.3)
    assert scaling_figures.verdict(slow, shared=True)["limited_by"] == "cores shared"
    fast = scaling_figures.sizes({1: [told(1, 1.0)], 2: [told(2, 0.5)]}, batch=64, shared=False)
    assert scaling_figures.verdict(fast, shared=False)["limited_by"] is None
    assert "nobody" in scaling_figures.verdict(fast[:1], shared=False)["said"]
    assert scaling_figures.expectations(fast[:1], batch=64, shared=False) is None


def test_what_is_expected_is_checked_where_it_was_measured() -> None:
    expected = scaling_figures.expectations(figures(), batch=64, shared=False)
    assert expected is not None
    one, two = expected["checked"]
    assert one["difference"] == pytest.approx(0, abs=0.05)
    assert two["difference"] == pytest.approx(two["images_per_s"] / two["measured_images_per_s"] - 1)
    assert [one["processes"] for one in expected["weak"]] == scaling_model.doublings()
    assert expected["strong"][-1]["processes"] == 64  # no example for more
    assert expected["strong"][0]["images_per_s"] == pytest.approx(figures()[0].images_per_s.median, rel=0.01)
    json.dumps(expected, allow_nan=False)


# --- the measurement ---


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench of one and two real processes, through the function."""
    out = tmp_path_factory.mktemp("scaling") / "run"
    cache = tmp_path_factory.mktemp("cache")
    speedups = "bf16_gradients"  # that one process has no use for
    bench_scaling("digits", **TINY, processes="1,2", speedups=speedups, steps=3, rounds=2, out=out, cache_dir=cache)
    return out


@two_cores
@pytest.mark.slow
def test_two_real_processes_are_measured(measured: Path) -> None:
    found = json.loads((measured / "scaling.json").read_text())
    one, two = found["sizes"]
    assert [one["processes"], two["processes"]] == [1, 2]
    assert [one["threads"], two["threads"]] == [hardware.cores(), hardware.cores() // 2]
    assert sum(two["local_batch"]) == found["batch_size"] == one["local_batch"][0]
    assert two["images_per_s"]["median"] > 0
    assert two["images_per_s"]["count"] == 2
    assert two["compute_s"] + two["wait_s"] + two["exposed_s"] >= two["step_s"] * 0.9
    assert two["communication_s"] > 0
    assert two["norms"] > 0
    assert (one["speedups"], two["speedups"]) == ([], ["bf16_gradients"])
    assert sum(two["buckets"]) == sum(one["buckets"]) / 2
    assert two["link"]["latency_s"] >= 0
    assert 0 < two["backward_share"] < 1
    assert found["verdict"]["said"]
    lines = [json.loads(line) for line in (measured / "ledger.jsonl").read_text().splitlines()]
    assert [(line["metric"], line["variant"]) for line in lines] == [
        ("examples_per_s", "1 process"),
        ("examples_per_s", "2 processes"),
    ]


@two_cores
@pytest.mark.slow
def test_the_report_tells_measured_from_expected(measured: Path) -> None:
    shown = (measured / "report.html").read_text()
    assert "Measured, and what the model expects there" in shown
    assert "Expected, not measured" in shown
    assert 'href="#scaling"' in shown
    assert shown.count('<svg class="chart"') >= 3
    assert "has not finished" not in shown
    assert "scaling.json" in (measured / "README.md").read_text()


@two_cores
@pytest.mark.slow
def test_the_command_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bench", "digits", "--scaling", "--processes", "1", "--model", "speednet", "--batch-size", "24"]
    line += ["--set", "model_args.widths=[4,4,4]", "--speedups", "none", "--steps", "2", "--rounds", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*line, "--device", "cpu", "--json"])
    assert not stopped.value.code
    found = json.loads(capsys.readouterr().out)
    assert [one["processes"] for one in found["sizes"]] == [1]
    assert found["expected"] is None
    assert Path(found["run"], "report.html").exists()
    assert found["seconds"] > 0


# --- what can't be ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"processes": "0"}, "--processes can't be 0"),
        ({"processes": "-1"}, "--processes can't be -1"),
        ({"processes": "9999"}, "--processes can't be 9999"),
        ({"processes": "<script>"}, "--processes can't be '<script>'"),
        ({"processes": "1,,2"}, "--processes can't be"),
        ({"rounds": 0}, "--rounds can't be 0"),
        ({"steps": 1}, "--steps can't be 1"),
        ({"per_host": 0, "between_gbit": 1.0}, "--per-host can't be 0"),
        ({"per_host": 4}, "--between-gbit"),
        ({"between_us": 4.0}, "--between-gbit"),
        ({"per_host": 4, "between_gbit": 0.0}, "--between-gbit can't be 0"),
        ({"per_host": 4, "between_gbit": 1.0, "between_us": math.nan}, "--between-us can't be nan"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        bench_scaling("digits", device="cpu", **options)
    assert said in str(caught.value)
    assert not Path("runs").exists()


@two_cores
def test_more_processes_than_examples() -> None:
    with pytest.raises(UsageError, match="A batch of 1 can't be shared by 2 processes"):
        bench_scaling("digits", **TINY | {"batch_size": 1}, processes="2")


@pytest.mark.parametrize(
    "words",
    [
        ["--scaling", "--epochs", "3"],
        ["--processes", "2"],
    ],
)
def test_options_that_exclude_each_other(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "digits", *words])
    assert stopped.value.code == 2
    assert "can't be used with" in capsys.readouterr().err


def test_an_error_of_a_process_is_told_as_its_own(tmp_path: Path) -> None:
    wanted = {"options": {"subject": str(tmp_path / "nowhere")}, "recipe": {}, "device": "cpu", "speedups": "none"}
    with (
        pytest.raises(DataError, match="nowhere"),
        scaling_groups.group(1, {**wanted, "steps": 2, "cache": str(tmp_path)}) as group,
    ):
        group.answer()


def test_a_process_that_ends_is_told_with_what_it_said() -> None:
    with pytest.raises(MachineError, match="Process 0 of 1 ended"), scaling_groups.group(1, {"no": 1}) as group:
        group.answer()


# --- the page ---

SIZE = {"processes": 2, "threads": 1, "images_per_s": {"median": 41.2, "half_iqr": 0.4}, "efficiency": 0.97}


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"sizes": [{}]},
        {"sizes": [SIZE], "expected": {}},
        {"sizes": [SIZE], "expected": {"strong": [{}], "weak": [{"processes": 4}], "checked": [{}]}},
        {"model": HOSTILE, "data": HOSTILE, "device": HOSTILE, "verdict": {"said": HOSTILE}, "sizes": [SIZE]},
        {"sizes": [SIZE | {"step_s": math.nan, "images_per_s": {"median": math.inf}, "processes": 0}]},
        {"expected": {"weak": [{"processes": 1, "images_per_s": 1e300, "efficiency": -1e300}]}, "sizes": [SIZE]},
    ],
)
def test_a_page_of_what_is_there(tmp_path: Path, value: dict[str, Any]) -> None:
    write(tmp_path / "recipe.json", {})
    write(tmp_path / "scaling.json", value)
    shown = report(tmp_path).read_text(encoding="utf-8")
    assert 'id="scaling"' in shown
    assert "<script" not in shown
    if value.get("model") == HOSTILE:
        assert HOSTILE not in shown


def test_a_training_shows_it_beside_its_scores(tmp_path: Path) -> None:
    write(tmp_path / "recipe.json", {})
    write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0})
    write(tmp_path / "scaling.json", {"sizes": [SIZE], "verdict": {"said": "What limits is the link."}})
    shown = report(tmp_path).read_text(encoding="utf-8")
    assert shown.count("What limits is the link.") == 1


def test_a_busy_machine_is_told(tmp_path: Path) -> None:
    write(tmp_path / "recipe.json", {})
    write(tmp_path / "scaling.json", {"sizes": [SIZE, SIZE | {"images_per_s": {"median": 40.0, "half_iqr": 30.0}}]})
    shown = report(tmp_path).read_text(encoding="utf-8")
    assert "Something else used the machine" in shown
    assert "75\N{NO-BREAK SPACE}%" in shown


def test_the_terminal_and_the_page_say_the_same() -> None:
    found = figures()
    expected = scaling_figures.expectations(found, batch=64, shared=False)
    value = {"sizes": [one.to_json() for one in found], "expected": expected, "batch_size": 64, "rounds": 2}
    section = scaling_views.section(scaling_views.read(value))
    measured, steps, curves = section.tables
    assert len(measured.rows) == len(steps.rows) == 2
    assert len(curves.rows) == len(scaling_model.doublings())
    assert all(len(row) == len(table.columns) for table in section.tables for row in table.rows)
    assert len(section.charts) == 3
    assert any("no example for more" in note for note in section.notes)
