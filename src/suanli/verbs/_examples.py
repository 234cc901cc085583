"""The examples on which `optimize` compares engines: labelled ones, unlabelled ones, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from suanli.core.console import warn
from suanli.core.errors import BadInput, DataError
from suanli.core.run import Run
from suanli.core.schema import Arrays, Schema, Stored, example_bytes, random_inputs, schema_bytes, select, take
from suanli.core.types import Preprocess, Raw, Recipe, Split
from suanli.data.cache import PreparedData
from suanli.data.preprocess.tensors import TensorsPreprocess, find_files
from suanli.data.windows import split_windows
from suanli.engines.examples import Examples, SeparateExamples, StackedExamples
from suanli.engines.subject import Origin
from suanli.machine.device import cores
from suanli.training.prepare import DataOptions, resolve, resolve_run

CALIBRATION = 300  # training examples
MAX_BYTES = 1 << 30  # of the inputs for evaluation
MADE_UP = 64  # where there is no data
MADE_UP_BYTES = 64 << 20
UNLABELLED = 5000  # at most, for evaluation


@dataclass(frozen=True, kw_only=True)
class ChosenExamples:
    examples: Examples  # N, in random order
    origin: Origin
    count: int  # that there are for evaluation
    calibration: Examples | None = None
    targets: Mapping[str, Stored] | None = None  # of the N
    groups: np.ndarray | None = None  # (N,)


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    classes: tuple[str, ...]
    training: Split
    validation: Split


def labelled_of_run(run: Run, options: DataOptions, recipe: Recipe) -> LabelledData:
    """Training and validation examples of a run's own data. Raises DataError where it is gone or has changed."""
    return _labelled(resolve_run(run, options, recipe, verb="evaluate", announce=False))


def prepare_labelled(options: DataOptions, recipe: Recipe, classes: tuple[str, ...] = ()) -> LabelledData:
    """Training and validation examples. Raises DataError where they aren't of these classes."""
    _, prepared = resolve(options, recipe=recipe, settings={}, announce=False)
    if classes and prepared.task.classes != classes:
        raise DataError(
            f"The data has the classes {_few(prepared.task.classes)}; the model has {_few(classes)}.",
            fix="Give data with the classes of the model.",
        )
    return _labelled(prepared)


def _labelled(prepared: PreparedData) -> LabelledData:
    if not len(prepared.splits["val"]):
        raise DataError("There are no validation examples.", fix="Give data with more examples.")
    return LabelledData(
        classes=prepared.task.classes,
        training=prepared.splits["train"],
        validation=split_windows(prepared.splits["val"], prepared.task),  # engines answer window by window
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def choose_labelled(data: LabelledData, *, batches: bool = True) -> ChosenExamples:
    training, validation = data.training, data.validation
    random = np.random.default_rng(0)
    # In random order, so that any first part is a fair sample; more than fits here can't be evaluated in time.
    order = random.permutation(len(validation))[: max(MADE_UP, MAX_BYTES // example_bytes(validation.inputs))]
    some = np.sort(random.permutation(len(training))[:CALIBRATION])
    return ChosenExamples(
        examples=StackedExamples(arrays=_pick(validation, order), batches=batches),
        origin="labelled",
        count=len(validation),
        calibration=StackedExamples(arrays=_pick(training, some), batches=batches),
        targets={name: select(column, order) for name, column in validation.targets.items()},
        groups=None if validation.groups is None else validation.groups[order],
    )


def _pick(split: Split, positions: np.ndarray) -> dict[str, np.ndarray]:
    index = split.index[positions]
    arrays = [take(column, index, name) for name, column in split.inputs.items()]
    return {name: np.ascontiguousarray(array) for part in arrays for name, array in part.items()}


def make_up(schema: Schema, *, batches: bool = True) -> ChosenExamples:
    """Random inputs, fewer of large ones. The shapes of `schema` have no open sizes."""
    count = min(MADE_UP, max(4, MADE_UP_BYTES // max(1, schema_bytes(schema))))
    examples = StackedExamples(arrays=random_inputs(schema, count), batches=batches)
    return ChosenExamples(examples=examples, origin="made up", count=count)


def warn_of_made_up() -> None:
    warn("There is no data for calibration and evaluation, so only float32 is tried; give some with --data.")


# --- unlabelled examples ---


def choose_arrays(path: Path, columns: Schema, *, batches: bool) -> ChosenExamples:
    """From an .npz or .npy file, or a folder of them. Raises DataError for one that the graph doesn't take."""
    preprocess = TensorsPreprocess(columns=columns)
    examples: list[dict[str, np.ndarray]] = []
    size_bytes = 0
    files = find_files(path) if path.is_dir() else [path]
    for position in np.random.default_rng(0).permutation(len(files)):
        if size_bytes > MAX_BYTES:
            warn(f"Only {len(examples):,} examples of {path} are used; more don't fit.")
            break
        try:
            more = preprocess.split(files[position].read_bytes())
        except BadInput as error:
            raise DataError(f"{files[position]}: {error.message}.", fix=error.fix) from error
        examples += more
        size_bytes += sum(array.nbytes for one in more for array in one.values())
    return _divide(path, examples, len(examples), batches=batches)


def choose_inputs(path: Path, preprocess: Preprocess, *, batches: bool) -> ChosenExamples:
    """From files without labels, such as a folder of images. Those that can't be read are left out."""
    named = list(preprocess.find_inputs(path))
    limit = CALIBRATION + max(MADE_UP, min(UNLABELLED, MAX_BYTES // max(1, schema_bytes(preprocess.inputs))))
    order = np.random.default_rng(0).permutation(len(named))[:limit]
    with ThreadPoolExecutor(cores()) as pool:
        encoded = list(pool.map(_encoder(preprocess), (named[i][1] for i in order)))
    examples = [arrays for arrays in encoded if arrays is not None]
    if len(examples) < len(encoded):
        warn(f"{len(encoded) - len(examples):,} of {len(encoded):,} examples in {path} can't be read and are left out.")
    return _divide(path, examples, len(named), batches=batches)


def _encoder(preprocess: Preprocess) -> Callable[[Callable[[], Raw]], Arrays | None]:
    def encode(read: Callable[[], Raw]) -> Arrays | None:
        try:
            return preprocess.encode(read()).arrays
        except (BadInput, OSError):
            return None

    return encode


def _divide(path: Path, examples: Sequence[Arrays], count: int, *, batches: bool) -> ChosenExamples:
    """Half of the examples, at most 300, are for calibration. `count` is how many `path` has."""
    if not examples:
        raise DataError(f"There is no usable example in {path}.", fix="Give files that the network takes.")
    order = np.random.default_rng(0).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    part = min(CALIBRATION, len(shuffled) // 2)
    return ChosenExamples(
        examples=_gather(shuffled[part:], batches=batches),
        origin="unlabelled",
        count=count - part,
        calibration=_gather(shuffled[:part], batches=batches) if part else None,
    )


def _gather(examples: Sequence[Arrays], *, batches: bool) -> Examples:
    shapes = {tuple(array.shape for array in one.values()) for one in examples}
    if len(shapes) == 1:
        arrays = {name: np.stack([one[name] for one in examples]) for name in examples[0]}
        return StackedExamples(arrays=arrays, batches=batches)
    return SeparateExamples(calls=[{name: array[None] for name, array in one.items()} for one in examples])
