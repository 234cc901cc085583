"""Names of folders and files: those that mean a split, those that aren't UTF-8, and those that systems leave behind."""

from __future__ import annotations

import io
import os
import struct
import sys
import tarfile
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import pytest

from suanli.core.errors import DataError, UsageError, suggest
from suanli.core.types import Columns, Source
from suanli.data.preprocess.image import ImagePreprocess
from suanli.data.readers import archive, folder, table
from suanli.data.split_names import named_split, parse_split, parse_splits

# --- names that mean a split -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("training_set test_set", "train test"),
        ("seg_train seg_test seg_pred", "train test -"),
        ("Train_Data Test_Data", "train test"),
        ("TrainData ValData", "train val"),
        ("trainset testset", "train test"),
        ("Training-Images Test-Images", "train test"),
        ("train2017 val2017", "train val"),
        ("X_train X_test", "train test"),
        ("训练集 测试集", "train test"),
        ("train eval", "train test"),
        ("train test eval", "train test val"),
        ("train val test eval", "train val test -"),
        ("train holdout", "train test"),
        ("train eval hold-out", "train val test"),
        ("train test train_labels train_images", "train test - -"),
        ("dev test", "val test"),  # the caller misses the training split
        ("eval holdout", "- -"),
        ("bullet_train toy_test", "- -"),
        ("imdb_train imdb_test yelp_train yelp_test", "- - - -"),
        ("trainers tests strains", "- - -"),
    ],
)
def test_names_side_by_side_that_mean_splits(names: str, splits: str) -> None:
    expected = {name: split for name, split in zip(names.split(), splits.split(), strict=True) if split != "-"}
    assert parse_splits(names.split()) == expected


def test_one_name_that_means_a_split() -> None:
    names = ["Validation", "valid", "Test Images", "eval", "seg_train", "cat"]
    assert [parse_split(name) for name in names] == ["val", "val", "test", "test", None, None]
    assert named_split("validation") == "val"
    with pytest.raises(UsageError, match=r"Unknown split 'tset'. Did you mean 'test'\? Allowed: test, train, val"):
        named_split("tset")


def write(top: Path, *names: str) -> Path:
    for name in names:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(name.encode())
    return top


def read(top: Path, *names: str) -> Source:
    return folder.read(write(top, *names), Columns())


def counts(source: Source) -> dict[tuple[str | None, str], int]:
    return dict(Counter((row.split, row.target) for row in source.examples))


PETS = {("train", "cat"): 1, ("train", "dog"): 1, ("test", "cat"): 1, ("test", "dog"): 1}


def pets(train: str, test: str) -> list[str]:
    return [f"{split}/{label}/1.jpg" for split in (train, test) for label in ("cat", "dog")]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("seg_train/seg_train", "seg_test"),  # one of them doubled
        ("Train_Data", "holdout"),
        ("Training Images", "Test Images"),
        ("train/all", "test/all"),
        ("data/images/train", "data/images/test"),
        ("outer/train_set/images", "outer/eval/images"),
    ],
)
def test_folders_that_are_splits(train: str, test: str, tmp_path: Path) -> None:
    source = read(tmp_path / "d", *pets(train, test))
    assert counts(source) == PETS
    outer = [Path(name).parts[0] for name in (train, test)]
    assert all(any(name in note for note in source.notes) for name in outer if "_" in name)


def test_the_note_says_which_folder_became_which_split(tmp_path: Path) -> None:
    source = read(tmp_path, *pets("seg_train/seg_train", "seg_test/seg_test"), "seg_pred/seg_pred/9.jpg")
    assert counts(source) == PETS
    assert source.notes[0] == "folders read as splits: seg_test is test, seg_train is train"
    assert source.notes[1] == "1 image outside a class folder, skipped: seg_pred/seg_pred/9.jpg"
    assert read(tmp_path / "usual", *pets("train", "test")).notes == ()


def test_an_unlabelled_test_folder_beside_a_training_folder(tmp_path: Path) -> None:
    source = read(tmp_path, "Train Data/cat/1.jpg", "Train Data/dog/1.jpg", "Test Data/7.jpg")
    assert counts(source) == {("train", "cat"): 1, ("train", "dog"): 1}
    assert "Test Data/7.jpg" in source.notes[-1]


def test_splits_inside_of_each_class(tmp_path: Path) -> None:
    names = [f"{label}/{split}/1.jpg" for label in ("cat", "dog") for split in ("train", "test")]
    source = read(tmp_path, *names)
    assert counts(source) == PETS
    assert source.notes == ("folders inside of each class read as splits: test, train",)


@pytest.mark.parametrize(
    "names",
    [
        ("train/1.jpg", "car/1.jpg", "bus/1.jpg"),  # vehicles
        ("train/steam/1.jpg", "train/2.jpg", "car/old/1.jpg"),
        ("test/1.jpg", "dev/1.jpg", "prod/1.jpg"),
        ("eval/1.jpg", "holdout/1.jpg"),
        ("test set/tv/1.jpg", "oscilloscope/x/1.jpg"),
        ("bullet train/1.jpg", "toy train/1.jpg"),
        ("cat/indoor/1.jpg", "cat/2.jpg", "dog/indoor/1.jpg"),
    ],
)
def test_classes_stay_classes(names: tuple[str, ...], tmp_path: Path) -> None:
    source = read(tmp_path, *names)
    assert set(source.classes) == {name.split("/")[0] for name in names}
    assert {row.split for row in source.examples} == {None}
    assert source.notes == ()


def test_class_folders_with_the_same_subfolders_are_pointed_out(tmp_path: Path) -> None:
    source = read(tmp_path, *(f"{ward}/{label}/1.jpg" for ward in ("a", "b") for label in ("ill", "well")))
    assert source.classes == ("a", "b")
    (note,) = source.notes
    assert note.startswith("every class folder (a, b) holds the same subfolders (ill, well).")
    assert "rename these to train, val and test" in note


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["training_set/1.jpg", "test_set/2.jpg"], "no class folders inside test_set, training_set"),
        (["training_set/a/1.jpg", "test_set/b/1.jpg"], "no class folders that are the same in test_set, training_set"),
        ([*pets("train_set", "test set"), *pets("train_data", "test set")], "more than one folder for the train split"),
        ([*pets("pets/train", "pets/test"), "more/1.jpg"], r"splits inside of the folder pets \(test, train\)"),
    ],
)
def test_folders_of_unclear_meaning_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, *names)


@pytest.mark.parametrize("names", [("train", "test"), ("imdb_train", "imdb_test"), ("Training Set", "eval")])
def test_tables_of_a_folder_that_are_splits(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / f"{name}.csv").write_text("text,label\ngood,a\nbad,b\n")
    assert Counter(row.split for row in table.read(tmp_path, Columns()).examples) == {"train": 2, "test": 2}


def test_a_split_column_with_other_words(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,label,split\ngood,a,Training\nbad,b,training\nfine,a,eval\nwell,a,\n")
    assert [row.split for row in table.read(path, Columns()).examples] == ["train", "train", "test", None]


def test_a_long_list_of_names_is_cut_to_the_nearest() -> None:
    names = [f"resnet{size}{kind}" for size in range(18, 200, 4) for kind in ("", "d", "_v2")]
    assert suggest("ResNet-18", names) == (
        "Did you mean 'resnet18'? Others like it: resnet198, resnet18d, resnet186, resnet182."
    )
    assert suggest("zzz", names) == (
        "Allowed are 138 names, such as resnet102, resnet102_v2, resnet102d, resnet106, resnet106_v2."
    )


# --- names that aren't UTF-8, and forms of Unicode -----------------------------------------------

WORDS = {
    "gbk": ("鸟", "狗", "猫"),
    "big5": ("功", "功夫", "狗"),  # the first ends in the byte of a backslash
    "cp932": ("いぬ", "ねこ", "表"),
    "cp1252": ("café", "thé", "lait"),
}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="other systems have names of Unicode only")


def pack(kind: str, top: Path, labels: list[bytes]) -> Source:
    """A folder, zip or tar with two images for each of these names."""
    names = [label + b"/%d.jpg" % i for label in labels for i in range(2)]
    if kind == "folder":
        for name in names:
            path = os.path.join(os.fsencode(top), b"d", name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).write_bytes(name)
        return folder.read(top / "d", Columns())
    path = top / f"d.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archived:
            for name in names:
                info = tarfile.TarInfo(name.decode(errors="surrogateescape"))
                info.size = len(name)
                archived.addfile(info, io.BytesIO(name))
    else:
        write_zip(path, names)
    return archive.read(path, Columns())


def write_zip(path: Path, names: list[bytes], stated: dict[bytes, bytes] | None = None) -> None:
    """`stated`: the extra field of each name."""
    content = directory = b""
    for name in names:
        sizes = struct.pack(
            "<3I2H", zlib.crc32(name), len(name), len(name), len(name), len((stated or {}).get(name, b""))
        )
        about = struct.pack("<5H", 20, 0, 0, 0, 33) + sizes  # stored, of 1 January 1980
        place = struct.pack("<3H2I", 0, 0, 0, 0, len(content))
        directory += b"PK\1\2\x14\0" + about + place + name + (stated or {}).get(name, b"")
        content += b"PK\3\4" + about + name + (stated or {}).get(name, b"") + name
    end = struct.pack("<4H2IH", 0, 0, len(names), len(names), len(directory), len(content), 0)
    path.write_bytes(content + directory + b"PK\5\6" + end)


@pytest.mark.parametrize("encoding", WORDS)
@pytest.mark.parametrize("kind", [pytest.param("folder", marks=LINUX), "zip", "tar"])
def test_names_in_old_encodings_are_read(kind: str, encoding: str, tmp_path: Path) -> None:
    words = WORDS[encoding]
    stored = "cp437" if (kind, encoding) == ("zip", "cp1252") else encoding  # Western zips have that of DOS
    source = pack(kind, tmp_path, [word.encode(stored) for word in words])
    assert set(source.classes) == set(words)
    assert all(row.read().startswith(row.target.encode(stored)) for row in source.examples)  # type: ignore[union-attr]
    assert bool(source.notes) == (stored != "cp437")
    assert all("names that aren't UTF-8, read as" in note for note in source.notes)
    "".join([*source.classes, *source.notes, *(row.name for row in source.examples)]).encode()


@pytest.mark.parametrize("kind", [pytest.param("folder", marks=LINUX), "zip", "tar"])
def test_names_in_no_known_encoding_stay_apart(kind: str, tmp_path: Path) -> None:
    source = pack(kind, tmp_path, [b"\x81\xff", b"\x82\xff", b"\x81\xfe", b"plain"])
    assert len(source.classes) == 4
    "".join([*source.classes, *source.notes, *(row.name for row in source.examples)]).encode()


@LINUX
def test_a_file_to_predict_whose_name_is_no_text_can_be_named(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xc4\xf1.png")).write_bytes(b"image")
    ((name, read),) = ImagePreprocess.find_inputs(tmp_path)
    assert (name, read()) == (r"\xc4\xf1.png", b"image")


def test_a_zip_that_states_its_names(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    words = {word.encode("gbk") + b"/1.jpg": f"{word}/1.jpg".encode() for word in WORDS["gbk"]}
    extra = {raw: struct.pack("<BI", 1, zlib.crc32(raw)) + name for raw, name in words.items()}
    write_zip(path, list(words), {raw: struct.pack("<HH", 0x7075, len(e)) + e for raw, e in extra.items()})
    source = archive.read(path, Columns())
    assert set(source.classes) == set(WORDS["gbk"])
    assert source.notes == ()


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS takes both forms for one")
def test_two_forms_of_unicode_are_one_class(tmp_path: Path) -> None:
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    source = read(tmp_path / "splits", f"train/{composed}/1.jpg", f"test/{apart}/2.jpg", "train/tea/3.jpg")
    assert counts(source) == {("train", composed): 1, ("test", composed): 1, ("train", "tea"): 1}
    assert source.notes == ()
    both = read(tmp_path / "both", f"{composed}/1.jpg", f"{apart}/2.jpg", "tea/3.jpg")
    assert both.classes == (composed, "tea")
    assert "differ only in their form of Unicode" in both.notes[0]
    path = tmp_path / "t.csv"
    path.write_text(f"text,label\ngood,{composed}\nbad,{apart}\nfine,tea\n", encoding="utf-8")
    assert table.read(path, Columns()).classes == (composed, "tea")


def test_half_a_surrogate_pair_in_json_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "good \\ud83d", "label": "\\ud83d"}\n{"text": "bad", "label": "\\ud83d\\ude00"}\n')
    source = table.read(path, Columns())
    assert source.classes == ("�", "😀")
    str([row.read() for row in source.examples]).encode()


# --- what systems leave behind -------------------------------------------------------------------


def test_folders_of_systems_are_passed_over(tmp_path: Path) -> None:
    litter = ["$RECYCLE.BIN/S-1/1.jpg", "System Volume Information/x.jpg", "lost+found/1.jpg", "found.000/1.jpg"]
    litter += ["@eaDir/cat/t.jpg", "cat/@eaDir/1.jpg/t.jpg", "#recycle/cat/1.jpg", "dog/.Trash-1000/1.jpg"]
    source = read(tmp_path, "cat/1.jpg", "dog/1.jpg", *litter)
    assert sorted(row.name for row in source.examples) == ["cat/1.jpg", "dog/1.jpg"]
    assert source.classes == ("cat", "dog")
    assert source.notes == ()


# --- files that aren't what their names say ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "t.csv",
            b"<!DOCTYPE html>\n<title>403</title>\n",
            "is no table: it is an HTML page: was the download refused?",
        ),
        (
            "t.csv",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is no table: it is a Git LFS pointer",
        ),
        ("t.tsv", b"PK\x03\x04\xff\xfe xl/workbook.xml", "is no table: it is an Excel workbook"),
        (
            "t.csv",
            b"MZ,label\n1,a\n",
            "is always 'a'",
        ),  # letters that begin a program, too
        ("t.zip", b"<html>", "not what its name says: it is an HTML page"),
        ("t.tar.gz", b"Rar!\x1a\x07\0", "not what its name says: it is a RAR archive"),
    ],
)
def test_another_kind_of_file_is_named_in_words(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    reader = archive if archive.why_not(path) is None else table
    with pytest.raises(DataError, match=message):
        reader.read(path, Columns())


def test_a_column_names_images_without_folder_or_suffix(tmp_path: Path) -> None:
    write(tmp_path, *(f"photos/all/{i:03}.png" for i in range(20)), "photos/notes.txt")
    path = tmp_path / "t.csv"
    for head, value in (("id,label", "{:03}"), ("age,image_id,label", "7,{:03}"), ("image,label", "{:03}.png")):
        rows = "".join(f"{value.format(i)},{'ab'[i % 2]}\n" for i in range(20))
        path.write_text(f"{head}\n{rows}")
        source = table.read(path, Columns())
        assert source.kind == "image"
        assert source.examples[3].read() == b"photos/all/003.png"
        assert "read as names of images: photos/all/000.png" in source.notes[0]


@pytest.mark.parametrize("columns", ["age,label", "a,b,c,label", "day,label"])
def test_columns_of_numbers_are_no_texts(columns: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    values = {"age": "{}", "a": "{}.5", "b": "-{}", "c": "1e{}", "day": "2024-05-{}", "label": "x{}"}
    rows = [
        ",".join(values[c].format(i % 2 if c == "label" else 10 + i) for c in columns.split(",")) for i in range(12)
    ]
    path.write_text("\n".join([columns, *rows]))
    assert table.read(path, Columns()).kind == "table"
    first = columns.partition(",")[0]
    assert table.read(path, Columns(input=first)).kind == "text"  # the user has said so


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(",text,label,,\n0,good,a,,\n1,bad,b,,,\n2,fine,a,,,!\n")
    source = table.read(path, Columns())
    assert [row.read() for row in source.examples] == ["good", "bad"]  # the last line has a surplus cell that says more
    path.write_text("text,label,x,x\ngood,a,1,1\nbad,b,1,1\n")
    assert len(table.read(path, Columns()).examples) == 2
    with pytest.raises(DataError, match="more than one column named 'x'"):
        table.read(path, Columns(label="x"))
