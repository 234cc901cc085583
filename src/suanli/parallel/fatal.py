"""Errors that no restart fixes: a process that trains with others reports one in a file, and all of them end.

The launcher (`launch`, or a batch script) puts the file's path into an environment variable. The other processes look
for the file and exit once it exists, since they might wait forever for the process that wrote it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from suanli.core import errors
from suanli.core.errors import Interrupted, StorageError, SuanliError
from suanli.core.storage import atomic_file, json_bytes

REPORT_VARIABLE = "SUANLI_VERDICT"
POLL_S, GRACE_S = 0.5, 5.0  # between looks for a report; from then until this process ends


class Report(TypedDict):
    kind: str  # name of the error's class
    message: str
    fix: str


def is_supervised() -> bool:
    """Whether the launcher of this process reads reports."""
    return REPORT_VARIABLE in os.environ


def report(error: SuanliError) -> bool:
    """Report an error that a restart can't fix; only the first report is kept. Returns whether the process should
    exit as if it had succeeded, so that it isn't restarted."""
    path = os.environ.get(REPORT_VARIABLE)
    if path is None:
        return False
    if not is_reported():
        content = Report(kind=type(error).__name__, message=error.message, fix=error.fix)
        with suppress(OSError, StorageError), atomic_file(Path(path)) as stream:
            stream.write(json_bytes(content))
    return is_reported()


def is_reported() -> bool:
    """Whether one of the processes has reported an error."""
    path = os.environ.get(REPORT_VARIABLE)
    return path is not None and read_report(Path(path)) is not None


def read_report(path: Path, *, interrupted: bool = False) -> Report | None:
    """The report in a file, if any. One of an interruption counts only where the launcher itself was `interrupted`:
    where a single process was stopped, all restart."""
    with suppress(OSError, ValueError):
        content: Report = json.loads(path.read_bytes())
        return content if interrupted or content["kind"] != Interrupted.__name__ else None
    return None


def restore_error(*, kind: str, message: str, fix: str) -> SuanliError:
    """The error of a report."""
    error: type[SuanliError] = getattr(errors, kind, SuanliError)
    return error(message, fix=fix)


def exit_when_reported() -> None:
    """From now on, a thread ends this process soon after another one has reported an error, or once its launcher is
    gone."""
    launcher = os.getppid()

    def poll() -> None:
        while not is_reported():
            if os.getppid() != launcher:
                os._exit(1)
            time.sleep(POLL_S)
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=poll, name="suanli-report", daemon=True).start()
