"""ResNet-18: residual network of 18 layers, 11.7 million parameters at 1,000 classes.

Shared parts, names and sources are in `_resnet.py`.
"""

from __future__ import annotations

from suanli.models.networks._resnet import Basic, model

MODEL = model("resnet18", Basic, (2, 2, 2, 2))
