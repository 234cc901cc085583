"""What a person should know of the boxes of a data set before training on them: problems, sizes and shapes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from suanli.core.checked_targets import CheckedTarget, TargetReport
from suanli.core.console import plural
from suanli.core.sections import Format, Line, Plot, Section, Table
from suanli.core.types import Json
from suanli.tasks._clean_boxes import CROWD, clean

VISIBLE = 8  # px: smaller objects than this, as the network sees them, are hardly found
STRIDE = 32  # of which the sides of inputs are usual multiples
ROUNDED = 0.01  # px that a box of a file may be smaller than it was drawn
SMALLEST = 0.01  # of the objects may be smaller than the size that is recommended shows
DRAWN = 30  # bars of a histogram
PROBLEMS = {  # of boxes, the worst first: what is said of one, and of several
    "no area": ("box without an area, left out", "boxes without an area, left out"),
    "outside": ("box outside of its image, left out", "boxes outside of their images, left out"),
    "repeated": ("box that is there twice, left out once", "boxes that are there twice, left out once"),
    "clipped": ("box reaches out of its image, clipped", "boxes reach out of their images, clipped"),
    "exchanged": ("box with its corners exchanged, corrected", "boxes with their corners exchanged, corrected"),
}
SIZES = {  # of images
    "turned": "whose boxes are of the pixels before the EXIF rotation: turned with the image",
    "scaled": "of another size than their labels state: boxes scaled to it",
    "unlike": "of another shape than their labels state: boxes taken as they are, look at some of them",
    "unsure": "rotated by EXIF, and their labels don't say whether boxes are of the pixels before: taken as of the "
    "image as it is shown",
}


def check_boxes(examples: Mapping[str, Sequence[CheckedTarget]]) -> TargetReport:
    """The remarks and the figures for `data_sections`, of the targets in each split."""
    problems: dict[str, dict[str, int]] = defaultdict(dict)  # by kind, the count of each image
    sides: list[np.ndarray] = []  # (n, 2) width and height in pixels of the image, and
    shown: list[np.ndarray] = []  # as the network sees them
    names: list[str] = []
    counts: list[int] = []
    crowds, longest = 0, 0.0
    for name, target, geometry in (one for split in examples.values() for one in split):
        boxes = clean(target, geometry)
        for kind, count in boxes.problems.items():
            problems[kind][name] = count
        crowds += int((boxes.flags == CROWD).sum())
        size = boxes.corners[:, 2:] - boxes.corners[:, :2]
        sides.append(size)
        shown.append(size * geometry.scale[::-1])
        names += [name] * len(size)
        counts.append(len(size))
        longest = max(longest, *(side * scale for side, scale in zip(geometry.size, geometry.scale, strict=True)))
    remarks = list(_describe_problems(problems))
    if crowds:
        remarks.append(f"{plural(crowds, 'crowd')} of objects: neither learned nor counted")
    if not names:
        return TargetReport(remarks=tuple(remarks))
    size, seen = np.concatenate(sides), np.concatenate(shown)
    remarks += _describe_smallest(seen.min(1), names, longest)
    return TargetReport(remarks=tuple(remarks), figures=_figures(size, seen, np.array(counts)))


def _describe_problems(problems: Mapping[str, Mapping[str, int]]) -> Iterable[str]:
    for kind, words in PROBLEMS.items():
        if by_image := problems.get(kind):
            yield f"{plural(sum(by_image.values()), *words)}: {_list(by_image)}"
    for kind, what in SIZES.items():
        if by_image := problems.get(kind):
            yield f"{plural(len(by_image), 'image')} {what}: {_list(by_image)}"


def _describe_smallest(smallest: np.ndarray, names: Sequence[str], longest: float) -> Iterable[str]:
    """Of the shorter side (n,) of each object as the network sees it."""
    worst = int(smallest.argmin())
    least = VISIBLE - ROUNDED
    if (side := float(smallest[worst])) >= least:
        return
    hidden = float((smallest < least).mean())
    needed = longest * VISIBLE / max(float(np.quantile(smallest, SMALLEST)), 1e-9)
    pixels = int(np.ceil(needed / STRIDE) * STRIDE)
    more = f"; at {pixels} px nearly all would have {VISIBLE} px" if hidden > SMALLEST and pixels > longest else ""
    yield (
        f"the smallest object has {side:.1f} px at the training size of {longest:.0f} px ({names[worst]}), and "
        f"{hidden:.1%} have less than {VISIBLE} px, which are hardly found{more}"
    )


def _figures(size: np.ndarray, seen: np.ndarray, counts: np.ndarray) -> dict[str, Json]:
    side, aspect = np.sqrt(seen.prod(1)), size[:, 0] / size[:, 1]
    quantiles = [0.0, 0.05, 0.5, 0.95, 1.0]
    return {
        "object_sides_px": _histogram(side),
        "aspect_ratios": _histogram(aspect),
        "objects_per_image": [[int(n), count] for n, count in sorted(Counter(counts.tolist()).items())],
        "quantiles": {
            "share": quantiles,
            "width_px": np.quantile(size[:, 0], quantiles).tolist(),
            "height_px": np.quantile(size[:, 1], quantiles).tolist(),
            "side_at_training_px": np.quantile(side, quantiles).tolist(),
            "aspect_ratio": np.quantile(aspect, quantiles).tolist(),
        },
    }


def _histogram(values: np.ndarray) -> list[list[float]]:
    """[middle, count] of bins that are equal on a logarithmic scale."""
    low, high = float(values.min()), float(values.max())
    edges = np.geomspace(low, max(high, low * 1.001), DRAWN + 1)
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    middles = np.sqrt(edges[1:] * edges[:-1])
    return [[float(x), int(n)] for x, n in zip(middles, counts, strict=True)]


def data_sections(figures: Mapping[str, Json]) -> list[Section]:
    """Of `check_boxes`; any figure may be missing."""
    sections: list[Section] = []
    for name, title, label, note in (
        ("object_sides_px", "Sizes of objects", "side at the training size, px", "Objects by the root of their area."),
        ("aspect_ratios", "", "width / height", "Objects by their shape."),
    ):
        if points := figures.get(name):
            line = Line(label="objects", points=tuple((float(x), float(n)) for x, n in points))
            sections.append(Plot(title=title, x_label=label, lines=(line,), y_range=(0.0, None), note=note))
    if quantiles := figures.get("quantiles"):
        sections.append(_quantile_table(quantiles))
    return sections


def _quantile_table(quantiles: Any) -> Table:
    titles = {
        "width_px": "width, px",
        "height_px": "height, px",
        "side_at_training_px": "side at the training size, px",
        "aspect_ratio": "width / height",
    }
    shares = {0.0: "smallest", 0.5: "median", 1.0: "largest"}
    numbers: list[Format] = ["number"] * len(quantiles["share"])
    return Table(
        title="",
        columns=("of the objects", *(shares.get(share, f"{share:.0%} are below") for share in quantiles["share"])),
        formats=("text", *numbers),
        rows=tuple((title, *quantiles[name]) for name, title in titles.items() if name in quantiles),
    )


def _list(by_image: Mapping[str, int]) -> str:
    names = list(by_image)
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def describe_missing_classes(classes: Sequence[str], counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Classes of which a split has no object."""
    lines = []
    for split, what in (("train", "for training"), ("val", "for validation"), ("test", "in the test split")):
        missing = [name for name in classes if not counts[split].get(name)]
        if missing:
            more = ", …" if len(missing) > 10 else ""
            lines.append(f"classes without objects {what}: {', '.join(missing[:10])}{more}")
    return lines
