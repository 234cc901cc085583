"""Images for a network that starts from given weights: small steps, the backbone's a tenth of the head's."""

from suanli.recipes._images import is_sign
from suanli.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 60 if traits.kind == "image" and traits.weights and not is_sign(traits) else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="fine_tune",
        model="resnet18",
        augment=("resized_crop(scale=(0.5, 1.0))", "flip"),
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
