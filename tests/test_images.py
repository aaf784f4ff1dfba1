"""Every kind of PNG, every kind of damage, against an independent reading of the format."""

import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torchvision.transforms import v2

from featstore.errors import ConfigError, ImageError
from featstore.images import (
    check_header,
    check_size,
    decode,
    prepare,
    read_header,
    resize,
    resize_and_crop,
)

ROOM = 10**8
SIGNATURE = b"\x89PNG\r\n\x1a\n"
TYPES = [(0, d) for d in (1, 2, 4, 8, 16)] + [(2, 8), (2, 16), (4, 8), (4, 16), (6, 8), (6, 16)]
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_rows(samples, depth):
    """Unfiltered scan lines of (H, W, C) integer samples."""
    rows = b""
    for row in samples:
        flat = row.ravel()
        if depth == 16:
            rows += b"\0" + flat.astype(">u2").tobytes()
        elif depth == 8:
            rows += b"\0" + flat.astype(np.uint8).tobytes()
        else:
            bits = "".join(format(int(v), f"0{depth}b") for v in flat)
            bits += "0" * (-len(bits) % 8)
            rows += b"\0" + bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
    return rows


def png(samples, color, depth, interlaced=False, extra=(), cut=None):
    """A PNG written by hand from (H, W, C) samples; `cut` keeps so many raw bytes."""
    height, width = samples.shape[:2]
    if interlaced:
        passes = [samples[y::dy, x::dx] for x, y, dx, dy in ADAM7]
        raw = b"".join(raw_rows(p, depth) for p in passes if p.size)
    else:
        raw = raw_rows(samples, depth)
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced)
    data = zlib.compress(raw[:cut])
    parts = [chunk(b"IHDR", header), *(chunk(*e) for e in extra)]
    return SIGNATURE + b"".join([*parts, chunk(b"IDAT", data), chunk(b"IEND", b"")])


def expected(samples, color, depth, key=None):
    """RGB by the documented policy, with Python's integers."""
    top = 2**depth - 1
    out = np.zeros((*samples.shape[:2], 3), np.uint8)
    for index in np.ndindex(samples.shape[:2]):
        values = [int(v) for v in samples[index]]
        eight = [v >> 8 if depth == 16 else round(v * 255 / top) for v in values]
        alpha = eight.pop() if color in (4, 6) else 255
        if key is not None:
            alpha = 0 if tuple(values) == tuple(key) else 255
        rgb = eight * 3 if len(eight) == 1 else eight
        out[index] = [int((alpha * c + (255 - alpha) * 255) / 255 + 0.5) for c in rgb]
    return out


def rgb_png(size=(24, 20), seed=0, **kwargs):
    samples = np.random.default_rng(seed).integers(0, 256, (*size, 3))
    return png(samples, 2, 8, **kwargs), samples.astype(np.uint8)


def read(data, order="rgb"):
    return decode(data, "a.png", order, ROOM)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(TYPES), st.booleans(), st.integers(1, 11), st.integers(1, 11), st.integers(0, 10**6))
def test_every_color_type_depth_and_interlacing(kind, interlaced, height, width, seed):
    color, depth = kind
    samples = np.random.default_rng(seed).integers(0, 2**depth, (height, width, CHANNELS[color]))
    found = read(png(samples, color, depth, interlaced))
    np.testing.assert_array_equal(found.pixels, expected(samples, color, depth))
    assert found.pixels.flags["C_CONTIGUOUS"]
    assert found.pixels.flags["WRITEABLE"]
    assert ("grey" in found.converted) == (color in (0, 4))
    assert ("16-bit to 8-bit" in found.converted) == (depth == 16)


@pytest.mark.parametrize(("color", "depth"), [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8)])
def test_one_transparent_color(color, depth):
    samples = np.random.default_rng(1).integers(0, 2**depth, (6, 7, CHANNELS[color]))
    if depth == 16:
        samples[0, 0], samples[0, 1] = 0x1234, 0x1235  # equal high bytes, of which one is see-through
    key = [int(v) for v in samples[0, 0]]
    data = png(samples, color, depth, extra=[(b"tRNS", struct.pack(f">{len(key)}H", *key))])
    found = read(data)
    np.testing.assert_array_equal(found.pixels, expected(samples, color, depth, key))
    assert "alpha over white" in found.converted


def test_a_transparent_color_in_16_bit_rgb_is_refused():
    data = png(np.zeros((2, 2, 3), int), 2, 16, extra=[(b"tRNS", bytes(6))])
    with pytest.raises(ImageError, match="16-bit RGB"):
        read(data)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("alpha", [None, b"\x80\x00"])
def test_palettes(depth, alpha):
    colors = np.random.default_rng(depth).integers(0, 256, (2**depth, 3))
    index = np.random.default_rng(0).integers(0, 2**depth, (5, 9, 1))
    index[0, :2, 0] = [0, 1]
    extra = [(b"PLTE", colors.astype(np.uint8).tobytes())] + ([(b"tRNS", alpha)] if alpha else [])
    found = read(png(index, 3, depth, extra=extra))
    alphas = np.full(len(colors), 255)
    if alpha:
        alphas[:2] = list(alpha)
    rgba = np.concatenate([colors, alphas[:, None]], 1)[index[..., 0]]
    np.testing.assert_array_equal(found.pixels, expected(rgba, 6, 8))
    assert found.converted == ("palette with transparency over white" if alpha else "palette")


def test_palette_too_short_for_its_pixels():
    index = np.full((2, 2, 1), 5)
    with pytest.raises(ImageError, match="colour 5 of 2"):
        read(png(index, 3, 8, extra=[(b"PLTE", bytes(6))]))
    with pytest.raises(ImageError, match="palette is missing"):
        read(png(index, 3, 8))


def test_opaque_alpha_is_no_conversion():
    samples = np.random.default_rng(0).integers(0, 256, (4, 4, 4))
    samples[..., 3] = 255
    found = read(png(samples, 6, 8))
    assert found.converted == ""
    np.testing.assert_array_equal(found.pixels, samples[..., :3])


def test_bgr_files_are_swapped_back():
    data, samples = rgb_png()
    np.testing.assert_array_equal(read(data, "bgr").pixels, samples[..., ::-1])
    with pytest.raises(ConfigError, match="grb"):
        read(data, "grb")


def test_metadata_never_reaches_pillow(monkeypatch):
    """Text beyond Pillow's limits, a broken profile, gamma, EXIF rotation and animation."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    bomb = b"k\0\0" + zlib.compress(bytes(PngImagePlugin.MAX_TEXT_CHUNK + 10))
    extra = [(b"zTXt", bomb), (b"iCCP", b"x"), (b"gAMA", b""), (b"eXIf", exif), (b"acTL", bytes(8))]
    data, samples = rgb_png(extra=extra)
    found = read(data)
    np.testing.assert_array_equal(found.pixels, samples)
    assert found.converted == "first image of an animation"


@pytest.mark.parametrize("interlaced", [False, True])
def test_cut_at_every_length(interlaced):
    data, _ = rgb_png((9, 8), interlaced=interlaced)
    for length in range(len(data)):
        with pytest.raises(ImageError, match=r"a\.png"):
            read(data[:length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_is_either_harmless_or_an_error(source):
    data, samples = rgb_png((17, 13), extra=[(b"tEXt", b"key\0value")])
    bits = source.draw(st.lists(st.integers(0, 8 * len(data) - 1), min_size=1, max_size=3, unique=True))
    broken = bytearray(data)
    for bit in bits:
        broken[bit // 8] ^= 1 << bit % 8
    try:
        found = read(bytes(broken))
    except ImageError:
        return
    np.testing.assert_array_equal(found.pixels, samples)


def test_every_flipped_bit_of_a_palette_image():
    """A palette has no checksum but its chunk's: without it colours would change in silence."""
    index = np.random.default_rng(0).integers(0, 4, (4, 5, 1))
    palette = bytes(range(20, 32))
    data = png(index, 3, 2, extra=[(b"PLTE", palette), (b"tRNS", b"\x40\xff")])
    for bit in range(8 * len(SIGNATURE), 8 * len(data)):
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ImageError):
            read(bytes(broken))


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (1, 5), (9, 3)])
def test_pixel_data_that_end_early_with_every_checksum_right(interlaced, size):
    """Pillow alone returns an image that is black from there on."""
    samples = np.full((*size, 3), 200)
    whole = len(zlib.decompress(_idat(png(samples, 2, 8, interlaced))))
    np.testing.assert_array_equal(read(png(samples, 2, 8, interlaced)).pixels, samples)
    for cut in range(whole):
        with pytest.raises(ImageError):
            read(png(samples, 2, 8, interlaced, cut=cut))


def _idat(data):
    start = data.index(b"IDAT")
    return data[start + 4 : start + 4 + int.from_bytes(data[start - 4 : start], "big")]


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("pieces", [1, 50])
def test_a_bomb_is_never_inflated(interlaced, pieces):
    """Black pixels, and after them 200 MB that the header knows nothing of."""
    packer = zlib.compressobj()
    body = b"".join(packer.compress(bytes(10**7)) for _ in range(20)) + packer.flush()
    header = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, interlaced)
    step = -(-len(body) // pieces)
    parts = [chunk(b"IDAT", body[i : i + step]) for i in range(0, len(body), step)]
    data = SIGNATURE + b"".join([chunk(b"IHDR", header), *parts, chunk(b"IEND", b"")])
    tracemalloc.start()
    try:
        found = read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert not found.pixels.any()
    assert peak < 8e6


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("level", [0, 9])
def test_black_pixels_longer_than_one_step_of_inflation(missing, level):
    """Whole steps of 1 MiB included, at whose end zlib may hold output back."""
    for width, height in ((1023, 1024), (1100, 2000), (2**21 - 1, 1), (2**20 - 1, 2)):
        raw = bytes((width + 1) * height - missing)
        body = chunk(b"IDAT", zlib.compress(raw, level)) + chunk(b"IEND", b"")
        data = SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)) + body
        if missing:
            with pytest.raises(ImageError, match=r"end early|truncated"):
                read(data)
        else:
            assert read(data).pixels.shape == (height, width, 3)


def test_a_file_too_big_to_be_a_patch():
    check_size((64 << 20) + 800, 100, "a.png")
    with pytest.raises(ImageError, match=r"a\.png has 67,109,665 bytes") as caught:
        check_size((64 << 20) + 801, 100, "a.png")
    assert "at most 67,109,664 bytes" in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png is not a regular file"):
        check_header(tmp_path / "a.png", "a.png", ROOM)


def test_a_black_last_row_is_fine():
    samples = np.full((6, 6, 3), 90)
    samples[-1] = 0
    np.testing.assert_array_equal(read(png(samples, 2, 8)).pixels, samples)


def test_no_pixel_data_and_wrong_filter():
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
    with pytest.raises(ImageError, match="no pixel data"):
        read(SIGNATURE + header + chunk(b"IEND", b""))
    rows = chunk(b"IDAT", zlib.compress(b"\x09" + bytes(6)))
    with pytest.raises(ImageError, match="cannot be decoded"):
        read(SIGNATURE + header + rows + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "empty"),
        (b"\x89PNG", "inside its header"),
        (SIGNATURE + b"\0\0", "inside its header"),
        (b"\xff\xd8\xff\xe0abcdefgh", "is a JPEG, named .png"),
        (b"II*\0aaaaaaaa", "a TIFF"),
        (b"GIF89a......", "a GIF"),
        (b"BM..........", "a BMP"),
        (b"RIFF....WEBPVP8 ", "a WebP"),
        (b"PK\x03\x04........", "a ZIP archive"),
        (b" <!DOCTYPE html><html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"hello, world, no image", "a text file"),
        (bytes(100), "zero bytes"),
        (b"\x89PNG\n\x1a\n\0\0\0\rIHDR", "text-mode transfer"),
        (bytes(range(128, 160)), "first bytes are 80 81"),
    ],
)
def test_what_is_no_png(data, says):
    with pytest.raises(ImageError, match=r"a\.png") as caught:
        read_header(data, "a.png", ROOM)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("width", "height", "depth", "color", "says"),
    [
        (0, 5, 8, 2, "size of 0 × 5"),
        (5, 2**31, 8, 2, "size of"),
        (5, 5, 3, 2, "bit depth 3"),
        (5, 5, 4, 2, "does not have"),
        (5, 5, 16, 3, "does not have"),
        (5, 5, 8, 5, "colour type 5"),
        (20_000, 10_000, 8, 2, "--max-pixels"),
    ],
)
def test_headers_that_are_refused(width, height, depth, color, says):
    data = SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    with pytest.raises(ImageError) as caught:
        read_header(data, "a.png", ROOM)
    assert says in str(caught.value)


def test_check_header_reads_little_and_names_what_fails(tmp_path):
    data, _ = rgb_png((24, 20))
    path = tmp_path / "a.png"
    path.write_bytes(data[:40])
    header = check_header(path, "a.png", ROOM)
    assert (header.width, header.height, header.bit_depth, header.color_type) == (20, 24, 8, 2)
    for bad in (tmp_path, tmp_path / "gone.png"):
        with pytest.raises(ImageError, match=r"b\.png cannot be read"):
            check_header(bad, "b.png", ROOM)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 180), (150, 333), (256, 256), (70, 61)])
def test_resize_and_crop_as_torchvision(size, interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.CenterCrop(224)(v2.Resize(256, mode)(Image.fromarray(pixels)))
    np.testing.assert_array_equal(resize_and_crop(pixels, 256, 224, interpolation), np.asarray(theirs))


def test_resize():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    assert resize(pixels, (5, 9), "bilinear") is pixels
    small = resize(pixels, (3, 4), "bicubic")
    assert small.shape == (3, 4, 3)
    assert torch.from_numpy(small).dtype == torch.uint8  # warns if not writable
    with pytest.raises(ConfigError, match="bilnear"):
        resize(pixels, (3, 4), "bilnear")
    with pytest.raises(ConfigError, match="crop of 9"):
        resize_and_crop(pixels, 8, 9, "bilinear")


def test_prepare_chooses():
    from featstore.images import Preprocessing

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    half = (0.5, 0.5, 0.5)
    whole = Preprocessing(16, None, "bilinear", half, half)
    np.testing.assert_array_equal(prepare(pixels, whole), resize(pixels, (16, 16), "bilinear"))
    centre = Preprocessing(20, 16, "bilinear", half, half)
    np.testing.assert_array_equal(prepare(pixels, centre), resize_and_crop(pixels, 20, 16, "bilinear"))


def test_importing_images_imports_no_torch():
    code = "import sys, featstore.images, featstore.quality; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_saved_by_pillow():
    images = [Image.new(mode, (5, 4), 1) for mode in ("1", "L", "RGB", "RGBA", "LA", "I;16")]
    for image in [*images, images[2].convert("P")]:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        assert read(buffer.getvalue()).pixels.shape == (4, 5, 3)
