"""Small colour images, many of them: `speednet` for a handful of epochs, the first ones on smaller pictures.

Chosen on 5,000 training images of CIFAR-10 that took no part in training.
"""

from suanli.recipes._images import SMALL, for_speednet, is_few, is_sign
from suanli.types import Effort, Reached, Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 60 if for_speednet(traits) and not is_few(traits) and not is_sign(traits) else None


def _effort(epochs: float, lr: float, widths: tuple[int, ...], reached: float | None) -> Effort:
    """Measured on CIFAR-10 as JPEG: records/2026-11-25_epyc-2core_accuracy. None: by one seed only, which is no
    promise (nine epochs, 88 %)."""
    return Effort(
        changes={"epochs": epochs, "lr": lr, "model_args": {"widths": widths}, "validate_every": epochs},
        reached=(Reached(data="cifar10", classes=10, examples=44_893, score=reached),) if reached else (),
    )


RECIPE = RecipeChoice(
    recipe=Recipe(
        **SMALL.model_dump()
        | {
            "name": "small_images",
            "augment": ("crop(padding=2)", "flip(mode='alternate')"),
            "progressive_resizing": ((0.4, 0.625), (0.7, 0.75)),
            "epochs": 8,
            "lr": 0.18,
        }
    ),
    suits=suits,
    efforts=(
        _effort(0.8, 0.24, (32, 64, 128), 0.716),
        _effort(1.3, 0.24, (32, 64, 128), 0.762),
        _effort(2.8, 0.24, (32, 64, 128), 0.804),
        _effort(4.0, 0.15, (64, 128, 256), 0.847),
        _effort(7.0, 0.15, (64, 256, 256), None),
    ),
)
