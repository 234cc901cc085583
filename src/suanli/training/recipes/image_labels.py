"""Small images with several labels each: `speednet` from scratch. Optimizer and rates are those of the recipes for
classes. Never mirrored, since small images may show signs."""

from suanli.core.types import Recipe, RecipeChoice, Traits
from suanli.training.recipes._images import trains_speednet


def suits(traits: Traits) -> int | None:
    return 50 if trains_speednet(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="image_labels",
        task="multilabel",
        model="speednet",
        augment=("crop(fraction=0.0625)",),
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
