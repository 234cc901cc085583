"""Decodes a source once and caches the result on disk: a memory map for each column of inputs and targets.

The folder's name is a digest of the source's fingerprint and of every setting that changes an array. So a change makes
a new folder, and an old one is never wrong. Decoding runs in threads, since the decoders release the interpreter's lock
and most data sets are decoded before a pool of processes has started.
"""

from __future__ import annotations

import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock, Timeout

from suanli.core.console import Progress, say, size
from suanli.core.errors import BadInput, DamagedFile, StorageError, UsageError
from suanli.core.registry import load, load_all
from suanli.core.schema import Arrays, Geometry, Ragged, Stored, example_bytes, schema_bytes, select
from suanli.core.storage import atomic_folder, raise_storage_errors, read_json, write_json
from suanli.core.task import Task
from suanli.core.types import SPLITS, Example, Preprocess, Raw, Recipe, Source, Split
from suanli.data import checks
from suanli.data.columns import ColumnWriter, load_columns
from suanli.data.splits import assign_splits, content_digest, number_groups

FORMAT = 2  # raise when the meaning of a cached file changes
HELD_BYTES = 1 << 30  # raw inputs up to this size in total are read from the disk once instead of twice
MEASURED = 1000  # training rows for statistics, at least; at most twice as many
MEASURED_BYTES = 128 << 20  # that those rows may have
CHUNK = 128  # inputs that a thread takes at a time, at most
CHUNK_BYTES = 16 << 20  # of encoded rows that a thread takes at a time
INPUTS, TARGETS = "inputs", "targets"  # folders of columns
BAD = 255  # in split.npy: an input that can't be decoded

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A checked data set, ready to train on."""

    name: str
    kind: str
    licence: str | None
    path: Path
    digest: str  # of every input, its target and its split
    task: Task
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
            "annotation": self.task.annotation,
            "classes": list(self.task.classes),
            "counts": self.findings["class_counts"],
            "input_shape": list(self.preprocess.input_shape),
        }


def prepare_source(
    source: Source, recipe: Recipe, cache: Path, *, threads: int, preprocess: Preprocess | None = None
) -> PreparedData:
    """The prepared data of `source` for the recipe's task, from the cache or made now. Raises UsageError and
    StorageError.

    `preprocess` is that of a trained model; without, a new one is fitted to the training split.
    """
    if recipe.val_fraction + recipe.test_fraction >= 1:
        raise UsageError(
            f"val_fraction {recipe.val_fraction} and test_fraction {recipe.test_fraction} leave nothing to train on.",
            fix="Let them add up to less than 1.",
        )
    task = make_task(recipe, source)
    path = cache / "prepared" / f"{source.name}-{_key(source, task, recipe, preprocess)}"
    if (cached := _load_cached(path, task)) is not None:
        return cached
    with _lock(path):
        if (cached := _load_cached(path, task)) is not None:  # another process was faster
            return cached
        _remove_leftovers(path)
        _build(source, task, recipe, preprocess, path, threads)
    return _load(path, task, reused=False)


def make_task(recipe: Recipe, source: Source) -> Task:
    """The recipe's task for the classes of `source`. Raises UsageError for wrong settings, and for targets that it
    doesn't learn from."""
    kind: type[Task] = load("tasks", recipe.task)
    if kind.annotation != source.annotation:
        others = [name for name, other in load_all("tasks").items() if other.annotation == source.annotation]
        raise UsageError(
            f"The task {recipe.task} learns from {kind.annotation!r} targets, and {source.name} has "
            f"{source.annotation!r}.",
            fix=f"Choose another task: --set task={others[0]}." if others else "Give other data.",
        )
    return kind.of(source.classes, recipe.task_args)


def _load_cached(path: Path, task: Task) -> PreparedData | None:
    """The prepared data at `path`; None: there is none, or it is damaged and must be made again."""
    if (path / "meta.json").exists():
        with suppress(DamagedFile):
            return _load(path, task, reused=True)
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


def _key(source: Source, task: Task, recipe: Recipe, preprocess: Preprocess | None) -> str:
    settings = [
        FORMAT,
        source.fingerprint,
        source.kind,
        preprocess.settings() if preprocess else recipe.preprocess,
        task.name,
        {name: asdict(column) for name, column in task.targets.items()},
        source.classes,
        recipe.val_fraction,
        recipe.test_fraction,
    ]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10).hexdigest()


def _build(source: Source, task: Task, recipe: Recipe, preprocess: Preprocess | None, path: Path, threads: int) -> None:
    """Decodes every input and writes the folder `path`."""
    examples = source.examples
    read = _make_reader(source)
    with ThreadPoolExecutor(threads) as pool:
        splits = _assign_splits(examples, read, recipe, pool)
        fitted = preprocess or load("preprocess", source.kind).fit(_training_inputs(splits, read), recipe.preprocess)
        with atomic_folder(path) as folder:
            _check_space(folder, len(examples) * (schema_bytes(fitted.inputs) + schema_bytes(task.targets)))
            results = _encode(examples, read, fitted, task, folder, pool)
            numbers = [BAD if r.reason else SPLITS.index(s) for r, s in zip(results, splits, strict=True)]
            split = np.array(numbers, np.uint8)
            if preprocess is None:
                fitted = _measure(fitted, folder / INPUTS, np.flatnonzero(split == 0))
            np.save(folder / "split.npy", split)
            np.save(folder / "geometries.npy", _geometries(results))
            if (groups := number_groups(examples)) is not None:
                np.save(folder / "groups.npy", groups)
            write_json(folder / "names.json", [example.name for example in examples])
            targets = load_columns(folder / TARGETS, task.targets, len(examples))
            meta = {
                "format": FORMAT,
                "name": source.name,
                "kind": source.kind,
                "licence": source.licence,
                "digest": _digest(fitted, results, targets, split),
                "classes": list(source.classes),
                "preprocess": fitted.settings(),
                "findings": checks.collect_findings(source, task, splits, results),
            }
            write_json(folder / "meta.json", meta)


def _measure(preprocess: Preprocess, folder: Path, train: np.ndarray) -> Preprocess:
    """With the statistics of a sample of the training inputs, spread over all of them."""
    if not len(train):
        return preprocess
    inputs = load_columns(folder, preprocess.inputs)
    count = max(1, min(MEASURED, MEASURED_BYTES // example_bytes(inputs)))
    sample = train[:: max(1, len(train) // count)]
    return preprocess.measure({name: select(column, sample) for name, column in inputs.items()})


def _geometries(results: Sequence[checks.DecodeResult]) -> np.ndarray:
    """(N, 3, axes) float64; zeros for an input that can't be decoded."""
    axes = max((len(result.size) for result in results), default=0)
    empty = np.zeros((3, axes))
    return np.stack([empty if r.geometry is None else r.geometry.to_array() for r in results])


def _make_reader(source: Source) -> Callable[[int], Raw]:
    """A function that reads the input of row i. Inputs are read twice, for splits and for decoding; small data sets are
    kept in memory in between."""
    examples = source.examples
    if source.size_bytes is None or source.size_bytes > HELD_BYTES:
        return lambda i: examples[i].read()
    inputs: list[Raw | None] = [None] * len(examples)

    def read(i: int) -> Raw:
        raw = inputs[i]
        if raw is None:
            raw = inputs[i] = examples[i].read()
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
    examples: Sequence[Example], read: Callable[[int], Raw], recipe: Recipe, pool: ThreadPoolExecutor
) -> list[str]:
    def digest(i: int) -> bytes | None:
        try:
            return content_digest(read(i))
        except (OSError, BadInput):
            return None

    def digests(positions: Sequence[int]) -> list[bytes | None]:
        chunks = _map_chunks(len(positions), lambda c: [digest(positions[i]) for i in c], pool, "Reading")
        return [d for chunk in chunks for d in chunk]

    return assign_splits(examples, digests, val_fraction=recipe.val_fraction, test_fraction=recipe.test_fraction)


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
    examples: Sequence[Example],
    read: Callable[[int], Raw],
    preprocess: Preprocess,
    task: Task,
    folder: Path,
    pool: ThreadPoolExecutor,
) -> list[checks.DecodeResult]:
    """Writes the columns of inputs and targets. Those of an input that can't be decoded stay zero or empty."""
    length = max(1, min(CHUNK, CHUNK_BYTES // max(1, schema_bytes(preprocess.inputs))))

    def work(chunk: range) -> Callable[[], list[checks.DecodeResult]]:
        """Returns what is left to do in the order of the examples."""
        encoded = [_encode_one(examples[i], partial(read, i), preprocess, task) for i in chunk]
        ragged_inputs = inputs.write(chunk.start, [one.inputs for one in encoded])
        ragged_targets = targets.write(chunk.start, [one.targets for one in encoded])
        results = [one.result for one in encoded]

        def finish() -> list[checks.DecodeResult]:
            inputs.append(ragged_inputs)
            targets.append(ragged_targets)
            return results

        return finish

    with (
        ColumnWriter(folder / INPUTS, preprocess.inputs, len(examples)) as inputs,
        ColumnWriter(folder / TARGETS, task.targets, len(examples)) as targets,
    ):
        chunks = _map_chunks(len(examples), work, pool, "Decoding", length)
        return [result for finish in chunks for result in finish()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    inputs: Arrays | None
    targets: Arrays | None
    result: checks.DecodeResult


def _encode_one(example: Example, read: Callable[[], Raw], preprocess: Preprocess, task: Task) -> _Encoded:
    inputs: Arrays | None = None
    targets: Arrays | None = None
    geometry = None
    result = checks.DecodeResult()
    try:
        encoded = preprocess.encode(read())
        inputs, geometry = encoded.arrays, encoded.geometry
        result = checks.DecodeResult(digest=encoded.digest, traits=encoded.traits, geometry=geometry)
    except BadInput as error:
        result = checks.DecodeResult(reason=error.message.rstrip("."))
    except OSError as error:
        result = checks.DecodeResult(reason=error.strerror or str(error))
    try:  # of a bad input, too: the digest of the data covers its target
        targets = task.encode(example.target, geometry or Geometry.unchanged((0, 0)))
    except BadInput as error:
        result = checks.DecodeResult(reason=result.reason or error.message.rstrip("."))
    return _Encoded(inputs=inputs, targets=targets, result=result)


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise StorageError(
            f"The decoded data set needs {size(needed_bytes)}, but {folder.parent} has {size(free)} free.",
            fix="Free some space, choose another place with --cache-dir, or a smaller --set preprocess.size.",
        )


def _digest(
    preprocess: Preprocess,
    results: Sequence[checks.DecodeResult],
    targets: Mapping[str, Stored],
    split: np.ndarray,
) -> str:
    digest = hashlib.blake2b(json.dumps(preprocess.settings(), sort_keys=True).encode(), digest_size=10)
    for result in results:
        digest.update(result.digest or b"bad")
    for column in targets.values():
        for part in (column.values, column.offsets) if isinstance(column, Ragged) else (column,):
            digest.update(np.ascontiguousarray(part).data)
    digest.update(split.tobytes())
    return digest.hexdigest()


def _load(path: Path, task: Task, *, reused: bool) -> PreparedData:
    try:
        meta = read_json(path / "meta.json")
        preprocess: Preprocess = load("preprocess", meta["kind"])(**meta["preprocess"])
        names = read_json(path / "names.json")
        inputs = load_columns(path / INPUTS, preprocess.inputs, len(names))
        targets = load_columns(path / TARGETS, task.targets, len(names))
        others = [np.load(path / f"{name}.npy", allow_pickle=False) for name in ("split", "geometries")]
        groups = np.load(path / "groups.npy", allow_pickle=False) if "groups" in meta["findings"] else None
        if any(len(column) != len(names) for column in (*others, *([] if groups is None else [groups]))):
            raise ValueError("columns differ in length")
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise DamagedFile(f"The cached data in {path} is damaged ({error}).", fix="Remove that folder.") from error
    split, geometries = others
    splits = {}
    for number, name in enumerate(SPLITS):
        index = np.flatnonzero(split == number)
        splits[name] = Split(
            inputs=inputs,
            index=index,
            targets={column: select(stored, index) for column, stored in targets.items()},
            names=[names[i] for i in index],
            geometries=geometries[index],
            groups=None if groups is None else groups[index],
        )
    return PreparedData(
        name=meta["name"],
        kind=meta["kind"],
        licence=meta["licence"],
        path=path,
        digest=meta["digest"],
        task=task.fit(splits["train"].targets),
        preprocess=preprocess,
        splits=splits,
        findings=meta["findings"],
        reused=reused,
    )
