"""NumPy's .npz with arrays of images and labels under the usual names.

Arrays are loaded whole: a compressed array can't be read in parts. Before that the shapes are read
from their headers and held against the limits, and nothing is unpickled.
"""

from __future__ import annotations

import itertools
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.console import size
from suanli.errors import DataError
from suanli.readers._class_folders import class_order, count_and_examples, fingerprint_of, source_name
from suanli.types import Columns, Reader, Row, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 32 << 30  # of all arrays that are used
MAX_RATIO = 1100  # deflate can't do better than 1032

_PAIRS = tuple(itertools.product(("x", "images", "image", "data"), ("y", "labels", "label", "target", "targets")))
_SPLIT_WORDS = (("train", "train"), ("val", "val"), ("valid", "val"), ("test", "test"))
_CLASS_NAMES = ("class_names", "classes", "label_names", "target_names")
USUAL = "x_train and y_train (also _val, _test), train_images and train_labels, images and labels, X and y"
_DAMAGED = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError, KeyError)


@dataclass(frozen=True, slots=True)
class _Part:
    """The arrays of one split."""

    split: str | None
    images: NDArray[Any]
    labels: NDArray[Any]
    name: str  # of the array with the images


def why_not(path: Path) -> str | None:
    return None if path.suffix.casefold() == ".npz" and not path.is_dir() else "not an .npz file"


def read(path: Path, columns: Columns) -> Source:  # noqa: ARG001  # the arrays have usual names
    """The images in `path`: (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1, 3 or 4; labels (N,),
    (N, 1) or one-hot (N, K). Raises DataError for anything else, and for a damaged file."""
    try:
        parts, names = _load(path)
    except _DAMAGED as error:
        raise DataError(
            f"The file {path} is damaged or no .npz of plain arrays ({error}).",
            fix="Save it again with numpy.savez_compressed and arrays of numbers, not of objects.",
        ) from error
    except OSError as error:
        raise DataError(f"The file {path} can't be read: {error}.", fix="Give a file you may read.") from error
    scale, notes = _scale(path, parts)
    labels = [_labels(path, part) for part in parts]
    classes = _classes(path, labels, names)
    rows: list[Row] = []
    for part, values in zip(parts, labels, strict=True):
        images = _channels_last(path, part)
        if len(images) != len(values):
            raise DataError(
                f"{path}: {part.name} has {len(images):,} images, but there are {len(values):,} labels.",
                fix="Save as many labels as images.",
            )
        rows += [
            Row(
                name=f"{part.name}[{i}]",
                label=names[int(value)] if names else value,
                split=part.split,
                read=partial(_image, images, i, scale),
            )
            for i, value in enumerate(values)
        ]
    about = path.stat()
    return Source(
        name=source_name(path.stem),
        kind="image",
        rows=rows,
        classes=classes,
        fingerprint=fingerprint_of([about.st_size, about.st_mtime_ns]),
        size_bytes=sum(part.images.size for part in parts),
        notes=tuple(notes),
    )


def _load(path: Path) -> tuple[list[_Part], list[str]]:
    import numpy as np

    with zipfile.ZipFile(path) as archive:
        stored = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        wanted, class_names = _find(path, list(stored))
        for name in {*itertools.chain.from_iterable(w[1:] for w in wanted), *class_names}:
            _check_header(path, archive, name, stored[name])
        total = sum(stored[images].file_size for _, images, _ in wanted)
        if total > MAX_BYTES:
            raise DataError(
                f"The arrays in {path} have {size(total)}; the limit is {size(MAX_BYTES)}.",
                fix="Save the images as files in class folders.",
            )
    with np.load(path, allow_pickle=False) as arrays:
        parts = [_Part(split, arrays[images], arrays[labels], images) for split, images, labels in wanted]
        names = [_text(value) for name in class_names for value in arrays[name].ravel()]
    for part in parts:
        if len(part.images) == 0:
            raise DataError(f"{path}: {part.name} is empty.", fix="Save at least a few images.")
    return parts, names


def _find(path: Path, stored: list[str]) -> tuple[list[tuple[str | None, str, str]], list[str]]:
    """(split, images, labels) of the arrays to use, and the array of class names if there is one."""
    by_name = {name.casefold(): name for name in stored}
    found: dict[str | None, tuple[str, str]] = {}
    for (word, split), (x, y) in itertools.product(_SPLIT_WORDS, _PAIRS):
        for images, labels in ((f"{x}_{word}", f"{y}_{word}"), (f"{word}_{x}", f"{word}_{y}")):
            if images in by_name and labels in by_name:
                found.setdefault(split, (by_name[images], by_name[labels]))
    if not found:
        for x, y in _PAIRS:
            if x in by_name and y in by_name:
                found.setdefault(None, (by_name[x], by_name[y]))
    if None not in found and "train" not in found:
        raise DataError(
            f"The file {path} has no arrays with the usual names; it has: {', '.join(sorted(stored)[:20])}.",
            fix=f"Save them as {USUAL}.",
        )
    wanted = [(split, *names) for split, names in found.items()]
    return wanted, [by_name[name] for name in _CLASS_NAMES if name in by_name][:1]


def _check_header(path: Path, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> None:
    """The array's header promises what its member holds, and plain numbers or text."""
    from numpy.lib import format as npy

    if info.file_size > MAX_RATIO * max(info.compress_size, 1):
        raise DataError(
            f"{name} in {path} unpacks from {size(info.compress_size)} to {size(info.file_size)}: "
            "it looks like a decompression bomb.",
            fix="Get the file from a source that you trust.",
        )
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(stream)
        count = 1
        for length in shape:
            count *= length
        if dtype.hasobject:
            raise ValueError(f"{name} holds Python objects, which are not loaded")
        if count * dtype.itemsize + stream.tell() != info.file_size:
            raise ValueError(f"{name} doesn't have the size that its header says")


def _scale(path: Path, parts: list[_Part]) -> tuple[float, list[str]]:
    """The factor that brings the values of all splits to 0…255; the same for all of them."""
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


def _image(images: NDArray[Any], position: int, scale: float) -> np.ndarray:
    """One image as uint8, (H, W) or (H, W, C)."""
    import numpy as np

    image: np.ndarray = images[position]
    if image.dtype == np.uint8 and scale == 1.0:
        return np.ascontiguousarray(image)
    return np.rint(image.astype(np.float64) * scale).astype(np.uint8)


def _channels_last(path: Path, part: _Part) -> NDArray[Any]:
    images = part.images
    if images.ndim == 4 and images.shape[3] not in (1, 3, 4) and images.shape[1] in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (3, 4)):
        return images
    raise DataError(
        f"{path}: {part.name} has the shape {part.images.shape}, which isn't one of images.",
        fix="Save (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels.",
    )


def _labels(path: Path, part: _Part) -> list[str]:
    """One text a row: '3' for a number, the position of the one for one-hot labels."""
    import numpy as np

    labels = part.labels
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    numbers = labels.dtype.kind in "buif"
    if labels.ndim == 2 and numbers and np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
        labels = labels.argmax(axis=1)
    if labels.ndim != 1 or not (numbers or labels.dtype.kind in "SU"):
        raise DataError(
            f"{path}: the labels of {part.name} have the shape {part.labels.shape} and type "
            f"{part.labels.dtype}; one label a row is needed.",
            fix="Save whole numbers or names of shape (N,), or one-hot rows.",
        )
    if labels.dtype.kind == "f" and not (labels == np.rint(labels)).all():
        raise DataError(f"{path}: the labels of {part.name} are fractions.", fix="Save whole numbers.")
    if numbers:
        return [str(value) for value in labels.astype(np.int64).tolist()]
    return [_text(value) for value in labels]


def _classes(path: Path, labels: list[list[str]], names: list[str]) -> tuple[str, ...]:
    found = class_order(itertools.chain.from_iterable(labels))
    if len(found) < 2:
        raise DataError(f"{path} has only one class, {found[0]!r}; at least two are needed.", fix="Add another class.")
    if not names:
        return found
    odd = [label for label in found if not label.isdecimal() or int(label) >= len(names)]
    if odd or len(set(names)) < len(names):
        shown = count_and_examples(odd, "labels outside of it") if odd else "with a name twice"
        raise DataError(
            f"{path} has a list of {len(names)} class names, {shown}.",
            fix="Save whole numbers from 0 as labels, and one name for each.",
        )
    return tuple(names)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


READER = Reader(name="npz", why_not=why_not, read=read, order=10)
