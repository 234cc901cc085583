"""DetNet, size m: a detector of 10 million parameters.

Shared parts and sources are in `_detnet.py`.
"""

from __future__ import annotations

from suanli.models.networks._detnet import model

MODEL = model("detnet_m", width=72, depths=(1, 2, 2, 1), neck=208)
