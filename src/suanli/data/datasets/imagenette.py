"""Imagenette: photos of 10 easy classes of ImageNet, shorter side 160 px, 9,469 for training and 3,925 for the test.

The publisher has a `train` and a `val` folder and no test. Published results are of `val`, so it is the test split
here; suanli's validation split is taken from the training photos.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from suanli.core.types import Columns, Dataset, Download, Source
from suanli.data.datasets._arrays import damage_error
from suanli.data.readers.archive import READER as ARCHIVE

CLASSES = {  # WordNet number, the name of the folder, to the publisher's name
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
_SHORT_NAMES = ("springer", *(name for name in CLASSES.values() if name != "English springer"))


def _read(folder: Path) -> Source:
    path = folder / DATASET.downloads[0].url.rpartition("/")[2]
    source = ARCHIVE.read(path, Columns())
    unknown = set(source.classes) - set(CLASSES)
    if unknown or {row.split for row in source.examples} != {"train", "val"}:
        raise damage_error(path, f"its folders aren't those of its publisher ({', '.join(sorted(unknown)[:3])})")
    rows = [
        replace(row, target=CLASSES[row.target], split="test" if row.split == "val" else row.split)
        for row in source.examples
    ]
    return replace(source, name=DATASET.name, examples=rows, classes=tuple(CLASSES.values()), licence=DATASET.licence)


# URL: README of fastai/imagenette. Size and SHA-256: tensorflow/datasets,
# datasets/imagenette/checksums.tsv (an older list there is of an older file).
DATASET = Dataset(
    name="imagenette",
    kind="image",
    licence="ImageNet terms of access, non-commercial",
    homepage="https://github.com/fastai/imagenette",
    downloads=(
        Download(
            url="https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-160.tgz",
            checksum="sha256:64d0c4859f35a461889e0147755a999a48b49bf38a7e0f9bd27003f10db02fe5",
            size_bytes=99_003_388,
        ),
    ),
    read=_read,
    part_of=("imagenet-1k",),
    class_names=(tuple(CLASSES), tuple(CLASSES.values()), _SHORT_NAMES),
)
