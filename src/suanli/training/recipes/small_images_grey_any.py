"""Small grey images, for a network other than `speednet` from scratch: never mirrored, and with a learning rate at
which networks without batch norms learn as well."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import ANY, shows_signs, trains_other_network


def suits(traits: Traits) -> int | None:
    return 60 if trains_other_network(traits) and shows_signs(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        **ANY.model_dump()
        | {
            "name": "small_images_grey_any",
            "augment": ("crop(fraction=0.0625)",),
            "epochs": 10,
            "task_args": {"label_smoothing": 0.05},
        }
    ),
    suits=suits,
)
