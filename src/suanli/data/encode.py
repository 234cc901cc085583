"""Decodes inputs in threads and writes their columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from suanli.core.console import Progress
from suanli.core.errors import BadInput
from suanli.core.schema import Arrays, Geometry, schema_bytes
from suanli.core.task import Task
from suanli.core.types import Example, Preprocess, Raw
from suanli.data import checks
from suanli.data.columns import ColumnWriter

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


def encode_examples(
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
        chunks = map_chunks(len(examples), work, pool, "Decoding", length)
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
        raw = read()
        encoded = preprocess.encode(raw)
        inputs, geometry = encoded.arrays, encoded.geometry
        key = preprocess.similarity_key(raw, encoded)
        result = checks.DecodeResult(digest=encoded.digest, key=key, traits=encoded.traits, geometry=geometry)
    except BadInput as error:
        result = checks.DecodeResult(reason=error.message.rstrip("."))
    except OSError as error:
        result = checks.DecodeResult(reason=error.strerror or str(error))
    try:  # of a bad input, too: the digest of the data covers its target
        targets = task.encode(example.target, geometry or Geometry.unchanged((0, 0)))
    except BadInput as error:
        result = checks.DecodeResult(reason=result.reason or error.message.rstrip("."))
    return _Encoded(inputs=inputs, targets=targets, result=result)
