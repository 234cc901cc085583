"""Settings that the recipes for tables share. Optimizer, dropout and batches are those that TabM's authors use by
default (arXiv:2410.24210); the schedule ends by itself, so that a training's length is known before it starts."""

from suanli.core.types import Recipe

SMALL_ROWS = 6_000  # training rows, below which batches are smaller

TABLES = Recipe(
    model="tabm",
    optimizer="adamw",
    lr=2e-3,
    weight_decay=3e-4,
    clip_norm=1.0,
    schedule="cosine",
    warmup_epochs=0.5,
    batch_size=256,
    epochs=15,
)
