"""EfficientNet-Lite2: a fast convolutional network of 6.1 million parameters, made for images of 260 px.

Shared parts, names and sources are in `_efficientnet_lite.py`.
"""

from __future__ import annotations

from suanli.models.networks._efficientnet_lite import model

MODEL = model("efficientnet_lite2", width=1.1, depth=1.2, dropout=0.3)
