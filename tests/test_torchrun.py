"""Several machines, here two agents of the real torchrun on loopback: a process or a whole machine is lost, and what
they train goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from groups import free_port
from served import until
from suanli.core.errors import pip_install
from suanli.core.run import Run
from suanli.parallel.submission import Job, render

pytestmark = pytest.mark.long
SETTINGS = ("--out=run", "--device=cpu", "--speedups=none", "--threads=1", "--checkpoint-every-s=0.3")
SUANLI = ("-m", "suanli", "train", "digits", "--epochs=30", *SETTINGS)
Start = Callable[..., subprocess.Popen[bytes]]


@contextmanager
def machines() -> Iterator[Start]:
    """Starts agents, each with what it prints in a file of its name; ends what is left of them."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", *arguments]
        with Path(name).open("wb") as said:
            known = os.environ | environment
            started.append(subprocess.Popen(command, stdout=said, stderr=said, env=known, start_new_session=True))
        return started[-1]

    try:
        yield start
    finally:
        for agent in started:
            if agent.poll() is None:
                lose(agent)


def workers(agent: subprocess.Popen[bytes]) -> list[int]:
    return [int(word) for word in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()]


def lose(agent: subprocess.Popen[bytes]) -> None:
    """As if the machine was switched off."""
    for number in (agent.pid, *workers(agent)):
        os.kill(number, signal.SIGKILL)
    agent.wait()


def said() -> str:
    return "".join(path.read_text() for path in sorted(Path().glob("agent-*")))


def newest() -> int:
    return max((int(p.stem.partition("-")[2]) for p in Path("run").glob("checkpoints/step-*.safetensors")), default=0)


def goes_on() -> None:
    before = newest()
    until(lambda: newest() > before, within_s=120, every_s=0.1, what=f"a newer checkpoint: {said()}")


def c10d(nodes: str) -> list[str]:
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-conf=last_call_timeout=2"]
    return [f"--nnodes={nodes}", "--nproc-per-node=1", "--local-addr=127.0.0.1", "--max-restarts=5", *meeting]


def test_training_goes_on_without_a_machine_that_is_lost_and_takes_it_back() -> None:
    line, own = [*c10d("1:2"), *SUANLI, "--epochs=5000"], {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with machines() as start:
        start("agent-1", *line, **own)
        second = start("agent-2", *line, **own)
        goes_on()
        assert said().count("2 processes on this host agree") == 1
        lose(second)
        goes_on()
        start("agent-3", *line, **own)
        until(lambda: said().count("2 processes on this host agree") == 2, within_s=120, what=said())
        goes_on()


def by_hand() -> list[tuple[list[str], dict[str, str]]]:
    return [([*c10d("2"), *SUANLI], {})] * 2


def as_pods() -> list[tuple[list[str], dict[str, str]]]:
    """The command of a TrainJob, with the variables that its operator gives to each pod."""
    yaml = pytest.importorskip("yaml", reason=f"needs: {pip_install('suanli[test]')}")
    job = Job(name="x", arguments=SUANLI[3:], nodes=2, image="i")
    trainer = yaml.safe_load(render("kubernetes", job))["spec"]["trainer"]
    known = {"NNODES": trainer["numNodes"], "NPROC_PER_NODE": trainer["numProcPerNode"]}
    known |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [(trainer["args"], {f"PET_{k}": str(v) for k, v in (known | {"NODE_RANK": r}).items()}) for r in (0, 1)]


@pytest.mark.parametrize("how", [by_hand, as_pods])
def test_all_start_anew_after_one_has_died(how: Callable[[], list[tuple[list[str], dict[str, str]]]]) -> None:
    """Each agent counts its restarts by itself."""
    with machines() as start:
        agents = [start(f"agent-{i}", *line, **known) for i, (line, known) in enumerate(how())]
        goes_on()
        for agent in agents:
            os.kill(workers(agent)[0], signal.SIGKILL)
            goes_on()
        assert [agent.wait(150) for agent in agents] == [0, 0], said()
    assert "going on from step" in said()
    assert Run.open("run").summary["status"] == "finished"
