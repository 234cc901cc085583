"""convert: a pickle of weights becomes a safetensors file, in a process that can run no code of it."""

from __future__ import annotations

from pathlib import Path

from suanli.core.console import plural, size
from suanli.core.errors import UsageError
from suanli.core.types import AnyPath
from suanli.models.conversion import Converted, convert_pickle

SUFFIX = ".safetensors"
LISTED = 10


def convert(file: AnyPath, *, key: str | None = None, out: AnyPath | None = None) -> Converted:
    """Write the tensors in `file`, which torch.save wrote, to `out`, by default beside it.

    `key` names the dictionary that has them, where there are several ("a.b" is one in another). Raises UsageError for
    what can't be converted or asks for code, DamagedFile for a file that is cut short or claims more than it holds, and
    StorageError.
    """
    source = Path(file).expanduser()
    if source.suffix.lower() == SUFFIX:
        raise UsageError(f"{source} is safetensors already.", fix=f"Use it: --weights {source}")
    if source.is_dir():
        raise UsageError(f"{source} is a folder.", fix="Name one of its files.")
    target = Path(out).expanduser() if out is not None else source.with_suffix(SUFFIX)
    if target.suffix.lower() != SUFFIX:
        raise UsageError(f"{target} doesn't end in {SUFFIX}.", fix=f"Write to {target.with_suffix(SUFFIX)}.")
    if out is None and target.exists():
        raise UsageError(f"{target} exists.", fix=f"Remove it, or name another file: --out new{SUFFIX}")
    return convert_pickle(source, target, key=key)


def summary(converted: Converted) -> str:
    lines = [f"{converted.file}: {plural(converted.tensors, 'tensor')}, {size(converted.size_bytes)}"]
    if converted.key:
        others = f" (others: {', '.join(map(_shown, converted.others))}; --key chooses)" if converted.others else ""
        lines.append(f"Taken from: {_shown(converted.key)}{others}")
    if converted.left_out:
        lines.append(f"Left out: {_few([f'{_shown(name)} ({why})' for name, why in converted.left_out.items()])}")
    if converted.tied:
        tied = [" = ".join(map(_shown, names)) for names in converted.tied]
        lines.append(f"The same tensor, written under each name: {_few(tied)}")
    lines.append(f"Read with {', '.join(converted.guards)}")
    lines.append(f"{converted.source_checksum}  {converted.source}")
    lines.append(f"{converted.checksum}  {converted.file}")
    return "\n".join([*lines, f"Next: suanli run DATA --weights {converted.file}"])


def _few(texts: list[str]) -> str:
    return ", ".join(texts[:LISTED]) + (f", … ({len(texts)} in all)" if len(texts) > LISTED else "")


def _shown(name: str) -> str:
    """A name in an unknown file, without what would move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in name)
