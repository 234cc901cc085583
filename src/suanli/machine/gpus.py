"""The GPUs of this machine: which there are, whether this torch build runs on them, and if not, the command that
fixes it.

The answer comes from torch, from a tiny kernel that really runs, and from nvidia-smi. That one needs neither torch nor
CUDA libraries, so it sees the GPU that a CPU build of torch misses. Nothing here changes the driver or installs
anything.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from functools import cache

from suanli.core.errors import pip_install

NVIDIA_SMI_TIMEOUT_S = 10.0  # with a broken driver, nvidia-smi can hang forever


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU in this machine, usable or not."""

    name: str
    torch_name: str | None  # "cuda:0", "mps"; None: torch doesn't see it
    memory_bytes: int | None
    capability: str | None  # "9.0"
    why_not: str | None  # why this torch can't run on it; None: it can, a kernel really ran
    fix: str | None  # what to do about that


@dataclass(frozen=True, kw_only=True)
class NvidiaDriver:
    """What nvidia-smi reports."""

    version: str | None = None
    cuda: str | None = None  # the newest CUDA that this driver runs: "13.0"
    gpus: tuple[tuple[str, int | None, str | None], ...] = ()  # name, memory in bytes, capability
    problem: str | None = None  # why nvidia-smi gave no answer


def gpus() -> tuple[Gpu, ...]:
    """Every GPU that torch sees, or else those that nvidia-smi lists, which torch can't use. A GPU that the user hides
    by CUDA_VISIBLE_DEVICES isn't listed."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # what torch warns of becomes the reason
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        visible = [_cuda_gpu(index) for index in range(count)]
    if torch.backends.mps.is_available():
        visible.append(_mps_gpu())
    if visible or are_gpus_hidden():
        return tuple(visible)
    driver = nvidia_driver()
    warning = str(caught[0].message).split(".")[0] if caught else None
    return tuple(_invisible_gpu(name, memory, capability, driver, warning) for name, memory, capability in driver.gpus)


def are_gpus_hidden() -> bool:
    """Whether the user hides every NVIDIA GPU from this process."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _cuda_gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    why_not = None if torch.version.hip else arch_why_not(capability, torch.cuda.get_arch_list())
    fix = _torch_fix(capability, nvidia_driver().cuda) if why_not else None
    if why_not is None and (why_not := _kernel_why_not(f"cuda:{index}")):
        fix = "Look at it with nvidia-smi: another process may hold it, or the driver must be restarted."
    return Gpu(
        name=properties.name,
        torch_name=f"cuda:{index}",
        memory_bytes=properties.total_memory,
        capability=capability,
        why_not=why_not,
        fix=fix,
    )


def _mps_gpu() -> Gpu:
    import torch

    return Gpu(
        name="Apple GPU",
        torch_name="mps",
        memory_bytes=torch.mps.recommended_max_memory(),
        capability=None,
        why_not=(why_not := _kernel_why_not("mps")),
        fix="Update macOS and torch." if why_not else None,
    )


def _invisible_gpu(
    name: str, memory: int | None, capability: str | None, driver: NvidiaDriver, warning: str | None
) -> Gpu:
    """A GPU that nvidia-smi lists and torch doesn't."""
    import torch

    if torch.version.cuda is None:
        why_not = f"this torch ({torch.__version__}) was built without CUDA."
        fix = _torch_fix(capability, driver.cuda)
    elif warning:
        why_not, fix = f"torch refuses it: {warning}.", _torch_fix(capability, driver.cuda)
    else:
        why_not = f"torch {torch.__version__} doesn't see it."
        fix = "Check CUDA_VISIBLE_DEVICES, and that the container was started with access to the GPU."
    return Gpu(name=name, torch_name=None, memory_bytes=memory, capability=capability, why_not=why_not, fix=fix)


def arch_why_not(capability: str, arch_list: list[str]) -> str | None:
    """Why no code built for `arch_list` runs on a GPU of this compute capability; None: some does.

    Machine code (sm_80) runs on the same major version, from its minor version on; the driver compiles PTX (compute_80)
    for anything newer. With the suffix `a`, code runs on that one capability only; with `f`, on its family. Source:
    CUDA C++ Programming Guide, "Compute Capability" and "Binary Compatibility".
    """
    have = tuple(int(part) for part in capability.split("."))
    for arch in arch_list:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if not match:
            continue
        code, letter = (int(match[2]), int(match[3])), match[4]
        if have == code or (letter == "" and match[1] == "compute" and have > code):
            return None
        if letter != "a" and have[0] == code[0] and have[1] >= code[1]:
            return None
    return f"this torch build has code for {' '.join(arch_list)}, not for compute capability {capability}."


def _kernel_why_not(torch_name: str) -> str | None:
    """Why a tiny kernel didn't run there; None: it ran and gave the right result."""
    import torch

    try:
        total = (torch.arange(8, device=torch_name, dtype=torch.float32) * 2).sum().item()
    except RuntimeError as error:  # covers torch's accelerator and out-of-memory errors
        return f"a tiny kernel failed there: {str(error).strip().splitlines()[0]}."
    return None if total == 56 else f"a tiny kernel gave {total} instead of 56: the hardware or driver is faulty."


def _torch_fix(capability: str | None, driver_cuda: str | None) -> str:
    """The command that installs a torch wheel for this GPU and driver. Wheels exist for CUDA 12.6 (capability 5.0 to
    9.0) and 13.0 (from 7.5 on). Source: RELEASE.md of pytorch/pytorch, torch 2.11 to 2.13."""
    import torch

    driver = _version(driver_cuda) or (13, 0)
    needs = _version(capability) or (8, 0)
    if driver >= (13, 0) and needs >= (7, 5):
        index = "cu130"
    elif driver >= (12, 0) and needs < (10, 0):
        index = "cu126"
    else:
        newest = "13.0" if needs >= (10, 0) else "12.6"
        return f"Update the NVIDIA driver to one that runs CUDA {newest} (this one runs {driver_cuda})."
    release = torch.__version__.partition("+")[0]
    command = pip_install(
        "--force-reinstall", f"torch=={release}", "--index-url", f"https://download.pytorch.org/whl/{index}"
    )
    return f"Run: {command}"


def _version(text: str | None) -> tuple[int, ...] | None:
    return tuple(int(part) for part in text.split(".")) if text and re.fullmatch(r"\d+(\.\d+)+", text) else None


@cache  # takes half a second, and the answer doesn't change while a process lives
def nvidia_driver() -> NvidiaDriver:
    """The report of nvidia-smi; where it is absent, broken or hangs, the report says so."""
    if shutil.which("nvidia-smi") is None:
        return NvidiaDriver()
    rows: str | None = None
    try:
        for fields in ("name,memory.total,driver_version,compute_cap", "name,memory.total,driver_version"):
            rows = _nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
            if rows is not None:  # old drivers don't know compute_cap
                break
        about = _nvidia_smi() or ""
    except subprocess.TimeoutExpired:
        return NvidiaDriver(problem=f"nvidia-smi gave no answer within {NVIDIA_SMI_TIMEOUT_S:g} s")
    except OSError as error:
        return NvidiaDriver(problem=f"nvidia-smi can't be run ({error.strerror})")
    if rows is None:
        return NvidiaDriver(problem="nvidia-smi failed: the NVIDIA driver isn't loaded or doesn't answer")
    cells = [[cell.strip() for cell in row] for row in csv.reader(rows.splitlines()) if len(row) >= 3]
    cuda = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+\.\d+)", about)
    return NvidiaDriver(
        version=cells[0][2] if cells else None,
        cuda=cuda[1] if cuda else None,
        gpus=tuple(
            (row[0], int(row[1]) << 20 if row[1].isdecimal() else None, row[3] if len(row) > 3 else None)
            for row in cells
        ),
    )


def _nvidia_smi(*arguments: str) -> str | None:
    result = subprocess.run(
        ["nvidia-smi", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=NVIDIA_SMI_TIMEOUT_S,
        check=False,
    )
    return result.stdout if result.returncode == 0 else None
