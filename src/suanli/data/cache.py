"""Decodes a source once and caches the result: a memory map of rows (uint8 pixels or token ids) on disk.

The folder's name is a digest of the source's fingerprint and of every setting that changes a row. So a change makes a
new folder, and an old one is never wrong. Decoding runs in threads, since the decoders release the interpreter's lock
and most data sets are decoded before a pool of processes has started.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from suanli.core.console import Progress, say, size
from suanli.core.errors import BadInput, DamagedFile, StorageError, UsageError
from suanli.core.registry import load
from suanli.core.storage import atomic_folder, raise_storage_errors, read_json, write_json
from suanli.core.types import SPLITS, Preprocess, Raw, Recipe, Row, Source, Split
from suanli.data import checks
from suanli.data.splits import assign_splits, content_digest, number_groups

FORMAT = 1  # raise when the meaning of a cached file changes
HELD_BYTES = 1 << 30  # raw inputs up to this size in total are read from the disk once instead of twice
MEASURED = 1000  # training rows for statistics, at least; at most twice as many
MEASURED_BYTES = 128 << 20  # that those rows may have
CHUNK = 128  # inputs that a thread takes at a time, at most
CHUNK_BYTES = 16 << 20  # of encoded rows that a thread takes at a time
BAD = 255  # in split.npy: an input that can't be decoded

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A checked data set, ready to train on."""

    name: str
    kind: str
    licence: str | None
    path: Path
    digest: str  # of every row, its target and its split
    classes: tuple[str, ...]
    preprocess: Preprocess
    splits: dict[str, Split]
    findings: checks.Findings
    reused: bool  # it was in the cache: nothing was decoded

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "kind": self.kind,
            "licence": self.licence,
            "digest": self.digest,
            "cache": str(self.path),
            "classes": list(self.classes),
            "counts": self.findings["class_counts"],
            "input_shape": list(self.preprocess.input_shape),
        }


def prepare_source(
    source: Source, recipe: Recipe, cache: Path, *, threads: int, preprocess: Preprocess | None = None
) -> PreparedData:
    """The prepared data of `source`, from the cache or made now. Raises UsageError and StorageError.

    `preprocess` is that of a trained model; without, a new one is fitted to the training split.
    """
    if recipe.val_fraction + recipe.test_fraction >= 1:
        raise UsageError(
            f"val_fraction {recipe.val_fraction} and test_fraction {recipe.test_fraction} leave nothing to train on.",
            fix="Let them add up to less than 1.",
        )
    path = cache / "prepared" / f"{source.name}-{_key(source, recipe, preprocess)}"
    if (cached := _load_cached(path)) is not None:
        return cached
    with _lock(path):
        if (cached := _load_cached(path)) is not None:  # another process was faster
            return cached
        _remove_leftovers(path)
        _build(source, recipe, preprocess, path, threads)
    return _load(path, reused=False)


def _load_cached(path: Path) -> PreparedData | None:
    """The prepared data at `path`; None: there is none, or it is damaged and must be made again."""
    if (path / "meta.json").exists():
        with suppress(DamagedFile):
            return _load(path, reused=True)
    return None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process decode; others that want the same data wait for it."""
    with raise_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.parent / f".{path.name}.lock")
        try:
            lock.acquire(timeout=1)
        except Timeout:
            say("waiting for another process that prepares the same data")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(path: Path) -> None:
    """Deletes a damaged cache, and what processes left that were killed while decoding."""
    with raise_storage_errors(path):
        for leftover in (path, *path.parent.glob(f".{glob.escape(path.name)}.*.tmp")):
            if leftover.is_dir():
                shutil.rmtree(leftover)


def _key(source: Source, recipe: Recipe, preprocess: Preprocess | None) -> str:
    settings = [
        FORMAT,
        source.fingerprint,
        source.kind,
        preprocess.settings() if preprocess else recipe.preprocess,
        source.classes,
        recipe.val_fraction,
        recipe.test_fraction,
    ]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10).hexdigest()


def _build(source: Source, recipe: Recipe, preprocess: Preprocess | None, path: Path, threads: int) -> None:
    """Decodes every input and writes the folder `path`."""
    rows = source.rows
    read = _make_reader(source)
    with ThreadPoolExecutor(threads) as pool:
        splits = _assign_splits(rows, read, recipe, pool)
        fitted = preprocess or load("preprocess", source.kind).fit(_training_inputs(splits, read), recipe.preprocess)
        with atomic_folder(path) as folder:
            _check_space(folder, len(rows) * _row_bytes(fitted))
            results = _encode(rows, read, fitted, folder / "rows.npy", pool)
            numbers = [BAD if r.reason else SPLITS.index(s) for r, s in zip(results, splits, strict=True)]
            split = np.array(numbers, np.uint8)
            if preprocess is None:
                fitted = _measure(fitted, folder / "rows.npy", np.flatnonzero(split == 0))
            order = {c: i for i, c in enumerate(source.classes)}
            targets = np.array([order[r.label] for r in rows], np.int64)
            np.save(folder / "split.npy", split)
            np.save(folder / "targets.npy", targets)
            if (groups := number_groups(rows)) is not None:
                np.save(folder / "groups.npy", groups)
            write_json(folder / "names.json", [r.name for r in rows])
            meta = {
                "format": FORMAT,
                "name": source.name,
                "kind": source.kind,
                "licence": source.licence,
                "digest": _digest(fitted, results, targets, split),
                "classes": list(source.classes),
                "preprocess": fitted.settings(),
                "findings": checks.collect_findings(source, splits, results),
            }
            write_json(folder / "meta.json", meta)


def _measure(preprocess: Preprocess, path: Path, train: np.ndarray) -> Preprocess:
    """With the statistics of a sample of the training rows, spread over all of them."""
    if not len(train):
        return preprocess
    count = max(1, min(MEASURED, MEASURED_BYTES // _row_bytes(preprocess)))
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    return preprocess.measure(rows[train[:: max(1, len(train) // count)]])


def _make_reader(source: Source) -> Callable[[int], Raw]:
    """A function that reads the input of row i. Inputs are read twice, for splits and for decoding; small data sets are
    kept in memory in between."""
    rows = source.rows
    if source.size_bytes is None or source.size_bytes > HELD_BYTES:
        return lambda i: rows[i].read()
    inputs: list[Raw | None] = [None] * len(rows)

    def read(i: int) -> Raw:
        raw = inputs[i]
        if raw is None:
            raw = inputs[i] = rows[i].read()
        return raw

    return read


def _map_chunks(
    count: int, work: Callable[[range], T], pool: ThreadPoolExecutor, title: str, length: int = CHUNK
) -> Iterator[T]:
    """Runs `work` on consecutive ranges in threads and shows progress; gives the results in order."""
    chunks = [range(i, min(i + length, count)) for i in range(0, count, length)]
    done = 0
    with Progress(title, count) as progress:
        try:
            for chunk, result in zip(chunks, pool.map(work, chunks), strict=True):
                yield result
                done += len(chunk)
                progress.update(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _assign_splits(
    rows: Sequence[Row], read: Callable[[int], Raw], recipe: Recipe, pool: ThreadPoolExecutor
) -> list[str]:
    def digest(i: int) -> bytes | None:
        try:
            return content_digest(read(i))
        except (OSError, BadInput):
            return None

    def digests(positions: Sequence[int]) -> list[bytes | None]:
        chunks = _map_chunks(len(positions), lambda c: [digest(positions[i]) for i in c], pool, "Reading")
        return [d for chunk in chunks for d in chunk]

    return assign_splits(rows, digests, val_fraction=recipe.val_fraction, test_fraction=recipe.test_fraction)


def _training_inputs(splits: Sequence[str], read: Callable[[int], Raw]) -> Callable[[], Iterator[Raw]]:
    """A function that starts a pass over the raw training inputs, in an order that mixes the classes."""
    order = [i for i, s in enumerate(splits) if s == "train"]
    order = [order[j] for j in np.random.default_rng(0).permutation(len(order))]

    def raws() -> Iterator[Raw]:
        for i in order:
            try:
                yield read(i)
            except (OSError, BadInput):
                continue

    return raws


def _encode(
    rows: Sequence[Row],
    read: Callable[[int], Raw],
    preprocess: Preprocess,
    path: Path,
    pool: ThreadPoolExecutor,
) -> list[checks.DecodeResult]:
    """Writes the encoded rows to the .npy file `path`. The row of an input that can't be decoded stays zero."""
    row_bytes = _row_bytes(preprocess)
    dtype, shape = np.dtype(preprocess.row_dtype), preprocess.row_shape
    offset = np.lib.format.open_memmap(path, "w+", dtype, (len(rows), *shape)).offset

    def encode(i: int, row: np.ndarray) -> checks.DecodeResult:
        try:
            encoded = preprocess.encode(read(i))
        except BadInput as error:
            return checks.DecodeResult(reason=error.message.rstrip("."))
        except OSError as error:
            return checks.DecodeResult(reason=error.strerror or str(error))
        row[...] = encoded.row
        return checks.DecodeResult(digest=encoded.digest, traits=encoded.traits, size=encoded.size)

    def work(chunk: range) -> list[checks.DecodeResult]:
        # Written, not through the memory map: faster, and a full disk is an error instead of killing the process.
        block = np.zeros((len(chunk), *shape), dtype)
        results = [encode(i, row) for i, row in zip(chunk, block, strict=True)]
        with lock:
            stream.seek(offset + chunk.start * row_bytes)
            stream.write(block.data)
        return results

    lock = threading.Lock()
    with path.open("r+b") as stream:
        length = max(1, min(CHUNK, CHUNK_BYTES // row_bytes))
        chunks = _map_chunks(len(rows), work, pool, "Decoding", length)
        return [s for chunk in chunks for s in chunk]


def _row_bytes(preprocess: Preprocess) -> int:
    return int(np.prod(preprocess.row_shape)) * np.dtype(preprocess.row_dtype).itemsize


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise StorageError(
            f"The decoded data set needs {size(needed_bytes)}, but {folder.parent} has {size(free)} free.",
            fix="Free some space, choose another place with --cache-dir, or a smaller --set preprocess.size.",
        )


def _digest(
    preprocess: Preprocess, results: Sequence[checks.DecodeResult], targets: np.ndarray, split: np.ndarray
) -> str:
    digest = hashlib.blake2b(json.dumps(preprocess.settings(), sort_keys=True).encode(), digest_size=10)
    for result in results:
        digest.update(result.digest or b"bad")
    digest.update(targets.tobytes())
    digest.update(split.tobytes())
    return digest.hexdigest()


def _load(path: Path, *, reused: bool) -> PreparedData:
    try:
        meta = read_json(path / "meta.json")
        names = read_json(path / "names.json")
        rows = np.load(path / "rows.npy", mmap_mode="r", allow_pickle=False)
        split = np.load(path / "split.npy", allow_pickle=False)
        targets = np.load(path / "targets.npy", allow_pickle=False)
        groups = np.load(path / "groups.npy", allow_pickle=False) if "groups" in meta["findings"] else None
        if not len(rows) == len(split) == len(targets) == len(names) == len(targets if groups is None else groups):
            raise ValueError("columns differ in length")
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise DamagedFile(f"The cached data in {path} is damaged ({error}).", fix="Remove that folder.") from error
    classes = tuple(meta["classes"])
    splits = {}
    for number, name in enumerate(SPLITS):
        index = np.flatnonzero(split == number)
        splits[name] = Split(
            inputs=rows,
            index=index,
            targets=targets[index],
            names=[names[i] for i in index],
            classes=classes,
            groups=None if groups is None else groups[index],
        )
    return PreparedData(
        name=meta["name"],
        kind=meta["kind"],
        licence=meta["licence"],
        path=path,
        digest=meta["digest"],
        classes=classes,
        preprocess=load("preprocess", meta["kind"])(**meta["preprocess"]),
        splits=splits,
        findings=meta["findings"],
        reused=reused,
    )
