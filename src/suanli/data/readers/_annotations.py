"""Recognises what labels are: names of classes, or numbers that were measured; and data that can't be learned, masks
and files of annotations in no known format, which is refused instead of learning nonsense. Only names and labels are
used here; no file is opened.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from suanli.core.errors import DataError
from suanli.data.annotated import MASK_FOLDERS
from suanli.data.file_names import normalise_name

MANY = 20  # different numbers in a label column, up to which they are always classes
LEARNED_AS_NUMBERS = "learned as numbers (regression); --set task=classification learns them as classes"
_MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
_ONCE = 0.1  # of the different labels occur once: numbers that were measured, not names of classes
_MATCHED = 0.5  # of the pictures have a file of their name
_SIDE_FILES = {
    "xml": "XML files named like its images",
    "json": "JSON files named like its images",
    "txt": "text files named like its images",
}
_PICTURE_FOLDERS = re.compile("(image|img|jpegimage|picture|photo|input)s?|rgb|leftimg8bit", re.IGNORECASE)
_MASK_ENDING = re.compile(r"[-_ ](?:mask|gt|seg|segmentation|label|labels|labelids)(?:_\d+)?$", re.IGNORECASE)


def find_annotation(images: Sequence[str], others: Sequence[str]) -> str | None:
    """What the other files say about the pictures, with an example; None: nothing that is known. All are paths."""
    coco = [path for path in others if re.search(r"(instances|coco)[^/]*\.json$", path, re.IGNORECASE)]
    if images and coco:
        return f"a JSON file named like those of COCO ({coco[0]})"
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
        if not MASK_FOLDERS.fullmatch(name):
            continue
        by_stem = {_stem(path): path for folder in pictures for path in images_by_folder[folder]}
        matching = [path for path in masks if _mask_stem(path) in by_stem]
        if matching and len(matching) >= _MATCHED * len(masks):
            return f"masks in the folder {name} ({matching[0]} for {by_stem[_mask_stem(matching[0])]})"
    return None


def find_masks(images: Iterable[str]) -> list[str]:
    """The pictures that look like masks of others in the same folder: 1_mask.png beside 1.png."""
    images = list(images)
    candidates = [path for path in images if _MASK_ENDING.search(_stem(path))]
    if not candidates:
        return []
    known = {str(PurePosixPath(path).with_suffix("")).casefold() for path in images}
    return [
        path
        for path in candidates
        if _MASK_ENDING.sub("", str(PurePosixPath(path).with_suffix(""))).casefold() in known
    ]


def masks_error(where: str, masks: str) -> DataError:
    return DataError(
        f"{where} has {masks}. Masks aren't supported yet: suanli learns a class, a number or boxes for each image.",
        fix="To classify, put each image, or each part cut out of one, into a folder of its class (cat/1.jpg), or "
        "give a table with the columns path and label.",
    )


def choose_annotation(where: str, labels: Sequence[str], wanted: str | None) -> tuple[str, tuple[str, ...]]:
    """What the labels are, "class" or "value", and notes: what the user `wanted`, or else what they look like. Numbers
    look measured where there are more than 20 different ones, and fractions among them. Raises DataError for whole
    numbers of which many occur once: they may be either."""
    counts = Counter(label for label in labels if label.casefold() not in _MISSING)
    if wanted in ("class", "value"):
        return wanted, ()
    if len(counts) <= MANY:
        return "class", ()
    try:
        values = [parse_value(label) for label in counts]
    except ValueError:
        return "class", ()
    about = f"{len(counts):,} different numbers as labels, from {min(values):g} to {max(values):g}"
    if not all(value.is_integer() for value in values):
        return "value", (f"{where} has {about}, {LEARNED_AS_NUMBERS}",)
    if sum(count == 1 for count in counts.values()) <= _ONCE * len(counts):
        return "class", ()
    raise DataError(
        f"{where} has {about}; these are not classes.",
        fix="Learn them as numbers with --set task=regression, or name another column with --label-column. To "
        "classify, replace them by a few classes, such as low, middle and high; or if they are names, add "
        "--set task=classification.",
    )


def parse_label(label: str, annotation: str) -> str | float | None:
    """The target that a cell says; None: it says that there is none. Raises ValueError for what is no number, where
    targets are."""
    if annotation == "class":
        return normalise_name(label) or None
    return None if label.casefold() in _MISSING else parse_value(label)


def parse_value(label: str) -> float:
    """The number that a label is, in the form of programs ("-1234.5", "1e3"). Raises ValueError for anything else, and
    for one beyond float64."""
    if not _NUMBER.fullmatch(label) or not math.isfinite(value := float(label)):
        raise ValueError(label)
    return value


def numbers_error(where: str, wrong: Sequence[str]) -> DataError:
    """`wrong` says what is no number, and where."""
    more = f", and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    return DataError(
        f"{where} must have numbers, and has {', '.join(wrong[:3])}{more}.",
        fix="Write numbers like -1234.5 or 1e3, and leave the cell empty where the number isn't known.",
    )


def _stem(path: str) -> str:
    """As `PurePosixPath(path).stem.casefold()`, in a tenth of the time: a data set may have a million names."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return (name[:dot] if 0 < dot < len(name) - 1 else name).casefold()


def _mask_stem(path: str) -> str:
    return _MASK_ENDING.sub("", _stem(path))
