"""Imports timm, also where torchvision was built for another torch.

timm can't be imported without torchvision, and torchvision fails where its compiled operations don't load: beside a
torch without CUDA, for which no torchvision is published. timm uses none of these operations. Where they don't load,
their names are made known to torch before torchvision asks for them; calling one fails as it would anyway.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from suanli.core.errors import DataError, UsageError, pip_install

READS_FILES = ("pretrained", "checkpoint", "cache")  # starts of arguments with which timm reads other files
_OPERATIONS = ("nms", "qnms")  # that torchvision names when it is imported
_known: list[Any] = []  # torch forgets the names when this is gone


def import_timm() -> Any:
    """Raises UsageError where it, or torchvision, isn't installed."""
    if importlib.util.find_spec("timm") is None:
        raise UsageError("This needs timm.", fix=f"Install it: {pip_install('suanli[timm]')}")
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise UsageError(
            "timm needs torchvision, which isn't installed.",
            fix=f"Install it without another torch: {pip_install('--no-deps', 'torchvision')}",
        )
    if not _known and not _operations_load(Path(spec.origin).parent):
        import torch

        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in _OPERATIONS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _known.append(library)
    import timm

    return timm


def refuse_other_files(arguments: Iterable[str], whose: str) -> None:
    """Raises DataError for arguments of a network with which timm would read files that nobody named or checked."""
    if refused := [name for name in arguments if name.startswith(READS_FILES)]:
        raise DataError(
            f"{whose} has {', '.join(refused)}, with which timm would read other files.",
            fix="Leave it out; --weights names weights to start from.",
        )


def _operations_load(folder: Path) -> bool:
    """Beside a torch with CUDA they must, or torchvision's own error is the right one."""
    import torch

    if torch.version.cuda is not None:
        return True
    compiled = [path for pattern in ("_C*.so", "_C*.pyd") for path in folder.glob(pattern)]
    try:
        for path in compiled:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError):
        return False
    return bool(compiled)
