"""Reading publishers' files: tiny ones in their real formats, and the real digits."""

from __future__ import annotations

import gzip
import io
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from suanli.core import registry
from suanli.core.errors import DataError
from suanli.core.types import Source
from suanli.data.datasets.imagenette import CLASSES as IMAGENETTE


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), mtime=0)


def tar_gz(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def read(name: str, folder: Path) -> Source:
    source: Source = registry.load("datasets", name).read(folder)
    return source


def write_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (7, 28, 28), np.uint8)
    labels = np.arange(7, dtype=np.uint8)
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    return images, labels


def test_digits_are_whole_and_fill_the_grey_scale(tmp_path: Path) -> None:
    source = read("digits", tmp_path)
    assert len(source.examples) == 1797
    assert source.classes == tuple("0123456789")
    assert {row.split for row in source.examples} == {None}
    images = np.stack([row.read() for row in source.examples])
    assert images.shape == (1797, 8, 8)
    assert images.dtype == np.uint8
    assert (images.min(), images.max()) == (0, 255)
    published = load_digits()
    assert np.array_equal(images, np.rint(published.images * 255 / 16))
    assert [row.target for row in source.examples] == [str(target) for target in published.target]


def test_digits_are_read_without_importing_what_carries_them() -> None:
    read = "from suanli.data.datasets.digits import DATASET; DATASET.read(None)"
    code = f"import sys; {read}; print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_become_rows(name: str, tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path)
    source = read(name, tmp_path)
    assert Counter(row.split for row in source.examples) == {"train": 7, "test": 7}
    assert len(source.classes) == 10
    for row, image, label in zip(source.examples, images, labels, strict=False):
        assert np.array_equal(row.read(), image)
        assert row.target == source.classes[label]


@pytest.mark.parametrize(
    "content",
    [
        idx(np.zeros((7, 28, 28)))[:-40],  # cut short
        gzip.compress(gzip.decompress(idx(np.zeros((7, 28, 28))))[:-1], mtime=0),  # one value is missing
        gzip.compress(gzip.decompress(idx(np.zeros((7, 28, 28)))) + b"x", mtime=0),  # one too many
        idx(np.zeros((6, 28, 28))),  # fewer images than labels
        idx(np.zeros(7)),  # labels where images should be
        gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12, mtime=0),  # says that it is enormous
        gzip.compress(b"", mtime=0),
    ],
)
def test_damaged_idx_is_named(content: bytes, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"train-(images|labels)-idx.*is damaged"):
        read("mnist", tmp_path)


def test_labels_beyond_the_classes_are_damage(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(idx(np.full(7, 10)))
    with pytest.raises(DataError, match="don't fit"):
        read("mnist", tmp_path)


def cifar_members(label_bytes: int) -> dict[str, bytes]:
    """Records whose red plane is 1, green 2, blue 3, and whose class is the position."""

    def records(count: int) -> bytes:
        planes = b"".join(bytes([shade]) * 1024 for shade in (1, 2, 3))
        return b"".join(bytes(label_bytes - 1) + bytes([i]) + planes for i in range(count))

    if label_bytes == 1:
        folder = "cifar-10-batches-bin/"
        names = b"airplane\nautomobile\nbird\n\n"
        batches = {f"{folder}data_batch_{i}.bin": records(3) for i in range(1, 6)}
        return {**batches, f"{folder}test_batch.bin": records(2), f"{folder}batches.meta.txt": names}
    folder = "cifar-100-binary/"
    names = b"apple\naquarium_fish\nbaby\n"
    return {
        f"{folder}train.bin": records(3),
        f"{folder}test.bin": records(2),
        f"{folder}fine_label_names.txt": names,
    }


@pytest.mark.parametrize(("name", "label_bytes", "train"), [("cifar10", 1, 15), ("cifar100", 2, 3)])
def test_cifar_records_become_rows(name: str, label_bytes: int, train: int, tmp_path: Path) -> None:
    file = f"cifar-{name.removeprefix('cifar')}-binary.tar.gz"
    tar_gz(tmp_path / file, cifar_members(label_bytes))
    source = read(name, tmp_path)
    assert Counter(row.split for row in source.examples) == {"train": train, "test": 2}
    assert [row.target for row in source.examples[:3]] == list(source.classes)
    image = source.examples[0].read()
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    assert image[5, 7].tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", ["missing", "odd length", "class too high", "cut", "empty"])
def test_damaged_cifar_is_named(damage: str, tmp_path: Path) -> None:
    members = cifar_members(2)
    path = tmp_path / "cifar-100-binary.tar.gz"
    if damage == "missing":
        del members["cifar-100-binary/test.bin"]
    elif damage == "odd length":
        members["cifar-100-binary/train.bin"] += b"x"
    elif damage == "class too high":
        members["cifar-100-binary/fine_label_names.txt"] = b"apple\n"
    elif damage == "empty":
        members["cifar-100-binary/test.bin"] = b""
    tar_gz(path, members)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cifar-100-binary.tar.gz is damaged") as error:
        read("cifar100", tmp_path)
    assert "downloaded again" in error.value.fix


def imagenette_members(folders: list[str]) -> dict[str, bytes]:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "jpeg")
    members = {"imagenette2-160/noisy_imagenette.csv": b"path,label\n"}
    for split in ("train", "val"):
        for folder in folders:
            members[f"imagenette2-160/{split}/{folder}/{folder}_1.JPEG"] = stream.getvalue()
    return members


def test_imagenette_val_is_the_test_and_folders_get_names(tmp_path: Path) -> None:
    tar_gz(tmp_path / "imagenette2-160.tgz", imagenette_members(list(IMAGENETTE)))
    source = read("imagenette", tmp_path)
    assert Counter(row.split for row in source.examples) == {"train": 10, "test": 10}
    assert source.classes == tuple(IMAGENETTE.values())
    assert {row.target for row in source.examples} == set(source.classes)
    with Image.open(io.BytesIO(source.examples[-1].read())) as image:
        assert image.size == (8, 8)


def test_another_layout_is_not_imagenette(tmp_path: Path) -> None:
    tar_gz(tmp_path / "imagenette2-160.tgz", imagenette_members(["n01440764", "cats"]))
    with pytest.raises(DataError, match="cats"):
        read("imagenette", tmp_path)


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    before = read("mnist", tmp_path).fingerprint
    assert read("mnist", tmp_path).fingerprint == before
    images = np.full((7, 28, 28), 3)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(idx(images))
    assert read("mnist", tmp_path).fingerprint != before
