"""CVAT: one XML file, "for images" (an element an image) or "for video" (a track an object, with a box a frame).

Rotated boxes, outlines, ellipses and masks are read as the upright boxes around them. Source: CVAT's XML format 1.1.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from suanli.core.boxes import Box, Boxes
from suanli.data.annotated import Annotations, Files, Format, stem_of
from suanli.data.formats._boxes import Corners, describe_thin, enclose, enclose_rotated, parse_label, parse_number
from suanli.data.formats._xml import Element, read_xml
from suanli.data.members import count_and_examples, order_classes
from suanli.data.split_names import parse_split

SHAPES = ("box", "polygon", "ellipse", "mask", "cuboid")
WITHOUT_AREA = ("points", "polyline", "skeleton")
_ROOT = re.compile(rb"<annotations[\s>]")
_NUMBER = re.compile(r"(\d+)$")


def find(files: Files) -> list[str]:
    return [path for path in files.with_suffix("xml", for_all=True) if _ROOT.search(files.read(path)[:4000])]


def read(files: Files, paths: Sequence[str]) -> Annotations:
    found = _Found(files=files)
    for path in paths:
        root = read_xml(files, path)
        found.labels |= dict.fromkeys(_read_labels(files, path, root))
        for image in root.find_all("image"):
            found.add_image(path, image)
        tracks = list(root.find_all("track"))
        if tracks:
            found.add_tracks(path, tracks)
    return found.finish()


def _read_labels(files: Files, path: str, root: Element) -> list[str]:
    """The names of the labels that the job describes."""
    meta = root.find("meta")
    names: list[str] = []
    for job in meta.children if meta is not None else ():
        labels = job.find("labels")
        for one in labels.find_all("label") if labels is not None else ():
            try:
                names.append(parse_label(one.get("name")))
            except ValueError as error:
                raise files.error(path, str(error), line=one.line) from error
    return names


@dataclass(kw_only=True)
class _Found:
    """What was read so far."""

    files: Files
    targets: dict[str, Boxes] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    labels: dict[str, None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    shapes: int = 0  # that aren't upright boxes
    thin: int = 0  # points and lines

    def add_image(self, path: str, one: Element) -> None:
        name = one.attributes.get("name", "")
        if not name:
            raise self.files.error(path, "has an image without a name", line=one.line)
        subset = parse_split(one.attributes.get("subset", ""))
        image = self.files.find_image(name, beside=path, split=subset)
        boxes = [box for shape in one.children if (box := self._read(path, shape, None)) is not None]
        if image is None:
            self.missing.append(name)
            return
        self.targets[image] = Boxes(tuple(boxes), self._read_size(path, one))
        if subset is not None:
            self.splits[image] = subset

    def add_tracks(self, path: str, tracks: Sequence[Element]) -> None:
        """Of each frame the boxes of all tracks that are seen in it. Frames are images whose names end in a number."""
        frames: dict[int, list[Box]] = defaultdict(list)
        for track in tracks:
            for shape in track.children:
                if shape.attributes.get("outside") != "1":
                    box = self._read(path, shape, track.attributes.get("label"))
                    number = shape.attributes.get("frame", "")
                    if not number.isdecimal() or len(number) > 12:
                        raise self.files.error(path, f"has {number!r} where a frame belongs", line=shape.line)
                    frames[int(number)] += [] if box is None else [box]
        images = {int(match[1]): image for image in self.files.images if (match := _NUMBER.search(stem_of(image)))}
        self.missing += [f"frame {frame}" for frame in frames if frame not in images]
        for frame, image in images.items():
            self.targets[image] = Boxes(tuple(frames.get(frame, ())))

    def _read(self, path: str, shape: Element, label: str | None) -> Box | None:
        """None: it is no shape, or has no area. Raises DataError."""
        if shape.tag in WITHOUT_AREA:
            self.thin += 1
        if shape.tag not in SHAPES:
            return None
        try:
            corners, is_box = _read_corners(shape)
            name = parse_label(label if label is not None else shape.attributes.get("label"))
        except ValueError as error:
            raise self.files.error(path, str(error), line=shape.line) from error
        self.shapes += not is_box
        return Box(*corners, name)

    def _read_size(self, path: str, one: Element) -> tuple[float, float] | None:
        try:
            size = [parse_number(one.attributes.get(side, "0")) for side in ("height", "width")]
        except ValueError as error:
            raise self.files.error(path, str(error), line=one.line) from error
        return (size[0], size[1]) if min(size) > 0 else None

    def finish(self) -> Annotations:
        notes = []
        if background := [image for image, target in self.targets.items() if not target.boxes]:
            what = "without boxes, kept as background"
            notes.append(count_and_examples(background, f"images {what}", f"image {what}"))
        if self.shapes:
            notes.append(f"{self.shapes:,} rotated boxes, outlines and masks, read as upright boxes around them")
        if self.thin:
            notes.append(describe_thin(self.thin))
        used = order_classes(box.label for target in self.targets.values() for box in target.boxes)
        return Annotations(
            annotation="boxes",
            targets=self.targets,
            classes=tuple(dict.fromkeys([*self.labels, *used])) if used else (),
            splits=self.splits if "train" in self.splits.values() else {},
            missing=self.missing,
            notes=notes,
        )


def _read_corners(shape: Element) -> tuple[Corners, bool]:
    """The sides, and whether it is an upright box. Raises ValueError."""

    def numbers(*names: str) -> list[float]:
        return [parse_number(shape.attributes.get(name, "")) for name in names]

    rotation = parse_number(shape.attributes.get("rotation") or "0")
    if shape.tag == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        if not rotation:
            return (left, top, right, bottom), True
        return enclose_rotated((left + right) / 2, (top + bottom) / 2, right - left, bottom - top, rotation), False
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = numbers("cx", "cy", "rx", "ry")
        return enclose_rotated(x, y, 2 * radius_x, 2 * radius_y, rotation), False
    if shape.tag == "mask":
        left, top, width, height = numbers("left", "top", "width", "height")
        return (left, top, left + width, top + height), False
    if shape.tag == "cuboid":
        corners = [numbers(f"x{name}", f"y{name}") for name in ("tl1", "bl1", "tr1", "br1", "tl2", "bl2", "tr2", "br2")]
        return enclose(corners), False
    pairs = [pair.split(",") for pair in shape.attributes.get("points", "").split(";") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError("has an outline that isn't a list of x,y;x,y")
    return enclose([[parse_number(x), parse_number(y)] for x, y in pairs]), False


FORMAT = Format(name="cvat", title="CVAT", annotation="boxes", find=find, read=read, order=30)
