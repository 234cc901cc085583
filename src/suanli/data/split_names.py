"""Which names of folders, files and cells mean a split: `Train`, `Test Images`, `seg_test`, `valid`, `训练集`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from suanli.core.errors import UsageError, unknown
from suanli.core.types import SPLITS

_USUAL = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_CHINESE = {"训练": "train", "验证": "val", "测试": "test"}
_HELD_OUT = "held out"  # for evaluation: the test split, or where there is one, the validation split
_USUAL_OF = {word: split for split, words in _USUAL.items() for word in words}
_WORDS = _USUAL_OF | _CHINESE | dict.fromkeys(("eval", "evaluation", "holdout", "heldout"), _HELD_OUT)
_FILLERS = frozenset(
    {
        *("set", "sets", "data", "dataset", "datasets", "split", "folder", "file", "files", "all"),
        *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
        *("sample", "samples", "example", "examples", "集", "数据", "数据集", "图片"),
    }
)
_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_JOINED = re.compile(
    "({})({})?".format(*("|".join(sorted(words, key=len, reverse=True)) for words in (_WORDS, _FILLERS)))
)


class _Parsed(NamedTuple):
    word: str  # one of SPLITS, or _HELD_OUT
    rest: tuple[str, ...]  # the other words of the name that say something: ("seg",) in seg_train
    usual: bool  # the name is a usual one and nothing else


def is_usual_split(name: str) -> bool:
    """Whether the whole name is one of the usual ones, such as "Train" or "dev"."""
    return name.strip().casefold() in _USUAL_OF


def parse_split(name: str) -> str | None:
    """The split that one name stands for: 'Validation' is 'val', 'Test Images' is 'test'. None: no split."""
    parsed = _parse(name)
    if parsed is None or parsed.rest:
        return None
    return "test" if parsed.word == _HELD_OUT else parsed.word


def named_split(name: str) -> str:
    """The split that a user names. Raises UsageError for what is none."""
    split = parse_split(name)
    if split is None:
        raise unknown("split", name, SPLITS, error=UsageError)
    return split


def parse_splits(names: Iterable[str]) -> dict[str, str]:
    """Those of `names`, which stand side by side, that mean a split, and which: all with the same other words, as in
    seg_train and seg_test. Usual names go before others of the same split, and without them, one must be for training.
    Several names of one split are left to the caller."""
    by_rest: dict[tuple[str, ...], dict[str, _Parsed]] = defaultdict(dict)
    for name in names:
        if (parsed := _parse(name)) is not None:
            by_rest[parsed.rest][name] = parsed
    plain = by_rest.pop((), {})
    if any(p.usual or p.word == "train" for p in plain.values()):
        return _settle(plain)
    complete = [
        same for same in by_rest.values() if "train" in (words := {p.word for p in same.values()}) and len(words) > 1
    ]
    return _settle(complete[0]) if len(complete) == 1 else {}


def _parse(name: str) -> _Parsed | None:
    name = name.strip()
    usual = is_usual_split(name)
    found: list[str] = []
    rest: list[str] = []
    for token in _TOKEN.findall(re.sub(r"(?i)\b(hold|held)[-_ ]?out", r"\1out", name)):
        word = token.casefold()
        if match := _JOINED.fullmatch(word):
            found.append(_WORDS[match[1]])
        elif word not in _FILLERS:
            rest.append(word)
    return _Parsed(found[0], tuple(rest), usual) if len(found) == 1 else None


def _settle(parsed: Mapping[str, _Parsed]) -> dict[str, str]:
    usual = {p.word for p in parsed.values() if p.usual}
    splits = {name: p.word for name, p in parsed.items() if p.usual or p.word not in usual}
    for name in sorted(splits, key=str.casefold, reverse=True):  # holdout before eval
        if splits[name] == _HELD_OUT:
            free = [split for split in ("test", "val") if split not in splits.values()]
            if free:
                splits[name] = free[0]
            else:
                del splits[name]
    return splits
