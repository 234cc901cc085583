"""Labels images by the folders that hold them: `train/cat/001.jpg`.

The folder and the archive reader both list files and then use this, so that splits, classes, images and ignored files
don't depend on how the files are packed. Only names are used here; no file is opened.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from suanli.core.errors import DataError
from suanli.core.types import Columns, Example, Source
from suanli.data.annotated import Annotations, Files
from suanli.data.file_names import make_readable, normalise_name, write_out_bytes
from suanli.data.members import (
    TABLE_SUFFIXES,
    Listing,
    Member,
    count_and_examples,
    fingerprint_of,
    order_classes,
    source_name,
    suffix_of,
)
from suanli.data.readers._annotated_sources import make_annotated_source, read_annotations, unknown_format_error
from suanli.data.readers._annotations import (
    find_annotation,
    find_mask_folder,
    find_masks,
    masks_error,
)
from suanli.data.readers._split_folders import LAYOUT, Folder, find_splits, has_classes, unwrap
from suanli.data.suffixes import IMAGE_SUFFIXES, is_ignored


def make_source(
    listing: Listing, *, name: str, where: str, columns: Columns | None = None, named: str | None = None
) -> Source:
    """The labelled images of a folder or archive; where the user gave one file of annotations of its folder, `named`.

    They are labelled by class folders, which may be empty, or else by files of annotations (`data/formats/`); the
    annotation in `columns`, that of the task which the user chose, says that these come first. Errors begin with
    `where`. Raises DataError where there are no images, no labels, or fewer than two class folders.
    """
    members, folders = listing.members, listing.folders
    readable, name_notes = make_readable([*folders, *(member.path for member in members)])
    if name_notes:
        folders = [readable(folder) for folder in folders]
        members = [member._replace(path=readable(member.path)) for member in members]
    tree, form_notes = _build_tree(members, folders)
    root = unwrap(tree)
    general = [*name_notes, *form_notes, *map(write_out_bytes, listing.notes)]
    fingerprint = fingerprint_of(sorted(listing.stamps))
    others = sorted(m.path for m in root.all_others())
    found = _read_annotations(root, where, columns or Columns(), named) if others else None
    if found is not None:
        return make_annotated_source(*found, name=name, fingerprint=fingerprint, notes=general)
    annotation = find_annotation([m.path for m in root.all_images()], others) if others else None
    if annotation is not None and not has_classes(root):
        raise unknown_format_error(f"{where} has {annotation}")
    by_split, split_notes = find_splits(root, where)
    classes = order_classes(label for folder in by_split.values() for label in folder.folders)
    rows = [
        Example(name=member.path, target=label, split=split, read=member.read)
        for split, folder in by_split.items()
        for label in sorted(folder.folders)
        for member in sorted(folder.folders[label].all_images(), key=lambda m: m.path)
    ]
    if not rows:
        raise _no_images_error(root, where)
    if len(classes) < 2:
        raise DataError(
            f"{where} has only one class, {classes[0]!r}; at least two are needed.",
            fix=f"Expected are {LAYOUT}.",
        )
    if (masks := find_mask_folder(_group_names(rows))) is not None:
        raise masks_error(where, masks)
    rest = _describe_rest(root, {row.name for row in rows}, others)
    if annotation is not None:
        rest.append(f"{annotation}, skipped: only the class folders are learned")
    sizes = {m.path: m.size_bytes for m in root.all_images()}
    return Source(
        name=source_name(name),
        kind="image",
        examples=rows,
        classes=classes,
        fingerprint=fingerprint,
        size_bytes=sum(sizes[row.name] for row in rows),
        notes=(*split_notes, *general, *rest),
    )


def _read_annotations(
    root: Folder[Member], where: str, columns: Columns, named: str | None
) -> tuple[Files, Annotations] | None:
    """What files of annotations say, where the user chose them, or there are no class folders. None: there are none, or
    the folders are the classes."""
    by_folder = {folder: [m.path for m in inner.all_images()] for folder, inner in root.filled().items()}
    is_chosen = columns.annotation is not None or named is not None
    if not is_chosen and has_classes(root) and find_mask_folder(by_folder) is None:
        return None
    files = Files(root.all_images(), root.all_others(), where, named=named, columns=columns)
    if (annotations := read_annotations(files, columns.annotation)) is not None:
        return files, annotations
    if named is not None:
        raise unknown_format_error(f"{named} in {where[:1].lower()}{where[1:]} is")
    return None


def _describe_rest(root: Folder[Member], used: set[str], others: Sequence[str]) -> list[str]:
    """Notes on the files that aren't examples, and on examples that may not be meant as such."""
    notes = []
    if strays := sorted(m.path for m in root.all_images() if m.path not in used):
        notes.append(
            count_and_examples(
                strays, "images outside a class folder, skipped", "image outside a class folder, skipped"
            )
        )
    if others:
        notes.append(count_and_examples(others, "other files, skipped", "other file, skipped"))
    if masks := sorted(find_masks(used)):
        notes.append(count_and_examples(masks, "images whose names look like masks of others"))
    return notes


def _build_tree(members: Iterable[Member], folders: Iterable[str]) -> tuple[Folder[Member], list[str]]:
    """The tree without ignored files, and notes."""
    root: Folder[Member] = Folder()
    by_path: dict[str, Folder[Member] | None] = {}  # None: ignored

    def folder_at(path: str) -> Folder[Member] | None:
        if path not in by_path:
            parts = PurePosixPath(path).parts
            by_path[path] = None if any(map(is_ignored, parts)) else root.at(parts)
        return by_path[path]

    for path in folders:
        folder_at(path)
    for member in members:
        parent, _, file_name = member.path.rpartition("/")
        folder = folder_at(parent)
        if folder is None or is_ignored(file_name):
            continue
        same_kind = folder.images if suffix_of(file_name) in IMAGE_SUFFIXES else folder.others
        same_kind.append(member)
    forms = Counter(normalise_name(path) for path, found in by_path.items() if found is not None)
    merged = sorted(path for path, count in forms.items() if count > 1)
    note = "folders whose names differ only in their form of Unicode, read as one"
    return root, [count_and_examples(merged, note)] if merged else []


def _group_names(rows: Iterable[Example]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names[row.target].append(row.name)
    return names


def _no_images_error(root: Folder[Member], where: str) -> DataError:
    if root.images:
        return DataError(
            f"{where} has {len(root.images)} images but no class folders.",
            fix=f"Expected are {LAYOUT}; or give a table with the columns path and label.",
        )
    others = sorted(m.path for m in root.all_others())
    tables = [path for path in others if suffix_of(path) in TABLE_SUFFIXES]
    if tables:
        return DataError(
            f"{where} has no images, but tables: {', '.join(tables[:3])}.",
            fix="Give the table file itself (unpacked), or a folder with train, val and test tables.",
        )
    content = f"has no images, only {count_and_examples(others, 'other files', 'other file')}" if others else "is empty"
    return DataError(
        f"{where} {content}.",
        fix=f"Expected are {LAYOUT}; images end in {', '.join(sorted(IMAGE_SUFFIXES))}.",
    )
