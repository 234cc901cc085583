"""Images with a number each, for a network that the user names. AdamW with clipped
gradients assumes the least about its structure; its rates are those of the recipes for classes."""

from suanli.core.types import Recipe, RecipeChoice, Traits


def suits(traits: Traits) -> int | None:
    return 40 if traits.kind == "image" and not traits.weights else None


RECIPE = RecipeChoice(
    recipe=Recipe(
        name="image_values_any",
        task="regression",
        task_args={"loss_function": "huber"},
        model="resnet18",
        epochs=16,
        batch_size=64,
        optimizer="adamw",
        lr=5e-4,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=1,
        clip_norm=1.0,
    ),
    suits=suits,
)
