"""Images with several labels each, from scratch, for photos and for a network that the user names. AdamW with clipped
gradients assumes the least about its structure. Crops keep at least half of an image, so that its labels still hold."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import trains_other_network


def suits(traits: Traits) -> int | None:
    return 50 if trains_other_network(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="image_labels_any",
        task="multilabel",
        model="resnet18",
        augment=("resized_crop(scale=(0.5, 1.0))", "flip"),
        epochs=16,
        batch_size=64,
        optimizer="adamw",
        lr=5e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=1,
        clip_norm=1.0,
    ),
    suits=suits,
)
