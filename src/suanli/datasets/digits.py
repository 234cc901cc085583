"""Handwritten digits, 8x8 grey: the copy of UCI's test set that scikit-learn carries. No download.

1,797 pictures without an official split, so suanli makes one.
"""

from __future__ import annotations

from pathlib import Path

from suanli.datasets._arrays import rows_of
from suanli.types import Dataset, Source

_LICENCE = "CC BY 4.0"


def _read(folder: Path) -> Source:  # noqa: ARG001  # comes with scikit-learn
    """The counts of ink, 0 to 16, as grey values 0 to 255."""
    import numpy as np
    import sklearn
    from sklearn.datasets import load_digits

    found = load_digits()
    classes = tuple(str(name) for name in found.target_names)
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Source(
        name="digits",
        kind="image",
        rows=rows_of(images, found.target.astype(np.uint8), classes, None),
        classes=classes,
        fingerprint=f"scikit-learn-{sklearn.__version__}",
        size_bytes=images.size,
        licence=_LICENCE,
    )


DATASET = Dataset(
    name="digits",
    kind="image",
    licence=_LICENCE,
    homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    downloads=(),
    read=_read,
)
