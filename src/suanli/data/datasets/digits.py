"""Handwritten digits, 8x8 grey: UCI's test set, which scikit-learn contains. No download.

There are 1,797 pictures without an official split, so suanli makes one.
"""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from suanli.core.types import Dataset, Source
from suanli.data.datasets._arrays import make_examples

if TYPE_CHECKING:
    import numpy as np

_LICENCE = "CC BY 4.0"
_CLASSES = tuple("0123456789")


def _read(folder: Path) -> Source:  # noqa: ARG001  # comes with scikit-learn
    """Rows with the amounts of ink, 0 to 16, scaled to grey values 0 to 255."""
    import numpy as np

    ink, labels = _table()
    images = np.rint(ink * (255 / 16)).astype(np.uint8)
    return Source(
        name="digits",
        kind="image",
        examples=make_examples(images, labels.astype(np.uint8), _CLASSES, None),
        classes=_CLASSES,
        fingerprint=f"scikit-learn-{version('scikit-learn')}",
        size_bytes=images.size,
        licence=_LICENCE,
    )


def _table() -> tuple[np.ndarray, np.ndarray]:
    """Ink (N, 8, 8) and classes (N,), from scikit-learn's file where it is in its usual folder: importing the package
    would cost every process a second."""
    import numpy as np

    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.is_file():
            table = np.loadtxt(path, delimiter=",")
            return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


DATASET = Dataset(
    name="digits",
    kind="image",
    licence=_LICENCE,
    homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
    downloads=(),
    read=_read,
)
