"""Small colour images, fewer than 10,000: smaller batches and more epochs than `small_images`."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, has_few_examples, shows_signs, trains_speednet


def suits(traits: Traits) -> int | None:
    return 60 if trains_speednet(traits) and has_few_examples(traits) and not shows_signs(traits) else None


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
            "task_args": {"label_smoothing": 0.05},
        }
    ),
    suits=suits,
)
