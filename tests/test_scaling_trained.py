"""A training of several processes tells what they brought together: in its summary and in its report."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from suanli import hardware, planning
from suanli.rundir import Run
from suanli.scaling_trained import Aside, told
from suanli.verbs.report import report
from suanli.verbs.train import train

pytestmark = pytest.mark.skipif(hardware.cores() < 2, reason="two processes need two cores")
LINE = ["digits", "--nproc=2", "--epochs=8", "--batch-size=32", "--speedups=none", "--device=cpu", "--out=run"]
NETWORK = ["--model=speednet", '--set=model_args={"widths": [8, 8, 8]}']


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("trained")
    command = [sys.executable, "-m", "suanli", "train", *LINE, *NETWORK, f"--cache-dir={folder / 'cache'}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "scaling: 2 processes are" in done.stderr or "scaling: Nothing limits" in done.stderr
    return Run(folder / "run")


def test_its_figures_are_those_of_the_training_and_add_up(run):
    summary, found = run.summary, run.summary["scaling"]
    one, two = found["sizes"]
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["images_per_s"]["median"] == pytest.approx(summary["examples_per_s"])
    assert sum(two["local_batch"]) == found["batch_size"]
    assert one["local_batch"] == two["local_batch"][:1]
    assert one["images_per_s"]["median"] == pytest.approx(one["local_batch"][0] / one["step_s"])
    assert two["efficiency"] == pytest.approx(two["speedup"]["median"] / 2)
    assert two["speedup"]["median"] == pytest.approx(two["images_per_s"]["median"] / one["images_per_s"]["median"])
    assert two["communication_s"] > 0
    assert two["hidden_s"] == pytest.approx(max(0, two["communication_s"] - two["exposed_s"]))
    assert two["step_s"] <= two["compute_s"] + two["wait_s"] + two["exposed_s"] + 1e-9
    # Asking the other process in every layer takes time, on whatever machine.
    assert two["exposed_s"] > 0
    assert found["verdict"]["limited_by"] is None or found["verdict"]["limited_by"] in found["verdict"]["lost_s"]


def test_its_report_has_the_table(run):
    page = report(run).read_text()
    section = page[page.index('<section id="scaling"') :]
    section = section[: section.index("</section>")]
    assert run.summary["scaling"]["verdict"]["said"].split(".")[0] in section
    rows = [re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", section, re.DOTALL)]
    measured = dict(zip(rows[0], rows[2], strict=True))
    assert measured["processes"] == "2"
    rate = float(measured["images/s"].replace(",", ""))
    assert rate == pytest.approx(run.summary["examples_per_s"], rel=0.01)
    assert {"exposed", "hidden", "waiting", "computing"} <= set(rows[3])
    assert "expected" not in rows[0]
    assert "<svg" not in section


def test_what_goes_on_does_not_measure_it_again(run, tmp_path):
    """After a kill, that would be time in which nothing is learned."""
    shutil.copytree(run.path, tmp_path / "run")
    line = [sys.executable, "-m", "suanli", "train", "run", "--nproc=2", "--more-epochs=8", "--device=cpu"]
    line.append(f"--cache-dir={run.path.parent / 'cache'}")
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Run(tmp_path / "run").summary["aside"] == run.summary["aside"]


def test_what_computes_otherwise_measures_it_anew(run):
    found = Aside.of(run.summary["aside"])
    cpu = hardware.detect("cpu")
    plan = planning.named("none", cpu, found.threads)
    two, three = (SimpleNamespace(size=size) for size in (2, 3))
    assert found.holds(two, plan, cpu)
    assert not found.holds(three, plan, cpu)
    assert not found.holds(two, replace(plan, speedups=("channels_last",)), cpu)
    assert not found.holds(two, replace(plan, threads=found.threads + 1), cpu)
    assert not found.holds(two, plan, replace(cpu, name="another"))


def test_one_process_tells_nothing_of_it():
    quick = {"model_args": {"widths": [4, 4, 4]}}
    alone = train("digits", model="speednet", epochs=1, speedups="none", device="cpu", settings=quick)
    assert alone.summary["scaling"] is None
    assert 'id="scaling"' not in report(alone).read_text()


ASIDE = Aside(
    alone_s=0.010,
    steps_s=((0.009,) * 4, (0.012,) * 4),
    communication_s=0.004,
    local_batch=(32, 32),
    threads=1,
    norms=0,
)


@pytest.mark.parametrize(
    ("step_s", "aside", "limit"),
    [
        (0.018, ASIDE, "communication"),
        (0.0125, ASIDE, "waiting"),
        (0.015, replace(ASIDE, steps_s=((0.014,) * 4, (0.014,) * 4)), "computing together"),
        (0.0101, ASIDE, None),
    ],
)
def test_what_limits_is_the_largest_loss(step_s, aside, limit):
    found = told(aside, step_s=step_s, work=1.0, batch=64, about={})
    assert found["verdict"]["limited_by"] == limit
    assert found["sizes"][1]["efficiency"] == pytest.approx(0.010 / step_s)


def test_pictures_that_grow_are_compared_with_steps_of_their_size():
    """Half the work, half the time: as efficient as at full size."""
    whole = told(ASIDE, step_s=0.020, work=1.0, batch=64, about={})
    small = told(ASIDE, step_s=0.010, work=0.5, batch=64, about={})
    assert small["sizes"][1]["efficiency"] == pytest.approx(whole["sizes"][1]["efficiency"])


def test_what_batch_norms_ask_is_not_blamed_on_the_gradients():
    asked = told(replace(ASIDE, norms=5), step_s=0.030, work=1.0, batch=64, about={})["verdict"]
    summed = told(replace(ASIDE, norms=5), step_s=0.018, work=1.0, batch=64, about={})["verdict"]
    assert asked["limited_by"] == summed["limited_by"] == "communication"
    assert "5 batch norms ask the others" in asked["said"]
    assert "bf16_gradients" in summed["said"]
