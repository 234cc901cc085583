"""Downloads one file of a publisher into a folder and checks it.

A download goes to `<name>.part` and is resumed there after a break. It gets its final name only when its checksum is
the one that the publisher states, so a file with its final name is complete. A file that exists is hashed again each
time: SHA-256 of 170 MB takes 0.25 s, and nothing has to be remembered.

The only request is the one for the file, and it carries nothing but the URL.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from suanli.core.console import Progress, say, size, warn
from suanli.core.errors import DownloadError
from suanli.core.storage import raise_storage_errors
from suanli.core.types import Download

CHUNK_BYTES = 256 << 10
_RETRYABLE_STATUS = {408, 425, 429, 500, 502, 503, 504}


class _Retryable(Exception):
    """This attempt failed; another one may succeed."""


class _Permanent(Exception):
    """Every attempt would fail."""


def fetch(
    download: Download,
    folder: Path,
    *,
    timeout_s: float = 30.0,
    attempts: int = 4,
    pause_s: float = 1.0,
    report: Callable[[float], object] | None = None,
) -> Path:
    """The path of the file in `folder`, downloaded unless it is already there with its checksum.

    `timeout_s` is how long the server may send nothing, `pause_s` the pause after the first failure (it doubles each
    time). `report` is called with the number of bytes so far, instead of a progress bar. Raises DownloadError where the
    file can't be downloaded, StorageError where it can't be written.
    """
    target = folder / file_name(download)
    if _is_complete(target, download):
        return target
    with raise_storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f".{target.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Another process is downloading {target.name}; waiting for it.")
            lock.acquire()
    try:
        if _is_complete(target, download):  # another process downloaded it
            return target
        if target.exists():
            warn(f"{target} is not what its publisher has (other checksum); it is downloaded again.")
        return _fetch_locked(download, target, timeout_s, attempts, pause_s, report)
    finally:
        lock.release()


def file_name(download: Download) -> str:
    """The file's name in the folder: the last part of the URL. Raises DownloadError for a bad URL."""
    parts = urlsplit(download.url)
    name = unquote(parts.path).rpartition("/")[2]
    if parts.scheme not in ("http", "https") or not parts.netloc or name in ("", ".", "..") or "\0" in name:
        raise DownloadError(
            f"{download.url!r} is not the address of a file.",
            fix="Give an https:// or http:// URL of a file.",
        )
    return name


def _fetch_locked(
    download: Download,
    target: Path,
    timeout_s: float,
    attempts: int,
    pause_s: float,
    report: Callable[[float], object] | None,
) -> Path:
    part = target.with_name(target.name + ".part")
    with Progress(f"Downloading {target.name}", download.size_bytes) as progress:
        for attempt in range(1, attempts + 1):
            try:
                resumed = _receive(download, part, timeout_s, report or progress.update)
                checksum = _checksum(part, download)
                if checksum == download.checksum.casefold():
                    break
                with raise_storage_errors(part):
                    part.unlink()
                if not resumed:  # a resumed file may begin with a part of an older version
                    raise _Permanent(f"it has the checksum {checksum}, but {download.checksum} was expected")
                raise _Retryable("the resumed file has a wrong checksum")
            except _Permanent as error:
                raise _download_error(download, target, str(error)) from error
            except _Retryable as error:
                if attempt == attempts:
                    raise _download_error(download, target, f"{error} (tried {attempts} times)") from error
                time.sleep(pause_s * 2 ** (attempt - 1))
    with raise_storage_errors(target):
        os.replace(part, target)
    return target


def _receive(download: Download, part: Path, timeout_s: float, report: Callable[[float], object]) -> bool:
    """Fills `part`. Returns whether it resumed an earlier attempt."""
    have = part.stat().st_size if part.exists() else 0
    if have > download.size_bytes:
        with raise_storage_errors(part):
            part.unlink()
        have = 0
    if have == download.size_bytes:
        return True
    headers = {"User-Agent": "suanli", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        with _make_opener().open(urllib.request.Request(download.url, headers=headers), timeout=timeout_s) as response:
            start = _start_of(response, part, have, download)
            _copy(response, part, start, download, report)
            return start > 0
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # `part` is longer than the server's file
                with raise_storage_errors(part):
                    part.unlink(missing_ok=True)
                raise _Retryable("the server refused to resume") from error
            kind = _Retryable if error.code in _RETRYABLE_STATUS else _Permanent
            raise kind(f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        permanent = isinstance(error.reason, str | ssl.SSLCertVerificationError)
        raise (_Permanent if permanent else _Retryable)(f"no connection: {error.reason}") from error
    except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Retryable(f"the connection broke: {error or type(error).__name__}") from error


def _make_opener() -> urllib.request.OpenerDirector:
    """An opener for http and https alone, also after redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _start_of(response: http.client.HTTPResponse, part: Path, have: int, download: Download) -> int:
    """The byte of the file at which the answer begins; 0 where the server sends all of it instead of the rest."""
    if response.status == 206:
        header = response.headers.get("Content-Range", "")
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", header.strip())
        if not match or int(match[1]) > have or match[3] not in ("*", str(download.size_bytes)):
            with raise_storage_errors(part):
                part.unlink(missing_ok=True)  # the next attempt asks for the whole file
            raise _Retryable(f"the server answered with the range {header!r} to a request from byte {have}")
        return int(match[1])
    length = response.headers.get("Content-Length")
    if length is not None and length.isdecimal() and int(length) != download.size_bytes:
        raise _Permanent(f"the server's file has {length} bytes, but {download.size_bytes} were expected")
    return 0


def _copy(
    response: http.client.HTTPResponse,
    part: Path,
    start: int,
    download: Download,
    report: Callable[[float], object],
) -> None:
    """Appends the answer to the first `start` bytes of `part`, at most up to the expected size."""
    done = start
    # Network errors pass through `raise_storage_errors`, which converts errors of the disk only.
    with raise_storage_errors(part), open(part, "r+b" if start else "wb") as stream:
        stream.seek(start)
        stream.truncate()
        while chunk := response.read1(CHUNK_BYTES):
            if done + len(chunk) > download.size_bytes:
                raise _Permanent(f"the server sends more than the expected {download.size_bytes} bytes")
            stream.write(chunk)
            done += len(chunk)
            report(done)
        stream.flush()
        os.fsync(stream.fileno())
    if done < download.size_bytes:
        raise _Retryable(f"the connection ended after {size(done)} of {size(download.size_bytes)}")


def _is_complete(path: Path, download: Download) -> bool:
    try:
        return path.stat().st_size == download.size_bytes and _checksum(path, download) == download.checksum.casefold()
    except OSError:  # not there, not a file, or not ours to read
        return False


def _checksum(path: Path, download: Download) -> str:
    """The checksum of the file, written like `Download.checksum`: "sha256:…"."""
    algorithm = download.checksum.partition(":")[0]
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return f"{algorithm}:{digest.hexdigest()}"


def _download_error(download: Download, target: Path, reason: str) -> DownloadError:
    return DownloadError(
        f"{download.url} could not be downloaded: {reason}.",
        fix=f"Try again later (a partial download is resumed), or get the file in another way "
        f"({size(download.size_bytes)}, {download.checksum}) and put it at {target}.",
    )
