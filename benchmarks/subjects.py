"""What the benchmarks train: a model, its data and its recipe, prepared once for both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from suanli.core.console import hide_progress
from suanli.core.types import Json, Recipe
from suanli.data.cache import PreparedData
from suanli.training.prepare import DataOptions, resolve


@dataclass(frozen=True, kw_only=True)
class Subject:
    file: str  # below the folder of data
    recipe: str
    settings: Mapping[str, Json] = field(default_factory=dict)
    block: int  # steps of a block: a second or two on two cores
    short: float  # epochs of a run that is too short to plan at leisure


# With these, a plain step of the larger networks takes a second or two, and planning, at 5 % of the time, a minute.
BRIEF = {"epochs": 4}
SMALLER = {"preprocess.size": 96, "batch_size": 32, **BRIEF}
SUBJECTS = {
    "speednet": Subject(file="cifar10.zip", recipe="small_images", block=3, short=0.5),
    "resnet18": Subject(
        file="imagenette5k.zip", recipe="photos", settings={"preprocess.size": 128}, block=3, short=0.12
    ),
    "resnet50": Subject(
        file="imagenette5k.zip", recipe="photos", settings={"model": "resnet50", **SMALLER}, block=1, short=0.12
    ),
    "vit_tiny": Subject(file="cifar10.zip", recipe="photos_normless", settings=BRIEF, block=2, short=0.1),
    "convnext": Subject(
        file="imagenette5k.zip",
        recipe="photos_any",
        settings={"model": "convnext:build", **SMALLER},
        block=3,
        short=0.25,
    ),
    "detnet_s": Subject(file="bccd_voc.zip", recipe="boxes", settings=BRIEF | {"model": "detnet_s"}, block=1, short=1),
    # A small step of a few milliseconds, in which every overhead shows.
    "text_cnn": Subject(file="sentiment_en", recipe="text", block=60, short=0.5),
}
ENDLESS = 100_000.0  # epochs


def load(
    name: str, data: Path, *, cache: Path | None, settings: Mapping[str, Json] | None = None
) -> tuple[Recipe, PreparedData]:
    """The recipe of a subject with changes by `settings`, and its data, from the folder or the file `data`. Raises
    DataError where it is missing."""
    subject = SUBJECTS[name]
    options = DataOptions.of(data if data.is_file() else data / subject.file, data_dir=None, cache_dir=cache)
    chosen = {**subject.settings, **(settings or {})}
    with hide_progress():
        return resolve(options, recipe=subject.recipe, settings=chosen, announce=False)


def endless(recipe: Recipe) -> Recipe:
    """The same recipe without an end: the benchmark decides how many steps to run."""
    return recipe.model_copy(update={"epochs": ENDLESS})


def steps_per_epoch(recipe: Recipe, prepared: PreparedData) -> int:
    return -(-len(prepared.splits["train"]) // recipe.batch_size)
