"""What `optimize` accepts: a run, a model folder, an ONNX file, or a function that builds a network.

Each becomes the same thing: a model or a graph, with examples for calibration and others for evaluation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from suanli.core.console import warn
from suanli.core.errors import DataError, UsageError
from suanli.core.registry import load as load_plugin
from suanli.core.run import Run, is_run, refuse_occupied
from suanli.core.types import AnyPath, Json, Preprocess, Recipe, Split, Task
from suanli.data.loader import row_bytes
from suanli.engines import onnx_import, store
from suanli.engines.subject import Subject
from suanli.models import build
from suanli.models.model_folder import find_model_folder, load_model, read_card, save_model
from suanli.training.prepare import DataOptions, resolve

CALIBRATION = 300  # training examples
MAX_BYTES = 1 << 30  # of the rows for evaluation
RANDOM_ROWS = 64  # where there is no data
SIDE = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?")


@dataclass(frozen=True, kw_only=True)
class SubjectOptions:
    """The options that describe a subject."""

    data: AnyPath | None
    cache_dir: AnyPath | None
    weights: AnyPath | None
    size: str | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    out: AnyPath | None
    trust_code: bool

    def refuse(self, what: str, *names: str) -> None:
        """Raises UsageError for options that `what` doesn't take."""
        for name in names:
            if getattr(self, name) is not None:
                raise UsageError(f"--{name} doesn't go with {what}, which brings its own.", fix="Leave it out.")


@dataclass(frozen=True, kw_only=True)
class Examples:
    rows: np.ndarray  # for evaluation (N, *row_shape)
    targets: np.ndarray | None  # (N,); None: the rows are random
    groups: np.ndarray | None = None  # (N,), equal for examples of one group
    calibration: np.ndarray | None  # training examples (M, *row_shape)
    count: int  # for evaluation, that there are; rows may be fewer


@dataclass(frozen=True, kw_only=True)
class ResolvedSubject:
    engines: Path  # the folder where its engines go
    model: Path | None  # its model folder
    graph: onnx_import.ImportedModel | None
    task: Task
    classes: tuple[str, ...]
    preprocess: Preprocess
    weights: str  # a digest: which weights the engines belong to
    recipe: Recipe
    run: Run | None
    examples: Examples
    trust_code: bool

    def subject(self, work: Path) -> Subject:
        """For the search; an imported graph is written into `work`."""
        path = None
        if self.graph is not None:
            path = work / "imported.onnx"
            path.write_bytes(self.graph.graph.SerializeToString())
        return Subject(
            model=self.model,
            graph=path,
            task=self.task,
            classes=self.classes,
            rows=self.examples.rows,
            targets=self.examples.targets,
            groups=self.examples.groups,
            calibration=self.examples.calibration,
            examples=self.examples.count,
            trust_code=self.trust_code,
        )


def resolve_subject(subject: AnyPath, options: SubjectOptions) -> ResolvedSubject:
    """Raises UsageError, DataError or DamagedFile for what can't be optimised, with the reason."""
    path = Path(subject).expanduser()
    if not path.exists() and ":" in str(subject):
        return _resolve_function(str(subject), options)
    if path.suffix.lower() == ".onnx":
        return _resolve_graph(path, options)
    return _resolve_model(subject, options)


def _resolve_model(subject: AnyPath, options: SubjectOptions) -> ResolvedSubject:
    options.refuse("a trained model", "weights", "size", "mean", "std", "out")
    folder = find_model_folder(subject)
    saved = load_model(folder, trust_code=options.trust_code)
    run = Run.open(subject) if is_run(subject) else None
    if options.data is not None:
        splits = _prepare_splits(_other_data(options, saved.preprocess), saved.recipe, saved.classes)
    elif run is not None:
        own = DataOptions.of_run(run, cache_dir=options.cache_dir)
        splits = _prepare_splits(own, saved.recipe, saved.classes, digest=run.data["digest"])
    else:
        splits = None
    return ResolvedSubject(
        engines=folder / store.FOLDER,
        model=folder.absolute(),
        graph=None,
        task=saved.task,
        classes=saved.classes,
        preprocess=saved.preprocess,
        weights=saved.card["weights"]["blake2b"],
        recipe=saved.recipe,
        run=run,
        examples=_pick_examples(splits, saved.preprocess),
        trust_code=options.trust_code,
    )


def _resolve_graph(path: Path, options: SubjectOptions) -> ResolvedSubject:
    options.refuse("an ONNX file", "weights")
    graph = onnx_import.read(path, size=_parse_size(options.size), mean=options.mean, std=options.std)
    recipe, splits, classes = Recipe(name="imported", model=path.stem), None, graph.classes
    if options.data is not None:
        splits = _prepare_splits(_other_data(options, graph.preprocess), Recipe(name="imported"), classes)
        classes = classes or splits[1].classes
        if len(classes) != graph.count:
            raise DataError(
                f"{path} has {graph.count} classes, the data {len(classes)}.", fix="Give data with the same classes."
            )
    folder = Path(options.out or f"{path.stem}-engines").expanduser()
    if not (folder / store.INDEX).exists():
        refuse_occupied(folder)
    return ResolvedSubject(
        engines=folder,
        model=None,
        graph=graph,
        task=load_plugin("tasks", recipe.task)(),
        classes=classes or tuple(str(i) for i in range(graph.count)),
        preprocess=graph.preprocess,
        weights=hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        recipe=recipe,
        run=None,
        examples=_pick_examples(splits, graph.preprocess),
        trust_code=options.trust_code,
    )


def _resolve_function(spec: str, options: SubjectOptions) -> ResolvedSubject:
    """Saves its network as a model folder first, which is then resolved like any other."""
    if options.data is None:
        raise UsageError(f"{spec} alone doesn't say what it was trained on.", fix="Give labelled data with --data.")
    size = _parse_size(options.size)
    settings: dict[str, Json] = {"model": spec}
    if size is not None:
        settings["preprocess"] = {"size": list(size)}
    data = DataOptions.of(options.data, data_dir=None, cache_dir=options.cache_dir)
    recipe, prepared = resolve(data, recipe=None, settings=settings, announce=False)
    changes = {k: tuple(v) for k, v in (("mean", options.mean), ("std", options.std)) if v is not None}
    preprocess: Preprocess = replace(prepared.preprocess, **changes) if changes else prepared.preprocess  # type: ignore[type-var]
    module = build.build(recipe, preprocess, len(prepared.classes))
    if options.weights is None:
        warn(f"Without --weights, the network is evaluated as {spec} builds it.")
    else:
        head = build.head_of(module, build.resolve(recipe.model))
        report = build.load_weights(module, Path(options.weights).expanduser(), head)
        if report.missing or report.skipped:
            raise DataError(f"{options.weights} doesn't fit the network: {report}", fix="Give all of its weights.")
    folder = Path(options.out or f"{spec.rpartition(':')[2]}-model").expanduser()
    if not (folder / "model.json").exists() or read_card(folder)["model"] != spec:
        refuse_occupied(folder)  # a folder that was saved here for the same function is replaced
    save_model(folder, module, recipe=recipe, preprocess=preprocess, classes=prepared.classes, data=prepared.to_json())
    trusted = replace(options, weights=None, size=None, mean=None, std=None, out=None, trust_code=True)
    return _resolve_model(folder, trusted)


def _parse_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = SIDE.fullmatch(text.strip())
    if match is None or not int(match[1]) or match[2] == "0":
        raise UsageError(f"{text!r} is no size.", fix="Give pixels: 224, or height and width: 224x160.")
    return int(match[1]), int(match[2] or match[1])


def _other_data(options: SubjectOptions, preprocess: Preprocess) -> DataOptions:
    """The data that the user names, read as the model needs it."""
    assert options.data is not None
    return DataOptions.of(
        options.data,
        data_dir=None,
        cache_dir=options.cache_dir,
        preprocess=preprocess.to_json(),
    )


def _prepare_splits(
    options: DataOptions, recipe: Recipe, classes: tuple[str, ...] | None, *, digest: str | None = None
) -> tuple[Split, Split]:
    """Training and validation examples."""
    _, prepared = resolve(options, recipe=recipe, settings={}, announce=False)
    if digest not in (None, prepared.digest):
        raise DataError(
            "The data has changed since this model was trained, so its validation split may hold what it has learned.",
            fix="Put the data back as it was, or give other data with --data.",
        )
    if classes is not None and prepared.classes != classes:
        raise DataError(
            f"The data has the classes {_few(prepared.classes)}; the model has {_few(classes)}.",
            fix="Give data with the classes of the model.",
        )
    if not len(prepared.splits["val"]):
        raise DataError("There are no validation examples.", fix="Give data with more examples.")
    return prepared.splits["train"], prepared.splits["val"]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _pick_examples(splits: tuple[Split, Split] | None, preprocess: Preprocess) -> Examples:
    random = np.random.default_rng(0)
    if splits is None:
        warn("There is no data for calibration and evaluation, so only float32 is tried; give some with --data.")
        limit = preprocess.model_args.get("vocabulary_size", 256)
        rows = random.integers(0, limit, (RANDOM_ROWS, *preprocess.row_shape)).astype(preprocess.row_dtype)
        return Examples(rows=rows, targets=None, calibration=None, count=len(rows))
    training, validation = splits
    # In random order, so that any first part is a fair sample; more than fits here can't be evaluated in time.
    order = random.permutation(len(validation))[: max(RANDOM_ROWS, MAX_BYTES // row_bytes(validation))]
    return Examples(
        rows=_rows(validation, order),
        targets=validation.targets[order],
        groups=None if validation.groups is None else validation.groups[order],
        calibration=_rows(training, np.sort(random.permutation(len(training))[:CALIBRATION])),
        count=len(validation),
    )


def _rows(split: Split, positions: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(split.inputs[split.index[positions]])
