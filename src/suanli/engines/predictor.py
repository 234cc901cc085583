"""A trained model ready to predict: raw inputs in, named probabilities out, by the fastest engine that is valid here.

    engine = suanli.load("runs/digits-1")
    engine.predict("picture.png")[0].label

Only what the engine needs is imported: OpenVINO and ONNX Runtime run without torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from suanli.core.console import warn
from suanli.core.errors import BadInput, DataError, MachineError, UsageError, unknown
from suanli.core.registry import load as load_plugin
from suanli.core.types import AnyPath, Device, LoadedEngine, Placement, Preprocess
from suanli.engines import store
from suanli.engines.store import EngineIndex
from suanli.machine.device import cores, detect
from suanli.models.model_folder import build_preprocess, find_model_folder, read_card

BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The answer for one input; `error` says why there is none."""

    name: str
    label: str | None
    probability: float | None
    probabilities: dict[str, float]  # the likeliest classes, best first
    error: str | None = None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class Predictor:
    """A model and the engine that computes it; `load` returns one."""

    def __init__(
        self,
        *,
        engine: str,
        precision: str,
        threads: int,
        preprocess: Preprocess,
        classes: Sequence[str],
        loaded: LoadedEngine,
    ) -> None:
        self.engine, self.precision, self.threads = engine, precision, threads
        self.preprocess, self.classes = preprocess, tuple(classes)
        self._loaded = loaded
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Predictor({self.engine} {self.precision}, {len(self.classes)} classes)"

    def predict(self, inputs: Any, *, top: int = 5) -> list[Prediction]:
        """One Prediction for each input; one that can't be read has `error`.

        `inputs` is one input or a sequence of them. An image is a path, the bytes of a file, an array (H, W),
        (H, W, C) uint8, or a Pillow image; an array (N, H, W, C) is N of them. A text is a string.
        """
        results: list[Prediction] = []
        named = list(_name_inputs(inputs, self.preprocess.kind))
        for start in range(0, len(named), BATCH):
            part = named[start : start + BATCH]
            rows = [self.encode(raw) for _, raw in part]
            results += self.predict_rows([name for name, _ in part], rows, top=top)
        return results

    def encode(self, raw: Any) -> np.ndarray | str:
        """The row of an input, or why there is none."""
        return encode(self.preprocess, raw)

    def predict_rows(self, names: Sequence[str], rows: Sequence[np.ndarray | str], *, top: int) -> list[Prediction]:
        """Predictions for rows from `encode`, which may be reasons instead of rows."""
        good = [row for row in rows if isinstance(row, np.ndarray)]
        answers = self.probabilities(np.stack(good)) if good else ()
        return predictions(names, rows, answers, self.classes, top=top)

    def probabilities(self, rows: np.ndarray) -> np.ndarray:
        """Cached rows (B, *row_shape) to probabilities (B, K) float32."""
        with self._lock:  # most engines answer into memory of their own, one call at a time
            return self._loaded.answer(np.ascontiguousarray(rows))


def predictions(
    names: Sequence[str],
    rows: Sequence[np.ndarray | str],
    answers: Iterable[np.ndarray],
    classes: Sequence[str],
    *,
    top: int,
) -> list[Prediction]:
    """One for each row from `encode`, in their order: the next of `answers` (K,), or the reason why there is no row."""
    remaining = iter(answers)
    return [
        _rank_classes(name, next(remaining), classes, top)
        if isinstance(row, np.ndarray)
        else Prediction(name=name, label=None, probability=None, probabilities={}, error=row)
        for name, row in zip(names, rows, strict=True)
    ]


def _rank_classes(name: str, probabilities: np.ndarray, classes: Sequence[str], top: int) -> Prediction:
    best = np.argsort(-probabilities, kind="stable")[: max(top, 1)]
    ranked = {classes[i]: float(probabilities[i]) for i in best}
    first = best[0]
    return Prediction(name=name, label=classes[first], probability=float(probabilities[first]), probabilities=ranked)


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
        preprocess=build_preprocess(asdict(index.preprocess)),
        classes=index.classes,
        loaded=load_plugin("engines", entry.engine).load(engines / name, entry.precision, placement),
    )


def _load_eager(folder: Path, device: str, threads: int | None, trust_code: bool) -> Predictor:
    card = read_card(folder)
    placement = Placement(device=detect(device), threads=threads or cores(), trust_code=trust_code)
    return Predictor(
        engine="eager",
        precision="float32",
        threads=placement.threads,
        preprocess=build_preprocess(card["preprocess"]),
        classes=card["classes"],
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


def encode(preprocess: Preprocess, raw: Any) -> np.ndarray | str:
    """The row of an input, or why there is none. Safe to call from several threads at once."""
    try:
        if isinstance(raw, Path):
            raw = raw.read_bytes()
        elif isinstance(raw, bytearray | memoryview):
            raw = bytes(raw)
        elif hasattr(raw, "getexif"):  # a Pillow image
            from suanli.data.decode import decode_pillow

            raw = decode_pillow(raw)
        return preprocess.encode(raw).row
    except BadInput as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)


def _name_inputs(inputs: Any, kind: str) -> Iterable[tuple[str, Any]]:
    """Each input with its name."""
    if isinstance(inputs, np.ndarray) and inputs.ndim == 4:
        yield from ((f"#{i}", item) for i, item in enumerate(inputs))
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes | bytearray | memoryview):
        for i, item in enumerate(inputs):
            yield _name_input(item, kind, i)
    else:
        yield _name_input(inputs, kind, 0)


def _name_input(item: Any, kind: str, number: int) -> tuple[str, Any]:
    if isinstance(item, os.PathLike) or (isinstance(item, str) and kind == "image"):
        path = Path(item).expanduser()
        if not path.exists():
            raise DataError(f"There is nothing at {path}.", fix="Give the path of an image, its bytes, or its pixels.")
        return str(item), path
    if not isinstance(item, str | bytes | bytearray | memoryview | np.ndarray) and not hasattr(item, "getexif"):
        raise UsageError(
            f"An input can't be {type(item).__name__}.",
            fix="Give paths, bytes, arrays (H, W, C) of uint8 or Pillow images; for texts, strings.",
        )
    return f"#{number}", item
