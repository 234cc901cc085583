"""Photos, and images of any size for a residual network, from scratch.

Muon was chosen over AdamW on 400 held-out training photos at 72 px, with three epochs and one seed; its learning rates
were not tuned.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import NORMLESS, is_builtin, trains_other_network


def suits(traits: Traits) -> int | None:
    return 50 if trains_other_network(traits) and is_builtin(traits.model) and traits.model not in NORMLESS else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="photos",
        model="resnet18",
        augment=("resized_crop(scale=(0.35, 1.0))", "flip"),
        epochs=16,
        batch_size=64,
        optimizer="muon",
        lr=0.02,
        optimizer_args={"momentum": 0.9, "other_momentum": 0.9, "head_lr_scale": 5.0, "bias_lr_scale": 5.0},
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=0.5,
        task_args={"label_smoothing": 0.1},
        clip_norm=5.0,
    ),
    suits=suits,
)
