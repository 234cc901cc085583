"""DetNet, size n: a detector of 1.1 million parameters.

Shared parts and sources are in `_detnet.py`.
"""

from __future__ import annotations

from suanli.models.networks._detnet import model

MODEL = model("detnet_n", width=24, depths=(1, 2, 2, 1), neck=64)
