"""Starts the processes that train one run together, on this machine, and looks after them.

The engine is torch's elastic agent, the one of torchrun: it starts the processes, tells each who it is, and where one
dies starts all of them anew, which then go on from the run's newest checkpoint. What this adds is the account: an error
that a new start can't mend is told once, with its way out, and ends the run.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli import hardware, verdict
from suanli.console import duration, plural, say
from suanli.errors import Interrupted, LostProcess, MachineError, SuanliError, UsageError, first_line
from suanli.gpus import gpus
from suanli.rendezvous import LOST_S, Members, Rendezvous, address_toward, addresses, connect, interface_of, serve
from suanli.rundir import FINISHED, Run
from suanli.types import Device

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # each start has a store of its own: in an old one are old addresses
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # warnings are stacks of C++ about a process that has gone, which is told in words
GPU = "usable GPU"
RESTARTS = 3
HANDLED = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]
SHUTDOWN_S = 20  # for a process that was asked to end, before it is ended
JOIN_S, LAST_CALL_S = 600, 15  # for enough nodes to come; for more of them once there are enough


def processes(wanted: str | int | None, device: Device) -> int:
    """How many processes "auto" or a number is: a GPU each, and one where there are none, since one process uses all
    cores of a CPU. Raises UsageError."""
    if wanted is None:
        return 1
    if device.type == "mps" and wanted not in ("auto", "1", 1):
        raise UsageError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    if wanted == "auto":
        most, what = most_processes(device)
        return most if what == GPU else 1
    try:
        count = int(wanted)
    except ValueError:
        raise UsageError(f"--nproc can't be {wanted!r}.", fix="Give a number, or auto.") from None
    return checked_count("--nproc", count, device)


def most_processes(device: Device) -> tuple[int, str]:
    """How many processes make sense on this machine, and what they are counted by: usable GPUs, else cores."""
    usable = sum(gpu.why_not is None for gpu in gpus()) if device.type == "cuda" else 0
    return (usable, GPU) if usable else (hardware.cores(), "core")


def checked_count(option: str, count: int, device: Device) -> int:
    """`count`, if this machine can have so many processes. Raises UsageError that names the option."""
    most, what = most_processes(device)
    if not 1 <= count <= most:
        raise UsageError(f"{option} can't be {count}.", fix=f"This machine has {plural(most, what)}: give 1 to {most}.")
    return count


def train_together(
    run: Run,
    count: int,
    arguments: Sequence[str],
    *,
    restarts: int = RESTARTS,
    meeting: Rendezvous | None = None,
    subject: str | None = None,
    name: str | None = None,
) -> None:
    """Trains `run` with so many processes here of `suanli train RUN`, or of `subject` in its place, from the newest
    checkpoint. With a `meeting`, the other nodes do the same; this one is called `name`.

    Raises what a process raised that no new start can mend; MachineError where they were started anew `restarts`
    times, or too few nodes came; Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    from torch.distributed import DistError
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousConnectionError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

    handlers = {s: signal.getsignal(s) for s in HANDLED} if _in_main_thread() else {}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, hardware.cores() // count)))
    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # it is told below, in fewer words
    nodes = meeting or Rendezvous(host="127.0.0.1", port=0, least=1, most=1, here=True)
    store = serve(_served(nodes.host), nodes.port) if nodes.here else connect(nodes.host, nodes.port)
    address = address_toward(nodes.host) or ("localhost" if _within(nodes.host) else socket.getfqdn())
    with tempfile.TemporaryDirectory(prefix="suanli-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "verdict.json"
        changes = {verdict.VERDICT: str(file), "OMP_NUM_THREADS": threads, NEW_STORE: "1"}
        changes |= {LOG_LEVEL: os.environ.get(LOG_LEVEL, "ERROR")}
        if meeting is not None and "GLOO_SOCKET_IFNAME" not in os.environ and (link := interface_of(address)):
            changes["GLOO_SOCKET_IFNAME"] = link  # else gloo listens where the name of the host leads: maybe to itself
        before = {variable: os.environ.get(variable) for variable in changes}
        os.environ.update(changes)
        run_id = run.path.name or "run"
        parameters = RendezvousParameters(
            "c10d",
            f"{nodes.host}:{nodes.port}",
            run_id,
            nodes.least,
            nodes.most,
            local_addr=address,
            join_timeout=JOIN_S,
            last_call_timeout=LAST_CALL_S if nodes.least < nodes.most else 1,
            keep_alive_max_attempt=int(LOST_S) // 5,
        )
        handler = create_handler(store, C10dRendezvousBackend(store, run_id), parameters)
        agent = LocalElasticAgent(
            WorkerSpec(
                role="train",
                local_world_size=count,
                entrypoint=sys.executable,
                args=("-m", "suanli", "train", subject or str(run.path), *arguments),
                rdzv_handler=handler,
                max_restarts=restarts,
                monitor_interval=0.2,
                local_addr=address,
            ),
            DefaultLogsSpecs(log_dir=folder, redirects=Std.OUT),  # the result is told here
            exit_barrier_timeout=LOST_S,
            shutdown_timeout=SHUTDOWN_S,
        )
        members = None if meeting is None else _members(agent, store, name, file)
        say(f"{plural(count, 'process', 'processes')}, {threads} CPU threads each")
        problem: SuanliError | None = None
        try:
            result = agent.run()
            handler.shutdown()  # nobody joins any more
            if result is not None and result.is_failed():
                rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp, default=(None, None))
                problem = _failed(rank, failure, restarts, run)
        except SignalException as error:
            problem = _interrupted(run, int(error.sigval))
        except RendezvousClosedError:  # the others have ended: all is done, or they say why
            problem = None if run.summary.get("status") in FINISHED else _unmet(nodes, "the others have ended")
        except (RendezvousConnectionError, DistError) as error:
            problem = LostProcess(
                f"The rendezvous at {nodes.host}:{nodes.port} is lost: {first_line(error, 200)}.",
                fix="Start this node again: it joins the others.",
            )
        except RendezvousError as error:
            problem = _unmet(nodes, first_line(error, 200) or type(error).__name__)
        finally:
            for number, before_it in handlers.items():  # torch's agent leaves its own behind
                signal.signal(number, before_it)
            for variable, value in before.items():
                os.environ.pop(variable, None) if value is None else os.environ.update({variable: value})
            if members is not None:
                members.leave(last=nodes.here)
        word = verdict.read(file, interrupted=isinstance(problem, Interrupted))
    if word is not None:
        raise verdict.error(word)
    if problem is not None:
        raise problem


def _failed(rank: int | None, failure: Any, restarts: int, run: Run) -> MachineError:
    how = "Processes failed" if failure is None else f"Process {rank} ended {_how(failure.exitcode)}"
    return MachineError(
        f"{how}, and {plural(restarts, 'new start')} didn't help.",
        fix=f"What it said stands above. To go on from the last checkpoint: suanli train {run.path}",
    )


def _unmet(nodes: Rendezvous, why: str) -> MachineError:
    many = f"{nodes.least}" if nodes.least == nodes.most else f"{nodes.least} to {nodes.most}"
    return MachineError(
        f"The nodes don't meet at {nodes.host}:{nodes.port}: {why}.",
        fix=f"Start {many} nodes within {duration(JOIN_S)}, with the same options.",
    )


def is_member() -> bool:
    """Whether this process was started by `train_together`, which has refused what can't be trained."""
    return verdict.expected() and "TORCHELASTIC_RUN_ID" in os.environ


def _served(host: str) -> str:
    """The address for a store: it listens there alone, since torch's agents trust whoever reaches it."""
    found = next(iter(addresses(host)), host)
    return "0.0.0.0" if _within(found) and not _within(host) else found  # the name leads others elsewhere


def _within(host: str) -> bool:
    """Whether a name means this machine to every machine."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _members(agent: Any, store: TCPStore, name: str | None, file: Path) -> Members:
    def group() -> tuple[str, int | None]:
        found = agent.get_worker_group()
        return (f"{found.master_addr}:{found.master_port}" if found.master_addr else "", found.group_rank)

    def workers() -> list[int]:
        return [worker.id for worker in agent.get_worker_group().workers if isinstance(worker.id, int)]

    own = connect(store.host, store.port)  # a connection of its own: the agent may wait in the other one
    members = Members(own, name or socket.gethostname(), file, group, workers)
    members.start()
    return members


def _interrupted(run: Run, number: int) -> Interrupted:
    return Interrupted(f"Stopped by {signal.Signals(number).name}.", fix=f"Go on with: suanli train {run.path}")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
