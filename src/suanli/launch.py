"""Starts the processes that train one run together, on this machine, and looks after them.

The engine is torch's elastic agent, the one of torchrun: it starts the processes, tells each who it is, and where one
dies starts all of them anew, which then go on from the run's newest checkpoint. What this adds is the account: an error
that a new start can't mend is told once, with its way out, and ends the run.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from suanli import errors, hardware
from suanli.console import plural, say
from suanli.errors import Interrupted, MachineError, StorageError, SuanliError, UsageError
from suanli.gpus import gpus
from suanli.rundir import Run
from suanli.storage import atomic_file, json_bytes, read_json
from suanli.types import Device

VERDICT = "SUANLI_VERDICT"  # variable with the path of a file: why there is no use in starting again
NEW_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"  # each start has a store of its own: in an old one are old addresses
RESTARTS = 3
HANDLED = [getattr(signal, n) for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT") if hasattr(signal, n)]
LOOK_S, GRACE_S = 0.5, 5.0  # for the word of another process; until this one ends because of it
SHUTDOWN_S = 20  # for a process that was asked to end, before it is ended


def processes(wanted: str | int | None, device: Device) -> int:
    """How many processes "auto" or a number is: a GPU each, and one where there are none, since one process uses all
    cores of a CPU. Raises UsageError."""
    if wanted is None:
        return 1
    if device.type == "mps" and wanted not in ("auto", "1", 1):
        raise UsageError("Several processes can't share an Apple GPU.", fix="Use --device cpu.")
    usable = sum(gpu.why_not is None for gpu in gpus()) if device.type == "cuda" else None
    if wanted == "auto":
        return usable or 1
    most = usable or hardware.cores()
    try:
        count = int(wanted)
    except ValueError:
        raise UsageError(f"--nproc can't be {wanted!r}.", fix="Give a number, or auto.") from None
    if not 1 <= count <= most:
        has = plural(most, "usable GPU" if usable else "core")
        raise UsageError(f"--nproc can't be {count}.", fix=f"This machine has {has}.")
    return count


def train_together(run: Run, count: int, arguments: Sequence[str], *, restarts: int = RESTARTS) -> None:
    """Trains `run` with so many processes of `suanli train RUN`, from its newest checkpoint.

    Raises what a process raised that no new start can mend; MachineError where they were started anew `restarts`
    times; Interrupted after Ctrl-C or SIGTERM, with the checkpoint saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    handlers = {s: signal.getsignal(s) for s in HANDLED} if _in_main_thread() else {}
    threads = str(max(1, hardware.cores() // count))
    before = {name: os.environ.get(name) for name in (VERDICT, "OMP_NUM_THREADS", NEW_STORE)}
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # it is told below, in fewer words
    with tempfile.TemporaryDirectory(prefix="suanli-") as folder:
        verdict = Path(folder) / "verdict.json"
        threads = os.environ.get("OMP_NUM_THREADS", threads)
        os.environ.update({VERDICT: str(verdict), "OMP_NUM_THREADS": threads, NEW_STORE: "1"})
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=run.path.name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=restarts,
            monitor_interval=0.2,
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=Std.OUT),  # the result is told here
            shutdown_timeout=SHUTDOWN_S,
        )
        say(f"{count} processes, {threads} CPU threads each")
        try:
            launch_agent(config, sys.executable, ["-m", "suanli", "train", str(run.path), *arguments])
        except SignalException as error:
            _raise_told(verdict)
            raise _interrupted(run, int(error.sigval)) from error
        except ChildFailedError as error:
            _raise_told(verdict)
            rank, failure = error.get_first_failure()
            raise MachineError(
                f"Process {rank} of {count} ended {_how(failure.exitcode)}, and {restarts} new starts didn't help.",
                fix=f"What it said stands above. To go on from the last checkpoint: suanli train {run.path}",
            ) from error
        finally:
            for number, handler in handlers.items():  # torch's agent leaves its own behind
                signal.signal(number, handler)
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        _raise_told(verdict)


def tell(error: SuanliError) -> bool:
    """In a process that was started here: leaves word of an error that a new start can't mend. Gives whether the
    process should end as if all were well, so that it isn't started again. The first word counts."""
    path = os.environ.get(VERDICT)
    if path is None:
        return False
    if not told():
        with suppress(OSError, StorageError), atomic_file(Path(path)) as stream:
            stream.write(json_bytes({"kind": type(error).__name__, "message": error.message, "fix": error.fix}))
    return told()


def told() -> bool:
    """Whether one of the processes has left such a word."""
    path = os.environ.get(VERDICT)
    return path is not None and Path(path).exists()


def end_when_told() -> None:
    """In a process that was started here: ends it soon after another one has left such a word, since it may wait for
    that one without end."""

    def look() -> None:
        while not told():
            time.sleep(LOOK_S)
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=look, name="suanli-verdict", daemon=True).start()


def _raise_told(verdict: Path) -> None:
    if not verdict.exists():
        return
    said = read_json(verdict)
    kind = getattr(errors, said["kind"], SuanliError)
    raise kind(said["message"], fix=said["fix"])


def _interrupted(run: Run, number: int) -> Interrupted:
    return Interrupted(f"Stopped by {signal.Signals(number).name}.", fix=f"Go on with: suanli train {run.path}")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _how(code: int) -> str:
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
