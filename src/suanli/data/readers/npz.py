"""Reads NumPy's .npz files with arrays of images and labels under the usual names.

Arrays are loaded as a whole, since a compressed one can't be read in parts. Their headers are checked before that (see
`_stored_arrays`). Nothing is unpickled.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.core.errors import DataError
from suanli.core.types import Columns, Example, Reader, Source, Target
from suanli.data.members import count_and_examples, fingerprint_of, order_classes, source_name
from suanli.data.readers._annotations import LEARNED_AS_NUMBERS, choose_annotation, numbers_error
from suanli.data.readers._stored_arrays import (
    check_images,
    check_labels,
    check_names,
    check_total,
    labels_error,
    load_array,
    read_header,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PAIRS = tuple(itertools.product(("x", "images", "image", "data"), ("y", "labels", "label", "target", "targets")))
_SPLIT_WORDS = (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test"))
_CLASS_NAMES = ("class_names", "classes", "label_names", "target_names")
USUAL = "x_train and y_train (also _val, _test), train_images and train_labels, images and labels, X and y"
_DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, KeyError)


@dataclass(frozen=True, slots=True)
class _SplitArrays:
    """The arrays of one split."""

    split: str | None
    images: NDArray[Any]
    labels: NDArray[Any]
    name: str  # of the array with the images


def why_not(path: Path) -> str | None:
    return None if path.suffix.casefold() == ".npz" and not path.is_dir() else "not an .npz file"


def read(path: Path, columns: Columns) -> Source:
    """The images in `path`: (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1, 3 or 4; labels (N,), (N, 1) or one-hot
    (N, K). Raises DataError for anything else, and for a damaged file."""
    try:
        return _make_source(path, *_load(path), columns.annotation)
    except MemoryError as error:
        raise DataError(
            f"The arrays in {path} don't fit into the free memory.",
            fix="Save the images as files in class folders, or use a machine with more memory.",
        ) from error


def _make_source(path: Path, parts: list[_SplitArrays], names: list[str], wanted: str | None) -> Source:
    scale, notes = _find_scale(path, parts)
    annotation, classes, targets, more = _find_targets(path, parts, names, wanted)
    rows: list[Example] = []
    for part, values in zip(parts, targets, strict=True):
        images = _to_channels_last(part.images)
        rows += [
            Example(
                name=f"{part.name}[{i}]",
                target=target,
                split=part.split,
                read=partial(_read_image, images, i, scale),
            )
            for i, target in enumerate(values)
        ]
    about = path.stat()
    return Source(
        name=source_name(path.stem),
        kind="image",
        examples=rows,
        annotation=annotation,
        classes=classes,
        fingerprint=fingerprint_of([about.st_size, about.st_mtime_ns]),
        size_bytes=sum(part.images.size for part in parts),
        notes=(*notes, *more),
    )


def _find_targets(
    path: Path, parts: list[_SplitArrays], names: list[str], wanted: str | None
) -> tuple[str, tuple[str, ...], list[list[Target]], tuple[str, ...]]:
    """What the targets are, the classes, the targets of each part, and notes."""
    if wanted in (None, "labels") and _are_label_lists(parts, one_each=wanted is not None):
        count = parts[0].labels.shape[1]
        classes = tuple(names) if len(set(names)) == count else tuple(map(str, range(count)))
        lists: list[list[Target]] = [
            [tuple(classes[j] for j in row.nonzero()[0]) for row in part.labels.astype(bool)] for part in parts
        ]
        return "labels", classes, lists, (f"rows of {count} labels of 0 and 1 read as several labels",)
    labels = [_read_labels(path, part, wanted) for part in parts]
    every = list(itertools.chain.from_iterable(labels))
    notes: tuple[str, ...] = ()
    if wanted is None and any(_has_fractions(part.labels) for part in parts):
        wanted = "value"
        notes = (f"labels with fractions are {LEARNED_AS_NUMBERS}",)
    annotation, more = choose_annotation(str(path), every, "class" if names else wanted)
    if annotation == "value":
        values = [
            [_parse(path, p, i, one) for i, one in enumerate(part)] for p, part in zip(parts, labels, strict=True)
        ]
        return annotation, (), values, (*notes, *more)
    classes = _name_classes(path, parts, every, names)
    named = [[names[int(label)] for label in part] for part in labels] if names else labels
    return annotation, classes, named, (*notes, *more)


def _are_label_lists(parts: list[_SplitArrays], *, one_each: bool) -> bool:
    """Whether all labels are rows of 0 and 1, one entry a class, and not all rows have a single 1, unless that is
    allowed (`one_each`)."""
    import numpy as np

    labels = [part.labels for part in parts]
    if len({one.shape[1:] for one in labels}) > 1 or any(one.ndim != 2 or one.shape[1] < 2 for one in labels):
        return False
    if any(one.dtype.kind not in "buif" or not np.isin(one, (0, 1)).all() for one in labels):
        return False
    return not all(one.all() for one in labels) and (one_each or not all(map(_is_one_hot, labels)))


def _load(path: Path) -> tuple[list[_SplitArrays], list[str]]:
    """The arrays to use, and the class names if there are some."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            pairs, class_names = _find(path, list(infos))
            used = dict.fromkeys([*itertools.chain.from_iterable(pair[1:] for pair in pairs), *class_names])
            headers = {name: read_header(archive, name, infos[name]) for name in used}
            for _, images, labels in pairs:
                check_images(path, headers[images])
                check_labels(path, headers[images], headers[labels])
            for name in class_names:
                check_names(path, headers[name])
            check_total(path, sum(header.info.file_size for header in headers.values()))
            # Not by numpy.load, which may read another member of the same name than was checked.
            arrays = {name: load_array(archive, header.info) for name, header in headers.items()}
    except _DAMAGED as error:
        raise DataError(
            f"The file {path} is damaged or not an .npz of plain arrays ({error}).",
            fix="Save it again with numpy.savez_compressed and arrays of numbers, not of objects.",
        ) from error
    except OSError as error:
        raise DataError(f"The file {path} can't be read: {error}.", fix="Give a file you may read.") from error
    parts = [_SplitArrays(split, arrays[images], arrays[labels], images) for split, images, labels in pairs]
    return parts, [_text(value) for name in class_names for value in arrays[name].ravel()]


def _find(path: Path, stored: list[str]) -> tuple[list[tuple[str | None, str, str]], list[str]]:
    """The names (split, images, labels) of the arrays to use, and of the array of class names if there is one."""
    by_name = {name.casefold(): name for name in stored}
    pairs: dict[str | None, tuple[str, str]] = {}
    for (word, split), (x, y) in itertools.product(_SPLIT_WORDS, _PAIRS):
        for images, labels in ((f"{x}_{word}", f"{y}_{word}"), (f"{word}_{x}", f"{word}_{y}")):
            if images in by_name and labels in by_name:
                pairs.setdefault(split, (by_name[images], by_name[labels]))
    if not pairs:
        for x, y in _PAIRS:
            if x in by_name and y in by_name:
                pairs.setdefault(None, (by_name[x], by_name[y]))
    if None not in pairs and "train" not in pairs:
        raise DataError(
            f"The file {path} has no arrays with the usual names; it has: {', '.join(sorted(stored)[:20])}.",
            fix=f"Save them as {USUAL}.",
        )
    class_names = [by_name[name] for name in _CLASS_NAMES if name in by_name][:1]
    return [(split, *names) for split, names in pairs.items()], class_names


def _find_scale(path: Path, parts: list[_SplitArrays]) -> tuple[float, list[str]]:
    """The factor, one for all splits, that scales the values to 0…255; and notes."""
    import numpy as np

    kinds = {part.images.dtype.kind for part in parts}
    if all(part.images.dtype == np.uint8 for part in parts):
        return 1.0, []
    if not kinds <= set("buif"):
        raise DataError(f"{path}: the images are {parts[0].images.dtype}, not numbers.", fix="Save uint8.")
    low = min(float(part.images.min()) for part in parts)
    high = max(float(part.images.max()) for part in parts)
    if not (low >= 0 and high < 65536):  # also false for NaN
        raise DataError(
            f"{path}: the images have values from {low:g} to {high:g}; 0 to 1 or 0 to 255 can be read.",
            fix="Save them as uint8 before any normalisation.",
        )
    if "b" in kinds or ("f" in kinds and high <= 1):
        return 255.0, [f"values from {low:g} to {high:g} were multiplied by 255"]
    if high <= 255:
        return 1.0, [f"values from {low:g} to {high:g} ({parts[0].images.dtype}) were rounded to whole numbers"]
    if kinds == {"u"}:
        return 1 / 257, ["16-bit values were reduced to 8 bits"]
    raise DataError(
        f"{path}: the images have values from {low:g} to {high:g}; 0 to 1 or 0 to 255 can be read.",
        fix="Save them as uint8.",
    )


def _read_image(images: NDArray[Any], position: int, scale: float) -> np.ndarray:
    """One image as uint8, (H, W) or (H, W, C)."""
    import numpy as np

    image: np.ndarray = images[position]
    if image.dtype == np.uint8 and scale == 1.0:
        return np.ascontiguousarray(image)
    return np.rint(image.astype(np.float64) * scale).astype(np.uint8)


def _to_channels_last(images: NDArray[Any]) -> NDArray[Any]:
    """Images (N, H, W) or (N, H, W, C) with 3 or 4 channels."""
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return images


def _read_labels(path: Path, part: _SplitArrays, wanted: str | None) -> list[str]:
    """One text per row: '3' for the number 3, the position of the 1 for one-hot labels, unless numbers are wanted."""
    import numpy as np

    labels = part.labels
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    numbers = labels.dtype.kind in "buif"
    if labels.ndim == 2 and wanted != "value" and numbers and _is_one_hot(labels):
        labels = labels.argmax(axis=1)
    if labels.ndim != 1:
        raise labels_error(path, part.name, part.labels)
    if labels.dtype.kind == "f" and not (labels == np.rint(labels)).all():
        return [str(value) for value in labels.tolist()]
    if numbers:
        return [str(value) for value in labels.astype(np.int64).tolist()]
    return [_text(value) for value in labels]


def _is_one_hot(labels: NDArray[Any]) -> bool:
    import numpy as np

    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all())


def _has_fractions(labels: NDArray[Any]) -> bool:
    import numpy as np

    return labels.dtype.kind == "f" and bool((np.isfinite(labels) & (labels != np.rint(labels))).any())


def _parse(path: Path, part: _SplitArrays, position: int, label: str) -> float:
    """The number, which may be NaN: then the example is a bad one. Raises DataError for a text."""
    try:
        return float(label)
    except ValueError as error:
        raise numbers_error(f"The labels of {part.name} in {path}", [f"{label!r} at position {position}"]) from error


def _name_classes(path: Path, parts: list[_SplitArrays], labels: list[str], names: list[str]) -> tuple[str, ...]:
    """The class names in the file, or else the labels."""
    import numpy as np

    for part in parts:
        if part.labels.dtype.kind == "f" and not np.isfinite(part.labels).all():
            raise DataError(
                f"{path}: the labels of {part.name} are not all finite numbers.",
                fix="Save whole numbers, one for each class. With --set task=regression, such examples are left out.",
            )
    classes = order_classes(labels)
    if len(classes) < 2:
        message = f"{path} has only one class, {classes[0]!r}; at least two are needed."
        raise DataError(message, fix="Add another class.")
    if not names:
        return classes
    outside = [label for label in classes if not label.isdecimal() or int(label) >= len(names)]
    if outside or len(set(names)) < len(names):
        problem = count_and_examples(outside, "labels outside of it") if outside else "with a name twice"
        raise DataError(
            f"{path} has a list of {len(names)} class names, {problem}.",
            fix="Save whole numbers from 0 as labels, and one name for each.",
        )
    return tuple(names)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


READER = Reader(name="npz", why_not=why_not, read=read, order=10)
