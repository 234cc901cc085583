"""prepare: a data set becomes checked, decoded, cached splits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from suanli.core.console import plural, say
from suanli.core.registry import load
from suanli.core.schema import example_of
from suanli.core.types import AnyPath, Json, Raw, Recipe
from suanli.data.cache import PreparedData
from suanli.data.leaks import FILE as LEAKS
from suanli.data.samples import choose, describe_target
from suanli.data.windows import input_of
from suanli.engines.answer_format import Answered, check_folder, write_files
from suanli.engines.predictor import Prediction
from suanli.training.prepare import DataOptions, resolve

DRAWN = 24  # examples


def prepare(
    data: AnyPath,
    *,
    recipe: str | Recipe | None = None,
    tiles: int | None = None,
    settings: Mapping[str, Json] | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    target: str | None = None,
    group_column: str | None = None,
    group_pattern: str | None = None,
    time_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
    draw: AnyPath | None = None,
) -> PreparedData:
    """Check a data set and decode it into the cache; nothing is decoded twice.

    `data` is a built-in name, a folder of class folders or of images with files of boxes, an archive of one, a table
    file, a file of boxes, or an .npz. Where suanli makes the splits, none divides a group, and with `time_column` the
    latest examples are the test split. `group_column` is for tables; the one capture group of the regular expression
    `group_pattern` takes the group from the name of each example. `tiles` cuts images into tiles of so many px. `draw`
    is a new or empty folder for some training images with their targets drawn on them. Returns the splits with the
    findings of the data check. Raises DataError past `max_bad` (the share of inputs that can't be decoded).
    """
    folder = None if draw is None else check_folder(Path(draw), data)
    options = DataOptions.of(
        data,
        input_column=input_column,
        label_column=label_column,
        target=target,
        group_column=group_column,
        group_pattern=group_pattern,
        time_column=time_column,
        data_dir=data_dir,
        cache_dir=cache_dir,
        max_bad=max_bad,
    )
    changes = dict(settings or {}) if tiles is None else {"preprocess.tiles": tiles, **(settings or {})}
    prepared = resolve(options, recipe=recipe, settings=changes, learn=False)[1]
    if folder is not None:
        _draw_samples(options, prepared, folder)
    return prepared


def _draw_samples(options: DataOptions, prepared: PreparedData, folder: Path) -> None:
    """Training inputs in their own size, or their windows, with their targets."""
    task, split, preprocess = prepared.task, prepared.splits["train"], prepared.preprocess
    kind = type(preprocess)
    inputs = {example.name: example for example in options.find_source(task.annotation).examples}

    def answers() -> Iterator[Answered]:
        for position in choose(split, DRAWN):
            name, target = split.names[position], describe_target(task, split, position)
            raw: Raw = next(iter(input_of(split, position, preprocess).values()))
            if preprocess.has_windows:
                target = task.describe_target(example_of(split.targets, position), preprocess.geometry)
            else:
                raw = inputs[name].read()
            yield Prediction(name=name, answer=target, empty=target), raw

    form = load("answer_formats", "images")
    count = sum(1 for _ in write_files(answers(), form, folder, kind, task.classes))
    say(f"{plural(count, 'training example')} drawn in {folder}")


def summary(prepared: PreparedData) -> str:
    """The counts of classes, or of ranges of values, as a text table."""
    title = "class" if prepared.task.classes else "value"
    counts = prepared.findings["class_counts"]
    names = list(counts["train"])
    width = max(len(name) for name in (*names, title))
    lines = [f"{title:<{width}}  {'train':>8}  {'val':>8}  {'test':>8}"]
    listed = names[:50]
    for name in listed:
        lines.append(f"{name:<{width}}" + "".join(f"  {counts[s][name]:>8,}" for s in ("train", "val", "test")))
    if len(listed) < len(names):
        lines.append(f"… and {len(names) - len(listed)} more classes")
    if prepared.findings.get("leaks"):
        lines.append(f"Examples in training and another split: {prepared.path / LEAKS}")
    return "\n".join([*lines, f"Cache: {prepared.path}"])
