"""Splits by content, decoding once, and a cache that can't be half-written."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import suanli
from suanli.core.errors import DataError, StorageError
from suanli.core.types import SPLITS, Example, Recipe, Source
from suanli.data.cache import prepare_source
from suanli.data.source import find_source
from suanli.data.splits import content_digest, split_of

FRACTIONS = st.floats(0.05, 0.4)


@given(st.binary(min_size=0, max_size=64), FRACTIONS, FRACTIONS)
def test_split_depends_on_content_alone(content: bytes, val: float, test: float) -> None:
    digest = content_digest(content)
    assert split_of(digest, val, test) in SPLITS
    assert split_of(digest, val, test) == split_of(content_digest(bytes(content)), val, test)


@given(st.integers(0, 2**32), FRACTIONS, FRACTIONS)
def test_splits_have_their_shares(seed: int, val: float, test: float) -> None:
    digests = [content_digest(f"{seed}:{i}") for i in range(2000)]
    splits = [split_of(d, val, test) for d in digests]
    # Five standard deviations of a binomial share of 2,000.
    assert splits.count("val") / 2000 == pytest.approx(val, abs=0.056)
    assert splits.count("test") / 2000 == pytest.approx(test, abs=0.056)


def array_source(arrays: list[np.ndarray], labels: list[str], splits: list[str | None] | None = None) -> Source:
    splits = splits or [None] * len(arrays)
    rows = [
        Example(name=f"row{i}", target=label, split=split, read=lambda a=a: a)
        for i, (a, label, split) in enumerate(zip(arrays, labels, splits, strict=True))
    ]
    fingerprint = content_digest(b"".join(content_digest(a) for a in arrays)).hex() + str(labels) + str(splits)
    return Source(
        name="arrays",
        kind="image",
        examples=rows,
        classes=tuple(sorted(set(labels))),
        origin="arrays",
        fingerprint=fingerprint,
        size_bytes=1,
    )


def pictures(count: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8))


def members(source: Source, cache: Path) -> dict[str, str]:
    prepared = prepare_source(source, Recipe(), cache, threads=2)
    return {name: split for split in SPLITS for name in prepared.splits[split].names}


@given(st.integers(60, 120), st.integers(1, 40), st.integers(0, 1000))
def test_adding_inputs_never_moves_another(
    tmp_path_factory: pytest.TempPathFactory, n: int, more: int, seed: int
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    arrays = pictures(n + more, seed)
    labels = ["ab"[i % 2] for i in range(n + more)]
    before = members(array_source(arrays[:n], labels[:n]), cache)
    after = members(array_source(arrays, labels), cache)
    assert before.items() <= after.items()


def test_equal_inputs_are_in_one_split(tmp_path: Path) -> None:
    arrays = pictures(50)
    prepared = prepare_source(array_source(arrays * 2, ["a", "b"] * 50), Recipe(), tmp_path, threads=2)
    assert prepared.findings["counts"]["duplicates_across_splits"] == 0
    assert prepared.findings["counts"]["duplicates_within"] == 50


def test_published_splits_are_kept_and_missing_ones_are_taken_from_train(tmp_path: Path) -> None:
    arrays = pictures(200)
    labels = ["ab"[i % 2] for i in range(200)]
    split_by_name = members(array_source(arrays, labels, ["test"] * 50 + ["train"] * 150), tmp_path)
    assert [n for n, s in split_by_name.items() if s == "test"] == [f"row{i}" for i in range(50)]
    assert 0 < sum(s == "val" for s in split_by_name.values()) < 40


def test_every_input_is_in_exactly_one_split_with_its_own_pixels(tmp_path: Path) -> None:
    arrays = pictures(90)
    labels = ["ab"[i % 2] for i in range(90)]
    prepared = prepare_source(array_source(arrays, labels), Recipe(), tmp_path, threads=2)
    seen = []
    for split in prepared.splits.values():
        for position, name in enumerate(split.names):
            i = int(name.removeprefix("row"))
            seen.append(i)
            np.testing.assert_array_equal(split.inputs["image"][split.index[position]], arrays[i])
            assert prepared.task.classes[split.targets["class"][position]] == labels[i]
    assert sorted(seen) == list(range(90))


def test_a_leak_between_published_splits_comes_first(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    for split in ("train", "test"):
        for c in ("class0", "class1"):
            (root / split / c).mkdir(parents=True)
    for c in ("class0", "class1"):
        for i, file in enumerate(sorted((root / c).iterdir())):
            file.rename(root / ("test" if i < 8 else "train") / c / file.name)
        (root / c).rmdir()
    # The same pixels in another container are the same picture; the other label is a conflict.
    Image.open(root / "train/class0/020.png").save(root / "test/class0/leaked.bmp")
    Image.open(root / "train/class0/021.png").save(root / "train/class1/relabelled.png")
    findings = suanli.prepare(root).findings
    assert findings["counts"]["duplicates_across_splits"] == 1
    assert any("leaked" in n for n in findings["duplicates_across_splits"][0]["names"])
    assert findings["counts"]["label_conflicts"] == 1
    assert sorted(findings["label_conflicts"][0]["labels"]) == ["class0", "class1"]


def test_the_second_time_nothing_is_decoded(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    first = suanli.prepare(root)
    second = suanli.prepare(root)
    assert not first.reused
    assert second.reused
    assert first.digest == second.digest
    assert first.preprocess == second.preprocess
    (root / "class0" / "new.png").write_bytes((root / "class1" / "000.png").read_bytes())
    assert not suanli.prepare(root).reused


@pytest.mark.parametrize(
    "file",
    [
        *("inputs/image.npy", "targets/class.npy", "geometries.npy", "meta.json", "names.npy", "split.npy"),
        *("leaks.npy", "examples.npz"),
    ],
)
def test_a_damaged_cache_is_made_again(picture_folder: Callable[..., Path], file: str) -> None:
    root = picture_folder()
    first = suanli.prepare(root)
    target = first.path / file
    target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
    again = suanli.prepare(root)
    assert not again.reused
    assert again.digest == first.digest


def test_processes_that_prepare_the_same_data_all_get_it(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=60)
    digests: list[str] = []
    threads = [threading.Thread(target=lambda: digests.append(suanli.prepare(root).digest)) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(digests) == 3
    assert len(set(digests)) == 1
    assert not list(Path(suanli.prepare(root).path).parent.glob(".*.tmp"))


def bad_share_folder(root: Path) -> Path:
    (root / "class0" / "empty.png").write_bytes(b"")
    (root / "class0" / "text.jpg").write_text("not a picture")
    whole = (root / "class1" / "000.png").read_bytes()
    (root / "class1" / "short.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_too_many_bad_inputs_stop_and_are_listed(picture_folder: Callable[..., Path]) -> None:
    root = bad_share_folder(picture_folder())
    with pytest.raises(DataError, match=r"(?s)3 of 63 examples.*empty\.png.*text\.jpg.*short\.png.*--max-bad"):
        suanli.prepare(root)
    prepared = suanli.prepare(root, max_bad=0.1)
    assert prepared.reused  # the work of the refused attempt was kept
    assert sum(len(s) for s in prepared.splits.values()) == 60


def test_one_class_is_refused(tmp_path: Path) -> None:
    source = array_source(pictures(40), ["a"] * 40)
    source = dataclasses.replace(source, classes=("a", "b"))
    from suanli.data.checks import refuse_unlearnable

    prepared = prepare_source(source, Recipe(), tmp_path, threads=2)
    with pytest.raises(DataError, match="Only one class"):
        refuse_unlearnable(prepared.findings, prepared.task)


def test_a_class_with_a_single_image_is_refused(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder()
    (root / "lonely").mkdir()
    Image.new("RGB", (12, 12), (9, 9, 9)).save(root / "lonely" / "one.png")
    with pytest.raises(DataError, match="'lonely' has a single usable example"):
        suanli.prepare(root)


def test_too_few_for_a_split_says_which_share_would_do(picture_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="split is empty.*so few groups.*val_fraction"):
        suanli.prepare(picture_folder(each=2), group_pattern=r"/00(\d)")


def test_four_images_are_enough_for_three_splits(picture_folder: Callable[..., Path]) -> None:
    assert all(map(len, suanli.prepare(picture_folder(each=2)).splits.values()))


def test_a_full_disk_is_noticed_before_decoding(
    picture_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    root = picture_folder()
    free = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(StorageError, match="100 B free"):
        suanli.prepare(root)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_cache_that_is_a_file_is_a_storage_error(picture_folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "occupied").write_text("")
    with pytest.raises(StorageError, match="Can't write"):
        suanli.prepare(picture_folder(), cache_dir=tmp_path / "occupied")


def test_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(suanli.UsageError, match="Did you mean 'digits'"):
        find_source("digit", data_dir=tmp_path)
    with pytest.raises(DataError, match="no file or folder"):
        find_source(tmp_path / "nowhere", data_dir=tmp_path)
