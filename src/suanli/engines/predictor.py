"""A trained model that answers: raw inputs in, named probabilities out, by the fastest engine that holds here.

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
from suanli.core.types import AnyPath, Json, LoadedEngine, Placement, Preprocess
from suanli.engines import store
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

    def to_json(self) -> dict[str, Json]:
        return asdict(self)


class Predictor:
    """A model and the engine that computes it. Made by `load`."""

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
        found: list[Prediction] = []
        given = list(_named(inputs, self.preprocess.kind))
        for start in range(0, len(given), BATCH):
            part = given[start : start + BATCH]
            rows = [self.encode(raw) for _, raw in part]
            found += self.predict_rows([name for name, _ in part], rows, top=top)
        return found

    def encode(self, raw: Any) -> np.ndarray | str:
        """The row of an input, or why there is none."""
        return encode(self.preprocess, raw)

    def predict_rows(self, names: Sequence[str], rows: Sequence[np.ndarray | str], *, top: int) -> list[Prediction]:
        """Answers for rows (from `encode`), some of which are reasons instead."""
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
    """One for each row (from `encode`): the probabilities of `answers` (K,), in their order, or the reason instead."""
    following = iter(answers)
    return [
        _likeliest(name, next(following), classes, top)
        if isinstance(row, np.ndarray)
        else Prediction(name=name, label=None, probability=None, probabilities={}, error=row)
        for name, row in zip(names, rows, strict=True)
    ]


def _likeliest(name: str, probabilities: np.ndarray, classes: Sequence[str], top: int) -> Prediction:
    best = np.argsort(-probabilities, kind="stable")[: max(top, 1)]
    shown = {classes[i]: float(probabilities[i]) for i in best}
    first = best[0]
    return Prediction(name=name, label=classes[first], probability=float(probabilities[first]), probabilities=shown)


def load(
    model: AnyPath,
    *,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    trust_code: bool = False,
) -> Predictor:
    """The model of a run or a model folder, ready to answer.

    `engine`: "auto" takes the one that `suanli optimize` chose, where it holds on this machine, else the reference
    among its engines, else PyTorch in float32; "reference" is PyTorch in float32, or where there are engines alone
    the reference among them; any other name is one of the
    engines that were kept, such as "openvino-int8". Raises DataError where there is no model, DamagedFile for
    files that were altered, UsageError for an engine that isn't there.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"{threads} threads can't compute.", fix="Give 1 or more.")
    folder = find_model_folder(model)
    there = _engines(folder)
    own = (folder / "model.json").exists()  # else there are engines alone
    index = None if engine == "reference" and own else store.read(there)
    name = None if index is None else _usable(index, there, folder if own else None, engine, device, trust_code)
    if index is not None and name is not None:
        entry = index["engines"][name]
        store.check(there / name, entry)
        target = detect("cpu") if index["machine"]["type"] == "cpu" else detect(device)
        most = cores()
        tuned = entry["threads"] if name == index["chosen"] else most
        placement = Placement(device=target, threads=threads or min(tuned, most), trust_code=trust_code)
        return Predictor(
            engine=entry["engine"],
            precision=entry["precision"],
            threads=placement.threads,
            preprocess=build_preprocess(index["preprocess"]),
            classes=index["classes"],
            loaded=load_plugin("engines", entry["engine"]).load(there / name, entry["precision"], placement),
        )
    if engine not in ("auto", "reference"):
        kept = () if index is None else ("-".join(name.split("-")[:2]) for name in index["engines"])
        raise unknown("engine", engine, ("auto", "reference", *kept))
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
    threads; empty where it measured another, or none."""
    index = store.read(_engines(find_model_folder(model)))
    try:
        chosen = (index or {})["found"]["chosen"]
        if (chosen["engine"], chosen["precision"]) != (predictor.engine, predictor.precision):
            return []
        speeds = [s for s in chosen["speeds"] if s["threads"] == predictor.threads]
        return sorted((int(s["batch"]), float(s["p50_s"])) for s in speeds if s["batch"] >= 1 and s["p50_s"] > 0)
    except (KeyError, TypeError, ValueError):  # engines that were kept by other means
        return []


def _engines(folder: Path) -> Path:
    """The folder of engines: itself, or the one beside a model."""
    return folder if (folder / store.INDEX).exists() else folder / store.FOLDER


def _usable(
    index: dict[str, Json], there: Path, folder: Path | None, engine: str, device: str, trust_code: bool
) -> str | None:
    """The name of the engine to run; None: PyTorch, from the model's own `folder`. Without one, it is an engine."""
    if folder is not None and read_card(folder)["weights"]["blake2b"] != index.get("weights"):
        warn(f"The engines in {there} belong to other weights and are not used; make new ones: suanli optimize.")
        return None
    entries, reference = index["engines"], str(index["reference"])
    if engine == "reference":
        return reference
    if engine != "auto":
        named = next((name for name in entries if name == engine or name.startswith(f"{engine}-")), None)
        if named is not None and (missing := store.missing_package(entries[named])):
            raise MachineError(f"{named} needs {missing}.", fix="Install it, or leave --engine out.")
        if named is not None and not (trust_code or store.was_built_here(entries[named])):
            raise UsageError(
                f"{there / named} is machine code that was not made here.",
                fix="If you trust where it comes from, run it with --trust-code.",
            )
        return named
    if folder is not None and device != "auto" and detect(device).type != index["machine"]["type"]:
        return None
    chosen = str(index["chosen"])
    here = detect("cpu" if index["machine"]["type"] == "cpu" else device)
    reason = store.find_mismatch(entries[chosen], index["machine"], here)
    if reason is None and not (trust_code or store.was_built_here(entries[chosen])):
        reason = "the machine where it was made: it is machine code, and runs here only with --trust-code"
    if reason is None:
        return chosen
    entry = entries[reference]
    missing = store.missing_package(entry)
    usable = load_plugin("engines", entry["engine"]).portable and missing is None
    if not usable and folder is None:
        raise MachineError(
            f"{chosen} was chosen for {reason}; {reference} needs {missing or 'the machine where it was made'}.",
            fix="Install what is missing, or make engines here: suanli optimize.",
        )
    told = f"{entry['engine']} {entry['precision']}" if usable else "PyTorch in float32"
    warn(f"{chosen} was chosen for {reason}; {told} is used instead. To tune for this machine: suanli optimize.")
    return reference if usable else None


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


def _named(inputs: Any, kind: str) -> Iterable[tuple[str, Any]]:
    """Names and raw inputs."""
    if isinstance(inputs, np.ndarray) and inputs.ndim == 4:
        yield from ((f"#{i}", item) for i, item in enumerate(inputs))
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes | bytearray | memoryview):
        for i, item in enumerate(inputs):
            yield _one(item, kind, i)
    else:
        yield _one(inputs, kind, 0)


def _one(item: Any, kind: str, number: int) -> tuple[str, Any]:
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
