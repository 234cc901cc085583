"""COCO results: a JSON list with an entry for each box, such as pycocotools' `loadRes` reads.

With a file of annotations, images and categories have its ids. Else an image's id is its place among the inputs, and a
category's that of its class among those of the model, both from 1; `file_name` is the name of the input.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from suanli.core.console import warn
from suanli.core.errors import DataError
from suanli.core.storage import json_bytes
from suanli.engines.answer_format import AnswerFormat, Classes
from suanli.engines.predictor import Prediction

Identity: TypeAlias = "int | str"


def lines(predictions: Iterable[Prediction], classes: Classes, annotations: Path | None) -> Iterator[str]:
    """Raises DataError for annotations that don't fit."""
    categories: Mapping[str, Identity] = {name: i for i, name in enumerate(classes, start=1)}
    find_image: Callable[[str], Identity | None] | None = None
    if annotations is not None:
        find_image, categories = _read_ids(annotations, classes)
    entries = chain.from_iterable(
        _entries(prediction, number if find_image is None else find_image(prediction.name), categories)
        for number, prediction in enumerate(predictions, start=1)
    )
    before = "["
    for entry in entries:
        yield f"{before}{json_bytes(entry).decode().rstrip()}"
        before = ","
    yield "]" if before == "," else "[]"


def _entries(
    prediction: Prediction, image: Identity | None, categories: Mapping[str, Identity]
) -> Iterator[dict[str, Any]]:
    if image is None:
        warn(f"{prediction.name} is not in the annotations: left out")
        return
    for box in prediction.values["boxes"]:
        left, top, right, bottom = box["box"]
        yield {
            "image_id": image,
            "category_id": categories[box["label"]],
            "bbox": [left, top, round(right - left, 2), round(bottom - top, 2)],
            "score": box["probability"],
            "file_name": prediction.name,
        }


def _read_ids(path: Path, classes: Classes) -> tuple[Callable[[str], Identity | None], dict[str, Identity]]:
    """What finds the id of an image by its name, and the id of each class."""
    try:
        content = json.loads(path.expanduser().read_bytes())
        images = _pairs(content["images"], "file_name")
        categories = dict(reversed(_pairs(content["categories"], "name")))  # the first of equal names
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}.", fix="Check the path.") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DataError(
            f"{path} is no COCO annotation file ({type(error).__name__}: {error}).", fix="Name one with images."
        ) from error
    if missing := [name for name in classes if name not in categories]:
        raise DataError(f"{path} has no category {missing[0]!r}.", fix="Name annotations with the model's classes.")
    by_name: dict[str, list[tuple[str, Identity]]] = defaultdict(list)
    for name, identity in images:
        by_name[PurePosixPath(name).name].append((name, identity))

    def find(name: str) -> Identity | None:
        """By its path, as far as both state it; None: there is no such image, or several."""
        same = by_name.get(PurePosixPath(name).name, [])
        near = [one for one in same if _ends_alike(one[0], name)]
        return near[0][1] if len(near) == 1 else None

    return find, categories


def _pairs(entries: Any, key: str) -> list[tuple[str, Identity]]:
    pairs = [(entry[key], entry["id"]) for entry in entries]
    if not all(isinstance(name, str) and isinstance(identity, int | str) for name, identity in pairs):
        raise TypeError(f"{key} or id of another type")
    return pairs


def _ends_alike(one: str, other: str) -> bool:
    """Whether the shorter of two paths is the end of the longer."""
    mine, theirs = PurePosixPath(one).parts, PurePosixPath(other).parts
    count = min(len(mine), len(theirs))
    return mine[-count:] == theirs[-count:]


ANSWER_FORMAT = AnswerFormat(name="coco", title="COCO results", kinds=("boxes",), lines=lines, takes_annotations=True)
