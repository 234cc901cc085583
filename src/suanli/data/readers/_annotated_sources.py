"""Images that are labelled by files of annotations (`data/formats/`), as a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from suanli.core.console import plural
from suanli.core.errors import DataError
from suanli.core.registry import load_all
from suanli.core.types import Example, Source
from suanli.data.annotated import Annotations, Files, Format, describe_missing, find_folder_splits
from suanli.data.members import Member, count_and_examples, source_name

START_BYTES = 1 << 16  # of a table, that show its columns


def read_annotations(files: Files, wanted: str | None) -> Annotations | None:
    """What the first format says whose files are there; `wanted` is the only annotation that is looked for. None:
    there are none."""
    formats: list[Format] = sorted(load_all("formats").values(), key=lambda f: f.order)
    suitable = [one for one in formats if wanted in (None, one.annotation)]
    found = [(one, paths) for one in suitable if (paths := one.find(files))]
    if not found:
        return None
    (first, paths), *others = found
    annotations = first.read(files, paths)
    notes = [f"labels read from {plural(len(paths), f'{first.title} file')}"]
    notes += [
        f"{one.title} labels not read: {first.title} was found, too ({more[0]}); to read them, give that file itself"
        for one, more in others
        if not set(more) <= set(paths)
    ]
    return replace(annotations, notes=(*notes, *annotations.notes))


def make_annotated_source(
    files: Files, annotations: Annotations, *, name: str, fingerprint: str, notes: Sequence[str]
) -> Source:
    """Raises DataError where none of the labelled images is there, or nothing is labelled."""
    targets = dict(annotations.targets)
    if not targets:
        missing = f": {', '.join(annotations.missing[:3])}" if annotations.missing else ""
        raise DataError(
            f"{files.where} has labels, but none of their images{missing}.",
            fix="Put the images beside the labels, or correct the paths.",
        )
    rest = [path for path in files.images if path not in targets]
    remarks = [*annotations.notes, *describe_missing(annotations.missing)]
    if rest and annotations.unlabelled is not None:
        targets |= dict.fromkeys(rest, annotations.unlabelled)
        what = "without labels, kept as background (move them away if they aren't labelled yet)"
        remarks.append(count_and_examples(rest, f"images {what}", f"image {what}"))
    elif rest:
        what = "that no annotation names, left out"
        remarks.append(count_and_examples(rest, f"images {what}", f"image {what}"))
    if files.masks:
        remarks.append(count_and_examples(sorted(files.masks), "images in folders of masks, left out"))
    if not annotations.classes:
        raise DataError(f"{files.where} has no boxes at all.", fix="Label some objects first.")
    splits = annotations.splits or find_folder_splits(targets)
    rows = [
        Example(name=path, target=targets[path], split=splits.get(path), read=files.images[path].read)
        for path in sorted(targets)
    ]
    return Source(
        name=source_name(name),
        kind="image",
        examples=rows,
        annotation=annotations.annotation,
        classes=annotations.classes,
        fingerprint=fingerprint,
        size_bytes=sum(files.images[row.name].size_bytes for row in rows),
        notes=(*notes, *remarks),
    )


def is_annotations(path: Path) -> bool:
    """Whether a file alone shows, by its start, that it has annotations of images in one of the formats."""
    member = Member(path.name, min(path.stat().st_size, START_BYTES), partial(_read_start, path))
    files = Files([], [member], f"The folder {path.parent}", named=path.name)
    return any(one.find(files) for one in load_all("formats").values())


def _read_start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(START_BYTES)


def unknown_format_error(what: str) -> DataError:
    """`what` has files of annotations."""
    titles = ", ".join(sorted(one.title for one in load_all("formats").values()))
    return DataError(
        f"{what} in no format of annotations that suanli knows.",
        fix=f"Known are {titles}, beside their images or above them.",
    )
