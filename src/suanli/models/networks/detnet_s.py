"""DetNet, size s: a detector of 4.2 million parameters.

Shared parts and sources are in `_detnet.py`.
"""

from __future__ import annotations

from suanli.models.networks._detnet import model

MODEL = model("detnet_s", width=48, depths=(1, 2, 2, 1), neck=128)
