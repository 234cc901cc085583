"""Small grey images, fewer than 10,000: smaller batches and more epochs, never mirrored.

Rate, epochs and smoothing were chosen on the validation split of the built-in digits, four seeds each.
"""

from suanli.core.types import Budget, MeasuredScore, Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, for_speednet, is_few, is_sign


def suits(traits: Traits) -> int | None:
    return 60 if for_speednet(traits) and is_few(traits) and is_sign(traits) else None


def _effort(epochs: float, reached: float) -> Budget:
    """Measured by `benchmarks/bench_efforts.py`: records/2026-11-25_epyc-2core_accuracy."""
    return Budget(
        changes={"epochs": epochs},
        scores=(MeasuredScore(data="digits", classes=10, examples=1_414, score=reached),),
    )


RECIPE = RecipeChoice(
    recipe=Recipe(
        **SMALL.model_dump()
        | {
            "name": "small_images_grey_few",
            "augment": ("crop(fraction=0.125)",),
            "batch_size": 100,
            "epochs": 20,
            "lr": 0.1,
            "optimizer_args": {"head_lr_scale": 0.8, "bias_lr_scale": 30.0, "normalize_filters": True},
            "label_smoothing": 0.05,
        }
    ),
    suits=suits,
    budgets=(_effort(3, 0.982), _effort(8, 0.992)),
)
