"""Photos, and images of any size for a network other than `speednet`, from scratch.

AdamW, because it asks little of a network that suanli doesn't know.
"""

from suanli.recipes._images import NORMLESS, from_scratch
from suanli.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 50 if from_scratch(traits) and traits.model not in NORMLESS else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="photos",
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
