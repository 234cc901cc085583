"""Shared by the augmentations: random numbers for each image, mixing of targets, warping, and checks of settings.

Model inputs are normalised: 0 is the mean colour of the data set, not black, and 1 is one standard deviation. Random
numbers are drawn on the device in float32, and nothing here waits for the device. Each process draws the numbers of the
global batch and takes those of its own examples, so an example is augmented alike however many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from suanli.core.errors import UsageError
from suanli.core.types import Batch

# Roles of targets that an augmentation keeps true: of the whole picture, where parts may move or go; or any.
WHOLE_PICTURE = frozenset({"class", "labels", "value", "identity"})
EVERY_ROLE = WHOLE_PICTURE | {"boxes", "mask", "text"}


def draw_for_batch(batch: Batch, draw: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The random numbers of this batch's examples; `draw(count)` draws those of the global batch."""
    if batch.global_positions is None or batch.global_size is None:
        return draw(len(batch.index))
    return draw(batch.global_size)[batch.global_positions]


def uniform(batch: Batch, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    """(B,) float32 in [low, high) on the device of the batch."""
    device = batch.index.device
    return (
        draw_for_batch(batch, lambda count: torch.rand(count, generator=generator, device=device)) * (high - low) + low
    )


def integers(batch: Batch, end: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) int64 from 0 to before `end` on the device of the batch."""
    device = batch.index.device
    return draw_for_batch(batch, lambda count: torch.randint(end, (count,), generator=generator, device=device))


def partners(batch: Batch) -> torch.Tensor:
    """(B,) int64: for each example, the position of the one to mix it with: its neighbour, and for the last of an odd
    number itself. A batch is in random order already, and the same process computes both of a pair."""
    positions = torch.arange(len(batch.index), device=batch.index.device)
    return (positions ^ 1).clamp(max=len(batch.index) - 1)


def group_of(batch: Batch, count: int) -> torch.Tensor:
    """(B, count) int64: the positions of each example itself and of its neighbours in groups of `count`, a power of
    two; at the end of a batch some repeat."""
    positions = torch.arange(len(batch.index), device=batch.index.device)
    group = torch.arange(count, device=positions.device)
    return (positions[:, None] ^ group).clamp(max=len(positions) - 1)


def per_image(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) to (B, 1, 1, 1) with the dtype of `like`, to be broadcast over (B, C, H, W)."""
    if values.dtype is not torch.bool:
        values = values.to(like.dtype)
    return values[:, None, None, None]


def warp(inputs: torch.Tensor, matrices: torch.Tensor, *, outside: str = "border") -> torch.Tensor:
    """Samples each image (C, H, W) bilinearly with its (2, 3) matrix, in coordinates from -1 to 1. Outside of the image
    is the nearest edge pixel ("border"), or the mean colour ("zeros"). (B, C, H, W) and (B, 2, 3) to (B, C, H, W).

    Computed in float32 on contiguous planes: on a CPU that is several times as fast as bfloat16 or channels_last.
    """
    planes = inputs.to(torch.float32).contiguous()
    grid = F.affine_grid(matrices.to(torch.float32), list(planes.shape), align_corners=False)
    warped = F.grid_sample(planes, grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return warped.to(inputs.dtype).contiguous(memory_format=torch.channels_last)


def change_where(
    mask: torch.Tensor,
    inputs: torch.Tensor,
    change: Callable[..., torch.Tensor],
    *parameters: torch.Tensor,
) -> torch.Tensor:
    """`change(inputs, *parameters)` for the images where `mask` (B,) is true; the others stay.

    On a CPU only those images are computed, and `inputs`, which must be the caller's own copy, is changed in place. On
    a GPU all are computed and then selected: to ask for their number would wait for the device.
    """
    if inputs.device.type != "cpu":
        return torch.where(per_image(mask, inputs), change(inputs, *parameters), inputs)
    positions = mask.nonzero()[:, 0]
    if not len(positions):
        return inputs
    inputs[positions] = change(inputs[positions], *(parameter[positions] for parameter in parameters))
    return inputs


def to_grey(x: torch.Tensor) -> torch.Tensor:
    """The mean of three channels: (B, 3, H, W) to (B, 1, H, W). A sum of slices, because a reduction over such a short
    axis was measured more than twice as slow in channels_last."""
    return (x[:, :1] + x[:, 1:2] + x[:, 2:3]) / 3


def symmetric_beta(batch: Batch, alpha: float, generator: torch.Generator) -> torch.Tensor:
    """(B,) float32 from Beta(alpha, alpha), without rejection: L. Devroye, "Random variate
    generation in one line of code", Winter Simulation Conference 1996."""
    u = uniform(batch, 0, 1, generator).double().clamp(min=1e-12)
    cosine = torch.cos(2 * torch.pi * uniform(batch, 0, 1, generator).double()).square()
    sign = torch.where(uniform(batch, -1, 1, generator) < 0, -1.0, 1.0)
    distance = 1 / (2 * torch.sqrt(1 + 1 / ((u ** (-1 / alpha) - 1) * cosine).clamp(min=1e-12)))
    return (0.5 + sign * distance).to(torch.float32)


def class_shares(batch: Batch) -> torch.Tensor:
    """(B, K) float32 shares of the classes (B,) of a batch; shares are returned as they are."""
    targets = batch.targets["class"]
    if targets.ndim == 2:
        return targets
    result = torch.zeros(len(targets), batch.classes, device=targets.device)
    return result.scatter_(1, targets[:, None], 1.0)


def mix_shares(own: torch.Tensor, partner: torch.Tensor, own_part: torch.Tensor) -> torch.Tensor:
    """Mixes class shares (B, K): `own_part` (B,) of an image's own, the rest of its partner's."""
    part = own_part[:, None].to(own.dtype)
    return own * part + partner * (1 - part)


def check_number(owner: object, name: str, low: float, high: float) -> None:
    """Raises UsageError unless setting `name` of an augmentation is a number in [low, high]."""
    value = getattr(owner, name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _invalid(owner, name, value, f"a number from {low:g} to {high:g}")


def check_range(owner: object, name: str, low: float, high: float) -> None:
    """Raises UsageError unless setting `name` is a pair of numbers in [low, high], the smaller first."""
    value = getattr(owner, name)
    if (
        not isinstance(value, (tuple, list))
        or len(value) != 2
        or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value)
        or not low <= value[0] <= value[1] <= high
    ):
        raise _invalid(owner, name, value, f"two numbers from {low:g} to {high:g}, the smaller first")
    object.__setattr__(owner, name, tuple(value))


def _invalid(owner: object, name: str, value: object, allowed: str) -> UsageError:
    augmentation = type(owner).__name__.lower()
    return UsageError(f"Augmentation {augmentation}: {name} is {value!r}.", fix=f"Give {allowed}.")
