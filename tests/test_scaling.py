"""bench --scaling: one real measurement of two processes, its figures, its page, and the model that reads them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import runpy
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from report_runs import HOSTILE, write
from suanli.cli import main
from suanli.core.errors import DataError, MachineError, UsageError
from suanli.core.run import Run
from suanli.machine import device
from suanli.training import scaling
from suanli.training.scaling import judge, summarize
from suanli.verbs.bench_scaling import bench_scaling
from suanli.verbs.report import report
from suanli.verbs.train import train

MODEL = Path(__file__).parents[1] / "benchmarks" / "scaling_model.py"
two_cores = pytest.mark.skipif(device.cores() < 2, reason="two processes need two cores")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command answers, for one and two real processes."""
    folder = tmp_path_factory.mktemp("scaling")
    line = ["bench", "digits", "--scaling", "--processes", "1,2", "--device", "cpu", "--steps", "3", "--rounds", "2"]
    line += ["--model", "speednet", "--set", "model_args.widths=[4,4,4]", "--batch-size", "24"]
    line += ["--speedups", "bf16_gradients"]  # one process has no use for it
    line += ["--out", str(folder / "run"), "--cache-dir", str(folder / "cache"), "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as answer, pytest.raises(SystemExit) as stopped:
        main(line)
    assert not stopped.value.code
    figures: dict[str, Any] = json.loads(answer.getvalue())
    return figures


# --- the measurement ---


@two_cores
def test_two_real_processes_are_measured(measured: dict[str, Any]) -> None:
    one, two = measured["sizes"]
    assert [one["processes"], two["processes"]] == [1, 2]
    assert [one["threads"], two["threads"]] == [device.cores(), device.cores() // 2]
    assert sum(two["local_batch"]) == one["local_batch"][0] == measured["batch_size"]
    assert (one["speedups"], two["speedups"]) == ([], ["bf16_gradients"])
    assert two["images_per_s"]["count"] == 2
    assert one["speedup"]["median"] == one["efficiency"] == 1
    assert one["step_s"] == one["compute_s"]
    assert two["compute_s"] > 0
    assert two["all_reduce_s"] > 0 < two["latency_s"]
    assert two["norms"] > 0 == one["norms"]
    assert two["gradient_bytes"] == one["gradient_bytes"] / 2
    assert measured["seconds"] > 0


@two_cores
def test_it_leaves_a_run_with_a_report(measured: dict[str, Any]) -> None:
    run = Path(measured["run"])
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    assert [(line["metric"], line["variant"]) for line in lines] == [
        ("examples_per_s", "1 process"),
        ("examples_per_s", "2 processes"),
    ]
    page = (run / "report.html").read_text()
    assert measured["verdict"]["said"].split(".")[0] in page
    assert "Where the time of a step goes" in page
    assert "has not finished" not in page
    assert "scaling.json" in (run / "README.md").read_text()
    with pytest.raises(UsageError, match="holds the figures of a bench"):
        train(run)


def test_an_error_of_a_process_is_raised_as_its_own(tmp_path: Path) -> None:
    job = {"options": {"subject": str(tmp_path / "nowhere")}, "recipe": {}, "device": "cpu", "speedups": "none"}
    with pytest.raises(DataError, match="nowhere"):
        scaling.measure_groups([1], {**job, "steps": 2, "cache": str(tmp_path)}, 1)


def test_a_process_that_ends_is_noticed_while_the_other_waits_for_it(tmp_path: Path) -> None:
    job = {"options": {"subject": "digits"}, "recipe": {}, "device": "cpu", "speedups": "none"}
    with scaling.start_group(2, 1) as group:
        group[1]._process.kill()
        with pytest.raises(MachineError, match="Process 1 of 2 can't measure"):
            scaling.ask(group, "join", **job, steps=2, cache=str(tmp_path), threads=1)


# --- the figures ---


def every(steps_s: list[float], alone_s: list[float]) -> list[dict[str, Any]]:
    """A round, by rank: even steps together and by itself."""
    common = {"threads": 1, "speedups": [], "norms": 0, "gradient_bytes": 4_000_000, "all_reduce_s": 0.04}
    common |= {"latency_s": 1e-4, "local_batch": 64 // len(steps_s)}
    return [common | {"steps_s": [a] * 4, "alone_s": [b] * 4} for a, b in zip(steps_s, alone_s, strict=True)]


def test_a_step_is_taken_apart_in_pairs() -> None:
    """Both sides of the second round are twice as slow: neither speed-up nor parts change their share."""
    rounds = {
        1: [every([1.0], [1.0]), every([2.0], [2.0])],
        2: [every([0.8, 0.8], [0.5, 0.6]), every([1.6, 1.6], [1.0, 1.2])],
    }
    one, two = summarize(rounds, shared=False)
    assert two.speedup.median == pytest.approx(1.25)
    assert two.speedup.half_iqr == pytest.approx(0)
    assert two.efficiency == pytest.approx(0.625)
    assert (two.compute_s, two.wait_s, two.exposed_s) == pytest.approx((0.55 * 1.5, 0.05 * 1.5, 0.2 * 1.5))
    assert two.compute_s + two.wait_s + two.exposed_s == pytest.approx(two.step_s)
    assert two.images_per_s.high == pytest.approx(64 / 0.8)
    assert one.exposed_s == one.wait_s == 0
    assert "measure again" in judge((one, two), shared=False).sentences


@pytest.mark.parametrize(
    ("limit", "shared", "steps_s", "alone_s"),
    [
        ("communication", False, [0.8, 0.8], [0.51, 0.51]),
        ("waiting", False, [0.8, 0.8], [0.3, 0.75]),
        ("computing", False, [0.8, 0.8], [0.78, 0.78]),
        ("computing", True, [1.4, 1.4], [1.3, 1.3]),
        (None, True, [1.0, 1.0], [0.7, 0.7]),
        (None, False, [0.5, 0.5], [0.5, 0.5]),
    ],
)
def test_what_limits_is_the_largest_loss(
    limit: str | None, shared: bool, steps_s: list[float], alone_s: list[float]
) -> None:
    sizes = summarize({1: [every([1.0], [1.0])], 2: [every(steps_s, alone_s)]}, shared=shared)
    verdict = judge(sizes, shared=shared)
    assert verdict.limited_by == limit
    assert (scaling.LOSSES[limit][0] if limit else "Nothing limits") in verdict.sentences
    assert "nothing to compare" in judge(sizes[:1], shared=shared).sentences


# --- what can't be ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": "0"}, "--processes can't be 0"),
        ({"processes": "9999"}, "--processes can't be 9999"),
        ({"processes": "1,,2"}, "--processes can't be '1,,2'"),
        ({"rounds": 0}, "--rounds can't be 0"),
        ({"steps": 1}, "--steps can't be 1"),
        ({"processes": "1", "batch_size": 0}, "batch_size"),
        pytest.param({"processes": "2", "batch_size": 1}, "A batch of 1 can't be shared by 2", marks=two_cores),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bench_scaling("digits", device="cpu", **options)
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["--scaling", "--epochs", "3"], ["--processes", "2"]])
def test_options_that_exclude_each_other(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "digits", *words])
    assert stopped.value.code == 2
    assert "can't be used with" in capsys.readouterr().err


# --- the page ---

SIZE = asdict(summarize({1: [every([1.0], [1.0])]}, shared=True)[0])
WHOLE = dict.fromkeys(["data", "model", "device"], HOSTILE) | {
    "cores": 2,
    "batch_size": 64,
    "rounds": 1,
    "shared": True,
}
WHOLE |= {"sizes": [SIZE], "verdict": {"limited_by": None, "lost_s": {}, "said": HOSTILE}}


@pytest.mark.parametrize(
    "value",
    [
        WHOLE,
        WHOLE | {"sizes": [SIZE, {"processes": 2}]},
        WHOLE | {"sizes": [SIZE | {"step_s": math.nan, "images_per_s": SIZE["speedup"] | {"median": math.inf}}]},
        WHOLE | {"link": None, "sizes": [SIZE | {"communication_s": 0.1, "hidden_s": 0.0, "link": None}]},
    ],
)
def test_a_page_of_what_is_there(tmp_path: Path, value: dict[str, Any]) -> None:
    write(tmp_path / "recipe.json", {})
    write(tmp_path / "scaling.json", value)
    page = report(tmp_path).read_text(encoding="utf-8")
    assert "<h3>Scaling</h3>" in page
    assert page.count('<th scope="row" class="n">1</th>') == 2  # the size, in both tables
    assert "<script" not in page
    assert HOSTILE not in page


@pytest.mark.parametrize("value", [{}, {"sizes": [SIZE], "expected": {"strong": [{}]}}])
def test_figures_of_another_version_are_to_be_measured_again(tmp_path: Path, value: dict[str, Any]) -> None:
    write(tmp_path / "recipe.json", {})
    write(tmp_path / "scaling.json", value)
    assert "Run `suanli bench` again." in report(tmp_path).read_text(encoding="utf-8")


def test_an_older_run_is_read_and_resumed() -> None:
    """Its summary has what every training of several processes measured then."""
    settings = {"model_args.widths": [4, 4, 4]}
    run = train("digits", model="speednet", epochs=1, speedups="none", device="cpu", settings=settings, out="run")
    old = {"scaling": {"as_trained": True, "sizes": [SIZE]}, "aside": {"alone_s": 0.01, "steps_s": [[0.01]]}}
    write(run.path / "summary.json", run.summary | old)
    assert "<h3>Scaling</h3>" not in report(run).read_text()
    assert train("run", more_epochs=1, device="cpu").summary["epochs"] == 2
    assert Run(run.path).summary.keys().isdisjoint(old)


# --- the model ---


@two_cores
def test_what_is_expected_of_many(measured: dict[str, Any]) -> None:
    line = [sys.executable, str(MODEL), f"{measured['run']}/scaling.json", "--gbit", "10", "--latency-us", "50"]
    output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert f"a fixed batch of {measured['batch_size']}" in output
    assert [int(row.split()[0]) for row in output.splitlines()[-11:]] == [1 << power for power in range(11)]


def test_the_model_by_hand() -> None:
    it = SimpleNamespace(**runpy.run_path(str(MODEL)))
    size = {"processes": 4, "gradient_bytes": 4_000_000, "all_reduce_s": 6.006, "latency_s": 6e-3, "norms": 2}
    link = it.link_of(size)
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((1e-3, 1e6))
    assert it.all_reduce_s(4e6, 1, link) == 0
    assert it.all_reduce_s(4e6, 4, link) == pytest.approx(6e-3 + 6.0)
    assert it.exposed_s([1.0, 1.0], 10.0) == pytest.approx(1.0)  # all but the last is hidden
    assert it.exposed_s([6.0, 6.0], 10.0) == pytest.approx(7.0)  # they queue
    assert it.line([(10, 1.5), (20, 2.5)]) == pytest.approx((0.5, 0.1))
    assert it.line([(10, 1.5)]) == pytest.approx((0.0, 0.15))
    sizes = [{"processes": 1, "local_batch": [64], "compute_s": 1.0}]
    sizes.append({**size, "local_batch": [16] * 4, "compute_s": 0.4, "wait_s": 0.01})
    model = it.Model({"shared": False, "sizes": sizes}, it.Link(1e-2, 1e5), 8)
    assert model.step_s(1, 1.0) == pytest.approx(1.0)
    steps_s = [model.step_s(1 << power, 0.4) for power in range(11)]
    assert steps_s == sorted(steps_s)
    assert model.step_s(16, 0.4) > 5 * model.step_s(8, 0.4)  # between hosts
