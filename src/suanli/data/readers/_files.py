"""One file as bytes, within a limit: a folder and a table of paths can name anything."""

from __future__ import annotations

import os
import stat

from suanli.core.console import size
from suanli.core.errors import BadInput

MAX_FILE_BYTES = 1 << 30  # of one input, here and in an archive


def read_file(path: str) -> bytes:
    """Raises BadInput for what is no file (a pipe would block, a device may never end) and for one
    beyond the limit; OSError where it can't be read."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise BadInput(f"{path} is no file.")
    if about.st_size > MAX_FILE_BYTES:
        raise BadInput(f"{path} has {size(about.st_size)}; the limit for one file is {size(MAX_FILE_BYTES)}.")
    with open(path, "rb") as stream:
        return stream.read(about.st_size)  # no more, should it grow meanwhile; read() takes the memory beforehand
