"""A network without its head, and what the head is given: the features of an input, which are its embedding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from suanli.core.errors import MachineError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle


def backbone_of(module: nn.Module, head: str) -> nn.Module:
    """A copy of `module` that returns what its layer `head` is given, for heads after which little comes: (B, F)."""
    from torch import nn

    backbone = copy.deepcopy(module)
    backbone.set_submodule(head, nn.Identity())
    return backbone


class HeadInputs:
    """What the layer `head` is given while the network computes anything: in a `with` block, one vector (F,) for each
    example. So an evaluation has the embeddings of its examples without computing them again.

    Of a head that is applied to places (a convolution, or a linear layer on tokens) it is the mean over the places; of
    one that gets several maps, the last, coarsest one counts.
    """

    def __init__(self, module: nn.Module, head: str, *, wanted: np.ndarray | None = None) -> None:
        """`wanted` (N,) bool: which of the N examples that come are kept; None: all."""
        self._layer, self._wanted = module.get_submodule(head), wanted
        self._parts: list[np.ndarray] = []
        self._count = 0
        self._handle: RemovableHandle | None = None

    def __enter__(self) -> Self:
        self._handle = self._layer.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._handle is not None
        self._handle.remove()

    def _keep(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        import torch
        from torch import nn

        first = given[0] if given else next(iter(named.values()))
        several = isinstance(first, Sequence)
        features: torch.Tensor = first[-1] if several else first
        if features.dim() > 2:
            is_convolution = several or isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            features = features.flatten(2).mean(2) if is_convolution else features.flatten(1, -2).mean(1)
        start, self._count = self._count, self._count + len(features)
        if self._wanted is not None:
            features = features[torch.from_numpy(np.flatnonzero(self._wanted[start : self._count])).to(features.device)]
        self._parts.append(features.detach().float().cpu().numpy())

    def vectors(self, count: int) -> np.ndarray:
        """(N, F) float32 of the wanted ones of `count` examples, in the order in which they were computed. Raises
        MachineError where the head wasn't called once for each."""
        if self._count != count or len({part.shape[1:] for part in self._parts}) != 1:
            raise MachineError(
                "This network has no embeddings: it doesn't call its last layer once for each input.",
                fix="End the network in one linear layer, as a submodule that is called.",
            )
        return np.concatenate(self._parts)
