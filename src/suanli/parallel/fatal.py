"""A word that processes which train together leave, for whoever started them: why there is no use in starting again.

It is a small file whose path is in a variable: of `launch`, or of a batch script. Others end when they see it, since
they may wait without end for the process that left it.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core import errors
from suanli.core.errors import Interrupted, StorageError, SuanliError
from suanli.core.storage import atomic_file, json_bytes

if TYPE_CHECKING:  # the command line asks for words, and loads nothing heavy
    from suanli.core.types import Json

REPORT_VARIABLE = "SUANLI_VERDICT"
LOOK_S, GRACE_S = 0.5, 5.0  # for the word of another process; until this one ends because of it


def is_supervised() -> bool:
    """Whether who started this process looks for a word of it."""
    return REPORT_VARIABLE in os.environ


def report(error: SuanliError) -> bool:
    """Leaves word of an error that a new start can't mend. Gives whether the process should end as if all were well,
    so that it isn't started again. The first word counts."""
    path = os.environ.get(REPORT_VARIABLE)
    if path is None:
        return False
    if not is_reported():
        with suppress(OSError, StorageError), atomic_file(Path(path)) as stream:
            stream.write(json_bytes({"kind": type(error).__name__, "message": error.message, "fix": error.fix}))
    return is_reported()


def is_reported() -> bool:
    """Whether one of the processes has left such a word."""
    path = os.environ.get(REPORT_VARIABLE)
    return path is not None and read_report(Path(path)) is not None


def read_report(path: Path, *, interrupted: bool = False) -> dict[str, Json] | None:
    """The word in a file. That of an interruption counts only for who asked for it: where one process alone was
    stopped, all start anew."""
    with suppress(OSError, ValueError):
        found = dict(json.loads(path.read_bytes()))
        return found if interrupted or found["kind"] != Interrupted.__name__ else None
    return None


def restore_error(word: dict[str, Json]) -> SuanliError:
    """The error that was told of."""
    kind = getattr(errors, str(word["kind"]), SuanliError)
    found: SuanliError = kind(word["message"], fix=word["fix"])
    return found


def exit_when_reported() -> None:
    """Ends this process soon after another one has left a word, or once whoever started it is gone."""
    starter = os.getppid()

    def look() -> None:
        while not is_reported():
            if os.getppid() != starter:
                os._exit(1)
            time.sleep(LOOK_S)
        time.sleep(GRACE_S)
        os._exit(0)

    threading.Thread(target=look, name="suanli-verdict", daemon=True).start()
