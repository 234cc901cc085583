"""Checks the arrays of an .npz file by their headers, before one is loaded.

Zeros compress to a thousandth, so a small file can hold more than the memory, and a header can claim anything. So
shapes, types and sizes are compared with limits and with each other.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suanli.core.console import size
from suanli.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BYTES = 32 << 30  # of all arrays that are used; at most the machine's memory
MAX_IMAGES = 10_000_000  # in one split
MAX_CLASSES = 1 << 20
MAX_NAME_BYTES = 4000  # of a class: 1,000 characters in NumPy
MAX_HEADER_BYTES = 1 << 16  # of an array


@dataclass(frozen=True, slots=True)
class ArrayHeader:
    """An array that isn't loaded yet."""

    name: str
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_header(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> ArrayHeader:
    """The header of an array. Raises ValueError unless it is one of plain numbers or text and has the member's size."""
    from numpy.lib import format as npy

    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in a way that NumPy doesn't use")
    with archive.open(info) as member:
        stream = io.BytesIO(member.read(MAX_HEADER_BYTES))
    version = npy.read_magic(stream)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not loaded")
    if dtype.kind not in "buifSU":
        raise ValueError(f"{name} holds {dtype}, neither numbers nor text")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize + stream.tell() != info.file_size:
        raise ValueError(f"{name} doesn't have the size that its header says")
    return ArrayHeader(name, info, shape, dtype)


def load_array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    from numpy.lib import format as npy

    with archive.open(info) as stream:
        array: NDArray[Any] = npy.read_array(stream, allow_pickle=False)
    return array


def check_images(path: Path, images: ArrayHeader) -> None:
    shape = images.shape
    if shape[:1] == (0,):
        raise DataError(f"{path}: {images.name} is empty.", fix="Save at least a few images.")
    with_channels = len(shape) == 4 and (shape[3] in (1, 3, 4) or shape[1] in (1, 3, 4))
    if 0 in shape or not (len(shape) == 3 or with_channels):
        raise DataError(
            f"{path}: {images.name} has the shape {shape}, which isn't a shape of images.",
            fix="Save (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels.",
        )
    if shape[0] > MAX_IMAGES:
        raise DataError(
            f"{path}: {images.name} has {shape[0]:,} images; the limit is {MAX_IMAGES:,}.",
            fix="Save fewer, or the images as files in class folders.",
        )


def check_labels(path: Path, images: ArrayHeader, labels: ArrayHeader) -> None:
    """Raises DataError unless there is one label per image, in a form that the reader knows."""
    if labels.shape[:1] != images.shape[:1]:
        count = labels.shape[0] if labels.shape else 1
        raise DataError(
            f"{path}: {images.name} has {images.shape[0]:,} images, but there are {count:,} labels.",
            fix="Save as many labels as images.",
        )
    width = math.prod(labels.shape[1:])
    if len(labels.shape) > 2 or width > MAX_CLASSES or labels.dtype.itemsize > MAX_NAME_BYTES:
        raise labels_error(path, images.name, labels)


def check_names(path: Path, names: ArrayHeader) -> None:
    if math.prod(names.shape) > MAX_CLASSES or names.dtype.itemsize > MAX_NAME_BYTES:
        raise DataError(
            f"{path}: {names.name} has the shape {names.shape} and type {names.dtype}, so it can't be class names.",
            fix=f"Save at most {MAX_CLASSES:,} names of at most {MAX_NAME_BYTES // 4:,} characters.",
        )


def check_total(path: Path, total_bytes: int) -> None:
    limit_bytes = MAX_BYTES
    if hasattr(os, "sysconf"):  # not on Windows
        limit_bytes = min(limit_bytes, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if total_bytes > limit_bytes:
        raise DataError(
            f"The arrays in {path} have {size(total_bytes)}; the limit is {size(limit_bytes)}.",
            fix="Save the images as files in class folders.",
        )


def labels_error(path: Path, name: str, labels: NDArray[Any] | ArrayHeader) -> DataError:
    return DataError(
        f"{path}: the labels of {name} have the shape {labels.shape} and type {labels.dtype}; "
        "one label per row is needed.",
        fix="Save whole numbers or names of shape (N,), or one-hot rows.",
    )
