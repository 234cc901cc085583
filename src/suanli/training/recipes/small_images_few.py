"""Small colour images, fewer than 10,000: smaller batches and more epochs than `small_images`."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, for_speednet, is_few, is_sign


def suits(traits: Traits) -> int | None:
    return 60 if for_speednet(traits) and is_few(traits) and not is_sign(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **SMALL.model_dump()
        | {
            "name": "small_images_few",
            "augment": ("crop(fraction=0.0625)", "flip(mode='alternate')"),
            "batch_size": 100,
            "epochs": 30,
            "lr": 0.1,
            "optimizer_args": {"head_lr_scale": 0.8, "bias_lr_scale": 30.0, "normalize_filters": True},
            "label_smoothing": 0.05,
        }
    ),
    suits=suits,
)
