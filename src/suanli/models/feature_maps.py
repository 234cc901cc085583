"""A network of the rooms or of timm as the backbone of another one: its maps at strides 4, 8, 16 and 32.

What of it no map needs, such as its head, is left out: a parameter without gradients would decay, and processes that
train together would wait for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from suanli.core import registry
from suanli.core.errors import DataError, UsageError
from suanli.core.types import Json, Model
from suanli.models import build
from suanli.models.fitting import WeightsReport
from suanli.models.fitting import load_weights as load_into
from suanli.models.safetensors_io import read_shapes
from suanli.models.timm_import import import_timm, refuse_other_files

STRIDES = (4, 8, 16, 32)  # px
TIMM = "timm:"
LARGE_PX = 128  # of a side, from which a network takes an image for a large one, and has these strides


class Backbone(nn.Module):
    """Images (B, C, H, W) to maps at strides 4, 8, 16 and 32, of `channels`; their sides are rounded up. `network` is
    the name of `net`."""

    def __init__(self, net: nn.Module, network: str, places: Sequence[int]) -> None:
        """`places`: of the maps of these strides, among those that the network gives."""
        super().__init__()
        self.net, self.network, self.places = net, network, tuple(places)
        self.channels: tuple[int, ...] = ()
        self.channels_last = False  # its maps are (B, H, W, C)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return self.feature_maps(images)

    def feature_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Sides that aren't a multiple of 32 are padded, since networks differ in what they do with the rest."""
        sides = tuple(images.shape[2:])
        bottom, right = (-side % STRIDES[-1] for side in sides)
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom))
        given = getattr(self.net, "feature_maps", self.net)(images)
        maps = [given[place] for place in self.places]
        if self.channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        if bottom or right:
            ends = [[-(-side // stride) for side in sides] for stride in STRIDES]
            maps = [one[:, :, :height, :width] for one, (height, width) in zip(maps, ends, strict=True)]
        return maps


def make_backbone(
    name: str, *, in_channels: int, image_size: Sequence[int], args: Mapping[str, Json] | None = None
) -> Backbone:
    """The network `name`, of the rooms or `timm:NAME`, with these arguments of its own. Raises UsageError for one that
    has no maps at these strides."""
    size = (int(image_size[0]), int(image_size[1]))
    if name.startswith(TIMM):
        backbone = _of_timm(name, in_channels, size, args or {})
    else:
        backbone = _of_rooms(name, in_channels, size, args or {})
    padded = [side + -side % STRIDES[-1] for side in size]
    used = _probe(backbone, in_channels, padded)
    _leave_out(backbone.net, {parameter for parameter, is_used in used.items() if not is_used}, "net")
    return backbone


def load_weights(module: nn.Module, path: Path, head: str, *, model: Model, new_head: bool = False) -> WeightsReport:
    """As `fitting.load_weights`, also for a file of the network that is the backbone of `module`: then all else keeps
    its values. Raises DataError, too, where a tensor of the backbone isn't in the file."""
    backbone = module.get_submodule(model.backbone) if model.backbone else None
    if not isinstance(backbone, Backbone) or module.state_dict().keys() & read_shapes(path).keys():
        return load_into(module, path, model.class_layer or head, new_head=new_head, model=model)
    network, state = build.resolve(backbone.network), backbone.net.state_dict()
    if network.name.startswith(TIMM):
        network = replace(network, convert=_timms_names(state))
    report = load_into(backbone.net, path, "", model=network)
    prefix = f"{model.backbone}.net."
    others = {name: reason for name, reason in report.skipped.items() if name in state}
    if others or report.missing:
        raise DataError(
            f"{path} doesn't fit the backbone {backbone.network}: {report}",
            fix="Choose weights of this network that learned from images of more than 64 px: those for smaller ones "
            "begin with other layers.",
        )
    return WeightsReport(
        taken=tuple(prefix + name for name in report.taken),
        skipped=dict.fromkeys(report.skipped, "a backbone has no such layer"),
        missing=tuple(
            name
            for name in module.state_dict()
            if not name.startswith(prefix) and not name.endswith("num_batches_tracked")
        ),
        adapted={prefix + name: change for name, change in report.adapted.items()},
    )


# --- building -------------------------------------------------------------------------------


def _of_rooms(name: str, in_channels: int, size: tuple[int, int], args: Mapping[str, Json]) -> Backbone:
    if ":" in name:
        raise UsageError(f"A backbone is a network of suanli or of timm, not {name!r}.", fix=_choose_another(name))
    model = build.resolve(name)
    build.refuse_other_kind(model, "image")
    large = tuple(max(side, LARGE_PX) for side in size)
    net = build.construct(model, {"classes": 1, "in_channels": in_channels, "image_size": large, **args})
    if not callable(getattr(net, "feature_maps", None)):
        raise UsageError(f"The network {name} gives no feature maps.", fix=_choose_another(name))
    return Backbone(net, name, range(len(STRIDES)))


def _of_timm(name: str, in_channels: int, size: tuple[int, int], args: Mapping[str, Json]) -> Backbone:
    """Networks with a fixed input size get this one; the others refuse the argument."""
    build.resolve(name)  # it exists
    refuse_other_files(args, "backbone_args")
    timm = import_timm()
    padded = tuple(side + -side % STRIDES[-1] for side in size)
    common = {"pretrained": False, "features_only": True, "in_chans": in_channels, **args}
    try:
        try:
            net: Any = timm.create_model(name.removeprefix(TIMM), img_size=padded, **common)
        except TypeError:
            net = timm.create_model(name.removeprefix(TIMM), **common)
        strides = list(net.feature_info.reduction())
    except Exception as error:  # timm says in many ways that a network has no maps
        raise UsageError(f"{name} gives no feature maps ({error}).", fix=_choose_another(name)) from error
    if missing := set(STRIDES) - set(strides):
        raise UsageError(
            f"{name} has maps at strides {', '.join(map(str, strides))}, and a backbone needs those at "
            f"{', '.join(map(str, sorted(missing)))} px, too.",
            fix=_choose_another(name),
        )
    return Backbone(net, name, [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES])


def _choose_another(name: str) -> str:
    return f"Choose {', '.join(one for one in _rooms() if one != name)}, or a convolutional network as timm:NAME."


@cache
def _rooms() -> list[str]:
    """The networks of suanli with feature maps."""
    found = []
    for name, model in registry.load_all("models").items():
        if "image" in model.kinds:
            with torch.device("meta"):
                net = model.build(classes=1, in_channels=3, image_size=(LARGE_PX, LARGE_PX))
            if hasattr(net, "feature_maps"):
                found.append(name)
    return found


# --- what it gives, and what that needs -----------------------------------------------------


def _probe(backbone: Backbone, in_channels: int, size: Sequence[int]) -> dict[str, bool]:
    """Finds `channels` and the layout of the maps, and says of each parameter whether a map depends on it. Raises
    UsageError for maps at other strides."""
    was_training = backbone.training
    backbone.eval()
    try:
        try:
            maps, used = _trace(backbone, in_channels, size, torch.device("meta"))
        except (RuntimeError, NotImplementedError):  # something in it needs values
            maps, used = _trace(backbone, in_channels, size, next(backbone.parameters()).device)
    except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
        raise UsageError(
            f"{backbone.network} fails on images of {size[1]}x{size[0]} px: {error}.", fix="Choose another backbone."
        ) from error
    finally:
        backbone.train(was_training)
    expected = [tuple(side // stride for side in size) for stride in STRIDES]
    if [shape[2:] for shape in maps] != expected:
        backbone.channels_last = [shape[1:3] for shape in maps] == expected
        if not backbone.channels_last:
            found = ", ".join(f"{size[0] / shape[2]:g}" for shape in maps)
            raise UsageError(
                f"{backbone.network} gives maps at strides {found}, and a backbone needs 4, 8, 16 and 32 px.",
                fix=_choose_another(backbone.network),
            )
    backbone.channels = tuple(shape[3 if backbone.channels_last else 1] for shape in maps)
    return used


def _trace(
    backbone: Backbone, in_channels: int, size: Sequence[int], device: torch.device
) -> tuple[list[tuple[int, ...]], dict[str, bool]]:
    """The shapes of the maps, and by name whether they depend on each parameter, computed on a copy on `device`: the
    meta device computes no value."""
    parameters = {name: values.detach().to(device).requires_grad_() for name, values in backbone.named_parameters()}
    buffers = {name: values.to(device) for name, values in backbone.named_buffers()}
    images = torch.zeros(1, in_channels, *size, device=device)
    with torch.enable_grad():
        maps = torch.func.functional_call(backbone, parameters | buffers, (images,))
        total = torch.stack([one.float().sum() for one in maps]).sum()
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    used = {name: gradient is not None for name, gradient in zip(parameters, gradients, strict=True)}
    return [tuple(one.shape) for one in maps], used


def _leave_out(module: nn.Module, unused: set[str], path: str) -> None:
    """Replaces the layers below `module`, at `path`, of whose parameters none is used."""
    for name, child in list(module.named_children()):
        own = {f"{path}.{name}.{parameter}" for parameter, _ in child.named_parameters()}
        if own and own <= unused:
            setattr(module, name, nn.Identity())
        else:
            _leave_out(child, unused, f"{path}.{name}")
    for name, parameter in module.named_parameters(recurse=False):
        if f"{path}.{name}" in unused:
            parameter.requires_grad_(False)


def _timms_names(state: Mapping[str, torch.Tensor]) -> Any:
    """From the names of the whole network: `features_only` writes some dots as underscores, or adds "model."."""
    flat = {name.removeprefix("model.").replace(".", "_"): name for name in state}

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {flat.get(name.replace(".", "_"), name): tensor for name, tensor in tensors.items()}

    return convert
