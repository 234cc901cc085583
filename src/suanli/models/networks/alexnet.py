"""AlexNet in the single-tower form that is in use today.

Parameter names are those of torchvision, so that published safetensors weights load by name. Images of at
most 64 px get a 5x5 stem of stride 1, padded pooling and a smaller pooled grid: the original stem fails
on them. There is no norm layer, so it wants a small learning rate and warm-up.

Source: A. Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv:1404.5997.
"""

from __future__ import annotations

import torch
from torch import nn

from suanli.core.types import Model
from suanli.models.networks._resnet import Stem, small_stem


class AlexNet(nn.Module):
    def __init__(self, *, classes: int, in_channels: int, small: bool, grid: int, dropout: float) -> None:
        super().__init__()
        if small:
            first = nn.Conv2d(in_channels, 64, 5, padding=2)
        else:
            first = nn.Conv2d(in_channels, 64, 11, stride=4, padding=2)
        padding = 1 if small else 0
        self.features = nn.Sequential(
            first,
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=padding),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=padding),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=padding),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(256 * grid * grid, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                # Without norms, a weaker start makes the signal vanish before the last layer.
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.get_parameter("classifier.6.weight"), std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def build(
    *,
    classes: int,
    in_channels: int,
    image_size: tuple[int, int],
    stem: Stem = "auto",
    dropout: float = 0.5,
) -> AlexNet:
    """Images (B, in_channels, *image_size) to logits (B, classes). `stem` "small" is for images of at
    most 64 px, "large" for others; "auto" decides by `image_size`."""
    small = small_stem(stem, image_size)
    grid = max(1, min(6, min(image_size) // 8)) if small else 6
    if not small and min(image_size) < 63:
        raise ValueError(f'stem "large" needs images of at least 63 px, not {image_size}')
    return AlexNet(classes=classes, in_channels=in_channels, small=small, grid=grid, dropout=dropout)


MODEL = Model(name="alexnet", kinds=("image",), build=build, head="classifier.6", source="arXiv:1404.5997")
