"""Everything that training needs to resume exactly, in safetensors files; no pickle.

Tensors are stored by name ("model.…", "ema.…", "optimizer.<parameter>.<key>"), plain values as JSON. Random numbers
need no state: each step draws from a seed of its own (`loader.mix`).

    step-<n>.safetensors                   all of it, the values in the header
    step-<n>.json                          an index: the values, and the files of the shards; written after all of them
    step-<n>.<id>.<i>-of-<k>.safetensors   the shard of process i of k; its header says which rows of which tensors

With sharded weights each process writes a shard. The id is new for each checkpoint, so no file is overwritten that an
index names. Reading works with any number of processes: each takes the rows that it needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from suanli.core.console import warn
from suanli.core.errors import DamagedFile
from suanli.core.storage import atomic_file, raise_storage_errors, read_json
from suanli.core.types import Json
from suanli.models import safetensors_io
from suanli.models.safetensors_io import StoredTensors
from suanli.parallel import dtensor

KEPT = 2  # the newest, and the one before in case the newest is damaged
_NAME = re.compile(r"step-(\d+)\.(?:safetensors|json)")
_SHARD = re.compile(r"step-(\d+)\.[0-9a-f]+\.\d+-of-\d+\.safetensors")
_KERNEL_OPTIONS = ("fused", "foreach", "capturable", "differentiable")  # of a group: how torch computes the step

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    step: int
    tensors: StoredTensors
    progress: dict[str, Json]  # plain values of the loop
    path: Path


# --- writing --------------------------------------------------------------------------------


def write(path: Path, tensors: Tensors, progress: Mapping[str, object], *, writes: bool = True) -> None:
    """A collective for sharded tensors: they are gathered one after the other, into the file of the process that
    `writes`."""
    if not writes:
        safetensors_io.gather_only(tensors, dtensor.gather)
        return
    with atomic_file(path) as stream:
        safetensors_io.write_tensors(stream, tensors, {"progress": json.dumps(progress)}, of=dtensor.gather)


def save_step(folder: Path, step: int, tensors: Tensors, progress: Mapping[str, object]) -> Path:
    """Writes step-<n>.safetensors and removes old checkpoints."""
    path = folder / f"step-{step:08d}.safetensors"
    write(path, tensors, progress)
    remove_old(folder, step, path)
    return path


def shard_path(folder: Path, step: int, name: str, rank: int, size: int) -> Path:
    return folder / f"step-{step:08d}.{name}.{rank}-of-{size}.safetensors"


def file_size(path: Path) -> int | None:
    """In bytes; None: there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return None


# --- removing -------------------------------------------------------------------------------


def remove_old(folder: Path, step: int, newest: Path) -> None:
    """Removes all checkpoints but `newest`, that of `step`, and the KEPT - 1 before it; and files that belong to
    none."""
    earlier = [path for number, path in _list_steps(folder) if number < step][: KEPT - 1]
    for _, path in _list_steps(folder):
        if path != newest and path not in earlier:
            _remove(path)
    needed = {name for _, path in _list_steps(folder) for name in _shard_names(path)}
    for shard in folder.iterdir():
        if _SHARD.fullmatch(shard.name) and shard.name not in needed:
            _remove(shard)
    for unfinished in folder.glob(".step-*.tmp"):  # of processes that were killed: no process writes now
        _remove(unfinished)


def remove_all(folder: Path) -> None:
    """Removes the checkpoints of all steps."""
    for _, path in _list_steps(folder):
        _remove(path)
    for shard in folder.glob("step-*-of-*.safetensors"):
        _remove(shard)


def _remove(path: Path) -> None:
    with raise_storage_errors(path):
        path.unlink(missing_ok=True)


# --- reading --------------------------------------------------------------------------------


def read(path: Path) -> Checkpoint:
    """Raises DamagedFile for a file that is cut short or no checkpoint, and for a missing shard."""
    try:
        if path.suffix == ".json":
            index = read_json(path)
            shards = [(path.parent / Path(entry["file"]).name, entry["size_bytes"]) for entry in index["parts"]]
            for shard, size_bytes in shards:
                if file_size(shard) != size_bytes:
                    raise ValueError(f"{shard.name} has {file_size(shard) or 0} of {size_bytes} bytes")
            tensors, progress = StoredTensors([shard for shard, _ in shards]), index["progress"]
        else:
            tensors = StoredTensors([path])
            progress = json.loads(tensors.metadata[0]["progress"])
    except (DamagedFile, KeyError, ValueError, TypeError, OSError) as error:
        raise DamagedFile(
            f"The checkpoint {path} is damaged ({error}).",
            fix="Remove it to resume from the one before, or train again.",
        ) from error
    match = _NAME.fullmatch(path.name)
    return Checkpoint(step=int(match[1]) if match else 0, tensors=tensors, progress=progress, path=path)


def read_newest(folder: Path) -> Checkpoint | None:
    """The newest intact checkpoint; a damaged one is skipped with a warning. None: there is none. Raises DamagedFile
    if all are damaged."""
    damaged: DamagedFile | None = None
    for _, path in _list_steps(folder):
        try:
            return read(path)
        except DamagedFile as error:
            warn(f"{error.message} Trying the one before.")
            damaged = error
    if damaged is not None:
        raise damaged
    return None


def last_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, without reading it; None: there is none."""
    return next((step for step, _ in _list_steps(folder)), None)


def _list_steps(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of each checkpoint, newest first."""
    if not folder.is_dir():
        return []
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(steps, reverse=True)


def _shard_names(path: Path) -> list[str]:
    """The files that an index names; none where it is damaged or no index."""
    if path.suffix != ".json":
        return []
    try:
        return [str(entry["file"]) for entry in read_json(path)["parts"]]
    except (DamagedFile, OSError, KeyError, TypeError):
        return []


def load_tensors(stored: StoredTensors, into: Mapping[str, torch.Tensor], prefix: str = "") -> None:
    """Copies the stored tensors whose names begin with `prefix` into those of the same names; of a sharded tensor,
    this process's rows. Raises ValueError for other names or shapes."""
    names = {name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
    if names != into.keys():
        raise ValueError(f"it has {_summarize(names - into.keys())}, and lacks {_summarize(into.keys() - names)}")
    with torch.no_grad():
        for name, tensor in into.items():
            shape = stored.shape(prefix + name)
            if shape != tensor.shape:
                raise ValueError(f"{name} has shape {shape}, not {tuple(tensor.shape)}")
            dtensor.local_part(tensor).copy_(stored.rows(prefix + name, dtensor.local_rows(tensor)))


def _summarize(names: Collection[str]) -> str:
    return min(names, default="nothing") + (f" and {len(names) - 1} more" if len(names) > 1 else "")


# --- optimizers -----------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, object]]:
    """The state of an optimizer as named tensors and as plain values."""
    state = optimizer.state_dict()
    tensors: Tensors = {}
    values: dict[str, dict[str, object]] = {}
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


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: StoredTensors, plain: Mapping[str, Json]) -> None:
    """The inverse of `optimizer_state`, bit by bit; of a sharded tensor, this process's rows."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, object]] = {int(i): dict(v) for i, v in plain["values"].items()}
    for name in tensors:
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)].detach()
            if tensors.shape(name) == parameter.shape:
                rows = tensors.rows(name, dtensor.local_rows(parameter))
                # In the memory layout of its parameter (channels_last): fused kernels walk both in the order of
                # memory and would pair the wrong elements.
                rows = torch.empty_like(dtensor.local_part(parameter), dtype=rows.dtype).copy_(rows)
                state.setdefault(int(index), {})[key] = dtensor.from_local_part(rows, parameter)
            else:
                state.setdefault(int(index), {})[key] = tensors[name]
    # JSON has no tuples; torch's own groups have (betas). Which kernels compute the step is for the new plan to say.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in saved.items()}
        | {k: v for k, v in group.items() if k in _KERNEL_OPTIONS}
        for saved, group in zip(plain["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
