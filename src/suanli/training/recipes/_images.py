"""Conditions and settings that several image recipes share."""

from __future__ import annotations

from suanli.core.types import Recipe, Traits, UsualWeights

SMALL_PX = 64
FEW_EXAMPLES = 10_000  # below it, a handful of epochs has too few steps to learn
# Built-in models that diverge at the learning rates of networks with batch norms.
NORMLESS = ("alexnet", "convnext", "vit", "vit_tiny")

SMALL = Recipe(
    model="speednet",
    epochs=5,
    batch_size=500,
    optimizer="muon",
    lr=0.24,
    optimizer_args={"head_lr_scale": 1 / 3, "bias_lr_scale": 12.5, "normalize_filters": True},
    schedule="linear",
    task_args={"label_smoothing": 0.1},
)

LONG = Recipe(  # for data of any size and targets other than one class
    model="speednet",
    epochs=20,
    batch_size=64,
    optimizer="muon",
    lr=0.1,
    optimizer_args={"head_lr_scale": 0.8, "bias_lr_scale": 30.0, "normalize_filters": True},
    schedule="linear",
    clip_norm=5.0,
)

ANY = Recipe(  # for a network that suanli doesn't know, with norms or without
    model="resnet18",
    epochs=16,
    batch_size=64,
    optimizer="adamw",
    lr=5e-4,
    weight_decay=0.05,
    schedule="cosine",
    warmup_epochs=1,
    clip_norm=1.0,
)

FINE_TUNE = Recipe(
    model="resnet18",
    frozen_views=1,
    fixed_norms=True,  # or training would change the features that the head was fitted to: docs/LOG.md
    epochs=8,
    batch_size=32,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.01,
    backbone_lr_scale=0.1,
    schedule="cosine",
    warmup_epochs=0.5,
    task_args={"label_smoothing": 0.1},
    clip_norm=1.0,
)


FROZEN = Recipe(  # photos: the head alone, unless the user gives time for more
    **FINE_TUNE.model_dump() | {"epochs": 0, "task_args": {}, "augment": ("resized_crop(scale=(0.5, 1.0))", "flip")}
)


def is_small(traits: Traits) -> bool:
    return min(traits.input_shape[-2:]) <= SMALL_PX


def is_grey(traits: Traits) -> bool:
    return len(traits.input_shape) == 3 and traits.input_shape[0] == 1


def shows_signs(traits: Traits) -> bool:
    """Whether they are small grey images: mostly digits and letters, which mirroring would change."""
    return is_small(traits) and is_grey(traits)


def has_few_examples(traits: Traits) -> bool:
    return traits.examples < FEW_EXAMPLES


def is_builtin(model: str | None) -> bool:
    """Whether the network is one of suanli's, whose names have no colon."""
    return model is None or ":" not in model


def trains_speednet(traits: Traits) -> bool:
    """Whether `speednet` will be trained from scratch: the user names it, or the images are small."""
    if traits.kind != "image" or traits.weights:
        return False
    return traits.model == "speednet" or (traits.model is None and is_small(traits))


def trains_other_network(traits: Traits) -> bool:
    """Whether a network other than `speednet` will be trained on images from scratch."""
    return traits.kind == "image" and not traits.weights and not trains_speednet(traits)


def _why_from_imagenet(traits: Traits) -> str | None:
    if is_small(traits) or not has_few_examples(traits):
        return None
    return f"these are {traits.examples:,} photos"


def _gain_by_imagenet(traits: Traits) -> str | None:
    """Measured: records/2026-12-01_xeon-2core_pretrained."""
    if not has_few_examples(traits) or shows_signs(traits):
        return None
    if is_small(traits):
        return "Weights that learned ImageNet usually help: with 50 images of each of ten classes, 46 % became 71 %."
    return "Weights that learned ImageNet usually help: with 4,000 photos of ten of its classes, 82 % became 98 %."


IMAGENET = UsualWeights(name="imagenet", reason=_why_from_imagenet, gain=_gain_by_imagenet)
