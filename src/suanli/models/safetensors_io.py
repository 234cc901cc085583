"""safetensors files, written and read tensor by tensor: neither needs memory for all of them at once.

The format is eight bytes with the length of a header in JSON (for each name its dtype, shape and place) and then the
tensors' bytes. Source: https://github.com/huggingface/safetensors, "Format".
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

PLACES = "places"  # key of the header: where the rows of a file belong in tensors that lie in several files
_NAMES = {  # in the order in which their tensors lie in a file
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
    """The names as `write` takes them: the widest numbers first, so that all lie at multiples of their width."""
    kinds = list(_NAMES)
    return sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))


def write_tensors(
    stream: IO[bytes],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    of: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> None:
    """`of` gives the values of a tensor, of the same shape and dtype, when it is its turn. Raises ValueError
    for a dtype that the format doesn't have."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    names, end = file_order(tensors), 0
    for name in names:
        tensor = tensors[name]
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [first, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        values = of(tensors[name]).detach().to("cpu").contiguous()
        if values.numel():
            stream.write(values.reshape(-1).view(torch.uint8).numpy().data)


def gather_only(tensors: Mapping[str, torch.Tensor], of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Takes part in `of` where another process writes."""
    for name in file_order(tensors):
        of(tensors[name])


@dataclass(frozen=True, kw_only=True)
class _Stretch:
    """Rows of one tensor in one file."""

    file: Path
    first: int  # their place in the whole tensor
    count: int


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of files, by name, read each time that one is asked for. The rows of one may lie in several files."""

    def __init__(self, files: list[Path]) -> None:
        """Raises DamagedFile for files that are missing or cut short, and where rows of a tensor are in none."""
        self.metadata: list[dict[str, str]] = []  # of each file
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._stretches: dict[str, list[_Stretch]] = {}
        for path in files:
            with _opened(path) as file:
                metadata = file.metadata() or {}
                self.metadata.append(metadata)
                places = json.loads(metadata.get(PLACES, "{}"))
                for name in file.keys():  # noqa: SIM118  # not a dict
                    shape = tuple(file.get_slice(name).get_shape())
                    place = places.get(name)
                    first = place["first"] if place else 0
                    self._shapes[name] = tuple(place["shape"]) if place else shape
                    stretch = _Stretch(file=path, first=first, count=shape[0] if shape else 1)
                    self._stretches.setdefault(name, []).append(stretch)
        for name, stretches in self._stretches.items():
            stretches.sort(key=lambda s: s.first)
            ends = [0, *(s.first + s.count for s in stretches)]
            shape = self._shapes[name]
            if [s.first for s in stretches] != ends[:-1] or ends[-1] != (shape[0] if shape else 1):
                raise _damaged(stretches[0].file, f"rows of {name} are missing")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(name, None)

    def rows(self, name: str, wanted: slice | None) -> torch.Tensor:
        """The rows `wanted` of a tensor; None: all of it. Raises DamagedFile."""
        stretches = self._stretches[name]
        if wanted is None and len(stretches) == 1:
            with _opened(stretches[0].file) as file:
                return file.get_tensor(name)  # type: ignore[no-any-return]
        begin, end = (0, self._shapes[name][0]) if wanted is None else (wanted.start, wanted.stop)
        found = []
        for stretch in stretches:
            first, last = max(begin, stretch.first), min(end, stretch.first + stretch.count)
            if first < last or stretch is stretches[0]:  # the first tells the dtype, even of no rows
                with _opened(stretch.file) as file:
                    part = file.get_slice(name)
                    start = first - stretch.first if first < last else 0
                    found.append(part[start : start + max(0, last - first)])
        return found[0] if len(found) == 1 else torch.cat(found)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what is wrong with it is a DamagedFile."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> DamagedFile:
    return DamagedFile(
        f"{path} is damaged ({why}).", fix="Remove it to go on from the checkpoint before, or train again."
    )
