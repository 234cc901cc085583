"""Tests of this folder run on the first NVIDIA GPU, or not at all.

With SUANLI_GPU_REHEARSAL=1 they run on the CPU, to see that they run; what only CUDA has is skipped then.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from suanli.core.types import Device, Example, Recipe, Source
from suanli.data.cache import PreparedData, prepare_source
from suanli.machine.device import detect

REHEARSAL = os.environ.get("SUANLI_GPU_REHEARSAL") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; make gpu runs these")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REHEARSAL or torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="there is no NVIDIA GPU that this torch can use; make gpu runs this where there is")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def device() -> Device:
    return detect("cpu" if REHEARSAL else "cuda")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Noisy 16 px colour pictures of three shades that can be told apart."""
    random = np.random.default_rng(0)
    pictures = np.clip(
        random.normal(128, 40, (600, 16, 16, 3)) + 30 * (np.arange(600) % 3)[:, None, None, None], 0, 255
    )
    rows = [
        Example(name=str(i), target="abc"[i % 3], split=None, read=lambda p=p: p)  # type: ignore[misc]
        for i, p in enumerate(pictures.astype(np.uint8))
    ]
    source = Source(
        name="shades", kind="image", examples=rows, classes=("a", "b", "c"), fingerprint="shades", size_bytes=1
    )
    return prepare_source(source, Recipe(), tmp_path_factory.mktemp("cache"), threads=1)
