"""Engines beside the model that they compute: what is in `model/engines/`, and whether it is valid on this machine.

    engines.json                            which engine is chosen, where each is valid, checksums, the whole table
    <engine>-<precision>-<digest>/          the files of one engine

Task, classes and preprocessing are in engines.json, so the folder can be copied alone. engines.json is written last and
in one step: a folder that has one is complete. Engines that it no longer names are removed. Engines with machine code
run only on the machine that built them, or where the user trusts them: building one leaves a mark in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from suanli.core import registry
from suanli.core.errors import DamagedFile, UsageError
from suanli.core.paths import cache_dir
from suanli.core.run import now
from suanli.core.storage import raise_storage_errors, read_json, write_json
from suanli.core.types import Device, Json, Recipe
from suanli.machine.device import cores, instruction_sets, versions
from suanli.machine.gpus import nvidia_driver

FORMAT = 1
FOLDER = "engines"
INDEX = "engines.json"
COPY_AGAIN = "Copy the whole folder again, or make it again: suanli optimize RUN."


Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]  # as a path, it can't lead out of its folder


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    blake2b: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """One engine in engines.json: how to run it, and what its files are."""

    engine: Name
    precision: Name
    threads: Annotated[int, Field(ge=1)]
    portable: bool
    versions: dict[str, str]  # of the packages that it needs, when it was built
    files: dict[str, FileDigest]


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """What an engine's speed depends on, and for some engines whether their files run at all."""

    device: str
    type: str
    architecture: str | None = None
    instruction_sets: tuple[str, ...]
    cores: int | None = None
    driver: str | None = None  # of an NVIDIA GPU


@dataclass(frozen=True, kw_only=True)
class PreprocessSettings:
    kind: Name
    settings: dict[str, Json]


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    name: Name
    settings: dict[str, Json]


@dataclass(frozen=True, kw_only=True)
class EngineIndex:
    """What engines.json must hold to be used; it holds more, for the report."""

    chosen: Name
    reference: Name
    engines: dict[Name, EngineEntry]
    machine: MachineFacts
    classes: tuple[str, ...]  # empty: the task has none
    preprocess: PreprocessSettings
    task: TaskSettings = TaskSettings(name=Recipe.model_fields["task"].default, settings={})
    batches: bool = True  # an engine answers any number of examples at once; else one
    weights: str | None = None  # digest of the weights that the engines were built from
    found: dict[str, Json] = field(default_factory=dict)  # the search's result; empty: there was no search

    def __post_init__(self) -> None:
        if not {self.chosen, self.reference} <= self.engines.keys():
            raise ValueError("it names engines that aren't there")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have one name")


@dataclass(frozen=True, kw_only=True)
class StoredEngine:
    """An engine to store: where its files are now, and how to run it."""

    engine: str
    precision: str
    folder: Path
    threads: int
    packages: tuple[str, ...]
    portable: bool


def save(folder: Path, engines: Sequence[StoredEngine], *, device: Device, about: Mapping[str, object]) -> None:
    """Move the engines' files into `folder` and write engines.json; the first engine is the chosen one, the last the
    reference. `about` goes into engines.json as it is."""
    previous = _stored_names(folder)
    with raise_storage_errors(folder):
        entries = dict(_store(folder, engine) for engine in engines)
        names = list(entries)
        index = {
            "format": FORMAT,
            "chosen": names[0],
            "reference": names[-1],
            "engines": {name: asdict(entry) for name, entry in entries.items()},
            "machine": {key: value for key, value in asdict(describe_machine(device)).items() if value is not None},
            "time": now(),
            **about,
        }
        write_json(folder / INDEX, index)
        for name in previous - entries.keys():  # nothing else: the folder may be the user's own
            shutil.rmtree(folder / name, ignore_errors=True)


def _store(folder: Path, engine: StoredEngine) -> tuple[str, EngineEntry]:
    files = _digest_files(engine.folder)
    name = f"{engine.engine}-{engine.precision}-{_digest(files, 4)}"
    if (folder / name).exists() and _digest_files(folder / name) != files:
        shutil.rmtree(folder / name)  # its files were altered
    if not (folder / name).exists():
        os.rename(engine.folder, folder / name)  # complete or not at all
    if not engine.portable:
        _mark(files).parent.mkdir(parents=True, exist_ok=True)
        _mark(files).touch()
    return name, EngineEntry(
        engine=engine.engine,
        precision=engine.precision,
        threads=engine.threads,
        portable=engine.portable,
        versions=versions(engine.packages),
        files=files,
    )


def describe_machine(device: Device) -> MachineFacts:
    return MachineFacts(
        device=device.name,
        type=device.type,
        architecture=platform.machine(),
        instruction_sets=tuple(sorted(instruction_sets())),
        cores=cores(),
        driver=nvidia_driver().version if device.type == "cuda" else None,
    )


def read(folder: Path) -> EngineIndex | None:
    """The engines.json of a folder; None where there is none. Raises DamagedFile for one that can't be used."""
    path = folder / INDEX
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedFile(
            f"{path} has a format that this version can't read.", fix="Make it again: suanli optimize RUN."
        )
    try:
        index = TypeAdapter(EngineIndex).validate_python(content)
        for entry in index.engines.values():
            registry.load("engines", entry.engine)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise _damage_error(path, f"{place}: {first['msg']}" if place else first["msg"]) from error
    except UsageError as error:
        raise _damage_error(path, error.message) from error
    return index


def _damage_error(path: Path, reason: str) -> DamagedFile:
    return DamagedFile(f"{path} is damaged ({reason}).", fix="Make it again: suanli optimize RUN.")


def _stored_names(folder: Path) -> set[str]:
    """Engines that the engines.json here names; none where it can't be read."""
    try:
        index = read(folder)
    except DamagedFile:
        return set()
    return set() if index is None else set(index.engines)


def _mark(files: Mapping[str, FileDigest]) -> Path:
    return cache_dir() / "engines" / _digest(files, 16)


def _digest(files: Mapping[str, FileDigest], size: int) -> str:
    text = "".join(f"{name}:{file.blake2b};" for name, file in sorted(files.items()))
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def was_built_here(entry: EngineEntry) -> bool:
    """Whether this user built the engine on this machine, or its files are no machine code. Whether they are, the
    engine's own code says, not the file that came with it."""
    return bool(registry.load("engines", entry.engine).portable) or _mark(entry.files).exists()


def find_mismatch(entry: EngineEntry, tuned_on: MachineFacts, device: Device) -> str | None:
    """How this machine differs from the one that the engine was chosen for; None: the engine is valid here."""
    if missing := missing_package(entry):
        return missing
    here = describe_machine(device)
    for key, what in (("type", "kind of device"), ("device", "device"), ("driver", "driver")):
        before, now_here = getattr(tuned_on, key), getattr(here, key)
        if before != now_here:
            return f"another {what} ({before}; here is {now_here})"
    if lacking := set(tuned_on.instruction_sets) - set(here.instruction_sets):
        return f"instruction sets that are not here ({', '.join(sorted(lacking))})"
    for package, version in entry.versions.items():
        if importlib.metadata.version(package) != version:
            return f"{package} {version} (here is {importlib.metadata.version(package)})"
    return None


def missing_package(entry: EngineEntry) -> str | None:
    """Which package that the engine needs isn't installed; None: all are."""
    missing = [package for package in entry.versions if not versions((package,))]
    return f"the package {missing[0]}, which is not installed" if missing else None


def check(folder: Path, entry: EngineEntry) -> None:
    """Raises DamagedFile where the files of an engine aren't those that were stored."""
    try:
        files = _digest_files(folder)
    except OSError as error:
        raise DamagedFile(f"{folder} can't be read ({error.strerror}).", fix=COPY_AGAIN) from error
    for name, file in entry.files.items():
        if name not in files:
            raise DamagedFile(f"{folder} has no {name}.", fix=COPY_AGAIN)
        if files[name] != file:
            raise DamagedFile(f"{folder / name} doesn't have the checksum that {INDEX} states.", fix=COPY_AGAIN)
    if extra := sorted(set(files) - set(entry.files)):
        raise DamagedFile(f"{folder} holds {extra[0]}, which is not part of the engine.", fix=COPY_AGAIN)


def _digest_files(folder: Path) -> dict[str, FileDigest]:
    if not folder.is_dir():
        return {}
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        files[path.relative_to(folder).as_posix()] = FileDigest(blake2b=digest, size_bytes=path.stat().st_size)
    return files
