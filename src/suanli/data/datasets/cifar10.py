"""CIFAR-10: 32x32 colour photos of 10 kinds of things, 50,000 for training and 10,000 for the test.

The binary version, because the one for Python is a pickle.
"""

from __future__ import annotations

from pathlib import Path

from suanli.core.types import Dataset, Download, Source
from suanli.data.datasets._arrays import read_cifar

_FOLDER = "cifar-10-batches-bin"


def _read(folder: Path) -> Source:
    return read_cifar(
        DATASET,
        folder,
        train=[f"{_FOLDER}/data_batch_{i}.bin" for i in range(1, 6)],
        test=[f"{_FOLDER}/test_batch.bin"],
        names=f"{_FOLDER}/batches.meta.txt",
        label_bytes=1,
    )


# Size and SHA-256: tensorflow/datasets, url_checksums/cifar10.txt.
DATASET = Dataset(
    name="cifar10",
    kind="image",
    licence="none stated",
    homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
    downloads=(
        Download(
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            checksum="sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            size_bytes=170_052_171,
        ),
    ),
    read=_read,
    part_of=("80-million-tiny-images",),
)
