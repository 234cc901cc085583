"""Environment variables that libraries read once, when they are loaded: OpenMP's, those of torch's allocator.

`set_variables` is for the command line, before it imports torch. Python code that imports suanli has its own
environment, and so has plain PyTorch, which suanli is compared with. Imports neither torch nor numpy.
"""

from __future__ import annotations

import os
from pathlib import Path

from suanli.machine.cpus import affinity, cores

# What keeps the libraries of torch from using all that the processor has.
INSTRUCTION_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
# What decides how fast a process computes: for the record of a run.
SPEED_VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_SPINCOUNT", "GOMP_CPU_AFFINITY"),
    *("MKL_NUM_THREADS", *INSTRUCTION_LIMITS),
    *("THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF"),
)
# How often a thread of GNU's OpenMP looks for work before it sleeps: by default 300,000 times, 4 to 11 ms on a Xeon, in
# which it may keep the thread that it waits for off its core. On two quiet cores 20,000 cost nothing: `speednet` was
# 1.01 times as fast (spread 0.02), `resnet18` 0.99 (0.03). Beside a process that burns a core, a step of `text_cnn`
# took 55 ms instead of 408. With 1,000, `text_cnn` had only 0.73 of its speed on a quiet machine.
SPIN_COUNT = 20_000
_own: set[str] = set()


def set_variables(root: Path = Path("/")) -> None:
    """Set what the user hasn't set."""
    wanted = {} if "OMP_WAIT_POLICY" in os.environ else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
    if cores(root) < len(affinity()):  # OpenMP counts CPUs, and doesn't know of a container's quota
        wanted["OMP_NUM_THREADS"] = str(cores(root))
    for name, value in wanted.items():
        if name not in os.environ:
            os.environ[name] = value
            _own.add(name)


def of_user(name: str) -> str | None:
    """The variable's value, unless `set_variables` chose it."""
    return None if name in _own else os.environ.get(name)


def speed_variables() -> dict[str, str]:
    """Those of SPEED_VARIABLES that are set, by whomever."""
    return {name: os.environ[name] for name in SPEED_VARIABLES if name in os.environ}
