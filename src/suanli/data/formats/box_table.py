"""A table (CSV or TSV) with a row for each box: the image, the four sides (or a corner and the size), the class.

Columns are found by their usual names. A row with empty sides says that its image has no box. Sides that are all
between 0 and 1 are shares of the image's sides.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from suanli.core.boxes import Box, Boxes
from suanli.core.errors import unknown
from suanli.data.annotated import Annotations, Files, Format, find_file_splits
from suanli.data.column_names import LABEL_NAMES, PATH_NAMES
from suanli.data.formats._boxes import parse_label, parse_number, parse_numbers
from suanli.data.members import count_and_examples, order_classes, suffix_of
from suanli.data.split_names import parse_splits
from suanli.data.suffixes import IMAGE_SUFFIXES
from suanli.data.tables import Cells, Table, parse_table

# In the form of `_plain`: lower case, letters and digits only.
IMAGE_NAMES = (
    *(name.replace("_", "") for name in PATH_NAMES),
    *("imageid", "imagename", "imgid", "imgname", "img", "imagefile", "imagefilename"),
)
CLASS_NAMES = (
    *(name.replace("_", "") for name in LABEL_NAMES),
    *("categoryname", "objectclass", "objectname", "classlabel", "classid", "categoryid", "name"),
)
SIDES = (
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
    ("x0", "y0", "x1", "y1"),
    ("left", "top", "right", "bottom"),
    ("xtl", "ytl", "xbr", "ybr"),
)
CORNERS = (("x", "y"), ("xmin", "ymin"), ("left", "top"))
SIZES = (("w", "h"), ("width", "height"))
PREFIXES = ("", "bbox", "box")
IMAGE_SIZES = (("imageheight", "imagewidth"), ("imgheight", "imgwidth"), ("height", "width"))
CROWDS, DIFFICULTS = ("isgroupof", "iscrowd", "crowd"), ("difficult", "isdifficult", "ignore")
SPLIT_NAMES = ("split", "subset", "set", "partition")
ONLY_CLASS = "object"  # where a table has no classes
_SAMPLED = 200  # rows that show what a column holds
MOST_CLASSES = 20  # different words in a column, up to which they are always classes
MAX_SHARE = 1.5  # of a side


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """The positions of a table's columns."""

    image: int
    sides: tuple[int, ...]  # four, or one with a list of x, y, width and height
    has_size: bool  # the last two sides are width and height
    label: int | None
    size: tuple[int, int] | None = None  # height and width of the image
    crowd: int | None = None
    difficult: int | None = None
    split: int | None = None


def find(files: Files) -> list[str]:
    return [path for path in files.with_suffix("csv", "tsv") if _has_boxes(files.read(path))]


def _has_boxes(content: bytes) -> bool:
    lines = content[: 1 << 16].decode("utf-8-sig", errors="replace").splitlines()[:1]
    cells = [cell.strip().strip('"') for cell in re.split("[,;\t]", lines[0])] if lines else []
    return _find_layout(cells) is not None or _is_headless(cells)


def _is_headless(cells: Sequence[str]) -> bool:
    """Whether a first line is already a row: path, x1, y1, x2, y2, class."""
    numbers = [cell for cell in cells[1:5] if re.fullmatch(r"\d+(\.\d+)?", cell)]
    return len(cells) == 6 and suffix_of(cells[0]) in IMAGE_SUFFIXES and len(numbers) == 4


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


def _find_layout(columns: Sequence[str]) -> _Layout | None:
    """None: it isn't a table of boxes."""
    names = [_plain(name) for name in columns]

    def first(*wanted: str) -> int | None:
        return next((names.index(name) for name in wanted if name in names), None)

    def every(*wanted: str) -> tuple[int, ...] | None:
        return tuple(map(names.index, wanted)) if all(name in names for name in wanted) else None

    image = first(*IMAGE_NAMES)
    found = [places for prefix in PREFIXES for four in SIDES if (places := every(*(prefix + name for name in four)))]
    has_size = not found
    if has_size:
        found = [
            places
            for prefix in PREFIXES
            for corner in CORNERS
            for size in SIZES
            if (places := every(*(prefix + name for name in (*corner, *size))))
        ]
    if not found and (column := first("bbox", "boundingbox")) is not None:
        found = [(column,)]
    if image is None or not found:
        return None
    sides = found[0]
    sizes = (every(*pair) for pair in IMAGE_SIZES)
    size = next((pair for pair in sizes if pair is not None and not set(pair) & set(sides)), None)
    label = next((i for name in CLASS_NAMES if (i := first(name)) not in (None, image, *sides)), None)
    return _Layout(
        image=image,
        sides=sides,
        has_size=has_size,
        label=label,
        size=None if size is None else (size[0], size[1]),
        crowd=first(*CROWDS),
        difficult=first(*DIFFICULTS),
        split=first(*SPLIT_NAMES),
    )


def read(files: Files, paths: Sequence[str]) -> Annotations:
    file_splits = find_file_splits(paths)
    rows = _Rows(files=files)
    for path in paths:
        content = files.read(path)
        line = content.partition(b"\n")[0].decode("utf-8-sig", errors="replace")
        headless = _is_headless([cell.strip() for cell in line.split(",")])
        if headless:
            content = b"path,x1,y1,x2,y2,class\n" + content.removeprefix(b"\xef\xbb\xbf")
        rows.add(path, parse_table(Path(path), content), file_splits.get(path), added_lines=int(headless))
    return rows.finish()


@dataclass(kw_only=True)
class _Rows:
    """What was read so far."""

    files: Files
    boxes: dict[str, list[Box]] = field(default_factory=lambda: defaultdict(list))
    sizes: dict[str, tuple[float, float]] = field(default_factory=dict)
    splits: dict[str, str] = field(default_factory=dict)
    missing: dict[str, None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, table: Table, split: str | None, *, added_lines: int) -> None:
        layout = _find_layout(table.columns)
        if layout is None:
            raise self.files.error(path, "has no columns of boxes")
        layout = self._use_named(table, layout)
        if layout.label is None and (label := _find_words(table, layout)) is not None:
            self.notes.append(f"the column {table.columns[label]} of {path} read as the class")
            layout = replace(layout, label=label)
        if layout.label is None:
            self.notes.append(f"{path} has no column of classes: all boxes are of one, {ONLY_CLASS!r}")
        if len(layout.sides) == 1:
            self.notes.append(f"the column {table.columns[layout.sides[0]]} of {path} read as x, y, width and height")
        if table.bad:
            self.notes.append(f"{len(table.bad)} lines of {path} with missing or surplus cells, skipped")
        meant = {} if layout.split is None else parse_splits({cells[layout.split].strip() for _, cells in table.rows})
        found: dict[str, str | None] = {}
        for line, cells in table.rows:
            try:
                box = _parse_box(cells, layout)
                size = _parse_size(cells, layout)
            except ValueError as error:
                raise self.files.error(path, str(error), line=line - added_lines) from error
            name = cells[layout.image].strip()
            if name not in found:
                found[name] = self.files.find_image(name, beside=path, split=split) if name else None
            image = found[name]
            if image is None:
                self.missing[name or "(no name)"] = None
                continue
            self.boxes[image] += [] if box is None else [box]
            if size is not None:
                self.sizes[image] = size
            own = split or meant.get(cells[layout.split].strip() if layout.split is not None else "")
            if own is not None:
                self.splits[image] = own

    def _use_named(self, table: Table, layout: _Layout) -> _Layout:
        """With the columns that the user named. Raises UsageError for one that isn't there."""
        places = {"input": layout.image, "label": layout.label}
        for what, name in (("input", self.files.columns.input), ("label", self.files.columns.label)):
            if name is not None and name not in table.columns:
                raise unknown(f"{what} column of {table.path.name}", name, table.columns)
            if name is not None:
                places[what] = table.columns.index(name)
        return replace(layout, image=places["input"] or 0, label=places["label"])

    def finish(self) -> Annotations:
        everything = [side for boxes in self.boxes.values() for box in boxes for side in box[:4]]
        relative = bool(everything) and max(map(abs, everything)) <= MAX_SHARE and any(s % 1 for s in everything)
        if background := [image for image, boxes in self.boxes.items() if not boxes]:
            what = "without a box in its row, kept as background"
            self.notes.append(count_and_examples(background, f"images {what}", f"image {what}"))
        return Annotations(
            annotation="boxes",
            targets={
                image: Boxes(tuple(boxes), None if relative else self.sizes.get(image), relative)
                for image, boxes in self.boxes.items()
            },
            classes=order_classes(box.label for boxes in self.boxes.values() for box in boxes),
            unlabelled=Boxes(),
            splits=self.splits,
            missing=list(self.missing),
            notes=self.notes,
        )


def _find_words(table: Table, layout: _Layout) -> int | None:
    """The only other column of a few different words, which must be the class. None: there is none, or several."""
    sample = [cells for _, cells in table.rows[:_SAMPLED]]
    used = {layout.image, *layout.sides, *(layout.size or ()), layout.crowd, layout.difficult, layout.split}

    def is_words(position: int) -> bool:
        values = [cells[position].strip() for cells in sample]
        few = len(set(values)) <= max(MOST_CLASSES, len(values) // 2)
        return few and all(values) and not any(re.fullmatch(r"[-+\d.,e]+", value) for value in values)

    found = [i for i in range(len(table.columns)) if i not in used and is_words(i)]
    return found[0] if len(found) == 1 else None


def _parse_box(cells: Cells, layout: _Layout) -> Box | None:
    """None: the row has no box. Raises ValueError."""
    values: Sequence[object] = [cells[i].strip() for i in layout.sides]
    if not any(values):
        return None
    if len(values) == 1:
        try:
            values = json.loads(str(values[0]))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"has {str(values[0])[:60]!r} where a list of 4 numbers belongs") from error
    left, top, right, bottom = parse_numbers(values, 4)
    if layout.has_size or len(layout.sides) == 1:
        right, bottom = left + right, top + bottom
    label = ONLY_CLASS if layout.label is None else parse_label(cells[layout.label])
    crowd, difficult = (_is_set(cells, place) for place in (layout.crowd, layout.difficult))
    return Box(left, top, right, bottom, label, crowd, difficult)


def _parse_size(cells: Cells, layout: _Layout) -> tuple[float, float] | None:
    if layout.size is None or not all(cells[i].strip() for i in layout.size):
        return None
    height, width = (parse_number(cells[i].strip()) for i in layout.size)
    return (height, width) if min(height, width) > 0 else None


def _is_set(cells: Cells, place: int | None) -> bool:
    return place is not None and cells[place].strip().casefold() in ("1", "1.0", "true", "yes")


FORMAT = Format(name="box_table", title="CSV", annotation="boxes", find=find, read=read, order=70)
