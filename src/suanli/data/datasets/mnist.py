"""MNIST: handwritten digits, 28x28 grey, 60,000 for training and 10,000 for the test."""

from __future__ import annotations

from pathlib import Path

from suanli.core.types import Dataset, Download, Source
from suanli.data.datasets._arrays import read_idx_dataset

_MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"  # named by TensorFlow Datasets


def _read(folder: Path) -> Source:
    return read_idx_dataset(DATASET, tuple("0123456789"), folder)


# URLs, sizes and SHA-256: tensorflow/datasets, url_checksums/mnist.txt. Licence: as Keras states it.
DATASET = Dataset(
    name="mnist",
    kind="image",
    licence="CC BY-SA 3.0",
    homepage="http://yann.lecun.com/exdb/mnist/",
    downloads=(
        Download(
            url=_MIRROR + "train-images-idx3-ubyte.gz",
            checksum="sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            size_bytes=9_912_422,
        ),
        Download(
            url=_MIRROR + "train-labels-idx1-ubyte.gz",
            checksum="sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            size_bytes=28_881,
        ),
        Download(
            url=_MIRROR + "t10k-images-idx3-ubyte.gz",
            checksum="sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            size_bytes=1_648_877,
        ),
        Download(
            url=_MIRROR + "t10k-labels-idx1-ubyte.gz",
            checksum="sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            size_bytes=4_542,
        ),
    ),
    read=_read,
    part_of=("nist-sd19", "qmnist"),
)
