"""Small grey images, for a network other than `speednet` from scratch: never mirrored, and with a learning rate at
which networks without batch norms learn as well."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import shows_signs, trains_other_network


def suits(traits: Traits) -> int | None:
    return 60 if trains_other_network(traits) and shows_signs(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="small_images_grey_any",
        model="resnet18",
        augment=("crop(fraction=0.0625)",),
        epochs=10,
        batch_size=64,
        optimizer="adamw",
        lr=5e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=1,
        task_args={"label_smoothing": 0.05},
        clip_norm=1.0,
    ),
    suits=suits,
)
