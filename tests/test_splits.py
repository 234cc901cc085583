"""Splits have some of each class, stay as they are when files are added, and never divide a group."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import suanli
from suanli.core.types import SPLITS, Example
from suanli.data.source import find_source
from suanli.data.splits import Assignment, assign_splits, content_digest, split_of
from suanli.tasks.regression import Regression

CLASSES = st.lists(st.sampled_from("abcd"), min_size=1, max_size=60)
GROUPS = st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 12)), min_size=1, max_size=60)


def make_rows(classes: Sequence[str], *, seed: int = 0, groups: Sequence[int] | None = None) -> list[Example]:
    return [
        Example(
            name=str(i),
            target=label,
            split=None,
            read=lambda i=i: f"{seed} {i}",  # type: ignore[misc]
            group=None if groups is None else f"{seed} {groups[i]}",
        )
        for i, label in enumerate(classes)
    ]


def assign(rows: Sequence[Example], known: dict[bytes, str] | None = None, fraction: float = 0.1) -> Assignment:
    return assign_splits(
        rows,
        lambda at: [content_digest(rows[i].read()) for i in at],
        val_fraction=fraction,
        test_fraction=fraction,
        strata=lambda target: (target,),
        known=known,
    )


def counts(rows: Sequence[Example], splits: Sequence[str]) -> dict[str, Counter[str]]:
    by_class: dict[str, Counter[str]] = defaultdict(Counter)
    for row, split in zip(rows, splits, strict=True):
        by_class[row.target][split] += 1
    return by_class


def kept(assignment: Assignment) -> dict[bytes, str]:
    return dict(zip(assignment.units, assignment.splits, strict=True))


@given(CLASSES, st.integers(0, 1000))
def test_each_split_has_its_part_of_each_class(classes: list[str], seed: int) -> None:
    rows = make_rows(classes, seed=seed)
    for split_counts in counts(rows, assign(rows).splits).values():
        total = split_counts.total()
        if total >= 3:
            assert all(split_counts[split] >= 1 for split in SPLITS)
            assert max(split_counts["val"], split_counts["test"]) <= max(1, 0.2 * total + 1e-9)
        elif total == 2:
            assert split_counts["train"] >= 1


@given(CLASSES, CLASSES, st.integers(0, 1000))
def test_new_examples_move_no_other(old: list[str], new: list[str], seed: int) -> None:
    rows = make_rows(old + new, seed=seed)
    before = assign(rows[: len(old)])
    after = assign(rows, kept(before))
    assert after.splits[: len(old)] == before.splits


@given(GROUPS, GROUPS, st.integers(0, 1000))
def test_new_examples_of_groups_move_no_other(
    old: list[tuple[str, int]], new: list[tuple[str, int]], seed: int
) -> None:
    labels, groups = zip(*old, *new, strict=True)
    rows = make_rows(labels, seed=seed, groups=groups)
    before = assign(rows[: len(old)])
    after = assign(rows, kept(before))
    assert after.splits[: len(old)] == before.splits
    assert assign(rows, kept(after)).splits == after.splits


@given(GROUPS, st.integers(0, 1000))
def test_no_group_is_divided_and_each_class_of_three_groups_is_everywhere(
    labelled: list[tuple[str, int]], seed: int
) -> None:
    rows = make_rows([label for label, _ in labelled], seed=seed, groups=[hash(one) % 1000 for one in labelled])
    splits = assign(rows).splits
    splits_of = defaultdict(set)
    groups_of = defaultdict(set)
    for row, split in zip(rows, splits, strict=True):
        splits_of[row.group].add(split)
        groups_of[row.target].add(row.group)
    assert all(len(in_splits) == 1 for in_splits in splits_of.values())
    for label, split_counts in counts(rows, splits).items():
        if len(groups_of[label]) >= 3:
            assert all(split_counts[split] for split in SPLITS)


@given(st.integers(0, 1000))
def test_only_small_classes_move(seed: int) -> None:
    rows = make_rows(["a"] * 600 + ["b"] * 3, seed=seed)
    by_content = assign_splits(
        rows, lambda at: [content_digest(rows[i].read()) for i in at], val_fraction=0.1, test_fraction=0.1
    ).splits
    moved = [row.target for row, own, then in zip(rows, assign(rows).splits, by_content, strict=True) if own != then]
    assert set(moved) <= {"b"}
    assert len(moved) <= 3


def test_copies_stay_together_and_count_once() -> None:
    rows = make_rows(["a"] * 30 + ["b"] * 30)
    rows += [replace(rows[30 + i % 3], name=f"copy {i}") for i in range(60)]
    splits = assign(rows).splits
    for i in range(60):
        assert splits[60 + i] == splits[30 + i % 3]


def test_numbers_are_no_classes() -> None:
    assert Regression().strata(3.5) == ()


def test_a_rare_class_reaches_every_split_and_new_files_move_none(picture_folder: Callable[..., Path]) -> None:
    root = picture_folder(each=40)
    for file in sorted((root / "class1").iterdir())[3:]:
        file.unlink()
    before = suanli.prepare(root)
    assert {split: n["class1"] for split, n in before.findings["class_counts"].items()} == dict.fromkeys(SPLITS, 1)
    old = {name: split for split in SPLITS for name in before.splits[split].names}
    for i in range(7):
        Image.new("RGB", (12, 12), (i, 200, 10 * i)).save(root / "class1" / f"new{i}.png")
    after = suanli.prepare(root)
    assert not after.reused
    assert old.items() <= {name: split for split in SPLITS for name in after.splits[split].names}.items()


def test_a_run_finds_its_splits_where_other_files_came_first(
    picture_folder: Callable[..., Path], tmp_path: Path
) -> None:
    root, hidden = picture_folder(each=40), tmp_path / "hidden"
    hidden.mkdir()
    for i in range(3, 40):
        shutil.move(root / "class1" / f"{i:03d}.png", hidden)
    suanli.prepare(root)
    for file in hidden.iterdir():
        shutil.move(file, root / "class1")
    run = suanli.train(root, epochs=1, speedups="none", device="cpu", out="run")
    elsewhere = tmp_path / "other cache"  # of another machine, which never saw the smaller folder
    fresh = suanli.prepare(root, cache_dir=elsewhere)
    assert fresh.digest != run.data["digest"]
    evaluation = suanli.evaluate(run, cache_dir=elsewhere)
    assert evaluation.count == sum(run.data["counts"]["test"].values())


def test_what_is_set_aside_is_said(picture_folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    prepared = suanli.prepare(picture_folder())
    aside = {split: len(prepared.splits[split]) for split in ("val", "test")}
    assert prepared.findings["set_aside"] == aside
    said = f"set aside from 60 examples: {aside['val']} for validation and {aside['test']} for test"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("file", ["cifar10.zip", "imagenette5k.zip"])
def test_nothing_moves_in_large_data_sets(file: str, shared_data: Path, tmp_path: Path) -> None:
    """Figures were published for the splits that content alone decides."""
    source = find_source(shared_data / file, data_dir=tmp_path)

    def digests(positions: Sequence[int]) -> list[bytes]:
        return [content_digest(source.examples[i].read()) for i in positions]

    fractions = {"val_fraction": 0.1, "test_fraction": 0.1}
    balanced = assign_splits(source.examples, digests, **fractions, strata=lambda target: (target,))
    known = kept(balanced)
    position = {unit: split_of(unit, 0.1, 0.1) for unit in known if unit}
    published = {example.split for example in source.examples}
    for unit, split in position.items():
        assert known[unit] == (split if split not in published else "train")
