"""Small grey images, fewer than 10,000: smaller batches and more epochs, never mirrored.

Learning rate, epochs and label smoothing were chosen on the validation split of the built-in digits, four seeds each.
"""

from suanli.core.types import Budget, MeasuredScore, Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, has_few_examples, shows_signs, trains_speednet


def suits(traits: Traits) -> int | None:
    return 60 if trains_speednet(traits) and has_few_examples(traits) and shows_signs(traits) else None


def _budget(epochs: float, score: float) -> Budget:
    """Measured by `benchmarks/bench_budgets.py`: records/2026-11-25_epyc-2core_accuracy."""
    return Budget(
        changes={"epochs": epochs},
        scores=(MeasuredScore(data="digits", classes=10, examples=1_414, score=score),),
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
            "task_args": {"label_smoothing": 0.05},
        }
    ),
    suits=suits,
    budgets=(_budget(3, 0.982), _budget(8, 0.992)),
)
