"""Photos, and images of any size, from scratch, for a network that suanli doesn't know.

AdamW with clipped gradients, because it asks least of a network's structure.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import from_scratch, is_known


def suits(traits: Traits) -> int | None:
    return 50 if from_scratch(traits) and not is_known(traits.model) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="photos_any",
        model="resnet18",
        augment=("resized_crop(scale=(0.35, 1.0))", "flip"),
        epochs=16,
        batch_size=64,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=1,
        label_smoothing=0.1,
        clip_norm=5.0,
    ),
    suits=suits,
)
