"""Detectors that no one has trained, with answers of many sizes and scores: a network of a user's own, which this file
is the module of, and DetNet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from suanli.core.types import Recipe
from suanli.data.preprocess.image import ImagePreprocess
from suanli.models import build as networks
from suanli.models.model_folder import build_task, save_model

CLASSES = ("ant", "bee", "cat")
SIZE = (64, 96)  # px
STRIDE = 8  # px of a cell


class Cells(nn.Module):
    """A box with its centre in every cell."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (3, 16, 16):
            layers += [nn.Conv2d(before, 16, 3, stride=2, padding=1), nn.ReLU()]
        self.backbone = nn.Sequential(*layers)
        self.classes, self.sides = nn.Conv2d(16, classes, 1), nn.Conv2d(16, 4, 1)
        nn.init.normal_(self.classes.weight, std=4)
        nn.init.normal_(self.sides.weight, std=0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        maps = self.backbone(x)
        height, width = maps.shape[2:]
        y, x = ((torch.arange(side, dtype=torch.float32) + 0.5) * STRIDE for side in (height, width))
        points = torch.stack(
            [x.repeat(height), y.repeat_interleave(width), torch.full((height * width,), float(STRIDE))], 1
        )
        logits, reach = (head(maps).flatten(2).transpose(1, 2) for head in (self.classes, self.sides))
        reach = reach.clamp(max=3).exp() * STRIDE
        boxes = torch.cat([points[:, :2] - reach[..., :2], points[:, :2] + reach[..., 2:]], 2)
        return boxes, logits, points.expand(boxes.shape[0], -1, -1)


def build(*, classes: int) -> nn.Module:
    return Cells(classes)


def save_detector(folder: Path, model: str = "box_model:build") -> Path:
    """A model folder; the network of this file needs `trust_code`."""
    settings = {"width": 8, "depths": [1, 1, 1, 1], "neck": 16} if model == "detnet_n" else {}
    recipe = Recipe(name="boxes", task="detection", model=model, model_args=settings)
    preprocess = ImagePreprocess(height=SIZE[0], width=SIZE[1], resize="pad", mean=(0.5,) * 3, std=(0.25,) * 3)
    task = build_task("detection", CLASSES, {"threshold": 0.5, "most": 40})
    torch.manual_seed(0)
    network = networks.build(recipe, preprocess, task)
    if model == "detnet_n":
        with torch.no_grad():
            network.head.classes.weight.mul_(60)
            network.head.sides.weight.mul_(10)
            for _ in range(30):  # its norms get to know such images
                network.train()(torch.rand(8, 3, *SIZE) * 4 - 2)
    save_model(folder, network.eval(), recipe=recipe, preprocess=preprocess, task=task, data={})
    return folder
