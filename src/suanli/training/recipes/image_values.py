"""Images with a number each: `speednet` from scratch, for a network of any other name see `image_values_any`.

No augmentation: many a number changes when a picture is mirrored, enlarged or moved. Optimizer and loss were chosen on
validation data with one seed: the angle by which pictures of CIFAR-10 were turned, the value of handwritten digits, the
direction of light on faces, and the number of cells in a picture.
"""

from suanli.core.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 50 if traits.kind == "image" and not traits.weights and traits.model in (None, "speednet") else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="image_values",
        task="regression",
        task_args={"loss_function": "huber"},
        model="speednet",
        epochs=20,
        batch_size=64,
        optimizer="muon",
        lr=0.1,
        optimizer_args={"head_lr_scale": 0.8, "bias_lr_scale": 30.0, "normalize_filters": True},
        schedule="linear",
        clip_norm=5.0,
    ),
    suits=suits,
)
