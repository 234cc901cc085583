"""One host's part of a training on several: `python -m suanli.node`, as `remote` starts it.

Standard input has one line of JSON with what is to be done, then a sign of life every other second; standard output
gets one line when this host is ready, and one when it ends because of an error. Nothing comes in through the command
line. Where standard input ends, so does the training, with a checkpoint; where it falls silent, this host is cut off
and ends at once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from suanli import hardware, launch, preflight
from suanli.errors import LostProcess, MachineError, SuanliError
from suanli.rendezvous import LOST_S, Rendezvous
from suanli.rundir import Run
from suanli.types import Json

SHARED_S = 10.0  # until a file that another host has written is seen here: NFS looks only now and then
ENDING_S = launch.SHUTDOWN_S + 15.0


def main() -> int:
    told_by, answers = os.dup(0), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)  # the result is told where the command was given

    def answer(value: dict[str, Json]) -> None:
        with suppress(OSError):
            print(json.dumps(value), file=answers, flush=True)

    with open(told_by, "rb", buffering=0, closefd=False) as stream:
        wanted = json.loads(stream.readline())
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _check(wanted)
        answer({"ready": True})
        threading.Thread(target=_follow, args=(told_by,), name="suanli-line", daemon=True).start()
        _train(wanted)
    except LostProcess as error:  # a new start mends it
        print(f"suanli: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except SuanliError as error:
        answer({"error": {"kind": type(error).__name__, "message": error.message, "fix": error.fix}})
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _check(wanted: dict[str, Json]) -> None:
    """Raises MachineError where this host can't take part."""
    name = wanted["name"]
    try:
        os.chdir(wanted["folder"])
    except OSError as error:
        raise MachineError(
            f"{wanted['folder']} can't be entered on {name}: {error.strerror}.",
            fix="Work in a directory that all hosts share.",
        ) from error
    for called, here in preflight.versions().items():
        if here != wanted["versions"][called]:
            what = {key: text for key, text, _, _ in preflight.ALIKE}[called]
            raise MachineError(
                f"{name} differs in {what}: {here}, where this machine has {wanted['versions'][called]}.",
                fix="Install the same version on every host, unchanged.",
            )
    sign, end = Path(wanted["sign"]), time.monotonic() + SHARED_S
    while not sign.exists():
        if time.monotonic() > end:
            raise MachineError(
                f"{name} doesn't see the run directory {wanted['run']} of this machine.",
                fix="Work in a directory that all hosts share, or give such an --out.",
            )
        os.listdir(os.curdir)
        time.sleep(0.5)


def _train(wanted: dict[str, Json]) -> None:
    os.environ.update(wanted["environment"])
    target = hardware.detect(wanted["device"])
    launch.train_together(
        Run(wanted["run"]),
        launch.processes(wanted["nproc"], target),
        wanted["arguments"],
        restarts=wanted["restarts"],
        meeting=Rendezvous(**wanted["meeting"], here=False),
        name=wanted["name"],
    )


def _follow(source: int) -> None:
    """Does what comes in, until it ends or falls silent."""
    last = time.monotonic()
    while True:
        if select.select([source], [], [], 1.0)[0]:
            last = time.monotonic()
            came = os.read(source, 4096)
            if not came or b"stop" in came:
                number = int(came.partition(b"stop ")[2].partition(b"\n")[0] or signal.SIGTERM)
                os.kill(os.getpid(), number)
                time.sleep(ENDING_S)
                os._exit(LostProcess.exit_code)  # its processes see that it is gone
        elif time.monotonic() - last > LOST_S:
            print("suanli: this host is cut off from the one that started it: it ends.", file=sys.stderr, flush=True)
            os._exit(LostProcess.exit_code)


if __name__ == "__main__":
    sys.exit(main())
