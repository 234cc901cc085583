"""Where each speedup is used, and what it sets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from suanli import plugins
from suanli.types import Device, Step


def device(kind: str, *dtypes: str) -> Device:
    return Device(name="the device", torch_name=kind, memory_bytes=None, fast_dtypes=dtypes)


@pytest.mark.parametrize(
    ("name", "where", "usable"),
    [
        ("bf16", device("cpu", "float32"), False),
        ("bf16", device("cpu", "float32", "bfloat16"), True),
        ("bf16", device("cuda:0", "float32", "float16"), False),
        ("channels_last", device("cpu", "float32"), True),
        ("channels_last", device("cuda:1", "float32"), True),
        ("channels_last", device("mps", "float32"), False),
        ("fused_optimizer", device("cpu", "float32"), True),
        ("fused_optimizer", device("xpu", "float32"), False),
    ],
)
def test_where_it_is_used(name: str, where: Device, usable: bool) -> None:
    reason = plugins.load("speedups", name).why_not(where)
    assert (reason is None) == usable


def test_bf16_names_the_device_that_is_slow_at_it() -> None:
    assert "the device" in plugins.load("speedups", "bf16").why_not(device("cpu", "float32"))


def test_channels_last_lays_out_filters_and_leaves_matrices() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    step = plugins.load("speedups", "channels_last").apply(Step(model=model), device("cpu"))
    conv, _, linear = step.model
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert linear.weight.is_contiguous()
    assert step.memory_format is torch.channels_last
