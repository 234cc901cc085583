"""What an answer rests on: where in an image, or on which words.

It is computed with the network in float32 by PyTorch, whichever engine answers, and needs no change of the network:
hooks on its modules find what is looked at. How depends on the role of the input:

- "image": Grad-CAM on the last feature map of at least 6x6 positions: each channel counts by its mean gradient, and
  what speaks against the answer counts as nothing. Where a map of patches goes on as a sequence of tokens, as in a
  vision transformer, no later map exists, and the gradient is multiplied with the tokens of the blocks instead. A
  network without any such map gets the gradient times the pixels.
- "tokens": the gradient times the word embeddings; a word with a negative weight speaks against the answer.

A saliency map shows what the network used, not why, and not that it was right to.

Sources: R. R. Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
ICCV 2017, arXiv:1610.02391; gradient times input: A. Shrikumar et al., arXiv:1605.01713.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from suanli.core.errors import MachineError, first_line
from suanli.core.schema import Arrays
from suanli.core.types import Json, Marked

if TYPE_CHECKING:
    import torch
    from torch import nn

    from suanli.models.model_folder import SavedModel

BATCH = 8  # the backward pass needs what every layer returned
LEAST_POSITIONS = 36  # of a feature map; fewer hardly show a place
MOST_STRETCH = 1.6  # of a feature map against the image; what differs more isn't one
MORE_TOKENS = 8  # that a sequence of patches may have besides them, such as the class token

Score: TypeAlias = "Callable[[Any], torch.Tensor]"  # from what the network returns to a number for each example
Weights: TypeAlias = "tuple[torch.Tensor, str]"  # (B, …) over the positions of the input, and the method


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """Of one input: how much each of its positions speaks for the answer, and that as a person sees it."""

    method: str  # "Grad-CAM", "gradient times input"
    weights: np.ndarray  # of an image (H, W) from 0 to 1; of a text (L,) from -1 to 1
    marked: Marked

    def to_json(self) -> dict[str, Json]:
        return {"method": self.method} | (
            {"words": [list(word) for word in self.marked.words]} if self.marked.words else {}
        )

    def _repr_html_(self) -> str:
        return self.marked.to_html()


def explain(saved: SavedModel, inputs: Sequence[Arrays]) -> list[Saliency]:
    """The saliency of each input, as `Preprocess.encode` gives it. Raises MachineError, with the reason, where this
    network or kind of data can't be explained."""
    if saved.preprocess.has_windows:
        raise _impossible("inputs are cut into windows")
    found: list[Saliency] = []
    for start in range(0, len(inputs), BATCH):
        part = inputs[start : start + BATCH]
        weights, method = _weigh(saved, part)
        found += [
            Saliency(method=method, weights=one, marked=saved.preprocess.mark(arrays, one))
            for arrays, one in zip(part, weights, strict=True)
        ]
    return found


def _weigh(saved: SavedModel, inputs: Sequence[Arrays]) -> tuple[np.ndarray, str]:
    """(B, …), of each example divided by its largest."""
    import torch

    schema = saved.preprocess.inputs
    name = next((name for name, column in schema.items() if column.role in METHODS), None)
    if name is None:
        kind = saved.preprocess.kind
        raise _impossible(f"inputs of the kind {kind} have no places or words that could be shown")
    parameter = next(saved.module.parameters(), None)
    where = "cpu" if parameter is None else parameter.device
    batch = {key: torch.from_numpy(np.stack([one[key] for one in inputs])).to(where) for key in schema}
    with torch.inference_mode(False), torch.enable_grad():
        tensors = {key: tensor.clone() for key, tensor in saved.preprocess.to_model(batch).items()}
        try:
            weights, method = METHODS[schema[name].role](saved.module, tensors, name, saved.task.explained)
        except Exception as error:  # the network may be anyone's code
            raise _impossible(first_line(error, 200)) from error
    values = weights.detach().float().cpu().numpy()
    largest = np.abs(values).reshape(len(values), -1).max(1).reshape(-1, *[1] * (values.ndim - 1))
    return np.divide(values, largest, out=np.zeros_like(values), where=largest > 0), method


def _impossible(reason: str) -> MachineError:
    return MachineError(f"This model's answers can't be explained ({reason}).", fix="Predict without --explain.")


# --- images ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Feature:
    """What a submodule returned."""

    tensor: torch.Tensor
    depth: int  # of the submodule: 0 for those of the network itself


@dataclass(frozen=True, kw_only=True)
class _Map:
    position: int  # among the features
    layout: tuple[int, ...]  # of its axes, to be (B, C, h, w)
    grid: tuple[int, int]
    depth: int


def _explain_image(module: nn.Module, tensors: Mapping[str, torch.Tensor], name: str, score: Score) -> Weights:
    """(B, H, W), not negative."""
    import torch
    from torch.nn import functional as F

    image = tensors[name].contiguous().requires_grad_(True)
    with _record(module) as features:
        given = image.clone()  # a network may change its input
        total = score(module(*(given if key == name else t for key, t in tensors.items()))).sum()
    features = _keep_used(features, total)
    chosen = _choose_map(features, image)
    tokens = [] if chosen is None else _tokens_after(features, chosen)
    if chosen is None:
        (gradient,) = torch.autograd.grad(total, image)
        heat, method = (gradient * image).sum(1).abs(), "gradient times input"
    elif tokens:
        gradients = torch.autograd.grad(total, tokens, allow_unused=True)
        count = chosen.grid[0] * chosen.grid[1]
        products = [F.relu((g * t)[:, -count:].sum(2)) for g, t in zip(gradients, tokens, strict=True) if g is not None]
        heat, method = torch.stack(products).mean(0).view(-1, *chosen.grid), "gradient times tokens"
    else:
        feature = features[chosen.position].tensor
        (gradient,) = torch.autograd.grad(total, feature)
        activation, gradient = feature.permute(chosen.layout), gradient.permute(chosen.layout)
        heat, method = F.relu((gradient.mean((2, 3), keepdim=True) * activation).sum(1)), "Grad-CAM"
        against = heat.flatten(1).amax(1) == 0  # every channel with a gradient speaks against the answer
        heat[against] = (gradient * activation).sum(1).abs()[against]
    resized = F.interpolate(heat.unsqueeze(1), size=image.shape[2:], mode="bilinear", align_corners=False)
    return resized.squeeze(1), method


@contextmanager
def _record(module: nn.Module) -> Iterator[list[_Feature]]:
    """What each submodule returns, in the order in which they end."""
    import torch

    features: list[_Feature] = []

    def note(depth: int) -> Callable[[nn.Module, object, object], None]:
        def append(_module: nn.Module, _inputs: object, output: object) -> None:
            if isinstance(output, torch.Tensor) and output.requires_grad:
                features.append(_Feature(tensor=output, depth=depth))

        return append

    hooks = [part.register_forward_hook(note(name.count("."))) for name, part in module.named_modules() if name]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def _keep_used(features: Sequence[_Feature], total: torch.Tensor) -> list[_Feature]:
    """Those that each answer depends on: a detector's boxes, for one, have nothing to do with its scores, and a score
    comes from one of its levels."""
    import torch

    if not features:
        return []
    tensors = [feature.tensor for feature in features]
    gradients = torch.autograd.grad(total, tensors, allow_unused=True, retain_graph=True)
    pairs = [(feature, gradient) for feature, gradient in zip(features, gradients, strict=True) if gradient is not None]
    used = [feature for feature, gradient in pairs if bool((gradient != 0).flatten(1).any(1).all())]
    return used or [feature for feature, _ in pairs]


def _choose_map(features: Sequence[_Feature], image: torch.Tensor) -> _Map | None:
    """The coarsest feature map that still shows a place: deep enough to know what it sees. Of several, the last one
    that is returned by the outermost submodule, since one inside a block may be a branch only. None: there is none."""
    lengths = {
        f.tensor.shape[1] for f in features if f.tensor.ndim == 3
    }  # of sequences: no map, but heads of attention
    maps = [
        one
        for i, feature in enumerate(features)
        if feature.tensor.ndim == 4
        and feature.tensor.shape[2] not in lengths - {1}
        and (one := _as_map(i, feature, image)) is not None
    ]
    least = min(LEAST_POSITIONS, image.shape[2] * image.shape[3])
    maps = [one for one in maps if one.grid[0] * one.grid[1] >= least]
    return min(maps, key=lambda one: (one.grid[0] * one.grid[1], one.depth, -one.position), default=None)


def _as_map(position: int, feature: _Feature, image: torch.Tensor) -> _Map | None:
    """Whether its channels come first or last; None: it is no map of the image."""
    shape, (height, width) = feature.tensor.shape, image.shape[2:]
    if shape[0] != image.shape[0]:
        return None
    candidates: list[tuple[float, tuple[int, ...], tuple[int, int]]] = []
    for order, (high, wide) in (((0, 1, 2, 3), shape[2:]), ((0, 3, 1, 2), shape[1:3])):
        if 1 <= high <= height + 8 and 1 <= wide <= width + 8:  # a convolution may pad
            stretch = max(high * width, wide * height) / min(high * width, wide * height)
            candidates.append((stretch, order, (high, wide)))
    stretch, layout, grid = min(candidates, default=(MOST_STRETCH, (), (0, 0)))
    return None if stretch >= MOST_STRETCH else _Map(position=position, layout=layout, grid=grid, depth=feature.depth)


def _tokens_after(features: Sequence[_Feature], patches: _Map) -> list[torch.Tensor]:
    """The sequences (B, L, D) as which a map of patches goes on."""
    count, batch = patches.grid[0] * patches.grid[1], len(features[patches.position].tensor)
    later = (feature.tensor for feature in features[patches.position + 1 :])
    return [t for t in later if t.ndim == 3 and len(t) == batch and 0 <= t.shape[1] - count <= MORE_TOKENS]


# --- texts ----------------------------------------------------------------------------------


def _explain_tokens(module: nn.Module, tensors: Mapping[str, torch.Tensor], name: str, score: Score) -> Weights:
    """(B, L)."""
    import torch

    ids = tensors[name]
    embedded: list[torch.Tensor] = []

    def cut(_module: nn.Module, inputs: tuple[Any, ...], output: object) -> torch.Tensor | None:
        """Gradients are wanted of the first embedding of the words only."""
        reads_words = bool(inputs) and isinstance(inputs[0], torch.Tensor) and torch.equal(inputs[0], ids)
        if embedded or not reads_words or not isinstance(output, torch.Tensor) or output.shape[:2] != ids.shape:
            return None
        embedded.append(output.detach().requires_grad_(True))
        return embedded[0]

    hooks = [part.register_forward_hook(cut) for part in module.modules() if isinstance(part, torch.nn.Embedding)]
    try:
        total = score(module(*tensors.values())).sum()
    finally:
        for hook in hooks:
            hook.remove()
    if not embedded:
        raise ValueError("it has no nn.Embedding that gives a vector for each token")
    (gradient,) = torch.autograd.grad(total, embedded[0])
    return (gradient * embedded[0]).sum(2), "gradient times input"


METHODS: dict[str, Callable[[Any, Mapping[str, Any], str, Any], Any]] = {
    "image": _explain_image,
    "tokens": _explain_tokens,
}
