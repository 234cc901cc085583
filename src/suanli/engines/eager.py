"""PyTorch as it is: the reference in float32, and lower precisions where the device has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from suanli.saved import WEIGHTS, load_model
from suanli.types import Device, Engine, Loaded, Material, Placement
from suanli.whole import Whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAVY = (nn.Conv1d, nn.Conv2d, nn.Linear)


def why_not(device: Device, precision: str) -> str | None:
    if precision not in device.fast_dtypes:
        return f"{device.name} has no {precision} of its own"
    if precision == "float16" and device.type == "cpu":
        return "PyTorch has few float16 kernels for CPUs"
    return None


def build(material: Material, precision: str, folder: Path, placement: Placement) -> None:  # noqa: ARG001
    assert material.model is not None
    for name in ("model.json", WEIGHTS):
        shutil.copyfile(material.model / name, folder / name)


def load(folder: Path, precision: str, placement: Placement) -> Loaded:
    whole = Whole(load_model(folder, trust_code=placement.trust_code))
    where = torch.device(placement.device.torch_name)
    whole.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    lower = precision != "float32"

    def answer(rows: np.ndarray) -> np.ndarray:
        torch.set_num_threads(placement.threads)
        with torch.inference_mode(), torch.autocast(where.type, DTYPES[precision], enabled=lower):
            return whole(torch.from_numpy(rows).to(where)).float().cpu().numpy()  # type: ignore[no-any-return]

    def computes_in(rows: np.ndarray) -> str:
        ran_in: list[torch.dtype] = []
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output: ran_in.append(output.dtype))
            for module in whole.modules()
            if isinstance(module, HEAVY)
        ]
        answer(rows)
        for hook in hooks:
            hook.remove()
        return str(max(set(ran_in), key=ran_in.count)).removeprefix("torch.") if ran_in else precision

    return Loaded(answer=answer, computes_in=computes_in)


ENGINE = Engine(
    name="eager",
    precisions=("bfloat16", "float16", "float32"),
    packages=("torch",),
    why_not=why_not,
    build=build,
    load=load,
    needs="model",
    order=30,
)
