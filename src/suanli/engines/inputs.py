"""Whatever a user hands to `predict`, as the raw inputs that `Preprocess.encode` reads.

A path, the bytes of a file, an open file, a text, an array, a Pillow image, a mapping from names to arrays, a column or
a frame of pandas or polars, and any list or generator of these: what it is follows from its type. Nothing is read
before it is needed, so a generator may be endless.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.types import Preprocess, Raw

NamedInput: TypeAlias = "tuple[str, Callable[[], Raw]]"  # and what reads it; it raises OSError or BadInput
FRAMES = ("pandas", "polars")  # packages; none of them is imported here
LONGEST_PATH = 1000  # characters; a longer string is a text
TEXT_SHOWN = 60  # characters of a text that is its own name
_LIKE_PATH = re.compile(r"(~|\.{0,2}/|[A-Za-z]:\\)\S*|\S*/|\S*[\w)\]-]\.[a-z][a-z0-9]{1,5}")
KINDS = "Give paths, bytes, arrays (H, W, C) of uint8 or Pillow images; for texts, strings; for tensors dicts."


def list_inputs(
    inputs: Any, kind: Preprocess | type[Preprocess], *, strings_are_texts: bool = False
) -> Iterator[NamedInput]:
    """Each raw input in `inputs` with its name: its path, or its position ("#3").

    For a kind of data that takes strings, a string is the path of a file or folder if there is one, or a pattern that
    matches some; else it is the input itself, as always with `strings_are_texts` and in a column of a data frame.
    Raises DataError for a path that isn't there, and for a string that looks like one; UsageError for what can't be an
    input.
    """
    if _holds_several(inputs):
        for i, item in enumerate(_items(inputs, kind)):
            if _holds_several(item):
                raise UsageError(
                    f"Input {i} is a {type(item).__name__} itself.",
                    fix="Give a flat list. If it is one array: numpy.asarray(…).",
                )
            yield from _list_one(item, f"#{i}", kind, strings_are_texts or _is_column(inputs))
    else:
        yield from _list_one(inputs, "#0", kind, strings_are_texts)


def _list_one(item: Any, name: str, kind: Preprocess | type[Preprocess], texts: bool) -> Iterator[NamedInput]:
    if isinstance(item, str):
        return _list_string(str(item), name, kind, texts)
    if isinstance(item, os.PathLike):
        return _list_paths(os.fspath(item), kind)
    if isinstance(item, bytes | bytearray | memoryview):
        return iter([(name, partial(bytes, item))])
    if hasattr(item, "getexif"):  # a Pillow image
        return iter([(name, partial(_decode_pillow, item))])
    if isinstance(item, Mapping):
        return _list_batch(item, name, kind)
    if hasattr(item, "read"):
        return iter([(_name_of_file(item, name), item.read)])
    if hasattr(item, "__array__"):
        return _list_batch(_to_array(item), name, kind)
    raise UsageError(f"An input can't be {type(item).__name__}.", fix=KINDS)


def _holds_several(inputs: Any) -> bool:
    """Whether its items are inputs, each by itself."""
    if _is_frame(inputs) or _is_column(inputs):
        return True
    if isinstance(inputs, str | bytes | bytearray | memoryview | Mapping | os.PathLike):
        return False
    if hasattr(inputs, "__array__") or hasattr(inputs, "getexif") or hasattr(inputs, "read"):
        return False
    return isinstance(inputs, Iterable)


def _items(inputs: Any, kind: Preprocess | type[Preprocess]) -> Iterable[Any]:
    return _choose_column(inputs, kind) if _is_frame(inputs) else inputs


# --- data frames ----------------------------------------------------------------------------


def _of_frames(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in FRAMES


def _is_frame(value: Any) -> bool:
    return _of_frames(value) and hasattr(value, "columns")


def _is_column(value: Any) -> bool:
    """One of pandas or polars, or an array of strings or objects."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "OUST"
    return _of_frames(value) and not hasattr(value, "columns")


def _choose_column(frame: Any, kind: Preprocess | type[Preprocess]) -> Iterable[Any]:
    """The column with the inputs: the only one, or one with a usual name. Where a kind has named inputs, all columns
    together are a batch."""
    names = list(frame.columns)
    if not kind.column_names:
        return [{str(name): np.asarray(frame[name]) for name in names}]
    usual = [name for name in names if str(name).casefold() in kind.column_names]
    chosen = names if len(names) == 1 else usual[:1]
    if not chosen:
        listed = ", ".join(map(repr, names[:20])) or "none"
        raise UsageError(
            f"None of the columns of the data frame is known to hold inputs of the kind {kind.kind}: {listed}.",
            fix="Give one column, such as frame['name'].",
        )
    column: Iterable[Any] = frame[chosen[0]]
    return column


# --- arrays, images and files ---------------------------------------------------------------


def _to_array(value: Any) -> np.ndarray:
    """Of an array, or of a tensor of another library."""
    try:
        return np.asarray(value)
    except (TypeError, RuntimeError) as error:  # a tensor on a GPU, or one with a gradient
        raise UsageError(
            f"A {type(value).__name__} can't be read as an array ({error}).", fix="Give a NumPy array."
        ) from error


def _list_batch(item: Raw, name: str, kind: Preprocess | type[Preprocess]) -> Iterator[NamedInput]:
    several: Sequence[Raw] | None = None if isinstance(kind, type) else kind.split_batch(item)
    if several is None:
        yield name, partial(_give, item)
        return
    for i, one in enumerate(several):
        yield f"#{i}" if name == "#0" else f"{name}[{i}]", partial(_give, one)


def _give(raw: Raw) -> Raw:
    return raw


def _decode_pillow(image: Any) -> Raw:
    from suanli.data.decode import decode_pillow

    return decode_pillow(image)


def _name_of_file(file: Any, name: str) -> str:
    own = getattr(file, "name", None)
    return own if isinstance(own, str) else name


# --- strings and paths ----------------------------------------------------------------------


def _list_string(item: str, name: str, kind: Preprocess | type[Preprocess], texts: bool) -> Iterator[NamedInput]:
    if not kind.takes_strings:
        return _list_paths(item, kind)
    if not texts:
        if item == "-" or _exists(item) or _match(item):
            return _list_paths(item, kind)
        if _LIKE_PATH.fullmatch(item):
            raise DataError(
                f"There is nothing at {item}, and a text that looks like a path is ambiguous.",
                fix="Check the path. If it is a text, pipe it in (-), or in Python use suanli.load(run).predict(text).",
            )
        short = " ".join(item.split())
        name = short if len(short) <= TEXT_SHOWN else f"{short[:TEXT_SHOWN]}…"
    return iter([(name, partial(_give, item))])


def _list_paths(item: str, kind: Preprocess | type[Preprocess]) -> Iterator[NamedInput]:
    if item == "-" and (sys.stdin is None or sys.stdin.closed):  # by `<&-`, or a service manager
        raise DataError("Standard input is closed.", fix="Pipe the inputs in, or name files.")
    paths = [Path(item).expanduser()] if item == "-" or _exists(item) else _match(item)
    if not paths:
        shown = item if len(item) <= 200 else f"{item[:200]}…"
        own = "" if kind.takes_strings else f"A model that reads the kind {kind.kind} takes a string as a path. "
        raise DataError(
            f"There is nothing at {shown}.",
            fix=f"{own}Give files, folders, a quoted pattern, or - (standard input); in Python also bytes or an array.",
        )
    for path in paths:
        for name, read in kind.find_inputs(path):
            yield from [(name, read)] if isinstance(kind, type) else kind.split_file(name, read)


def _exists(item: str) -> bool:
    try:
        return len(item) <= LONGEST_PATH and bool(item.strip()) and Path(item).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name that is too long, a NUL, ~ of an unknown user
        return False


def _match(item: str) -> list[Path]:
    """The files that a pattern matches."""
    if len(item) > LONGEST_PATH or "\0" in item or not any(sign in item for sign in "*?["):
        return []
    return [Path(found) for found in sorted(glob.glob(os.path.expanduser(item), recursive=True))]


def read(named: NamedInput) -> Raw | BadInput:
    """The content of an input, or why it can't be read."""
    try:
        return named[1]()
    except BadInput as error:
        return error
    except OSError as error:
        return BadInput(error.strerror or str(error))
