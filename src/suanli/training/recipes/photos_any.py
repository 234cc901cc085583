"""Photos, and images of any size, from scratch, for a network that suanli doesn't know.

AdamW with clipped gradients, because it assumes the least about the structure of a network.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import is_builtin, trains_other_network


def suits(traits: Traits) -> int | None:
    return 50 if trains_other_network(traits) and not is_builtin(traits.model) else None


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
        task_args={"label_smoothing": 0.1},
        clip_norm=5.0,
    ),
    suits=suits,
)
