"""Recognises data for other tasks than classification: boxes, masks, numbers as targets.

suanli learns only classes so far, and says so instead of learning nonsense. Only names and labels are used here; no
file is opened.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from suanli.core.errors import DataError

MANY = 20  # different numbers in a label column, up to which they are always classes
_ONCE = 0.1  # of the different labels occur once: numbers that were measured, not names of classes
_MATCHED = 0.5  # of the pictures have a file of their name
_SIDE_FILES = {
    "xml": "boxes in Pascal VOC files",
    "json": "outlines or boxes in JSON files",
    "txt": "boxes in YOLO files, or texts",
}
_PICTURE_FOLDERS = re.compile("(image|img|jpegimage|picture|photo|input)s?|rgb|leftimg8bit", re.IGNORECASE)
_MASK_FOLDERS = re.compile(
    "(mask|label|annotation|segmentation|trimap)s?|segmentation(class|object)|gt|ground_?truth|gtfine|labelids",
    re.IGNORECASE,
)
_MASK_ENDING = re.compile(r"[-_ ](?:mask|gt|seg|segmentation|label|labels|labelids)(?:_\d+)?$", re.IGNORECASE)


def find_annotation(images: Sequence[str], others: Sequence[str]) -> str | None:
    """What the other files say about the pictures, with an example; None: nothing that is known. All are paths."""
    coco = [path for path in others if re.search(r"(instances|coco)[^/]*\.json$", path, re.IGNORECASE)]
    if images and coco:
        return f"boxes or outlines in a COCO file ({coco[0]})"
    by_stem = {_stem(path): path for path in images}
    for suffix, what in _SIDE_FILES.items():
        matching = {
            s: path for path in others if path.casefold().endswith(f".{suffix}") and (s := _stem(path)) in by_stem
        }
        if matching and len(matching) >= _MATCHED * len(by_stem):
            stem, path = min(matching.items(), key=lambda match: match[1])
            return f"{what} ({path} for {by_stem[stem]})"
    return None


def find_mask_folder(images_by_folder: Mapping[str, Sequence[str]]) -> str | None:
    """What a folder of masks beside a folder of pictures is, with an example; None: there is none."""
    pictures = [name for name in images_by_folder if _PICTURE_FOLDERS.fullmatch(name)]
    for name, masks in images_by_folder.items():
        if not _MASK_FOLDERS.fullmatch(name):
            continue
        by_stem = {_stem(path): path for folder in pictures for path in images_by_folder[folder]}
        matching = [path for path in masks if _mask_stem(path) in by_stem]
        if matching and len(matching) >= _MATCHED * len(masks):
            return f"masks in the folder {name} ({matching[0]} for {by_stem[_mask_stem(matching[0])]})"
    return None


def find_masks(images: Iterable[str]) -> list[str]:
    """The pictures that look like masks of others in the same folder: 1_mask.png beside 1.png."""
    images = list(images)
    candidates = [path for path in images if _MASK_ENDING.search(PurePosixPath(path).stem)]
    if not candidates:
        return []
    known = {str(PurePosixPath(path).with_suffix("")).casefold() for path in images}
    return [
        path
        for path in candidates
        if _MASK_ENDING.sub("", str(PurePosixPath(path).with_suffix(""))).casefold() in known
    ]


def unsupported_annotation_error(where: str, annotation: str) -> DataError:
    return DataError(
        f"{where} has {annotation}. Boxes and masks aren't supported yet: suanli learns one class for each picture.",
        fix="To classify, put each picture, or each part cut out of one, into a folder of its class (cat/1.jpg), or "
        "give a table with the columns path and label.",
    )


def refuse_numbers(where: str, labels: Sequence[str], *, fix: str) -> None:
    """Raises DataError where `labels` are numbers that were measured, not names of classes: more than 20 different
    ones, and with fractions, or many of them occur once."""
    counts = Counter(labels)
    if len(counts) <= MANY:
        return
    try:
        values = [float(label) for label in counts]
    except ValueError:
        return
    once = sum(count == 1 for count in counts.values())
    if once <= _ONCE * len(counts) and all(value.is_integer() for value in values):
        return
    raise DataError(
        f"{where} has {len(counts):,} different numbers as labels, from {min(values):g} to {max(values):g}; these "
        "are not classes. A number as target (regression) isn't supported yet.",
        fix=f"To classify, replace the numbers by a few classes, such as low, middle and high{fix}.",
    )


def _stem(path: str) -> str:
    return PurePosixPath(path).stem.casefold()


def _mask_stem(path: str) -> str:
    return _MASK_ENDING.sub("", _stem(path))
