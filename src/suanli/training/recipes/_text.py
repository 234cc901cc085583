"""Settings that the text recipes share: chosen on the development split of SST-2."""

from suanli.core.types import Recipe

TEXT = Recipe(
    model="text_cnn",
    preprocess={"vocabulary_size": 20_000, "min_count": 2, "lowercase": True},
    augment=("word_dropout(p=0.3)",),
    epochs=3,
    batch_size=256,
    optimizer="adamw",
    lr=2e-3,
    schedule="cosine",
    warmup_epochs=0.2,
    task_args={"label_smoothing": 0.1},
    clip_norm=1.0,
    ema_decay=0.99,
)
