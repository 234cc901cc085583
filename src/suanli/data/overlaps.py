"""Of which larger data sets a user's own data is a part, by its name, its classes and the names of its files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from suanli.core.registry import load_all
from suanli.core.types import Dataset, Source

IMAGENET = ("imagenet-1k",)
LOOKED_AT = 2000  # names of files
_WORDNET = re.compile(r"n\d{8}")
_IMAGENET_FILE = re.compile(r"(n\d{8}_\d+|ILSVRC2012_\w+)\.jpe?g", re.IGNORECASE)
_HELD_BACK = re.compile(r"ILSVRC2012_(val|test)_\w+\.jpe?g", re.IGNORECASE)
# These have ImageNet's classes and others' images.
_LOOKALIKE = re.compile(r"imagenet[-_ ]?(a|o|r|c|p|v2|sketch|es|x|real|hard|d)\b", re.IGNORECASE)


def find_part_of(source: Source) -> tuple[str, ...]:
    """The names of the larger data sets; empty: none is known."""
    datasets: Iterable[Dataset] = load_all("datasets").values()
    for dataset in datasets:
        if dataset.part_of and (_has_name(source.name, dataset.name) or _has_classes(source, dataset)):
            return dataset.part_of
    return IMAGENET if _is_of_imagenet(source) else ()


def _has_name(name: str, known: str) -> bool:
    """Whether a name begins with the data set's: "imagenette5k", "cifar10-small", but "cifar100" isn't cifar10."""
    plain, start = (re.sub(r"[\W_]+", "", text.casefold()) for text in (name, known))
    rest = plain.removeprefix(start)
    return plain.startswith(start) and not (start[-1].isdigit() and rest[:1].isdigit())


def _has_classes(source: Source, dataset: Dataset) -> bool:
    own = {_plain(name) for name in source.classes}
    return any(own == {_plain(name) for name in names} for names in dataset.class_names)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name.casefold()).strip()


def _is_of_imagenet(source: Source) -> bool:
    if _LOOKALIKE.search(source.name):
        return False
    tested = (one for one in source.examples if one.split in (None, "test"))
    names = [one.name.rpartition("/")[2] for one in islice(tested, LOOKED_AT)]
    if names and all(map(_HELD_BACK.fullmatch, names)):
        return False  # the official validation images, from which nothing is learned
    of_imagenet = sum(map(bool, map(_IMAGENET_FILE.fullmatch, names)))
    has_classes = len(source.classes) > 1 and all(map(_WORDNET.fullmatch, source.classes))
    return has_classes or of_imagenet > len(names) / 2
