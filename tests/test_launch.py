"""`suanli train --nproc`: several processes on this machine, how they fail, and how they may differ."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import suanli
from groups import run_group
from served import until
from suanli.cli import main
from suanli.core.errors import MachineError, UsageError
from suanli.core.run import Run
from suanli.parallel import preflight

SMALL = '--set=model_args={"widths": [8, 8, 8]}'
SETTINGS = ["--epochs=10", "--batch-size=64", "--speedups=none", "--device=cpu", "--seed=3", SMALL]
IN_PROCESS = {"epochs": 10, "batch_size": 64, "speedups": "none", "device": "cpu", "seed": 3, "threads": 1}
IN_PROCESS |= {"settings": {"model_args": {"widths": [8, 8, 8]}}}  # the same, as arguments


@contextmanager
def started(*arguments: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`suanli train` with these arguments, which prints into the files `out` and `err`."""
    command = [sys.executable, "-m", "suanli", "train", *map(str, arguments)]
    with Path("out").open("wb") as out, Path("err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env={**os.environ, **environment})
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def train(*arguments: object, **environment: str) -> int:
    with started(*arguments, **environment) as process:
        return process.wait()


def errors() -> str:
    return Path("err").read_text()


def members(launcher: int) -> list[int]:
    """Process ids of the started processes, each of which is a session of its own."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(words[1]) == launcher and b"suanli" in line and words[0] != "Z":
                pids.append(int(entry.name))
    return sorted(pids)


def steps_saved(run: str) -> list[int]:
    return sorted(int(p.stem.partition("-")[2]) for p in Path(run).glob("checkpoints/step-*.safetensors"))


def wait_for_checkpoint(run: str) -> None:
    until(lambda: bool(steps_saved(run)), within_s=90, what="a checkpoint")


def weights(run: Path | str) -> str:
    return hashlib.sha256((Path(run) / "model" / "weights.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An undisturbed run of two processes, in a folder with the output of the command."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert train("digits", "--nproc=2", "--out=whole", "--json", *SETTINGS) == 0, errors()
    return folder / "whole"


@pytest.fixture
def shared_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SUANLI_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.mark.usefixtures("shared_cache")
def test_two_processes_leave_one_run(whole):
    assert json.loads((whole.parent / "out").read_text())["scores"]["val_accuracy"] > 0.9
    assert "2 processes on this host agree" in (whole.parent / "err").read_text()
    assert "Warning" not in (whole.parent / "err").read_text()
    run = Run.open(whole)
    assert len(run.summary["processes"]["each"]) == 2
    assert run.summary["status"] == "finished"
    steps = [m["step"] for m in run.metrics if "loss" in m]
    assert steps == sorted(set(steps)), "more than one process has written"
    suanli.train("digits", out="one", **IN_PROCESS)
    one, two = ([m["loss"] for m in Run.open(run).metrics if "loss" in m] for run in ("one", whole))
    assert two[0] == pytest.approx(one[0], rel=1e-4)  # learning amplifies rounding: later losses are no equals
    with pytest.raises(UsageError, match="is finished"):
        suanli.train(whole, nproc=2, device="cpu")


@pytest.mark.slow
@pytest.mark.usefixtures("shared_cache")
def test_a_killed_run_resumes_to_the_same_bits(whole):
    with started("digits", "--nproc=2", "--out=killed", *SETTINGS, "--checkpoint-every-s=0.2") as process:
        wait_for_checkpoint("killed")
        os.kill(members(process.pid)[-1], signal.SIGKILL)
        assert process.wait() == 0, errors()
    assert "going on from step" in errors()
    assert weights("killed") == weights(whole)
    assert not list(Path("killed").rglob("*.tmp"))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
@pytest.mark.usefixtures("shared_cache")
def test_a_process_that_hangs_is_replaced_and_stopping_saves(capsys):
    options = ("--epochs=60", "--checkpoint-every-s=0.2", "--hang-timeout-s=4", "--balance")
    with started("digits", "--nproc=2", "--out=run", *SETTINGS, *options) as process:
        wait_for_checkpoint("run")
        first = members(process.pid)
        os.kill(first[-1], signal.SIGSTOP)
        until(lambda: f"(pid {first[-1]})" in errors(), within_s=90, what="the one that hangs is named")
        os.kill(first[-1], signal.SIGCONT)  # or torch waits half a minute before it ends it by force
        until(lambda: "going on from step" in errors(), within_s=90, what="others take their place")
        assert not set(first) & set(members(process.pid))
        before = steps_saved("run")[-1]
        until(lambda: steps_saved("run")[-1] > before, within_s=90, what="a newer checkpoint")
        process.terminate()
        assert process.wait(60) == 130, errors()
        until(lambda: not members(process.pid), within_s=60, what="all processes have ended")
    assert "suanli train run" in errors()
    run = Run.open("run")
    assert run.summary["status"] == "interrupted"
    assert sum(run.summary["processes"]["shares"]) == pytest.approx(1)
    saved = steps_saved("run")[-1]
    gone_on = suanli.train(run.path, device="cpu", threads=1)  # another number of processes
    assert gone_on.summary["status"] == "finished"
    assert f"going on from step {saved}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nproc=0"], "can't be 0"),
        (["--nproc=many"], "can't be 'many'"),
        (["--nproc=100000"], "can't be 100000"),
        (["--nproc=2", "--batch-size=1"], "can't be shared by 2"),
    ],
)
def test_numbers_of_processes_that_cant_be_right(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "digits", *arguments, "--device=cpu"])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize("options", [[], pytest.param(["--shard"], marks=pytest.mark.long)])  # all notice it, or one
def test_an_error_that_no_restart_fixes_is_reported_once(tmp_path, options):
    (tmp_path / "wrong.py").write_text(
        "from torch import nn\ndef build(**_):\n    return nn.Sequential(nn.Flatten(), nn.Linear(7, 10))\n"
    )
    line = ["digits", "--nproc=2", "--model=wrong:build", "--out=run", "--device=cpu", *options]
    assert train(*line, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])) == 2, errors()
    assert errors().count("cannot be multiplied") == 1
    assert "frame #" not in errors()


# --- what processes differ in ---


FACTS = preflight.Facts(
    host="a",
    python="3.11",
    torch="2.13",
    suanli="0.1",
    code="c0de",
    device="cpu",
    device_type="cpu",
    recipe="r",
    data="d",
    shard=False,
    clock=1000.0,
    memory_bytes=1,
    disk_bytes=10,
)


@pytest.mark.parametrize(("key", "error"), [(k, e) for k, _, e, _ in preflight.MUST_AGREE])
def test_the_process_that_differs_is_named(key, error):
    facts = [FACTS, FACTS, replace(FACTS, **{"host": "b", key: "other"})]
    with pytest.raises(error, match=r"Process 2 on b differs .*: other, where the others have"):
        preflight.compare_facts(facts)
    preflight.compare_facts([FACTS, FACTS])


def test_clock_skew_is_reported(capsys):
    preflight.compare_facts([FACTS, FACTS, replace(FACTS, host="b", clock=1100.0)])
    assert "clock of process 2 on b is off by +100 s" in capsys.readouterr().err


def test_a_full_disk_is_refused():
    preflight.refuse_full_disk("a", None, 11)
    with pytest.raises(MachineError, match="11 B on the storage of a, and 10 B are free"):
        preflight.refuse_full_disk("a", 10, 11)


def test_a_different_recipe_is_detected_before_the_first_step(tmp_path):
    line = ["-m", "suanli", "train", "digits", "--device=cpu", "--epochs=1", "--out=run"]
    done = run_group(2, line, own=lambda rank: [f"--seed={rank}"])
    assert {p.returncode for p in done} == {2}
    assert all("Process 1 on" in p.stderr and "differs in the recipe" in p.stderr for p in done)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_kills_cost_only_time():
    """`make test` has the same with one kill."""
    random.seed(5)
    settings = [*SETTINGS, "--epochs=300"]
    assert train("digits", "--nproc=2", "--out=whole", *settings) == 0
    whole_steps = Run.open("whole").summary["steps"]
    options = ("--checkpoint-every-s=0.5", "--max-restarts=60")
    with started("digits", "--nproc=2", "--out=run", *settings, *options) as process:
        for kill in range(50):
            if kill % 5:  # else it is killed while it starts
                least = kill * whole_steps // 60
                until(lambda least=least: max(steps_saved("run"), default=0) > least, within_s=300, what=errors())
            time.sleep(random.uniform(0, 0.5))
            while not (alive := members(process.pid)):
                time.sleep(0.05)
            with suppress(ProcessLookupError):
                os.kill(random.choice(alive), signal.SIGKILL)
        assert process.wait() == 0, errors()
    assert weights("run") == weights("whole")
    assert not list(Path("run").rglob("*.tmp"))
