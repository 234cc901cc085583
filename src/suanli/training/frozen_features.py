"""Features of the cached images, as the head of a network is given them: computed once, and kept in the cache.

A row of features depends on the weights, the preprocessing, the image and, for all views but the first, on the
augmentations and the seed; not on the split that an image is in. So another training on the same images, one that goes
on, and the folds of a cross-validation find them again. The file of a view is a memory map with a row for each cached
input, filled in any order: NaN where there is none yet, so that a computation that was stopped goes on.

How they are computed is a race of the ways in `feature_ways.py`, on the first batches.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from suanli.compute.infer import network_inputs
from suanli.compute.step_runner import map_tensors
from suanli.core.console import Progress, say, warn
from suanli.core.errors import DamagedFile, MachineError, StorageError
from suanli.core.schema import Tensors, zeros
from suanli.core.storage import raise_storage_errors, read_json, write_json
from suanli.core.types import Batch, Device, Recipe
from suanli.data.cache import PreparedData
from suanli.data.loader import Feed, mix
from suanli.machine.device import versions
from suanli.training.augment import compose
from suanli.training.feature_ways import Race

FORMAT = 1  # raise when the same digest stands for other features
BLOCK = 64  # cached inputs in a row, of which those that are needed make a batch


@dataclass(frozen=True, kw_only=True)
class Features:
    """Of V views of N training images, and of M validation images."""

    train: np.ndarray  # (V * N, F) float32, view after view
    val: np.ndarray  # (M, F)
    views: int
    computed: int  # rows; the others were in the cache
    seconds: float
    way: str | None  # of computing them; None: all were in the cache
    tried: dict[str, float]  # images/s of the ways that were timed

    @property
    def images_per_s(self) -> float | None:
        return self.computed / self.seconds if self.computed else None


@dataclass(frozen=True, kw_only=True)
class FrozenNetwork:
    """A network without its head, and what decides the features that it gives."""

    backbone: nn.Module  # in evaluation mode, on the device
    digest: str  # of its weights and of how it is built
    length: int  # F


def compute_features(
    network: FrozenNetwork,
    recipe: Recipe,
    prepared: PreparedData,
    train: np.ndarray,
    *,
    device: Device,
    cache: Path,
) -> Features:
    """`train` are positions in the training split (N,), in order. Raises MachineError for features that aren't
    finite."""
    started = time.perf_counter()
    splits = prepared.splits
    train_rows, val_rows = splits["train"].index[train], splits["val"].index
    views = [_View(recipe, prepared, number) for number in range(recipe.frozen_views)]
    folder = cache / "features" / _digest(network.digest, prepared)
    stores = [_Store(folder / f"{view.name}.npy", count_inputs(prepared), network.length) for view in views]
    wanted = [np.union1d(train_rows, val_rows), *[train_rows] * (len(views) - 1)]
    with _alone(folder):
        todo = [store.missing(rows) for store, rows in zip(stores, wanted, strict=True)]
        count = sum(map(len, todo))
        race = Race(network.backbone, device, count)
        with Progress("Features", max(count, 1)) as progress:
            done = 0
            for view, store, rows in zip(views, stores, todo, strict=True):
                for block, inputs in view.batches(rows, device):
                    store.write(block, race.compute(inputs))
                    done += len(block)
                    progress.update(done, race.note)
        for store in stores:
            store.flush()
        rates = _keep_rates(folder / "rates.json", race.rates)
    features = Features(
        train=np.concatenate([store.read(train_rows) for store in stores]),
        val=stores[0].read(val_rows),
        views=len(views),
        computed=count,
        seconds=time.perf_counter() - started,
        way=race.name if count else None,
        tried=rates,
    )
    if not (np.isfinite(features.train).all() and np.isfinite(features.val).all()):
        raise MachineError("The network's features are not finite numbers.", fix="Start from other weights.")
    return features


def find_features(digest: str, prepared: PreparedData, cache: Path) -> np.ndarray | None:
    """Of a network with this digest, what an earlier training has computed: a row (F,) for each cached input, NaN where
    there is none. None: nothing."""
    with suppress(OSError, ValueError, EOFError):
        rows: np.ndarray = np.load(cache / "features" / _digest(digest, prepared) / "view-0.npy", mmap_mode="r")
        return rows if len(rows) == count_inputs(prepared) else None
    return None


def digest_network(recipe: Recipe, module: nn.Module, head: str) -> str:
    """Of all that decides features: the code of the network by its name, and its weights without the head."""
    digest = hashlib.blake2b(digest_size=16)
    code = [recipe.model, recipe.model_args, versions(("suanli", "torch"))]
    digest.update(json.dumps(code, sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        if not name.startswith(f"{head}."):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_inputs(prepared: PreparedData) -> int:
    """Of all splits together, in the cache."""
    return len(next(iter(prepared.splits["train"].inputs.values())))


class _View:
    """One view of the cached inputs: the first as they are, the others augmented."""

    def __init__(self, recipe: Recipe, prepared: PreparedData, number: int) -> None:
        self._prepared, self._number, self._seed = prepared, number, recipe.seed
        self._whole = replace(prepared.splits["train"], index=np.arange(count_inputs(prepared)), targets={})
        self._parts = compose(recipe.augment, prepared.preprocess.roles, prepared.task.targets).parts if number else ()
        self.name = f"view-{number}"
        if self._parts:
            text = json.dumps([[repr(part) for part in self._parts], self._seed])
            self.name += f"-{hashlib.blake2b(text.encode(), digest_size=6).hexdigest()}"

    def batches(self, rows: np.ndarray, device: Device) -> Iterator[tuple[np.ndarray, Any]]:
        """Rows (n,) and network inputs (n, …) of at most BLOCK of them. A block is augmented whole, so that a view of
        an image doesn't depend on which others are needed."""
        feed = Feed(self._whole, device)
        if not self._number:
            for start in range(0, len(rows), BLOCK):
                block = rows[start : start + BLOCK]
                yield block, network_inputs(self._read(feed, block))
            return
        for number in np.unique(rows // BLOCK).tolist():
            whole = np.arange(number * BLOCK, min(len(feed), (number + 1) * BLOCK))
            block = rows[(rows >= whole[0]) & (rows <= whole[-1])]
            chosen = torch.from_numpy(block - whole[0]).to(feed.device)
            inputs = self._augment(self._read(feed, whole), whole, feed.device, number)
            yield block, map_tensors(network_inputs(inputs), itemgetter(chosen))

    def _read(self, feed: Feed, rows: np.ndarray) -> Tensors:
        return self._prepared.preprocess.to_model(feed.inputs(torch.from_numpy(rows)))

    def _augment(self, inputs: Tensors, rows: np.ndarray, device: torch.device, block: int) -> Tensors:
        """Augmentations that mix examples are left out: each view would need targets of its own."""
        generator = torch.Generator(device).manual_seed(mix(self._seed, 4, self._number, block))
        task = self._prepared.task
        targets = {name: torch.from_numpy(a).to(device) for name, a in zeros(task.targets, len(rows)).items()}
        index = torch.from_numpy(rows).to(device)
        batch = Batch(inputs=inputs, targets=targets, index=index, epoch=self._number, classes=len(task.classes))
        for part in self._parts:
            changed = part(batch, generator)
            batch = changed if changed.targets is targets else batch
        return batch.inputs


class _Store:
    """The rows of one view (M, F), in a file where the disk has room for it, else in memory."""

    def __init__(self, path: Path, rows: int, length: int) -> None:
        self._path, self._shape = path, (rows, length)
        self._rows: np.ndarray | None = None

    def _open(self) -> np.ndarray:
        if self._rows is None:
            self._rows = self._open_file()
        return self._rows

    def _open_file(self) -> np.ndarray:
        with suppress(OSError, ValueError, EOFError):
            rows: np.ndarray = np.load(self._path, mmap_mode="r+", allow_pickle=False)
            if rows.shape == self._shape and rows.dtype == np.float32:
                return rows
        empty = np.full(self._shape, np.nan, np.float32)
        try:
            with raise_storage_errors(self._path):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                np.save(self._path, empty)
                made: np.ndarray = np.load(self._path, mmap_mode="r+", allow_pickle=False)
                return made
        except StorageError as error:
            warn(f"{error.message} The features stay in memory, and the next training computes them again.")
            self._path.unlink(missing_ok=True)
            return empty

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those that aren't there yet."""
        missing: np.ndarray = rows[~np.isfinite(self._open()[rows]).all(1)]
        return missing

    def read(self, rows: np.ndarray) -> np.ndarray:
        return np.array(self._open()[rows])

    def write(self, rows: np.ndarray, features: np.ndarray) -> None:
        self._open()[rows] = features

    def flush(self) -> None:
        if isinstance(self._rows, np.memmap):
            self._rows.flush()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Lets one process compute; others that want the same features wait, and find them."""
    try:
        with raise_storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock")
            try:
                lock.acquire(timeout=1)
            except Timeout:
                say("waiting for another process that computes the same features")
                lock.acquire()
    except StorageError:
        yield  # without a place for them, there is nothing to share
        return
    try:
        yield
    finally:
        lock.release()


def _keep_rates(path: Path, rates: dict[str, float]) -> dict[str, float]:
    """Those of now, or, where nothing was timed, of before."""
    with suppress(StorageError, DamagedFile, OSError, ValueError, TypeError):
        if rates:
            write_json(path, rates)
        else:
            rates = {str(way): float(rate) for way, rate in dict(read_json(path)).items()}
    return rates


def _digest(network: str, prepared: PreparedData) -> str:
    digest = hashlib.blake2b(digest_size=10)
    digest.update(json.dumps([FORMAT, network, prepared.preprocess.to_json()], sort_keys=True).encode())
    digest.update(prepared.digest.encode() if prepared.examples is None else prepared.examples.digests.tobytes())
    return digest.hexdigest()
