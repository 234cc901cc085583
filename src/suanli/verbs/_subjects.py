"""What `optimize` accepts: a run, a model folder, an ONNX file, or a function that builds a network.

Each becomes the same thing: a model or a graph, with examples for calibration and others for evaluation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from suanli.core.console import warn
from suanli.core.errors import DataError, UsageError
from suanli.core.run import Run, is_run, refuse_occupied
from suanli.core.task import Task
from suanli.core.types import AnyPath, Json, Preprocess, Recipe
from suanli.engines import onnx_import, store
from suanli.engines.subject import Subject
from suanli.models import build
from suanli.models.model_folder import find_model_folder, load_model, read_card, save_model
from suanli.training.prepare import DataOptions, resolve
from suanli.verbs._examples import (
    ChosenExamples,
    choose_labelled,
    labelled_of_run,
    make_up,
    prepare_labelled,
    warn_of_made_up,
)
from suanli.verbs._onnx_subject import GraphOptions, resolve_graph

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
                raise UsageError(f"--{name} can't be used with {what}, which has its own.", fix="Leave it out.")


@dataclass(frozen=True, kw_only=True)
class ResolvedSubject:
    engines: Path  # the folder where its engines go
    model: Path | None  # its model folder
    graph: onnx_import.ImportedGraph | None
    task: Task
    preprocess: Preprocess
    weights: str  # a digest: which weights the engines belong to
    recipe: Recipe
    run: Run | None
    chosen: ChosenExamples
    trust_code: bool

    @property
    def batches(self) -> bool:
        """Whether one call may hold several inputs."""
        return self.graph is None or self.graph.batches

    def subject(self, work: Path) -> Subject:
        """For the search; an imported graph is written into `work`."""
        path = None
        if self.graph is not None:
            path = work / "imported.onnx"
            path.write_bytes(self.graph.model.SerializeToString())
        chosen = self.chosen
        return Subject(
            model=self.model,
            graph=path,
            task=self.task,
            examples=chosen.examples,
            origin=chosen.origin,
            count=chosen.count,
            calibration=chosen.calibration,
            targets=chosen.targets,
            groups=chosen.groups,
            trust_code=self.trust_code,
        )


def resolve_subject(subject: AnyPath, options: SubjectOptions) -> ResolvedSubject:
    """Raises UsageError, DataError or DamagedFile for what can't be optimised, with the reason."""
    path = Path(subject).expanduser()
    if not path.exists() and ":" in str(subject):
        return _resolve_function(str(subject), options)
    if path.suffix.lower() == ".onnx":
        return _resolve_onnx(path, options)
    return _resolve_model(subject, options)


def _resolve_model(subject: AnyPath, options: SubjectOptions) -> ResolvedSubject:
    options.refuse("a trained model", "weights", "size", "mean", "std", "out")
    folder = find_model_folder(subject)
    saved = load_model(folder, trust_code=options.trust_code)
    run = Run.open(subject) if is_run(subject) else None
    task = saved.task
    if options.data is not None:
        labelled = prepare_labelled(_other_data(options, saved.preprocess), saved.recipe, task.classes)
        chosen = choose_labelled(labelled)
    elif run is not None:
        own = DataOptions.of_run(run, cache_dir=options.cache_dir)
        chosen = choose_labelled(labelled_of_run(run, own, saved.recipe))
    else:
        warn_of_made_up()
        chosen = make_up(saved.preprocess.inputs)
    return ResolvedSubject(
        engines=folder / store.FOLDER,
        model=folder.absolute(),
        graph=None,
        task=task,
        preprocess=saved.preprocess,
        weights=saved.card["weights"]["blake2b"],
        recipe=saved.recipe,
        run=run,
        chosen=chosen,
        trust_code=options.trust_code,
    )


def _resolve_onnx(path: Path, options: SubjectOptions) -> ResolvedSubject:
    options.refuse("an ONNX file", "weights")
    pictures = onnx_import.PictureOptions(size=_parse_size(options.size), mean=options.mean, std=options.std)
    graph, chosen = resolve_graph(path, GraphOptions(data=options.data, cache_dir=options.cache_dir, pictures=pictures))
    folder = Path(options.out or f"{path.stem}-engines").expanduser()
    if not (folder / store.INDEX).exists():
        refuse_occupied(folder)
    return ResolvedSubject(
        engines=folder,
        model=None,
        graph=graph,
        task=graph.task,
        preprocess=graph.preprocess,
        weights=hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        recipe=Recipe(name="imported", model=path.stem),
        run=None,
        chosen=chosen,
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
    module = build.build(recipe, preprocess, prepared.task)
    if options.weights is None:
        warn(f"Without --weights, the network is evaluated as {spec} builds it.")
    else:
        model = build.resolve(recipe.model)
        head = build.head_of(module, model)
        report = build.load_weights(module, Path(options.weights).expanduser(), head, model=model)
        if report.missing or report.skipped:
            raise DataError(f"{options.weights} doesn't fit the network: {report}", fix="Give all of its weights.")
    folder = Path(options.out or f"{spec.rpartition(':')[2]}-model").expanduser()
    if not (folder / "model.json").exists() or read_card(folder)["model"] != spec:
        refuse_occupied(folder)  # a folder that was saved here for the same function is replaced
    save_model(folder, module, recipe=recipe, preprocess=preprocess, task=prepared.task, data=prepared.to_json())
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
