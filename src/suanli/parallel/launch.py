"""Starts the processes that train one run together on this machine, by torch's elastic agent, the one of torchrun.

It tells each process who it is, and where one dies starts all of them anew, which then go on from the run's newest
checkpoint. What this adds is the account: an error that no new start can mend ends the run at once, with its own exit
code.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.console import plural, say
from suanli.core.errors import Interrupted, MachineError, SuanliError, UsageError
from suanli.core.run import Run
from suanli.core.types import Device
from suanli.machine.device import cores
from suanli.machine.gpus import gpus
from suanli.parallel import fatal

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # torch warns of a process that has gone with a stack of C++; that is said in words
GPU = "usable GPU"
RESTARTS = 3
SHUTDOWN_S = 20  # for a process that was asked to end, before it is ended


def process_count(wanted: str | int | None, device: Device) -> int:
    """How many processes "auto" or a number is: a GPU each, and one where there are none, since one process uses all
    cores of a CPU. Raises UsageError."""
    if wanted is None:
        return 1
    if device.type == "mps" and wanted not in ("auto", "1", 1):
        raise UsageError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    if wanted == "auto":
        most, what = max_processes(device)
        return most if what == GPU else 1
    try:
        count = int(wanted)
    except ValueError:
        raise UsageError(f"--nproc can't be {wanted!r}.", fix="Give a number, or auto.") from None
    return check_count("--nproc", count, device)


def max_processes(device: Device) -> tuple[int, str]:
    """How many processes make sense on this machine, and what they are counted by: usable GPUs, else cores."""
    usable = sum(gpu.why_not is None for gpu in gpus()) if device.type == "cuda" else 0
    return (usable, GPU) if usable else (cores(), "core")


def check_count(option: str, count: int, device: Device) -> int:
    """`count`, if this machine can have so many processes. Raises UsageError that names the option."""
    most, what = max_processes(device)
    if not 1 <= count <= most:
        raise UsageError(f"{option} can't be {count}.", fix=f"This machine has {plural(most, what)}: give 1 to {most}.")
    return count


def launch_training(run: Run, count: int, arguments: Sequence[str], *, restarts: int = RESTARTS) -> None:
    """Trains `run` from its newest checkpoint with `count` processes of `suanli train RUN`.

    Raises what a process raised that no new start can mend; MachineError where they were started anew `restarts`
    times; Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count)))
    problem: SuanliError | None = None
    with tempfile.TemporaryDirectory(prefix="suanli-", ignore_cleanup_errors=True) as folder, _put_back():
        file = Path(folder) / "verdict.json"
        os.environ |= {fatal.REPORT_VARIABLE: str(file), "OMP_NUM_THREADS": threads}
        os.environ.setdefault(LOG_LEVEL, "ERROR")
        say(f"{plural(count, 'process', 'processes')}, {threads} CPU threads each")
        try:
            agent = elastic_launch(_config(count, restarts, folder), sys.executable)
            agent("-m", "suanli", "train", str(run.path), *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            problem = MachineError(
                f"Process {rank} ended {_how(failure.exitcode)}, and {plural(restarts, 'new start')} didn't help.",
                fix=f"What it said stands above. To go on from the last checkpoint: suanli train {run.path}",
            )
        except SignalException as error:
            name = signal.Signals(error.sigval).name
            problem = Interrupted(f"Stopped by {name}.", fix=f"Go on with: suanli train {run.path}")
        word = fatal.read_report(file, interrupted=isinstance(problem, Interrupted))
    if word is not None:
        raise fatal.restore_error(word)
    if problem is not None:
        raise problem


def _config(count: int, restarts: int, folder: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # it is said here, in fewer words
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="suanli",
        role="train",
        # The agent unpickles its state. In a file of this user's, nobody else can write it.
        rdzv_backend="c10d",
        rdzv_endpoint=str(Path(folder) / "rendezvous"),
        rdzv_configs={"store_type": "file", "last_call_timeout": 1},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        monitor_interval=0.2,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.OUT),  # the result is printed by this process
    )


@contextmanager
def _put_back() -> Iterator[None]:
    """Environment and signal handlers are afterwards as before: torch's agent leaves its own behind."""
    environment = dict(os.environ)
    numbers = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in numbers} if main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
