"""How much of the device's measured peak a training uses.

The peak (`Ceilings`) was measured before; nothing here measures the device.
"""

from __future__ import annotations

import torch

from suanli.compute.flops import flops
from suanli.compute.infer import network_inputs
from suanli.compute.roofline import measure_layers
from suanli.compute.roofline_records import Roofline
from suanli.compute.step_runner import apply_settings, call, force_eager
from suanli.core.types import Device, Step
from suanli.machine.ceilings import Ceilings
from suanli.training.loop import Loop

COUNTED_EXAMPLES = 4  # whose operations are counted; every other example takes as many
PASSES = 2  # of the network, to time its layers
ROOFLINE_EXAMPLES = 256  # at most, on a CPU: more take longer and reach the same; a GPU needs the whole batch


def step_precision(step: Step, device: Device) -> str:
    """The name of the dtype that most products and convolutions of a step are computed in."""
    if step.autocast_dtype is not None:
        return str(step.autocast_dtype).removeprefix("torch.")
    with apply_settings(step):
        return _float32_precision(device)


def _float32_precision(device: Device) -> str:
    """The precision of a product of float32 numbers under the current settings of the process."""
    backends = torch.backends
    if device.type == "cuda" and "tf32" in (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
    ):
        return "tfloat32"
    if device.type == "cpu" and "bf16" in (
        backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        backends.mkldnn.conv.fp32_precision,  # type: ignore[attr-defined]
    ):
        return "bfloat16"
    return "float32"


def ceiling_flops(ceilings: Ceilings) -> dict[str, float]:
    """For each precision, the highest speed of a matrix product or a convolution, in FLOP/s."""
    highest: dict[str, float] = {}
    for speeds in (ceilings.matmul_flops, ceilings.conv_flops):
        for name, value in speeds.items():
            if value:
                highest[name] = max(value, highest.get(name, 0.0))
    return highest


def ideal_step_s(loop: Loop, device: Device, ceilings: Ceilings) -> float | None:
    """Seconds that the matrix products and convolutions of a training step would take at the device's peak. None: the
    peak of that precision isn't known."""
    ceiling = ceiling_flops(ceilings).get(step_precision(loop.compute, device))
    if ceiling is None:
        return None
    return count_step_flops(loop) / ceiling


def count_step_flops(loop: Loop) -> float:
    """Operations of a training step on this process's share of the batch, on full-size pictures."""
    examples = min(COUNTED_EXAMPLES, loop.batch_size)
    with apply_settings(loop.compute), loop.preserve_weights():
        counted = flops(lambda: loop.try_step(examples, whole=True))
    return counted / examples * loop.batch_size


def measure_roofline(loop: Loop, device: Device, ceilings: Ceilings | None) -> Roofline:
    """Times the layers of the network in a forward pass on a training batch, as validation computes it."""
    step = loop.compute
    batch = loop.first_batch(ROOFLINE_EXAMPLES if device.type == "cpu" else None)
    inputs = network_inputs(batch.inputs)
    was_training = loop.model.training
    loop.model.eval()
    try:
        with apply_settings(step), torch.no_grad(), force_eager(step):
            layers = measure_layers(loop.model, lambda: call(step, loop.model, inputs), device=device, passes=PASSES)
    finally:
        loop.model.train(was_training)
    return Roofline(
        device=device.name,
        dtype=step_precision(step, device),
        batch=len(batch.index),
        layers=tuple(layers),
        ceilings=ceilings,
    )
