"""Weights on this machine: a run, its model/ folder, a .safetensors file, or a folder that a publisher laid out."""

from __future__ import annotations

import os
from pathlib import Path

from suanli.core.errors import DataError, UsageError
from suanli.core.types import Pretrained, WeightsSource
from suanli.models.conversion import file_checksum, refuse_pickle
from suanli.models.model_folder import WEIGHTS, model_in, read_card
from suanli.models.pretrained._published import Published, choose_weights, find_network, open_weights, read_facts


def find(name: str) -> Pretrained | None:
    path = Path(name).expanduser().absolute()
    if not name or not path.exists():
        return None
    if not path.is_dir():
        refuse_pickle(path)
        if not path.is_file():  # a pipe would block
            raise UsageError(f"{name} is no file.", fix="Give a .safetensors file, a folder or a run.")
        saved = path.name == WEIGHTS and (path.parent / "model.json").exists()
        return _of_model(path.parent) if saved else _of_file(path, Published(), name=str(path))
    folder = model_in(path)
    if (folder / "model.json").exists():
        return _of_model(folder)
    if folder != path:
        raise DataError(f"{name} has no model yet.", fix=f"Let it finish: suanli train {name}")
    published = read_facts(path)
    file = open_weights(path, choose_weights(sorted(os.listdir(path)), name)[0])
    return _of_file(file, published, name=str(path))


def _of_model(folder: Path) -> Pretrained:
    """The weights of a model that suanli trained. What it started from has its licence in it, too."""
    card = read_card(folder)
    before = card.get("pretrained") or {}
    run = folder.parent if folder.name == "model" else folder
    data = (card.get("data") or {}).get("name")
    return Pretrained(
        name=str(folder / WEIGHTS),
        file=folder / WEIGHTS,
        model=card["recipe"]["model"],
        model_args=card["recipe"]["model_args"],
        fitted_preprocess=card["preprocess"],
        classes=tuple(card["classes"]),
        title=run.name,
        licence=before.get("licence"),
        commercial=before.get("commercial"),
        homepage=before.get("homepage") or "",
        checksum=file_checksum(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else "",
        learned_from=(*before.get("learned_from", ()), *([data] if data else [])),
    )


def _of_file(file: Path, published: Published, *, name: str) -> Pretrained:
    model, args = find_network(file, published)
    return Pretrained(
        name=name,
        file=file,
        model=model,
        model_args=args,
        title=Path(name).name,
        checksum=file_checksum(file),
        **published.stated,
    )


SOURCE = WeightsSource(name="path", find=find, order=90)
