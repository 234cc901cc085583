"""Annotations in files beside images: what a format (`data/formats/`) gets, and what it gives.

A reader lists a folder or an archive, and asks each format whether files of it are there; so a format doesn't know how
the files are packed. Files come from anywhere: nothing outside of the list is ever opened, whatever an annotation
names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePosixPath

from suanli.core.console import size
from suanli.core.errors import BadInput, DataError
from suanli.core.types import Columns, Target
from suanli.data.file_names import normalise_name
from suanli.data.members import Member, count_and_examples, suffix_of
from suanli.data.split_names import parse_splits

MOST_FILES = 200  # that are opened to see whether they are annotations of all images
MAX_BYTES = 1 << 29  # of one file of annotations; COCO's largest has 449 MB
MASK_FOLDERS = re.compile(
    "(mask|label|annotation|segmentation|trimap)s?|segmentation(class|object)(aug|raw)?|gt|ground_?truth|gtfine|labelids",
    re.IGNORECASE,
)
_ABSOLUTE = re.compile(r"/|[A-Za-z]:|[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What the files of one format say."""

    annotation: str  # what the targets are
    targets: Mapping[str, Target]  # by the path of the image
    classes: tuple[str, ...]
    unlabelled: Target | None = None  # that of an image which no file names; None: it is left out
    splits: Mapping[str, str] = field(default_factory=dict)  # of images whose split the files state
    missing: Sequence[str] = ()  # images that aren't there, as the files name them
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of annotation files: `data/formats/<name>.py`. Of several that find their files, the one with the
    lowest order reads."""

    name: str
    title: str  # for people: "Pascal VOC"
    annotation: str  # what its targets are
    find: Callable[[Files], Sequence[str]]  # the paths of its files, by their content; empty: there are none
    read: Callable[[Files, Sequence[str]], Annotations]  # raises DataError
    order: int = 50


class Files:
    """The images and the other files of a folder or archive, by path."""

    def __init__(
        self,
        images: Iterable[Member],
        others: Iterable[Member],
        where: str,
        *,
        named: str | None = None,
        columns: Columns | None = None,
    ) -> None:
        """`named` is the one file of annotations that the user gave, whose folder this is; `columns` are those that the
        user named, which matter to tables."""
        self.where = where
        self.named = named
        self.columns = columns or Columns()
        by_path = {m.path: m for m in sorted(images, key=lambda m: m.path)}
        self.masks = _find_masks(by_path)
        self.images = {path: m for path, m in by_path.items() if path not in self.masks}
        self.others = {m.path: m for m in sorted(others, key=lambda m: m.path) if named in (None, m.path)}
        self.all_others = {m.path: m for m in others}
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for path in self.images:
            name = normalise_name(path.rpartition("/")[2]).casefold()
            self._by_name[name].append(path)
            self._by_stem[stem_of(name)].append(path)

    def with_suffix(self, *suffixes: str, for_all: bool = False) -> list[str]:
        """The other files whose names end so; `for_all`: those that may be about all images, and so aren't named like
        one of them. Of very many only the first, since each has to be opened."""
        paths = [path for path in self.others if suffix_of(path) in suffixes]
        if not for_all or self.named is not None:
            return paths
        return [path for path in paths if stem_of(path).casefold() not in self._by_stem][:MOST_FILES]

    def read(self, path: str) -> bytes:
        """Raises DataError for a file that can't be read, or is too large."""
        member = self.all_others[path]
        if member.size_bytes > MAX_BYTES:
            raise self.error(path, f"has {size(member.size_bytes)}; the limit is {size(MAX_BYTES)}")
        try:
            content = member.read()
        except BadInput as error:
            raise self.error(path, f"can't be read: {error.message.rstrip('.')}") from error
        except OSError as error:
            raise self.error(path, f"can't be read: {error.strerror or error}") from error
        assert isinstance(content, bytes)
        return content

    def text(self, path: str) -> str:
        """Of a file in UTF-8. Raises DataError."""
        try:
            return self.read(path).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise self.error(path, "is not UTF-8", fix="Save it as UTF-8.") from error

    def error(self, path: str, problem: str, *, line: int | None = None, fix: str = "Correct it.") -> DataError:
        """`problem` goes on from the name of the file, such as "has no size"."""
        at = "" if line is None else f" (line {line})"
        return DataError(f"{path}{at} in {self.where[:1].lower()}{self.where[1:]} {problem}.", fix=fix)

    def find_image(self, name: str, *, beside: str, split: str | None = None) -> str | None:
        """The image that a file of annotations, `beside`, names: by its path from there or from a folder above, else
        the one whose path ends like the name, as where the name is a path of another machine. Of several equally good
        ones, that in a folder of the same split, or nearest to the file. None: it isn't there. Raises DataError for a
        name that leads out of the folder, and where several images may be meant."""
        name = normalise_name(name.strip().replace("\\", "/"))
        parts = [part for part in re.sub(r"^[A-Za-z]:|^[a-z]+://", "", name).split("/") if part not in ("", ".")]
        folder = PurePosixPath(beside).parent.parts
        if not _ABSOLUTE.match(name):
            for above in range(len(folder) + 1):
                path = _join([*folder[: len(folder) - above], *parts])
                if path in self.images:
                    return path
        tail = [part for part in parts if part != ".."]
        found = self._find_by_end(tail, beside, split)
        if found is None and _join([*folder, *parts]) is None and not _ABSOLUTE.match(name):
            raise self.error(beside, f"names {name!r}, which leads out of the folder", fix="Correct the path.")
        return found

    def _find_by_end(self, tail: Sequence[str], beside: str, split: str | None) -> str | None:
        if not tail:
            return None
        last = tail[-1].casefold()
        candidates = self._by_name.get(last) or self._by_stem.get(last) or self._by_stem.get(stem_of(last)) or []
        if len(candidates) > 1:
            candidates = _best(candidates, lambda path: _count_common_end(path.split("/")[:-1], tail[:-1]))
        if len(candidates) > 1 and split is not None:
            candidates = [path for path in candidates if self.folder_splits.get(path) == split] or candidates
        if len(candidates) > 1:
            candidates = _best(candidates, lambda path: _count_common_start(path, beside))
        if len(candidates) > 1:
            raise self.error(
                beside,
                f"names {'/'.join(tail)!r}, which may be {' or '.join(candidates[:3])}",
                fix="Write paths from the top of the folder.",
            )
        return candidates[0] if candidates else None

    @cached_property
    def folder_splits(self) -> dict[str, str]:
        """The split of each image that folders state."""
        return find_folder_splits(self.images)

    def find_by_stem(self, stem: str, *, beside: str) -> str | None:
        """The image of this name without its suffix: the one that is nearest to the file `beside`."""
        candidates = self._by_stem.get(normalise_name(stem).casefold(), [])
        best = _best(candidates, lambda path: _count_common_start(path, beside)) if candidates else []
        return best[0] if len(best) == 1 else None


def _find_masks(paths: Collection[str]) -> set[str]:
    """The images in folders that are named like those of masks, if most of them have the names of images elsewhere."""
    suspects = [path for path in paths if any(map(MASK_FOLDERS.fullmatch, path.split("/")[:-1]))]
    if not suspects:
        return set()
    others = {stem_of(path) for path in set(paths).difference(suspects)}
    named = sum(stem_of(path) in others for path in suspects)
    return set(suspects) if 2 * named > len(suspects) else set()


def find_folder_splits(paths: Iterable[str]) -> dict[str, str]:
    """The split of each path that its folders state, at the first depth at which they do: with one for training."""
    folders = {path: path.split("/")[:-1] for path in paths}
    for depth in range(max(map(len, folders.values()), default=0)):
        meant = parse_splits({parts[depth] for parts in folders.values() if len(parts) > depth})
        if "train" in meant.values():
            return {path: meant[p[depth]] for path, p in folders.items() if len(p) > depth and p[depth] in meant}
    return {}


def find_file_splits(paths: Sequence[str]) -> dict[str, str]:
    """The split of each of several files of annotations, by its name or its folder: instances_train.json."""
    by_name = parse_splits({stem_of(path) for path in paths})
    if "train" in by_name.values() and len(paths) > 1:
        return {path: by_name[stem_of(path)] for path in paths if stem_of(path) in by_name}
    return find_folder_splits(paths)


def stem_of(path: str) -> str:
    """The name of a file without folder and suffix."""
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[:dot] if dot > 0 else name


def describe_missing(names: Sequence[str]) -> list[str]:
    return [count_and_examples(names, "labelled images are missing", "labelled image is missing")] if names else []


def _join(parts: Iterable[str]) -> str | None:
    """A path without ".."; None: it leads out."""
    kept: list[str] = []
    for part in parts:
        if part != "..":
            kept.append(part)
        elif kept:
            kept.pop()
        else:
            return None
    return "/".join(kept)


def _best(paths: Sequence[str], value: Callable[[str], int]) -> list[str]:
    values = [value(path) for path in paths]
    return [path for path, own in zip(paths, values, strict=True) if own == max(values)]


def _count_common_end(one: Sequence[str], other: Sequence[str]) -> int:
    count = 0
    for a, b in zip(reversed(one), reversed(other), strict=False):
        if a.casefold() != b.casefold():
            break
        count += 1
    return count


def _count_common_start(path: str, other: str) -> int:
    """How many folders both are in."""
    count = 0
    for a, b in zip(path.split("/")[:-1], other.split("/")[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count
