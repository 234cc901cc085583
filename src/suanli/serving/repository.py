"""The models of a server: finds them in a folder, and loads, replaces and unloads them while requests are answered.

    models/digits/            one model: a run, a model/ folder, or a folder of engines; its version is 1
    models/flowers/1/, 2/     versions of one model

The folder is checked every second. A model that has changed is loaded beside the old one and takes its place when it is
ready; the old one answers the requests that it has and is then closed. If the new one can't be loaded, the old one
stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from suanli.core.errors import DataError
from suanli.engines.store import INDEX
from suanli.machine import device
from suanli.serving.bodies import Availability, ModelState
from suanli.serving.log import Log
from suanli.serving.model import ModelOptions, ServedModel, load_model
from suanli.serving.protocol import Refusal
from suanli.serving.worker import EngineDied

LOOK_S = 1.0
MODEL_FILES = ("model.json", INDEX, f"engines/{INDEX}", "model/model.json", f"model/engines/{INDEX}")

Key = tuple[str, str]  # name and version
Stamp = tuple[tuple[int, int, int], ...]


class Repository:
    """`start` it on the loop that answers requests; `close` at the end."""

    def __init__(self, subject: Path, options: ModelOptions, log: Log) -> None:
        """Raises DataError where there is no model."""
        self.subject = subject
        self.draining = False
        self._options, self._log = options, log
        self._models: dict[Key, ServedModel] = {}
        self._loading: set[Key] = set()
        self._stamps: dict[Key, Stamp] = {}  # of what was loaded, or could not be
        self._failed: dict[Key, str] = {}
        self._unloaded: set[str] = set()  # names that were unloaded on request
        self._closing: set[asyncio.Task[None]] = set()
        self._locks: dict[Key, asyncio.Lock] = {}
        self._watching: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(device.cores(), "encode")
        self.is_single = _is_model(subject)
        if not self.is_single and not scan(subject):
            raise DataError(
                f"There is no model in {subject}.",
                fix="Name a run directory, a model/ folder, or a folder of them (NAME/ or NAME/1/).",
            )

    # --- life ---

    async def start(self) -> None:
        """Loads every model. Raises EngineDied where there is a single model and its engine doesn't come up."""
        paths = scan(self.subject)
        self._loading |= paths.keys()
        for key, path in paths.items():
            try:
                await self._load(key, path)
            except EngineDied:
                if self.is_single:
                    raise
        if not self.is_single:
            self._watching = asyncio.create_task(self._watch())

    async def drain(self) -> None:
        """Returns when all requests are answered."""
        self.draining = True
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(*(model.drain() for model in self._models.values()), *self._closing)

    def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for task in self._closing:
            task.cancel()
        for model in self._models.values():
            model.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _load(self, key: Key, path: Path) -> None:
        """Loads a model beside the one that is there, then replaces it. Raises EngineDied, and then nothing changes."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            self._stamps[key] = stamp(path)
            self._loading.add(key)
            try:
                model = await load_model(*key, path, self._options, pool=self._pool, log=self._log)
            except EngineDied as error:
                self._failed[key] = str(error)
                self._log.error("model not loaded", model=key[0], version=key[1], reason=str(error))
                raise
            finally:
                self._loading.discard(key)
            self._failed.pop(key, None)
            previous = self._models.get(key)
            self._models[key] = model
            if previous is not None:
                self._retire(previous)

    def _retire(self, model: ServedModel) -> None:
        async def close() -> None:
            await model.drain()
            model.close()

        task = asyncio.create_task(close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _watch(self) -> None:
        """Follows the folder. A model that is new or has changed is loaded when two checks in a row saw the same files,
        so that a slow copy can finish; a model that two checks in a row didn't see is unloaded."""
        previous: Mapping[Key, Stamp] = dict.fromkeys(self._models, ())
        while True:
            await asyncio.sleep(LOOK_S)
            paths = await asyncio.to_thread(scan, self.subject)
            if not paths and not self.subject.is_dir():
                continue  # perhaps the disk is unmounted: the loaded models can still answer
            stamps = await asyncio.to_thread(lambda: {key: stamp(path) for key, path in paths.items()})  # noqa: B023
            for key in [key for key in {*self._models, *self._failed} if key not in paths and key not in previous]:
                self._failed.pop(key, None)
                self._stamps.pop(key, None)
                if (model := self._models.pop(key, None)) is not None:
                    self._log.event("model unloaded", model=key[0], version=key[1], reason="its folder is gone")
                    self._retire(model)
            for key, current in stamps.items():
                is_new = key[0] not in self._unloaded and current != self._stamps.get(key)
                if is_new and current == previous.get(key):
                    with contextlib.suppress(EngineDied):
                        await self._load(key, paths[key])
            previous = stamps

    # --- the models ---

    @property
    def ready(self) -> bool:
        """Whether every model answers."""
        models = self._models.values()
        missing = (self._loading | self._failed.keys()) - self._models.keys()  # a failed replacement isn't missing
        return bool(models) and not self.draining and not missing and all(model.ready for model in models)

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """A model; without a version its newest that is ready. Raises Refusal(404), or (503) while it loads."""
        if version is not None:
            model = self._models.get((name, version))
        else:
            versions = [self._models[key] for key in sorted(self._models, key=_sort_key) if key[0] == name]
            model = next((model for model in reversed(versions) if model.ready), versions[-1] if versions else None)
        if model is None:
            if any(key[0] == name and version in (None, key[1]) for key in self._loading):
                raise Refusal(503, f"Model {name} is being loaded.", retry_after_s=1.0)
            label = name[:100] if version is None else f"{name[:100]} version {version[:40]}"
            raise Refusal(404, f"There is no model {label}; there are: {', '.join(self.names()) or 'none'}.")
        return model

    def single(self) -> ServedModel:
        """The model of a server that has only one. Raises Refusal(400) where there are several."""
        names = self.names()
        if len(names) == 1:
            return self.find(names[0])
        if not names:
            raise Refusal(503, "No model is loaded.", retry_after_s=1.0)
        raise Refusal(400, f"Name the model: {', '.join(names)}.")

    def names(self) -> list[str]:
        return sorted({name for name, _ in self._models})

    def versions(self, name: str) -> list[str]:
        return [version for key in sorted(self._models, key=_sort_key) for version in key[1:] if key[0] == name]

    def models(self) -> list[ServedModel]:
        return [self._models[key] for key in sorted(self._models, key=_sort_key)]

    def index(self) -> list[ModelState]:
        """Every model and version with its state, in the form of the model repository extension."""
        states: dict[Key, tuple[Availability, str]] = dict.fromkeys(self._loading, ("LOADING", ""))
        states |= {key: ("UNAVAILABLE", reason) for key, reason in self._failed.items() if key not in self._models}
        for key, model in self._models.items():
            states[key] = ("READY", "") if model.ready else ("UNAVAILABLE", model.reason)
        return [
            {"name": key[0], "version": key[1], "state": states[key][0], "reason": states[key][1]}
            for key in sorted(states, key=_sort_key)
        ]

    async def load(self, name: str) -> None:
        """Loads, or loads again, all versions of a model. Raises Refusal(404), or (400) with the reason."""
        models = await asyncio.to_thread(scan, self.subject)
        paths = {key: path for key, path in models.items() if key[0] == name}
        if not paths:
            raise Refusal(404, f"There is no model {name[:100]} in {self.subject.name}.")
        self._unloaded.discard(name)
        for key, path in paths.items():
            try:
                await self._load(key, path)
            except EngineDied as error:
                raise Refusal(400, f"Model {name} version {key[1]} can't be loaded: {error}.") from error

    async def unload(self, name: str) -> None:
        """Unloads all versions of a model, once their requests are answered. Raises Refusal(404)."""
        keys = [key for key in self._models if key[0] == name]
        if not keys:
            raise Refusal(404, f"There is no model {name[:100]}.")
        self._unloaded.add(name)
        for key in keys:
            self._stamps.pop(key, None)
            self._log.event("model unloaded", model=key[0], version=key[1], reason="on request")
            self._retire(self._models.pop(key))


def _sort_key(key: Key) -> tuple[str, int, str]:
    name, version = key
    return name, int(version) if version.isdecimal() else -1, version


def _is_model(path: Path) -> bool:
    try:
        return any((path / card).is_file() for card in MODEL_FILES)
    except OSError:  # may not be read
        return False


def scan(subject: Path) -> dict[Key, Path]:
    """The paths of the models at `subject`: itself, or the models in it, each version by itself."""
    if _is_model(subject):
        path = subject.resolve()
        name = path.parent.name if path.name in ("model", "engines") else path.name
        return {(name or "model", "1"): subject}
    models: dict[Key, Path] = {}
    for folder in _folders(subject):
        if _is_model(folder):
            models[folder.name, "1"] = folder
        else:
            versions = [path for path in _folders(folder) if path.name.isdecimal() and _is_model(path)]
            models |= {(folder.name, path.name): path for path in versions}
    return models


def _folders(path: Path) -> Sequence[Path]:
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def stamp(path: Path) -> Stamp:
    """Changes when a file of the model does. It covers all files, since a copy may write the weights last."""
    stats = []
    model = path / "model"  # of a run, whose other files may be large and don't matter here
    for root, folders, files in os.walk(model if _is_model(model) else path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            with contextlib.suppress(OSError):
                info = os.stat(os.path.join(root, name))
                stats.append((info.st_mtime_ns, info.st_size, info.st_ino))
    return tuple(stats)
