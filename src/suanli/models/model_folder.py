"""The model folder: copy it alone and it predicts anywhere.

    model.json             builder and arguments, preprocessing, classes, task, scores, versions
    weights.safetensors    the weights, with their checksum in model.json

model.json is written last and holds the checksum of the weights, so a folder with a model.json is complete. Reading
only model.json needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.core.registry import load as load_plugin
from suanli.core.registry import names
from suanli.core.run import RUNS
from suanli.core.storage import atomic_file, read_json, write_json
from suanli.core.task import Task
from suanli.core.types import AnyPath, Json, Preprocess, Recipe
from suanli.machine import device

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A trained model in memory: all that is needed from raw inputs to answers."""

    module: nn.Module  # in evaluation mode, float32, on the CPU
    preprocess: Preprocess
    task: Task
    recipe: Recipe
    card: dict[str, Json]  # all of model.json


def save_model(
    folder: Path,
    module: nn.Module,
    *,
    recipe: Recipe,
    preprocess: Preprocess,
    task: Task,
    data: Mapping[str, object],
    pretrained: Mapping[str, Json] | None = None,
    writes: bool = True,
) -> None:
    """Write the model folder; low-rank adapters are added to their weights. `pretrained` says from which weights the
    training started (`weights.describe`). For a sharded network this is a collective: the tensors are gathered one
    after the other, for the process that `writes`."""
    from suanli.models import adapters, safetensors_io
    from suanli.parallel import dtensor

    state = adapters.merged(module.state_dict())
    if not writes:
        safetensors_io.gather_only(state, dtensor.gather)
        return
    with atomic_file(folder / WEIGHTS) as stream:
        safetensors_io.write_tensors(stream, state, of=dtensor.gather)
    content = (folder / WEIGHTS).read_bytes()
    write_json(
        folder / "model.json",
        {
            "format": FORMAT,
            "model": recipe.model,
            "task": task.name,
            "task_settings": task.settings,
            "classes": list(task.classes),
            "preprocess": preprocess.to_json(),
            "recipe": recipe.model_dump(mode="json"),
            "weights": {"file": WEIGHTS, "blake2b": _digest(content), "size_bytes": len(content)},
            "data": data,
            "pretrained": pretrained,
            "scores": {},
            "versions": device.versions(("suanli", "torch", "numpy", "pillow")),
        },
    )


def add_scores(folder: Path, split: str, scores: Mapping[str, float | None]) -> None:
    """Write the scores of a split into model.json."""
    card = read_card(folder)
    card["scores"][split] = dict(scores)
    write_json(folder / "model.json", card)


def read_card(folder: Path) -> dict[str, Json]:
    """The content of model.json. Raises DataError where there is none, and DamagedFile for another format."""
    try:
        card = read_json(folder / "model.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"{folder} contains no model (no model.json).",
            fix="Give a run directory whose training finished, or its model/ folder.",
        ) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise DamagedFile(
            f"{folder / 'model.json'} has a format that this version can't read.",
            fix="Use the version of suanli that wrote it, or train again.",
        )
    return card


def build_preprocess(values: Mapping[str, Json]) -> Preprocess:
    """The preprocessing with a saved kind and settings. Raises KeyError, TypeError or what the kind itself raises for
    wrong ones."""
    preprocess: Preprocess = load_plugin("preprocess", values["kind"])(**values["settings"])
    return preprocess


def build_task(name: str, classes: Sequence[str], settings: Mapping[str, Json]) -> Task:
    """The task with saved settings. Raises UsageError for a task or settings that this version doesn't know."""
    kind: type[Task] = load_plugin("tasks", name)
    return kind.of(classes, settings)


def find_model_folder(subject: AnyPath) -> Path:
    """The model folder of a run directory, or the folder itself."""
    path = Path(subject).expanduser()
    if not path.exists():
        is_built_in = str(subject) in names("datasets")
        if not path.is_absolute() and (RUNS / path).exists():
            raise DataError(f"There is nothing at {path}.", fix=f"Did you mean {RUNS / path}?")
        train = f"Train first: suanli train {subject}" if is_built_in else "suanli train DATA makes one."
        fix = f"Give a run directory or a model/ folder. {train}"
        raise DataError(f"There is nothing at {path}.", fix=fix)
    folder = model_in(path)
    answers = any((path / name).exists() for name in ("model.json", "engines.json"))  # engines alone do, too
    if folder == path and not answers:
        raise DataError(
            f"{path} contains no model (no model.json).",
            fix=f"Give a run directory or its model/ folder. If this is data, train first: suanli train {path}",
        )
    return folder


def model_in(path: Path) -> Path:
    """Where the model of a run would be; any other folder is its own."""
    is_run = (path / "recipe.json").exists() or (path / "model" / "model.json").exists()
    return path / "model" if is_run else path


def refuse_foreign_code(model: str, path: Path) -> None:
    """Raise UsageError for a model that is built by code outside suanli and timm."""
    if ":" in model and not model.startswith("timm:"):
        raise UsageError(
            f"The network of {path} is built by {model!r}, which is not part of suanli.",
            fix="If you trust that code, run it with --trust-code.",
        )


def load_model(folder: Path, *, trust_code: bool = False) -> SavedModel:
    """Load a model from nothing but its folder. Raises DataError, DamagedFile, and UsageError for a network that is
    built by code outside suanli, unless `trust_code`: a model.json could name any function."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    from suanli.models import build

    card = read_card(folder)
    try:
        content = (folder / WEIGHTS).read_bytes()
        if _digest(content) != card["weights"]["blake2b"]:
            raise DamagedFile(
                f"The weights in {folder} don't have the checksum that model.json states.",
                fix="Copy the whole folder again: they are truncated, altered, or of another model.",
            )
        recipe = Recipe.model_validate(card["recipe"])
        if not trust_code:
            refuse_foreign_code(recipe.model, folder)
        preprocess = build_preprocess(card["preprocess"])
        # Older versions had no settings, and needed none to predict.
        task = build_task(card["task"], card["classes"], card.get("task_settings", {}))
        module = build.build(recipe, preprocess, task)
        module.load_state_dict(load(content))
    except (FileNotFoundError, KeyError, TypeError, SafetensorError, RuntimeError, ValueError) as error:
        raise DamagedFile(
            f"The model in {folder} can't be loaded ({error}).", fix="Train again or restore it."
        ) from error
    module.eval()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return SavedModel(
        module=module,
        preprocess=preprocess,
        task=task,
        recipe=recipe,
        card=card,
    )


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
