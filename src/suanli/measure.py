"""How much a piece of work took."""

from __future__ import annotations

import sys

import torch

from suanli.types import Device


def peak_memory_bytes(device: Device) -> int | None:
    """The most memory this process has held so far: of the GPU where work runs on one, else of
    the process. None where the system doesn't say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device.torch_name))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
