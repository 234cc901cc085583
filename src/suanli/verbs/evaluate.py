"""evaluate: the scores of a trained model.

In float32 without speedups, so that the figure is the reference for all faster ways of computing. Single-view;
test-time augmentation is a separate, named figure.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from suanli.core.console import plural, say, warn
from suanli.core.errors import DataError, UsageError
from suanli.core.overlaps import find_contamination
from suanli.core.paths import cache_dir as cache_dir_of
from suanli.core.run import CROSS_VALIDATION, Run, measurement
from suanli.core.scored_examples import ScoredExamples
from suanli.core.types import AnyPath, Device, Source, Split
from suanli.data.cache import PreparedData, prepare_source
from suanli.data.checks import refuse_bad_share
from suanli.data.example_columns import ExampleColumns
from suanli.data.leaks import FILE as LEAKS
from suanli.data.leaks import replace_similar
from suanli.data.split_names import named_split
from suanli.machine.device import cores, detect, environment
from suanli.models.model_folder import SavedModel, add_scores, load_model
from suanli.training.frozen_features import digest_network, find_features
from suanli.training.prepare import DataOptions, keep_place, resolve_run
from suanli.verbs._embedding_findings import SUSPECTS, Findings, Study, write_suspects
from suanli.verbs._embeddings import FILE as EMBEDDINGS
from suanli.verbs._embeddings import Embedder, embed_others, find_embedder, write_embeddings
from suanli.verbs._evaluation import Evaluation as Evaluation
from suanli.verbs._evaluation import table as table
from suanli.verbs._evaluator import Evaluator, summarize
from suanli.verbs._folds import cross_validate
from suanli.verbs._leakage import compare_with_training


def evaluate(
    run: AnyPath,
    *,
    split: str = "test",
    data: AnyPath | None = None,
    device: str = "auto",
    augmented_views: bool = True,
    folds: str | int | None = None,
    cache_dir: AnyPath | None = None,
    trust_code: bool = False,
) -> Evaluation:
    """Evaluate the model of a run on one of its splits, or on another data set.

    With `folds` (5, or "5x3" to repeat it three times), evaluate how it was trained by cross-validation: as
    many models are trained, and each example is answered by one that hasn't seen it. The run keeps its model.

    Where examples are also training examples, as they are or nearly, the scores are those of the
    others, and `leakage` has those of all. Writes evaluation/<split>.json, beside it the records that
    `compare` needs, and the scores into model.json; with `data`, nothing is written into the run,
    unless that is its own data at a new place, which it then keeps. `augmented_views` adds the figure
    with test-time augmentation where the recipe's augmentations have views. Raises DataError when there
    is no model yet or the other data has other targets.
    """
    started = time.perf_counter()
    run = Run.open(run)
    split = named_split(split)
    saved = load_model(run.model_path, trust_code=trust_code)
    options = DataOptions.of_run(run, cache_dir=cache_dir)
    if folds is not None:
        if data is not None or split != "test":
            raise UsageError(
                "--folds evaluates all examples of the run's own data.", fix="Leave out --data and --split."
            )
        return _cross_validate(run, saved, options, detect(device), folds, started)
    if data is not None and options.is_gone and (own := _find_moved(run, saved, data, cache_dir)) is not None:
        options, data = own, None
    training: Split | None = None
    if data is None:
        prepared = resolve_run(run, options, saved.recipe, verb="evaluate", announce=False)
        splits = prepared.splits
        examples, training = splits[split], None if split == "train" else splits["train"]
    else:
        prepared, examples = _other_data(run, saved, options, data, split)
    target = detect(device)
    evaluator = Evaluator(saved, examples, target)
    embedder = find_embedder(saved, target) if data is None and split == "test" else None
    evaluation = evaluator.evaluate(split, augmented_views, training, embedder=embedder)
    found = None if embedder is None else _study(evaluator, embedder, prepared, options)
    evaluation = replace(
        evaluation,
        contamination=find_contamination(prepared.name, prepared.part_of, saved.card.get("pretrained")),
        seconds=time.perf_counter() - started,  # with loading
    )
    if data is None:
        scored = ScoredExamples.of(evaluator.records, examples, evaluator.rows, saved.preprocess, saved.task.classes)
        _write(run, evaluation, target, saved, options, scored)
        if found is not None:
            _write_findings(run, found)
    return evaluation


def _cross_validate(
    run: Run, saved: SavedModel, options: DataOptions, device: Device, folds: str | int, started: float
) -> Evaluation:
    examples, records, how = cross_validate(run, saved, options, device, folds)
    evaluation, _, rows = summarize(CROSS_VALIDATION, saved, examples, records, None)
    different = len({examples.names[i] for i in rows.tolist()})
    about = run.data
    evaluation = replace(
        evaluation,
        count=different,
        folds=how,
        contamination=find_contamination(about["name"], about.get("part_of", ()), saved.card.get("pretrained")),
        seconds=time.perf_counter() - started,
    )
    _write(run, evaluation, device, saved, options)
    return evaluation


def _find_moved(run: Run, saved: SavedModel, data: AnyPath, cache_dir: AnyPath | None) -> DataOptions | None:
    """The options of the run's own data where `data` has its content; None: it is other data."""
    options = DataOptions.of_run(run, subject=data, cache_dir=cache_dir)
    try:
        resolve_run(run, options, saved.recipe, verb="evaluate", announce=False)
    except (DataError, UsageError):  # it may still be good enough to evaluate on
        return None
    return options


def _other_data(
    run: Run, saved: SavedModel, options: DataOptions, data: AnyPath, split: str
) -> tuple[PreparedData, Split]:
    """Labelled inputs that the run has not seen: those of `split`, or all where nothing is split."""
    source = _find_other_source(options, data, saved.task.annotation)
    if source.kind != saved.preprocess.kind:
        raise DataError(f"The model reads {saved.preprocess.kind}, the data is {source.kind}.", fix="Use other data.")
    task = saved.task
    if source.annotation != task.annotation:
        raise DataError(
            f"The model learned {task.annotation!r} targets, the data has {source.annotation!r}.", fix="Use other data."
        )
    unknown_class = sorted(set(source.classes) - set(task.classes))
    if unknown_class:
        raise DataError(
            f"The model doesn't know the class {unknown_class[0]!r}; it knows {', '.join(task.classes[:10])}.",
            fix="Rename the classes of the data to those of the model.",
        )
    columns = ExampleColumns.of(source.examples)
    chosen = np.flatnonzero([own in (split, None) for own in columns.splits])
    examples = columns.take(chosen, ["test"] * len(chosen))
    source = replace(source, examples=examples, classes=task.classes, fingerprint=f"{source.fingerprint}:{split}")
    prepared = prepare_source(
        source, saved.recipe, cache_dir_of(options.cache_dir), threads=cores(), preprocess=saved.preprocess
    )
    refuse_bad_share(prepared.findings, options.max_bad)
    return prepared, replace(prepared.splits["test"], leaks=compare_with_training(run, prepared))


def _find_other_source(options: DataOptions, data: AnyPath, annotation: str) -> Source:
    """Data that isn't divided needs no times, and it may have no groups."""
    options = replace(options, subject=str(data), time_column=None)
    try:
        return options.find_source(annotation)
    except UsageError as error:
        if options.group_column is None and options.group_pattern is None:
            raise
        source = replace(options, group_column=None, group_pattern=None).find_source(annotation)
        warn(f"{data} is evaluated without groups: {error}")
        return source


def _study(evaluator: Evaluator, embedder: Embedder, prepared: PreparedData, options: DataOptions) -> Findings | None:
    """What the embeddings show of the split that was evaluated; None: the network has none."""
    saved, known = evaluator.saved, None
    if (own := evaluator.embedded) is None:
        return None
    if saved.recipe.weights is not None:  # features of these weights may be in the cache, for a head
        digest = digest_network(saved.recipe, saved.module, embedder.head)
        known = find_features(digest, prepared, cache_dir_of(options.cache_dir))
    others = embed_others(embedder, prepared.splits, own, evaluator.infer_s, known)
    return Study(saved, embedder, own, others).find(evaluator.worst, evaluator.wrong)


def _write_findings(run: Run, found: Findings) -> None:
    """What the embeddings of the examples show, beside the scores, and the lists that people can act on."""
    folder = run.path / "evaluation"
    with run.lock():
        write_embeddings(folder / EMBEDDINGS, found.embedded)
        run.write("evaluation/embeddings.json", found.values)
        replace_similar(run.path / LEAKS, found.similar)
        if found.suspects is not None:
            write_suspects(folder / SUSPECTS, found.suspects)
    if found.suspects:
        say(f"likely label errors: {len(found.suspects):,}, listed in {folder / SUSPECTS}")
    if found.similar:
        pairs = plural(len(found.similar), "test example")
        say(f"{pairs} similar by embedding to a training or validation example, listed in {run.path / LEAKS}")


def _write(
    run: Run,
    evaluation: Evaluation,
    device: Device,
    saved: SavedModel,
    options: DataOptions,
    scored: ScoredExamples | None = None,
) -> None:
    here = environment(device)
    with run.lock():
        keep_place(run, options)
        if scored is not None:
            scored.write(run.scored_examples(evaluation.split))
        run.write(f"evaluation/{evaluation.split}.json", evaluation.to_json())
        add_scores(run.model_path, evaluation.split, evaluation.scores)
        defined = {name: value for name, value in evaluation.scores.items() if value is not None}
        for name, value in defined.items():
            run.record(
                measurement(
                    f"{evaluation.split}_{name}",
                    value,
                    evaluation.units[name],
                    environment=here,
                    recipe=saved.recipe,
                    variant="reference",
                    scores=defined,
                    count=evaluation.count,
                    contaminated=evaluation.contamination is not None,
                )
            )
