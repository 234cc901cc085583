"""What engines on the CPU share; needs no torch."""

from __future__ import annotations

from suanli.core.types import Device

# The names of precisions in oneDNN and OpenVINO.
NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "s8": "int8", "i8": "int8", "u8": "int8"}


def why_not(device: Device, precision: str) -> str | None:
    if device.type != "cpu":
        return "written for the CPU so far"
    if precision == "bfloat16" and precision not in device.fast_dtypes:
        return f"{device.name} has no bfloat16 of its own"
    return None
