"""`suanli train --hosts`: real ssh to two hosts with their own addresses, and what becomes of a training when one of
them is cut off, or isn't like the other."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import namespaces
import suanli
from namespaces import Hosts
from served import until
from suanli import remote
from suanli.errors import UsageError
from suanli.rendezvous import Rendezvous
from suanli.rundir import Run

SMALL = '--set=model_args={"widths": [8, 8, 8]}'
SETTINGS = ["--batch-size=64", "--speedups=none", "--device=cpu", "--seed=3", SMALL]
HOSTS = ["train", "digits", "--hosts=a,b", "--out=run", *SETTINGS]
ENDLESS = ["--epochs=5000", "--checkpoint-every-s=0.5"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with namespaces.made(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cache = request.getfixturevalue("tmp_path_factory").getbasetemp() / "cache"
    monkeypatch.setenv("SUANLI_CACHE", str(cache))
    yield
    if "hosts" in request.fixturenames:
        made: Hosts = request.getfixturevalue("hosts")
        for name in ("a", "b"):
            made.mend(name)
            left = made.training(name)
            for number in left:
                os.kill(number, signal.SIGKILL)
            assert not left, f"{name} still runs {left}"


class Training:
    """A command, what it says as it says it, and its end even where the test fails."""

    def __init__(self, hosts: Hosts, where: str, *words: object, **more: str) -> None:
        self.path = Path(f"said-{time.monotonic_ns()}.log").absolute()
        self.results = self.path.with_suffix(".json")
        with self.path.open("wb") as said, self.results.open("wb") as results:
            self.process = subprocess.Popen(
                hosts.command(where, *words),
                stdin=subprocess.DEVNULL,
                stdout=results,
                stderr=said,
                env={**os.environ, "PATH": namespaces.PATH, "SUANLI_SSH": hosts.ssh, **more},
                start_new_session=True,
            )

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def said(self) -> str:
        return self.path.read_text(errors="replace")

    def ends(self, within_s: float = 120) -> int:
        until(lambda: self.process.poll() is not None, within_s=within_s, every_s=0.1, what=f"it ends; {self.said}")
        return int(self.process.returncode)


def done(hosts: Hosts, *words: object, **more: str) -> Training:
    with Training(hosts, "hub", *words, **more) as training:
        training.ends()
    return training


def saved(run: str = "run") -> int:
    """The step of the newest checkpoint."""
    return max((int(p.stem.partition("-")[2]) for p in Path(run).glob("checkpoints/step-*.safetensors")), default=0)


def goes_on(training: Training, steps: int = 1, within_s: float = 90) -> int:
    """Waits for newer checkpoints; the step of the newest."""
    before = saved()

    def newer() -> bool:
        assert training.process.poll() is None, training.said
        return saved() >= before + steps

    until(newer, within_s=within_s, every_s=0.05, what=f"newer checkpoints; {training.said}")
    return saved()


def weights(run: str) -> str:
    return hashlib.sha256((Path(run) / "model" / "weights.safetensors").read_bytes()).hexdigest()


@namespaces.needed
def test_two_hosts_leave_one_run(hosts: Hosts) -> None:
    training = done(hosts, *HOSTS, "--epochs=2", "--json")
    assert training.process.returncode == 0, training.said
    assert json.loads(training.results.read_text())["scores"]["val_accuracy"] > 0.5
    assert "2 processes on 2 hosts agree" in training.said
    run = Run.open("run")
    assert sorted(one["host"] for one in run.summary["processes"]["each"]) == ["a", "b"]
    assert run.summary["status"] == "finished"
    steps = [m["step"] for m in run.metrics if "loss" in m]
    assert steps == sorted(set(steps)), "more than one process has written"
    assert not list(run.path.glob(".hosts-*"))


@namespaces.needed
@pytest.mark.long
def test_hosts_learn_what_processes_of_one_machine_do(hosts: Hosts) -> None:
    training = done(hosts, *HOSTS, "--epochs=6")
    assert training.process.returncode == 0, training.said
    command = [sys.executable, "-m", "suanli", "train", "digits", "--nproc=2", "--out=one", *SETTINGS, "--epochs=6"]
    subprocess.run(command, check=True, timeout=200)
    assert weights("run") == weights("one")


@namespaces.needed
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.long
def test_a_stop_saves_and_ends_every_host(hosts: Hosts, signal_number: int) -> None:
    with Training(hosts, "hub", *HOSTS, "--epochs=5000") as training:
        until(lambda: Path("run/metrics.jsonl").exists(), within_s=90, every_s=0.05, what="it trains")
        training.process.send_signal(signal_number)
        assert training.ends() == 130, training.said
    assert "the checkpoint is saved" in training.said
    assert saved() > 0
    assert Run.open("run").summary["status"] == "interrupted"


@namespaces.needed
@pytest.mark.long
def test_hosts_end_when_the_command_is_killed(hosts: Hosts) -> None:
    """And keep what they have learned."""
    with Training(hosts, "hub", *HOSTS, "--epochs=5000") as training:
        until(lambda: Path("run/metrics.jsonl").exists(), within_s=90, every_s=0.05, what="it trains")
        training.process.kill()
        training.process.wait()
        until(lambda: not hosts.training("a") | hosts.training("b"), within_s=90, every_s=0.2, what="hosts are empty")
    assert Run.open("run").summary["status"] == "interrupted"
    assert saved() > 0


@namespaces.needed
@pytest.mark.long
def test_a_host_that_is_cut_off_is_left_out_and_comes_back(hosts: Hosts) -> None:
    """Either host may hold the first process, so each is cut off once."""
    with Training(hosts, "hub", *HOSTS, *ENDLESS, "--min-nodes=1") as training:
        goes_on(training)
        for name, other in (("b", "a"), ("a", "b")):
            hosts.cut(name)
            until(lambda n=name: f"{n} is lost" in training.said, within_s=90, every_s=0.1, what=training.said)
            until(lambda n=name: not hosts.training(n), within_s=90, every_s=0.1, what=f"{name} has ended")
            at = saved()
            goes_on(training, within_s=120)
            went_on = [int(n) for n in re.findall(r"going on from step (\d+)", training.said)]
            assert went_on[-1] == at, training.said
            assert len(hosts.training(other)) >= 2
            assert len(Run.open("run").summary.get("processes") or {"each": [1]}) >= 1
            shown = training.said.count("2 processes on 2 hosts agree")
            hosts.mend(name)
            until(
                lambda n=shown: training.said.count("2 processes on 2 hosts agree") > n,
                within_s=120,
                every_s=0.1,
                what=f"{name} takes part again; {training.said}",
            )
            goes_on(training)
        training.process.terminate()
        assert training.ends() == 130, training.said


@namespaces.needed
@pytest.mark.long
def test_without_leave_to_go_on_alone_it_waits_and_goes_on(hosts: Hosts) -> None:
    with Training(hosts, "hub", *HOSTS, *ENDLESS) as training:
        goes_on(training)
        hosts.cut("b")
        until(lambda: "b is lost" in training.said, within_s=90, every_s=0.1, what=training.said)
        until(lambda: not hosts.training("b"), within_s=90, every_s=0.1, what="b has ended")
        at = saved()
        time.sleep(5)
        assert saved() == at
        hosts.mend("b")
        goes_on(training, within_s=120)
        training.process.terminate()
        assert training.ends() == 130, training.said


@namespaces.needed
@pytest.mark.long
def test_an_agent_that_is_killed_is_replaced(hosts: Hosts) -> None:
    with Training(hosts, "hub", *HOSTS, *ENDLESS) as training:
        goes_on(training)
        (agent,) = (number for number, line in hosts.training("b").items() if "suanli.node" in line)
        os.kill(agent, signal.SIGKILL)
        goes_on(training, steps=200, within_s=150)
        training.process.terminate()
        assert training.ends() == 130, training.said
    assert "b is lost" in training.said
    assert training.said.count("2 processes on 2 hosts agree") == 2


@namespaces.needed
@pytest.mark.long
def test_interruptions_that_tcp_survives_only_slow_it_down(hosts: Hosts) -> None:
    random.seed(7)
    with Training(hosts, "hub", *HOSTS, "--epochs=60", "--checkpoint-every-s=0.5") as training:
        goes_on(training)
        end = time.monotonic() + 30
        while training.process.poll() is None and time.monotonic() < end:
            name = random.choice("ab")
            hosts.cut(name)
            time.sleep(random.uniform(0.05, 1.5))
            hosts.mend(name)
            time.sleep(random.uniform(0.5, 2.0))
        assert training.ends(200) == 0, training.said
    assert "is lost" not in training.said
    assert "going on from" not in training.said
    assert Run.open("run").summary["status"] == "finished"


# --- what can't be -----------------------------------------------------------------------------


@namespaces.needed
def test_a_host_that_does_not_answer(hosts: Hosts) -> None:
    """Without a route, so that it is known at once."""
    training = done(hosts, "train", "digits", "--hosts=a,10.213.7.9", "--out=run", *SETTINGS)
    assert training.process.returncode == 4, training.said
    assert "10.213.7.9 can't be reached (exit code 255 of ssh)" in training.said
    assert "`ssh 10.213.7.9 true` must work" in training.said


@namespaces.needed
@pytest.mark.long
def test_a_host_with_other_code(hosts: Hosts, tmp_path: Path) -> None:
    """And one without any: a shell script in the place of Python says on b what it is told."""
    other = tmp_path / "other"
    shutil.copytree(Path(remote.__file__).parent, other / "suanli", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "suanli" / "gate.py").open("a") as stream:
        stream.write("# changed\n")
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {hosts.ssh} "$@"\n'.replace('"$@"', '"$@"'))
    ssh.chmod(0o755)
    told = 'for word; do case $word in "exec env"*) word="exec env PYTHONPATH=$OTHER ${word#exec env }";; esac; '
    ssh.write_text(f'#!/bin/bash\nargs=()\n{told}args+=("$word"); done\nexec {hosts.ssh} "${{args[@]}}"\n')
    # The variable that comes last counts, so it is taken out of what the command was given.
    training = done(hosts, *HOSTS, SUANLI_SSH=str(ssh), OTHER=str(other), PYTHONPATH="")
    assert training.process.returncode == 4, training.said
    assert re.search(r"[ab] differs in suanli's code: \w+, where this machine has \w+", training.said), training.said


def instead_of_ssh(path: Path, hosts: Hosts, command: str) -> None:
    """A script that runs `command` on the host in place of what it is given, and else is the ssh of these hosts."""
    ask = f'[ "$1" = -G ] && exec {hosts.ssh} "$@"'
    path.write_text(f'#!/bin/bash\n{ask}\nexec {hosts.ssh} "${{@:1:$#-1}}" {command}\n')
    path.chmod(0o755)


@namespaces.needed
@pytest.mark.long
def test_a_host_without_suanli(hosts: Hosts, tmp_path: Path) -> None:
    ssh = tmp_path / "ssh"
    instead_of_ssh(ssh, hosts, '"exec /nowhere/python"')
    training = done(hosts, *HOSTS, SUANLI_SSH=str(ssh))
    assert training.process.returncode == 4, training.said
    assert re.search(r"suanli can't be started on [ab] \(exit code 12[67]\): .*/nowhere/python", training.said)
    assert f"at the same path: {sys.executable}" in training.said


@namespaces.needed
def test_a_port_that_is_taken(hosts: Hosts) -> None:
    address = namespaces.ADDRESSES["hub"]
    script = f"import socket, time; s = socket.create_server(('{address}', 29400)); print(flush=True); time.sleep(300)"
    command = ["ip", "netns", "exec", hosts.names["hub"], sys.executable, "-c", script]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PATH": namespaces.PATH})
    try:
        assert other.stdout is not None
        other.stdout.readline()
        training = done(hosts, *HOSTS, f"--rendezvous={address}:29400")
    finally:
        other.kill()
        other.communicate()
    assert training.process.returncode == 4, training.said
    assert f"Port 29400 of {address} is in use" in training.said


@namespaces.needed
@pytest.mark.long
def test_a_run_that_is_not_shared(hosts: Hosts, tmp_path: Path) -> None:
    """The hosts work where the command does, but see an empty folder there."""
    ssh, empty = tmp_path / "ssh", tmp_path / "run"
    hide = f"exec unshare --mount sh -c 'mount -t tmpfs none {empty} && "
    instead_of_ssh(ssh, hosts, f'"{hide}${{@: -1}}\'"')
    training = done(hosts, *HOSTS, SUANLI_SSH=str(ssh))
    assert training.process.returncode == 4, training.said
    assert re.search(r"[ab] doesn't see the run directory run of this machine", training.said), training.said


@pytest.mark.parametrize(
    "hostile",
    [
        "-oProxyCommand=touch harmed",
        "a,-F/dev/null",
        "a;touch harmed",
        "$(touch harmed)",
        "`touch harmed`",
        "a b",
        "a\ntouch harmed",
        "a|b",
        "me@-oProxyCommand=x",
        "-l@a",
        "@a",
        "a:b/c",
        "a:4",
        "",
        "a,",
        "a,a",
        "ä",
        "a\0",
    ],
)
def test_names_that_no_host_has_start_nothing(hostile: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        remote.named(hostile)
    assert not list(tmp_path.iterdir())


def test_names_that_hosts_have() -> None:
    assert remote.named("a, me@b.example ,10.0.0.2,::1") == ["a", "me@b.example", "10.0.0.2", "::1"]


@namespaces.needed
@pytest.mark.long
def test_names_of_files_are_no_commands(hosts: Hosts, tmp_path: Path) -> None:
    """A directory and a run whose names a shell would take for more."""
    folder = tmp_path / "it's; touch harmed $(touch harmed) `touch harmed`"
    folder.mkdir()
    os.chdir(folder)
    training = done(hosts, "train", "digits", "--hosts=a,b", "--out=a 'run' $(touch harmed)", *SETTINGS, "--epochs=1")
    assert training.process.returncode == 0, training.said
    assert not list(tmp_path.rglob("harmed"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hosts": "a;b"}, "No host is called 'a;b'"),
        ({"hosts": "a,b", "min_nodes": 3}, "--min-nodes can't be 3"),
        ({"hosts": "a,b", "max_nodes": 3}, "--hosts names 2"),
        ({"min_nodes": 1}, "Add --hosts or --rendezvous"),
        ({"rendezvous": "a:1"}, "needs --max-nodes"),
        ({"rendezvous": "a:1", "max_nodes": 2}, "--rendezvous needs --out"),
        ({"rendezvous": "a:b", "max_nodes": 2, "out": "run"}, "--rendezvous can't be 'a:b'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        suanli.train("digits", device="cpu", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [("n1", "n1", 29400), ("n1:5", "n1", 5), ("[::1]:7", "::1", 7), ("[::1]", "::1", 29400)],
)
def test_where_nodes_meet(endpoint: str, host: str, port: int) -> None:
    found = Rendezvous.at(endpoint, 1, 2)
    assert (found.host, found.port, found.least, found.most) == (host, port, 1, 2)


@pytest.mark.parametrize("endpoint", ["", "-x:1", "n1:70000", "n1:x", "a b:1", "$(x):1", "n1:1:2"])
def test_where_nodes_can_not_meet(endpoint: str) -> None:
    with pytest.raises(UsageError):
        Rendezvous.at(endpoint, 1, 2)


# --- the same command on each node -------------------------------------------------------------


@namespaces.needed
@pytest.mark.long
def test_nodes_that_are_started_one_by_one(hosts: Hosts) -> None:
    """The one that was cut off ends by itself; started again, it takes part again."""
    address = namespaces.ADDRESSES["a"]
    line = ["train", "digits", "--out=run", *SETTINGS, *ENDLESS]
    line += [f"--rendezvous={address}:29400", "--min-nodes=1", "--max-nodes=2"]
    with Training(hosts, "a", *line) as first:
        with Training(hosts, "b", *line) as second:
            goes_on(first)
            hosts.cut("b")
            assert second.ends() == 4, second.said
            assert "is cut off" in second.said
            until(lambda: not hosts.training("b"), within_s=60, every_s=0.1, what="b has ended")
            goes_on(first, within_s=120)
            hosts.mend("b")
        with Training(hosts, "b", *line) as again:
            until(
                lambda: len(re.findall("2 processes on", first.said + again.said)) == 2,
                within_s=120,
                every_s=0.1,
                what=f"b takes part again; {first.said}{again.said}",
            )
            goes_on(first)
            for one in (first, again):
                one.process.terminate()
            assert again.ends() == 130, again.said
            assert first.ends() == 130, first.said
    assert Run.open("run").summary["status"] == "interrupted"
