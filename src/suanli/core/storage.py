"""Writes files so that a crash, a full disk or a second writer leaves no half-written file.

A file or folder is written under a temporary name beside its final one and then renamed. What has its final name is
complete.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from suanli.core.errors import DamagedFile, StorageError, SuanliError

STORAGE_ERRORS = {
    errno.EEXIST,
    errno.ENOENT,  # a new folder below /proc
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EIO,
    errno.EISDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EFBIG,
}


def storage_error(error: OSError, path: Path) -> SuanliError:
    """The suanli error for a failed write to `path`."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "Free some space or choose another directory; no half-written file was left."
    else:
        fix = "Choose a directory that you may write to."
    return StorageError(f"Can't write {path}: {reason}.", fix=fix)


@contextmanager
def raise_storage_errors(path: Path) -> Iterator[None]:
    """Raises StorageError, which says what to do, for an OSError of writing to `path` in the block."""
    try:
        yield
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            raise storage_error(error, path) from error
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A stream for the bytes of `path`. The file appears only when the block ends without an error."""
    with raise_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder to fill, renamed to `path` at the end. If another writer was first, its folder stays: use this only
    where the name determines the content."""
    with raise_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield temporary
            os.chmod(temporary, 0o777 & ~_umask())
            try:
                os.rename(temporary, path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def json_bytes(value: object, *, indent: int | None = None) -> bytes:
    """A line of JSON in UTF-8. File names that are not UTF-8 (lone surrogates) become JSON escapes; numbers that aren't
    finite, which JSON doesn't know, null."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_replace_not_finite(value), indent=indent, ensure_ascii=False)
    return text.encode(errors="backslashreplace") + b"\n"


def _replace_not_finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _replace_not_finite(one) for name, one in value.items()}
    return [_replace_not_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: object) -> None:
    with atomic_file(path) as stream:
        stream.write(json_bytes(value, indent=1))


def read_json(path: Path) -> Any:
    """Raises DamagedFile for a file that isn't JSON, FileNotFoundError for none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not valid JSON ({error}).", fix="Restore it or make it again.") from error
