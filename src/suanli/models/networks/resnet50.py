"""ResNet-50: residual network of 50 layers, 25.6 million parameters at 1,000 classes.

Shared parts, names and sources are in `_resnet.py`.
"""

from __future__ import annotations

from suanli.models.networks._resnet import Bottleneck, model

MODEL = model("resnet50", Bottleneck, (3, 4, 6, 3))
