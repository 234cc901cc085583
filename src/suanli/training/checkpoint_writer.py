"""Writes checkpoints while training goes on: the whole state from one process, or a shard from each."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from suanli.core.errors import MachineError
from suanli.core.storage import atomic_file, write_json
from suanli.models import safetensors_io
from suanli.parallel import dtensor
from suanli.parallel.group import Group
from suanli.training.checkpoint import Tensors, file_size, remove_old, save_step, shard_path


class Writer:
    """Writes one checkpoint at a time, at once or in a thread."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, folder: Path, step: int, tensors: Tensors, progress: Mapping[str, object], *, in_background: bool = True
    ) -> None:
        """`in_background`: copies the tensors now and writes them during the next steps. Raises the error of an
        earlier write."""
        self.wait()
        plain = json.loads(json.dumps(progress))
        self._write(tensors, in_background, lambda own: save_step(folder, step, own, plain))

    def _write(self, tensors: Tensors, in_background: bool, write: Callable[[Tensors], object]) -> None:
        if not in_background:
            write(tensors)
            return
        copies = _copy_to_cpu(tensors)

        def run() -> None:
            try:
                write(copies)
            except BaseException as error:  # noqa: BLE001  # raised again by `wait`
                self._error = error

        self._thread = threading.Thread(target=run, name="suanli-checkpoint")
        self._thread.start()

    @property
    def uncommitted(self) -> bool:
        """Whether something was saved that doesn't count before `commit`."""
        return False

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits until the checkpoint is on disk. Raises the error of its write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def commit(self) -> None:
        """Waits until the checkpoint counts."""
        self.wait()

    def discard(self) -> None:
        """Drops what isn't committed: training goes back to a checkpoint before it."""
        self.wait()


class ShardWriter(Writer):
    """For a process with sharded weights: each writes its shard, in a thread, and once all have, the first process
    writes the index that names them. Shards without an index don't count."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group
        self._pending: tuple[Path, int, str, object] | None = None  # folder, step, id and values of a checkpoint

    def save(
        self, folder: Path, step: int, tensors: Tensors, progress: Mapping[str, object], *, in_background: bool = True
    ) -> None:
        """A collective; commits the checkpoint before this one first."""
        self.commit()
        group, name = self._group, str(self._group.broadcast(secrets.token_hex(4)))
        self._pending = folder, step, name, json.loads(json.dumps(progress))
        pieces = {n: (dtensor.local_part(t), dtensor.local_rows(t)) for n, t in tensors.items()}
        # The first process also writes what all have alike, and tensors without rows.
        own = {n: t for n, (t, rows) in pieces.items() if group.is_first or (rows is not None and len(t))}
        places = {n: {"shape": list(tensors[n].shape), "first": rows.start} for n in own if (rows := pieces[n][1])}
        path = shard_path(folder, step, name, group.rank, group.size)

        def write(own: Tensors) -> None:
            with atomic_file(path) as stream:
                safetensors_io.write_tensors(stream, own, {safetensors_io.PLACES: json.dumps(places)})

        self._write(own, in_background, write)

    @property
    def uncommitted(self) -> bool:
        return self._pending is not None

    def commit(self) -> None:
        """A collective: waits for all shards; the first process writes their index. Raises the error of a write, and
        MachineError where the first process can't see a shard."""
        self.wait()
        if self._pending is None:
            return
        (folder, step, name, progress), self._pending = self._pending, None
        size = self._group.size
        shards = [shard_path(folder, step, name, rank, size) for rank in range(size)]
        sizes = self._group.gather(shards[self._group.rank].stat().st_size)
        if not self._group.is_first:
            return
        for rank, (shard, size_bytes) in enumerate(zip(shards, sizes, strict=True)):
            if file_size(shard) != size_bytes:
                raise MachineError(
                    f"Process {rank} has written {shard.name}, and the first process can't see it in {folder}.",
                    fix="Keep the run on storage that all hosts share.",
                )
        parts = [
            {"file": shard.name, "size_bytes": size_bytes} for shard, size_bytes in zip(shards, sizes, strict=True)
        ]
        path = folder / f"step-{step:08d}.json"
        write_json(path, {"progress": progress, "parts": parts})
        remove_old(folder, step, path)

    def discard(self) -> None:
        self.wait()
        self._pending = None


def _copy_to_cpu(tensors: Tensors) -> Tensors:
    """Copies, so that later steps don't show in them. Tied weights become separate: the format refuses shared
    memory."""
    return {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
