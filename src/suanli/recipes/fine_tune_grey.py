"""Small grey images for a network that starts from given weights: as `fine_tune`, but never mirrored."""

from suanli.recipes._images import is_sign
from suanli.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and is_sign(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="fine_tune_grey",
        model="resnet18",
        augment=("crop(fraction=0.0625)",),
        epochs=8,
        batch_size=32,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        backbone_lr_scale=0.1,
        schedule="cosine",
        warmup_epochs=0.5,
        label_smoothing=0.1,
        clip_norm=1.0,
    ),
    suits=suits,
)
