"""`suanli train --nproc`: several processes on this machine, what kills one of them, and what they differ in."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import suanli
from groups import together
from suanli import preflight
from suanli.cli import main
from suanli.errors import MachineError, UsageError
from suanli.rundir import Run

SMALL = '--set=model_args={"widths": [8, 8, 8]}'
SETTINGS = ["--epochs=6", "--batch-size=64", "--speedups=none", "--device=cpu", "--seed=3", SMALL]
IN_PROCESS = {"epochs": 6, "batch_size": 64, "speedups": "none", "device": "cpu", "seed": 3, "threads": 1}
IN_PROCESS |= {"settings": {"model_args": {"widths": [8, 8, 8]}}}  # the same, as arguments


def started(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "suanli", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env={**os.environ, **environment})


def finished(process: subprocess.Popen[str], timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return finished(started(*arguments, **environment))


def members(launcher: int) -> list[int]:
    """Process numbers of those that were started, which are sessions of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(words[1]) == launcher and b"suanli" in line and words[0] != "Z":
                found.append(int(entry.name))
    return sorted(found)


def until(condition, timeout_s: float = 90):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def steps_saved(run: Path) -> list[int]:
    return sorted(int(p.stem.partition("-")[2]) for p in (run / "checkpoints").glob("step-*.safetensors"))


def weights(run: Path) -> str:
    return hashlib.sha256((run / "model" / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.usefixtures("shared_cache")
def test_two_processes_leave_one_run():
    done = train("digits", "--nproc=2", "--balance", "--out=two", "--json", *SETTINGS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"]["val_accuracy"] > 0.9
    assert "2 processes on this host agree" in done.stderr
    assert "FutureWarning" not in done.stderr
    run = Run.open("two")
    assert len(run.summary["processes"]["each"]) == 2
    assert sum(run.summary["processes"]["shares"]) == pytest.approx(1)
    assert "shares of a batch: " in done.stderr
    assert run.summary["status"] == "finished"
    steps = [m["step"] for m in run.metrics if "loss" in m]
    assert steps == sorted(set(steps)), "more than one process has written"
    suanli.train("digits", out="one", **IN_PROCESS)
    one, two = ([m["loss"] for m in Run.open(name).metrics if "loss" in m] for name in ("one", "two"))
    assert two[0] == pytest.approx(one[0], rel=1e-4)  # learning amplifies rounding: later losses are no equals
    with pytest.raises(UsageError, match="is finished"):
        suanli.train("two", nproc=2, device="cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_what_is_killed_goes_on_to_the_same_bits(tmp_path):
    whole = train("digits", "--nproc=2", "--out=whole", *SETTINGS, "--epochs=10")
    assert whole.returncode == 0, whole.stderr
    process = started("digits", "--nproc=2", "--out=killed", *SETTINGS, "--epochs=10", "--checkpoint-every-s=0.2")
    until(lambda: steps_saved(tmp_path / "killed"))
    os.kill(members(process.pid)[-1], signal.SIGKILL)
    done = finished(process)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert not list((tmp_path / "killed").rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_sigterm_saves_and_another_number_of_processes_goes_on(tmp_path, capsys):
    process = started("digits", "--nproc=2", "--out=run", *SETTINGS, "--epochs=30", "--checkpoint-every-s=0.2")
    until(lambda: steps_saved(tmp_path / "run"))
    process.terminate()
    done = finished(process)
    assert done.returncode == 130, done.stderr
    assert "suanli train run" in done.stderr
    assert until(lambda: not members(process.pid))
    assert Run.open("run").summary["status"] == "interrupted"
    saved = steps_saved(tmp_path / "run")[-1]
    gone_on = suanli.train("run", device="cpu", threads=1)
    assert gone_on.summary["status"] == "finished"
    assert f"going on from step {saved}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
@pytest.mark.usefixtures("shared_cache")
def test_a_process_that_hangs_is_named_and_replaced(tmp_path):
    process = started(
        *("digits", "--nproc=2", "--out=run", *SETTINGS, "--epochs=10"),
        *("--checkpoint-every-s=0.2", "--hang-timeout-s=4"),
    )
    until(lambda: steps_saved(tmp_path / "run"))
    stopped = members(process.pid)[-1]
    os.kill(stopped, signal.SIGSTOP)
    done = finished(process)
    assert done.returncode == 0, done.stderr
    assert f"(pid {stopped})" in done.stderr
    assert "going on from step" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nproc=0"], "can't be 0"),
        (["--nproc=many"], "can't be 'many'"),
        (["--nproc=100000"], "can't be 100000"),
        (["--nproc=2", "--batch-size=1"], "can't be shared by 2"),
    ],
)
def test_numbers_that_make_no_sense(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", *arguments, "--device=cpu"])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("options", [[], ["--shard"]])  # all processes notice it, or the first one
def test_what_no_new_start_can_mend_is_told_once(tmp_path, options):
    (tmp_path / "wrong.py").write_text(
        "from torch import nn\ndef build(**_):\n    return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))\n"
    )
    line = ["digits", "--nproc=2", "--model=wrong:build", "--out=run", "--device=cpu", *options]
    done = train(*line, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("cannot be multiplied") == 1
    assert "frame #" not in done.stderr


# --- what processes differ in ---


FACTS = {
    "host": "a",
    "python": "3.11",
    "torch": "2.13",
    "suanli": "0.1",
    "code": "c0de",
    "device": "cpu",
    "device_type": "cpu",
    "recipe": "r",
    "data": "d",
    "shard": False,
    "clock": 1000.0,
    "memory_bytes": 1,
    "disk_bytes": 10,
}


@pytest.mark.parametrize(("key", "error"), [(k, e) for k, _, e, _ in preflight.ALIKE])
def test_who_differs_is_named(key, error):
    facts = [FACTS, FACTS, FACTS | {"host": "b", key: "other"}]
    with pytest.raises(error, match=r"Process 2 on b differs .*: other, where the others have"):
        preflight.compare(facts)
    preflight.compare([FACTS, FACTS])


def test_clocks_that_are_apart_are_told(capsys):
    preflight.compare([FACTS, FACTS, FACTS | {"host": "b", "clock": 1100.0}])
    assert "clock of process 2 on b is off by +100 s" in capsys.readouterr().err


def test_a_full_disk_is_refused():
    preflight.refuse_full_disk(FACTS | {"disk_bytes": None}, 11)
    with pytest.raises(MachineError, match="11 B on the storage of a, and 10 B are free"):
        preflight.refuse_full_disk(FACTS, 11)


def test_another_recipe_is_noticed_before_the_first_step(tmp_path):
    line = ["-m", "suanli", "train", "digits", "--device=cpu", "--epochs=1", "--out=run"]
    done = together(2, line, own=lambda rank: [f"--seed={rank}"])
    assert {p.returncode for p in done} == {2}
    assert all("Process 1 on" in p.stderr and "differs in the recipe" in p.stderr for p in done)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_fifty_kills_cost_only_time(tmp_path):
    """The like in `make test`: one kill."""
    random.seed(5)
    whole = train("digits", "--nproc=2", "--out=whole", *SETTINGS, "--epochs=300")
    assert whole.returncode == 0
    process = started(
        *("digits", "--nproc=2", "--out=run", *SETTINGS, "--epochs=300", "--checkpoint-every-s=0.5"),
        "--max-restarts=60",
    )
    kills = 0
    while kills < 50 and process.poll() is None:
        time.sleep(random.uniform(1, 15))
        if alive := members(process.pid):
            os.kill(random.choice(alive), signal.SIGKILL)
            kills += 1
    done = finished(process, 900)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert not list((tmp_path / "run").rglob("*.tmp"))
