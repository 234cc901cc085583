"""Fashion-MNIST: pictures of clothes, 28x28 grey, 60,000 for training and 10,000 for the test."""

from __future__ import annotations

from pathlib import Path

from suanli.core.types import Dataset, Download, Source
from suanli.data.datasets._arrays import read_idx_dataset

# The publisher's repository at a fixed commit; their web site offers the same files without https.
_REPOSITORY = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
    "b2617bb6d3ffa2e429640350f613e3291e10b141/data/fashion/"
)
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def _read(folder: Path) -> Source:
    return read_idx_dataset(DATASET, CLASSES, folder)


# Sizes and SHA-256: tensorflow/datasets, url_checksums/fashion_mnist.txt. The repository's files of
# labels at that commit were hashed: they are the same.
DATASET = Dataset(
    name="fashion_mnist",
    kind="image",
    licence="MIT",
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    downloads=(
        Download(
            url=_REPOSITORY + "train-images-idx3-ubyte.gz",
            checksum="sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            size_bytes=26_421_880,
        ),
        Download(
            url=_REPOSITORY + "train-labels-idx1-ubyte.gz",
            checksum="sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            size_bytes=29_515,
        ),
        Download(
            url=_REPOSITORY + "t10k-images-idx3-ubyte.gz",
            checksum="sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            size_bytes=4_422_102,
        ),
        Download(
            url=_REPOSITORY + "t10k-labels-idx1-ubyte.gz",
            checksum="sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            size_bytes=5_148,
        ),
    ),
    read=_read,
)
