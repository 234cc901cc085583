"""YOLO: a text file for each image (`labels/1.txt` for `images/1.jpg`, or beside it), a line an object: the number of
the class, and centre and size of the box as shares of the image's sides. Lines with an outline instead, also among the
others, are read as the box around it. `data.yaml`, if it is there, names classes and splits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from suanli.core.boxes import Box, Boxes
from suanli.data.annotated import Annotations, Files, Format, find_folder_splits, stem_of
from suanli.data.formats._boxes import enclose, parse_label, parse_number
from suanli.data.formats._yaml import Value, read_yaml
from suanli.data.members import count_and_examples
from suanli.data.split_names import parse_split

PEEKED = 20  # label files that say which format it is
PIXELS = 2.0  # a share of a side is at most about 1; from here on it must be pixels
KEYS = ("names", "nc", "path", "train", "val", "valid", "test", "kpt_shape")
_ROW = re.compile(r"\s*\d+(\.0*)?(\s+[-+\d.e]+){4,}\s*", re.IGNORECASE)
_NAMES = re.compile(r"(?:.*/)?(classes\.txt|obj\.names|[^/]*\.names|_darknet\.labels)", re.IGNORECASE)
_DESCRIBES = re.compile(r"^\s*['\"]?names['\"]?\s*:", re.MULTILINE)


def find(files: Files) -> list[str]:
    """The description, if there is one, then the label files."""
    described = _find_description(files)
    labels = list(_pair_labels(files).values())
    filled = (text for path in labels if (text := _peek(files, path).strip()))
    rows = [text.splitlines()[0] for text in islice(filled, PEEKED)]
    if files.named is not None and not described:
        return []
    if not labels or 2 * sum(map(bool, map(_ROW.fullmatch, rows))) < len(rows) or not (rows or described):
        return []
    return [*described, *labels]


def read(files: Files, paths: Sequence[str]) -> Annotations:
    described = [path for path in paths if path.endswith((".yaml", ".yml"))]
    values = read_yaml(files, described[0], KEYS) if described else {}
    notes = [f"{described[0]} used, {', '.join(described[1:])} not"] if len(described) > 1 else []
    names, origin = _read_names(files, described, values)
    labels = _Labels(files=files, names=names, keypoints=_count_keypoints(values), origin=origin)
    pairs = _pair_labels(files)
    targets = {image: labels.read(path) for image, path in pairs.items()}
    known = set(pairs.values())
    folders = {path.rpartition("/")[0] for path in known}
    alone = [
        path
        for path in files.all_others
        if path.endswith(".txt") and path not in known and path.rpartition("/")[0] in folders and not _NAMES.match(path)
    ]
    missing = [stem_of(path) for path in alone if _ROW.match(_peek(files, path))]
    splits: dict[str, str] = {}
    if described:
        splits, more = _read_splits(files, described[0], values)
        notes += more
    if empty := [image for image, target in targets.items() if not target.boxes]:
        what = "with an empty label file, kept as background"
        notes.append(count_and_examples(empty, f"images {what}", f"image {what}"))
    return Annotations(
        annotation="boxes",
        targets=targets,
        classes=labels.classes if any(target.boxes for target in targets.values()) else (),
        unlabelled=Boxes(),
        splits={**find_folder_splits(files.images), **splits} if splits else {},
        missing=missing,
        notes=[*notes, *labels.notes],
    )


def _find_description(files: Files) -> list[str]:
    """Files like data.yaml, the one nearest to the top first."""
    paths = [path for path in files.with_suffix("yaml", "yml") if _DESCRIBES.search(_peek(files, path))]
    return sorted(paths, key=lambda path: (path.count("/"), path))


def _peek(files: Files, path: str) -> str:
    return files.read(path).decode("utf-8-sig", errors="replace")


def _pair_labels(files: Files) -> dict[str, str]:
    """The label file of each image: in a folder `labels` in place of `images`, beside it, or else the only one of its
    name below a folder of labels."""
    by_stem: dict[str, list[str]] = defaultdict(list)
    texts = {path for path in files.all_others if path.casefold().endswith(".txt") and not _NAMES.match(path)}
    for path in texts:
        if "label" in path.rpartition("/")[0].casefold():
            by_stem[stem_of(path).casefold()].append(path)
    pairs = {}
    for image in files.images:
        folder, slash, name = image.rpartition("/")
        parts = folder.split("/")
        places = [i for i, part in enumerate(parts) if part.casefold() in ("images", "jpegimages", "imgs", "img")]
        swapped = ["/".join([*parts[:i], "labels", *parts[i + 1 :]]) + "/" for i in reversed(places)]
        candidates = [f"{place}{stem_of(name)}.txt" for place in (*swapped, f"{folder}{slash}")]
        found = [path for path in candidates if path in texts]
        others = by_stem.get(stem_of(name).casefold(), [])
        if found or len(others) == 1:
            pairs[image] = (found or others)[0]
    return pairs


def _read_names(files: Files, described: Sequence[str], values: Mapping[str, Value]) -> tuple[list[str] | None, str]:
    """The names of the classes by their numbers, and the file that has them; None: no file names them."""
    if described and (names := values.get("names")):
        path = described[0]
        try:
            if isinstance(names, str):
                raise ValueError("has names that are neither a list nor a mapping")
            if isinstance(names, dict):
                numbers = sorted(int(parse_number(key)) for key in names)
                if numbers != list(range(len(numbers))):
                    raise ValueError(f"has names whose numbers aren't 0 to {len(numbers) - 1}")
                names = [names[key] for key in sorted(names, key=lambda key: int(parse_number(key)))]
            return [parse_label(name) for name in names], path
        except ValueError as error:
            raise files.error(path, str(error)) from error
    lists = [path for path in files.all_others if _NAMES.fullmatch(path)]
    if not lists:
        return None, ""
    path = min(lists, key=lambda path: (path.count("/"), path))
    lines = [line for line in files.text(path).splitlines() if line.strip()]
    try:
        return [parse_label(line) for line in lines], path
    except ValueError as error:
        raise files.error(path, str(error)) from error


def _count_keypoints(values: Mapping[str, Value]) -> int:
    """The numbers of a line that are of points of a pose, behind its box."""
    shape = values.get("kpt_shape")
    if not isinstance(shape, list):
        return 0
    count = 1
    for side in shape:
        count *= int(side) if side.isdecimal() and len(side) < 5 else 0
    return count


@dataclass(kw_only=True)
class _Labels:
    """Reads label files and remembers what was unusual in them."""

    files: Files
    names: list[str] | None
    keypoints: int
    origin: str
    outlines: list[str] = field(default_factory=list)  # files with outlines
    mixed: list[str] = field(default_factory=list)  # files with boxes, too
    highest: int = -1

    def read(self, path: str) -> Boxes:
        boxes, shapes = [], 0
        for number, line in enumerate(self.files.text(path).splitlines(), start=1):
            if not (words := line.split()):
                continue
            try:
                box, is_outline = self._parse(words)
            except ValueError as error:
                raise self.files.error(path, str(error), line=number) from error
            boxes.append(box)
            shapes += is_outline
        if shapes:
            (self.outlines if shapes == len(boxes) else self.mixed).append(path)
        return Boxes(tuple(boxes), relative=True)

    def _parse(self, words: Sequence[str]) -> tuple[Box, bool]:
        """Raises ValueError."""
        label, *numbers = [parse_number(word) for word in words]
        if label < 0 or not label.is_integer():
            raise ValueError(f"has {words[0]} where the number of a class belongs")
        if self.names is not None and label >= len(self.names):
            raise ValueError(f"has the class {int(label)}, and {self.origin} names {len(self.names)}, from 0 on")
        self.highest = max(self.highest, int(label))
        name = str(int(label)) if self.names is None else self.names[int(label)]
        if self.keypoints and len(numbers) == 4 + self.keypoints:
            numbers = numbers[:4]
        if len(numbers) not in (4, 5) and (len(numbers) < 6 or len(numbers) % 2):
            raise ValueError(f"has {len(words)} numbers; a box has 5, an outline 7 or more, always an odd count")
        if max(map(abs, numbers)) > PIXELS:
            raise ValueError("has pixels; coordinates must be shares of the image's sides, from 0 to 1")
        if len(numbers) in (4, 5):  # the fifth is a probability
            x, y, width, height = numbers[:4]
            return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2, name), False
        return Box(*enclose(zip(numbers[::2], numbers[1::2], strict=True)), name), True

    @property
    def classes(self) -> tuple[str, ...]:
        if self.names is None:
            return tuple(str(number) for number in range(self.highest + 1))
        return tuple(dict.fromkeys(self.names))

    @property
    def notes(self) -> list[str]:
        notes = []
        if self.mixed:
            what = "with outlines among boxes, read as the boxes around them"
            notes.append(count_and_examples(self.mixed, f"label files {what}", f"label file {what}"))
        if self.outlines:
            what = "of outlines, read as the boxes around them"
            notes.append(count_and_examples(self.outlines, f"label files {what}", f"label file {what}"))
        if self.names is None:
            notes.append("no file names the classes (data.yaml or classes.txt), so they have numbers")
        elif twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            notes.append(f"classes with several numbers, read as one: {', '.join(twice[:3])}")
        return notes


# --- the splits of data.yaml ----------------------------------------------------------------


def _read_splits(files: Files, path: str, values: Mapping[str, Value]) -> tuple[dict[str, str], list[str]]:
    """The split of each image that the description states, and notes."""
    by_image: dict[str, list[str]] = defaultdict(list)
    lost, notes = [], []
    for key in ("test", "val", "valid", "train"):
        value = values.get(key)
        for place in [value] if isinstance(value, str) else value or ():
            if place in ("", "null", "~", "None"):
                continue
            images = _find_listed(files, place)
            if not images:
                lost.append(f"{key}: {place}")
            for image in images:
                by_image[image].append(parse_split(key) or key)
    if lost:
        notes.append(f"{path} names places without images: {', '.join(lost[:3])}")
    several = [image for image, splits in by_image.items() if len(set(splits)) > 1]
    if several:
        notes.append(count_and_examples(several, f"images in several splits of {path}, used for the last of them"))
    if several and len(several) == sum("train" in splits for splits in by_image.values()):
        return {}, notes  # the same place for training and validation: nothing would be left to train on
    return {image: splits[0] for image, splits in by_image.items()}, notes


def _find_listed(files: Files, place: str) -> list[str]:
    """The images of a folder, or of a text file that lists them; either may be a path of another machine."""
    parts = [
        part for part in re.sub(r"^[A-Za-z]:", "", place.replace("\\", "/")).split("/") if part not in ("", ".", "..")
    ]
    if place.endswith(".txt"):
        lists = [other for other in files.all_others if other.rpartition("/")[2] == parts[-1]]
        if not lists:
            return []
        lines = files.text(lists[0]).splitlines()
        images = [files.find_image(line, beside=lists[0]) for line in lines if line.strip()]
        return [image for image in images if image is not None]
    for start in range(len(parts)):
        tail = "/".join(parts[start:]) + "/"
        if found := [image for image in files.images if f"/{image}".find(f"/{tail}") >= 0]:
            return found
    return [*files.images] if not parts else []


FORMAT = Format(name="yolo", title="YOLO", annotation="boxes", find=find, read=read, order=60)
