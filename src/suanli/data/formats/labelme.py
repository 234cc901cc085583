"""LabelMe: a JSON file for each image, beside it, with rectangles, outlines and circles.

Outlines and circles are read as the boxes around them; points and lines have none. Source: the files of labelme 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice

from suanli.core.boxes import Box, Boxes
from suanli.core.types import Json
from suanli.data.annotated import Annotations, Files, Format, stem_of
from suanli.data.formats._boxes import describe_thin, enclose, parse_label, parse_number, parse_numbers
from suanli.data.formats._json import entries, read_json
from suanli.data.members import count_and_examples, order_classes

PEEKED = 5  # JSON files that say which format it is
WITHOUT_AREA = ("point", "points", "line", "linestrip")


def find(files: Files) -> list[str]:
    stems = {stem_of(path).casefold() for path in files.images}
    paths = files.with_suffix("json")
    beside = [path for path in paths if files.named is not None or stem_of(path).casefold() in stems]
    peeked = (files.read(path) for path in islice(beside, PEEKED))
    return paths if any(b'"shapes"' in content and b'"imagePath"' in content for content in peeked) else []


def read(files: Files, paths: Sequence[str]) -> Annotations:
    targets: dict[str, Boxes] = {}
    missing: list[str] = []
    others: list[str] = []
    outlines: list[str] = []
    thin = 0
    for path in paths:
        content = read_json(files, path)
        if not isinstance(content, Mapping) or "shapes" not in content:
            others.append(path)
            continue
        boxes = []
        try:
            for position, shape in enumerate(entries(content, "shapes")):
                box, kind = _read_shape(shape, position)
                if box is not None:
                    boxes.append(box)
                thin += box is None
                if kind != "rectangle" and box is not None and path not in outlines[-1:]:
                    outlines.append(path)
        except ValueError as error:
            raise files.error(path, str(error)) from error
        name = str(content.get("imagePath") or "")
        image = files.find_by_stem(stem_of(path), beside=path)
        if image is None and name:
            image = files.find_image(name, beside=path)
        if image is None:
            missing.append(name or stem_of(path))
        else:
            targets[image] = Boxes(tuple(boxes), _read_size(content))
    notes = []
    if others:
        notes.append(count_and_examples(others, "JSON files that aren't of LabelMe, skipped"))
    if outlines:
        notes.append(count_and_examples(outlines, "files with outlines or circles, read as the boxes around them"))
    if thin:
        notes.append(describe_thin(thin))
    return Annotations(
        annotation="boxes",
        targets=targets,
        classes=order_classes(box.label for target in targets.values() for box in target.boxes),
        unlabelled=Boxes(),
        missing=missing,
        notes=notes,
    )


def _read_shape(shape: Json, position: int) -> tuple[Box | None, str]:
    """The box of one shape, and its kind. Raises ValueError."""
    if not isinstance(shape, Mapping):
        raise ValueError(f"has something else than an object in shapes[{position}]")
    kind = str(shape.get("shape_type") or "polygon")
    try:
        label = parse_label(shape.get("label"))
        points = [parse_numbers(point, 2) for point in entries(shape, "points")]
        if kind in WITHOUT_AREA:
            return None, kind
        if kind == "circle":
            if len(points) != 2:
                raise ValueError(f"has a circle of {len(points)} points; centre and edge are expected")
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            return Box(x - radius, y - radius, x + radius, y + radius, label), kind
        return Box(*enclose(points), label), kind
    except ValueError as error:
        raise ValueError(f"{error} (shapes[{position}])") from error


def _read_size(content: Mapping[str, Json]) -> tuple[float, float] | None:
    try:
        size = parse_number(content.get("imageHeight")), parse_number(content.get("imageWidth"))
    except ValueError:
        return None
    return size if min(size) > 0 else None


FORMAT = Format(name="labelme", title="LabelMe", annotation="boxes", find=find, read=read, order=50)
