"""Runs an ONNX graph in a process of its own to learn what its signature doesn't say: which open sizes it accepts,
whether it takes several examples at once, and what its answers are like.

`GraphProbe` asks; `python -m suanli.engines.onnx_probe` answers, with ONNX Runtime.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from suanli.core.errors import DataError, MachineError, first_line, pip_install
from suanli.core.schema import Arrays, Column, random_inputs
from suanli.core.types import Json
from suanli.engines.examples import load_examples
from suanli.engines.onnx_signature import Signature, TensorType, format_inputs
from suanli.engines.sandbox import Sandbox, SandboxError, serve
from suanli.tasks.tensors import measure_spread

# Open sizes to try: of pictures, in px, and of anything else, such as tokens or samples of sound.
SIDES = (224, 256, 320, 512, 640, 32, 64, 128, 1024, 48, 16)
LENGTHS = (128, 64, 32, 16, 512, 256, 1024, 16000, 8, 1, 48000)
MOST_MIXED = 5  # open sizes that are tried in all mixtures with 1
MOST_VALUES = 1 << 24  # of the inputs that are tried
TRIES_S = 60.0
LIMIT_S = 600.0
INTEGERS = 2  # made-up integers are below it: small ones are valid as tokens, lengths, masks and switches
ROUNDING = 1e-3  # of an answer, as a share of its spread


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a graph answered to some examples."""

    spreads: dict[str, float]  # see `tasks.tensors.measure_spread`
    distributions: tuple[str, ...]  # outputs whose values are never negative and sum to 1 along the last axis


class GraphProbe:
    """A context manager. Raises DataError for a graph that ONNX Runtime can't load or run, with its reason, and
    MachineError where it isn't installed."""

    def __init__(self) -> None:
        if importlib.util.find_spec("onnxruntime") is None:
            fix = f"Install it: {pip_install('suanli[engines]')}"
            raise MachineError("To run an ONNX file, the package onnxruntime is needed.", fix=fix)
        self._sandbox = Sandbox(module="suanli.engines.onnx_probe")

    def __enter__(self) -> GraphProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()

    def open(self, path: Path, signature: Signature) -> None:
        """The graph that the other methods are about."""
        self._path, self._signature = path, signature
        try:
            self._sandbox.ask(LIMIT_S, "open", path=str(path.absolute()), signature=asdict(signature))
        except SandboxError as error:
            raise DataError(
                f"ONNX Runtime can't load {path} ({error}).",
                fix="Export it with standard operators, of an opset that the installed onnxruntime knows.",
            ) from error

    def find_sizes(self, known: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Every open size, such that the graph runs; those that are `known` stay. And how many axes each output has."""
        try:
            reply = self._sandbox.ask(LIMIT_S, "find_sizes", known=dict(known))
        except SandboxError as error:
            inputs = format_inputs(self._signature.inputs)
            if known:
                sizes = ", ".join(f"{name} {size}" for name, size in known.items())
                raise DataError(
                    f"{self._path} doesn't accept inputs with {sizes} ({error}).",
                    fix=f"Give others; it takes {inputs}.",
                ) from error
            raise DataError(
                f"No inputs were found that {self._path} accepts: {inputs} ({error}).",
                fix="Give examples with --data: .npz files with arrays named like the inputs.",
            ) from error
        return reply["sizes"], reply["ranks"]

    def can_batch(self, sizes: Mapping[str, int]) -> bool:
        """Whether two examples at once get the answers that each gets alone."""
        try:
            return bool(self._sandbox.ask(LIMIT_S, "can_batch", sizes=dict(sizes))["batches"])
        except SandboxError:
            return False

    def measure(self, folder: Path) -> Answers:
        """The answers to saved examples, of which a few will do."""
        try:
            reply = self._sandbox.ask(LIMIT_S, "measure", folder=str(folder))
        except SandboxError as error:
            raise DataError(
                f"{self._path} doesn't accept the examples ({error}).",
                fix=f"It takes {format_inputs(self._signature.inputs)}.",
            ) from error
        return TypeAdapter(Answers).validate_python(reply["answers"])


# --- inside the process ---


class _ProbeRequests:
    def __init__(self) -> None:
        self._session: Any = None
        self._signature = Signature(inputs=(), outputs=())
        self._outputs: list[str] = []

    def open(self, path: str, signature: dict[str, Json]) -> dict[str, object]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._signature = TypeAdapter(Signature).validate_python(signature)
        self._outputs = [tensor.name for tensor in self._signature.outputs]
        return {}

    def find_sizes(self, known: dict[str, int]) -> dict[str, object]:
        until = time.monotonic() + TRIES_S
        first: Exception | None = None
        for sizes in _candidates(self._signature, known):
            try:
                outputs = self._run(_make_up(self._signature.inputs, sizes, 1, leading=0))
                ranks = {name: output.ndim for name, output in zip(self._outputs, outputs, strict=True)}
                return {"sizes": sizes, "ranks": ranks}
            except Exception as error:  # noqa: BLE001  # the runtime's, of many types
                first = first or error
                if time.monotonic() > until:
                    break
        raise ValueError("its inputs are too large to try any" if first is None else first_line(first, 300))

    def can_batch(self, sizes: dict[str, int]) -> dict[str, object]:
        pair = {name: a[2:] for name, a in _make_up(self._signature.inputs, sizes, 4, leading=1).items()}
        together = self._run(pair)
        for i in range(2):
            alone = self._run({name: array[i : i + 1] for name, array in pair.items()})
            for one, both in zip(alone, together, strict=True):
                if one.shape[:1] != (1,) or both.shape != (2, *one.shape[1:]) or not _are_close(one[0], both[i]):
                    return {"batches": False}
        return {"batches": True}

    def measure(self, folder: str) -> dict[str, object]:
        examples = load_examples(Path(folder))
        answers = [self._run(examples.batch(i, i + 1)) for i in range(len(examples))]
        spreads, distributions = {}, []
        for tensor, parts in zip(self._signature.outputs, zip(*answers, strict=True), strict=True):
            if tensor.is_float:
                spreads[tensor.name] = measure_spread(np.concatenate([part.ravel() for part in parts]))
                distributions += [tensor.name] if all(map(_is_distribution, parts)) else []
        return {"answers": {"spreads": spreads, "distributions": distributions}}

    def _run(self, feed: Arrays) -> list[np.ndarray]:
        return [np.asarray(output) for output in self._session.run(self._outputs, dict(feed))]


def _make_up(
    tensors: Sequence[TensorType], sizes: Mapping[str, int], count: int, *, leading: int
) -> dict[str, np.ndarray]:
    """Random inputs; without a `leading` axis for examples, of the one that there is."""
    schema = {t.name: Column(shape=t.at(sizes)[leading:], dtype=t.dtype, role="value", limit=INTEGERS) for t in tensors}
    inputs = random_inputs(schema, count)
    return inputs if leading else {name: np.asarray(array[0]) for name, array in inputs.items()}


def _candidates(signature: Signature, known: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Open sizes, the likeliest first: batches are of one example, all others have a usual size; then with some of the
    others 1, too; then with batches as long as the others. None needs much memory."""
    unknown = [name for name in signature.open_sizes if name not in known]
    batches = {tensor.shape[0] for tensor in signature.inputs if tensor.shape} if signature.may_batch else set()
    inner = [name for name in unknown if name not in batches and not name.startswith("batch")]
    sides = {side for tensor in signature.inputs if tensor.is_picture for side in (tensor.shape or ())[1:]}
    for mixed in ((), inner, unknown):
        if len(mixed) > MOST_MIXED:
            continue
        for side, length in zip(SIDES, LENGTHS, strict=True):
            for chosen in itertools.product((True, False), repeat=len(mixed)):
                large = {name for name, yes in zip(mixed, chosen, strict=True) if yes} if mixed else set(inner)
                sizes = {name: (side if name in sides else length) if name in large else 1 for name in unknown}
                values = sum(math.prod(tensor.at({**known, **sizes})) for tensor in signature.inputs)
                if values <= MOST_VALUES or not unknown:
                    yield {**known, **sizes}
            if not inner and not mixed:
                break  # nothing to vary


def _are_close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype.kind != "f":
        return bool(np.array_equal(one, other))
    return bool(np.allclose(one, other, rtol=ROUNDING, atol=ROUNDING * measure_spread(one), equal_nan=True))


def _is_distribution(values: np.ndarray) -> bool:
    sums = values.astype(np.float64).sum(-1) if values.ndim else np.zeros(1)
    return bool((values >= 0).all() and np.allclose(sums, 1, atol=1e-2 if values.itemsize == 2 else 1e-3))


if __name__ == "__main__":
    serve(_ProbeRequests())
