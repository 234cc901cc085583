"""report: one HTML page for people, from the files of a run directory, and its model card.

It measures nothing and needs neither the data nor torch.
"""

from __future__ import annotations

from pathlib import Path

from suanli.core.storage import atomic_file
from suanli.core.types import AnyPath

FILE_NAME = "report.html"


def report(run: AnyPath, *, out: AnyPath | None = None) -> Path:
    """Write the report of the run directory `run` and return its path; beside it, in the run, the
    model card (README.md).

    `out` is the file to write, `<run>/report.html` if not given; into a folder, `report.html` is written.
    Raises DataError where no run is, DamagedFile for a file of the run that can't be used, StorageError
    where the report can't be written.
    """
    from suanli.reporting.card import card
    from suanli.reporting.files import read_run
    from suanli.reporting.page import render

    files = read_run(run)
    target = files.path if out is None else Path(out)
    if target.is_dir():
        target = target / FILE_NAME
    page = render(files)
    with atomic_file(target) as stream:
        stream.write(page.encode())
    if out is None:
        with atomic_file(files.path / "README.md") as stream:
            stream.write(card(files).encode(errors="backslashreplace"))
    return target
