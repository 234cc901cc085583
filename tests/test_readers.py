"""From a path to labelled rows: folders, archives, tables and arrays, good and bad."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suanli.core.errors import BadInput, DataError, StorageError, UsageError
from suanli.core.types import Columns, Source
from suanli.data.preprocess.image import ImagePreprocess
from suanli.data.readers import _archives, _stored_arrays, archive, folder, npz, table
from suanli.data.suffixes import IMAGE_SUFFIXES

PETS = {"train/cat/1.jpg": b"c1", "train/dog/1.png": b"d1", "train/dog/2.JPEG": b"d2", "test/cat/9.webp": b"c9"}
FLAT = {"cat/1.jpg": b"c1", "dog/1.png": b"d1"}


def write_folder(top: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(content)
    top.mkdir(exist_ok=True)
    return top


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    mode = {"tar": "w", "gz": "w:gz", "tgz": "w:gz", "bz2": "w:bz2", "xz": "w:xz"}[path.name.rpartition(".")[2]]
    with tarfile.open(path, mode) as packed:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def pack(kind: str, top: Path, files: dict[str, bytes]) -> Source:
    """`files` as a folder or archive of that kind, read."""
    if kind == "folder":
        return folder.read(write_folder(top / "pets", files), Columns())
    write = write_zip if kind == "zip" else write_tar
    return archive.read(write(top / f"pets.{kind}", files), Columns())


KINDS = ("folder", "zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz")


# --- class folders, however packed ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_splits_classes_and_bytes(kind: str, tmp_path: Path) -> None:
    source = pack(kind, tmp_path, PETS)
    assert source.name == "pets"
    assert source.kind == "image"
    assert source.classes == ("cat", "dog")
    assert source.size_bytes == 8
    assert {row.name: (row.split, row.target, row.read()) for row in source.examples} == {
        "train/cat/1.jpg": ("train", "cat", b"c1"),
        "train/dog/1.png": ("train", "dog", b"d1"),
        "train/dog/2.JPEG": ("train", "dog", b"d2"),
        "test/cat/9.webp": ("test", "cat", b"c9"),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_rows_survive_the_way_to_another_process(kind: str, tmp_path: Path) -> None:
    source = pack(kind, tmp_path, PETS)
    copies = pickle.loads(pickle.dumps(list(source.examples)))  # noqa: S301  # our own rows
    assert [row.read() for row in copies] == [row.read() for row in source.examples]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Training", "Validation", "Testing"), {"train", "val", "test"}),
        (("train", "valid"), {"train", "val"}),
        (("TRAIN", "dev"), {"train", "val"}),
    ],
)
def test_usual_names_of_splits(kind: str, names: tuple[str, ...], splits: set[str], tmp_path: Path) -> None:
    files = {f"{name}/{label}/1.jpg": b"x" for name in names for label in ("a", "b")}
    assert {row.split for row in pack(kind, tmp_path, files).examples} == splits


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_deeper_folders_belong_to_the_class_and_hidden_files_are_ignored(kind: str, tmp_path: Path) -> None:
    files = {
        **FLAT,
        "cat/more/deep/2.jpg": b"c2",
        "cat/.hidden.jpg": b"",
        "__MACOSX/cat/._1.jpg": b"",
        "cat/Thumbs.db": b"",
        ".git/x/1.jpg": b"",
        "dog/.DS_Store": b"",
    }
    source = pack(kind, tmp_path, files)
    assert [row.name for row in source.examples] == ["cat/1.jpg", "cat/more/deep/2.jpg", "dog/1.png"]
    assert source.notes == ()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_skipped_files_are_noted(kind: str, tmp_path: Path) -> None:
    files = {**FLAT, "README.md": b"", "cat/labels.xml": b"", "dog/a.mp4": b"", "dog/b.mp4": b"", "up.jpg": b""}
    source = pack(kind, tmp_path, files)
    assert source.notes == (
        "1 image outside a class folder, skipped: up.jpg",
        "4 other files, skipped: README.md, cat/labels.xml, dog/a.mp4, …",
    )


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_wrapping_folder_is_taken_off(kind: str, tmp_path: Path) -> None:
    source = pack(kind, tmp_path, {f"set-v2/data/{name}": content for name, content in PETS.items()})
    assert Counter(row.split for row in source.examples) == {"train": 3, "test": 1}
    assert source.classes == ("cat", "dog")


def test_empty_classes_and_missing_ones_stay(tmp_path: Path) -> None:
    top = write_folder(tmp_path / "pets", PETS)
    (top / "train" / "emu").mkdir()
    source = folder.read(top, Columns())
    assert source.classes == ("cat", "dog", "emu")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    source = pack("folder", tmp_path, {"train/1.jpg": b"", "bus/1.jpg": b"", "car/1.jpg": b""})
    assert source.classes == ("bus", "car", "train")
    assert {row.split for row in source.examples} == {None}


def test_numbers_are_in_their_order(tmp_path: Path) -> None:
    source = pack("folder", tmp_path, {f"{i}/1.jpg": b"" for i in (10, 9, 2, 1)})
    assert source.classes == ("1", "2", "9", "10")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is empty"),
        ({"1.jpg": b"", "2.jpg": b""}, "2 images but no class folders"),
        ({"cat/1.jpg": b""}, "only one class, 'cat'"),
        ({"train/cat/1.jpg": b"", "test/cat/1.jpg": b""}, "only one class"),
        ({"train/1.jpg": b"", "test/2.jpg": b""}, "no class folders inside test, train"),
        ({"val/a/1.jpg": b"", "test/b/1.jpg": b""}, "no train folder"),
        ({"train/a/1.jpg": b"", "val/a/1.jpg": b"", "dev/b/1.jpg": b""}, "more than one folder for the val"),
        ({"a/readme.txt": b"", "b/x.doc": b""}, "no images, only 2 other files"),
        ({"t/train.tsv": b"", "t/dev.tsv": b""}, "no images, but tables"),
    ],
)
def test_folders_that_are_no_class_folders_are_refused(
    kind: str, files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as error:
        pack(kind, tmp_path, files)
    assert str(tmp_path) in error.value.message
    assert error.value.fix


# --- folders --------------------------------------------------------------------------------


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    top = write_folder(tmp_path / "pets", FLAT)
    elsewhere = write_folder(tmp_path / "elsewhere", {"1.jpg": b"e"})
    (top / "emu").symlink_to(elsewhere)
    (top / "cat" / "up").symlink_to(top)
    (top / "cat" / "self").symlink_to("self")
    (top / "dog" / "gone.jpg").symlink_to(tmp_path / "nothing")
    os.mkfifo(top / "dog" / "pipe.jpg")
    source = folder.read(top, Columns())
    assert [row.name for row in source.examples] == ["cat/1.jpg", "dog/1.png", "emu/1.jpg"]
    assert source.notes == (
        "1 links to a folder above them, skipped: cat/up",
        "3 broken links and special files, skipped: cat/self, dog/gone.jpg, dog/pipe.jpg",
    )


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    top = write_folder(tmp_path / "pets", FLAT)
    with open(os.fsencode(top / "cat") + b"/\xff.jpg", "wb") as stream:
        stream.write(b"odd")
    row = next(row for row in folder.read(top, Columns()).examples if row.read() == b"odd")
    assert row.name.encode()


def test_the_fingerprint_of_a_folder_follows_its_files(tmp_path: Path) -> None:
    top = write_folder(tmp_path / "pets", FLAT)
    prints = [folder.read(top, Columns()).fingerprint]
    (top / "cat" / "2.jpg").write_bytes(b"")
    prints.append(folder.read(top, Columns()).fingerprint)
    (top / "cat" / "2.jpg").write_bytes(b"longer")
    prints.append(folder.read(top, Columns()).fingerprint)
    (top / "empty").mkdir()
    prints.append(folder.read(top, Columns()).fingerprint)
    assert len(set(prints)) == 4


def test_a_file_that_went_away_is_an_os_error(tmp_path: Path) -> None:
    source = pack("folder", tmp_path, FLAT)
    (tmp_path / "pets" / "cat" / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        source.examples[0].read()


def test_a_file_too_large_for_an_input_is_not_read(tmp_path: Path) -> None:
    top = write_folder(tmp_path / "pets", FLAT)
    os.truncate(top / "cat" / "1.jpg", (1 << 30) + 1)  # takes no space
    source = folder.read(top, Columns())
    with pytest.raises(BadInput, match=r"cat/1\.jpg has .*; the limit for one file is"):
        source.examples[0].read()
    assert source.examples[1].read() == b"d1"


def test_every_image_that_can_be_predicted_can_be_listed(tmp_path: Path) -> None:
    names = [f"{label}/1.{suffix}" for suffix in sorted(IMAGE_SUFFIXES) for label in ("a", "B")]
    names += ["a/x.JPG", "a/x.jfif", "B/x.avif"]
    source = pack("folder", tmp_path, dict.fromkeys(names, b""))
    assert sorted(row.name for row in source.examples) == sorted(names)
    assert sorted(name for name, _ in ImagePreprocess.find_inputs(tmp_path / "pets")) == sorted(names)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.dictionaries(
        st.tuples(st.sampled_from(["a", "b", "c"]), st.text("xyz. é", min_size=1, max_size=5)),
        st.binary(max_size=40),
        min_size=2,
        max_size=12,
    )
)
def test_a_folder_and_its_zip_say_the_same(
    files: dict[tuple[str, str], bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    named = {f"{label}/{name}.jpg": content for (label, name), content in files.items()}
    named |= {"a/always.jpg": b"a", "b/always.jpg": b"b"}
    top = tmp_path_factory.mktemp("same")
    sources = [pack(kind, top, named) for kind in ("folder", "zip", "tar", "tgz")]
    seen = [[(row.name, row.target, row.split, row.read()) for row in source.examples] for source in sources]
    assert seen[0] == seen[1] == seen[2] == seen[3]


# --- archives -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.zip", "x.tar"])
@pytest.mark.parametrize("member", ["../evil/1.jpg", "cat/../../1.jpg", "/etc/cat/1.jpg", "C:/cat/1.jpg"])
def test_names_that_lead_out_are_refused(name: str, member: str, tmp_path: Path) -> None:
    write = write_zip if name == "x.zip" else write_tar
    with pytest.raises(DataError, match="leads out of it"):
        archive.read(write(tmp_path / name, {**FLAT, member: b"!"}), Columns())


@given(st.text("a.:/\n", max_size=9))
def test_names_are_those_of_pathlib_or_refused(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name[:2] == "a:":
        with pytest.raises(DataError, match="leads out of it"):
            _archives.clean_name(Path("x.zip"), name)
    else:
        assert _archives.clean_name(Path("x.zip"), name) == "/".join(path.parts)


def test_a_backslash_in_a_zip_is_a_slash(tmp_path: Path) -> None:
    source = archive.read(write_zip(tmp_path / "x.zip", {"cat\\1.jpg": b"", "dog\\1.jpg": b""}), Columns())
    assert source.classes == ("cat", "dog")
    with pytest.raises(DataError, match="leads out of it"):
        archive.read(write_zip(tmp_path / "y.zip", {**FLAT, "..\\1.jpg": b""}), Columns())


def test_bombs_are_refused_with_their_numbers(tmp_path: Path) -> None:
    zeros = bytes(40 << 20)
    for path in (
        write_zip(tmp_path / "x.zip", {**FLAT, "cat/2.jpg": zeros}),
        write_tar(tmp_path / "x.tgz", {**FLAT, "cat/2.jpg": zeros}),
    ):
        with pytest.raises(DataError, match=r"unpacks from .*kB to at least .*MB, more than 200 times"):
            archive.read(path, Columns())


def test_many_small_members_that_add_up_to_a_bomb(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {f"{label}/{i}.jpg": bytes(1 << 20) for label in "ab" for i in range(20)})
    with pytest.raises(DataError, match="decompression bomb"):
        archive.read(path, Columns())


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize(("limit", "value"), [("MAX_MEMBERS", 1), ("MAX_MEMBER_BYTES", 1), ("MAX_TOTAL_BYTES", 3)])
def test_limits(kind: str, limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_archives, limit, value)
    with pytest.raises(DataError, match=r"more than|the limit"):
        pack(kind, tmp_path, FLAT)


def test_an_encrypted_zip(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", FLAT)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    path.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        archive.read(path, Columns())


def test_a_method_that_cant_be_read(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", FLAT, zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match="method 14"):
        archive.read(path, Columns())


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_an_archive_cut_short(kind: str, share: float, tmp_path: Path) -> None:
    files = {f"{label}/{i}.jpg": os.urandom(5000) for label in "ab" for i in range(10)}
    pack(kind, tmp_path, files)
    path = tmp_path / f"pets.{kind}"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    if kind == "tar" and share == 0.95:
        path.write_bytes(path.read_bytes()[:-9000])  # the end of a tar is padding
    with pytest.raises(DataError, match="damaged, cut short"):
        archive.read(path, Columns())


def test_a_tar_damaged_in_the_middle_is_an_error(tmp_path: Path) -> None:
    pack("tar", tmp_path, {f"{label}/{i}.jpg": bytes([i]) * 600 for label in "ab" for i in range(9)})
    path = tmp_path / "pets.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"b/3.jpg")
    content[at : at + 400] = b"#" * 400
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        archive.read(path, Columns())


def test_a_tar_without_its_end_mark_is_noted(tmp_path: Path) -> None:
    pack("tar", tmp_path, FLAT)
    path = tmp_path / "pets.tar"
    path.write_bytes(path.read_bytes()[: 4 * 512])
    assert "no end mark" in archive.read(path, Columns()).notes[0]


def test_links_and_devices_in_archives_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as packed:
        for name, content in FLAT.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
        for name, kind in (
            ("cat/link.jpg", tarfile.SYMTYPE),
            ("cat/hard.jpg", tarfile.LNKTYPE),
            ("dog/d.jpg", tarfile.CHRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            packed.addfile(info)
    source = archive.read(path, Columns())
    assert len(source.examples) == 2
    assert source.notes[0].startswith("3 links, devices")

    path = write_zip(tmp_path / "x.zip", FLAT)
    with zipfile.ZipFile(path, "a") as packed_zip:
        link = zipfile.ZipInfo("cat/link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        packed_zip.writestr(link, "/etc/passwd")
    source = archive.read(path, Columns())
    assert len(source.examples) == 2
    assert source.notes == ("1 links in the archive, skipped: cat/link.jpg",)


@pytest.mark.parametrize("field", ["size", "packed size", "content", "offset"])
def test_a_zip_with_wrong_sizes_is_refused(field: str, tmp_path: Path) -> None:
    """The member is refused when it is read, and never more than the declared size comes out."""
    path = write_zip(tmp_path / "x.zip", {"a/1.jpg": b"abc" * 9000, "b/1.jpg": b"b"})
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    if field == "size":
        struct.pack_into("<I", content, entry + 24, 100)
    elif field == "packed size":
        struct.pack_into("<I", content, entry + 20, 10)
    elif field == "content":
        content[60] ^= 0xFF
    else:
        struct.pack_into("<I", content, entry + 42, 7)
    path.write_bytes(content)
    source = archive.read(path, Columns())
    with pytest.raises(BadInput, match=r"a/1\.jpg"):
        source.examples[0].read()
    assert source.examples[1].read() == b"b"


def test_a_zip_member_beyond_the_end_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", FLAT)
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 20, 1 << 30)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        archive.read(path, Columns())


def test_utf8_names_without_their_flag(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {"猫/1.jpg": b"c", "dog/1.jpg": b"d"})
    path.write_bytes(path.read_bytes().replace(struct.pack("<H", 0x800), b"\0\0"))
    assert archive.read(path, Columns()).classes == ("dog", "猫")


def test_a_name_that_occurs_twice(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", FLAT)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as packed:
        packed.writestr("cat/1.jpg", b"newer")
    source = archive.read(path, Columns())
    assert [row.read() for row in source.examples] == [b"newer", b"d1"]
    assert "occur again" in source.notes[0]


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_many_threads_read_at_once(kind: str, tmp_path: Path) -> None:
    files = {f"{label}/{i}.jpg": os.urandom(3000) for label in "ab" for i in range(100)}
    source = pack(kind, tmp_path, files)
    with ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            contents = list(threads.map(lambda row: row.read(), source.examples))
            assert contents == [files[row.name] for row in source.examples]


@pytest.mark.parametrize("kind", ["tar.gz", "tar.bz2", "tar.xz"])
def test_a_compressed_tar_is_unpacked_when_its_first_row_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pack(kind, tmp_path, PETS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    again = archive.read(tmp_path / f"pets.{kind}", Columns())  # needs no temporary directory
    assert again.fingerprint == source.fingerprint
    with pytest.raises(StorageError, match="missing"):
        again.examples[0].read()
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert [row.read() for row in again.examples] == [PETS[row.name] for row in again.examples]


def test_a_compressed_tar_is_unpacked_once_for_all_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = []
    make = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **where: folders.append(where) or make(**where))
    source = pack("tgz", tmp_path, {f"{label}/{i}.jpg": os.urandom(9000) for label in "ab" for i in range(40)})
    assert folders == []
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda row: row.read(), source.examples))
    assert len(folders) == 1


def test_a_compressed_tar_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    source = pack("tgz", tmp_path, PETS)
    pack("tgz", tmp_path, {**PETS, "train/cat/0.jpg": b"another"})
    with pytest.raises(DataError, match="changed while it was being read"):
        source.examples[0].read()


@pytest.mark.parametrize("kind", ["tar", "tgz"])
@pytest.mark.parametrize("size_field", [b"\xff" * 11 + b"\0", b"\xff" * 10 + b"\xf0\0", b"\x80" + b"\xff" * 11])
def test_a_tar_whose_members_lead_back_or_beyond(kind: str, size_field: bytes, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / f"x.{kind}", "w:gz" if kind == "tgz" else "w") as packed:
        for name in FLAT:
            info = tarfile.TarInfo(name)
            block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            if name.startswith("dog"):
                block[124:136] = size_field
                block[148:156] = b"%06o\0 " % tarfile.calc_chksums(block)[0]  # type: ignore[attr-defined]
            packed.fileobj.write(block)  # type: ignore[union-attr]
            packed.offset += len(block)
    with pytest.raises(DataError, match=r"damaged|the limit"):
        archive.read(tmp_path / f"x.{kind}", Columns())


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_tar_with_a_header_that_would_fill_the_memory(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    with tarfile.open(path, "w:gz" if kind == "tgz" else "w") as packed:
        for name in FLAT:
            packed.addfile(tarfile.TarInfo(name))
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = tarfile.GNUTYPE_LONGNAME, 17 << 20
        packed.addfile(info, io.BytesIO(bytes(info.size)))
        packed.addfile(tarfile.TarInfo("cat/2.jpg"))
    with pytest.raises(DataError, match=r"header of 17,\d+,\d+ bytes|bomb"):
        archive.read(path, Columns())


def test_60_000_members_are_listed_quickly(shared_data: Path) -> None:
    started = time.process_time()
    source = archive.read(shared_data / "cifar10.zip", Columns())
    assert time.process_time() - started < 3  # 0.9 s alone on two cores
    assert Counter(row.split for row in source.examples) == {"train": 50_000, "test": 10_000}
    assert len(source.classes) == 10
    assert source.examples[-1].read()[:2] == b"\xff\xd8"


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["x.zip", "x.tar", "x.tgz", "x.tar.bz2", "x.tar.xz", "x.npz", "x.csv"]),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.3, 1),
)
def test_any_damage_is_a_data_error(
    name: str, changes: list[tuple[float, int]], keep: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("damage") / name
    if name.endswith(".npz"):
        np.savez_compressed(path, images=IMAGES, labels=LABELS)
    elif name.endswith(".csv"):
        path.write_text('text,label\n"good, ""x""",1\n"two\nlines",0\n')
    else:
        (write_zip if name == "x.zip" else write_tar)(path, PETS)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content[: int(keep * len(content))])
    reader = next(r for r in (archive, table, npz) if r.why_not(path) is None)
    with contextlib.suppress(DataError):
        for row in reader.read(path, Columns()).examples:
            with contextlib.suppress(BadInput):
                row.read()


def test_a_zip_member_without_a_name_or_a_place(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "x.zip", {**FLAT, "z": b""})
    content = path.read_bytes()
    entry = content.rindex(b"PK\x01\x02")
    path.write_bytes(content[: entry + 46] + b"\0" + content[entry + 47 :])  # names end at a zero
    assert len(archive.read(path, Columns()).examples) == 2
    path.write_bytes(content[10:])
    with pytest.raises(DataError, match="damaged"):
        archive.read(path, Columns())


# --- tables ---------------------------------------------------------------------------------


def read_text(path: Path, text: str, columns: Columns | None = None) -> Source:
    path.write_text(text, encoding="utf-8", newline="")
    return table.read(path, columns or Columns())


def contents(source: Source) -> list[tuple[object, str]]:
    return [(row.read(), row.target) for row in source.examples]


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", 'label,review\n1,"good, ""very"""\n0,bad\n'),
        ("r.tsv", 'label\treview\n1\tgood, "very"\n0\tbad\n'),
        ("r.tsv", 'label\treview\n1\t"good, ""very"""\n0\tbad'),
        ("r.jsonl", '{"label": 1, "review": "good, \\"very\\""}\n\n{"review": "bad", "label": 0}\n'),
        ("R.NDJSON", '{"label": "1", "review": "good, \\"very\\""}\n{"review": "bad", "label": "0"}'),
    ],
)
def test_each_format(name: str, text: str, end: str, start: str, tmp_path: Path) -> None:
    source = read_text(tmp_path / name, start + text.replace("\n", end))
    assert contents(source) == [('good, "very"', "1"), ("bad", "0")]
    assert (source.kind, source.classes, source.notes) == ("text", ("0", "1"), ())
    assert source.examples[0].name == f"{name}:{1 if name.lower().endswith('json') or 'json' in name else 2}"


@pytest.mark.parametrize(("suffix", "cell"), [("csv", ","), ("tsv", "\t")])
def test_quoted_newlines(suffix: str, cell: str, tmp_path: Path) -> None:
    text = f'text{cell}label\n"two\nlines"{cell}a\n"a{cell}b"{cell}b\n'
    source = read_text(tmp_path / f"r.{suffix}", text)
    assert contents(source) == [("two\nlines", "a"), (f"a{cell}b", "b")]
    assert source.examples[1].name == f"r.{suffix}:4"


@pytest.mark.parametrize("mark", [";", "\t"])
def test_a_csv_of_a_spreadsheet_in_another_language(mark: str, tmp_path: Path) -> None:
    rows = f'text{mark}label\n"good, really; yes"{mark}a\n"bad, no"{mark}b\n'
    source = read_text(tmp_path / "r.csv", "\ufeff" + rows)
    assert contents(source) == [("good, really; yes", "a"), ("bad, no", "b")]


def test_a_lone_quote_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    source = read_text(tmp_path / "r.tsv", 'text\tlabel\n"so\ta\n6" long\tb\n')
    assert contents(source) == [('"so', "a"), ('6" long', "b")]


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff")),
            st.sampled_from(["yes", "no", "哦"]),
        ),
        min_size=2,
        max_size=9,
    ),
    suffix=st.sampled_from(["csv", "jsonl"]),
)
def test_every_text_comes_back(
    rows: list[tuple[str, str]], suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv

    rows = [*rows, ("first", "yes"), ("second", "no")]
    path = tmp_path_factory.mktemp("t") / f"r.{suffix}"
    with path.open("w", encoding="utf-8", newline="") as stream:
        if suffix == "csv":
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows(rows)
        else:
            stream.writelines(json.dumps({"text": t, "label": y}, ensure_ascii=False) + "\n" for t, y in rows)
    assert contents(table.read(path, Columns())) == rows


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("id,text,label", ("b", "c")),
        ("Sentiment,junk,COMMENT", ("c", "a")),
        ("title,text,label", ("b", "c")),
        ("filename,text,target", ("b", "c")),
    ],
)
def test_columns_are_found_by_usual_names(header: str, expected: tuple[str, str], tmp_path: Path) -> None:
    source = read_text(tmp_path / "t.csv", f"{header}\na,b,c\na2,b2,c2\n")
    assert contents(source)[0] == expected


@pytest.mark.parametrize("header", ["whatever,label", "text,whatever"])
def test_the_only_other_column_is_the_input_or_label(header: str, tmp_path: Path) -> None:
    assert contents(read_text(tmp_path / "t.csv", f"{header}\na,b\nc,d\n")) == [("a", "b"), ("c", "d")]


def test_columns_by_name(tmp_path: Path) -> None:
    text = "text,label,body,kind\na,1,b,x\nc,2,d,y\n"
    source = read_text(tmp_path / "t.csv", text, Columns(input="body", label="kind"))
    assert contents(source) == [("b", "x"), ("d", "y")]
    with pytest.raises(UsageError, match=r"'bodi'.*'body'"):
        read_text(tmp_path / "t.csv", text, Columns(input="bodi"))
    with pytest.raises(UsageError, match="Unknown label column"):
        read_text(tmp_path / "t.csv", text, Columns(label="z"))


def test_the_split_column(tmp_path: Path) -> None:
    source = read_text(tmp_path / "t.csv", "text,label,split\na,1,train\nb,2,Validation\nc,1,test\nd,1,\n")
    assert [row.split for row in source.examples] == ["train", "val", "test", None]
    with pytest.raises(DataError, match=r"'fold7' in line 3"):
        read_text(tmp_path / "t.csv", "text,label,split\na,1,train\nb,2,fold7\n")


def test_bad_rows_are_counted_and_empty_texts_kept(tmp_path: Path) -> None:
    text = "text,label\na,1\n,2\nonly one\nb,1,surplus\nc,\nd,2\ne,1\n"
    source = read_text(tmp_path / "t.csv", text)
    assert contents(source) == [("a", "1"), ("", "2"), ("d", "2"), ("e", "1")]
    assert source.notes == ("3 lines of t.csv with missing or surplus cells (line 4, 5, 6), skipped",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"\xef\xbb\xbf \n", "is empty"),
        ("t.csv", b"text,label\n", "no rows"),
        ("t.jsonl", b"[1, 2]\n", "no rows"),
        ("t.jsonl", b"[" * 100_000, "no rows"),
        ("t.csv", b"a,b,c\n1,2,3\n", "no label column.*a, b, c"),
        ("t.csv", b"a,b,label\n1,2,3\n", "no input column.*a, b, label"),
        ("t.csv", b"text|label\na|1\n", r"text\|label.*separated by commas"),
        ("t.csv", b"text,label\na,1\nb,1\n", "only one class, '1'"),
        ("t.csv", b"text,text,label\na,b,1\n", "more than one column named 'text'"),
        ("t.csv", b"text,label\na,1\nb\0,2\n", "NUL byte in line 3"),
        ("t.csv", "text,label\n好,1\n".encode("gb18030"), r"not UTF-8 \(line 2\).*iconv"),
        ("t.csv", "text,label\na,1\n".encode("utf-16"), "UTF-16"),
        ("t.csv", b'text,label\na,1\n"b,2\nc,3\n', "from line 3 on.*quote"),
        ("t.csv", b"text,label\na,1\nb\nc\nd\n", "mostly damaged: 3 lines"),
        ("t.csv", b"text,label\n" + b"".join(b"t,%d\n" % i for i in range(50)), "not classes"),
    ],
)
def test_tables_that_cant_be_used(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s)t\.(csv|jsonl).*{message}|{message}.*t\.csv") as error:
        table.read(tmp_path / name, Columns())
    assert error.value.fix


def test_a_large_text_is_read(tmp_path: Path) -> None:
    text = "word " * 100_000
    assert contents(read_text(tmp_path / "t.csv", f"text,label\n{text},1\nb,2\n"))[0] == (text, "1")


def test_a_folder_of_tables_with_other_columns_each(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("label\tsentence\n0\ta\n1\tb\n")
    (tmp_path / "dev.tsv").write_text("label\tcontent\n0\tc\n")
    (tmp_path / "test.csv").write_text("id,text\n1,d\n")
    assert folder.why_not(tmp_path) == "holds tables (train.tsv) and no class folders"
    assert table.why_not(tmp_path) is None
    source = table.read(tmp_path, Columns())
    assert [(row.name, row.split, row.read()) for row in source.examples] == [
        ("train.tsv:2", "train", "a"),
        ("train.tsv:3", "train", "b"),
        ("dev.tsv:2", "val", "c"),
    ]
    assert source.notes == ("test.csv has no label column, skipped",)
    named = table.read(tmp_path, Columns(input="sentence"))
    assert len(named.examples) == 3


def test_an_unusual_label_column_is_looked_for_in_the_other_tables_too(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,stars\na,1\nb,2\n")
    (tmp_path / "test.csv").write_text("stars,text\n2,c\n")
    assert contents(table.read(tmp_path, Columns())) == [("a", "1"), ("b", "2"), ("c", "2")]


def test_a_folder_without_a_train_table(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\na,1\nb,2\n")
    assert "without a table named train" in str(table.why_not(tmp_path))
    with pytest.raises(DataError, match="without a table named train"):
        table.read(tmp_path, Columns())


def test_two_tables_for_one_split(tmp_path: Path) -> None:
    (tmp_path / "dev.tsv").write_text("")
    (tmp_path / "val.tsv").write_text("")
    with pytest.raises(DataError, match=r"two tables for one split: dev\.tsv, val\.tsv"):
        table.why_not(tmp_path)


@pytest.mark.parametrize("layout", ["train/{}/1.jpg", "{}/1.jpg"])
def test_class_folders_win_over_a_table_beside_them(layout: str, tmp_path: Path) -> None:
    top = write_folder(tmp_path / "x", {layout.format("cat"): b"", layout.format("dog"): b"", "train.csv": b""})
    assert table.why_not(top)
    assert folder.why_not(top) is None
    assert len(folder.read(top, Columns()).examples) == 2


def test_a_table_wins_over_a_folder_of_loose_images(tmp_path: Path) -> None:
    top = write_folder(tmp_path / "x", {"train/1.jpg": b"one", "train/2.jpg": b"two"})
    (top / "train.csv").write_text("path,label\ntrain/1.jpg,a\ntrain/2.jpg,b\n")
    assert folder.why_not(top)
    assert [row.read() for row in table.read(top, Columns()).examples] == [b"one", b"two"]


def test_a_table_of_image_paths(tmp_path: Path) -> None:
    write_folder(tmp_path, {"in/1.jpg": b"one", "in/2.PNG": b"two"})
    outside = tmp_path / "out.gif"
    outside.write_bytes(b"three")
    text = f"label,caption,file\na,x,in/1.jpg\nb,y,in\\2.PNG\na,z,{outside}\nb,w,in/missing.jpg\n"
    source = read_text(tmp_path / "t.csv", text)
    assert source.kind == "image"
    assert [row.read() for row in source.examples[:3]] == [b"one", b"two", b"three"]
    assert source.examples[0].name == "in/1.jpg"
    assert source.size_bytes == 11
    with pytest.raises(FileNotFoundError):
        source.examples[3].read()
    (tmp_path / "in/1.jpg").write_bytes(b"changed")
    assert table.read(tmp_path / "t.csv", Columns()).fingerprint != source.fingerprint


def test_a_path_that_is_no_file_does_not_block(tmp_path: Path) -> None:
    write_folder(tmp_path, {"1.jpg": b"one"})
    os.mkfifo(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").symlink_to("/dev/zero")
    source = read_text(tmp_path / "t.csv", "path,label\n1.jpg,a\n2.jpg,b\n3.jpg,b\n")
    assert source.examples[0].read() == b"one"
    for row in source.examples[1:]:
        with pytest.raises(BadInput, match="is not a file"):
            row.read()


def test_json_lines_with_keys_of_their_own_need_no_more_than_the_file(tmp_path: Path) -> None:
    count = 3000
    text = "".join(f'{{"text": "t{i}", "label": {i % 2}, "id{i}": 1}}\n' for i in range(count))
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    tracemalloc.start()
    try:
        source = table.read(path, Columns())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert contents(source) == [(f"t{i}", str(i % 2)) for i in range(count)]
    assert peak_bytes < 2000 * count  # all columns of all rows would be 8 * count bytes a row
    assert contents(table.read(path, Columns(input="id7")))[6:9] == [("", "0"), ("1", "1"), ("", "0")]


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl"])
def test_an_error_shows_a_few_of_many_columns(name: str, tmp_path: Path) -> None:
    names = [f"c{i}" for i in range(100_000)]
    text = ",".join(names) + "\n" + ",".join(names) + "\n" if name == "t.csv" else json.dumps(dict.fromkeys(names, 1))
    for columns in (Columns(), Columns(label="z")):
        with pytest.raises((DataError, UsageError), match="c1") as error:
            read_text(tmp_path / name, text, columns)
        assert len(str(error.value)) < 2000


def test_paths_of_missing_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"None of the first 2 files .*the first is .*in/1\.jpg") as error:
        read_text(tmp_path / "t.csv", "path,label\nin/1.jpg,a\nin/2.jpg,b\n")
    assert "relative to the folder" in error.value.fix


def test_relative_paths_stay_below_the_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 3 .*leads out"):
        read_text(tmp_path / "t.csv", "path,label\n1.jpg,a\n../../2.jpg,b\n")


def test_real_sentiment(shared_data: Path) -> None:
    english = table.read(shared_data / "sentiment_en", Columns())
    assert Counter(row.split for row in english.examples) == {"train": 67_349, "val": 872, "test": 1_821}
    assert english.classes == ("0", "1")
    assert english.notes == ()
    chinese = table.read(shared_data / "sentiment_zh" / "ChnSentiCorp_htl_all.csv", Columns())
    assert Counter(row.target for row in chinese.examples) == {"1": 5_322, "0": 7_766 - 5_322}
    assert sum(row.read() == "" for row in chinese.examples) == 1


# --- npz ------------------------------------------------------------------------------------

IMAGES = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
LABELS = np.array([0, 1, 1, 0])


def read_npz(path: Path, **arrays: np.ndarray) -> Source:
    np.savez_compressed(path / "a.npz", **arrays)
    return npz.read(path / "a.npz", Columns())


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("x_train y_train x_test y_test", ["train", "test"]),
        ("X_train y_train X_val y_val x_test y_test", ["train", "val", "test"]),
        ("train_images train_labels val_images val_labels test_images test_labels", ["train", "val", "test"]),
        ("images labels", [None]),
        ("X y", [None]),
        ("data target", [None]),
    ],
)
def test_usual_names_of_arrays(names: str, splits: list[str | None], tmp_path: Path) -> None:
    words = names.split()
    arrays = {name: IMAGES if i % 2 == 0 else LABELS for i, name in enumerate(words)}
    source = read_npz(tmp_path, **arrays)
    assert [row.split for row in source.examples] == [split for split in splits for _ in range(4)]
    assert [row.target for row in source.examples[:4]] == ["0", "1", "1", "0"]
    assert all(np.array_equal(row.read(), image) for row, image in zip(source.examples, IMAGES, strict=False))
    assert source.examples[1].name == f"{words[0]}[1]"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6, 5), (6, 5)),
        ((4, 6, 5, 1), (6, 5)),
        ((4, 1, 6, 5), (6, 5)),
        ((4, 6, 5, 3), (6, 5, 3)),
        ((4, 3, 6, 5), (6, 5, 3)),
        ((4, 3, 3, 3), (3, 3, 3)),
        ((4, 6, 5, 4), (6, 5, 4)),
    ],
)
def test_shapes_of_images(shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    image = read_npz(tmp_path, images=np.zeros(shape, np.uint8), labels=LABELS).examples[0].read()
    assert isinstance(image, np.ndarray)
    assert image.shape == expected
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (LABELS.reshape(4, 1), ("0", "1")),
        (LABELS.astype(np.float32), ("0", "1")),
        (np.array([10, 9, 9, 10]), ("9", "10")),
        (np.array(["dog", "cat", "cat", "dog"]), ("cat", "dog")),
        (np.array([b"dog", b"cat", b"cat", b"dog"]), ("cat", "dog")),
        (np.eye(3)[[0, 2, 2, 0]], ("0", "2")),
        (LABELS.astype(bool), ("0", "1")),
    ],
)
def test_forms_of_labels(labels: np.ndarray, classes: tuple[str, ...], tmp_path: Path) -> None:
    source = read_npz(tmp_path, images=IMAGES, labels=labels)
    assert source.classes == classes
    assert source.examples[0].target == source.examples[3].target != source.examples[1].target


def test_class_names(tmp_path: Path) -> None:
    source = read_npz(tmp_path, x=IMAGES, y=LABELS, class_names=np.array(["cat", "dog", "emu"]))
    assert source.classes == ("cat", "dog", "emu")
    assert [row.target for row in source.examples] == ["cat", "dog", "dog", "cat"]
    with pytest.raises(DataError, match="list of 1 class names"):
        read_npz(tmp_path, x=IMAGES, y=LABELS, class_names=np.array(["cat"]))


@pytest.mark.parametrize(
    ("images", "expected", "note"),
    [
        (np.array([0, 0.5, 1]), [0, 128, 255], "multiplied by 255"),
        (np.array([0, 127.6, 255]), [0, 128, 255], "rounded"),
        (np.array([False, True, True]), [0, 255, 255], "multiplied by 255"),
        (np.array([0, 7, 255], np.int64), [0, 7, 255], "rounded"),
        (np.array([0, 257 * 9, 65535], np.uint16), [0, 9, 255], "16-bit"),
    ],
)
def test_other_numbers_become_bytes(images: np.ndarray, expected: list[int], note: str, tmp_path: Path) -> None:
    source = read_npz(tmp_path, images=images.reshape(3, 1, 1), labels=np.array([0, 1, 1]))
    assert [int(row.read()[0, 0]) for row in source.examples] == expected  # type: ignore[index]
    assert note in source.notes[0]


def test_all_splits_have_one_scale(tmp_path: Path) -> None:
    dark = np.full((2, 2, 2), 1.0)
    source = read_npz(tmp_path, x_train=dark * 200, y_train=LABELS[:2], x_test=dark, y_test=LABELS[:2])
    assert [int(row.read()[0, 0]) for row in source.examples] == [200, 200, 1, 1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": IMAGES, "b": LABELS}, "usual names; it has: a, b"),
        ({"x_test": IMAGES, "y_test": LABELS}, "usual names"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "4 images, but there are 3 labels"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "is empty"),
        ({"images": IMAGES, "labels": LABELS * 0}, "only one class"),
        ({"images": IMAGES.reshape(4, 30), "labels": LABELS}, "shape"),
        ({"images": IMAGES.reshape(4, 3, 2, 5), "labels": np.ones((4, 3))}, "labels of images"),
        ({"images": IMAGES - 10.0, "labels": LABELS}, "values from"),
        ({"images": IMAGES * np.nan, "labels": LABELS}, "values from nan"),
        ({"images": IMAGES.astype(str), "labels": LABELS}, "not numbers"),
        ({"images": IMAGES, "labels": LABELS + np.nan}, "not all finite numbers"),
        ({"images": IMAGES.astype(object), "labels": LABELS}, "Python objects"),
        ({"images": IMAGES, "labels": LABELS.astype(object)}, "Python objects"),
        ({"images": IMAGES, "labels": LABELS.astype(complex)}, "neither numbers nor text"),
        ({"images": IMAGES, "labels": LABELS.astype("U1001")}, "labels of images"),
        ({"images": IMAGES, "labels": np.array(1)}, "4 images, but there are 1 labels"),
        ({"images": IMAGES[:, :0], "labels": LABELS}, "isn't a shape of images"),
        ({"images": IMAGES, "labels": LABELS, "classes": np.zeros((2 << 20, 1), bool)}, "can't be class names"),
    ],
)
def test_arrays_that_cant_be_used(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        read_npz(tmp_path, **arrays)
    assert str(tmp_path) in error.value.message
    assert error.value.fix


def test_an_npz_that_is_too_large_or_has_a_wrong_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES, labels=LABELS)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(4, 6, 5)", b"(9, 9, 9)"))
    with pytest.raises(DataError, match="damaged"):
        npz.read(path, Columns())
    path.write_bytes(content[:-40])
    with pytest.raises(DataError, match="damaged"):
        npz.read(path, Columns())
    path.write_bytes(content)
    monkeypatch.setattr(_stored_arrays, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="the limit is 100 B"):
        npz.read(path, Columns())


def test_every_array_counts_before_one_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stored_arrays, "MAX_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "a.npz", images=IMAGES, labels=np.zeros((4, 1 << 20), np.uint8))
    np.savez_compressed(tmp_path / "b.npz", images=IMAGES, labels=np.zeros(32 << 20, np.uint8))
    np.savez_compressed(tmp_path / "c.npz", images=IMAGES, labels=LABELS, classes=np.full(5000, "", "U1000"))
    messages = ("have 4.2 MB; the limit is", "but there are 33,554,432 labels", "have 20.0 MB; the limit is")
    for name, message in zip("abc", messages, strict=True):
        tracemalloc.start()
        try:
            with pytest.raises(DataError, match=message):
                npz.read(tmp_path / f"{name}.npz", Columns())
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def test_too_many_images_without_pixels_or_with_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stored_arrays, "MAX_IMAGES", 3)
    with pytest.raises(DataError, match="has 4 images; the limit is 3"):
        read_npz(tmp_path, images=IMAGES, labels=LABELS)


def test_of_two_members_of_one_name_the_checked_one_is_read(tmp_path: Path) -> None:
    """numpy.load would take `labels`, whatever it is, before `labels.npy`."""
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive_, zipfile.ZipFile(tmp_path / "b.npz", "w") as twice:
        twice.writestr("labels", b"something else")
        for name in archive_.namelist():
            twice.writestr(name, archive_.read(name))
    assert [row.target for row in npz.read(tmp_path / "b.npz", Columns()).examples] == ["0", "1", "1", "0"]


def test_an_array_header_as_large_as_memory(tmp_path: Path) -> None:
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", 64 << 20) + b" " * (64 << 20)
    write_zip(tmp_path / "a.npz", {"images.npy": header, "labels.npy": header})
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="damaged"):
            npz.read(tmp_path / "a.npz", Columns())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_an_npz_that_numpy_would_not_write(method: int, tmp_path: Path) -> None:
    write_zip(tmp_path / "a.npz", {"images.npy": b"\0" * 99, "labels.npy": b"\0" * 99}, method)
    with pytest.raises(DataError, match="damaged.*a way that NumPy doesn't use"):
        npz.read(tmp_path / "a.npz", Columns())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux holds a process to its address space")
def test_arrays_that_do_not_fit_into_memory(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2, 8 << 10, 8 << 10), np.uint8), labels=np.arange(2))
    code = """
import pathlib, resource, sys
import numpy.lib.format
from suanli.core.errors import DataError
from suanli.data.readers import npz
from suanli.core.types import Columns
used_bytes = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used_bytes + (64 << 20),) * 2)
try:
    npz.read(pathlib.Path(sys.argv[1]), Columns())
except DataError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.npz")]
    stdout = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "don't fit into the free memory" in stdout
