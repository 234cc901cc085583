"""EfficientNet-Lite0: a fast convolutional network of 4.7 million parameters, made for images of 224 px.

Shared parts, names and sources are in `_efficientnet_lite.py`.
"""

from __future__ import annotations

from suanli.models.networks._efficientnet_lite import model

MODEL = model("efficientnet_lite0", width=1.0, depth=1.0, dropout=0.2)
