"""EfficientNet-Lite1: a fast convolutional network of 5.4 million parameters, made for images of 240 px.

Shared parts, names and sources are in `_efficientnet_lite.py`.
"""

from __future__ import annotations

from suanli.models.networks._efficientnet_lite import model

MODEL = model("efficientnet_lite1", width=1.0, depth=1.1, dropout=0.2)
