"""Reads one file within a limit, since folders and tables of paths can name anything."""

from __future__ import annotations

import os
import stat

from suanli.core.console import size
from suanli.core.errors import BadInput

MAX_FILE_BYTES = 1 << 30  # of one input, here and in an archive


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises BadInput for a file above the limit and for what isn't a file (a pipe would block, a
    device may never end), OSError where it can't be read."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise BadInput(f"{path} is not a file.")
    if about.st_size > MAX_FILE_BYTES:
        raise BadInput(f"{path} has {size(about.st_size)}; the limit for one file is {size(MAX_FILE_BYTES)}.")
    with open(path, "rb") as stream:
        return stream.read(about.st_size)  # the file may have grown in between
