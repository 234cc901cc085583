"""Starts the processes that train one run together on this machine, with torch's elastic agent, which torchrun uses.

The agent sets the rank of each process. Where one dies, it restarts all of them, and they resume from the run's newest
checkpoint. suanli adds that an error that no restart fixes ends the run at once, with its own exit code.
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
from suanli.core.signals import signal_name
from suanli.core.types import Device
from suanli.machine import process_environment
from suanli.machine.cpus import cores
from suanli.machine.gpus import gpus
from suanli.parallel import fatal

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"  # torch reports a lost process with a C++ stack; suanli says it in a sentence
GPU = "usable GPU"
RESTARTS = 3
SHUTDOWN_S = 20  # for a process to end by itself, before it is killed


def process_count(requested: str | int | None, device: Device) -> int:
    """The number of processes for "auto" or a number. "auto" is one per GPU, and one on a CPU, since a single process
    uses all cores. Raises UsageError."""
    if requested is None:
        return 1
    if device.type == "mps" and requested not in ("auto", "1", 1):
        raise UsageError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    if requested == "auto":
        limit, unit = max_processes(device)
        return limit if unit == GPU else 1
    try:
        count = int(requested)
    except ValueError:
        raise UsageError(f"--nproc can't be {requested!r}.", fix="Give a number, or auto.") from None
    return check_count("--nproc", count, device)


def max_processes(device: Device) -> tuple[int, str]:
    """How many processes make sense on this machine, and what they were counted by: usable GPUs, else cores."""
    usable = sum(gpu.why_not is None for gpu in gpus()) if device.type == "cuda" else 0
    return (usable, GPU) if usable else (cores(), "core")


def check_count(option: str, count: int, device: Device) -> int:
    """`count`, if it is a sensible number of processes on this machine. Raises UsageError that names the option."""
    limit, unit = max_processes(device)
    if not 1 <= count <= limit:
        fix = f"This machine has {plural(limit, unit)}: give {'1' if limit == 1 else f'1 to {limit}'}."
        raise UsageError(f"{option} can't be {count}.", fix=fix)
    return count


def launch_training(run: Run, count: int, arguments: Sequence[str], *, restarts: int = RESTARTS) -> None:
    """Train `run` from its newest checkpoint with `count` processes of `suanli train RUN`.

    Raises the error that a process reported because no restart fixes it; MachineError where all `restarts` are used
    up; Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    threads = process_environment.of_user("OMP_NUM_THREADS") or str(max(1, cores() // count))
    problem: SuanliError | None = None
    with tempfile.TemporaryDirectory(prefix="suanli-", ignore_cleanup_errors=True) as folder, _restore_process():
        file = Path(folder) / "report.json"
        os.environ |= {fatal.REPORT_VARIABLE: str(file), "OMP_NUM_THREADS": threads}
        os.environ.setdefault(LOG_LEVEL, "ERROR")
        say(f"{plural(count, 'process', 'processes')}, {threads} CPU thread{'' if threads == '1' else 's'} each")
        try:
            agent = elastic_launch(_config(count, restarts, folder), sys.executable)
            agent("-m", "suanli", "train", str(run.path), *arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            reason = _exit_reason(failure.exitcode)
            problem = MachineError(
                f"Process {rank} ended {reason}, and {plural(restarts, 'restart')} didn't help.",
                fix=f"Its own message is above. To resume from the last checkpoint: suanli train {run.path}",
            )
        except SignalException as error:
            name = signal_name(error.sigval)
            problem = Interrupted(f"Stopped by {name}.", fix=f"Resume with: suanli train {run.path}")
        report = fatal.read_report(file, interrupted=isinstance(problem, Interrupted))
    if report is not None:
        raise fatal.restore_error(**report)
    if problem is not None:
        raise problem


def _config(count: int, restarts: int, folder: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.launcher.api import LaunchConfig

    for logger in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(logger).setLevel(logging.CRITICAL)  # `launch_training` reports the same in one sentence
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id="suanli",
        role="train",
        # The agent unpickles its state, so it lies in a file that only this user can write.
        rdzv_backend="c10d",
        rdzv_endpoint=str(Path(folder) / "rendezvous"),
        rdzv_configs={"store_type": "file", "last_call_timeout": 1},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        monitor_interval=0.2,
        shutdown_timeout=SHUTDOWN_S,
        logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.OUT),  # this process prints the result
    )


@contextmanager
def _restore_process() -> Iterator[None]:
    """Restore environment and signal handlers afterwards: torch's agent leaves its own behind."""
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


def _exit_reason(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
