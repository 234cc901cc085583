"""Engines beside the model that they compute: what is in `model/engines/`, and whether it holds here.

    engines.json                            which engine is chosen, where each is valid, checksums, the whole table
    <engine>-<precision>-<digest>/          the files of one engine

Names of classes and preprocessing are in engines.json, so the folder can be copied alone. It is written last and at
once: a folder with an engines.json is whole. What it doesn't name is left over from before and is removed. Engines that
hold machine code run only where they were made, or where the user trusts them: a mark of each is left in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from suanli.core import registry
from suanli.core.errors import DamagedFile, UsageError
from suanli.core.paths import cache_dir
from suanli.core.run import now
from suanli.core.storage import raise_storage_errors, read_json, write_json
from suanli.core.types import Device, Json
from suanli.machine import device as hardware
from suanli.machine.gpus import nvidia_driver

FORMAT = 1
FOLDER = "engines"
INDEX = "engines.json"


Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]  # of a folder or file: no way out of here


class _File(BaseModel):
    blake2b: str
    size_bytes: int


class _Entry(BaseModel):
    engine: Name
    precision: Name
    threads: int = Field(ge=1)
    portable: bool
    versions: dict[str, str]
    files: dict[str, _File]


class _Preprocess(BaseModel):
    kind: Name
    settings: dict[str, Json]


class _Machine(BaseModel):
    type: str
    device: str
    instruction_sets: list[str]


class _Index(BaseModel):
    """What has to be in engines.json before any of it is believed."""

    engines: dict[Name, _Entry]
    chosen: Name
    reference: Name
    classes: list[str] = Field(min_length=1)
    preprocess: _Preprocess
    machine: _Machine

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not {self.chosen, self.reference} <= self.engines.keys():
            raise ValueError("it names engines that aren't there")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")
        return self


@dataclass(frozen=True, kw_only=True)
class StoredEngine:
    """An engine that is to be kept: where its files are now, and how it is to be run."""

    engine: str
    precision: str
    folder: Path
    threads: int
    packages: tuple[str, ...]
    portable: bool


def save(folder: Path, engines: Sequence[StoredEngine], *, device: Device, about: Mapping[str, Json]) -> Json:
    """Moves the engines' files below `folder` and writes the index; the first is the chosen one, the last the
    reference. `about` goes into the index as it is."""
    entries: dict[str, Json] = {}
    before = _names_of(folder)
    with raise_storage_errors(folder):
        for kept in engines:
            files = _files(kept.folder)
            name = f"{kept.engine}-{kept.precision}-{_digest(files, 4)}"
            if (folder / name).exists() and _files(folder / name) != files:
                shutil.rmtree(folder / name)  # it was altered
            if not (folder / name).exists():
                os.rename(kept.folder, folder / name)  # whole or not at all
            if not kept.portable:
                _mark(files).parent.mkdir(parents=True, exist_ok=True)
                _mark(files).touch()
            entries[name] = {
                "engine": kept.engine,
                "precision": kept.precision,
                "threads": kept.threads,
                "portable": kept.portable,
                "versions": hardware.versions(kept.packages),
                "files": files,
            }
        names = list(entries)
        index = {
            "format": FORMAT,
            "chosen": names[0],
            "reference": names[-1],
            "engines": entries,
            "machine": machine(device),
            "time": now(),
            **about,
        }
        write_json(folder / INDEX, index)
        for left_over in before - entries.keys():  # nothing else: the folder may be the user's own
            shutil.rmtree(folder / left_over, ignore_errors=True)
    return index


def machine(device: Device) -> dict[str, Json]:
    """What an engine's speed, and for some its files, depend on."""
    found: dict[str, Json] = {
        "device": device.name,
        "type": device.type,
        "architecture": platform.machine(),
        "instruction_sets": sorted(hardware.instruction_sets()),
        "cores": hardware.cores(),
    }
    if device.type == "cuda":
        found["driver"] = nvidia_driver().version
    return found


def read(folder: Path) -> dict[str, Json] | None:
    """The index of a folder of engines; None where there is none. Raises DamagedFile for one that can't be read."""
    try:
        index = read_json(folder / INDEX)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DamagedFile(
            f"{folder / INDEX} has a format that this version can't read.", fix="Make it again: suanli optimize RUN."
        )
    try:
        _Index.model_validate(index)
        for entry in index["engines"].values():
            registry.load("engines", entry["engine"])
    except (ValidationError, UsageError) as error:
        raise DamagedFile(
            f"{folder / INDEX} is damaged ({str(error).splitlines()[0]}).", fix="Make it again: suanli optimize RUN."
        ) from error
    return dict(index)


def _names_of(folder: Path) -> set[str]:
    """Engines that an index here names; none where it can't be read."""
    try:
        return set((read(folder) or {"engines": {}})["engines"])
    except DamagedFile:
        return set()


def _mark(files: Mapping[str, Json]) -> Path:
    return cache_dir() / "engines" / _digest(files, 16)


def _digest(files: Mapping[str, Json], size: int) -> str:
    text = "".join(f"{name}:{file['blake2b']};" for name, file in sorted(files.items()))
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def was_built_here(entry: Mapping[str, Json]) -> bool:
    """Whether this user made the engine on this machine, or its files are no machine code: which they are, the engine
    knows, not the file that came with them."""
    return bool(registry.load("engines", entry["engine"]).portable) or _mark(entry["files"]).exists()


def find_mismatch(entry: Mapping[str, Json], tuned_on: Mapping[str, Json], device: Device) -> str | None:
    """Why an engine can't be used, or isn't known to be the best, on this machine; None: it holds here."""
    if missing := missing_package(entry):
        return missing
    here = machine(device)
    for key, what in (("type", "kind of device"), ("device", "device"), ("driver", "driver")):
        if tuned_on.get(key) != here.get(key):
            return f"another {what} ({tuned_on.get(key)}; here is {here.get(key)})"
    if lacking := set(tuned_on["instruction_sets"]) - set(here["instruction_sets"]):
        return f"instruction sets that are not here ({', '.join(sorted(lacking))})"
    for package, version in entry["versions"].items():
        if importlib.metadata.version(package) != version:
            return f"{package} {version} (here is {importlib.metadata.version(package)})"
    return None


def missing_package(entry: Mapping[str, Json]) -> str | None:
    """Which package that an engine needs isn't here; None: all are."""
    missing = [package for package in entry["versions"] if not hardware.versions((package,))]
    return f"the package {missing[0]}, which is not installed" if missing else None


def check(folder: Path, entry: Mapping[str, Json]) -> None:
    """Raises DamagedFile where the files of an engine aren't those that were saved."""
    try:
        found = _files(folder)
    except OSError as error:
        raise DamagedFile(f"{folder} can't be read ({error.strerror}).", fix=_AGAIN) from error
    for name, file in entry["files"].items():
        if name not in found:
            raise DamagedFile(f"{folder} has no {name}.", fix=_AGAIN)
        if found[name] != file:
            raise DamagedFile(f"{folder / name} doesn't have the checksum that {INDEX} states.", fix=_AGAIN)
    if extra := sorted(set(found) - set(entry["files"])):
        raise DamagedFile(f"{folder} holds {extra[0]}, which is not part of the engine.", fix=_AGAIN)


_AGAIN = "Copy the whole folder again, or make it again: suanli optimize RUN."


def _files(folder: Path) -> dict[str, Json]:
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        found[path.relative_to(folder).as_posix()] = {"blake2b": digest, "size_bytes": path.stat().st_size}
    return found
