"""Conditions and settings that several image recipes share."""

from __future__ import annotations

from suanli.core.types import Recipe, Traits

SMALL_PX = 64
FEW_EXAMPLES = 10_000  # below it, a handful of epochs has too few steps to learn
NORMLESS = ("alexnet", "vit_tiny")  # built-in models that diverge at the learning rates of networks with batch norms

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
