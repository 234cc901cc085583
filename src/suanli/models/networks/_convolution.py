"""3x3 convolutions whose filters get their gradients faster where the feature maps are small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from suanli.machine.device import has_matrix_units

SMALL_MAP = 16  # pixels


class Conv3x3(nn.Conv2d):
    """(B, in, H, W) to (B, out, H/stride, W/stride), without bias.

    With AMX, oneDNN's gradient of the filters in bfloat16 is slow on maps of a few pixels. One product of matrices over
    the whole batch takes a half to a quarter of its time there.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self._applies(x):
            return super().forward(x)
        y: torch.Tensor = _ConvolveSmallMaps.apply(x, self.weight.to(x.dtype))  # type: ignore[no-untyped-call]
        return y

    def _applies(self, x: torch.Tensor) -> bool:
        """Not where torch.compile or an exporter looks, which knows torch's layer better."""
        return (
            self.training
            and x.device.type == "cpu"
            and x.dtype is torch.bfloat16
            and self.weight.requires_grad
            and self.stride == (1, 1)
            and x.shape[2] * x.shape[3] <= SMALL_MAP
            and x.is_contiguous(memory_format=torch.channels_last)
            and has_matrix_units()
            and not torch.compiler.is_compiling()
        )


class _ConvolveSmallMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        x, weight = ctx.saved_tensors
        of_x: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            of_x = conv2d_input(x.shape, weight, gradient, padding=1)  # type: ignore[no-untyped-call]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # (B, H, W, 3, 3, in)
        rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, out)
        of_weight = rows.T @ windows.flatten(0, 2).flatten(1)
        return of_x, of_weight.view(len(of_weight), 3, 3, -1).permute(0, 3, 1, 2)
