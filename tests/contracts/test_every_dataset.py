"""Every file of datasets/: says whose it is, and what exactly is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from suanli.core import registry
from suanli.core.errors import SuanliError
from suanli.core.types import Dataset
from suanli.data.download import file_name

DATASETS = registry.load_all("datasets")
LENGTHS = {"sha256": 64, "md5": 32}


@pytest.fixture(params=sorted(DATASETS))
def dataset(request: pytest.FixtureRequest) -> Dataset:
    return DATASETS[request.param]


def test_is_named_as_its_file(dataset: Dataset) -> None:
    assert DATASETS[dataset.name] is dataset


def test_states_licence_and_homepage(dataset: Dataset) -> None:
    assert dataset.licence
    assert re.fullmatch(r"https?://\S+", dataset.homepage)
    assert dataset.kind in registry.names("preprocess")


def test_downloads_are_exact_and_encrypted(dataset: Dataset) -> None:
    for download in dataset.downloads:
        algorithm, _, digest = download.checksum.partition(":")
        assert re.fullmatch(rf"[0-9a-f]{{{LENGTHS[algorithm]}}}", digest)
        assert download.url.startswith("https://")
        assert download.size_bytes > 0
    names = [file_name(download) for download in dataset.downloads]
    assert len(set(names)) == len(names)
    checksums = [download.checksum for download in dataset.downloads]
    assert len(set(checksums)) == len(checksums)


def test_files_of_noise_are_an_error_with_a_fix(dataset: Dataset, tmp_path: Path) -> None:
    for content in (b"", b"\x1f\x8b\x08\0 not really", bytes(range(256)) * 4):
        for download in dataset.downloads:
            (tmp_path / file_name(download)).write_bytes(content)
        if dataset.downloads:
            with pytest.raises(SuanliError) as error:
                dataset.read(tmp_path)
            assert error.value.exit_code == 3
            assert error.value.fix
