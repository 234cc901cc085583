"""Small colour images, at least 10,000: `speednet` for a handful of epochs, the first ones on smaller pictures.

Chosen on 5,000 training images of CIFAR-10 that took no part in training.
"""

from suanli.core.types import Budget, MeasuredScore, Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import SMALL, has_few_examples, shows_signs, trains_speednet


def suits(traits: Traits) -> int | None:
    return 60 if trains_speednet(traits) and not has_few_examples(traits) and not shows_signs(traits) else None


def _budget(epochs: float, lr: float, model_args: dict[str, object], score: float, **more: object) -> Budget:
    """Measured on CIFAR-10 as JPEG: records/2026-11-25_epyc-2core_accuracy; two in bfloat16 on a GPU:
    records/2026-11-27_h100_gpu; the most expensive with AMX: records/2026-12-01_xeon-2core_accuracy."""
    changes = {"epochs": epochs, "lr": lr, "validate_every": epochs, "model_args": model_args}
    return Budget(
        changes=changes | more,
        scores=(MeasuredScore(data="cifar10", classes=10, examples=44_893, score=score),),
    )


def _large_batches(epochs: float, widths: tuple[int, ...], score: float) -> Budget:
    return _budget(
        epochs,
        0.24,
        {"widths": widths, "depths": (2, 2, 2), "whitening_bias": True},
        score,
        batch_size=2000,
        task_args={"label_smoothing": 0.2},
        optimizer_args={"head_lr_scale": 0.0833, "bias_lr_scale": 50.0, "normalize_filters": True},
        progressive_resizing=((0.2, 0.625), (0.5, 0.75)),
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
    budgets=(
        _budget(0.8, 0.24, {"widths": (32, 64, 128)}, 0.716),
        _budget(1.3, 0.24, {"widths": (32, 64, 128)}, 0.762),
        _budget(2.8, 0.24, {"widths": (32, 64, 128)}, 0.804),
        _budget(4.0, 0.15, {"widths": (64, 128, 256)}, 0.847),
        _budget(7.0, 0.15, {"widths": (64, 256, 256)}, 0.876),
        _large_batches(8.0, (64, 256, 256), 0.895),
        _large_batches(10.0, (96, 384, 384), 0.904),
    ),
)
