"""What names of classes say: which of two is the positive one, and whether they are ordered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

NEGATIVE = frozenset(
    {
        *(
            "negative",
            "neg",
            "no",
            "not",
            "non",
            "none",
            "without",
            "false",
            "0",
            "normal",
            "healthy",
            "benign",
            "good",
        ),
        *(
            "ok",
            "okay",
            "pass",
            "passed",
            "background",
            "control",
            "absent",
            "ham",
            "legit",
            "genuine",
            "clean",
            "real",
        ),
    }
)
POSITIVE = frozenset(
    {
        *("positive", "pos", "yes", "true", "1", "abnormal", "anomaly", "disease", "diseased", "sick", "malignant"),
        *("cancer", "tumor", "tumour", "lesion", "pneumonia", "covid", "infected", "defect", "defective", "damaged"),
        *("faulty", "fault", "fail", "failed", "failure", "bad", "spam", "fraud", "fake", "present"),
    }
)
SCALES = tuple(
    {word: place for place, words in enumerate(scale.split()) for word in words.split("/")}
    for scale in (
        "very_low low medium/middle/mid/moderate/average/normal high very_high",
        "tiny/very_small/xs small/s medium/middle/m large/big/l huge/very_large/xl",
        "none/no/normal/no_dr minimal/very_mild mild moderate severe critical/very_severe/proliferative/proliferate_dr",
        "very_bad/terrible bad/poor fair/average/ok/neutral/medium good very_good excellent/perfect",
        "very_negative negative neutral positive very_positive",
        "never rarely/seldom sometimes often/frequently always",
        "strongly_disagree disagree neutral/undecided agree strongly_agree",
        "baby/infant child/children teen/teenager/youth adult old/elderly/senior",
    )
)
MOST_GRADES = 10  # whole numbers beyond are more likely names than grades
DIGITS = tuple("0123456789")
_RANGE = re.compile(r"(\d+)\s*(?:-|–|_|to)\s*(\d+)|(\d+)\s*\+|(?:over|above|>=?)\s*(\d+)|()(?:under|below|<=?)\s*\d+")


def find_positive(classes: Sequence[str], frequencies: Sequence[float]) -> str:
    """Of two classes: the one beside a name such as "normal" or "no"; else the one with a name such as "abnormal" or
    "yes"; else the rarer one, or the second."""
    negative, positive = ([_has_word(name, words) for name in classes] for words in (NEGATIVE, POSITIVE))
    if sum(negative) == 1:
        return classes[negative.index(False)]
    if sum(positive) == 1:
        return classes[positive.index(True)]
    return classes[0] if len(frequencies) == 2 and frequencies[0] < frequencies[1] else classes[1]


def _has_word(name: str, words: frozenset[str]) -> bool:
    return not words.isdisjoint(re.split(r"[\W_]+", name.casefold()))


def find_order(classes: Sequence[str]) -> tuple[int, ...] | None:
    """The rank of each class where there are at least three, and their names have an order: "low", "medium", "high";
    "1" to "5", but not the ten digits; "0-9", "10-19", "20+". None: they have none."""
    if len(classes) < 3:
        return None
    names = [re.sub(r"[\s_-]+", "_", name.strip().casefold()) for name in classes]
    for scale in SCALES:
        if all(name in scale for name in names):
            return _rank([float(scale[name]) for name in names])
    if all(re.fullmatch(r"\d{1,2}", name) for name in names) and tuple(sorted(names)) != DIGITS:
        numbers = sorted(map(int, names))
        consecutive = all(after - before == 1 for before, after in pairwise(numbers))
        return _rank([float(name) for name in names]) if consecutive and len(names) <= MOST_GRADES else None
    matches = [_RANGE.fullmatch(name.strip().casefold()) for name in classes]
    starts = [next((float(g or -1) for g in match.group(1, 3, 4, 5) if g is not None), 0) for match in matches if match]
    return _rank(starts) if len(starts) == len(classes) else None


def _rank(values: Sequence[float]) -> tuple[int, ...] | None:
    """None: two have the same place."""
    ordered = sorted(values)
    return tuple(map(ordered.index, values)) if len(set(values)) == len(values) else None
