"""From a pickle of weights (.pth, .pt, .bin, .ckpt) to safetensors.

A pickle is a program, and can run any code when it is opened. So another process opens it (`pickle_child.py`), which
can import nothing, open no file and reach no network, and which reads tensors and plain containers only. What it made
gets its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from suanli.core.errors import DamagedFile, SuanliError, UsageError, suggest
from suanli.core.storage import atomic_file
from suanli.core.types import Json

PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt")
PATIENCE_S = 120.0  # that the process may take, and more for each byte
BYTES_PER_S = 10_000_000
KEPT_VARIABLES = ("LD_LIBRARY_PATH", "SYSTEMROOT")  # without which torch may not start
_CODE = "import sys, json; a = json.loads(sys.argv[1]); sys.path[:] = a[0]; " + (
    "from suanli.models.pickle_child import main; main(a[1], a[2])"
)


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A safetensors file, and what happened to the content of the pickle."""

    file: Path
    source: Path
    checksum: str  # of the file: "sha256:…"
    source_checksum: str
    size_bytes: int
    tensors: int
    key: str  # of the dictionary that was taken, with dots; empty: the outermost
    others: tuple[str, ...]  # that could have been taken
    left_out: Mapping[str, str]  # name to reason
    tied: tuple[tuple[str, ...], ...]  # names of the same tensor, which is written under each
    guards: tuple[str, ...]  # that held while it was read

    def to_json(self) -> dict[str, Json]:
        return asdict(self) | {"file": str(self.file), "source": str(self.source)}


def is_pickle(path: Path) -> bool:
    """By its name: "model.pth", or "model.pth.tar", which is no tar."""
    name = path.name.lower().removesuffix(".tar")
    return name.endswith(PICKLES)


def refuse_pickle(path: Path) -> None:
    """Raises UsageError for one."""
    if not is_pickle(path):
        return
    raise UsageError(
        f"{path} looks like a pickle, which can run any code when it is opened.",
        fix=f"First convert it, in a process that can run none: suanli convert {path}",
    )


def convert_pickle(source: Path, target: Path, *, key: str | None = None) -> Converted:
    """Write the tensors of `source` to `target`: those of the dictionary `key` ("a.b" is in another), or of the usual
    one. Raises UsageError for what isn't such a file, asks for code, or has no such key, DamagedFile for one that is
    cut short or claims more than it holds, and StorageError."""
    if source.exists() and not source.is_file():  # a pipe would block
        raise UsageError(f"{source} is no file.", fix="Give a .pth, .pt, .bin or .ckpt file.")
    try:
        with source.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            source_checksum = checksum(stream)
            with atomic_file(target) as out:
                report = _read_in_another_process(source, stream, out, key, size_bytes)
    except OSError as error:
        raise UsageError(
            f"Can't read {source}: {error.strerror or error}.", fix="Give a .pth, .pt, .bin or .ckpt file."
        ) from error
    return Converted(
        file=target,
        source=source,
        checksum=file_checksum(target),
        source_checksum=source_checksum,
        size_bytes=target.stat().st_size,
        tensors=report["tensors"],
        key=report["key"],
        others=tuple(report["others"]),
        left_out=report["left_out"],
        tied=tuple(map(tuple, report["tied"])),
        guards=tuple(report["guards"]),
    )


def file_checksum(path: Path) -> str:
    """ "sha256:…"; computed once for a file that doesn't change."""
    about = path.stat()
    return _file_checksum(path, about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=64)
def _file_checksum(path: Path, size_bytes: int, mtime_ns: int) -> str:  # noqa: ARG001  # they are part of the key
    with path.open("rb") as stream:
        return checksum(stream)


def checksum(stream: IO[bytes]) -> str:
    """ "sha256:…", of all that is left of the stream."""
    return f"sha256:{hashlib.file_digest(stream, hashlib.sha256).hexdigest()}"  # type: ignore[arg-type]


def _read_in_another_process(
    source: Path, stream: IO[bytes], out: IO[bytes], key: str | None, size_bytes: int
) -> dict[str, Any]:
    arguments = json.dumps([[path for path in sys.path if path], key, size_bytes])
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-B", "-c", _CODE, arguments],
            stdin=stream,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            timeout=PATIENCE_S + size_bytes / BYTES_PER_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _damaged(source, "reading it took too long") from error
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    try:
        report: dict[str, Any] = json.loads(lines[-1])
    except (ValueError, IndexError):
        raise _explain_end(source, done.returncode, lines[-1:] or [""]) from None
    if "error" in report:
        raise _explain(source, report, key)
    return report


def _explain(source: Path, report: Mapping[str, Any], key: str | None) -> Exception:
    """The error for what the process says of the file. An OSError is one of writing, which the caller explains."""
    kind, text = report["kind"], _printable(str(report["error"]))
    if kind == "storage" and report["errno"]:
        return OSError(report["errno"], os.strerror(report["errno"]))
    if kind == "key":
        return UsageError(f"{source} has no dictionary {key!r}.", fix=suggest(str(key), json.loads(report["error"])))
    if kind in ("damaged", "large", "storage"):
        return _damaged(source, text)
    fixes = {
        "code": "It was not run. Ask for safetensors; or, where the file was made and is trusted, save the tensors "
        "alone: torch.save(model.state_dict(), …).",
        "program": "Save its tensors where it was made: torch.save(torch.jit.load(…).state_dict(), …).",
        "tar": "Open it with the torch that made it, and save it again.",
        "empty": "Give a file that torch.save wrote of model.state_dict().",
        "other": "Give a file that torch.save wrote of model.state_dict().",
    }
    return UsageError(f"{source} can't be converted: {text}.", fix=fixes.get(kind, fixes["other"]))


def _explain_end(source: Path, code: int, lines: list[str]) -> SuanliError:
    """The error for a process that ended without a word."""
    if code == -getattr(signal, "SIGXCPU", 0):
        return _damaged(source, "reading it takes more time than a file of its size may need")
    if code == -getattr(signal, "SIGKILL", 0):
        return _damaged(source, "reading it was ended, probably since memory ran out")
    return _damaged(source, f"the process that read it ended with {code} {_printable(lines[0])[:200]}".rstrip())


def _damaged(source: Path, why: str) -> DamagedFile:
    return DamagedFile(f"{source} can't be converted: {why}.", fix="Download or copy it again.")


def _printable(text: str) -> str:
    """A text of an unknown file: without the codes that move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)
