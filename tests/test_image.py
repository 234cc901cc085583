"""Images from real files of many makes to rows and model inputs."""

import io
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from suanli.core.errors import BadInput, DataError, UsageError
from suanli.data.decode import decode_pillow
from suanli.data.preprocess.image import ImagePreprocess

RANDOM = np.random.default_rng(0)


def smooth(height=40, width=60, channels=3):
    """A colourful gradient, so that JPEG and resizing change it little."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 255 // max(width - 1, 1), y * 255 // max(height - 1, 1), (x + y) * 3 % 256]
    return np.stack(planes[:channels], axis=2).astype(np.uint8)


def saved(image, kind="PNG", **options):
    image = Image.fromarray(image.squeeze()) if isinstance(image, np.ndarray) else image
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def native(height=40, width=60, **fields):
    return ImagePreprocess(height=height, width=width, **fields)


def fit(*raws, **settings):
    return ImagePreprocess.fit(lambda: iter(raws), settings)


# --- fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (2, 5), (64, 40)])
def test_small_images_of_one_size_keep_it(height, width):
    preprocess = fit(*[saved(smooth(height, width))] * 3)
    assert preprocess.input_shape == (3, height, width)


def test_other_images_become_squares():
    assert fit(saved(smooth(200, 300)), saved(smooth(300, 400))).inputs["image"].shape == (128, 128, 3)
    assert fit(saved(smooth(96, 96))).inputs["image"].shape == (96, 96, 3)
    assert fit(*(saved(smooth(side, 2 * side)) for side in (30, 40, 50))).inputs["image"].shape == (40, 40, 3)


def test_settings_win():
    preprocess = fit(saved(smooth()), size=[20, 30], resize="pad", channels=1)
    assert (preprocess.inputs["image"].shape, preprocess.resize) == ((20, 30, 1), "pad")
    assert fit(saved(smooth()), size=16).inputs["image"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": -3},
        {"size": True},
        {"size": "big"},
        {"size": [1, 2, 3]},
        {"size": 10**6},
        {"size": 1.5},
        {"channels": 2},
        {"channels": True},
        {"resize": "zoom"},
        {"mean": [123.7, 116.8, 103.9]},
        {"mean": [0.5, 0.5]},
        {"mean": "grey"},
        {"mean": float("nan")},
        {"std": 0},
        {"std": [0.2, 0.2, True]},
        {"sise": 32},
    ],
)
def test_bad_settings_are_refused_with_a_fix(settings):
    with pytest.raises(UsageError) as caught:
        fit(saved(smooth()), **settings)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"mean": [0.2, 0.3, 0.4], "std": 0.5}, (0.2, 0.3, 0.4), (0.5, 0.5, 0.5)),
        ({"mean": [0.2, 0.3, 0.4], "std": [0.1, 0.2, 0.3], "channels": 1}, (0.3,), (0.2,)),
        ({"mean": 0.5, "channels": 1}, (0.5,), None),
    ],
)
def test_a_mean_and_std_that_were_set_are_not_measured(settings, mean, std):
    preprocess = fit(saved(smooth()), **settings)
    rows = {"image": np.random.default_rng(0).integers(0, 255, (9, *preprocess.inputs["image"].shape), np.uint8)}
    measured = preprocess.measure(rows)
    assert measured.mean == pytest.approx(mean)
    assert measured.std == pytest.approx(std or (rows["image"].std() / 255,), abs=0.001)
    shown = measured.to_model({"image": torch.from_numpy(rows["image"])})["image"].numpy()
    by_hand = (rows["image"] / 255 - np.array(measured.mean)) / np.array(measured.std)
    np.testing.assert_allclose(shown.transpose(0, 2, 3, 1), by_hand, atol=1e-5)


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(UsageError, match="'size'"):
        fit(saved(smooth()), sise=32)


def test_channels_follow_the_pictures_not_the_files():
    grey = smooth(channels=1)
    as_colour = np.repeat(grey, 3, axis=2)
    assert fit(saved(grey), saved(as_colour), saved(as_colour, "JPEG")).channels == 1
    assert fit(saved(grey), saved(smooth())).channels == 3


def test_fit_stops_early():
    read = []

    def raws():
        for number in range(10_000):
            read.append(number)
            yield saved(smooth(8, 8))

    ImagePreprocess.fit(raws, {})
    assert len(read) <= 300


def test_fit_sees_exif_rotated_sizes():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert fit(saved(smooth(20, 30), "JPEG", exif=exif)).inputs["image"].shape == (30, 20, 3)


def test_fit_without_images():
    with pytest.raises(DataError):
        fit(b"", b"text")
    with pytest.raises(DataError):
        fit()


# --- encode: what is stored --------------------------------------------------------------------


def test_lossless_pixels_are_unchanged():
    pixels = smooth()
    encoded = native().encode(saved(pixels))
    assert (encoded.arrays["image"] == pixels).all()
    assert (encoded.geometry.size, encoded.traits) == ((40, 60), ())


def test_jpeg_agrees_with_pillow():
    data = saved(smooth(), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(native().encode(data).arrays["image"] - expected).max() <= 2


def test_digest_is_that_of_the_picture_not_of_the_file():
    grey = smooth(channels=1)
    forms = [saved(grey), saved(grey, "BMP"), saved(np.repeat(grey, 3, axis=2)), saved(grey, "GIF"), grey, grey[..., 0]]
    assert len({native().encode(form).digest for form in forms}) == 1
    jpeg = saved(smooth(), "JPEG")
    assert native().encode(jpeg).digest == native().encode(saved(native().encode(jpeg).arrays["image"])).digest
    assert native().encode(np.zeros((4, 6), np.uint8)).digest != native().encode(np.zeros((6, 4), np.uint8)).digest


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = saved(smooth(), kind, exif=exif, **options)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    encoded = native(*upright.shape[:2]).encode(data)
    assert np.abs(encoded.arrays["image"] - upright.astype(int)).max() <= 2
    assert encoded.geometry.size == upright.shape[:2]
    assert ("exif-rotated" in encoded.traits) == (orientation != 1)
    assert fit(data).inputs["image"].shape[:2] == upright.shape[:2]


def segment(marker, content):
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


XMP = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ([segment(0xE2, bytes(60_000))] * 3 + [segment(0xE1, exif(6))], b""),  # behind a large colour profile
        ([segment(0xFE, b"how Exif\0\0 works: " + exif(8)), segment(0xE1, exif(6))], b""),
        ([segment(0xFE, exif(8))], b""),  # a comment, which states nothing
        ([], b"\xff\xd8" + segment(0xE1, exif(6))),  # of another picture
        ([segment(0xE1, XMP)], b""),
        ([b"\xff\xff\xff" + segment(0xE1, exif(6))[1:]], b""),  # with fill bytes
    ],
)
def test_the_orientation_of_a_jpeg_is_read_where_it_stands(before, behind):
    jpeg = saved(smooth(24, 32), "JPEG")
    content = jpeg[:2] + b"".join(before) + jpeg[2:] + behind
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    row = native(expected.height, expected.width).encode(content)
    assert row.geometry.size == (expected.height, expected.width)
    assert fit(content).input_shape[1:] == (expected.height, expected.width)  # by the header alone
    assert np.abs(row.arrays["image"].astype(int) - np.array(expected).astype(int)).mean() < 6


def test_damaged_exif_does_not_damage_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(smooth(), "JPEG", exif=exif)
    start = data.index(b"Exif\0\0") + 6
    for junk in (b"\xff" * 12, b"MM\0\x2a\xff\xff\xff\xff\0\0\0\0"):
        broken = data[:start] + junk + data[start + len(junk) :]
        assert native().encode(broken).traits == ()


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    expected = np.round(values / 257).astype(int)
    png = saved(Image.fromarray(values))
    tiff = saved(Image.fromarray(values), "TIFF")
    for raw in (png, tiff, values):
        encoded = native(8, 8, channels=1).encode(raw)
        assert np.abs(encoded.arrays["image"][..., 0] - expected).max() <= 1
        assert encoded.traits == ("16-bit",)


def tiff(values, bits, sample_format):
    """A grey TIFF of one strip, (H, W), as the specification has it (TIFF 6.0)."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2)
        packed = [pairs[:, 0] >> 4, ((pairs[:, 0] & 15) << 4) | (pairs[:, 1] >> 8), pairs[:, 1] & 255]
        content = np.stack(packed, axis=1).astype(np.uint8).tobytes()
    else:
        content = values.astype(f"<{'uif'[sample_format - 1]}{bits // 8}").tobytes()
    fields = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(content)}
    fields[339] = sample_format
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    return (
        b"II*\0" + struct.pack("<I", 8 + len(content)) + content + struct.pack("<H", len(fields)) + entries + bytes(4)
    )


@pytest.mark.parametrize(
    ("bits", "sample_format", "what"),
    [(32, 1, "32-bit"), (32, 2, "32-bit"), (16, 2, "signed"), (8, 2, "signed"), (32, 3, "floating-point")],
)
def test_a_tiff_of_an_unknown_range_is_refused(bits, sample_format, what):
    content = tiff(np.full((4, 6), 20), bits, sample_format)
    assert what in error_of(content)
    with suppress(OSError):  # Pillow opens it; as `predict` takes its image
        image = Image.open(io.BytesIO(content))
        with pytest.raises(BadInput, match=what):
            decode_pillow(image)


def test_twelve_bits_are_scaled():
    values = np.linspace(0, 4095, 48).astype(int).reshape(6, 8)
    row = native(6, 8, channels=1).encode(tiff(values, 12, 1))
    assert row.traits == ("16-bit",)
    np.testing.assert_allclose(row.arrays["image"][:, :, 0], values * 255 / 4095, atol=1)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt"])
@pytest.mark.parametrize("behind", [False, True])
def test_a_long_text_in_a_png_is_passed_over(kind, behind):
    text = b"a" * (3 << 20)
    packed = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0", b"tEXt": b"k\0"}[kind]
    content = packed + (text * 25 if kind == b"tEXt" else zlib.compress(text))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    png = saved(smooth())
    at = len(png) - 12 if behind else 33
    row = native().encode(png[:at] + chunk + png[at:])
    np.testing.assert_array_equal(row.arrays["image"], smooth())


def test_sixteen_bit_colour_is_a_trait():
    rows = b"".join(b"\0" + struct.pack(">6H", *(range(0, 60000, 10000))) for _ in range(2))
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    encoded = native(2, 2).encode(data)
    assert encoded.traits == ("16-bit",)
    assert abs(int(encoded.arrays["image"][0, 1, 2]) - 50000 // 257) <= 1


def test_transparency_is_composed_on_white():
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255  # black above, nothing below
    for raw in (saved(pixels), saved(pixels, "WEBP", lossless=True), pixels):
        encoded = native(4, 4, channels=1).encode(raw)
        assert (encoded.arrays["image"][:2] == 0).all()
        assert (encoded.arrays["image"][2:] == 255).all()
        assert "alpha" in encoded.traits
    grey_alpha = Image.fromarray(pixels).convert("LA")
    assert native(4, 4, channels=1).encode(saved(grey_alpha)).arrays["image"][3, 3, 0] == 255


def test_palettes():
    image = Image.fromarray(smooth()).quantize(16)
    encoded = native().encode(saved(image))
    assert (encoded.arrays["image"] == np.asarray(image.convert("RGB"))).all()
    assert encoded.traits == ("palette",)
    transparent = native().encode(saved(image, transparency=image.getpixel((0, 0))))
    assert transparent.traits == ("palette", "alpha")
    assert (transparent.arrays["image"][0, 0] == 255).all()
    assert native().encode(saved(image, transparency=bytes([0, 128]))).traits == ("palette", "alpha")


def test_cmyk():
    image = Image.fromarray(smooth()).convert("CMYK")
    data = saved(image, "JPEG")
    encoded = native().encode(data)
    assert encoded.traits == ("cmyk",)
    assert (
        np.abs(encoded.arrays["image"] - np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)).max() <= 2
    )


def test_one_bit_and_grey_in_a_colour_data_set():
    bits = Image.fromarray(smooth(channels=1)[..., 0]).convert("1")
    encoded = native().encode(saved(bits))
    assert set(np.unique(encoded.arrays["image"])) == {0, 255}
    assert encoded.traits == ("grey",)
    assert (native().encode(saved(smooth(channels=1))).arrays["image"] == smooth(channels=1)).all()


def test_colour_in_a_grey_data_set():
    encoded = native(channels=1).encode(saved(smooth()))
    assert encoded.traits == ("colour",)
    assert (
        np.abs(encoded.arrays["image"][..., 0] - np.asarray(Image.fromarray(smooth()).convert("L")).astype(int)).max()
        <= 1
    )


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    encoded = native(6, 6).encode(saved(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert "animated" in encoded.traits
    assert encoded.arrays["image"][0, 0, 0] > 200
    assert encoded.arrays["image"][0, 0, 2] < 60


# --- encode: sizes -----------------------------------------------------------------------------


def test_crop_keeps_the_middle():
    pixels = np.zeros((20, 60, 1), np.uint8)
    pixels[:, 20:40] = 200
    assert (native(10, 10, channels=1).encode(pixels).arrays["image"] == 200).all()


def test_squash_and_pad_keep_everything():
    pixels = np.full((20, 60), 200, np.uint8)
    assert (native(10, 10, channels=1, resize="squash").encode(pixels).arrays["image"] == 200).all()
    padded = native(12, 12, channels=1, resize="pad").encode(pixels).arrays["image"][..., 0]
    assert (padded[4:8] == 200).all()
    assert (padded[:4] == 128).all()
    assert (padded[8:] == 128).all()


def test_resizing_agrees_with_pillow():
    pixels = RANDOM.integers(0, 256, (100, 150, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(native(32, 48, resize="squash").encode(pixels).arrays["image"] - expected).max() <= 1


@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    target=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.sampled_from(["crop", "squash", "pad"]),
    channels=st.sampled_from([1, 3]),
    stored=st.sampled_from([1, 2, 3, 4]),
)
def test_every_size_fits_every_size(size, target, resize, channels, stored):
    preprocess = native(*target, resize=resize, channels=channels)
    encoded = preprocess.encode(np.full((*size, stored), 77, np.uint8))
    assert encoded.arrays["image"].shape == (*target, channels)
    assert encoded.arrays["image"].flags.c_contiguous
    assert encoded.geometry.size == size


def test_a_strip_costs_no_memory():
    assert native(128, 128, channels=1).encode(np.zeros((1, 1_000_000), np.uint8)).arrays["image"].shape == (
        128,
        128,
        1,
    )


# --- encode: what is wrong ---------------------------------------------------------------------


def error_of(raw):
    with pytest.raises(BadInput) as caught:
        native().encode(raw)
    assert caught.value.fix
    return caught.value.message


def test_the_error_says_what_the_bytes_are():
    assert "0 bytes" in error_of(b"")
    assert error_of(b"<html><body>404</body></html>").endswith("it is an HTML page: was the download refused?")
    assert error_of(b"\xde\xad\xbe\xef" * 10).endswith("it is of no kind that suanli knows, or damaged.")
    assert "str" in error_of("cat.jpg")
    assert "not an image" in error_of("né".encode() * 20).lower()
    assert "float64" in error_of(np.zeros((4, 4)))
    assert "(2, 3, 4, 5)" in error_of(np.zeros((2, 3, 4, 5), np.uint8))
    assert "no pixels" in error_of(np.zeros((0, 4), np.uint8))


def office(folder):
    stream = io.BytesIO()
    with ZipFile(stream, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr(f"{folder}/document.xml", "<x/>")
    return stream.getvalue()


def npy():
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"%PDF-1.7\n%", "a PDF."),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "an MP4 video."),
        (b"\0\0\0\x14ftypqt  \0\0\0\0", "a QuickTime video."),
        (office("word"), "a Word document."),
        (office("xl"), "an Excel workbook."),
        (b"\n <!DOCTYPE HTML>\n<title>403</title>", "an HTML page: was the download refused?"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file itself"),
        (b'<?xml version="1.0"?><!-- made by hand --><svg xmlns=""/>', "an SVG drawing."),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image that is damaged or cut short."),
        (b"RIFF\x10\0\0\0WAVEfmt ", "a WAV recording."),
        (npy(), "a NumPy array (.npy)."),
        (bytes(128) + b"DICM" + bytes(50), "a DICOM image."),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "metadata that macOS keeps"),
        (bytes(100_000), "nothing but zero bytes"),
        ("好的 a text that isn't an image".encode(), "text that starts with '好的 a text that isn't"),
    ],
)
def test_other_kinds_are_named_in_words(content, words):
    assert f"it is {words}" in error_of(content).replace('"', "'")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)


def test_heic_without_its_package_says_how_to_read_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "it is a HEIC photo; to read it: " in error_of(HEIC)
    assert "pip install 'suanli[heic]'" in error_of(HEIC)


def test_heic():
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif: pip install 'suanli[heic]'")
    assert "HEIC" in error_of(HEIC)
    stream = io.BytesIO()
    heif.from_pillow(Image.fromarray(smooth(64, 96))).save(stream, quality=95)
    row = native(64, 96).encode(stream.getvalue()).arrays["image"].astype(int)
    assert np.abs(row - smooth(64, 96)).mean() < 8


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize(("kind", "progressive"), [("JPEG", False), ("JPEG", True), ("PNG", False)])
def test_a_file_cut_short_is_refused(kind, progressive, keep):
    noise = RANDOM.integers(0, 256, (60, 60, 3), dtype=np.uint8)
    data = saved(noise, kind, **({"progressive": True} if progressive else {}))
    assert "cut short" in error_of(data[: int(len(data) * keep)])


def test_every_cut_of_a_jpeg_is_refused():
    data = saved(smooth(), "JPEG")
    for end in range(0, len(data) - 1, 7):
        error_of(data[:end])
    error_of(data[:-1])


def test_jpeg_with_a_hole_is_refused_and_stray_bytes_are_not():
    data = simplejpeg.encode_jpeg(RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert "cut short" in error_of(data[: len(data) // 2] + b"\xff\xd9")
    expected = native(64, 64).encode(data).arrays["image"]
    assert (native(64, 64).encode(data + b"appended by a camera").arrays["image"] == expected).all()
    assert (native(64, 64).encode(data[:-2] + b"\0\0\0" + data[-2:]).arrays["image"] == expected).all()


def bomb(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = b"IHDR" + header
    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        + struct.pack(">I", len(data)) + b"IDAT" + data + struct.pack(">I", zlib.crc32(b"IDAT" + data))
    )  # fmt: skip


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (12_000, 12_000), (60_000, 60_000)])
def test_bombs_are_refused_before_they_are_decoded(width, height):
    assert "pixels" in error_of(bomb(width, height)) or width > 50_000


def test_a_jpeg_bomb_is_refused():
    data = bytearray(saved(smooth(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    assert "60000x60000" in error_of(bytes(data))


def test_postscript_is_not_run():
    error_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]))
def test_damaged_bytes_give_a_row_or_a_bad_input(data, kind):
    good = bytearray(saved(smooth(12, 16), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadInput):
        assert native(12, 16).encode(bytes(good)).arrays["image"].shape == (12, 16, 3)


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"])
)
def test_any_bytes_give_a_row_or_a_bad_input(data, start):
    with suppress(BadInput):
        assert native(12, 16).encode(start + data).arrays["image"].shape == (12, 16, 3)


def test_threads_get_the_same_rows():
    raws = [saved(smooth(30 + n, 40), kind) for n in range(20) for kind in ("JPEG", "PNG", "GIF")]
    preprocess = native(24, 24)
    expected = [preprocess.encode(raw) for raw in raws]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            encoded = list(pool.map(preprocess.encode, raws))
            assert all(
                (a.arrays["image"] == b.arrays["image"]).all() and a.digest == b.digest
                for a, b in zip(encoded, expected, strict=True)
            )


# --- to the model ------------------------------------------------------------------------------


def test_measured_inputs_have_zero_mean_and_unit_spread():
    rows = RANDOM.integers(0, 256, (500, 10, 7, 3), dtype=np.uint8) // np.array([1, 2, 4], np.uint8)
    preprocess = native(10, 7).measure({"image": rows})
    inputs = preprocess.to_model({"image": torch.from_numpy(rows)})["image"]
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_to_model_computes_the_formula():
    rows = RANDOM.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    preprocess = native(5, 4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    expected = ((rows / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]).transpose(0, 3, 1, 2).astype(np.float32)
    torch.testing.assert_close(
        preprocess.to_model({"image": torch.from_numpy(rows)})["image"], torch.from_numpy(expected), atol=1e-5, rtol=0
    )
    plain = native(5, 4).to_model({"image": torch.from_numpy(rows)})["image"]
    torch.testing.assert_close(plain, torch.from_numpy((rows / 255).transpose(0, 3, 1, 2).astype(np.float32)))


def test_to_model_works_in_training_after_serving():
    rows = torch.from_numpy(RANDOM.integers(0, 256, (2, 6, 6, 3), dtype=np.uint8))
    preprocess = native(6, 6, mean=(0.3, 0.3, 0.3), std=(0.31, 0.31, 0.31))
    with torch.inference_mode():
        preprocess.to_model({"image": rows})["image"]
    layer = torch.nn.Conv2d(3, 2, 3)
    layer(preprocess.to_model({"image": rows})["image"]).sum().backward()
    assert layer.weight.grad is not None


def test_constant_images_have_a_finite_spread():
    rows = np.full((9, 4, 4, 1), 255, np.uint8)
    inputs = native(4, 4, channels=1).measure({"image": rows}).to_model({"image": torch.from_numpy(rows)})["image"]
    assert inputs.abs().max() < 1e-3


def test_measure_reads_a_map_in_parts(tmp_path: Path):
    rows = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.uint8, (3000, 64, 64, 3))
    rows[:] = RANDOM.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    measured = native(64, 64).measure({"image": rows})
    np.testing.assert_allclose(measured.mean, rows[0].mean((0, 1)) / 255, atol=1e-4)
    np.testing.assert_allclose(measured.std, rows[0].std((0, 1)) / 255, atol=1e-4)


def test_measure_without_rows():
    with pytest.raises(DataError):
        native(4, 4).measure({"image": np.zeros((0, 4, 4, 3), np.uint8)})


def test_model_args():
    assert native(5, 7, channels=1).model_args == {"in_channels": 1, "image_size": [5, 7]}


@pytest.mark.parametrize(
    ("shape", "size"), [((8, 8, 1), (128, 128)), ((128, 128, 3), (128, 128)), ((300, 200, 3), (85, 128))]
)
def test_preview_is_a_picture_of_visible_size(shape, size):
    row = RANDOM.integers(0, 256, shape, dtype=np.uint8)
    preview = native(*shape[:2], channels=shape[2]).preview({"image": row})
    image = Image.open(io.BytesIO(preview.content))
    assert (preview.media_type, image.size) == ("image/png", size)
    if shape[0] == 8:
        assert (np.asarray(image)[::16, ::16] == row[..., 0]).all()


# --- inputs of predict -------------------------------------------------------------------------


def test_inputs_of_a_folder_and_of_a_file(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("z.PNG", "b/a.jpg", "notes.txt", "._z.png", ".hidden/x.png"):
        (tmp_path / name).write_bytes(name.encode())
    inputs = list(ImagePreprocess.find_inputs(tmp_path))
    assert [name for name, _ in inputs] == [str(Path("b/a.jpg")), "z.PNG"]
    assert [read() for _, read in inputs] == [b"b/a.jpg", b"z.PNG"]
    [(name, read)] = ImagePreprocess.find_inputs(tmp_path / "notes.txt")
    assert name == str(tmp_path / "notes.txt")
    with pytest.raises(BadInput, match="it is text that starts with 'notes.txt'"):
        read()


def test_inputs_where_nothing_is(tmp_path: Path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError):
            list(ImagePreprocess.find_inputs(path))


def standard_input(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    return list(ImagePreprocess.find_inputs(Path("-")))


def test_inputs_from_standard_input(monkeypatch, tmp_path: Path):
    for data in (saved(smooth()), saved(smooth(), "JPEG"), saved(smooth(), "PPM")):
        [(name, read)] = standard_input(monkeypatch, data)
        assert (name, read()) == ("-", data)
    (tmp_path / "a.png").write_bytes(b"A")
    inputs = standard_input(monkeypatch, f"{tmp_path / 'a.png'}\r\n\n  {tmp_path / 'b.png'}\n".encode())
    assert [name for name, _ in inputs] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert inputs[0][1]() == b"A"
    with pytest.raises(OSError, match=r"b\.png"):
        inputs[1][1]()
    with pytest.raises(DataError):
        standard_input(monkeypatch, b" \n")


# --- real files --------------------------------------------------------------------------------


def test_real_photos(shared_data: Path):
    with ZipFile(shared_data / "imagenette5k.zip") as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        raws = [archive.read(name) for name in islice(names, 0, None, 137)]
    preprocess = fit(*raws)
    assert preprocess.inputs["image"].shape == (128, 128, 3)
    for raw in raws:
        image = Image.open(io.BytesIO(raw)).convert("RGB")
        expected = np.asarray(image.resize((128, 128), Image.Resampling.BILINEAR)).astype(int)
        assert np.abs(preprocess.encode(raw).arrays["image"] - expected).mean() < 1
