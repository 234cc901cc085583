"""The tree of a folder or archive, and which of its folders are the splits around the class folders.

A folder is a split only where its neighbours agree: `train` alone may be a class of vehicles, and `test_set` a class
of devices. Where folders look divided in another way, a note says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from suanli.core.errors import DataError
from suanli.core.types import SPLITS
from suanli.data.file_names import normalise_name
from suanli.data.split_names import is_usual_split, parse_split, parse_splits

LAYOUT = "class folders (cat/1.jpg, dog/2.jpg), with or without train, val and test folders around them"

File = TypeVar("File")


@dataclass(slots=True)
class Folder(Generic[File]):
    folders: dict[str, Folder[File]] = field(default_factory=dict)
    images: list[File] = field(default_factory=list)
    others: list[File] = field(default_factory=list)

    def at(self, parts: Iterable[str]) -> Folder[File]:
        folder = self
        for part in parts:
            folder = folder.folders.setdefault(normalise_name(part), Folder())
        return folder

    def all_images(self) -> list[File]:
        return [*self.images, *(m for f in self.folders.values() for m in f.all_images())]

    def all_others(self) -> list[File]:
        return [*self.others, *(m for f in self.folders.values() for m in f.all_others())]

    def has_images(self) -> bool:
        return bool(self.images) or any(folder.has_images() for folder in self.folders.values())

    @property
    def groups(self) -> bool:
        """Whether it holds folders and no images of its own."""
        return bool(self.folders) and not self.images

    def filled(self) -> dict[str, Folder[File]]:
        """Its folders that have images."""
        return {name: folder for name, folder in self.folders.items() if folder.has_images()}


class Division(NamedTuple, Generic[File]):
    """The folder with the class folders of each split; {None: root} where there are no splits."""

    by_split: dict[str | None, Folder[File]]
    notes: list[str]


def unwrap(root: Folder[File]) -> Folder[File]:
    """The tree without single folders around everything, which archives often have."""
    while len(root.folders) == 1 and not root.images:
        (name, inner), *_ = root.folders.items()
        if is_usual_split(name) or inner.images or not inner.folders:
            break
        inner.others.extend(root.others)
        root = inner
    return root


def has_classes(root: Folder[File]) -> bool:
    """Whether at least two folders look like classes."""
    splits = [*_find_outer(root, parse_splits(root.folders)).values()] or [root]
    names = {name for split in splits for name in split.filled()}
    return len(names) >= 2 and not (all(map(parse_split, names)) or names <= parse_splits(names).keys())


def find_splits(root: Folder[File], where: str) -> Division[File]:
    """Raises DataError for splits that can't be used: without class folders, without one for training, or two of one
    kind."""
    filled = root.filled()
    meant = parse_splits(root.folders)
    splits = _find_outer(root, meant)
    if not splits:
        if filled and filled.keys() <= meant.keys():
            which = "inside" if any(folder.images for folder in filled.values()) else "that are the same in"
            raise DataError(
                f"{where} has no class folders {which} {', '.join(sorted(filled))}.",
                fix=f"Expected are {LAYOUT}; or give a table with the columns path and label.",
            )
        return _find_inner(filled) or Division({None: root}, _describe_doubt(filled, where))
    by_split: dict[str | None, Folder[File]] = {}
    for split in SPLITS:
        same = sorted(name for name in splits if meant[name] == split)
        if len(same) > 1:
            raise DataError(
                f"{where} has more than one folder for the {split} split: {', '.join(same)}.",
                fix="Merge them or move one away.",
            )
        if same:
            by_split[split] = splits[same[0]]
    if "train" not in by_split:
        raise DataError(
            f"{where} has {', '.join(sorted(splits))} but no train folder.",
            fix="Add a train folder, or give a folder of class folders without splits.",
        )
    unusual = [name for name in splits if not is_usual_split(name)]
    notes = [f"folders read as splits: {', '.join(f'{n} is {meant[n]}' for n in sorted(splits))}"] if unusual else []
    return Division(by_split, notes)


def _find_outer(root: Folder[File], meant: Mapping[str, str]) -> dict[str, Folder[File]]:
    """The folders of `root` that are splits, each without a single folder around its classes (train/all/cat).

    A folder called `train` that has images itself is a class (of vehicles, for example). Unusual names count where
    folders agree: the one for training has classes, and another one has some of them, or images without classes.
    """
    groups = {name: folder for name, folder in root.folders.items() if name in meant and folder.groups}
    usual = {name for name in groups if is_usual_split(name)}
    splits = dict(_unwrap_each(groups))
    training = [name for name in groups if meant[name] == "train"]
    if len(training) != 1:
        return {name: splits[name] for name in usual or training}
    classes = splits[training[0]].filled().keys()
    agreeing = {n for n in splits if n != training[0] and classes & splits[n].filled().keys()}
    bare = {n for n, f in root.folders.items() if n in meant and f.images and meant[n] != "train"}
    if training[0] not in usual and not (agreeing or (bare and len(classes) > 1)):
        return {name: splits[name] for name in usual}
    return {name: folder for name, folder in splits.items() if name in usual or name in {*agreeing, training[0]}}


def _unwrap_each(splits: Mapping[str, Folder[File]]) -> Iterator[tuple[str, Folder[File]]]:
    """Without a single folder around the classes, as in seg_train/seg_train/cat, unless it is a class elsewhere."""
    for name, folder in splits.items():
        classes = {c for other in splits.values() if len(other.folders) > 1 for c in other.folders}
        inner = folder
        while len(inner.folders) == 1 and not inner.images:
            ((only, deeper),) = inner.folders.items()
            if only in classes or not deeper.groups:
                break
            inner = deeper
        yield name, inner


def _find_inner(classes: Mapping[str, Folder[File]]) -> Division[File] | None:
    """Splits inside of each class: cat/train/1.jpg, cat/test/2.jpg. None: there are none."""
    by_class = {name: parse_splits(folder.filled()) for name, folder in classes.items()}
    if len(classes) < 2 or not all(
        folder.groups and by_class[name].keys() == folder.filled().keys() and "train" in by_class[name].values()
        for name, folder in classes.items()
    ):
        return None
    by_split: dict[str | None, Folder[File]] = {split: Folder() for split in SPLITS}
    for name, folder in classes.items():
        for inner, split in by_class[name].items():
            target = by_split[split].at([name])
            target.folders[inner] = folder.folders[inner]
    names = sorted({inner for one in by_class.values() for inner in one})
    note = f"folders inside of each class read as splits: {', '.join(names)}"
    return Division({split: folder for split, folder in by_split.items() if folder.folders}, [note])


def _describe_doubt(classes: Mapping[str, Folder[File]], where: str) -> list[str]:
    """A note where the class folders may be something else. Raises DataError where one of them holds whole splits."""
    for name, folder in classes.items():
        inner = parse_splits(folder.folders)
        if "train" in inner.values() and len(_find_outer(folder, inner)) > 1:
            raise DataError(
                f"{where} has splits inside of the folder {name} ({', '.join(sorted(inner))}), which would be a class.",
                fix=f"Give the folder {name} itself, or move the others away.",
            )
    same = {frozenset(folder.filled()) for folder in classes.values()}
    if len(classes) < 2 or len(same) > 1 or not all(folder.groups for folder in classes.values()):
        return []
    (inside,) = same
    if len(inside) < 2:
        return []
    outer, inner_names = _few(classes), _few(inside)
    return [
        f"every class folder ({outer}) holds the same subfolders ({inner_names}). If those are the classes, and these "
        "are splits, rename these to train, val and test; if these are groups, put the classes above them, or give a "
        "table with the columns path and label"
    ]


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (", …" if len(ordered) > 3 else "")
