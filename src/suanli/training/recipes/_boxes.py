"""Settings that the recipes for boxes share."""

from __future__ import annotations

from suanli.core.types import Recipe

SIDE = 416  # px, of the longer side

BOXES = Recipe(
    task="detection",
    model="detnet_n",
    preprocess={"resize": "pad", "max_side": SIDE},
    epochs=80,
    batch_size=8,
    optimizer="adamw",
    lr=4e-3,
    augment=("flip", "zoom"),
    weight_decay=0.05,
    schedule="cosine",
    warmup_epochs=2,
    clip_norm=10.0,
    ema_decay=0.998,
    validate_every=5,
)
