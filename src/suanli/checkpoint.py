"""Everything that training needs to go on exactly, in one safetensors file; no pickle.

Tensors are stored by name ("model.…", "ema.…", "optimizer.<parameter>.<key>"), numbers as JSON in
the header. Random numbers need no state: every step draws from a seed of its own (`data.mix`).
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from suanli.console import warn
from suanli.errors import DamagedFile
from suanli.storage import atomic_file, writing
from suanli.types import Json

KEPT = 2  # the newest, and the one before in case the newest was damaged
_NAME = re.compile(r"step-(\d+)\.safetensors")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    step: int
    tensors: Tensors
    progress: dict[str, Json]  # plain values of the loop
    path: Path


def write(path: Path, tensors: Tensors, progress: Json) -> None:
    _write(path, _copies(tensors), progress)


def _copies(tensors: Tensors) -> Tensors:
    """In main memory. Tensors that share memory (tied weights) would be refused, and a later step must not show."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


def _write(path: Path, own: Tensors, progress: Json) -> None:
    with atomic_file(path) as stream:
        stream.write(save(own, metadata={"progress": json.dumps(progress)}))


class Writer:
    """Writes one checkpoint at a time in a thread, while training goes on with a copy of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, folder: Path, step: int, tensors: Tensors, progress: Json) -> None:
        """Copies now and writes later. Raises what an earlier write raised."""
        self.wait()
        own, plain = _copies(tensors), json.loads(json.dumps(progress))

        def work() -> None:
            try:
                _save_own(folder, step, own, plain)
            except BaseException as error:  # noqa: BLE001  # raised again by who waits
                self._failed = error

        self._thread = threading.Thread(target=work, name="suanli-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises what its write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed


def save_step(folder: Path, step: int, tensors: Tensors, progress: Json) -> Path:
    """Writes step-<n>, and removes all but the newest KEPT up to it."""
    return _save_own(folder, step, _copies(tensors), progress)


def _save_own(folder: Path, step: int, own: Tensors, progress: Json) -> Path:
    path = folder / f"step-{step:08d}.safetensors"
    _write(path, own, progress)
    earlier = [found for found in _steps(folder) if found[0] <= step][:KEPT]
    for _, old in [found for found in _steps(folder) if found not in earlier]:
        with writing(old):
            old.unlink(missing_ok=True)
    return path


def read(path: Path) -> Checkpoint:
    """Raises DamagedFile for a file that is cut short or not a checkpoint."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            progress = json.loads(metadata["progress"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise DamagedFile(
            f"The checkpoint {path} is damaged ({error}).",
            fix="Remove it to go on from the one before, or train again.",
        ) from error
    match = _NAME.fullmatch(path.name)
    return Checkpoint(step=int(match[1]) if match else 0, tensors=tensors, progress=progress, path=path)


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is passed over with a warning. None: there is no
    checkpoint at all. Raises DamagedFile if every one is damaged."""
    damaged: DamagedFile | None = None
    for _, path in _steps(folder):
        try:
            return read(path)
        except DamagedFile as error:
            warn(f"{error.message} Trying the one before.")
            damaged = error
    if damaged is not None:
        raise damaged
    return None


def last_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, unread; None: there is none."""
    return next((step for step, _ in _steps(folder)), None)


def forget(folder: Path) -> None:
    """Removes every checkpoint of a step."""
    for _, path in _steps(folder):
        with writing(path):
            path.unlink(missing_ok=True)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Step checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


_COMPUTING = ("fused", "foreach", "capturable", "differentiable")  # entries of a group that torch's step obeys


# --- optimizers -----------------------------------------------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[Tensors, Json]:
    """The state of an optimizer as named tensors and as plain values."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    values: dict[str, dict[str, Json]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    groups = [
        {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in group.items()} for group in state["param_groups"]
    ]
    return tensors, {"values": values, "groups": groups}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Tensors, plain: Json) -> None:
    """The inverse of `optimizer_tensors`, bit by bit."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Json]] = {int(i): dict(v) for i, v in plain["values"].items()}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)]
            if tensor.shape == parameter.shape:
                # In the memory layout of its parameter (channels_last): fused kernels walk both in
                # the order of memory and would pair the wrong elements.
                tensor = torch.empty_like(parameter.detach(), dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    # JSON has no tuples; torch's own groups have (betas). How the step is computed is the new plan's.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in saved.items()}
        | {k: v for k, v in group.items() if k in _COMPUTING}
        for saved, group in zip(plain["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
