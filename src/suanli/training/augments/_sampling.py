"""What several augmentations share: random numbers per image, shares of classes, sampling at warped
places, and the check of settings.

Model inputs are normalised, so 0 is the mean colour of the data set, not black, and 1 is one
standard deviation. Random numbers are drawn on the device in float32, and nothing here waits for
the device. Each process draws those of the whole batch and takes its own, so that what happens to an
example doesn't depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from suanli.core.errors import UsageError
from suanli.core.types import Batch


def draw_for_batch(batch: Batch, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The numbers of this batch's examples: `draw(count)` gives them for all that the step learns from."""
    if batch.global_positions is None or batch.global_size is None:
        return draw(len(batch.inputs))
    return draw(batch.global_size)[batch.global_positions]


def uniform(batch: Batch, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """(B,) float32 in [low, high) on the device of the batch."""
    device = batch.inputs.device
    return (
        draw_for_batch(batch, lambda count: torch.rand(count, generator=generator, device=device)) * (high - low) + low
    )


def integers(batch: Batch, end: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) int64 from 0 to before `end` on the device of the batch."""
    device = batch.inputs.device
    return draw_for_batch(batch, lambda count: torch.randint(end, (count,), generator=generator, device=device))


def partners(batch: Batch) -> torch.Tensor:
    """(B,) places in this batch: neighbours are each other's, and the last of an odd number is its own. A batch is
    in random order already, and both of a pair are computed by the same process."""
    at = torch.arange(len(batch.inputs), device=batch.inputs.device)
    return (at ^ 1).clamp(max=len(batch.inputs) - 1)


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) to (B, 1, 1, 1) with the dtype of `like`, so that it meets (B, C, H, W)."""
    if values.dtype is not torch.bool:
        values = values.to(like.dtype)
    return values[:, None, None, None]


def warp(inputs: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Each image sampled bilinearly at places given by its (2, 3) matrix, in coordinates from -1 to
    1; places outside take the nearest edge pixel. (B, C, H, W) and (B, 2, 3) to (B, C, H, W).

    Computed in float32 on planes: on CPU that is several times as fast as bfloat16 or channels_last.
    """
    planes = inputs.to(torch.float32).contiguous()
    grid = F.affine_grid(matrices.to(torch.float32), list(planes.shape), align_corners=False)
    warped = F.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return warped.to(inputs.dtype).contiguous(memory_format=torch.channels_last)


def change_where(
    chosen: torch.Tensor,
    inputs: torch.Tensor,
    change: Callable[..., torch.Tensor],
    *parameters: torch.Tensor,
) -> torch.Tensor:
    """`change(inputs, *parameters)` for the images where `chosen` (B,) is true, the rest as they are.

    On CPU only those are computed, and `inputs`, which must be the caller's own copy, is changed and
    returned. A GPU computes all and selects, because to ask it how many there
    are would stop it.
    """
    if inputs.device.type != "cpu":
        return torch.where(per_image(chosen, inputs), change(inputs, *parameters), inputs)
    where = chosen.nonzero()[:, 0]
    if not len(where):
        return inputs
    inputs[where] = change(inputs[where], *(parameter[where] for parameter in parameters))
    return inputs


def to_grey(x: torch.Tensor) -> torch.Tensor:
    """The mean of three channels: (B, 3, H, W) to (B, 1, H, W). A sum of slices, because a reduction
    over so short an axis was measured more than twice as slow in channels_last."""
    return (x[:, :1] + x[:, 1:2] + x[:, 2:3]) / 3


def symmetric_beta(batch: Batch, alpha: float, generator: torch.Generator) -> torch.Tensor:
    """(B,) float32 from Beta(alpha, alpha), without rejection: L. Devroye, "Random variate
    generation in one line of code", Winter Simulation Conference 1996."""
    u = uniform(batch, 0, 1, generator).double().clamp(min=1e-12)
    cosine = torch.cos(2 * torch.pi * uniform(batch, 0, 1, generator).double()).square()
    sign = torch.where(uniform(batch, -1, 1, generator) < 0, -1.0, 1.0)
    distance = 1 / (2 * torch.sqrt(1 + 1 / ((u ** (-1 / alpha) - 1) * cosine).clamp(min=1e-12)))
    return (0.5 + sign * distance).to(torch.float32)


def class_shares(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """(B,) classes to (B, K) float32 shares; what already is shares stays."""
    if targets.ndim == 2:
        return targets
    result = torch.zeros(len(targets), classes, device=targets.device)
    return result.scatter_(1, targets[:, None], 1.0)


def mix_shares(own: torch.Tensor, partner: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Shares (B, K) of which each image keeps `part` (B,)."""
    kept = part[:, None].to(own.dtype)
    return own * kept + partner * (1 - kept)


def check_number(owner: object, name: str, low: float, high: float) -> None:
    """Raises UsageError unless setting `name` of an augmentation is a number in [low, high]."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _bad(owner, name, value, f"a number from {low:g} to {high:g}")


def check_range(owner: object, name: str, low: float, high: float) -> None:
    """Raises UsageError unless setting `name` is a pair, smaller first, in [low, high]."""
    value = getattr(owner, name)
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value)
        or not low <= value[0] <= value[1] <= high
    ):
        raise _bad(owner, name, value, f"two numbers from {low:g} to {high:g}, the smaller first")
    object.__setattr__(owner, name, tuple(value))


def _bad(owner: object, name: str, value: Any, wanted: str) -> UsageError:
    room = type(owner).__name__.lower()
    return UsageError(f"Augmentation {room}: {name} is {value!r}.", fix=f"Give {wanted}.")
