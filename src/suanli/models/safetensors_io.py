"""safetensors files, written and read tensor by tensor, so that memory for one tensor is enough.

The format is eight bytes with the length of a JSON header (the dtype, shape and offsets of each name), the header, and
the tensors' bytes. Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from suanli.core.errors import DamagedFile

PLACES = "places"  # metadata key: which rows of a tensor that is divided over several files this file has
DTYPES = {  # in the order in which their tensors are written
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names in the order of `write_tensors`: the widest numbers first, so that all are aligned to their width."""
    dtypes = list(DTYPES)
    return sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))


def write_tensors(
    stream: IO[bytes],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    of: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> None:
    """Write the tensors one after the other. `of(tensor)` returns its values, of the same shape and dtype, when it is
    written. Raises ValueError for a dtype that the format doesn't have."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names, end = file_order(tensors), 0
    for name in names:
        tensor = tensors[name]
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        values = of(tensors[name]).detach().to("cpu").contiguous()
        if values.numel():
            stream.write(values.reshape(-1).view(torch.uint8).numpy().data)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a file, by name; no tensor is read. Raises DamagedFile for anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedFile(
            f"{path} is not a complete safetensors file ({error}).", fix="Download or convert it again."
        ) from error


def gather_only(tensors: Mapping[str, torch.Tensor], of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Call the collective `of` for each tensor, in a process that doesn't write."""
    for name in file_order(tensors):
        of(tensors[name])


@dataclass(frozen=True, kw_only=True)
class _FileRows:
    """Rows of one tensor in one file."""

    file: Path
    first: int  # index of the first one in the whole tensor
    count: int


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors in files, by name, read at each access. The rows of a tensor may be divided over several files."""

    def __init__(self, files: list[Path]) -> None:
        """Raises DamagedFile for files that are missing or truncated, and where no file has some rows of a tensor."""
        self.metadata: list[dict[str, str]] = []  # of each file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._pieces: dict[str, list[_FileRows]] = {}
        for path in files:
            with _open(path) as file:
                metadata = file.metadata() or {}
                self.metadata.append(metadata)
                places = json.loads(metadata.get(PLACES, "{}"))
                for name in file.keys():  # noqa: SIM118  # not a dict
                    shape = tuple(file.get_slice(name).get_shape())
                    place = places.get(name)
                    first = place["first"] if place else 0
                    self._shapes[name] = tuple(place["shape"]) if place else shape
                    piece = _FileRows(file=path, first=first, count=shape[0] if shape else 1)
                    self._pieces.setdefault(name, []).append(piece)
        for name, pieces in self._pieces.items():
            pieces.sort(key=lambda p: p.first)
            ends = [0, *(p.first + p.count for p in pieces)]
            shape = self._shapes[name]
            if [p.first for p in pieces] != ends[:-1] or ends[-1] != (shape[0] if shape else 1):
                raise _damage(pieces[0].file, f"rows of {name} are missing")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, None)

    def rows(self, name: str, selection: slice | None) -> torch.Tensor:
        """These rows of a tensor; None: all of it. Raises DamagedFile."""
        pieces = self._pieces[name]
        if selection is None and len(pieces) == 1:
            with _open(pieces[0].file) as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        begin, end = (0, self._shapes[name][0]) if selection is None else (selection.start, selection.stop)
        parts = []
        for piece in pieces:
            first, last = max(begin, piece.first), min(end, piece.first + piece.count)
            if first < last or piece is pieces[0]:  # the first piece has the dtype, even where no rows are selected
                with _open(piece.file) as file:
                    stored = file.get_slice(name)
                    start = first - piece.first if first < last else 0
                    parts.append(stored[start : start + max(0, last - first)])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file; any error in it is raised as DamagedFile."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damage(path, str(error)) from error


def _damage(path: Path, why: str) -> DamagedFile:
    return DamagedFile(
        f"{path} is damaged ({why}).", fix="Remove it to resume from the checkpoint before, or train again."
    )
