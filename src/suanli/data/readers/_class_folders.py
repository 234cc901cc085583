"""Labels images by the folders that hold them: `train/cat/001.jpg`.

The folder and the archive reader both list files and then use this, so that splits, classes, images and ignored files
don't depend on how the files are packed. Only names are used here; no file is opened.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from suanli.core.errors import DataError
from suanli.core.types import SPLITS, Example, Raw, Source
from suanli.data.readers._annotations import (
    find_annotation,
    find_mask_folder,
    find_masks,
    unsupported_annotation_error,
)
from suanli.data.suffixes import IMAGE_SUFFIXES

TABLE_SUFFIXES = frozenset({"csv", "tsv", "jsonl", "ndjson"})

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {word: split for split, words in _SPLIT_NAMES.items() for word in words}

_LITTER = frozenset({"__macosx", "thumbs.db", "desktop.ini"})  # left by file managers
LAYOUT = "class folders (cat/1.jpg, dog/2.jpg), with or without train, val and test folders around them"


class Member(NamedTuple):
    """One file of a folder or archive. A tuple, since there may be a million: a frozen dataclass takes three times
    as long to make."""

    path: str  # relative, with "/"
    size_bytes: int
    read: Callable[[], Raw]


@dataclass(slots=True)
class _Folder:
    folders: dict[str, _Folder] = field(default_factory=dict)
    images: list[Member] = field(default_factory=list)
    others: list[Member] = field(default_factory=list)

    def at(self, parts: Iterable[str]) -> _Folder:
        folder = self
        for part in parts:
            folder = folder.folders.setdefault(part, _Folder())
        return folder

    def all_images(self) -> list[Member]:
        return [*self.images, *(m for f in self.folders.values() for m in f.all_images())]

    def all_others(self) -> list[Member]:
        return [*self.others, *(m for f in self.folders.values() for m in f.all_others())]


def parse_split(name: str) -> str | None:
    """The split that the name of a folder or file, or a cell, stands for: 'Validation' is 'val'. None: no split."""
    return _SPLIT_OF.get(name.strip().casefold())


def suffix_of(name: str) -> str:
    return name.rpartition(".")[2].casefold() if "." in name else ""


def is_ignored(part: str) -> bool:
    """Whether this part of a path is a hidden file, or one that file managers leave behind."""
    return part.startswith(".") or part.casefold() in _LITTER


def order_classes(labels: Iterable[str]) -> tuple[str, ...]:
    """The distinct labels in order: by value where all are whole numbers, so that 2 precedes 10, else by name."""
    unique = set(labels)
    if all(re.fullmatch(r"-?[0-9]{1,18}", label) for label in unique):
        return tuple(sorted(unique, key=lambda label: (int(label), label)))
    return tuple(sorted(unique))


def source_name(name: str) -> str:
    """`name` as a valid directory name on any system."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "data"


def count_and_examples(names: Sequence[str], what: str) -> str:
    """A note with at most three names: '3 <what>: a, b, c'."""
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} {what}: {', '.join(names[:3])}{more}"


def fingerprint_of(parts: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(f"{part}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def make_source(
    members: Iterable[Member],
    folders: Iterable[str],
    *,
    name: str,
    where: str,
    fingerprint: str,
    notes: Sequence[str] = (),
) -> Source:
    """The labelled images among `members`.

    `folders` are paths of folders, so that a class without images stays a class; errors begin with `where`. Raises
    DataError where there are no images, no class folders, or fewer than two classes.
    """
    root = _unwrap(_build_tree(members, folders))
    others = sorted(m.path for m in root.all_others())
    annotation = find_annotation([m.path for m in root.all_images()], others) if others else None
    if annotation is not None and not _has_classes(root):
        raise unsupported_annotation_error(where, annotation)
    by_split = _find_splits(root, where)
    classes = order_classes(label for folder in by_split.values() for label in folder.folders)
    rows = [
        Example(name=member.path, target=label, split=split, read=member.read)
        for split, folder in by_split.items()
        for label in sorted(folder.folders)
        for member in sorted(folder.folders[label].all_images(), key=lambda m: m.path)
    ]
    if not rows:
        raise _no_images_error(root, where)
    if len(classes) < 2:
        raise DataError(
            f"{where} has only one class, {classes[0]!r}; at least two are needed.",
            fix=f"Expected are {LAYOUT}.",
        )
    if (masks := find_mask_folder(_group_names(rows))) is not None:
        raise unsupported_annotation_error(where, masks)
    rest = _describe_rest(root, {row.name for row in rows}, others)
    if annotation is not None:
        rest.append(f"{annotation}, skipped: only the class folders are learned")
    sizes = {m.path: m.size_bytes for m in root.all_images()}
    return Source(
        name=source_name(name),
        kind="image",
        examples=rows,
        classes=classes,
        fingerprint=fingerprint,
        size_bytes=sum(sizes[row.name] for row in rows),
        notes=(*notes, *rest),
    )


def _describe_rest(root: _Folder, used: set[str], others: Sequence[str]) -> list[str]:
    """Notes on the files that aren't examples, and on examples that may not be meant as such."""
    notes = []
    if strays := sorted(m.path for m in root.all_images() if m.path not in used):
        notes.append(count_and_examples(strays, "images outside a class folder, skipped"))
    if others:
        notes.append(count_and_examples(others, "other files, skipped"))
    if masks := sorted(find_masks(used)):
        notes.append(count_and_examples(masks, "inputs whose names look like masks of others"))
    return notes


def _build_tree(members: Iterable[Member], folders: Iterable[str]) -> _Folder:
    root = _Folder()
    by_path: dict[str, _Folder | None] = {}  # None: ignored

    def folder_at(path: str) -> _Folder | None:
        if path not in by_path:
            parts = PurePosixPath(path).parts
            by_path[path] = None if any(map(is_ignored, parts)) else root.at(parts)
        return by_path[path]

    for path in folders:
        folder_at(path)
    for member in members:
        parent, _, file_name = member.path.rpartition("/")
        folder = folder_at(parent)
        if folder is None or is_ignored(file_name):
            continue
        same_kind = folder.images if suffix_of(file_name) in IMAGE_SUFFIXES else folder.others
        same_kind.append(member)
    return root


def _unwrap(root: _Folder) -> _Folder:
    """The tree without single folders around everything, which archives often have."""
    while len(root.folders) == 1 and not root.images:
        (name, inner), *_ = root.folders.items()
        if parse_split(name) or inner.images or not inner.folders:
            break
        inner.others.extend(root.others)
        root = inner
    return root


def _has_classes(root: _Folder) -> bool:
    """Whether at least two folders look like classes."""
    splits = [f for name, f in root.folders.items() if parse_split(name) and f.folders and not f.images] or [root]
    names = {name for split in splits for name, folder in split.folders.items() if folder.all_images()}
    return len(names) >= 2 and not all(map(parse_split, names))


def _group_names(rows: Iterable[Example]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names[row.target].append(row.name)
    return names


def _find_splits(root: _Folder, where: str) -> dict[str | None, _Folder]:
    """The folder with the class folders of each split; {None: root} where there are no splits.

    A folder called `train` that has images itself is a class (of vehicles, for example), not a split.
    """
    named = {name: f for name, f in root.folders.items() if parse_split(name)}
    splits = {name: f for name, f in named.items() if f.folders and not f.images}
    if not splits:
        with_images = {name for name, f in root.folders.items() if f.all_images()}
        if with_images and with_images <= set(named):
            raise DataError(
                f"{where} has no class folders inside {', '.join(sorted(with_images))}.",
                fix=f"Expected are {LAYOUT}; or give a table with the columns path and label.",
            )
        return {None: root}
    by_split: dict[str | None, _Folder] = {}
    for split in SPLITS:
        same = sorted(name for name in splits if parse_split(name) == split)
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
    return by_split


def _no_images_error(root: _Folder, where: str) -> DataError:
    if root.images:
        return DataError(
            f"{where} has {len(root.images)} images but no class folders.",
            fix=f"Expected are {LAYOUT}; or give a table with the columns path and label.",
        )
    others = sorted(m.path for m in root.all_others())
    tables = [path for path in others if suffix_of(path) in TABLE_SUFFIXES]
    if tables:
        return DataError(
            f"{where} has no images, but tables: {', '.join(tables[:3])}.",
            fix="Give the table file itself (unpacked), or a folder with train, val and test tables.",
        )
    content = f"has no images, only {count_and_examples(others, 'other files')}" if others else "is empty"
    return DataError(
        f"{where} {content}.",
        fix=f"Expected are {LAYOUT}; images end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
    )
