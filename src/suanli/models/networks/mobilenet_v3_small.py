"""MobileNetV3-Small: 2.5 million parameters at 1,000 classes.

Shared parts, names and sources are in `_mobilenet_v3.py`.
"""

from __future__ import annotations

from suanli.models.networks._mobilenet_v3 import model, rows

STAGES = """
    3 16 16 s 2
    3 72 24 2, 3 88 24
    5 96 40 s h 2, 5 240 40 s h, 5 240 40 s h
    5 120 48 s h, 5 144 48 s h
    5 288 96 s h 2, 5 576 96 s h, 5 576 96 s h
"""

MODEL = model("mobilenet_v3_small", stages=rows(STAGES), features=1024)
