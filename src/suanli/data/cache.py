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
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from suanli.core.console import say, size
from suanli.core.errors import BadInput, DamagedFile, StorageError, UsageError
from suanli.core.registry import load, load_all
from suanli.core.run import Run
from suanli.core.schema import Ragged, Stored, Windows, example_bytes, schema_bytes, select
from suanli.core.storage import atomic_folder, raise_storage_errors, read_json, write_json
from suanli.core.task import Task
from suanli.core.types import SPLITS, InputReport, Preprocess, Raw, Recipe, Source, Split
from suanli.data import checks
from suanli.data.columns import load_columns
from suanli.data.encode import INPUTS, TARGETS, cached_inputs, encode_examples, map_chunks
from suanli.data.example_columns import ExampleColumns
from suanli.data.examples import DIGEST_BYTES, ExampleTable
from suanli.data.examples import FILE as EXAMPLES
from suanli.data.examples import LEFT_OUT as BAD
from suanli.data.kept_splits import SplitDecision, SplitOptions
from suanli.data.leaks import FILE as LEAKS
from suanli.data.leaks import find_leaks, write_leaks
from suanli.data.names import Names
from suanli.data.samples import FILE as SAMPLES
from suanli.data.samples import list_samples
from suanli.data.splits import Assignment, content_digest, number_groups
from suanli.data.windows import split_windows, values_of

FORMAT = 3  # raise when the meaning of a cached file changes
HELD_BYTES = 1 << 30  # raw inputs up to this size in total are read from the disk once instead of twice
MEASURED = 1000  # training rows for statistics, at least; at most twice as many
MEASURED_BYTES = 128 << 20  # that those rows may have
WINDOWS = "windows.npy"
FOUND = {"groups": "groups", "leaks": "leakage"}  # files that are there where the check has a finding of that name


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
    part_of: tuple[str, ...] = ()  # larger data sets that contain it

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(split):,} {name}" for name, split in self.splits.items())
        return f"PreparedData({self.name}, {self.kind}, {sizes})"

    @cached_property
    def examples(self) -> ExampleTable | None:
        """None: a cache of an older version, which didn't keep them. Raises DamagedFile."""
        return ExampleTable.load(self.path / EXAMPLES) if (self.path / EXAMPLES).exists() else None

    def copy_to(self, run: Run) -> None:
        """What the data check found, what it knows of each example, and some of them to look at: a run keeps them."""
        run.write("check.json", self.findings)
        run.write(SAMPLES, list_samples(self.preprocess, self.task, self.splits["train"]))
        for file in (EXAMPLES, LEAKS):
            if (self.path / file).exists():
                run.copy(file, self.path / file)

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "kind": self.kind,
            "licence": self.licence,
            "part_of": list(self.part_of),
            "digest": self.digest,
            "cache": str(self.path),
            "annotation": self.task.annotation,
            "classes": list(self.task.classes),
            "counts": self.findings["class_counts"],
            "sizes": {name: len(split) for name, split in self.splits.items()},
            "input_shape": list(self.preprocess.input_shape),
        }


def prepare_source(
    source: Source,
    recipe: Recipe,
    cache: Path,
    *,
    threads: int,
    preprocess: Preprocess | None = None,
    splitting: SplitOptions | None = None,
) -> PreparedData:
    """The prepared data of `source` for the recipe's task, from the cache or made now. Raises UsageError and
    StorageError.

    `preprocess` is that of a trained model; without, a new one is fitted to the training split.
    """
    splitting = replace(splitting or SplitOptions(), cache=cache)
    if recipe.val_fraction + recipe.test_fraction >= 1:
        raise UsageError(
            f"val_fraction {recipe.val_fraction} and test_fraction {recipe.test_fraction} leave nothing to train on.",
            fix="Let them add up to less than 1.",
        )
    task = make_task(recipe, source)
    path = cache / "prepared" / f"{source.name}-{_key(source, task, recipe, preprocess, splitting)}"
    prepared = _load_cached(path, task)
    if prepared is None:
        with _lock(path):
            prepared = _load_cached(path, task)  # another process may have been faster
            if prepared is None:
                _remove_leftovers(path)
                _build(source, task, recipe, preprocess, splitting, path, threads)
                prepared = _load(path, task, reused=False)
    return replace(prepared, part_of=source.part_of)


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


def _key(source: Source, task: Task, recipe: Recipe, preprocess: Preprocess | None, splitting: SplitOptions) -> str:
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
        *splitting.key(),
    ]
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=10).hexdigest()


def _build(
    source: Source,
    task: Task,
    recipe: Recipe,
    preprocess: Preprocess | None,
    options: SplitOptions,
    path: Path,
    threads: int,
) -> None:
    """Decodes every input and writes the folder `path`."""
    examples = ExampleColumns.of(source.examples)
    source = replace(source, examples=examples)
    read = _make_reader(source, examples)
    with ThreadPoolExecutor(threads) as pool:
        decision = SplitDecision(source, task, recipe, options)
        assignment = decision.decide(_digest_inputs(examples, read, pool))
        splits = assignment.splits
        raws = _training_inputs(examples, splits, read)
        fitted = preprocess or load("preprocess", source.kind).fit(raws, recipe.preprocess)
        if fitted.has_windows and not task.takes_windows:
            raise UsageError(
                f"The task {task.name} can't put answers for parts of an input together.", fix="Leave out --tiles."
            )
        with atomic_folder(path) as folder:
            _check_space(folder, len(examples) * (schema_bytes(fitted.inputs) + schema_bytes(task.targets)))
            results = encode_examples(examples, read, fitted, task, folder, pool)
            table = _make_table(examples, assignment, results)
            split = table.splits
            if preprocess is None:
                fitted = _measure(fitted, folder / INPUTS, np.flatnonzero(split == 0))
            np.save(folder / "split.npy", split)
            np.save(folder / "geometries.npy", results.geometries)
            if fitted.has_windows:
                np.save(folder / WINDOWS, results.windows)
            if (groups := number_groups(examples)) is not None:
                np.save(folder / "groups.npy", groups)
            _save_names(folder, Names.of(table.names))
            table.save(folder / EXAMPLES)
            leaks = find_leaks(table, table, fitted.similar_bits)
            write_leaks(folder / LEAKS, leaks.entries)
            np.save(folder / "leaks.npy", leaks.kinds)
            targets = load_columns(folder / TARGETS, task.targets, len(examples))
            findings = checks.collect_findings(source, task, splits, results, leaks)
            findings["set_aside"] = _count_set_aside(examples, split)
            if examples.block is not None:
                inputs = load_columns(folder / INPUTS, fitted.inputs, len(examples))
                report = fitted.check_inputs(examples.block, inputs, targets, np.flatnonzero(split == 0))
                _add_input_report(findings, report)
            meta = {
                "format": FORMAT,
                "name": source.name,
                "kind": source.kind,
                "licence": source.licence,
                "digest": _digest(fitted, results, targets, split),
                "classes": list(source.classes),
                "preprocess": fitted.settings(),
                "findings": findings,
            }
            write_json(folder / "meta.json", meta)
        decision.keep(assignment)


def _make_table(examples: ExampleColumns, assignment: Assignment, results: checks.DecodeResults) -> ExampleTable:
    numbers = np.fromiter(map(SPLITS.index, assignment.splits), np.uint8, len(examples))
    numbers[list(results.reasons)] = BAD
    return ExampleTable(
        names=Names.of(examples.names),
        splits=numbers,
        digests=np.ascontiguousarray(results.digests[:, :DIGEST_BYTES]),
        keys=results.keys,
        units=assignment.units_array,
    )


def _count_set_aside(examples: ExampleColumns, split: np.ndarray) -> dict[str, int]:
    """How many examples suanli took for validation and test: those that the data doesn't put there itself."""
    given = np.array([own in ("val", "test") for own in examples.splits])
    return {name: int(((split == SPLITS.index(name)) & ~given).sum()) for name in ("val", "test")}


def _save_names(folder: Path, names: Names) -> None:
    np.save(folder / "names.npy", names.text)
    np.save(folder / "name_ends.npy", names.ends)


def _add_input_report(findings: checks.Findings, report: InputReport) -> None:
    findings["input_remarks"] = list(report.remarks)
    findings["input_figures"] = dict(report.figures)


def _measure(preprocess: Preprocess, folder: Path, train: np.ndarray) -> Preprocess:
    """With the statistics of a sample of the training inputs, spread over all of them."""
    if not len(train):
        return preprocess
    inputs = load_columns(folder, cached_inputs(preprocess))
    count = max(1, min(MEASURED, MEASURED_BYTES // example_bytes(inputs)))
    sample = train[:: max(1, len(train) // count)]
    chosen = {name: select(column, sample) for name, column in inputs.items()}
    return preprocess.measure(values_of(chosen) if preprocess.has_windows else chosen)


def _make_reader(source: Source, examples: ExampleColumns) -> Callable[[int], Raw]:
    """A function that reads the input of row i. Inputs are read twice, for splits and for decoding; small data sets are
    kept in memory in between."""
    if examples.block is not None or source.size_bytes is None or source.size_bytes > HELD_BYTES:
        return examples.read
    inputs: list[Raw | None] = [None] * len(examples)

    def read(i: int) -> Raw:
        raw = inputs[i]
        if raw is None:
            raw = inputs[i] = examples.read(i)
        return raw

    return read


def _digest_inputs(
    examples: ExampleColumns, read: Callable[[int], Raw], pool: ThreadPoolExecutor
) -> Callable[[Sequence[int]], Sequence[bytes | None] | np.ndarray]:
    """A function that reads the inputs at some positions for their digests; None: it can't be read."""
    if (block := examples.block) is not None:
        return lambda positions: block.take(np.asarray(positions, np.int64)).digests()

    def digest(i: int) -> bytes | None:
        try:
            return content_digest(read(i))
        except (OSError, BadInput):
            return None

    def digests(positions: Sequence[int]) -> list[bytes | None]:
        chunks = map_chunks(len(positions), lambda c: [digest(positions[i]) for i in c], pool, "Reading")
        return [d for chunk in chunks for d in chunk]

    return digests


def _training_inputs(
    examples: ExampleColumns, splits: Sequence[str], read: Callable[[int], Raw]
) -> Callable[[], Iterable[Raw]]:
    """A function that starts a pass over the raw training inputs, in an order that mixes the classes."""
    order = np.flatnonzero([split == "train" for split in splits])
    if (block := examples.block) is not None:
        return lambda: block.take(order)
    mixed = order[np.random.default_rng(0).permutation(len(order))].tolist()

    def raws() -> Iterator[Raw]:
        for i in mixed:
            try:
                yield read(i)
            except (OSError, BadInput):
                continue

    return raws


def _check_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise StorageError(
            f"The decoded data set needs {size(needed_bytes)}, but {folder.parent} has {size(free)} free.",
            fix="Free some space, choose another place with --cache-dir, or a smaller --set preprocess.size.",
        )


def _digest(
    preprocess: Preprocess,
    results: checks.DecodeResults,
    targets: Mapping[str, Stored],
    split: np.ndarray,
) -> str:
    digest = hashlib.blake2b(json.dumps(preprocess.settings(), sort_keys=True).encode(), digest_size=10)
    start = 0
    for end in [*np.flatnonzero(~results.digests.any(1)).tolist(), len(results)]:
        digest.update(np.ascontiguousarray(results.digests[start:end]).data)
        digest.update(b"bad" if end < len(results) else b"")
        start = end + 1
    for column in targets.values():
        for part in (column.values, column.offsets) if isinstance(column, Ragged) else (column,):
            digest.update(np.ascontiguousarray(part).data)
    digest.update(split.tobytes())
    return digest.hexdigest()


def _load(path: Path, task: Task, *, reused: bool) -> PreparedData:
    try:
        meta = read_json(path / "meta.json")
        preprocess: Preprocess = load("preprocess", meta["kind"])(**meta["preprocess"])
        names = Names(*(np.load(path / f"{file}.npy", mmap_mode="r") for file in ("names", "name_ends")))
        inputs = load_columns(path / INPUTS, cached_inputs(preprocess), len(names))
        targets = load_columns(path / TARGETS, task.targets, len(names))
        files = {"split", "geometries"}
        files |= {file for file, finding in FOUND.items() if finding in meta["findings"]}
        columns = {name: np.load(path / f"{name}.npy", allow_pickle=False) for name in files}
        if any(len(column) != len(names) for column in columns.values()):
            raise ValueError("columns differ in length")
        windows = _load_windows(path, preprocess, inputs)
        if (path / EXAMPLES).exists() and not zipfile.is_zipfile(path / EXAMPLES):
            raise ValueError(f"{EXAMPLES} is cut short")
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise DamagedFile(f"The cached data in {path} is damaged ({error}).", fix="Remove that folder.") from error
    splits = {}
    for number, name in enumerate(SPLITS):
        index = np.flatnonzero(columns["split"] == number)
        rows, own = (index, None) if windows is None else _select_windows(windows, index)
        splits[name] = Split(
            inputs=inputs if windows is None else values_of(inputs),
            index=rows,
            windows=own,
            targets={column: select(stored, index) for column, stored in targets.items()},
            names=names.take(index),
            geometries=columns["geometries"][index],
            groups=columns["groups"][index] if "groups" in columns else None,
            leaks=columns["leaks"][index] if "leaks" in columns else None,
        )
    splits["train"] = split_windows(splits["train"], task)
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


def _load_windows(path: Path, preprocess: Preprocess, inputs: Mapping[str, Stored]) -> Windows | None:
    """Of all examples. Raises ValueError where they don't fit the inputs."""
    if not preprocess.has_windows:
        return None
    column = next(iter(inputs.values()))
    assert isinstance(column, Ragged)
    geometries = np.load(path / WINDOWS, allow_pickle=False)
    if len(geometries) != len(column.values):
        raise ValueError(f"{WINDOWS} has {len(geometries)} windows, not {len(column.values)}")
    return Windows(offsets=column.offsets, geometries=geometries, size=preprocess.geometry.size)


def _select_windows(windows: Windows, index: np.ndarray) -> tuple[np.ndarray, Windows]:
    """The rows of the windows of some examples, and these windows."""
    rows = [np.arange(part.start, part.stop) for part in map(windows.of, index.tolist())]
    joined = np.concatenate([np.arange(0), *rows])
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return joined, replace(windows, offsets=offsets, geometries=windows.geometries[joined])
