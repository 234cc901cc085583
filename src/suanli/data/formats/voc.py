"""Pascal VOC: an XML file for each image (`Annotations/1.xml` for `JPEGImages/1.jpg`, or beside it), and lists of the
splits in `ImageSets/Main/`, if there are any.

Source: M. Everingham et al., "The Pascal Visual Object Classes Challenge", IJCV 2010. Its own files count pixels from
1; most tools that write the format today count from 0, and the coordinates are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice

from suanli.core.boxes import Box, Boxes
from suanli.data.annotated import Annotations, Files, Format, stem_of
from suanli.data.formats._boxes import Corners, enclose, enclose_rotated, parse_label, parse_number
from suanli.data.formats._xml import Element, read_xml
from suanli.data.members import count_and_examples, order_classes
from suanli.data.split_names import parse_split

PEEKED = 5  # XML files that say which format it is
SIDES = ("xmin", "ymin", "xmax", "ymax")
_ROOT = re.compile(rb"<annotation[\s>]")
_LIST = re.compile(r"(?:.*/)?ImageSets/(?:Main|Layout|Segmentation)/([^/]+)\.txt", re.IGNORECASE)


def find(files: Files) -> list[str]:
    paths = files.with_suffix("xml")
    return paths if any(_ROOT.search(files.read(path)[:4000]) for path in islice(paths, PEEKED)) else []


def read(files: Files, paths: Sequence[str]) -> Annotations:
    targets: dict[str, Boxes] = {}
    missing, others, shapes, twice = [], [], [], []
    for path in paths:
        root = read_xml(files, path)
        if root.tag != "annotation":
            others.append(path)
            continue
        target, has_shapes = _read_objects(files, path, root)
        image = _find_image(files, path, root)
        if image is None:
            missing.append(root.get("filename") or stem_of(path))
        elif image in targets:
            twice.append(image)
            targets[image] = target._replace(boxes=(*targets[image].boxes, *target.boxes))
        else:
            targets[image] = target
        if has_shapes:
            shapes.append(path)
    splits, notes = _read_lists(files, targets)
    for names, what in (
        (others, "XML files that aren't of Pascal VOC, skipped"),
        (shapes, "files with rotated boxes or outlines, read as upright boxes around them"),
        (twice, "images with several files of boxes, which were put together"),
    ):
        if names:
            notes.append(count_and_examples(names, what))
    return Annotations(
        annotation="boxes",
        targets=targets,
        classes=order_classes(box.label for target in targets.values() for box in target.boxes),
        unlabelled=Boxes(),
        splits=splits,
        missing=missing,
        notes=notes,
    )


def _find_image(files: Files, path: str, root: Element) -> str | None:
    """The one of the file's own name: `filename` often stays when files are renamed."""
    if (image := files.find_by_stem(stem_of(path), beside=path)) is not None:
        return image
    name = root.get("filename")
    return files.find_image(name, beside=path) if name else None


def _read_objects(files: Files, path: str, root: Element) -> tuple[Boxes, bool]:
    """The boxes, and whether some were rotated or outlines."""
    boxes, has_shapes = [], False
    for one in root.find_all("object"):
        try:
            corners, is_shape = _read_corners(one)
            label = parse_label(one.get("name"))
        except ValueError as error:
            raise files.error(path, str(error), line=one.line) from error
        has_shapes |= is_shape
        boxes.append(Box(*corners, label, difficult=one.get("difficult") == "1"))
    size = root.find("size")
    stated = (0.0, 0.0)
    if size is not None:
        try:
            stated = parse_number(size.get("height") or "0"), parse_number(size.get("width") or "0")
        except ValueError as error:
            raise files.error(path, str(error), line=size.line) from error
    return Boxes(tuple(boxes), stated if min(stated) > 0 else None), has_shapes


def _read_corners(one: Element) -> tuple[Corners, bool]:
    """Raises ValueError."""
    if (box := one.find("bndbox")) is not None:
        left, top, right, bottom = (parse_number(box.get(side)) for side in SIDES)
        return (left, top, right, bottom), False
    if (box := one.find("robndbox")) is not None:
        x, y, width, height = (parse_number(box.get(name)) for name in ("cx", "cy", "w", "h"))
        return enclose_rotated(x, y, width, height, parse_number(box.get("angle")) * 57.29577951308232), True
    if (polygon := one.find("polygon")) is not None:
        return enclose(_read_polygon(polygon)), True
    raise ValueError("has an object without a box (bndbox)")


def _read_polygon(polygon: Element) -> list[tuple[float, float]]:
    """Of <pt><x>…</x><y>…</y></pt>, or of <x1>, <y1>, <x2>, …"""
    if points := list(polygon.find_all("pt")):
        return [(parse_number(point.get("x")), parse_number(point.get("y"))) for point in points]
    texts = {child.tag: child.text.strip() for child in polygon.children}
    numbers = [tag[1:] for tag in texts if tag.startswith("x")]
    return [(parse_number(texts[f"x{n}"]), parse_number(texts.get(f"y{n}", ""))) for n in numbers]


def _read_lists(files: Files, targets: Mapping[str, Boxes]) -> tuple[dict[str, str], list[str]]:
    """The split of each image that the lists name, and notes."""
    lists: dict[str, set[str]] = {}
    for path in files.others:
        match = _LIST.fullmatch(path)
        split = None if match is None else "trainval" if match[1] == "trainval" else parse_split(match[1])
        if split is not None:
            lines = files.text(path).splitlines()
            lists.setdefault(split, set()).update(stem_of(line.split()[0]) for line in lines if line.strip())
    if "train" not in lists and "trainval" in lists:
        lists["train"] = lists["trainval"] - lists.get("val", set())
    lists.pop("trainval", None)
    if "train" not in lists:
        return {}, []
    splits: dict[str, str] = {}
    unlisted, several = [], []
    for image in {**targets, **files.images}:
        own = [split for split in ("test", "val", "train") if stem_of(image) in lists.get(split, ())]
        if own:
            splits[image] = own[0]
        elif image in targets:
            unlisted.append(image)
        if len(own) > 1:
            several.append(image)
    notes = []
    if unlisted:
        notes.append(count_and_examples(unlisted, "images in no list of ImageSets, used for training"))
    if several:
        notes.append(count_and_examples(several, "images in the lists of several splits, used for the last of them"))
    return splits, notes


FORMAT = Format(name="voc", title="Pascal VOC", annotation="boxes", find=find, read=read, order=20)
