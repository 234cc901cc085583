"""What this machine is: its devices, cores and memory, and whether this torch build runs on them.

Everything is asked of the kernel, the driver or torch at the moment of the call; there is no table of product names.
What is unknown is None. The limits of a container (cgroups) and of the shell (ulimit) count, since they are what kills
a process. How fast the machine is isn't here: `peak.py` measures that.

Works on Linux and macOS; elsewhere memory limits are unknown.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from suanli.core import console
from suanli.core.errors import MachineError, UsageError
from suanli.core.types import Device, Environment
from suanli.machine.cpus import cgroups, read_text
from suanli.machine.cpus import cores as cores
from suanli.machine.cpus import physical_cores as physical_cores
from suanli.machine.gpus import Gpu, are_gpus_hidden, gpus, nvidia_driver
from suanli.machine.process_environment import speed_variables

# --- devices --------------------------------------------------------------------------------


def detect(name: str | None = None) -> Device:
    """The device to use. None or "auto" is the first GPU that works, else Apple's mps, else the CPU; "cpu", "cuda",
    "cuda:1" and "mps" are that device.

    Raises UsageError for any other name, and MachineError, with the reason and what to do, where this torch can't run
    there.
    """
    wanted = (name or "auto").strip().lower()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", wanted):
        raise UsageError(f"Unknown device {name!r}.", fix="Allowed: auto, cpu, cuda, cuda:0, cuda:1, …, mps.")
    if wanted == "cpu":
        return _cpu()
    present = gpus()
    usable = {gpu.torch_name: gpu for gpu in present if gpu.torch_name and gpu.why_not is None}
    if wanted == "auto":
        if usable:
            return _gpu_device(next(iter(usable.values())))
        if present:
            console.warn(f"{present[0].name} is not used: {present[0].why_not} {present[0].fix}")
        elif not are_gpus_hidden() and (problem := nvidia_driver().problem):
            console.warn(f"Running on the CPU: {problem}.")
        return _cpu()
    exact = "cuda:0" if wanted == "cuda" else wanted
    if exact in usable:
        return _gpu_device(usable[exact])
    raise _unusable_error(wanted, exact, present)


def _unusable_error(wanted: str, exact: str, present: tuple[Gpu, ...]) -> MachineError:
    kind = wanted.partition(":")[0]
    visible = [gpu.torch_name for gpu in present if gpu.torch_name and gpu.torch_name.startswith(kind)]
    same = [gpu for gpu in present if gpu.torch_name == exact or (kind == "cuda" and gpu.torch_name is None)]
    if same:
        return MachineError(
            f"{wanted} can't be used: {same[0].name}: {same[0].why_not}",
            fix=f"{same[0].fix} Or use --device cpu.",
        )
    if visible:
        return MachineError(f"There is no {wanted}.", fix=f"This process sees {', '.join(visible)}.")
    if kind == "mps":
        return MachineError("mps needs a Mac with an Apple GPU, which isn't here.", fix="Use --device cpu.")
    if are_gpus_hidden():
        fix = "Unset CUDA_VISIBLE_DEVICES, or use --device cpu."
        return MachineError("CUDA_VISIBLE_DEVICES hides every GPU from this process.", fix=fix)
    reason = nvidia_driver().problem or "no NVIDIA GPU was found"
    return MachineError(f"{wanted} can't be used: {reason}.", fix="Use --device cpu.")


def _cpu() -> Device:
    return Device(
        name=cpu_name(),
        torch_name="cpu",
        memory_bytes=memory_bytes(),
        fast_dtypes=_cpu_fast_dtypes(instruction_sets()),
    )


def _cpu_fast_dtypes(flags: frozenset[str]) -> tuple[str, ...]:
    fast = ["float32"]
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        fast.append("bfloat16")
    # Never float16: torch has no fast kernels for its gradients on any CPU. On a Xeon with avx512_fp16, convolutions
    # trained at 0.7 GFLOP/s, in float32 at 229.
    return tuple(fast)


def _gpu_device(gpu: Gpu) -> Device:
    import torch

    assert gpu.torch_name is not None
    fast = ["float32"]
    if gpu.torch_name == "mps":
        fast += ["float16"]
    else:
        with torch.cuda.device(gpu.torch_name):
            major, minor = torch.cuda.get_device_capability()
            if torch.cuda.is_bf16_supported(including_emulation=False):
                fast.append("bfloat16")
            if torch.version.hip or major >= 7:  # from 7.0 on there are half-precision tensor cores
                fast.append("float16")
            if not torch.version.hip and major >= 8:
                fast.append("tfloat32")
            if not torch.version.hip and (major, minor) >= (8, 9):
                fast.append("float8_e4m3fn")
    return Device(
        name=gpu.name,
        torch_name=gpu.torch_name,
        memory_bytes=gpu.memory_bytes,
        fast_dtypes=tuple(fast),
    )


# --- the processor --------------------------------------------------------------------------

# The ones that decide how fast deep learning is, under their names in Linux.
INSTRUCTION_SETS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),  # x86-64
    *("asimd", "asimddp", "bf16", "i8mm", "sve", "sve2", "sme"),  # Arm; asimd is Neon
)
_TORCH_NAMES = {"avx512_f": "avx512f", "fma3": "fma", "neon": "asimd", "dot": "asimddp"}


def cpu_name(root: Path = Path("/")) -> str:
    text = read_text(root / "proc/cpuinfo") or ""
    if (model := re.search(r"^(?:model name|Model)\s*:\s*(\S.*)$", text, re.MULTILINE)) is not None:
        return " ".join(model[1].split())
    if sys.platform == "darwin" and shutil.which("sysctl"):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "Apple CPU"
    return str(_torch_capabilities().get("cpu_name") or platform.processor() or platform.machine())


def instruction_sets(root: Path = Path("/")) -> frozenset[str]:
    """Those of INSTRUCTION_SETS that the processor has and the kernel allows."""
    text = read_text(root / "proc/cpuinfo") or ""
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    if flags is not None:
        have = set(flags[1].split())
    else:
        have = {_TORCH_NAMES.get(name, name) for name, value in _torch_capabilities().items() if value}
    return frozenset(have & set(INSTRUCTION_SETS))


@cache
def has_matrix_units() -> bool:
    """Whether oneDNN multiplies matrices of bfloat16 in tiles (AMX): with other instructions for bfloat16, a product
    can be slower than in float32."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "DEFAULT"
    allowed = any(word in limit.upper() for word in ("AMX", "DEFAULT", "ALL"))
    return allowed and "amx_bf16" in instruction_sets()


def _torch_capabilities() -> dict[str, object]:
    import torch

    get_capabilities = getattr(torch.cpu, "get_capabilities", None)  # the oldest torch that suanli accepts has none
    return dict(get_capabilities()) if get_capabilities else {}


# --- memory ---------------------------------------------------------------------------------


def memory_bytes(root: Path = Path("/")) -> int | None:
    """Main memory that this process may use: the smallest of the installed memory, the limits of its cgroups and its
    ulimit. None: unknown."""
    limits = [limit for limit, _ in _cgroup_memory(root)]
    if sys.platform != "win32":
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if (limit := _address_space_limit()) is not None:
        limits.append(limit)
    return min(limits, default=None)


def available_memory_bytes(device: Device, sharers: int = 1) -> int | None:
    """Memory that could be allocated on the device now. Main memory is divided by `sharers`, the number of processes
    that need it at the same time. None: unknown."""
    if device.type == "cpu":
        return _available_main_memory(Path("/"), sharers)
    import torch

    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    free, _ = torch.cuda.mem_get_info(device.torch_name)
    cached = torch.cuda.memory_reserved(device.torch_name) - torch.cuda.memory_allocated(device.torch_name)
    return int(free + cached)


def peak_memory_bytes(device: Device) -> int | None:
    """The most memory that this process has held on the device so far. None: unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device.torch_name)
    if device.type == "mps" or sys.platform == "win32":
        return None
    # Better than getrusage, whose peak a new process inherits from the one that started it.
    if (
        peak_kb := re.search(r"^VmHWM:\s*(\d+) kB", read_text(Path("/proc/self/status")) or "", re.MULTILINE)
    ) is not None:
        return int(peak_kb[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _available_main_memory(root: Path, sharers: int = 1) -> int | None:
    free = [max(0, limit - used) for limit, used in _cgroup_memory(root)]
    if (
        kb := re.search(r"^MemAvailable:\s*(\d+) kB", read_text(root / "proc/meminfo") or "", re.MULTILINE)
    ) is not None:
        free.append(int(kb[1]) * 1024)
    free = [bytes_ // sharers for bytes_ in free]
    if (limit := _address_space_limit()) is not None:  # each process has its own
        pages = (read_text(root / "proc/self/statm") or "0").split()[0]
        free.append(max(0, limit - int(pages) * os.sysconf("SC_PAGE_SIZE")))
    return min(free, default=None)


def _address_space_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of every cgroup that limits this process. File cache that the kernel can drop on demand
    isn't counted as used."""
    for folder, version in cgroups("memory", root):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = read_text(folder / names[0]) or "max", read_text(folder / names[1]) or "0"
        if limit.isdecimal() and used.isdecimal() and int(limit) < 1 << 62:  # larger means no limit in version 1
            stat = re.search(rf"^{names[2]} (\d+)$", read_text(folder / "memory.stat") or "", re.MULTILINE)
            yield int(limit), max(0, int(used) - (int(stat[1]) if stat else 0))


_OUT_OF_MEMORY = re.compile(
    # The first is all that oneDNN says.
    r"could not create a (?:primitive|memory)(?! descriptor)|"
    r"can't allocate memory|not enough memory|out of memory|_STATUS_ALLOC_FAILED|Cannot allocate memory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, NumPy, the operating system or torch means that main memory or the GPU's ran out.
    Only torch's GPU allocators have a class for it."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, SystemError):  # C code that had no memory to make an exception
        return re.search("without (?:exception set|setting an exception)", str(error)) is not None
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


# --- the record of a run --------------------------------------------------------------------

PACKAGES = (
    "suanli",
    "torch",
    "numpy",
    "pillow",
    "simplejpeg",
    "scikit-learn",
    "safetensors",
    "timm",
    "triton",
)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """The versions of those packages that are installed, by name. Imports none of them."""
    installed = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def environment(device: Device | None = None) -> Environment:
    """What a person needs to repeat a run elsewhere."""
    import torch

    device = device or detect()
    record: Environment = {
        "command": [
            "suanli" if (name := Path(sys.argv[0]).name) == "__main__.py" else name,
            *(_without_home(argument) for argument in sys.argv[1:]),
        ],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "versions": versions(),
        "device": asdict(device),
        "cpu": cpu_name(),
        "instruction_sets": sorted(instruction_sets()),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "variables": speed_variables(),
    }
    if device.type == "cuda":
        record["cuda"] = torch.version.cuda or torch.version.hip
        record["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        record["driver"] = nvidia_driver().version
    return record


def _without_home(argument: str) -> str:
    home = os.path.expanduser("~").rstrip("/")
    return re.sub(rf"{re.escape(home)}(?=/|$)", "~", argument) if len(home) > 1 else argument
