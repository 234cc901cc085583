"""Label Studio: one JSON export, in its full or its short form, with rectangles, outlines and ellipses in percent.

Source: the JSON and JSON-MIN exports of Label Studio 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

from suanli.core.boxes import Box, Boxes
from suanli.core.types import Json
from suanli.data.annotated import Annotations, Files, Format
from suanli.data.formats._boxes import enclose, enclose_rotated, parse_label, parse_number, parse_numbers
from suanli.data.formats._json import entries, read_json
from suanli.data.members import count_and_examples, order_classes, suffix_of
from suanli.data.suffixes import IMAGE_SUFFIXES

SHAPES = ("rectanglelabels", "polygonlabels", "ellipselabels")
_UPLOADED = re.compile(r"[0-9a-f]{8}-")  # put before the name of an uploaded file
_START = re.compile(rb"(\xef\xbb\xbf)?\s*\[")


def find(files: Files) -> list[str]:
    return [path for path in files.with_suffix("json", for_all=True) if _is_export(files.read(path))]


def _is_export(content: bytes) -> bool:
    full = (
        b'"data"' in content and b'"result"' in content and (b'"annotations"' in content or b'"completions"' in content)
    )
    return _START.match(content) is not None and (full or b'labels"' in content)


def read(files: Files, paths: Sequence[str]) -> Annotations:
    tasks = _Tasks(files=files)
    for path in paths:
        content = read_json(files, path)
        for position, task in enumerate(content):
            try:
                tasks.add(path, task)
            except ValueError as error:
                raise files.error(path, f"{error} (entry {position})") from error
    return tasks.finish()


@dataclass(kw_only=True)
class _Tasks:
    """What was read so far."""

    files: Files
    targets: dict[str, Boxes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)
    shapes: int = 0  # that aren't upright rectangles
    others: int = 0  # results without a box

    def add(self, path: str, task: Json) -> None:
        """Raises ValueError."""
        if not isinstance(task, Mapping):
            raise ValueError("has something else than an object in its list")
        name = _find_name(task.get("data") if isinstance(task.get("data"), Mapping) else task)
        image = self.files.find_image(name, beside=path)
        if image is None and (short := _UPLOADED.sub("", name.rpartition("/")[2], count=1)) != name:
            image = self.files.find_image(short, beside=path)
        results = self._find_results(task, name)
        if results is None:
            self.unlabelled.append(name)
        elif image is None:
            self.missing.append(name)
        else:
            self.targets[image] = Boxes(tuple(self._read_results(results)), relative=True)

    def _find_results(self, task: Mapping[str, Json], name: str) -> Sequence[Json] | None:
        """Of the first annotation that wasn't cancelled; None: nobody has labelled it."""
        key = next((key for key in ("annotations", "completions") if key in task), None)
        if key is None:  # the short form
            lists = [v for v in task.values() if isinstance(v, list) and all(isinstance(one, Mapping) for one in v)]
            return [one for values in lists for one in values]
        done = [one for one in entries(task, key) if isinstance(one, Mapping) and not one.get("was_cancelled")]
        if len(done) > 1:
            self.several.append(name)
        return entries(done[0], "result") if done else None

    def _read_results(self, results: Sequence[Json]) -> Iterator[Box]:
        for position, result in enumerate(results):
            if not isinstance(result, Mapping):
                raise ValueError(f"has something else than an object in result[{position}]")
            value = result.get("value", result)
            kind = next((shape for shape in SHAPES if isinstance(value, Mapping) and shape in value), None)
            if kind is None:
                self.others += 1
                continue
            try:
                yield self._read_shape(value, kind, result)
            except ValueError as error:
                raise ValueError(f"{error} (result[{position}])") from error

    def _read_shape(self, value: Mapping[str, Json], kind: str, result: Mapping[str, Json]) -> Box:
        """In shares of the image's sides."""
        labels = entries(value, kind)
        label = parse_label(labels[0] if labels else None)
        rotation = math.radians(parse_number(value.get("rotation") or 0))
        # Angles are of the picture, whose sides differ; without its size, of one as wide as high.
        width = parse_number(result.get("original_width") or 1)
        height = parse_number(result.get("original_height") or 1)
        self.shapes += kind != "rectanglelabels" or rotation != 0
        if kind == "polygonlabels":
            corners: Sequence[float] = enclose(parse_numbers(point, 2) for point in entries(value, "points"))
            left, top, right, bottom = (side / 100 for side in corners)
            return Box(left, top, right, bottom, label)
        x, y = parse_number(value.get("x")) / 100 * width, parse_number(value.get("y")) / 100 * height
        if kind == "ellipselabels":
            own_width = 2 * parse_number(value.get("radiusX")) / 100 * width
            own_height = 2 * parse_number(value.get("radiusY")) / 100 * height
        else:  # it turns about its first corner
            own_width = parse_number(value.get("width")) / 100 * width
            own_height = parse_number(value.get("height")) / 100 * height
            x, y = (
                x + own_width / 2 * math.cos(rotation) - own_height / 2 * math.sin(rotation),
                y + own_width / 2 * math.sin(rotation) + own_height / 2 * math.cos(rotation),
            )
        left, top, right, bottom = enclose_rotated(x, y, own_width, own_height, math.degrees(rotation))
        return Box(left / width, top / height, right / width, bottom / height, label)

    def finish(self) -> Annotations:
        notes = []
        if self.unlabelled:
            notes.append(count_and_examples(self.unlabelled, "images that nobody has labelled yet, left out"))
        if self.several:
            notes.append(count_and_examples(self.several, "images with several annotations, the first is used"))
        if self.shapes:
            notes.append(f"{self.shapes:,} rotated boxes, outlines and ellipses, read as upright boxes around them")
        if self.others:
            notes.append(f"{self.others:,} results without a box, such as choices and brush strokes, left out")
        return Annotations(
            annotation="boxes",
            targets=self.targets,
            classes=order_classes(box.label for target in self.targets.values() for box in target.boxes),
            missing=self.missing,
            notes=notes,
        )


def _find_name(data: Json) -> str:
    """The path of the image in a task's data: of an upload, of a local file, or of a URL. Raises ValueError."""
    for value in data.values():
        if not isinstance(value, str):
            continue
        url = urlsplit(value) if value.isprintable() else None
        local = parse_qs(url.query).get("d") if url is not None else None
        path = local[0] if local else unquote(url.path if url is not None and url.scheme else value)
        if suffix_of(path) in IMAGE_SUFFIXES:
            return path
    raise ValueError("has a task without the path of an image")


FORMAT = Format(name="label_studio", title="Label Studio", annotation="boxes", find=find, read=read, order=40)
