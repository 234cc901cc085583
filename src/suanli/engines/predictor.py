"""A trained model ready to predict: raw inputs in, answers out, by the fastest engine that is valid here.

    engine = suanli.load("runs/digits-1")
    engine.predict("picture.png")[0].label

Only what the engine needs is imported: OpenVINO and ONNX Runtime run without torch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from suanli.core.console import warn
from suanli.core.errors import BadInput, MachineError, UsageError, first_line, unknown
from suanli.core.registry import load as load_plugin
from suanli.core.schema import Arrays, zeros
from suanli.core.task import Answer, Task
from suanli.core.types import AnyPath, Device, EncodedInput, Json, LoadedEngine, Placement, Preprocess, Raw
from suanli.core.windows import list_windows, merge_answers
from suanli.engines import store
from suanli.engines.inputs import list_inputs, read
from suanli.engines.saliency import Saliency
from suanli.engines.store import EngineIndex
from suanli.machine.device import cores, detect
from suanli.models.model_folder import build_preprocess, build_task, find_model_folder, read_card

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one input; `error` says why there is none."""

    name: str
    answer: Answer | None
    error: str | None = None
    empty: Answer = field(repr=False)  # what stands in JSON and in tables where there is no answer
    saliency: Saliency | None = field(
        default=None, repr=False, compare=False
    )  # what the answer rests on, where that was asked for
    flags: tuple[str, ...] | None = None  # why it may be worth less; None: inputs of this kind have no such reasons
    # What stands of the input beside the answer in a table; None: its name.
    cells: Mapping[str, Json] | None = field(default=None, repr=False, compare=False)

    @property
    def values(self) -> Mapping[str, Json]:
        """Of the answer, in the user's own coordinates and names; all empty where there is none."""
        return (self.answer or self.empty).values

    @property
    def label(self) -> str | None:
        """Of a classifier: the likeliest class. None for other tasks."""
        return self.values.get("label")

    @property
    def probability(self) -> float | None:
        """Of a classifier: that of the likeliest class."""
        return self.values.get("probability")

    @property
    def probabilities(self) -> Mapping[str, float]:
        """Of a classifier: the likeliest classes, best first."""
        probabilities: Mapping[str, float] = self.values.get("probabilities", {})
        return probabilities

    def to_json(self) -> dict[str, Json]:
        values = {"name": self.name, **self.values, "error": self.error}
        if self.flags is not None:
            values["flags"] = list(self.flags)
        if self.cells is not None:
            values["input"] = dict(self.cells)
        return values if self.saliency is None else values | {"saliency": self.saliency.to_json()}


class Predictor:
    """A model and the engine that computes it; `load` returns one."""

    def __init__(
        self,
        *,
        engine: str,
        precision: str,
        threads: int,
        preprocess: Preprocess,
        task: Task,
        loaded: LoadedEngine,
        device_type: str = "cpu",
        batches: bool = True,
    ) -> None:
        """`batches`: one call may hold several inputs."""
        self.engine, self.precision, self.threads, self.device_type = engine, precision, threads, device_type
        self.preprocess, self.task, self.batches = preprocess, task, batches
        self.empty = empty_answer(task, preprocess)  # an answer without values
        self._loaded = loaded
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Predictor({self.engine} {self.precision}, {self.task.name})"

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.classes

    def predict(self, inputs: Any, *, top: int | None = None, threshold: float | None = None) -> list[Prediction]:
        """One Prediction for each input; one that can't be read has `error`.

        `inputs` is one input, or a list, a generator or a column of a data frame of them. An image is a path, the bytes
        of a file, an open file, an array (H, W), (H, W, C) uint8, or a Pillow image; an array (N, H, W, C) is N of
        them. A text is a string. Where a graph takes tensors, an input is a mapping from names to arrays, or the path
        of an .npz file; with an axis more in front, a mapping is N of them. Of an answer that ranks, at most the `top`
        best entries are given: by default 5 classes, and all boxes. `threshold` (0 to 1) replaces the one that the
        model decides by, such as the score from which a box is given.
        """
        named = list_inputs(inputs, self.preprocess, strings_are_texts=True)
        results: list[Prediction] = []
        while part := list(islice(named, self.preprocess.inputs_at_once)):
            encoded = encode_all(self.preprocess, [read(one) for one in part])
            results += self.predict_encoded([name for name, _ in part], encoded, top=top, threshold=threshold)
        return results

    def encode(self, raw: Any) -> EncodedInput | str:
        """What the engine reads of an input, or why there is nothing; a BadInput is that reason."""
        return encode(self.preprocess, raw)

    def predict_encoded(
        self,
        names: Sequence[str],
        encoded: Sequence[EncodedInput | str],
        *,
        top: int | None = None,
        threshold: float | None = None,
    ) -> list[Prediction]:
        """Predictions for the results of `encode`; `top` and `threshold` as for `predict`."""
        task = decide_by(self.task, threshold)
        good = [one for one in encoded if isinstance(one, EncodedInput)]
        parts = self._divide([window for one in good for window in list_windows(one)])
        answers: Sequence[Arrays | str] = [one for part in parts for one in self._answer_part(part)]
        if self.preprocess.has_windows:
            arrays = [one for one in answers if not isinstance(one, str)]  # as all are: windows have fixed shapes
            answers = merge_answers(task, self.preprocess, good, arrays)
        return predictions(names, encoded, answers, task, self.empty, top=top)

    def _divide(self, encoded: Sequence[EncodedInput]) -> list[list[EncodedInput]]:
        """Parts that one call can hold, in order: of equal shapes, and single where the engine takes no batches."""
        if not self.batches:
            return [[one] for one in encoded]
        return [part[i : i + BATCH] for part in group_by_shape(encoded) for i in range(0, len(part), BATCH)]

    def _answer_part(self, part: Sequence[EncodedInput]) -> Sequence[Arrays | str]:
        """The outputs for each, or why there are none."""
        try:
            return split(self.answer(stack(part, self.preprocess)))
        except Exception as error:  # a graph that leaves sizes open may not take all of them
            if not any(None in column.shape for column in self.preprocess.inputs.values()):
                raise
            return [f"The engine can't compute it: {first_line(error, 300)}"] * len(part)

    def answer(self, inputs: Arrays) -> Arrays:
        """The task's outputs (B, …) from encoded inputs (B, …)."""
        with self._lock:  # most engines answer into memory of their own, one call at a time
            return self._loaded.answer({name: np.ascontiguousarray(inputs[name]) for name in self.preprocess.inputs})


def group_by_shape(encoded: Sequence[EncodedInput]) -> list[list[EncodedInput]]:
    """Neighbours of equal shapes together, which one call can hold."""
    return [list(part) for _, part in groupby(encoded, lambda one: [a.shape for a in one.arrays.values()])]


def stack(encoded: Sequence[EncodedInput], preprocess: Preprocess) -> dict[str, np.ndarray]:
    """The inputs (B, …) of a batch."""
    return {name: np.stack([one.arrays[name] for one in encoded]) for name in preprocess.inputs}


def split(batch: Arrays) -> list[dict[str, np.ndarray]]:
    """The examples of a batch (B, …)."""
    return [dict(zip(batch, arrays, strict=True)) for arrays in zip(*batch.values(), strict=True)]


def empty_answer(task: Task, preprocess: Preprocess) -> Answer:
    """An answer of this task without a text, whose values are all None or empty."""
    (nothing,) = split(zeros(task.outputs, 1))
    answer = task.answer(nothing, preprocess.geometry, top=1)
    values = {name: type(v)() if isinstance(v, list | dict) else None for name, v in answer.values.items()}
    return replace(answer, text="", values=values)


def decide_by(task: Task, threshold: float | None) -> Task:
    """The task with this threshold; None: with its own. Raises UsageError for one that it can't have."""
    if threshold is None:
        return task
    if not 0 <= threshold <= 1:
        raise UsageError(f"The threshold {threshold} is no probability.", fix="Give one from 0 to 1.")
    return task.with_threshold(threshold)


def predictions(
    names: Sequence[str],
    encoded: Sequence[EncodedInput | str],
    answers: Iterable[Arrays | str],
    task: Task,
    empty: Answer,
    *,
    top: int | None,
) -> list[Prediction]:
    """One for each result of `encode`, in their order: from the next of `answers`, or the reason why there is none."""
    remaining, results = iter(answers), []
    for name, one in zip(names, encoded, strict=True):
        outputs = one if isinstance(one, str) else next(remaining)
        if isinstance(one, str) or isinstance(outputs, str):
            results.append(Prediction(name=name, answer=None, error=str(outputs), empty=empty))
        else:
            answer = task.answer(outputs, one.geometry, top=task.usual_top if top is None else top)
            results.append(Prediction(name=name, answer=answer, empty=empty, flags=one.flags))
    return results


def load(
    model: AnyPath,
    *,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    trust_code: bool = False,
) -> Predictor:
    """Load the model of a run or of a model folder, ready to predict.

    `engine`: "auto" takes the one that `suanli optimize` chose, where it is valid on this machine, else the reference
    among its engines, else PyTorch in float32; "reference" is PyTorch in float32, or the reference among the engines
    where the model itself isn't there; any other name is one of the stored engines, such as "openvino-int8". Raises
    DataError where there is no model, DamagedFile for files that were altered, UsageError for an engine that isn't
    there.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads can't compute.", fix="Give 1 or more.")
    folder = find_model_folder(model)
    engines = _engines_folder(folder)
    own = folder if (folder / "model.json").exists() else None  # None: there are engines alone
    index = None if engine == "reference" and own else store.read(engines)
    if index is not None:
        name = _choose_engine(index, engines, own, engine, device, trust_code)
        if name is not None:
            return _load_stored(engines, index, name, device, threads, trust_code)
    if engine not in ("auto", "reference"):
        names = () if index is None else ("-".join(name.split("-")[:2]) for name in index.engines)
        raise unknown("engine", engine, ("auto", "reference", *names))
    return _load_eager(folder, device, threads, trust_code)


def _load_stored(
    engines: Path, index: EngineIndex, name: str, device: str, threads: int | None, trust_code: bool
) -> Predictor:
    entry = index.engines[name]
    store.check(engines / name, entry)
    most = cores()
    tuned = entry.threads if name == index.chosen else most
    placement = Placement(
        device=_tuned_device(index, device), threads=threads or min(tuned, most), trust_code=trust_code
    )
    return Predictor(
        engine=entry.engine,
        precision=entry.precision,
        threads=placement.threads,
        device_type=placement.device.type,
        preprocess=build_preprocess(asdict(index.preprocess)),
        task=build_task(index.task.name, index.classes, index.task.settings),
        batches=index.batches,
        loaded=load_plugin("engines", entry.engine).load(engines / name, entry.precision, placement),
    )


def _load_eager(folder: Path, device: str, threads: int | None, trust_code: bool) -> Predictor:
    card = read_card(folder)
    placement = Placement(device=detect(device), threads=threads or cores(), trust_code=trust_code)
    return Predictor(
        engine="eager",
        precision="float32",
        threads=placement.threads,
        device_type=placement.device.type,
        preprocess=build_preprocess(card["preprocess"]),
        task=build_task(card["task"], card["classes"], card.get("task_settings", {})),
        loaded=load_plugin("engines", "eager").load(folder, "float32", placement),
    )


def read_batch_times(model: AnyPath, predictor: Predictor) -> list[tuple[int, float]]:
    """Batch sizes and the median seconds that `suanli optimize` measured for the engine of `predictor`, with as many
    threads; empty where it measured another engine, or none."""
    index = store.read(_engines_folder(find_model_folder(model)))
    if index is None:
        return []
    try:
        chosen = index.found["chosen"]
        if (chosen["engine"], chosen["precision"]) != (predictor.engine, predictor.precision):
            return []
        speeds = [s for s in chosen["speeds"] if s["threads"] == predictor.threads]
        return sorted((int(s["batch"]), float(s["p50_s"])) for s in speeds if s["batch"] >= 1 and s["p50_s"] > 0)
    except (KeyError, TypeError, ValueError):  # engines that were stored without a search
        return []


def _engines_folder(folder: Path) -> Path:
    """The folder itself, if it is one of engines, or the one beside a model."""
    return folder if (folder / store.INDEX).exists() else folder / store.FOLDER


def _tuned_device(index: EngineIndex, device: str) -> Device:
    """The CPU for engines that were tuned on one; else the device that was asked for."""
    return detect("cpu" if index.machine.type == "cpu" else device)


def _choose_engine(
    index: EngineIndex, engines: Path, own: Path | None, engine: str, device: str, trust_code: bool
) -> str | None:
    """The name of the stored engine to run; None: PyTorch, from the model's `own` folder. Where there is no such
    folder, it is always a stored engine."""
    if own is not None and read_card(own)["weights"]["blake2b"] != index.weights:
        warn(f"The engines in {engines} belong to other weights and are not used; make new ones: suanli optimize.")
        return None
    if engine == "reference":
        return index.reference
    if engine != "auto":
        return _find_engine(index, engines, engine, trust_code)
    if own is not None and device != "auto" and detect(device).type != index.machine.type:
        return None
    chosen = index.engines[index.chosen]
    reason = store.find_mismatch(chosen, index.machine, _tuned_device(index, device))
    if reason is None and not (trust_code or store.was_built_here(chosen)):
        reason = "the machine where it was built: it is machine code, and runs here only with --trust-code"
    return index.chosen if reason is None else _fall_back(index, reason, has_model=own is not None)


def _find_engine(index: EngineIndex, engines: Path, engine: str, trust_code: bool) -> str | None:
    """The stored engine that the user named; None: there is none of that name."""
    name = next((name for name in index.engines if name == engine or name.startswith(f"{engine}-")), None)
    if name is None:
        return None
    if missing := store.missing_package(index.engines[name]):
        raise MachineError(f"{name} needs {missing}.", fix="Install it, or leave --engine out.")
    if not (trust_code or store.was_built_here(index.engines[name])):
        raise UsageError(
            f"{engines / name} is machine code that was not built on this machine.",
            fix="If you trust where it comes from, run it with --trust-code.",
        )
    return name


def _fall_back(index: EngineIndex, reason: str, *, has_model: bool) -> str | None:
    """The reference instead of the chosen engine, if it runs here; None: PyTorch, if the model is there."""
    reference = index.engines[index.reference]
    missing = store.missing_package(reference)
    usable = load_plugin("engines", reference.engine).portable and missing is None
    if not usable and not has_model:
        raise MachineError(
            f"{index.chosen} was chosen for {reason}; "
            f"{index.reference} needs {missing or 'the machine where it was built'}.",
            fix="Install what is missing, or make engines here: suanli optimize.",
        )
    substitute = f"{reference.engine} {reference.precision}" if usable else "PyTorch in float32"
    warn(
        f"{index.chosen} was chosen for {reason}; {substitute} is used instead. "
        "To tune for this machine: suanli optimize."
    )
    return index.reference if usable else None


def encode(preprocess: Preprocess, raw: Any) -> EncodedInput | str:
    """What an engine reads of an input, or why there is nothing; a BadInput is that reason. Safe to call from several
    threads at once."""
    try:
        return raw.message if isinstance(raw, BadInput) else preprocess.encode(raw)
    except BadInput as error:
        return error.message


def encode_all(preprocess: Preprocess, raws: Sequence[Raw | BadInput]) -> list[EncodedInput | str]:
    """As `encode`, of each; at once where the kind of data has a way for that."""
    if preprocess.encodes_blocks:
        return [one.message if isinstance(one, BadInput) else one for one in preprocess.encode_many(raws)]
    return [encode(preprocess, raw) for raw in raws]
