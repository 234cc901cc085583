"""Decodes image files to upright, opaque 8-bit pixels, or raises BadInput that says what the bytes are instead.

simplejpeg (libjpeg-turbo without Pillow's copies) decodes JPEG, Pillow everything else. Images are decoded at full
size: a scaled decode would be faster for large photos, but the same picture stored as PNG would get another digest.
Grey is recognised by content, in any file format. Every function may run in several threads at once.

Not supported: colour profiles, results with more than 8 bits per channel, and files that are cut short.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import threading
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from suanli.core.errors import BadInput
from suanli.core.types import Raw
from suanli.data.file_kinds import describe_bytes, is_heic

MAX_PIXELS = 100_000_000
# An explicit list, since Pillow would start Ghostscript for EPS, for example.
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "AVIF", "ICO", "JPEG2000", "HEIF")
EXIF_ORIENTATION = 0x0112
_GREY_MODES = {"1", "L", "I", "I;16", "I;16B", "I;16L", "I;16N", "LA", "La"}
_APP1, _START_OF_SCAN = 0xE1, 0xDA  # markers of JPEG
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # tags of TIFF
_LONG_TEXT, _ALL_TEXTS = 1 << 20, 32 << 20  # bytes; Pillow refuses a PNG with a text of 1 MiB, or 64 MiB together
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_PNG = b"\x89PNG\r\n\x1a\n"
# What Pillow raises for damaged files of these formats. MemoryError isn't one of them on purpose.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class DecodedImage(NamedTuple):
    pixels: np.ndarray  # (H, W, 1) when grey, else (H, W, 3); uint8, contiguous
    traits: tuple[str, ...]
    orientation: int = 1  # that was undone


class Header(NamedTuple):
    height: int
    width: int
    grey: bool  # by its mode; a colour file may still have a grey picture


def decode(raw: Raw) -> DecodedImage:
    """All pixels of one image, from file bytes or an array (H, W) or (H, W, 1 | 2 | 3 | 4) of uint8 or uint16. Raises
    BadInput."""
    if isinstance(raw, np.ndarray):
        return _from_array(raw)
    data = _check_bytes(raw)
    jpeg = _decode_jpeg(data) if data.startswith(b"\xff\xd8") else None
    pixels, traits, orientation = jpeg or _decode_other(data)
    return DecodedImage(_drop_equal_channels(pixels), traits, orientation)


def decode_pillow(image: Image.Image) -> np.ndarray:
    """The pixels of an open image as `decode` gives those of its file: upright and opaque. Raises BadInput."""
    try:
        pixels, _ = _to_pixels(image)
        return _rotate_upright(pixels, int(image.getexif().get(EXIF_ORIENTATION, 1)))
    except (OSError, ValueError, SyntaxError) as error:
        raise BadInput(f"The image can't be decoded ({error}).") from error


def read_header(raw: Raw) -> Header:
    """Size (upright) and mode of one image without decoding it. Raises BadInput."""
    if isinstance(raw, np.ndarray):
        pixels = _from_array(raw).pixels
        return Header(pixels.shape[0], pixels.shape[1], pixels.shape[2] == 1)
    data = _check_bytes(raw)
    if data.startswith(b"\xff\xd8"):
        try:
            height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            pass
        else:
            sides = (width, height) if _jpeg_orientation(data) >= 5 else (height, width)
            return Header(*sides, grey=colourspace == "Gray")
    with _open(data) as image:
        try:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
        except _DAMAGE:
            orientation = 1
        # A TIFF is already reported upright by Pillow.
        turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"
        width, height = image.size[::-1] if turned else image.size
        return Header(height, width, grey=image.mode in _GREY_MODES)


def _check_bytes(raw: object) -> bytes:
    if not isinstance(raw, (bytes, bytearray, memoryview)):
        raise BadInput(f"An image was expected, not {type(raw).__name__}.", fix="Give the bytes of an image file.")
    data = bytes(raw)
    if not data:
        raise BadInput("The image is empty (0 bytes).")
    return data


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise BadInput(f"The image has no pixels ({width}x{height}).")
    if height * width > MAX_PIXELS:
        raise BadInput(
            f"The image has {width}x{height} pixels, more than the {MAX_PIXELS // 10**6} million that are allowed.",
            fix="Make it smaller or remove it.",
        )


def _decode_jpeg(data: bytes) -> tuple[np.ndarray, tuple[str, ...], int] | None:
    """Upright pixels, traits and the orientation that was undone; None: Pillow has to decode it (CMYK, rare markers, no
    JPEG)."""
    try:
        height, width, colourspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(height, width)
    if colourspace not in ("Gray", "YCbCr", "RGB"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(data, colorspace="GRAY" if colourspace == "Gray" else "RGB", strict=True)
    except ValueError as error:
        # "Premature end of JPEG file" and "premature end of data segment" mean that part of the picture is missing;
        # Pillow would fill it with grey. Other errors (stray bytes) are harmless.
        if "remature end" in str(error):
            raise BadInput("The JPEG is cut short: part of the image is missing.") from error
        return None
    orientation = _jpeg_orientation(data)
    if orientation == 1:
        return pixels, (), 1
    return _rotate_upright(pixels, orientation), ("exif-rotated",), orientation


def _jpeg_orientation(data: bytes) -> int:
    """As Pillow reads it, which is only asked where there may be one: in EXIF or XMP before the picture."""
    start = 2
    while data[start : start + 1] == b"\xff" and start + 4 <= len(data):
        marker = data[start + 1]
        if marker == _APP1:
            _silence_pillow()
            try:
                return _exif_orientation(Image.open(io.BytesIO(data), formats=("JPEG",)))
            except _DAMAGE:  # damaged metadata doesn't make a damaged picture
                return 1
        if marker == _START_OF_SCAN:
            break
        if marker == 0xFF:  # fill bytes
            start += 1
            continue
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8  # without a length
        start += 2 if alone else 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return 1


def _rotate_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an EXIF orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _silence_pillow() -> None:
    """Ignores Pillow's warnings about metadata for the rest of the process; what matters is checked here. A temporary
    filter isn't safe with threads: `warnings.catch_warnings` swaps a list that all threads share."""
    with _filtering:
        if _IGNORED not in warnings.filters:
            warnings.filterwarnings("ignore", module=_IGNORED[3].pattern)


_IGNORED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # the form of an entry in warnings.filters
_filtering = threading.Lock()


def _open(data: bytes) -> Image.Image:
    _silence_pillow()
    _open_as_heic(data)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except _DAMAGE as error:
        if (shorter := _drop_long_texts(data)) is not None:
            return _open(shorter)
        raise BadInput(f"Not an image that suanli can read: it is {describe_bytes(data)}") from error
    _check_size(image.height, image.width)
    return image


def _check_tiff(image: Image.Image) -> None:
    """Raises BadInput for a TIFF whose numbers have no known black and white."""
    form, bits = _tiff_tag(image, _SAMPLE_FORMAT), _tiff_tag(image, _BITS_PER_SAMPLE)
    if form == 3:
        raise _range_error("floating-point")
    if bits > 16:
        raise _range_error(f"{bits}-bit")
    if form == 2:
        raise _range_error("signed")


def _tiff_tag(image: Image.Image, tag: int) -> int:
    """The largest of its values; 1 for none, which is the default of the tags here."""
    values = getattr(image, "tag_v2", {}).get(tag, 1)
    return max(values) if isinstance(values, tuple) else int(values)


def _range_error(pixels: str) -> BadInput:
    return BadInput(f"The image has {pixels} pixels, whose range is unknown.", fix="Save it with 8 or 16 bits.")


def _open_as_heic(data: bytes) -> None:
    """Lets Pillow open HEIC, where the package for it is installed."""
    if is_heic(data) and "HEIF" not in Image.OPEN:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()


def _drop_long_texts(data: bytes) -> bytes | None:
    """A PNG without the texts and colour profiles that are longer than Pillow reads, which suanli has no use for. None:
    it has none, or isn't a PNG."""
    if not data.startswith(_PNG):
        return None
    kept, total, start = [data[:8]], 0, 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        size_bytes = _text_bytes(kind, data[start + 8 : end - 4]) if kind in _PNG_TEXTS else 0
        if size_bytes < _LONG_TEXT and total + size_bytes < _ALL_TEXTS:
            total += size_bytes
            kept.append(data[start:end])
        start = end
    shorter = b"".join(kept)
    return shorter if len(shorter) < len(data) else None


def _text_bytes(kind: bytes, content: bytes) -> int:
    """The unpacked size of a text chunk, or of a chunk that isn't smaller than the limit, that."""
    if kind == b"tEXt" or (kind == b"iTXt" and content.partition(b"\0")[2][:1] != b"\1"):
        return len(content)
    packed = content.partition(b"\0")[2][1:]
    if kind == b"iTXt":
        packed = packed[1:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(packed, _LONG_TEXT))
    except zlib.error:
        return 0


def _decode_other(data: bytes) -> tuple[np.ndarray, tuple[str, ...], int]:
    """As `_decode_jpeg`."""
    with _open(data) as image:
        # Pillow rotates a TIFF while it loads it, and the tag is gone then.
        before = _exif_orientation(image) if image.format == "TIFF" else 1
        try:
            animated = getattr(image, "is_animated", False) and image.format != "MPO"
            image.load()
            pixels, traits = _to_pixels(image)
        except _DAMAGE as error:
            if (shorter := _drop_long_texts(data)) is not None:
                return _decode_other(shorter)
            reason = "is cut short" if "truncated" in str(error) else f"can't be decoded ({error})"
            raise BadInput(f"The {image.format} image {reason}.") from error
        # Not earlier: to read the tag, Pillow loads a PNG, and a second load would ignore damage.
        orientation = _exif_orientation(image) if image.format != "TIFF" else 1
    if data.startswith(_PNG) and data[24:25] == b"\x10" and "16-bit" not in traits:
        traits += ("16-bit",)
    if animated:
        traits += ("animated",)
    if orientation != 1:
        pixels = _rotate_upright(pixels, orientation)
    if (before, orientation) != (1, 1):
        traits += ("exif-rotated",)
    return pixels, traits, max(before, orientation)


def _exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except _DAMAGE:  # damaged metadata doesn't make a damaged picture
        return 1
    return orientation if orientation in range(1, 9) else 1


def _to_pixels(image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]]:
    mode = image.mode
    traits: tuple[str, ...] = ()
    _check_tiff(image)
    if mode == "F":
        raise _range_error("floating-point")
    if mode == "I" and image.format not in ("PNG", "PPM"):  # these are of 16 bits
        raise _range_error("32-bit")
    if mode.startswith("I"):
        values = np.array(image)
        if _tiff_tag(image, _BITS_PER_SAMPLE) == 12:
            values = (values.astype(np.uint32) * 65_535 // 4095).astype(np.uint16)
        return _from_16_bit(values), ("16-bit",)
    if mode in ("P", "PA"):
        traits += ("palette",)
    if mode == "CMYK":
        traits += ("cmyk",)
    if mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info:
        traits += ("alpha",)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels, traits


def _from_16_bit(values: np.ndarray) -> np.ndarray:
    """uint8 from 16-bit values (H, W) or (H, W, C), rounded; (H, W) becomes (H, W, 1)."""
    pixels = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _from_array(array: np.ndarray) -> DecodedImage:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4):
        raise BadInput(f"An image is an array (H, W) or (H, W, channels), not {array.shape}.", fix="Reshape the array.")
    if array.dtype not in (np.uint8, np.uint16):
        raise BadInput(
            f"The pixels are {array.dtype}; uint8 (0 to 255) or uint16 was expected.",
            fix="Scale them to 0-255 as uint8.",
        )
    _check_size(array.shape[0], array.shape[1])
    traits: tuple[str, ...] = ()
    if array.dtype == np.uint16:
        array, traits = _from_16_bit(array), ("16-bit",)
    if array.shape[2] in (2, 4):
        opaque = array[:, :, -1:].astype(np.uint32)
        array = ((array[:, :, :-1] * opaque + 255 * (255 - opaque) + 127) // 255).astype(np.uint8)
        traits += ("alpha",)
    return DecodedImage(_drop_equal_channels(array), traits)


def _drop_equal_channels(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1) if the three channels are equal everywhere, so that a grey picture is grey in any file format. For most
    colour pictures, one row is enough to see that they aren't."""
    if pixels.shape[2] == 3:
        row = pixels[pixels.shape[0] // 2]
        first = pixels[:, :, :1]
        if (row[:, 0] == row[:, 1]).all() and (first == pixels).all():
            pixels = first
    return np.require(pixels, requirements=("C", "W"))
