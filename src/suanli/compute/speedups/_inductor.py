"""What the speedups that compile share: whether this machine can compile, and TorchInductor's options."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from suanli.core.types import Device

SHARDED = "the weights of a sharded network are gathered between its blocks: compile_blocks compiles the blocks"
UNFREEZES = "the network would be compiled again for each layer that is unfrozen"
COMMUNICATES = "its batch norms communicate, which cuts the network into pieces too small to gain"


def why_not(device: Device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "compiling for a GPU needs the package triton"
    if device.type != "cpu":
        return f"torch.compile is not known to work on {device.type}"
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        return "compiling for a CPU needs a C++ compiler, and there is none (g++ or clang++)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "compiling for a CPU needs the header files of Python (a package named like python3-dev)"
    return None


def silence_tf32_advice() -> None:
    """Hide TorchInductor's advice to compute in TF32: that is a speedup of its own."""
    warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores", category=UserWarning)


def options(model: nn.Module) -> dict[str, Any]:
    """With dropout, compiled code draws the same random numbers as eager code."""
    has_dropout = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    return {"fallback_random": has_dropout}
