"""CIFAR-100: 32x32 colour photos of 100 kinds of things, 50,000 for training and 10,000 for the test.

The fine labels of the binary version, because the one for Python is a pickle.
"""

from __future__ import annotations

from pathlib import Path

from suanli.core.types import Dataset, Download, Source
from suanli.data.datasets._arrays import read_cifar

_FOLDER = "cifar-100-binary"


def _read(folder: Path) -> Source:
    return read_cifar(
        DATASET,
        folder,
        train=[f"{_FOLDER}/train.bin"],
        test=[f"{_FOLDER}/test.bin"],
        names=f"{_FOLDER}/fine_label_names.txt",
        label_bytes=2,  # coarse, fine
    )


# Size and SHA-256: tensorflow/datasets, url_checksums/cifar100.txt.
DATASET = Dataset(
    name="cifar100",
    kind="image",
    licence="none stated",
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    downloads=(
        Download(
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            checksum="sha256:58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
            size_bytes=168_513_733,
        ),
    ),
    read=_read,
    part_of=("80-million-tiny-images",),
)
