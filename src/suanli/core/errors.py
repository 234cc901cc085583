"""Every error that suanli raises on purpose.

    SuanliError              exit 1   something failed while running
    ├── UsageError           exit 2   an option, a name or a value that can't be used
    ├── DataError            exit 3   the data (or a file that suanli reads) is bad
    │   ├── BadInput                  one input that can't be decoded; the caller counts these
    │   ├── DownloadError             a file could not be downloaded
    │   └── DamagedFile               a checkpoint, model or cache that is cut short or altered
    ├── MachineError         exit 4   not possible on this machine
    │   ├── OutOfMemory               says which batch size would fit
    │   ├── StorageError              no space left, read-only, not a directory
    │   ├── RunBusy                   another process is writing this run
    │   └── LostProcess               one of the processes of a training is gone; a restart resumes it
    ├── GateError            exit 5   refused: it costs more accuracy than the task tolerates
    ├── Diverged             exit 1   the loss became NaN or infinite
    └── Interrupted          exit 130 stopped by the user; the checkpoint is saved

Each error has a `message`, which says what is wrong, what was given and what is allowed, and a `fix`, which says what
to do next. The command line prints both as one paragraph; a traceback is shown only with --debug.
"""

from __future__ import annotations

import contextlib
import difflib
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

LISTED = 24  # names that an error lists; of more, only the nearest
NEAREST = 5


class SuanliError(Exception):
    """Base of the tree."""

    exit_code = 1

    def __init__(self, message: str, *, fix: str) -> None:
        super().__init__(f"{message} {fix}".strip())
        self.message = message
        self.fix = fix


class UsageError(SuanliError):
    exit_code = 2


class DataError(SuanliError):
    exit_code = 3


class BadInput(DataError):
    def __init__(self, message: str, *, fix: str = "Remove the file or replace it.") -> None:
        super().__init__(message, fix=fix)


class DownloadError(DataError):
    pass


class DamagedFile(DataError):
    pass


class MachineError(SuanliError):
    exit_code = 4


class OutOfMemory(MachineError):
    pass


class StorageError(MachineError):
    pass


class RunBusy(MachineError):
    pass


class LostProcess(MachineError):
    pass


class GateError(SuanliError):
    exit_code = 5


class Diverged(SuanliError):
    pass


class Interrupted(SuanliError):
    exit_code = 130


def unknown(what: str, name: str, allowed: Iterable[str], *, error: type[SuanliError] = UsageError) -> SuanliError:
    """The error for a name that isn't one of `allowed`. It suggests the nearest, and lists them."""
    return error(f"Unknown {what} {name!r}.", fix=suggest(name, allowed))


def suggest(name: str, allowed: Iterable[str], *, what: str = "Allowed") -> str:
    """A fix that names the one of `allowed` that is most like `name`, if any is like it, and lists all, or of many the
    nearest few."""
    names = sorted(allowed)
    near = nearest(name, names, count=NEAREST)
    mean = f"Did you mean {near[0]!r}? " if near else ""
    if len(names) <= LISTED:
        return f"{mean}{what}: {', '.join(names)}."
    if not near:
        return f"{what} are {len(names):,} names, such as {', '.join(names[:NEAREST])}."
    return mean + (f"Others like it: {', '.join(near[1:])}." if near[1:] else "")


def nearest(name: str, names: Iterable[str], *, count: int = 1) -> list[str]:
    """Those that are most like `name`, at most so many, the most alike first. Case and punctuation don't count."""
    plain: dict[str, str] = {}
    for one in names:
        plain.setdefault(_letters(one), one)
    return [plain[match] for match in difflib.get_close_matches(_letters(name), plain, n=count)]


def _letters(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def first_line(error: BaseException, length: int) -> str:
    """The first line of an error's message, which in libraries may fill a page; the error's type if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:length] if lines else type(error).__name__


def pip_install(*requirements: str) -> str:
    """The command that installs into the Python that is running, for a `fix`; plain `pip` may belong to another one."""
    python = sys.executable or "python"
    with contextlib.suppress(ValueError):
        python = str(Path(python).relative_to(Path.cwd()))
    return " ".join(shlex.quote(part) for part in (python, "-m", "pip", "install", *requirements))
