"""Reads publishers' files of pixel arrays (IDX, CIFAR) into rows, and checks their format."""

from __future__ import annotations

import gzip
import hashlib
import struct
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from suanli.core.errors import DataError
from suanli.core.types import Dataset, Example, Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels: TypeAlias = NDArray[np.uint8]

MAX_BYTES = 1 << 30  # of one file, unpacked
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError)


def make_examples(images: Pixels, labels: Pixels, classes: Sequence[str], split: str | None) -> list[Example]:
    """A row for each image, from images (N, H, W) or (N, H, W, C) and class numbers (N,)."""
    return [
        Example(name=f"{split or 'all'}/{i:05d}", target=classes[label], split=split, read=partial(_image, images, i))
        for i, label in enumerate(labels.tolist())
    ]


def _image(images: Pixels, position: int) -> np.ndarray:
    import numpy as np

    return np.ascontiguousarray(images[position])


def make_source(
    name: str, rows: Sequence[Example], classes: Sequence[str], size_bytes: int, licence: str, files: Iterable[Path]
) -> Source:
    stamps = "".join(f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}\0" for f in files)
    return Source(
        name=name,
        kind="image",
        examples=rows,
        classes=tuple(classes),
        fingerprint=hashlib.blake2b(stamps.encode(), digest_size=16).hexdigest(),
        size_bytes=size_bytes,
        licence=licence,
    )


def read_idx(path: Path, dimensions: int) -> Pixels:
    """The bytes of a gzipped IDX file, as an array with that many dimensions.

    The format is two zeros, the type (8 for bytes), the number of dimensions, each length as a big-endian 32-bit
    number, and the values. Raises DataError for anything else. Source: the MNIST home page.
    """
    import numpy as np

    try:
        with gzip.open(path) as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise damage_error(path, f"it doesn't begin as an IDX file of {dimensions} dimensions")
            shape = struct.unpack_from(f">{dimensions}I", header, 4)
            count = 1
            for length in shape:
                count *= length
            if not 0 < count <= MAX_BYTES:
                raise damage_error(path, f"its header has the shape {shape}")
            content = stream.read(count + 1)
    except (*_DAMAGED, OSError) as error:
        raise damage_error(path, str(error)) from error
    if len(content) != count:
        raise damage_error(path, f"it doesn't have the {count} values of its header")
    return np.frombuffer(content, np.uint8).reshape(shape)


def read_idx_dataset(dataset: Dataset, classes: Sequence[str], folder: Path) -> Source:
    """MNIST and data sets in its format: four IDX files in the order of `dataset.downloads`: training images, training
    labels, test images, test labels."""
    files = [folder / download.url.rpartition("/")[2] for download in dataset.downloads]
    rows: list[Example] = []
    size_bytes = 0
    for split, images_path, labels_path in zip(("train", "test"), files[::2], files[1::2], strict=True):
        images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
        if len(images) != len(labels) or labels.max() >= len(classes):
            raise damage_error(labels_path, "its labels don't fit the images")
        rows += make_examples(images, labels, classes, split)
        size_bytes += images.size
    return make_source(dataset.name, rows, classes, size_bytes, dataset.licence, files)


def read_cifar(
    dataset: Dataset, folder: Path, *, train: Sequence[str], test: Sequence[str], names: str, label_bytes: int
) -> Source:
    """CIFAR's binary version. A record has `label_bytes` bytes, of which the last is the class, and 3,072 bytes of a
    32x32 picture: all red, then all green, then all blue.

    `train`, `test` and `names` are members of the archive; `names` has one class name per line.
    """
    import numpy as np

    path = folder / dataset.downloads[0].url.rpartition("/")[2]
    content = _members(path, [*train, *test, names])
    classes = content[names].decode("ascii", errors="replace").split()
    record_bytes = label_bytes + 3072
    rows: list[Example] = []
    size_bytes = 0
    for split, members in (("train", train), ("test", test)):
        packed = b"".join(content.pop(member) for member in members)
        if not packed or len(packed) % record_bytes:
            raise damage_error(path, f"its {split} files aren't whole records of {record_bytes} bytes")
        records = np.frombuffer(packed, np.uint8).reshape(-1, record_bytes)
        labels = records[:, label_bytes - 1]
        if labels.max() >= len(classes):
            raise damage_error(path, f"it has class {labels.max()} but {len(classes)} class names")
        images = records[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        rows += make_examples(images, labels, classes, split)
        size_bytes += images.size
    return make_source(dataset.name, rows, classes, size_bytes, dataset.licence, [path])


def _members(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The content of the named members of a tar.gz. No other member is read."""
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for info in archive:
                if info.name in names and info.isreg() and info.size <= MAX_BYTES:
                    stream = archive.extractfile(info)
                    content[info.name] = stream.read() if stream else b""
    except (*_DAMAGED, OSError) as error:
        raise damage_error(path, str(error)) from error
    missing = [name for name in names if name not in content]
    if missing:
        raise damage_error(path, f"{', '.join(missing)} is missing in it")
    return content


def damage_error(path: Path, reason: str) -> DataError:
    return DataError(f"The file {path} is damaged: {reason}.", fix="Delete it, so that it is downloaded again.")
