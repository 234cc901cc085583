"""From a weights file to the parameters of a network, and from the file alone to the network that it is of.

Weights come from safetensors only: a pickle can run any code when it is opened. The names of published originals are
those of the network after `Model.convert`. Tensors that fit by name and shape are taken; for images of another size or
with other channels they are made to fit where that is usual; the others are reported, never silently dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from suanli.core import registry
from suanli.core.errors import DamagedFile, DataError, UsageError
from suanli.core.types import Json, Model, Shapes
from suanli.models.conversion import refuse_pickle

if TYPE_CHECKING:
    import torch
    from torch import nn

PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.", "timm_model.")  # that wrappers add to the names of tensors
MOST_TENSORS = 5000  # that a published network has, with some to spare
OF_A_FILE = (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What happened to each tensor of a weights file. Names are those in the network, or those in the file where the
    network has no such name."""

    taken: tuple[str, ...]
    skipped: Mapping[str, str]  # in the file but not taken: name to reason
    missing: tuple[str, ...]  # in the network but not in the file: these keep their initial values
    adapted: Mapping[str, str] = field(default_factory=dict)  # of those taken: what was done to make them fit

    def __str__(self) -> str:
        lines = [f"weights: {len(self.taken)} tensors taken, {len(self.skipped)} not, {len(self.missing)} missing"]
        lines += [f"  made to fit: {name}: {change}" for name, change in self.adapted.items()]
        for reason in dict.fromkeys(self.skipped.values()):
            names = [name for name, its in self.skipped.items() if its == reason]
            lines.append(f"  not taken: {_few(names)}: {reason}")
        if self.missing:
            lines.append(f"  not in the file: {_few(self.missing)}")
        return "\n".join(lines)


def recognize(shapes: Shapes, config: Mapping[str, Json] | None = None) -> tuple[str, dict[str, Json]] | None:
    """The network that a weights file is of, by the names and shapes of its tensors: its name, and the arguments of its
    builder beside those that data and task decide. None where no network is known to have these tensors.

    `config` is the publisher's config.json, as transformers, timm and Open CLIP write it. From it comes what no shape
    shows: heads, the epsilon of norms, padding, CLIP's activation. Without it they are those usual for such a file.
    """
    config = config or {}
    if str(config.get("architecture", "")).startswith("test_"):
        return None  # timm's networks for tests have the tensors of others, and other activations
    if len(shapes) > MOST_TENSORS:
        return None
    bare = _unwrap(shapes)
    for name, model in registry.load_all("models").items():
        try:
            args = model.recognize(bare, config)
        except OF_A_FILE:  # names and shapes may be anything
            continue
        if args is not None:
            return name, args
    return None


def load_weights(
    module: nn.Module, path: Path, head: str, *, new_head: bool = False, model: Model | None = None
) -> WeightsReport:
    """Copy the tensors that fit from a safetensors file into `module`, which `model` built. A head for other classes is
    not taken: it is recognised by its shape, or the caller sets `new_head` where the classes are as many but others.

    Where the network has another number of input channels, its first convolution gets: for one channel the sum of the
    file's filters, so that a grey image gives what it gave as RGB; for others the filters in turn, scaled by
    the old number over the new one. Positions of patches are resampled.

    Nothing is changed unless the whole file could be read. Raises UsageError for another format or a missing file,
    DamagedFile for one that is truncated or contains NaN or infinity, and DataError where nothing but the head fits or
    the file is of another network.
    """
    import torch

    file = _read(path)
    state = module.state_dict()
    tensors, skipped = _match_names(_convert(file, model), state)
    adapted: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            try:
                fitted = _fit(name, tensor, module, state)
            except ValueError as error:
                raise DataError(f"{path} doesn't fit the model: {error}.", fix="Leave model_args to it.") from error
            if fitted is None:
                skipped[name] = f"has shape {_shape(tensor)}, the model needs {_shape(state[name])}"
            else:
                tensors[name], adapted[name] = fitted
    in_head = {name for name in state if name.startswith(f"{head}.")}
    if new_head or in_head & skipped.keys():
        skipped |= dict.fromkeys(sorted(in_head & tensors.keys()), "part of a head for other classes")
    fitting = {name: tensor for name, tensor in tensors.items() if name not in skipped}
    missing = tuple(n for n in state if n not in tensors and not n.endswith("num_batches_tracked"))
    if (skipped.keys() | set(missing)) - in_head and model is not None and not _is_foreign(model):
        _refuse_other_network(path, file, model)
    body = [name for name in state if name not in in_head and not name.endswith("num_batches_tracked")]
    needed = 1 if model is None or _is_foreign(model) else len(body) / 2  # who wrote a network knows what it shares
    if not fitting or (body and len(fitting.keys() - in_head) < needed):
        raise DataError(
            f"{path} doesn't fit the model{f' {model.name}' if model else ''}: it has "
            f"{_few([*tensors, *skipped])}, the model {_few(state)}.",
            fix="With --model, name the network that these weights were trained with. Networks that are recognised "
            f"without it: {', '.join(_readers())}.",
        )
    _check_finite(fitting, path)
    with torch.no_grad():
        for name, tensor in fitting.items():
            state[name].copy_(tensor)
    return WeightsReport(taken=tuple(fitting), skipped=skipped, missing=missing, adapted=adapted)


def _refuse_other_network(path: Path, file: Mapping[str, torch.Tensor], model: Model) -> None:
    """Raises DataError where the file is of another network of suanli."""
    found = recognize({name: tuple(tensor.shape) for name, tensor in file.items()})
    if found is not None and found[0] != model.name:
        raise DataError(
            f"{path} has weights of {found[0]}, and the model is {model.name}.",
            fix=f"Choose --model {found[0]}, or leave it to the weights.",
        )


def _readers() -> list[str]:
    """Names of the networks that recognise files."""
    return [name for name, model in registry.load_all("models").items() if model.recognize is not Model.recognize]


def _is_foreign(model: Model) -> bool:
    return ":" in model.name


def _read(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pickle(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFile(
            f"{path} is not a complete safetensors file ({error}).", fix="Download or convert it again."
        ) from error
    except OSError as error:
        raise UsageError(
            f"Can't read weights {path}: {error.strerror or error}.", fix="Give the path of a safetensors file."
        ) from error


# --- names ----------------------------------------------------------------------------------


def _unwrap(tensors: Mapping[str, T]) -> dict[str, T]:
    """By names without the prefixes of wrappers. Where two would then be the same, the longer keeps its own."""
    unwrapped: dict[str, T] = {}
    for name_in_file in sorted(tensors, key=len):
        name = name_in_file
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
        unwrapped[name_in_file if name in unwrapped else name] = tensors[name_in_file]
    return unwrapped


def _convert(file: dict[str, torch.Tensor], model: Model | None) -> dict[str, torch.Tensor]:
    """By the names that the network has where the file is of a published original."""
    if model is None or model.convert is Model.convert:
        return file
    try:
        return model.convert(_unwrap(file))
    except OF_A_FILE:  # names of an original, and shapes that it never had
        return file


def _match_names(
    tensors: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors by their names in the network, and for the others the reason why they have none. A name in the file
    may have prefixes of wrappers; a name without them is preferred."""
    matches: dict[str, torch.Tensor] = {}
    skipped: dict[str, str] = {}
    for name_in_file in sorted(tensors, key=len):
        name = name_in_file
        while name not in state and (prefix := next((p for p in PREFIXES if name.startswith(p)), None)):
            name = name.removeprefix(prefix)
        if name not in state:
            skipped[name_in_file] = "the model has no tensor of this name"
        elif name in matches:
            skipped[name_in_file] = f"{name} is in the file twice"
        else:
            matches[name] = tensors[name_in_file]
    return matches, skipped


# --- shapes ---------------------------------------------------------------------------------


def _fit(
    name: str, tensor: torch.Tensor, module: nn.Module, state: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, str] | None:
    """A tensor of another shape, made to fit, and what was done; None where that isn't usual. Raises ValueError where
    the network can't use the file at all."""
    wanted = state[name]
    first = next((n for n, t in state.items() if t.ndim == 4), None)  # the convolution that sees the image
    if name == first and tensor.ndim == 4 and tensor.shape[1] and tensor[:, :1].shape == wanted[:, :1].shape:
        return _fit_channels(tensor, wanted.shape[1])
    fit_tensor = getattr(module, "fit_tensor", None)
    fitted: tuple[torch.Tensor, str] | None = fit_tensor(name, tensor) if callable(fit_tensor) else None
    return fitted if fitted is not None and fitted[0].shape == wanted.shape else None


def _fit_channels(filters: torch.Tensor, channels: int) -> tuple[torch.Tensor, str]:
    """Filters (out, C, h, w) for images with `channels`."""
    import torch

    before = filters.shape[1]
    if channels == 1:
        return filters.float().sum(1, keepdim=True), f"the filters of {before} channels were summed, for one"
    in_turn = filters.float()[:, torch.arange(channels) % before]
    return in_turn * (before / channels), f"the filters of {before} channels were repeated and scaled, for {channels}"


def _check_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    bad = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if bad:
        raise DamagedFile(
            f"{path} contains NaN or infinity in {_few(bad)}.", fix="Use the weights of an earlier checkpoint."
        )


def _few(names: Iterable[str], count: int = 3) -> str:
    listed = list(names)
    more = f", … ({len(listed)} in all)" if len(listed) > count else ""
    return ", ".join(listed[:count]) + more if listed else "nothing"


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
