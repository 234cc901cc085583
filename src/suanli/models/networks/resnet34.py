"""ResNet-34: residual network of 34 layers, 21.8 million parameters at 1,000 classes.

Shared parts, names and sources are in `_resnet.py`.
"""

from __future__ import annotations

from suanli.models.networks._resnet import Basic, model

MODEL = model("resnet34", Basic, (3, 4, 6, 3))
