"""The models of a server: found in a folder, loaded, swapped for newer ones and unloaded while requests are answered.

    models/digits/            one model: a run, a model/ folder, or a folder of engines; its version is 1
    models/flowers/1/, 2/     versions of one model

A folder is looked at every second. What has changed is loaded beside what is there and takes its place when it is
ready; what was there answers those that it has and is then closed. A change that can't be loaded changes nothing.
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
from suanli.serving.model import ModelOptions, ServedModel
from suanli.serving.protocol import Refusal
from suanli.serving.worker import EngineDied

LOOK_S = 1.0
MODEL_FILES = ("model.json", INDEX, f"engines/{INDEX}", "model/model.json", f"model/engines/{INDEX}")

Key = tuple[str, str]  # name and version
Stamp = tuple[tuple[int, int, int], ...]


class Repository:
    """`start` it on the loop that answers requests; `close` at the end."""

    def __init__(self, subject: Path, settings: ModelOptions, log: Log) -> None:
        """Raises DataError where there is no model."""
        self.subject = subject
        self.draining = False
        self._settings, self._log = settings, log
        self._models: dict[Key, ServedModel] = {}
        self._loading: set[Key] = set()
        self._stamps: dict[Key, Stamp] = {}  # of what was loaded, or tried in vain
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
        """Loads what there is. Raises EngineDied where that is one model, and it doesn't come up."""
        there = scan(self.subject)
        self._loading |= there.keys()
        for key, path in there.items():
            try:
                await self._load(key, path)
            except EngineDied:
                if self.is_single:
                    raise
        if not self.is_single:
            self._watching = asyncio.create_task(self._watch())

    async def drain(self) -> None:
        """Returns when all that was asked is answered."""
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
        """Brings one up beside the one that is there, then swaps. Raises EngineDied, and changes nothing."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            self._stamps[key] = stamp(path)
            self._loading.add(key)
            model = ServedModel(*key, path, self._settings, pool=self._pool, log=self._log)
            try:
                await model.start()
            except EngineDied as error:
                self._failed[key] = str(error)
                model.close()
                self._log.error("model not loaded", model=key[0], version=key[1], reason=str(error))
                raise
            finally:
                self._loading.discard(key)
            self._failed.pop(key, None)
            before = self._models.get(key)
            self._models[key] = model
            if before is not None:
                self._retire(before)

    def _retire(self, model: ServedModel) -> None:
        async def work() -> None:
            await model.drain()
            model.close()

        task = asyncio.create_task(work())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _watch(self) -> None:
        """Follows the folder: what is new or has changed is loaded once it has been the same for two looks, and what is
        gone for two is unloaded. So a copy that takes its time is let finish."""
        before: Mapping[Key, Stamp] = dict.fromkeys(self._models, ())
        while True:
            await asyncio.sleep(LOOK_S)
            there = await asyncio.to_thread(scan, self.subject)
            if not there and not self.subject.is_dir():
                continue  # a disk that is away, perhaps: what is loaded can still answer
            stamps = await asyncio.to_thread(lambda: {key: stamp(path) for key, path in there.items()})  # noqa: B023
            for key in [key for key in {*self._models, *self._failed} if key not in there and key not in before]:
                self._failed.pop(key, None)
                self._stamps.pop(key, None)
                if (gone := self._models.pop(key, None)) is not None:
                    self._log.event("model unloaded", model=key[0], version=key[1], reason="its folder is gone")
                    self._retire(gone)
            for key, found in stamps.items():
                known = key[0] in self._unloaded or found == self._stamps.get(key)
                if not known and found == before.get(key):
                    with contextlib.suppress(EngineDied):
                        await self._load(key, there[key])
            before = stamps

    # --- asking ---

    @property
    def ready(self) -> bool:
        """Whether every model that is there answers."""
        models = self._models.values()
        waiting = self._loading - self._models.keys()  # a swap isn't a reason
        new = self._failed.keys() - self._models.keys()
        return bool(models) and not self.draining and not waiting and not new and all(m.ready for m in models)

    def find(self, name: str, version: str | None = None) -> ServedModel:
        """Without a version the newest that is ready. Raises Refusal(404)."""
        if version is not None:
            found = self._models.get((name, version))
        else:
            ours = [self._models[key] for key in sorted(self._models, key=_sort_key) if key[0] == name]
            found = next((model for model in reversed(ours) if model.ready), ours[-1] if ours else None)
        if found is None:
            if any(key[0] == name and version in (None, key[1]) for key in self._loading):
                raise Refusal(503, f"Model {name} is being loaded.", retry_after_s=1.0)
            label = name[:100] if version is None else f"{name[:100]} version {version[:40]}"
            raise Refusal(404, f"There is no model {label}; there are: {', '.join(self.names()) or 'none'}.")
        return found

    def single(self) -> ServedModel:
        """The model of a server that has one. Raises Refusal(400) where the name must be said."""
        names = self.names()
        if len(names) == 1:
            return self.find(names[0])
        if not names:
            raise Refusal(503, "No model is loaded.", retry_after_s=1.0)
        raise Refusal(400, f"Say which model: {', '.join(names)}.")

    def names(self) -> list[str]:
        return sorted({name for name, _ in self._models})

    def versions(self, name: str) -> list[str]:
        return [version for key in sorted(self._models, key=_sort_key) for version in key[1:] if key[0] == name]

    def models(self) -> list[ServedModel]:
        return [self._models[key] for key in sorted(self._models, key=_sort_key)]

    def index(self) -> list[ModelState]:
        """Every model and version with its state, as the repository extension has it."""
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
        there = {key: path for key, path in (await asyncio.to_thread(scan, self.subject)).items() if key[0] == name}
        if not there:
            raise Refusal(404, f"There is no model {name[:100]} in {self.subject.name}.")
        self._unloaded.discard(name)
        for key, path in there.items():
            try:
                await self._load(key, path)
            except EngineDied as error:
                raise Refusal(400, f"Model {name} version {key[1]} can't be loaded: {error}.") from error

    async def unload(self, name: str) -> None:
        """Answers what was asked, then closes. Raises Refusal(404)."""
        keys = [key for key in self._models if key[0] == name]
        if not keys:
            raise Refusal(404, f"There is no model {name[:100]}.")
        self._unloaded.add(name)
        for key in keys:
            self._stamps.pop(key, None)
            self._log.event("model unloaded", model=key[0], version=key[1], reason="asked to")
            self._retire(self._models.pop(key))


def _sort_key(key: Key) -> tuple[str, int, str]:
    name, version = key
    return name, int(version) if version.isdecimal() else -1, version


def _is_model(path: Path) -> bool:
    try:
        return any((path / card).is_file() for card in MODEL_FILES)
    except OSError:  # not ours to look into
        return False


def scan(subject: Path) -> dict[Key, Path]:
    """The models at `subject`: itself, or what lies in it, version by version."""
    if _is_model(subject):
        own = subject.resolve()
        name = own.parent.name if own.name in ("model", "engines") else own.name
        return {(name or "model", "1"): subject}
    found: dict[Key, Path] = {}
    for folder in _folders(subject):
        if _is_model(folder):
            found[folder.name, "1"] = folder
        else:
            versions = [path for path in _folders(folder) if path.name.isdecimal() and _is_model(path)]
            found |= {(folder.name, path.name): path for path in versions}
    return found


def _folders(path: Path) -> Sequence[Path]:
    try:
        return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []


def stamp(path: Path) -> Stamp:
    """Changes when a file of the model does. Not of its cards alone: who copies a model may copy the weights last."""
    found = []
    model = path / "model"  # of a run, which has large files of its own beside it
    for place, folders, files in os.walk(model if _is_model(model) else path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            with contextlib.suppress(OSError):
                about = os.stat(os.path.join(place, name))
                found.append((about.st_mtime_ns, about.st_size, about.st_ino))
    return tuple(found)
