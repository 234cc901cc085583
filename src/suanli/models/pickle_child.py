"""The process that reads a pickle of tensors for `conversion.py`, and can do nothing else.

The weights are its standard input, the safetensors file its standard output, and one line of JSON about both is the
last on standard error, so it opens no file. Before it reads the first byte it gives up what it doesn't need: imports
and every other event of Python that reaches outside (PEP 578), all system calls but those that read, write and hold
memory (Linux, seccomp), and memory, time and file size beyond what a file of this size can need. Reading is
`torch.load(weights_only=True)`, which knows tensors and plain containers only.
"""

from __future__ import annotations

import argparse
import ctypes
import io
import json
import os
import pathlib
import pickle
import platform
import re
import sys
import time
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch

from suanli.models.safetensors_io import DTYPES, write_tensors

# What training scripts call the tensors of a network in what they save; the average of the steps first, as timm does.
USUAL_KEYS = (
    *("model_ema", "state_dict_ema", "ema", "params_ema", "teacher"),
    *("state_dict", "model", "model_state_dict", "net", "network", "params", "weights", "module", "student"),
)
DEEPEST = 3  # dictionaries in each other that are looked into
LISTED = 1000  # names in the report
SPARE_BYTES = 512 << 20  # of memory beside the tensors
LARGEST_COPY = 4  # times the size of the file, since tied tensors are written under each name
REFUSED_EVENTS = (
    *("import", "open", "exec", "compile", "marshal.", "os.", "socket.", "subprocess.", "shutil.", "tempfile."),
    *("glob.", "ctypes.", "pty.", "fcntl.", "mmap.", "pathlib.", "sqlite3.", "urllib.", "http.", "ftplib.", "smtplib."),
    *("winreg.", "_winapi.", "webbrowser.", "signal.", "code.__new__", "pickle.find_class", "sys.settrace"),
)
# System calls that stay, for x86_64 and aarch64: read, write and seek in open files, memory, signals, time, the end.
ALLOWED_CALLS = {
    "x86_64": (
        *(0, 1, 3, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 19, 20, 24, 25, 28, 35, 39, 60, 98, 131, 186, 202, 219),
        *(228, 229, 230, 231, 234, 318),
    ),
    "aarch64": (
        *(62, 63, 64, 65, 66, 67, 68, 57, 80, 93, 94, 98, 101, 113, 114, 115, 124, 128, 131, 132, 134, 135, 139, 165),
        *(172, 178, 214, 215, 216, 222, 226, 233, 278),
    ),
}
ARCHITECTURES = {"x86_64": (0xC000003E, 317), "aarch64": (0xC00000B7, 277)}  # for the filter; the number of `seccomp`


# What training scripts save beside tensors: arguments, paths and numbers of numpy. Making them runs nothing.
PLAIN_VALUES: list[Any] = [
    *(argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath),
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(np.dtype, *(type(np.dtype(number)) for number in "?bBhHiIlLqQefdFD")),
]


class Refusal(Exception):
    """Why there is no result: a kind that `conversion.py` knows, and what it says of the file."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


def main(key: str | None, size_bytes: int) -> None:
    """Reads standard input, of `size_bytes`, and writes the tensors of its dictionary `key`, or of the usual one."""
    os.lseek(0, 0, os.SEEK_SET)  # the other process has read it for its checksum
    stream = os.fdopen(0, "rb")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets into the file
    torch.set_num_threads(1)
    import_what_reading_needs()
    guards = give_up_rights(size_bytes)
    try:
        report = read_pickle(stream, out, key, size_bytes) | {"guards": guards}
    except Refusal as error:
        report = {"kind": error.kind, "error": error.text}
    except OSError as error:
        report = {"kind": "storage", "error": str(error), "errno": error.errno}
    except Exception as error:  # noqa: BLE001  # a hostile file may raise anything
        report = dict(zip(("kind", "error"), _explain(error), strict=True))
    sys.stderr.write("\n" + json.dumps(report) + "\n")
    sys.stderr.flush()
    os._exit(0)  # nothing that the file made gets a turn at the end


def import_what_reading_needs() -> None:
    """Imports now what torch imports when it reads a file, good or bad, of the current format or the one before."""
    value = OrderedDict(a=torch.zeros(2, 2, dtype=torch.bfloat16), b=torch.nn.Parameter(torch.zeros(1)))
    for current in (True, False):
        buffer = io.BytesIO()
        torch.save({"state_dict": value, "n": 1}, buffer, _use_new_zipfile_serialization=current)
        buffer.seek(0)
        for name, tensor in torch.load(buffer, map_location="cpu", weights_only=True)["state_dict"].items():
            write_tensors(io.BytesIO(), {name: tensor})
    try:
        torch.load(io.BytesIO(pickle.dumps(print)), weights_only=True)
    except Exception as error:  # noqa: BLE001
        _explain(error)
        traceback.format_exception(error)


# --- what it gives up ------------------------------------------------------------------------


def give_up_rights(size_bytes: int) -> list[str]:
    """What holds from now on, in words."""
    guards = ["no imports"]
    with suppress(ImportError, ValueError, OSError):
        _limit(size_bytes)
        guards.append("limits of memory, time and file size")
    if _filter_calls():
        guards.append("system calls for open files and memory alone")
    sys.addaudithook(_refuse_event)
    return guards


def _refuse_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED_EVENTS):
        raise Refusal("code", f"it tried to {event} {str(arguments[:1])[:100]}")


def _limit(size_bytes: int) -> None:
    import resource

    limits = {
        resource.RLIMIT_CPU: int(time.process_time()) + 60 + size_bytes // 20_000_000,
        resource.RLIMIT_FSIZE: LARGEST_COPY * size_bytes + SPARE_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    with suppress(OSError), open("/proc/self/statm") as stream:  # only Linux has it
        used = int(stream.read().split()[0]) * resource.getpagesize()
        limits[resource.RLIMIT_AS] = used + 3 * size_bytes + SPARE_BYTES
    for limit, value in limits.items():
        most = resource.getrlimit(limit)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(limit, (value, value))


def _filter_calls() -> bool:
    """Lets the kernel refuse all other system calls, in all threads; False where this system can't. Source:
    https://docs.kernel.org/userspace-api/seccomp_filter.html"""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ALLOWED_CALLS:
        return False
    architecture, number = ARCHITECTURES[machine]
    calls = ALLOWED_CALLS[machine]
    load, equal, give = 0x20, 0x15, 0x06  # BPF: a word of the call's record, a comparison, the verdict
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # EPERM
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, refuse), (load, 0, 0, 0)]
    lines += [(equal, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    lines += [(give, 0, 0, refuse), (give, 0, 0, allow)]

    class Line(ctypes.Structure):
        _fields_ = [("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("k", ctypes.c_uint)]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.POINTER(Line))]

    table = (Line * len(lines))(*(Line(*line) for line in lines))
    program = Program(len(lines), table)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0):  # no new privileges: without root, the kernel asks for it
        return False
    answer: int = libc.syscall(number, 1, 1, ctypes.byref(program))  # a filter (1), in all threads or in none (1)
    return answer == 0


# --- reading ---------------------------------------------------------------------------------


def read_pickle(stream: IO[bytes], out: IO[bytes], key: str | None, size_bytes: int) -> dict[str, Any]:
    """Write the tensors of the dictionary `key`, or of the usual one, as safetensors. Gives what was taken and what
    not. Raises Refusal, and what torch.load raises."""
    _check_archive(stream, size_bytes)
    with torch.serialization.safe_globals(PLAIN_VALUES):
        content = torch.load(stream, map_location="cpu", weights_only=True)
    name, values, others = _choose(content, key)
    tensors: dict[str, torch.Tensor] = {}
    left_out: dict[str, str] = {}
    for one, value in values.items():
        reason = _why_not(one, value)
        if reason is None:
            tensors[one] = value.detach()
        else:
            left_out[str(one)] = reason
    if not tensors:
        raise Refusal("empty", f"nothing in {name or 'it'} is a tensor")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > LARGEST_COPY * size_bytes:
        raise Refusal("large", f"it claims tensors of {total:,} bytes, and has {size_bytes:,}")
    write_tensors(out, tensors, {"format": "pt"})
    out.flush()
    return {
        "key": name,
        "others": others[:LISTED],
        "tensors": len(tensors),
        "left_out": dict(list(left_out.items())[:LISTED]),
        "tied": _find_tied(tensors)[:LISTED],
    }


def _check_archive(stream: IO[bytes], size_bytes: int) -> None:
    """Raises Refusal for a zip file that torch.save didn't write, and for other formats. The stream is at its start
    again."""
    start = stream.read(512)
    stream.seek(0)
    if start[257:262] == b"ustar" or b"\0sys_info" in start or start.startswith(b"sys_info"):
        raise Refusal("tar", "it is a tar archive, the format of torch before 0.1.10")
    if not start:
        raise Refusal("damaged", "it is empty")
    if start[:2] == b"\x80\2":  # a pickle as torch.save wrote it before version 1.6
        return
    if start[:4] != b"PK\3\4":
        raise Refusal("other", "it is no file that torch.save wrote")
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise Refusal("damaged", str(error)) from error
    stream.seek(0)
    names = [entry.filename.rpartition("/")[2] for entry in entries]
    if "constants.pkl" in names:
        raise Refusal("program", "it is a TorchScript archive, which holds a program")
    if "data.pkl" not in names:
        raise Refusal("other", "it is a zip file that torch.save didn't write")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refusal("large", "it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size_bytes:
        raise Refusal("large", "its entries claim more bytes than it has")


def _choose(content: object, key: str | None) -> tuple[str, Mapping[Any, Any], list[str]]:
    """The dictionary with the network's tensors, by its name ("": the outermost), and the names of others."""
    found = _find_dictionaries(content, "", DEEPEST)
    if key is not None:
        if key not in found:
            raise Refusal("key", json.dumps(sorted(found)))
        chosen = key
    elif not found:
        raise Refusal("empty", f"it holds {type(content).__name__}, and no dictionary of tensors by name")
    elif "" in found:
        chosen = ""
    else:
        order = {name: place for place, name in enumerate(USUAL_KEYS)}
        chosen = min(found, key=lambda one: (order.get(one.rpartition(".")[2], len(order)), one.count(".")))
    return chosen, found[chosen], sorted(name for name in found if name != chosen)


def _find_dictionaries(value: object, name: str, depth: int) -> dict[str, Mapping[Any, Any]]:
    """Those that have tensors among their values, by their dotted names, the outer ones alone."""
    if not isinstance(value, Mapping):
        return {}
    if any(isinstance(one, torch.Tensor) for one in value.values()):
        return {name: value}
    found: dict[str, Mapping[Any, Any]] = {}
    if depth:
        for inner, one in value.items():
            if isinstance(inner, str):
                found |= _find_dictionaries(one, f"{name}.{inner}" if name else inner, depth - 1)
    return found


def _why_not(name: object, value: object) -> str | None:
    """Why it can't be in the file; None: it can."""
    if not isinstance(value, torch.Tensor):
        return f"no tensor but {type(value).__name__}"
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}"
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        return "not a plain dense tensor"
    if value.dtype not in DTYPES:
        return f"safetensors doesn't know {str(value.dtype).removeprefix('torch.')}"
    return None


def _find_tied(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names that share their values."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            groups.setdefault((tensor.data_ptr(), *tensor.shape, *tensor.stride()), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _explain(error: BaseException) -> tuple[str, str]:
    """Kind and text."""
    text = str(error)
    named = re.search(
        r"GLOBAL (\S+) (?:was not|whose module)|Trying to call reduce for unrecognized function (.+)", text
    )
    if isinstance(error, pickle.UnpicklingError) and named:
        return "code", f"it asks for {next(name for name in named.groups() if name)}"
    if isinstance(error, MemoryError) or "allocate" in text or "memory" in text.lower():
        return "large", "reading it takes more memory than a file of its size may need"
    if "weights_only" in text and "tar" in text:
        return "tar", "it is a tar archive, the format of torch before 0.1.10"
    if isinstance(error, pickle.UnpicklingError):
        match = re.search(r"WeightsUnpickler error: (.*)", text) or re.search(r"(?:file|load)\S* failed. (.*)", text)
        text = match[1] if match else text
    first = (text.strip().splitlines() or [""])[0][:200].rstrip(". ")
    return "damaged", first if " " in first else f"it ends or goes wrong inside ({type(error).__name__} {first})"
