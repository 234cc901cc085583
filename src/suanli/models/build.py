"""From a model's name to a network that fits the data.

A model is a built-in name, a user's `package.module:function`, or `timm:NAME`. Every network is tried on a tiny batch
before anything long starts. `fitting.py` reads weights files into it.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from suanli.core import registry
from suanli.core.errors import SuanliError, UsageError, pip_install, unknown
from suanli.core.schema import zeros
from suanli.core.task import Task
from suanli.core.types import Json, Model, Preprocess, Recipe
from suanli.machine import device
from suanli.models.fitting import WeightsReport as WeightsReport
from suanli.models.fitting import load_weights as load_weights
from suanli.models.fitting import recognize as recognize
from suanli.models.timm_import import import_timm, refuse_other_files

if TYPE_CHECKING:
    import torch
    from torch import nn


# --- names ----------------------------------------------------------------------------------


def resolve(spec: str) -> Model:
    """The model that `spec` names. Its `head` is empty where it is known only once the network is built (see
    `head_of`). Raises UsageError for a name that doesn't exist."""
    if spec.startswith("timm:"):
        return _resolve_timm(spec)
    if ":" in spec:
        return _resolve_function(spec)
    model: Model = registry.load("models", spec)
    return model


def _resolve_function(spec: str) -> Model:
    module_name, _, function_name = spec.partition(":")
    function = getattr(_import(module_name, spec), function_name, None)
    if not callable(function):
        raise UsageError(
            f"Module {module_name!r} has no function {function_name!r}.",
            fix="Name a function that takes classes=… and returns a torch.nn.Module, as package.module:function.",
        )
    return Model(name=spec, kinds=registry.names("preprocess"), build=function, head="", source=spec, returns="")


def _import(module_name: str, spec: str) -> ModuleType:
    """Import the user's module; the current directory is searched, as with `python -m`."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"Can't import {module_name!r} of model {spec!r}: {error}.",
            fix="Write package.module:function, with the module installed or in the current directory.",
        ) from error
    except Exception as error:  # the user's file may raise anything
        raise UsageError(
            f"Can't import {module_name!r}: {type(error).__name__}: {error}.",
            fix="Fix that file; a model is written package.module:function.",
        ) from error


def _resolve_timm(spec: str) -> Model:
    if importlib.util.find_spec("timm") is None:
        raise UsageError(f"Model {spec!r} needs timm.", fix=f"Install it: {pip_install('timm>=1.0')}")
    timm = import_timm()
    name = spec.removeprefix("timm:")
    if not timm.is_model(name):
        raise unknown("timm model", name, timm.list_models())

    def build(*, classes: int, in_channels: int, image_size: tuple[int, int], **args: Any) -> nn.Module:
        """Models with a fixed input size get this one; the others refuse the argument."""
        refuse_other_files(args, f"The network {spec}")
        common = {"pretrained": False, "num_classes": classes, "in_chans": in_channels, **args}
        try:
            module: nn.Module = timm.create_model(name, img_size=image_size, **common)
        except TypeError:
            module = timm.create_model(name, **common)
        return module

    return Model(name=spec, kinds=("image",), build=build, head="", source=f"timm {timm.__version__}")


# --- building -------------------------------------------------------------------------------


def build(recipe: Recipe, preprocess: Preprocess, task: Task, *, on_meta: bool = False) -> nn.Module:
    """The recipe's network for inputs of `preprocess`, tried on a tiny batch. Raises UsageError where the model is for
    another kind of data, an argument is wrong or the task can't predict from its output. `on_meta`: on the meta device
    and untried where that is possible, since the caller gets the values from elsewhere."""
    model = resolve(recipe.model)
    refuse_other_kind(model, preprocess.kind)
    refuse_other_task(model, task)
    args = builder_arguments(recipe, preprocess, task)
    if on_meta and (outline := build_on_meta(model, args)) is not None:
        return outline
    module = construct(model, args)
    _try_batch(model, module, preprocess, task)
    return module


def refuse_other_kind(model: Model, kind: str) -> None:
    """Raises UsageError for a model that isn't for this kind of data."""
    if kind not in model.kinds:
        fitting = [name for name, other in registry.load_all("models").items() if kind in other.kinds]
        raise UsageError(
            f"Model {model.name!r} is for {', '.join(model.kinds)} data, not {kind}.",
            fix=f"Models for {kind} data: {', '.join(fitting)}.",
        )


def refuse_other_task(model: Model, task: Task | type[Task]) -> None:
    """Raises UsageError for a model that is known to return something else than the task learns from."""
    if model.returns in ("", task.learns_from):
        return
    fitting = [n for n, other in registry.load_all("models").items() if other.returns == task.learns_from]
    raise UsageError(
        f"Model {model.name!r} returns {model.returns}, and the task {task.name} needs {task.learns_from}.",
        fix=f"Models for it: {', '.join(fitting) or 'none; write one as package.module:function'}.",
    )


def builder_arguments(recipe: Recipe, preprocess: Preprocess, task: Task) -> dict[str, Json]:
    """The arguments for the model's builder: JSON values, so that a saved model can be built again. Raises UsageError
    for a model argument that the builder doesn't take."""
    accepted = _accepted_arguments(resolve(recipe.model).build)
    if accepted is None:
        return {**task.model_args, **preprocess.model_args, **recipe.model_args}
    defaults = {**task.model_args, **preprocess.model_args}
    for name in recipe.model_args:
        if name not in accepted:
            raise unknown("model argument", name, [a for a in accepted if a not in defaults])
    return {**{k: v for k, v in defaults.items() if k in accepted}, **recipe.model_args}


def construct(model: Model, args: Mapping[str, object]) -> nn.Module:
    """Call the builder. Raises UsageError where it fails or returns something else than a module."""
    from torch import nn

    try:
        module = model.build(**args)
    except SuanliError:
        raise
    except Exception as error:  # a user's function may raise anything
        if device.is_out_of_memory(error):
            raise
        raise UsageError(
            f"Model {model.name!r} can't be built: {type(error).__name__}: {error}.",
            fix="Change the model's arguments, or fix the function that builds it.",
        ) from error
    if not isinstance(module, nn.Module):
        raise UsageError(
            f"Model {model.name!r} returned {type(module).__name__}, not a torch.nn.Module.",
            fix="Return the network itself.",
        )
    return module


def build_on_meta(model: Model, args: Mapping[str, object]) -> nn.Module | None:
    """The network on the meta device: shapes without values, which take no memory. None where something needs values:
    the builder, the network's `initialize`, or a tensor that is neither a parameter nor a buffer."""
    import torch
    from torch.nn.parameter import is_lazy
    from torch.utils._pytree import tree_leaves

    before = _meta_tensors()
    try:
        with torch.device("meta"):
            module = construct(model, args)
    except UsageError:
        return None
    registered = [*module.parameters(), *module.buffers()]
    if callable(getattr(module, "initialize", None)) or any(map(is_lazy, registered)):
        return None
    registries = ("_parameters", "_buffers", "_modules")
    others = tree_leaves([[v for k, v in vars(part).items() if k not in registries] for part in module.modules()])
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in others):
        return None
    # Tensors that no attribute refers to, such as those in a closure.
    hidden = _meta_tensors().keys() - before.keys() - set(map(id, registered))
    return None if hidden else module


def _meta_tensors() -> dict[int, torch.Tensor]:
    import torch

    gc.collect()
    return {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.is_meta}


def describe_tensors(module: nn.Module) -> list[list[object]]:
    """Name, shape, dtype and requires_grad of each parameter and buffer: networks that agree in these can take each
    other's values."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [[name, list(tensor.shape), str(tensor.dtype), tensor.requires_grad] for name, tensor in tensors]


def _accepted_arguments(function: Callable[..., object]) -> list[str] | None:
    """The names of a builder's arguments; None: it takes any, or they aren't known."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _try_batch(model: Model, module: nn.Module, preprocess: Preprocess, task: Task) -> None:
    """Raises UsageError unless the task can predict from what a batch of 2 gives."""
    import torch

    batch = {name: torch.from_numpy(array) for name, array in zeros(preprocess.inputs, 2).items()}
    inputs = tuple(preprocess.to_model(batch).values())
    was_training = module.training
    module.eval()
    try:
        with torch.inference_mode():
            outputs = module(*inputs)
    except Exception as error:  # a user's network may raise anything
        if device.is_out_of_memory(error):
            raise
        raise UsageError(
            f"Model {model.name!r} fails on a batch of shape {tuple(inputs[0].shape)}: {error}.",
            fix="Choose a model for inputs of this shape, or change the preprocessing size.",
        ) from error
    finally:
        module.train(was_training)
    expected = {name: (2, *column.fixed_shape) for name, column in task.outputs.items()}
    try:
        shapes = {name: tuple(tensor.shape) for name, tensor in task.predict(outputs).items()}
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError):
        shapes = {}
    if shapes != expected:
        output = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        arguments = ", ".join(f"{name}={value}" for name, value in task.model_args.items())
        raise UsageError(
            f"Model {model.name!r} returned {output} for a batch of 2, from which the task {task.name} can't make "
            f"{', '.join(f'{name} {shape}' for name, shape in expected.items())}.",
            fix=f"Return what the task needs; its arguments for the network are {arguments}.",
        )


def head_of(module: nn.Module, model: Model) -> str:
    """The name of the output layer: the model's own, timm's, or the last linear or convolution layer.
    Raises UsageError where there is none."""
    from torch import nn

    config = getattr(module, "default_cfg", None) or {}
    named = model.head or (config.get("classifier") if model.name.startswith("timm:") else None)
    layers = dict(module.named_modules())
    if isinstance(named, str) and named in layers:
        return named
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    candidates = [name for name, layer in layers.items() if name and isinstance(layer, kinds)]
    if not candidates:
        raise UsageError(
            f"Model {model.name!r} has no linear or convolution layer to be its head.",
            fix="End the network in torch.nn.Linear(features, classes), as a submodule.",
        )
    return str(candidates[-1])
