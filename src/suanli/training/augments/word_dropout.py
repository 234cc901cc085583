"""Word dropout: some tokens of a training text become the unknown token, so that no decision depends on a single word
and the unknown token gets a trained embedding.

Source: M. Iyyer et al., "Deep Unordered Composition Rivals Syntactic Methods for Text Classification", ACL 2015. They
drop the tokens; replacing them keeps neighbours apart and the length as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from suanli.core.errors import UsageError
from suanli.core.types import Augmentation, Batch
from suanli.training.augments._sampling import EVERY_ROLE, draw_for_batch

PADDING, UNKNOWN = 0, 1  # as in `preprocess/text.py`


@dataclass(frozen=True, kw_only=True)
class WordDropout(Augmentation):
    """Each of the tokens (B, L) int64 becomes unknown with probability `p`; padding stays."""

    input: ClassVar[str] = "tokens"
    keeps: ClassVar[frozenset[str]] = EVERY_ROLE

    p: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise UsageError(f"word_dropout(p={self.p}) is out of range.", fix="Give p from 0 to below 1.")

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        ids = batch.inputs["tokens"]
        numbers = draw_for_batch(batch, lambda n: torch.rand(n, *ids.shape[1:], generator=generator, device=ids.device))
        return batch.with_input("tokens", ids.masked_fill((numbers < self.p) & (ids != PADDING), UNKNOWN))


AUGMENT = WordDropout
