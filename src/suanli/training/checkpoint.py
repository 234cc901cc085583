"""Everything that training needs to go on exactly, in safetensors files; no pickle.

Tensors are stored by name ("model.…", "ema.…", "optimizer.<parameter>.<key>"), numbers as JSON. Random numbers need no
state: every step draws from a seed of its own (`data.mix`).

    step-<n>.safetensors               all of it, the numbers in the header
    step-<n>.json                      the numbers, and the parts that the tensors are in: written when these are whole
    step-<n>.<id>.<i>-of-<k>.safetensors   what process i of k held; the header says which rows of which tensors

Where processes share the weights out each writes its own part. The id is new each time, so nothing is overwritten that
an index names. However it was written, whoever reads takes the rows that it needs.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from suanli.core.console import warn
from suanli.core.errors import DamagedFile, MachineError
from suanli.core.storage import atomic_file, raise_storage_errors, read_json, write_json
from suanli.core.types import Json
from suanli.models import safetensors_io
from suanli.models.safetensors_io import StoredTensors
from suanli.parallel import dtensor
from suanli.parallel.group import Group

KEPT = 2  # the newest, and the one before in case the newest was damaged
_NAME = re.compile(r"step-(\d+)\.(?:safetensors|json)")
_PART = re.compile(r"step-(\d+)\.[0-9a-f]+\.\d+-of-\d+\.safetensors")

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    step: int
    tensors: StoredTensors
    progress: dict[str, Json]  # plain values of the loop
    path: Path


def write(path: Path, tensors: Tensors, progress: Json, *, writes: bool = True) -> None:
    """A collective where processes share the tensors: these are gathered one after the other, and are whole in the file
    of who `writes`."""
    if not writes:
        safetensors_io.gather_only(tensors, dtensor.gather)
        return
    with atomic_file(path) as stream:
        safetensors_io.write_tensors(stream, tensors, {"progress": json.dumps(progress)}, of=dtensor.gather)


def _copies(tensors: Tensors) -> Tensors:
    """In main memory. Tensors that share memory (tied weights) would be refused, and a later step must not show."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}


class Writer:
    """Writes one checkpoint at a time: in a thread and from a copy, beside the next steps, or else at once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, folder: Path, step: int, tensors: Tensors, progress: Json, *, beside: bool = True) -> None:
        """`beside`: copies now and writes later. Raises what an earlier write raised."""
        self.wait()
        plain = json.loads(json.dumps(progress))
        self._write(tensors, beside, lambda own: save_step(folder, step, own, plain))

    def _write(self, tensors: Tensors, beside: bool, write: Callable[[Tensors], object]) -> None:
        if not beside:
            write(tensors)
            return
        own = _copies(tensors)

        def work() -> None:
            try:
                write(own)
            except BaseException as error:  # noqa: BLE001  # raised again by who waits
                self._failed = error

        self._thread = threading.Thread(target=work, name="suanli-checkpoint")
        self._thread.start()

    @property
    def unfinished(self) -> bool:
        """Whether something was saved that still has to be made whole, by all processes."""
        return False

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def complete(self) -> None:
        """Until what was saved counts."""
        self.wait()

    def abandon(self) -> None:
        """What was saved and isn't whole yet won't count: training goes back behind it."""
        self.wait()

    def wait(self) -> None:
        """Until what was saved is on disk. Raises what its write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed


class ShardWriter(Writer):
    """Of a process that holds a part of every tensor: all write theirs, each in a thread, and once all have the first
    process names the parts in an index. A checkpoint without one doesn't count."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group
        self._open: tuple[Path, int, str, Json] | None = None  # folder, step, id and numbers of what isn't whole yet

    def save(self, folder: Path, step: int, tensors: Tensors, progress: Json, *, beside: bool = True) -> None:
        """A collective; what was saved before is made whole first."""
        self.complete()
        group, name = self._group, str(self._group.broadcast(secrets.token_hex(4)))
        self._open = folder, step, name, json.loads(json.dumps(progress))
        held = {n: (dtensor.local_part(t), dtensor.local_rows(t)) for n, t in tensors.items()}
        # What all have alike, and what has no rows, is the first one's.
        own = {n: t for n, (t, rows) in held.items() if group.is_first or (rows is not None and len(t))}
        places = {n: {"shape": list(tensors[n].shape), "first": rows.start} for n in own if (rows := held[n][1])}
        path = _part(folder, step, name, group.rank, group.size)

        def write(own: Tensors) -> None:
            with atomic_file(path) as stream:
                safetensors_io.write_tensors(stream, own, {safetensors_io.PLACES: json.dumps(places)})

        self._write(own, beside, write)

    @property
    def unfinished(self) -> bool:
        return self._open is not None

    def complete(self) -> None:
        """A collective: every part is on disk, and named by the index. Raises what its write raised, and MachineError
        where the first process can't see a part."""
        self.wait()
        if self._open is None:
            return
        (folder, step, name, progress), self._open = self._open, None
        size = self._group.size
        paths = [_part(folder, step, name, rank, size) for rank in range(size)]
        sizes = self._group.gather(paths[self._group.rank].stat().st_size)
        if not self._group.is_first:
            return
        for rank, (path, written) in enumerate(zip(paths, sizes, strict=True)):
            if _size(path) != written:
                raise MachineError(
                    f"Process {rank} has written {path.name}, and the first process can't see it in {folder}.",
                    fix="Keep the run on storage that all hosts share.",
                )
        parts = [{"file": path.name, "size_bytes": written} for path, written in zip(paths, sizes, strict=True)]
        path = folder / f"step-{step:08d}.json"
        write_json(path, {"progress": progress, "parts": parts})
        _keep(folder, step, path)

    def abandon(self) -> None:
        self.wait()
        self._open = None


def _part(folder: Path, step: int, name: str, rank: int, size: int) -> Path:
    return folder / f"step-{step:08d}.{name}.{rank}-of-{size}.safetensors"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def save_step(folder: Path, step: int, tensors: Tensors, progress: Json) -> Path:
    """Writes step-<n>, and removes all but the newest KEPT up to it."""
    path = folder / f"step-{step:08d}.safetensors"
    write(path, tensors, progress)
    _keep(folder, step, path)
    return path


def _keep(folder: Path, step: int, path: Path) -> None:
    """Removes all checkpoints but `path`, the newest, and those before it that are kept beside; and parts that belong
    to none."""
    earlier = [found for found in _steps(folder) if found[0] < step][: KEPT - 1]
    for _, old in _steps(folder):
        if old != path and (_, old) not in earlier:
            _remove(old)
    named = {part for _, kept in _steps(folder) for part in _parts(kept)}
    for part in folder.iterdir():
        if _PART.fullmatch(part.name) and part.name not in named:
            _remove(part)
    for unfinished in folder.glob(".step-*.tmp"):  # of processes that were killed: nobody writes now
        _remove(unfinished)


def _remove(path: Path) -> None:
    with raise_storage_errors(path):
        path.unlink(missing_ok=True)


def _parts(path: Path) -> list[str]:
    """The names of the files that an index names; none where it is damaged or no index."""
    if path.suffix != ".json":
        return []
    try:
        return [str(part["file"]) for part in read_json(path)["parts"]]
    except (DamagedFile, OSError, KeyError, TypeError):
        return []


def read(path: Path) -> Checkpoint:
    """Raises DamagedFile for a file that is cut short or not a checkpoint, and where a part is missing."""
    try:
        if path.suffix == ".json":
            index = read_json(path)
            parts = [(path.parent / Path(part["file"]).name, part["size_bytes"]) for part in index["parts"]]
            for part, size_bytes in parts:
                if _size(part) != size_bytes:
                    raise ValueError(f"{part.name} has {_size(part) or 0} of {size_bytes} bytes")
            tensors, progress = StoredTensors([part for part, _ in parts]), index["progress"]
        else:
            tensors = StoredTensors([path])
            progress = json.loads(tensors.metadata[0]["progress"])
    except (DamagedFile, KeyError, ValueError, TypeError, OSError) as error:
        raise DamagedFile(
            f"The checkpoint {path} is damaged ({error}).",
            fix="Remove it to go on from the one before, or train again.",
        ) from error
    match = _NAME.fullmatch(path.name)
    return Checkpoint(step=int(match[1]) if match else 0, tensors=tensors, progress=progress, path=path)


def read_newest(folder: Path) -> Checkpoint | None:
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


def remove_all(folder: Path) -> None:
    """Removes every checkpoint of a step."""
    for _, path in _steps(folder):
        _remove(path)
    for part in folder.glob("step-*-of-*.safetensors"):
        _remove(part)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Step checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted(found, reverse=True)


_COMPUTING = ("fused", "foreach", "capturable", "differentiable")  # entries of a group that torch's step obeys


# --- optimizers -----------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[Tensors, Json]:
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


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: StoredTensors, plain: Json) -> None:
    """The inverse of `optimizer_state`, bit by bit; of what this process shares with others, its rows."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Json]] = {int(i): dict(v) for i, v in plain["values"].items()}
    for name in tensors:
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            parameter = parameters[int(index)].detach()
            if tensors.shape(name) == parameter.shape:
                held = tensors.rows(name, dtensor.local_rows(parameter))
                # In the memory layout of its parameter (channels_last): fused kernels walk both in
                # the order of memory and would pair the wrong elements.
                held = torch.empty_like(dtensor.local_part(parameter), dtype=held.dtype).copy_(held)
                state.setdefault(int(index), {})[key] = dtensor.from_local_part(held, parameter)
            else:
                state.setdefault(int(index), {})[key] = tensors[name]
    # JSON has no tuples; torch's own groups have (betas). How the step is computed is the new plan's.
    groups = [
        {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in saved.items()}
        | {k: v for k, v in group.items() if k in _COMPUTING}
        for saved, group in zip(plain["groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
