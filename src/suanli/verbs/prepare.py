"""prepare: a data set becomes checked, decoded, cached splits."""

from __future__ import annotations

from collections.abc import Mapping

from suanli.core.types import AnyPath, Json, Recipe
from suanli.data.cache import PreparedData
from suanli.data.leaks import FILE as LEAKS
from suanli.training.prepare import DataOptions, resolve


def prepare(
    data: AnyPath,
    *,
    recipe: str | Recipe | None = None,
    settings: Mapping[str, Json] | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
    group_pattern: str | None = None,
    time_column: str | None = None,
    max_bad: float = 0.01,
    data_dir: AnyPath | None = None,
    cache_dir: AnyPath | None = None,
) -> PreparedData:
    """Check a data set and decode it into the cache; nothing is decoded twice.

    `data` is a built-in name, a folder of class folders or of images with files of boxes, an
    archive of one, a table file, a file of boxes, or an .npz. Where suanli makes the splits, none
    divides a group, and with `time_column` the latest examples are the test split. `group_column`
    is for tables; the one capture group of the regular expression `group_pattern` takes the group
    from the name of each example. Returns the splits with the findings of the data check. Raises
    DataError past `max_bad` (the share of inputs that can't be decoded).
    """
    options = DataOptions.of(
        data,
        input_column=input_column,
        label_column=label_column,
        group_column=group_column,
        group_pattern=group_pattern,
        time_column=time_column,
        data_dir=data_dir,
        cache_dir=cache_dir,
        max_bad=max_bad,
    )
    return resolve(options, recipe=recipe, settings=settings or {}, learn=False)[1]


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
