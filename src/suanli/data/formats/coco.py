"""COCO: one JSON file for all images of a split, with lists of images, categories and annotations.

Masks, outlines or packed, are read as the boxes around them where an annotation has no box. Categories are found by
their ids, whatever numbers these are, and are one class where they have one name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from suanli.core.boxes import Box, Boxes
from suanli.core.console import plural
from suanli.core.types import Json
from suanli.data.annotated import Annotations, Files, Format, find_file_splits, stem_of
from suanli.data.formats._boxes import Corners, enclose, parse_label, parse_number, parse_numbers
from suanli.data.formats._json import entries, read_json
from suanli.data.formats._rle import enclose_mask
from suanli.data.members import count_and_examples

_KEYS = (b'"images"', b'"annotations"', b'"categories"')


def find(files: Files) -> list[str]:
    paths = files.with_suffix("json", for_all=True)
    found = [path for path in paths if all(key in content for content in [files.read(path)] for key in _KEYS)]
    return [path for path in found if stem_of(path).casefold().startswith("instances")] or found


def read(files: Files, paths: Sequence[str]) -> Annotations:
    splits = find_file_splits(paths)
    all_files = _AllFiles(files=files)
    for path in paths:
        content = read_json(files, path)
        try:
            images = {_key(one, "id"): one for one in _objects(content, "images")}
            _refuse_repeated_ids(images, entries(content, "images"))
            names, root = _read_categories(_objects(content, "categories"))
            by_image, used = _read_boxes(_objects(content, "annotations"), names, all_files)
        except ValueError as error:
            raise files.error(path, str(error)) from error
        all_files.add_categories(names, left_out=None if root in used else root)
        all_files.add(path, images, by_image, splits.get(path))
    return all_files.finish()


@dataclass(kw_only=True)
class _AllFiles:
    """What was read so far."""

    files: Files
    targets: dict[str, Boxes] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    classes: dict[str, None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    orphans: int = 0  # boxes of images that the list of images doesn't have
    several: list[str] = field(default_factory=list)  # images in the files of several splits
    masks: int = 0  # boxes around masks
    ids: set[str] = field(default_factory=set)  # that are no usual ones
    named_twice: set[str] = field(default_factory=set)

    def add_categories(self, names: Mapping[str, str], *, left_out: str | None) -> None:
        self.classes |= {name: None for name in names.values() if name != left_out}
        self.named_twice |= {name for name, count in Counter(names.values()).items() if count > 1}
        numbers = [int(identity) for identity in names if identity.isdecimal()]
        if len(numbers) < len(names):
            self.ids.add("no whole numbers")
        elif numbers and sorted(numbers) != list(range(1, len(names) + 1)):
            self.ids.add(f"{min(numbers)} to {max(numbers)}")

    def add(
        self, path: str, images: Mapping[str, Mapping[str, Json]], by_image: dict[str, list[Box]], split: str | None
    ) -> None:
        for identity, one in images.items():
            boxes = by_image.pop(identity, [])
            name = one.get("file_name")
            if not isinstance(name, str) or not name.strip():
                raise self.files.error(path, f"has an image without file_name (id {identity})")
            image = self.files.find_image(name, beside=path, split=split)
            if image is None:
                self.missing.append(name)
                continue
            target = Boxes(tuple(boxes), _read_size(one))
            before = self.targets.get(image)
            if before is not None and split != self.splits.get(image):
                self.several.append(image)
                continue
            self.targets[image] = target if before is None else target._replace(boxes=(*before.boxes, *target.boxes))
            if split is not None:
                self.splits[image] = split
        self.orphans += sum(map(len, by_image.values()))

    def finish(self) -> Annotations:
        notes = []
        if background := [image for image, target in self.targets.items() if not target.boxes]:
            notes.append(
                count_and_examples(
                    background, "images without boxes, kept as background", "image without boxes, kept as background"
                )
            )
        if self.orphans:
            what = "that the file doesn't list, left out"
            notes.append(plural(self.orphans, f"box of an image {what}", f"boxes of images {what}"))
        if self.masks:
            what = "without a box, read as the box around it"
            many = "outlines or masks without a box, read as the boxes around them"
            notes.append(plural(self.masks, f"outline or mask {what}", many))
        if self.named_twice:
            notes.append(f"categories with several ids, read as one class: {', '.join(sorted(self.named_twice)[:3])}")
        if self.ids:
            notes.append(f"ids of categories aren't 1 to K ({', '.join(sorted(self.ids))}): classes go by their names")
        if self.several:
            notes.append(
                count_and_examples(self.several, "images in the files of several splits, used for the first of them")
            )
        return Annotations(
            annotation="boxes",
            targets=self.targets,
            classes=tuple(self.classes),
            splits=self.splits,
            missing=self.missing,
            notes=notes,
        )


def _objects(content: Json, key: str) -> list[Mapping[str, Json]]:
    """Raises ValueError for a list with anything else than objects."""
    objects = entries(content, key)
    for position, one in enumerate(objects):
        if not isinstance(one, Mapping):
            raise ValueError(f"has something else than an object in {key}[{position}]")
    return list(objects)


def _key(one: Mapping[str, Json], name: str) -> str:
    """An id, a number or a text, as a text: some tools write 17 here and "17" there. Raises ValueError."""
    value = one.get(name)
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        raise ValueError(f"has an entry without {name}: {str(dict(one))[:80]}")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _refuse_repeated_ids(images: Mapping[str, Mapping[str, Json]], listed: Sequence[Mapping[str, Json]]) -> None:
    if len(images) == len(listed):
        return
    for one in listed:
        if (kept := images[_key(one, "id")].get("file_name")) != one.get("file_name"):
            raise ValueError(f"has two images with the id {one['id']}: {one.get('file_name')} and {kept}")


def _read_categories(categories: Iterable[Mapping[str, Json]]) -> tuple[dict[str, str], str | None]:
    """The name of each id, in the order of the ids, and the name of the one that is the group of all others, which
    some tools add. Raises ValueError."""
    names: dict[str, str] = {}
    groups: dict[str, str] = {}
    for one in categories:
        identity, name = _key(one, "id"), parse_label(one.get("name"))
        if names.setdefault(identity, name) != name:
            raise ValueError(f"has two categories with the id {identity}: {names[identity]} and {name}")
        groups[name] = str(one.get("supercategory"))
    root = [name for name in groups if len(groups) > 1 and all(g == name for n, g in groups.items() if n != name)]
    ordered = sorted(
        names, key=lambda identity: (not identity.isdecimal(), int(identity) if identity.isdecimal() else 0, identity)
    )
    return {identity: names[identity] for identity in ordered}, root[0] if root else None


def _read_boxes(
    annotations: Sequence[Mapping[str, Json]], names: Mapping[str, str], found: _AllFiles
) -> tuple[dict[str, list[Box]], set[str]]:
    """By image id, and the names that are used. Raises ValueError."""
    boxes: dict[str, list[Box]] = defaultdict(list)
    used: set[str] = set()
    for position, one in enumerate(annotations):
        try:
            category = _key(one, "category_id")
            if category not in names:
                raise ValueError(f"has the category_id {category}, which isn't among its categories")
            corners, is_mask = _read_corners(one)
            image = _key(one, "image_id")
        except ValueError as error:
            raise ValueError(f"{error} (annotations[{position}], id {one.get('id')})") from error
        found.masks += is_mask
        used.add(names[category])
        crowd, ignored = bool(one.get("iscrowd")), bool(one.get("ignore"))
        boxes[image].append(Box(*corners, names[category], crowd, ignored))
    return boxes, used


def _read_corners(one: Mapping[str, Json]) -> tuple[Corners, bool]:
    """The sides of the box, and whether they are those of a mask. Raises ValueError."""
    box, mask = one.get("bbox"), one.get("segmentation")
    if box:
        left, top, width, height = parse_numbers(box, 4)
        return (left, top, left + width, top + height), False
    if isinstance(mask, Mapping):
        return enclose_mask(mask), True
    if isinstance(mask, list) and (parts := [part for part in mask if part]):
        points = [point for part in parts for point in _pair(part)]
        return enclose(points), True
    raise ValueError("has neither a bbox nor a segmentation")


def _pair(numbers: Json) -> list[tuple[float, float]]:
    """The points of one part of an outline [x, y, x, y, …]."""
    if not isinstance(numbers, list) or len(numbers) % 2:
        raise ValueError("has an outline that isn't a list of x and y")
    values = [parse_number(number) for number in numbers]
    return list(zip(values[::2], values[1::2], strict=True))


def _read_size(one: Mapping[str, Json]) -> tuple[float, float] | None:
    try:
        size = parse_number(one.get("height")), parse_number(one.get("width"))
    except ValueError:
        return None
    return size if min(size) > 0 else None


FORMAT = Format(name="coco", title="COCO", annotation="boxes", find=find, read=read, order=10)
