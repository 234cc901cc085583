"""Every file of readers/: it says what it can't read, and in one order with the others."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from suanli.core import registry
from suanli.core.errors import SuanliError
from suanli.core.types import Columns, Example, Reader

READERS = registry.load_all("readers")


@pytest.fixture(params=sorted(READERS))
def reader(request: pytest.FixtureRequest) -> Reader:
    return READERS[request.param]


def picture(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(stream, "png")
    return stream.getvalue()


def make_data(kind: str, folder: Path) -> Path:
    """A small thing that exactly one reader reads."""
    if kind == "folder":
        for label in ("cat", "dog"):
            (folder / "pets" / label).mkdir(parents=True)
            (folder / "pets" / label / "1.png").write_bytes(picture())
        return folder / "pets"
    if kind == "archive":
        with zipfile.ZipFile(folder / "pets.zip", "w") as archive:
            archive.writestr("cat/1.png", picture())
            archive.writestr("dog/1.png", picture())
        return folder / "pets.zip"
    if kind == "table":
        (folder / "t.csv").write_text("text,label\ngood,1\nbad,0\n")
        return folder / "t.csv"
    if kind == "annotation_file":
        (folder / "1.png").write_bytes(picture())
        (folder / "boxes.csv").write_text("image,xmin,ymin,xmax,ymax,label\n1.png,0,0,2,2,cat\n1.png,1,1,3,4,dog\n")
        return folder / "boxes.csv"
    import numpy as np

    np.savez(folder / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=np.array([0, 1]))
    return folder / "a.npz"


def test_is_named_as_its_file(reader: Reader) -> None:
    assert READERS[reader.name] is reader


def test_orders_differ() -> None:
    assert len({reader.order for reader in READERS.values()}) == len(READERS)


def test_says_why_not_for_another_kind_of_file(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / "song.mp3"
    path.write_bytes(b"ID3")
    reason = reader.why_not(path)
    assert reason
    assert not reason.endswith(".")


@pytest.mark.parametrize("kind", sorted(READERS))
def test_exactly_one_reads_each_kind(kind: str, tmp_path: Path) -> None:
    path = make_data(kind, tmp_path)
    assert [name for name, reader in READERS.items() if reader.why_not(path) is None] == [kind]


def test_what_it_lists_can_be_read(reader: Reader, tmp_path: Path) -> None:
    source = reader.read(make_data(reader.name, tmp_path), Columns())
    assert source.kind in registry.names("preprocess")
    if source.annotation == "class":
        assert {row.target for row in source.examples} <= set(source.classes)
    assert len(source.classes) == 2
    assert source.name.replace("-", "").isidentifier()
    assert len({row.name for row in source.examples}) == len(source.examples)
    for row in source.examples:
        assert isinstance(row, Example)
        assert len(row.read()) > 0


def test_the_same_files_have_the_same_fingerprint_and_order(reader: Reader, tmp_path: Path) -> None:
    path = make_data(reader.name, tmp_path)
    first, second = reader.read(path, Columns()), reader.read(path, Columns())
    assert first.fingerprint == second.fingerprint
    assert [row.name for row in first.examples] == [row.name for row in second.examples]


@pytest.mark.parametrize("content", [b"", b"\0" * 600, b"PK\x03\x04", b"\x1f\x8b\x08\0\0", b"a\n\xff\xfe"])
def test_damaged_files_are_errors_with_a_fix(reader: Reader, content: bytes, tmp_path: Path) -> None:
    """Whatever is in a file whose name it takes: an error of suanli, never a traceback."""
    suffixes = ("zip", "tar", "tar.gz", "tar.xz", "tgz", "csv", "tsv", "jsonl", "npz", "json", "xml", "yaml")
    suffixes += ("csv.gz", "parquet", "feather", "xlsx")
    for name in (f"x.{suffix}" for suffix in suffixes):
        path = tmp_path / name
        path.write_bytes(content)
        if reader.why_not(path) is None:
            with pytest.raises(SuanliError) as error:
                reader.read(path, Columns())
            assert error.value.exit_code == 3
            assert error.value.fix
