"""Data sets that are parts of larger ones: weights that learned from the larger one may have seen the test examples.

Such a score is contaminated: it says less about new data than it seems to. Nothing is measured here; it follows from
what is known of the data (`Source.part_of`) and of the weights that training started from (`Pretrained.learned_from`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from suanli.core.types import Json

LARGER = {"imagenet-1k": ("imagenet-12k", "imagenet-21k", "imagenet-22k")}  # sets that contain another one
_OTHER_NAMES = {"imagenet": "imagenet-1k", "ilsvrc2012": "imagenet-1k", "imagenet2012": "imagenet-1k"}


@dataclass(frozen=True, kw_only=True)
class Contamination:
    """Why a score is contaminated."""

    data: str = "this data"  # the name of the data set that was evaluated
    part_of: tuple[str, ...] = ()  # the larger data sets from which the weights learned
    weights: str = "unknown"  # from which training started

    def describe(self) -> str:
        """One sentence."""
        return (
            f"Contaminated score: {self.data} is a part of {' and '.join(self.part_of)}, from which the weights that"
            f" training started from ({self.weights}) learned, so they may have seen its test examples."
        )


def find_contamination(
    data: str, part_of: Iterable[str], pretrained: Mapping[str, Json] | None
) -> Contamination | None:
    """`pretrained` is what a model keeps of the weights that it started from; None: it started from none."""
    if not pretrained:
        return None
    sets = {_plain(name) for name in part_of}
    sets |= {larger for name in sets for larger in LARGER.get(name, ())}
    seen = [name for name in pretrained.get("learned_from") or () if any(_is(name, one) for one in sets)]
    if not seen:
        return None
    weights = pretrained.get("title") or pretrained.get("name") or "weights"
    return Contamination(data=data, part_of=tuple(dict.fromkeys(seen)), weights=str(weights))


def _is(name: str, known: str) -> bool:
    """Whether a publisher's name, such as "timm/imagenet-12k-wds", means this set."""
    plain = _plain(name)
    return plain == known or plain.startswith(f"{known}-")


def _plain(name: str) -> str:
    """ "ILSVRC/ImageNet_1k" is "imagenet-1k"."""
    text = re.sub(r"[\s_]+", "-", name.rpartition("/")[2].casefold())
    text = re.sub(r"^(imagenet)-?(\d+k)\b", r"\1-\2", text)
    return _OTHER_NAMES.get(text, text)
