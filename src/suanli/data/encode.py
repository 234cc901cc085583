"""Decodes inputs in threads and writes their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from suanli.core.console import Progress
from suanli.core.errors import BadInput
from suanli.core.schema import Arrays, Geometry, Schema, schema_bytes
from suanli.core.task import Task
from suanli.core.types import Preprocess, Raw, RawBlock, Target
from suanli.data import checks
from suanli.data.column_store import BLOCK
from suanli.data.columns import ColumnWriter
from suanli.data.example_columns import ExampleColumns

CHUNK = 128  # inputs that a thread takes at a time, at most
CHUNK_BYTES = 16 << 20  # of encoded rows that a thread takes at a time
INPUTS, TARGETS = "inputs", "targets"  # folders of columns

T = TypeVar("T")


def map_chunks(
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


def cached_inputs(preprocess: Preprocess) -> Schema:
    """The columns of the cache: those of an input that is cut into windows are ragged."""
    if not preprocess.has_windows:
        return preprocess.inputs
    return {name: replace(column, shape=(None, *column.shape)) for name, column in preprocess.inputs.items()}


def encode_examples(
    examples: ExampleColumns,
    read: Callable[[int], Raw],
    preprocess: Preprocess,
    task: Task,
    folder: Path,
    pool: ThreadPoolExecutor,
) -> checks.DecodeResults:
    """Writes the columns of inputs and targets. Those of an input that can't be decoded stay zero or empty."""
    with (
        ColumnWriter(folder / INPUTS, cached_inputs(preprocess), len(examples)) as inputs,
        ColumnWriter(folder / TARGETS, task.targets, len(examples)) as targets,
    ):
        if examples.block is not None:
            encode = partial(_encode_block, examples, examples.block, preprocess, task, inputs, targets)
            length = max(CHUNK, min(BLOCK, CHUNK_BYTES // max(1, schema_bytes(preprocess.inputs))))
            return checks.DecodeResults.join([*map_chunks(len(examples), encode, pool, "Encoding", length)])
        return _encode_each(examples, read, preprocess, task, inputs, targets, pool)


def _encode_block(
    examples: ExampleColumns,
    block: RawBlock,
    preprocess: Preprocess,
    task: Task,
    inputs: ColumnWriter,
    targets: ColumnWriter,
    chunk: range,
) -> checks.DecodeResults:
    """Writes the columns of these rows."""
    encoded = preprocess.encode_block(block.take(np.arange(chunk.start, chunk.stop)))
    inputs.write_block(chunk.start, encoded.arrays)
    reasons: dict[int, str] = {}
    known: dict[Target, Arrays | None] = {}
    arrays: list[Arrays | None] = []
    for place, i in enumerate(chunk):
        target = examples.targets[i]
        if target not in known:
            try:
                known[target] = task.encode(target, encoded.geometry)
            except BadInput as error:
                known[target] = None
                reasons[place] = error.message.rstrip(".")
        arrays.append(known[target])
    reasons |= {i: reasons.get(i, "its target can't be used") for i, array in enumerate(arrays) if array is None}
    targets.append(targets.write(chunk.start, arrays))
    usable = np.array([array is not None for array in arrays])
    geometries = np.broadcast_to(encoded.geometry.to_array(), (len(chunk), 3, len(encoded.geometry.size)))
    return checks.DecodeResults(
        digests=encoded.digests,
        keys=np.zeros((len(chunk), 0), np.uint8),
        geometries=geometries,
        reasons=reasons,
        traits={name: count for name, has in encoded.traits.items() if (count := int((has & usable).sum()))},
    )


def _encode_each(
    examples: ExampleColumns,
    read: Callable[[int], Raw],
    preprocess: Preprocess,
    task: Task,
    inputs: ColumnWriter,
    targets: ColumnWriter,
    pool: ThreadPoolExecutor,
) -> checks.DecodeResults:
    length = max(1, min(CHUNK, CHUNK_BYTES // max(1, schema_bytes(preprocess.inputs))))
    length = 1 if preprocess.has_windows else length  # of which an input may have hundreds

    def work(chunk: range) -> Callable[[], list[checks.DecodeResult]]:
        """Returns what is left to do in the order of the examples."""
        encoded = [_encode_one(examples.targets[i], partial(read, i), preprocess, task) for i in chunk]
        ragged_inputs = inputs.write(chunk.start, [one.inputs for one in encoded])
        ragged_targets = targets.write(chunk.start, [one.targets for one in encoded])
        results = [one.result for one in encoded]

        def finish() -> list[checks.DecodeResult]:
            inputs.append(ragged_inputs)
            targets.append(ragged_targets)
            return results

        return finish

    chunks = map_chunks(len(examples), work, pool, "Decoding", length)
    return checks.DecodeResults.of([result for finish in chunks for result in finish()])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Encoded:
    inputs: Arrays | None
    targets: Arrays | None
    result: checks.DecodeResult


def _encode_one(target: Target, read: Callable[[], Raw], preprocess: Preprocess, task: Task) -> _Encoded:
    inputs: Arrays | None = None
    targets: Arrays | None = None
    geometry = None
    result = checks.DecodeResult()
    try:
        raw = read()
        encoded = preprocess.encode(raw)
        inputs, geometry = encoded.arrays, encoded.geometry
        key = preprocess.similarity_key(raw, encoded)
        result = checks.DecodeResult(
            digest=encoded.digest, key=key, traits=encoded.traits, geometry=geometry, windows=encoded.windows
        )
    except BadInput as error:
        result = checks.DecodeResult(reason=error.message.rstrip("."))
    except OSError as error:
        result = checks.DecodeResult(reason=error.strerror or str(error))
    try:  # of a bad input, too: the digest of the data covers its target
        targets = task.encode(target, geometry or Geometry.unchanged((0, 0)))
    except BadInput as error:
        result = checks.DecodeResult(reason=result.reason or error.message.rstrip("."))
    return _Encoded(inputs=inputs if result.reason is None else None, targets=targets, result=result)
