"""From the options of a user to the complete recipe and the prepared data.

Every verb that needs data uses this, so that all of them see the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from suanli.core import registry
from suanli.core.console import duration, say, warn
from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.core.paths import cache_dir as default_cache_dir
from suanli.core.paths import data_dir as default_data_dir
from suanli.core.run import Run
from suanli.core.types import AnyPath, Columns, Json, Recipe, RecipeChoice, Source, Traits
from suanli.data import checks
from suanli.data.cache import PreparedData, make_task, prepare_source
from suanli.data.examples import FILE as EXAMPLES
from suanli.data.examples import ExampleTable
from suanli.data.kept_splits import SplitOptions
from suanli.data.source import find_source
from suanli.data.splits import Known
from suanli.machine import device
from suanli.models import build
from suanli.models.model_folder import build_preprocess
from suanli.training.augment import compose
from suanli.training.recipe import change, choose_by_traits, find_traits, has_choice


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where data comes from and where it is cached. A run saves them, to find its data again."""

    subject: str  # a built-in name or an absolute path
    input_column: str | None = None
    label_column: str | None = None
    target: str | None = None
    group_column: str | None = None
    group_pattern: str | None = None
    time_column: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    max_bad: float = 0.01
    stratified: bool = False  # splits have some of each class; a run of an older version doesn't say so
    preprocess: Mapping[str, Json] | None = None  # kind and settings that the given weights learned with

    @classmethod
    def of(cls, subject: AnyPath, *, data_dir: AnyPath | None, cache_dir: AnyPath | None, **more: Any) -> DataOptions:
        return cls(
            subject=_place(subject),
            stratified=True,
            data_dir=_absolute(data_dir),
            cache_dir=_absolute(cache_dir),
            **more,
        )

    @classmethod
    def of_run(
        cls,
        run: Run,
        *,
        subject: AnyPath | None = None,
        data_dir: AnyPath | None = None,
        cache_dir: AnyPath | None = None,
    ) -> DataOptions:
        """Those of a run; the data, at `subject`, and the directories may have moved since."""
        try:
            options = cls(**run.data["options"])
        except (KeyError, TypeError) as error:
            raise DamagedFile(f"{run.path / 'data.json'} has no usable options.", fix="Train again.") from error
        return replace(
            options,
            subject=options.subject if subject is None else _place(subject),
            data_dir=_absolute(data_dir) or options.data_dir,
            cache_dir=_absolute(cache_dir) or options.cache_dir,
        )

    def describe(self, prepared: PreparedData) -> dict[str, Json]:
        """What a run keeps of its data, in data.json."""
        return prepared.to_json() | {"source": self.subject, "options": asdict(self)}

    @property
    def is_gone(self) -> bool:
        """Whether there is nothing where the data was."""
        return self.subject not in registry.names("datasets") and not Path(self.subject).exists()

    def find_source(self, annotation: str | None = None) -> Source:
        """The data that they name, with targets of this annotation where it leaves a choice. Raises UsageError and
        DataError."""
        return find_source(
            self.subject,
            columns=Columns(
                input=self.input_column,
                label=self.label_column,
                target=self.target,
                group=self.group_column,
                time=self.time_column,
                annotation=annotation,
            ),
            group_pattern=self.group_pattern,
            data_dir=default_data_dir(self.data_dir),
        )


def _place(subject: AnyPath) -> str:
    """The name of a built-in data set, an absolute path, or what is neither as it is."""
    path = Path(subject).expanduser()
    is_path = str(subject) not in registry.names("datasets") and path.exists()
    return str(path.resolve()) if is_path else str(subject)


def _absolute(path: AnyPath | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


@dataclass(frozen=True, kw_only=True)
class FoundData:
    """What is known before a recipe is chosen; nothing is decoded yet."""

    source: Source
    traits: Traits | None  # None: the recipe is named


def find_data(options: DataOptions, *, recipe: str | Recipe | None, settings: Mapping[str, Json]) -> FoundData:
    """The data, and, where it decides the recipe, its traits. `settings` are the user's."""
    source = options.find_source(_choose_annotation(recipe, settings))
    if isinstance(recipe, Recipe):
        return FoundData(source=source, traits=None)
    # Checks every setting before any work is done; without epochs, if the recipe fits a head first.
    wanted = change(Recipe(task=_usual_task(source), frozen_views=1), settings)
    if recipe is not None:
        return FoundData(source=source, traits=None)
    model = wanted.model if "model" in settings else None
    traits = find_traits(source, weights=wanted.weights is not None, model=model, settings=wanted.preprocess)
    return FoundData(source=source, traits=traits)


def resolve(
    options: DataOptions,
    *,
    recipe: str | Recipe | None,
    settings: Mapping[str, Json],
    brought: Mapping[str, Json] | None = None,
    found: FoundData | None = None,
    announce: bool = True,
    known: Known | None = None,
    learn: bool = True,
) -> tuple[Recipe, PreparedData]:
    """The complete recipe and the prepared data: a `Recipe`, a shipped one's name, or None for the one that suits the
    data, with `settings` on top. `brought` are settings of given weights, which the user's replace. `known` are splits
    that a run keeps. Data that is only looked at (`learn` is False) needs no recipe that learns from its targets."""
    started = time.perf_counter()
    brought = brought or {}
    found = found or find_data(options, recipe=recipe, settings=settings)
    source = found.source
    refuse_other_kind(source, options.preprocess, settings.get("model", brought.get("model")))
    if not learn and found.traits is not None and not has_choice(found.traits):
        recipe = Recipe(task=_usual_task(source))
    recipe = change(choose_recipe(found, recipe, weights="weights" in brought), {**brought, **settings})
    build.refuse_other_task(build.resolve(recipe.model), registry.load("tasks", recipe.task))
    _check_names(recipe, source)
    preprocess = None if options.preprocess is None else build_preprocess(options.preprocess)
    prepared = prepare_source(
        source,
        recipe,
        default_cache_dir(options.cache_dir),
        threads=device.cores(),
        preprocess=preprocess,
        splitting=SplitOptions(stratified=options.stratified, known=known),
    )
    if announce:
        _announce(prepared, time.perf_counter() - started)
    checks.refuse_bad_share(prepared.findings, options.max_bad)
    checks.refuse_unlearnable(prepared.findings, prepared.task)
    return recipe, prepared


def refuse_other_kind(source: Source, preprocess: Mapping[str, Json] | None, model: Json) -> None:
    """Raises DataError for data of another kind than given weights learned from with this preprocessing, and UsageError
    for another than the model is for. To be called before settings that belong to it are refused, in other words."""
    if preprocess is not None and preprocess["kind"] != source.kind:
        raise DataError(
            f"The weights learned from {preprocess['kind']} data, and this is {source.kind}.",
            fix="Choose weights, or data, of the other kind.",
        )
    if model is not None:
        build.refuse_other_kind(build.resolve(str(model)), source.kind)


def choose_recipe(found: FoundData, recipe: str | Recipe | None, *, weights: bool) -> Recipe:
    """A `Recipe` itself, the shipped one of this name, or, for None, the one that suits the data; `weights`: it starts
    from some. Nothing that the user or the weights change is in it yet."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe is not None:
        choice: RecipeChoice = registry.load("recipes", recipe)
        return choice.recipe
    assert found.traits is not None
    # The network of the weights is no choice of the user's, who may have made one beside them.
    return choose_by_traits(replace(found.traits, weights=found.traits.weights or weights))


def resolve_run(run: Run, options: DataOptions, recipe: Recipe, *, verb: str, announce: bool = True) -> PreparedData:
    """The data of a run with the splits that it was trained with, wherever `options` say that it is now. Raises
    DataError where it is gone, with the command of `verb` that finds it again, and where it has changed, with the
    difference."""
    moved = f"suanli {verb} {run.path} --data NEWPATH"
    if options.is_gone:
        raise DataError(
            f"The data of {run.path} isn't at {options.subject} any more.",
            fix=f"If it was moved, name the new place: {moved}",
        )
    _, prepared = resolve(options, recipe=recipe, settings={}, announce=announce)
    if prepared.digest != run.data["digest"] and (run.path / EXAMPLES).exists():
        known = ExampleTable.load(run.path / EXAMPLES).known  # another machine may have seen other data before
        _, prepared = resolve(options, recipe=recipe, settings={}, announce=announce, known=known)
    if prepared.digest != run.data["digest"]:
        raise DataError(
            f"The data of {run.path} has changed since it was trained, so examples may be in other splits now: "
            f"{_describe_change(run.data, prepared.to_json())}.",
            fix=f"Put it back as it was, or name its place: {moved}. Other data needs another training, or "
            f"suanli evaluate {run.path} --data OTHER.",
        )
    return prepared


def move_data(run: Run, options: DataOptions, *, verb: str) -> None:
    """The data of `run` is now where `options` say, and the run keeps that. Raises DataError for other data."""
    resolve_run(run, options, run.recipe, verb=verb, announce=False)
    keep_place(run, options)


def keep_place(run: Run, options: DataOptions) -> None:
    """Writes into the run where its data is now."""
    about = run.data
    if about["options"]["subject"] != options.subject:
        moved = {"source": options.subject, "options": about["options"] | {"subject": options.subject}}
        run.write("data.json", about | moved)


def _describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two data sets, each as `PreparedData.to_json` describes it."""
    classes, others = before.get("classes", []), now["classes"]
    if classes != others:
        parts = [("without", set(classes) - set(others)), ("with", set(others) - set(classes))]
        words = [f"{word} the classes {', '.join(sorted(names)[:5])}" for word, names in parts if names]
        return "it is " + (" and ".join(words) or "with its classes in another order")
    totals = [{s: sum(counts.values()) for s, counts in about.get("counts", {}).items()} for about in (before, now)]
    differing = [
        f"{totals[1].get(s, 0):,} {s} examples, not {n:,}" for s, n in totals[0].items() if totals[1].get(s) != n
    ]
    if differing:
        return f"it has {', '.join(differing)}"
    if before.get("counts") != now["counts"]:
        return "other labels, or examples in other splits"
    if before.get("input_shape") != now["input_shape"]:
        return f"inputs of another shape, {now['input_shape']}, not {before.get('input_shape')}"
    return "as many examples of each class, with other contents or in another order"


def _choose_annotation(recipe: str | Recipe | None, settings: Mapping[str, Json]) -> str | None:
    """What the targets must be for the task that was named; None: the data decides, and with it the task."""
    named: Recipe | None = registry.load("recipes", recipe).recipe if isinstance(recipe, str) else recipe
    task = settings.get("task", None if named is None else named.task)
    return None if task is None else str(registry.load("tasks", str(task)).annotation)


def _usual_task(source: Source) -> str:
    """One that learns from its targets, so that settings of a task can be checked before there is a recipe."""
    usual = Recipe().task
    fitting = [name for name, task in registry.load_all("tasks").items() if task.annotation == source.annotation]
    return usual if usual in fitting or not fitting else fitting[0]


def _check_names(recipe: Recipe, source: Source) -> None:
    """Raises UsageError for names in the recipe that don't exist, before time is spent on decoding."""
    build.resolve(recipe.model)
    inputs = registry.load("preprocess", source.kind).roles
    targets = make_task(recipe, source).targets
    for specs in (recipe.augment, recipe.final_augment):
        compose(specs, inputs, targets)
    for field in ("progressive_resizing", "mixed_sizes"):
        if getattr(recipe, field) and "image" not in inputs:
            raise UsageError(f"{field} is for images, and this is {source.kind}.", fix="Leave it out.")
    registry.load("optimizers", recipe.optimizer)


def _describe_set_aside(aside: Mapping[str, int], left: int) -> str:
    """Which examples suanli doesn't train on although the data doesn't say so; empty: none."""
    names = {"val": "validation", "test": "test"}
    taken = [f"{n:,} for {names[split]}" for split, n in aside.items() if n]
    if not taken:
        return ""
    how = " ".join(f"--set {split}_fraction=0.2" for split, n in aside.items() if n)
    return f"set aside from {left + sum(aside.values()):,} examples: {' and '.join(taken)} (to change it: {how})"


def _announce(prepared: PreparedData, seconds: float) -> None:
    counts = {name: len(split) for name, split in prepared.splits.items()}
    classes = f"{len(names)} classes, " if (names := prepared.task.classes) else ""
    how = "from the cache" if prepared.reused else f"decoded in {duration(seconds)}"
    say(
        f"{prepared.name}: {counts['train']:,} train, {counts['val']:,} validation, {counts['test']:,} test, "
        f"{classes}input {'x'.join(map(str, prepared.preprocess.input_shape))}, {how}"
    )
    if (aside := prepared.findings.get("set_aside", {})) and (sentence := _describe_set_aside(aside, counts["train"])):
        say(sentence)
    if groups := prepared.findings.get("groups"):
        say(f"groups: {groups['train']:,} train, {groups['val']:,} validation, {groups['test']:,} test")
    for line in (*prepared.preprocess.describe(), *prepared.task.describe()):
        say(line)
    for remark in checks.format_findings(prepared.findings):
        warn(remark)
