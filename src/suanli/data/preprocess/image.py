"""Images: from file bytes or pixel arrays to normalised (C, H, W) model inputs.

`encode` decodes once and makes uint8 rows (H, W, C) of the working size; `to_model` turns a batch of rows into float32
on the device with one conversion and one multiply-add. Small images that all have one size (digits, CIFAR) keep it,
even if it isn't square; others become squares. Resizing is torch's antialiased bilinear one on uint8, which differs
from Pillow's by one level at most and was measured two to ten times as fast.

Not here: random changes (`training/augments`), colour management and video.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar, Self, get_args

import numpy as np
from PIL import Image

from suanli.core.answers import Answer
from suanli.core.errors import BadInput, DataError, UsageError, unknown
from suanli.core.schema import Arrays, Column, Geometry, Schema, Stored, Tensors
from suanli.core.types import EncodedInput, Json, Marked, Preprocess, Preview, Raw
from suanli.data.column_names import PATH_NAMES
from suanli.data.decode import decode, read_header
from suanli.data.drawing import draw_answer
from suanli.data.file_kinds import START_BYTES, describe_bytes, may_be_image
from suanli.data.perceptual_hash import SIMILAR_BITS, perceptual_hash
from suanli.data.preprocess._resizing import PAD_LEVEL, Resize, resize
from suanli.data.preprocess._tiles import MOST_OVERLAP, TILE_OVERLAP, cut_tiles, join_tiles
from suanli.data.suffixes import IMAGE_SUFFIXES, TEXT_SUFFIXES, is_ignored

if TYPE_CHECKING:
    import torch

NATIVE_SIDE = 64  # px: images that all have one size up to this keep it
DEFAULT_SIDE = 128  # px
MAX_SIDE = 4096  # px that a user may set
MARKED_SIDE = 256  # px
PREVIEW_SIDE, THUMBNAIL_SIDE, CLOSE_UP_SIDE = 128, 96, 400  # px
COPY_SHARE = 0.8  # of each side, of a copy that shows the middle of an image
SIDE_STEP = 32  # px, the stride of most networks: sides that suanli chooses for `max_side` are multiples of it
FITTING_SHARE = 0.95  # of the images, which fit into such a shape without being made smaller still
SAMPLED = 256  # images that decide size and channels
MEASURED_BYTES = 1 << 28  # of rows that decide mean and standard deviation, about
FEATURES_SIDE = 16  # px of the pictures that a linear baseline sees
FEATURES_ROWS = 64  # that are made smaller at a time
SUFFIXES = frozenset(f".{suffix}" for suffix in IMAGE_SUFFIXES)


@dataclass(frozen=True, kw_only=True)
class ImagePreprocess(Preprocess):
    """Rows are uint8 (height, width, channels); model inputs are float32 (channels, height, width).

    `resize` is "crop" (scale the short side and cut out the middle), "squash" (ignore the aspect ratio) or "pad" (keep
    the whole picture between grey bars). With `tiles`, inputs are windows: tiles of so many px of the image in its own
    size, which overlap by the share `tile_overlap`, and of larger images the whole, made smaller. `mean` and `std` are
    per channel, where white is 1; None, before `measure`, leaves inputs in 0 to 1.
    """

    kind: ClassVar[str] = "image"
    roles: ClassVar[tuple[str, ...]] = ("image",)
    similar_bits: ClassVar[int] = SIMILAR_BITS
    media_types: ClassVar[tuple[str, ...]] = ("image/", "application/x-www-form-urlencoded")  # curl's --data-binary
    trait_names: ClassVar[Mapping[str, str]] = {
        **{name: f"{name} image" for name in ("palette", "16-bit", "animated")},
        "grey": "grayscale image",
        "colour": "color image",
        "alpha": "transparent image",
        "cmyk": "CMYK image",
        "exif-rotated": "EXIF-rotated image",
    }
    column_names: ClassVar[tuple[str, ...]] = PATH_NAMES
    features_name: ClassVar[str] = "the pixels of small copies"
    sizeless_settings: ClassVar[tuple[str, ...]] = ("channels", "mean", "std")

    height: int
    width: int
    channels: int = 3
    resize: Resize = "crop"
    tiles: int = 0  # px of the image's own size; 0: the whole image is the input
    tile_overlap: float = TILE_OVERLAP
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # JSON has lists; equal objects need equal types
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(float(v) for v in value))

    @classmethod
    def fit(cls, raws: Callable[[], Iterable[Raw]], settings: Mapping[str, Json]) -> Self:
        """Settings: size (px, or [height, width]), or max_side (px: images keep their shape, as most of them have it,
        and their longer side is at most so long), or tiles (px; max_side gives way to it) with tile_overlap; resize,
        channels (1 or 3), mean and std (numbers, or one for each channel, where white is 1). The first 256 readable
        images decide what isn't set, so `raws` should mix the classes; `measure` finds mean and std that aren't.

        Raises UsageError for a bad setting, DataError where no image can be read.
        """
        checked = _check_settings(settings)
        sizes, grey = _read_headers(raws())
        if not sizes:
            raise DataError("None of the training images can be read.", fix="Check that the files are complete images.")
        max_side = checked.get("max_side")
        tiles = checked.get("tiles", 0)
        size = (
            checked.get("size")
            or ((tiles, tiles) if tiles else None)
            or (_working_size(sizes) if max_side is None else _common_size(sizes, max_side))
        )
        channels = checked.get("channels") or (1 if grey else 3)
        return cls(
            height=size[0],
            width=size[1],
            channels=channels,
            resize=checked.get("resize", "crop"),
            tiles=tiles,
            tile_overlap=checked.get("tile_overlap", TILE_OVERLAP),
            mean=_per_channel(checked.get("mean"), channels),
            std=_per_channel(checked.get("std"), channels),
        )

    def encode(self, raw: Raw) -> EncodedInput:
        """Safe to call from several threads at once."""
        pixels, traits, orientation = decode(raw)
        height, width, channels = pixels.shape
        windows: tuple[Geometry, ...] = ()
        if self.tiles:
            row, windows = cut_tiles(pixels, self.tiles, self.tile_overlap)
            geometry = Geometry.unchanged((height, width))
        else:
            row, geometry = resize(pixels, self.height, self.width, self.resize)
        if orientation != 1:
            geometry = replace(geometry, orientation=orientation)
        if channels == 1 and self.channels == 3:
            row, traits = np.repeat(row, 3, axis=-1), ("grey", *traits)
        elif channels == 3 and self.channels == 1:
            row, traits = _to_grey(row), ("colour", *traits)
        # Of the size and the row, not of the file: pictures that the model can't tell apart are equal. SHA-256 has its
        # own instructions on current CPUs and is then the fastest in hashlib.
        digest = hashlib.sha256(b"%d,%d:" % (height, width), usedforsecurity=False)
        digest.update(np.ascontiguousarray(row).data)
        return EncodedInput(
            arrays={"image": row}, digest=digest.digest()[:16], geometry=geometry, traits=traits, windows=windows
        )

    def settings(self) -> dict[str, Json]:
        """Without those of tiles where there are none: data and models of before there were any stay the same."""
        values = super().settings()
        return values if self.tiles else {n: v for n, v in values.items() if n not in ("tiles", "tile_overlap")}

    @property
    def has_windows(self) -> bool:
        return self.tiles > 0

    def join_windows(self, windows: Arrays, geometries: Sequence[Geometry]) -> Arrays:
        return {"image": join_tiles(windows["image"], geometries)}

    def similarity_key(self, raw: Raw, encoded: EncodedInput) -> bytes:  # noqa: ARG002
        """A hash of the picture as the model sees it; of tiles, of the window that has all of it."""
        row = encoded.arrays["image"]
        return perceptual_hash(row[-1] if self.tiles else row)

    def measure(self, inputs: Mapping[str, Stored]) -> Self:
        """A copy with `mean` and `std`, unless they were set: those of at most about 256 MB of the rows, evenly spread,
        read a few MB at a time."""
        import torch

        rows = inputs["image"]
        assert isinstance(rows, np.ndarray)
        if not len(rows):
            raise DataError("No image can be decoded.", fix="Check that the files are complete images.")
        if self.mean is not None and self.std is not None:
            return self
        row_bytes = self.height * self.width * self.channels
        step = max(1, len(rows) * row_bytes // MEASURED_BYTES)
        chunk = max(1, (1 << 22) // row_bytes) * step
        count = 0
        total = np.zeros(self.channels)
        squares = np.zeros(self.channels)
        for start in range(0, len(rows), chunk):
            # float32 is exact enough inside one chunk; float64 adds up the chunks.
            part = np.ascontiguousarray(rows[start : start + chunk : step]).reshape(-1, self.channels)
            values = torch.from_numpy(part.astype(np.float32) / 255)
            count += len(values)
            total += values.sum(0).double().numpy()
            squares += values.square().sum(0).double().numpy()
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0)).clip(min=1 / 255)
        return replace(
            self,
            mean=self.mean or tuple(round(float(v), 6) for v in mean),
            std=self.std or tuple(round(float(v), 6) for v in std),
        )

    def to_model(self, inputs: Tensors) -> Tensors:
        """uint8 (B, H, W, C) to float32 (B, C, H, W) in channels_last memory format."""
        import torch

        rows = inputs["image"]
        batch, height, width, channels = rows.shape
        scale, shift = _scale_and_shift(self.mean, self.std, channels, width, rows.device)
        # A line of pixels is one long vector, so that the CPU's vector units are full.
        values = rows.reshape(batch, height, width * channels).to(torch.float32)
        torch.addcmul(shift, values, scale, out=values)
        return {"image": values.view(batch, height, width, channels).permute(0, 3, 1, 2)}

    @property
    def inputs(self) -> Schema:
        return {"image": Column(shape=(self.height, self.width, self.channels), dtype="uint8", role="image")}

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.channels, self.height, self.width)

    @property
    def model_args(self) -> dict[str, Json]:
        return {"in_channels": self.channels, "image_size": [self.height, self.width]}

    @property
    def encoding_code(self) -> str | None:
        """With Pillow and numpy; pixels are those of `encode`, up to one level where an image is resized."""
        if self.tiles:
            return None
        h, w, mode = self.height, self.width, "L" if self.channels == 1 else "RGB"
        size, bilinear = f"({w}, {h})", "Image.Resampling.BILINEAR"
        resize = {
            "squash": [f"image = image.resize({size}, {bilinear})"],
            "pad": [
                f"scale = min({w} / image.width, {h} / image.height)",
                "w, h = max(1, round(image.width * scale)), max(1, round(image.height * scale))",
                f"fitted = image.resize((w, h), {bilinear})",
                f"image = Image.new({mode!r}, {size}, {(PAD_LEVEL,) * self.channels})",
                f"image.paste(fitted, (({w} - w) // 2, ({h} - h) // 2))",
            ],
            "crop": [
                f"scale = min(image.width / {w}, image.height / {h})",
                f"w, h = max(1, round({w} * scale)), max(1, round({h} * scale))",
                "left, top = (image.width - w) // 2, (image.height - h) // 2",
                f"image = image.crop((left, top, left + w, top + h)).resize({size}, {bilinear})",
            ],
        }[self.resize]
        return "\n".join(
            [
                "import numpy",
                "from PIL import Image, ImageOps",
                f"image = ImageOps.exif_transpose(Image.open(path)).convert({mode!r})",
                *resize,
                f"image = numpy.asarray(image).reshape(1, {h}, {w}, {self.channels})",
            ]
        )

    def features(self, inputs: Mapping[str, Stored], positions: np.ndarray) -> np.ndarray:
        """Pixels of the pictures at 16x16 or their own smaller size (N, F), less their mean."""
        import torch
        from torch.nn.functional import adaptive_avg_pool2d

        rows, size = inputs["image"], (min(self.height, FEATURES_SIDE), min(self.width, FEATURES_SIDE))
        assert isinstance(rows, np.ndarray)
        parts = []
        for start in range(0, len(positions), FEATURES_ROWS):
            batch = torch.from_numpy(rows[positions[start : start + FEATURES_ROWS]])
            parts.append(adaptive_avg_pool2d(self.to_model({"image": batch})["image"], size).flatten(1).numpy())
        features: np.ndarray = np.concatenate(parts) / math.sqrt(parts[0].shape[1])
        return features

    def preview(self, inputs: Arrays) -> Preview:
        """A PNG of at most 128 px; tiny pictures are enlarged without smoothing."""
        row = inputs["image"]
        image = Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row)
        times = PREVIEW_SIDE // max(image.size)
        if times > 1:
            image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.BILINEAR)
        stream = io.BytesIO()
        image.save(stream, "PNG")
        return Preview(media_type="image/png", content=stream.getvalue())

    def thumbnail(self, inputs: Arrays) -> Preview:
        """A JPEG of at most 96 px; a picture that is smaller, as `preview` shows it."""
        row = inputs["image"]
        if max(row.shape[:2]) <= THUMBNAIL_SIDE:
            return self.preview(inputs)
        return _make_jpeg(row, THUMBNAIL_SIDE)

    def close_up(self, inputs: Arrays) -> Preview:
        """A JPEG of at most 400 px; a picture of at most 128 px, as `preview` shows it."""
        row = inputs["image"]
        return self.preview(inputs) if max(row.shape[:2]) <= PREVIEW_SIDE else _make_jpeg(row, CLOSE_UP_SIDE)

    def copies(self, inputs: Arrays) -> Sequence[Arrays]:
        """Mirrored, and the middle of it enlarged."""
        row = np.array(inputs["image"])  # torch warns of arrays that can't be written, such as a memory map
        height, width = row.shape[:2]
        top, left = (round(side * (1 - COPY_SHARE) / 2) for side in (height, width))
        middle, _ = resize(row[top : height - top, left : width - left], height, width, "squash")
        return [{"image": np.ascontiguousarray(row[:, ::-1])}, {"image": middle}]

    def mark(self, inputs: Arrays, weights: np.ndarray) -> Marked:
        """The image in grey, of 256 px along its longer side, with the weights (H, W) as heat: from nothing by yellow
        to red."""
        row = inputs["image"]
        longer = max(row.shape[:2])
        size = tuple(max(1, round(side * MARKED_SIDE / longer)) for side in row.shape[1::-1])
        sampling = Image.Resampling.NEAREST if longer < MARKED_SIDE else Image.Resampling.BILINEAR
        image = Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row).convert("L").resize(size, sampling)
        heat = Image.fromarray(weights.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
        share = np.asarray(heat).clip(0, 1)[:, :, None]
        colour = np.concatenate([np.full_like(share, 255), 230 * (1 - share), np.zeros_like(share)], axis=2)
        cover = 0.75 * np.sqrt(share)
        pixels = (1 - cover) * np.asarray(image, np.float32)[:, :, None] + cover * colour
        stream = io.BytesIO()
        Image.fromarray(pixels.round().astype(np.uint8)).save(stream, "PNG")
        return Marked(picture=Preview(media_type="image/png", content=stream.getvalue()))

    @classmethod
    def draw(cls, raw: Raw, answer: Answer, classes: Sequence[str]) -> Preview:
        """A JPEG of a JPEG, else a PNG."""
        image, stream = draw_answer(decode(raw).pixels, answer, classes), io.BytesIO()
        if isinstance(raw, bytes) and raw.startswith(b"\xff\xd8"):
            image.save(stream, "JPEG", quality=92)
            return Preview(media_type="image/jpeg", content=stream.getvalue())
        image.save(stream, "PNG", compress_level=2)
        return Preview(media_type="image/png", content=stream.getvalue())

    @classmethod
    def size_of(cls, raw: Raw) -> tuple[int, ...]:
        header = read_header(raw)
        return header.height, header.width

    @classmethod
    def find_inputs(cls, path: Path) -> Iterable[tuple[str, Callable[[], Raw]]]:
        """A file; the files below a folder, sorted; or standard input ("-"), which is the bytes of one image or a list
        of paths, one per line. Files that are no images say so when they are read; texts beside images are left out.
        Raises DataError where there are none."""
        if path == Path("-"):
            return _read_standard_input()
        if path.is_dir():
            return _list_images(path)
        if not path.exists():
            raise DataError(f"There is no {path}.", fix="Check the path: an image, a folder of images, or '-'.")
        return [(str(path), partial(_read_image, path))]

    def split_batch(self, raw: Raw) -> Sequence[Raw] | None:
        """The pictures in an array (N, H, W, C)."""
        return list(raw) if isinstance(raw, np.ndarray) and raw.ndim == 4 and raw.dtype == np.uint8 else None

    def check_size(self, raw: Raw, max_pixels: int) -> None:
        """Raises BadInput for a picture of more pixels, by its header."""
        if not isinstance(raw, bytes):
            return
        header = read_header(raw)
        if header.height * header.width > max_pixels:
            raise BadInput(
                f"The image has {header.width}x{header.height} pixels; "
                f"at most {max_pixels / 1e6:g} million are allowed.",
                fix="Send a smaller one.",
            )


def _check_settings(settings: Mapping[str, Json]) -> dict[str, Json]:
    """The settings with `size` as (height, width)."""
    allowed = ("size", "max_side", "tiles", "tile_overlap", "resize", "channels", "mean", "std")
    for name in settings:
        if name not in allowed:
            raise unknown("preprocess setting", name, allowed)
    checked = {name: value for name, value in settings.items() if value is not None}
    if "size" in checked:
        size = checked["size"]
        sides = [size, size] if isinstance(size, int) else size
        if (
            not isinstance(sides, (list, tuple))
            or len(sides) != 2
            or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides)
        ):
            raise UsageError(
                f"preprocess.size is {size!r}, which is not an image size.",
                fix=f"Give pixels from 1 to {MAX_SIDE}: 128, or [height, width].",
            )
        checked["size"] = tuple(sides)
    side = checked.get("max_side", SIDE_STEP)
    if type(side) is not int or not SIDE_STEP <= side <= MAX_SIDE:
        raise UsageError(
            f"preprocess.max_side is {side!r}.", fix=f"Give pixels from {SIDE_STEP} to {MAX_SIDE}, such as 416."
        )
    _check_tiles(checked)
    if "resize" in checked and checked["resize"] not in get_args(Resize):
        raise unknown("value of preprocess.resize", str(checked["resize"]), get_args(Resize))
    if "channels" in checked and (type(checked["channels"]) is not int or checked["channels"] not in (1, 3)):
        raise UsageError(f"preprocess.channels is {checked['channels']!r}.", fix="Give 1 (grey) or 3 (colour).")
    return checked | {name: _check_numbers(name, checked[name]) for name in ("mean", "std") if name in checked}


def _check_tiles(settings: Mapping[str, Json]) -> None:
    """Raises UsageError."""
    tiles, overlap = settings.get("tiles", SIDE_STEP), settings.get("tile_overlap", TILE_OVERLAP)
    if type(tiles) is not int or not SIDE_STEP <= tiles <= MAX_SIDE or tiles % SIDE_STEP:
        raise UsageError(
            f"preprocess.tiles is {tiles!r}.",
            fix=f"Give pixels from {SIDE_STEP} to {MAX_SIDE} that are a multiple of {SIDE_STEP}, such as 416.",
        )
    if type(overlap) not in (int, float) or not 0 <= overlap <= MOST_OVERLAP:
        raise UsageError(
            f"preprocess.tile_overlap is {overlap!r}.", fix=f"Give a share of a tile from 0 to {MOST_OVERLAP}."
        )
    if "tiles" in settings and "size" in settings:
        raise UsageError("preprocess.size and preprocess.tiles both say how large inputs are.", fix="Leave one out.")


def _check_numbers(name: str, value: Json) -> tuple[float, ...]:
    """A mean or std as numbers, of which there is one or three. Raises UsageError."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    lowest = 0.0 if name == "mean" else 1e-4
    if len(numbers) not in (1, 3) or not all(
        type(number) in (int, float) and lowest <= number <= 1 for number in numbers
    ):
        raise UsageError(
            f"preprocess.{name} is {value!r}.",
            fix=f"Give a number from {lowest:g} to 1, where white is 1, or one for each of three channels: "
            f"preprocess.{name}=[0.5,0.5,0.5].",
        )
    return tuple(map(float, numbers))


def _per_channel(numbers: tuple[float, ...] | None, channels: int) -> tuple[float, ...] | None:
    """As many as there are channels; grey images get the average of three."""
    if numbers is None or len(numbers) == channels:
        return numbers
    return numbers * channels if len(numbers) == 1 else (sum(numbers) / len(numbers),)


def _read_headers(raws: Iterable[Raw]) -> tuple[list[tuple[int, int]], bool]:
    """Sizes of the first readable images, and whether all of them are grey. Only headers are read, but pixels too until
    the first colour picture, since grey ones may be stored with three channels."""
    sizes: list[tuple[int, int]] = []
    grey = True
    for raw in raws:
        try:
            header = read_header(raw)
            if grey and not header.grey:
                grey = decode(raw).pixels.shape[2] == 1
        except BadInput:
            continue
        sizes.append((header.height, header.width))
        if len(sizes) == SAMPLED:
            break
    return sizes, grey


def _working_size(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    if len(set(sizes)) == 1 and max(sizes[0]) <= NATIVE_SIDE:
        return sizes[0]
    side = min(DEFAULT_SIDE, round(median(min(size) for size in sizes)))
    return side, side


def _common_size(sizes: list[tuple[int, int]], max_side: int) -> tuple[int, int]:
    """The smallest shape, in multiples of SIDE_STEP, that nearly all images fit into once their longer side is
    `max_side`, or what is usual for them where that is less."""
    longer = min(max_side, round(median(max(size) for size in sizes)))
    rank = math.ceil(FITTING_SHARE * len(sizes)) - 1
    sides = (sorted(longer * size[axis] / max(size) for size in sizes)[rank] for axis in (0, 1))
    height, width = (SIDE_STEP * math.ceil(round(side / SIDE_STEP, 3)) for side in sides)
    return height, width


def _make_jpeg(row: np.ndarray, side: int) -> Preview:
    """Of at most so many px."""
    image, stream = Image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row), io.BytesIO()
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    image.save(stream, "JPEG", quality=80)
    return Preview(media_type="image/jpeg", content=stream.getvalue())


def _to_grey(row: np.ndarray) -> np.ndarray:
    """Grey (H, W, 1) from RGB, with the weights of ITU-R BT.601, rounded."""
    weights = np.array([19595, 38470, 7471], np.uint32)
    return ((row @ weights + 0x8000) >> 16).astype(np.uint8)[:, :, None]


@lru_cache(maxsize=32)
def _scale_and_shift(
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    channels: int,
    width: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors (width * channels,) on the device; value * scale + shift normalises."""
    import torch

    with torch.inference_mode(False):  # cached for later calls, which may be in training
        spread = torch.tensor(std or [1.0] * channels, dtype=torch.float64)
        centre = torch.tensor(mean or [0.0] * channels, dtype=torch.float64)
        scale, shift = 1 / (255 * spread), -centre / spread
        return tuple(v.to(torch.float32).repeat(width).to(device) for v in (scale, shift))  # type: ignore[return-value]


def _list_images(folder: Path) -> list[tuple[str, Callable[[], Raw]]]:
    paths = []
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_ignored(name))
        paths += [path for name in files if not is_ignored(name) and _is_listed(path := Path(directory) / name)]
    if not paths:
        raise DataError(f"There is no file below {folder}.", fix="Give a folder that holds .jpg, .png or other images.")
    return [(_readable(path.relative_to(folder)), partial(_read_image, path)) for path in sorted(paths)]


def _readable(path: Path) -> str:
    """The path with bytes that aren't UTF-8 written out, so that it can be printed and sent."""
    return str(path).encode(errors="surrogateescape").decode(errors="backslashreplace")


def _is_listed(path: Path) -> bool:
    suffix = path.suffix.lower().removeprefix(".")
    return suffix in IMAGE_SUFFIXES or (suffix not in TEXT_SUFFIXES and path.is_file())  # a pipe would block


def _read_image(path: Path) -> bytes:
    """The content of a file that may be an image. Others, such as long videos, aren't read whole. Raises BadInput,
    OSError."""
    if path.suffix.lower() not in SUFFIXES and path.is_file():
        with path.open("rb") as stream:
            start = stream.read(START_BYTES)
        if not may_be_image(start):
            raise BadInput(f"Not an image that suanli can read: it is {describe_bytes(start)}")
    return path.read_bytes()


def _read_standard_input() -> list[tuple[str, Callable[[], Raw]]]:
    data = sys.stdin.buffer.read()
    if not data.strip():
        raise DataError("Standard input is empty.", fix="Pipe in one image, or paths of images, one a line.")
    try:
        lines = data.decode("utf-8").splitlines()
        paths = [Path(line.strip()) for line in lines if line.strip()]
        is_list = "\0" not in data.decode("utf-8")
    except UnicodeDecodeError:
        is_list = False
    if not is_list:
        return [("-", partial(bytes, data))]
    return [(str(path), partial(_read_image, path)) for path in paths]


PREPROCESS = ImagePreprocess
