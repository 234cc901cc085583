"""A real Slurm of two nodes on this machine runs the file that `--emit slurm` makes: through the death of a process, a
SIGTERM, a cancellation and an error that stays. It keeps everything in a folder of its own and on loopback addresses.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import suanli
from groups import free_port
from served import until

pytestmark = pytest.mark.long
NODES = ("127.0.0.1", "127.0.0.2")  # names that resolve anywhere
DAEMONS = ("munged", "slurmctld", "slurmd")
MISSING = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)}: apt-get install slurm-wlm munge", allow_module_level=True)
if os.geteuid() != 0:
    pytest.skip("needs root: Slurm's daemons start processes for users", allow_module_level=True)

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=10
MpiDefault=none
NodeName={nodes[0]} Port={ports[1]} CPUs=1
NodeName={nodes[1]} Port={ports[2]} CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""


@dataclass
class Cluster:
    folder: Path

    def __call__(self, *command: str) -> str:
        """One of Slurm's commands; what it said."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        shown = self("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def log(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in self.folder.glob("*.log"))

    def processes(self, number: str = "") -> dict[int, dict[str, str]]:
        """Of a job, or of all: the environment of each, by id."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                known = dict(word.split("=", 1) for word in words if "=" in word)
                ours = known.get("SLURM_CONF") == str(self.folder / "slurm.conf")
                if ours and number in ("", known.get("SLURM_JOB_ID")) and int(entry.name) != os.getpid():
                    found[int(entry.name)] = known
        return found

    def ranks(self, number: str) -> dict[str, int]:
        """The processes of suanli in a job, by their number in its step."""
        found = {}
        for pid, known in self.processes(number).items():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if line[:1] == [sys.executable.encode()] and b"suanli" in line and "SLURM_PROCID" in known:
                    found[known["SLURM_PROCID"]] = pid
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    ports = [free_port() for _ in range(3)]
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, ports=ports, nodes=NODES))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    names = ("key-file", "log-file", "pid-file", "seed-file", "socket")
    munge = [f"--{name}={folder}/munge.{name.partition('-')[0]}" for name in names]
    made = Cluster(folder)
    started: list[subprocess.Popen[bytes]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{os.environ['PATH']}:/usr/sbin")
        patch.setenv("SLURM_CONF", str(configuration))
        try:
            started.append(_daemon(folder, ["munged", "--foreground", "--force", "--num-threads=2", *munge]))
            until((folder / "munge.socket").exists, within_s=20, what="munged listens")
            started.append(_daemon(folder, ["slurmctld", "-D", "-i"]))
            started += [_daemon(folder, ["slurmd", "-D", "-N", name]) for name in NODES]
            idle = f"{len(NODES)}\n"
            until(
                lambda: (
                    subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True).stdout
                    == idle
                ),
                within_s=60,
                every_s=0.5,
                what=f"two nodes are idle\n{made.log()}",
            )
            yield made
        finally:
            _end(made, started)


def _daemon(folder: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    with (folder / f"{command[0]}.said").open("ab") as said:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True)


def _end(cluster: Cluster, started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in reversed(started):
        process.terminate()
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        if process.poll() is None:
            process.kill()
            process.wait()
    for pid in cluster.processes():  # what a job has left
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def submitted(out: Path, *options: str, data: str = "digits") -> str:
    """A job of two processes, through the command line; its number."""
    line = ["train", data, "--out", str(out), "--nodes", "2", "--threads", "1", "--device", "cpu", "--speedups", "none"]
    command = [sys.executable, "-m", "suanli", *line, *options, "--emit", "slurm", "--submit", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["submitted"].split()[-1])


def said(number: str) -> str:
    (path,) = Path.cwd().glob(f"*-{number}.out")
    return path.read_text(errors="replace")


def put_back(cluster: Cluster, number: str) -> None:
    """Waits until the job is back in its queue."""
    until(
        lambda: (job := cluster.job(number))["Restarts"] == "1" and job["JobState"] == "PENDING",
        within_s=60,
        every_s=0.3,
        what=f"back in the queue: {cluster.job(number)}",
    )


def begin(cluster: Cluster, number: str) -> None:
    """Sooner than the two minutes after which Slurm would; at once its nodes still refuse the number."""
    cluster("scontrol", "update", f"JobId={number}", "StartTime=now+3")


def ended(cluster: Cluster, number: str) -> dict[str, str]:
    """Waits until the job has ended."""
    until(
        lambda: cluster.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"),
        within_s=150,
        every_s=0.5,
        what="the job has ended",
    )
    return cluster.job(number)


def trains(cluster: Cluster, number: str, out: Path) -> None:
    """Waits until both processes do, and have saved a checkpoint."""
    until(
        lambda: len(cluster.ranks(number)) == 2 and any(out.glob("checkpoints/*")),
        within_s=120,
        every_s=0.1,
        what="two processes and a checkpoint",
    )


def test_a_job_goes_on_after_the_death_of_a_process(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    number = submitted(out, "--epochs", "6", "--checkpoint-every-s", "0.2")
    trains(cluster, number, out)
    ranks = cluster.ranks(number)
    nodes = {rank: cluster.processes(number)[pid]["SLURMD_NODENAME"] for rank, pid in ranks.items()}
    assert nodes == dict(zip("01", NODES, strict=True))
    os.kill(ranks["1"], signal.SIGKILL)
    put_back(cluster, number)
    assert not cluster.ranks(number)  # none of them has outlived the other
    begin(cluster, number)
    assert ended(cluster, number)["JobState"] == "COMPLETED", said(number)
    run = suanli.Run.open(out)
    assert run.summary["status"] == "finished"
    assert run.summary["epochs"] == 6
    validated = [m["epoch"] for m in run.metrics if m.get("split") == "val"]
    assert validated == sorted(set(validated))
    assert "code 137: the job is put back" in said(number)
    assert not list(tmp_path.glob(".suanli*"))
    assert suanli.evaluate(run, device="cpu").scores["accuracy"] > 0.8


def test_a_job_that_is_asked_to_stop_saves_and_is_put_back(cluster: Cluster, tmp_path: Path) -> None:
    """As before a time limit. Then it is cancelled, which is the end."""
    out = tmp_path / "run"
    number = submitted(out, "--epochs", "1000")
    until(lambda: (out / "metrics.jsonl").exists(), within_s=120, what="it trains", every_s=0.1)
    assert not list(out.glob("checkpoints/*"))
    cluster("scancel", "--signal=TERM", number)
    put_back(cluster, number)
    assert list(out.glob("checkpoints/*"))
    assert suanli.Run.open(out).summary["status"] == "interrupted"
    begin(cluster, number)
    until(lambda: len(cluster.ranks(number)) == 2, within_s=60, what="it runs again", every_s=0.1)
    cluster("scancel", number)
    until(lambda: not cluster.processes(number), within_s=60, what="its processes are gone", every_s=0.2)
    time.sleep(1)
    job = cluster.job(number)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "1")


def test_an_error_that_stays_is_told_once(cluster: Cluster, tmp_path: Path) -> None:
    """And a name that isn't meant well is only a name, for sbatch too."""
    number = submitted(tmp_path / "run", data="nowhere\r\n#SBATCH --nodes=1\n'$(touch harmed)'.zip")
    job = ended(cluster, number)
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("FAILED", "0", "1:0")
    assert "nowhere\r\n#SBATCH" in json.loads(said(number).splitlines()[-1])["message"]
    assert job["NumNodes"] == "2"
    assert not (tmp_path / "harmed").exists()
