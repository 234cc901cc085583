"""MobileNetV3-Large: 5.5 million parameters at 1,000 classes.

Shared parts, names and sources are in `_mobilenet_v3.py`.
"""

from __future__ import annotations

from suanli.models.networks._mobilenet_v3 import model, rows

STAGES = """
    3 16 16
    3 64 24 2, 3 72 24
    5 72 40 s 2, 5 120 40 s, 5 120 40 s
    3 240 80 h 2, 3 200 80 h, 3 184 80 h, 3 184 80 h
    3 480 112 s h, 3 672 112 s h
    5 672 160 s h 2, 5 960 160 s h, 5 960 160 s h
"""

MODEL = model("mobilenet_v3_large", stages=rows(STAGES), features=1280)
