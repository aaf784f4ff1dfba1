"""The pixel data of a PNG → samples: by libdeflate and libspng where they are installed, else by Pillow.

Both give the same samples, so which one was used is no part of the fingerprint. The
fast one (optional package imagecodecs) inflates with libdeflate, which also verifies
the length and the stream's own checksum; libspng then undoes the row filters, for
which it is given the inflated rows as a PNG of stored blocks. Together they take half of Pillow's
time on tissue. It takes the common kinds (8 bits a sample, not interlaced) and knows
no excuse: whatever it does not take, or finds wrong with a file, is left to Pillow,
whose word is final. So there is one set of refusals and of their reasons.
"""

from __future__ import annotations

import functools
import importlib
import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL.PngImagePlugin import PngImageFile

from featstore.png import (
    GREY,
    PALETTE,
    RGB,
    RGB_ALPHA,
    SAMPLES,
    Chunks,
    PngHeader,
    bare_file,
    check_length,
    file_of,
    refuse,
)

Samples = NDArray[np.generic]
Rows = bytes | bytearray | memoryview

# Palettes are taken for grey: one byte a pixel, that is looked up later.
_FAST = {GREY: GREY, PALETTE: GREY, RGB: RGB, RGB_ALPHA: RGB_ALPHA}
# Rows are given to libspng in strips that stay in a core's own cache.
STRIP_BYTES = 256 << 10
# libdeflate needs all rows in memory at once. Beyond this zlib inflates strip by strip, so that of
# a giant there is nothing in memory but its file and its pixels.
WHOLE_BYTES = 32 << 20
# What deflate packs best inflates to a thousand times as much.
STEP_BYTES = 16 << 10
_STORED_BLOCK = 65_535  # bytes, the most that deflate has


def decode_samples(header: PngHeader, chunks: Chunks, name: str) -> Samples:
    """Inflates the pixel data and undoes the row filters.

    Args:
        header: The file's.
        chunks: The file's, checksums verified.
        name: Named in errors.

    Returns:
        (H, W[, channels]) uint8, uint16 for 16-bit grey, bool for 1-bit grey.

    Raises:
        ImageError: The pixel data are damaged or incomplete.
    """
    codecs = _codecs()
    if codecs is not None:
        fast = _with_libspng(codecs, header, chunks)
        if fast is not None:
            return fast
    return _with_pillow(header, chunks, name)


def decoder_name() -> str:
    """What decodes plain 8-bit files here, with versions; for reports."""
    codecs = _codecs()
    if codecs is None:
        return f"Pillow {PIL.__version__}"
    return f"{codecs.deflate_version()}, {codecs.spng_version()} (imagecodecs {codecs.__version__})"


@functools.cache
def _codecs() -> ModuleType | None:
    """The package imagecodecs, if it is there with all that is used of it."""
    try:
        codecs = importlib.import_module("imagecodecs")
    except ImportError:
        return None
    if not (codecs.SPNG.available and codecs.DEFLATE.available):
        return None
    return codecs


def _with_pillow(header: PngHeader, chunks: Chunks, name: str) -> Samples:
    try:
        # PngImageFile and not Image.open: its limits on size are ours to set.
        with PngImageFile(io.BytesIO(bare_file(header, chunks))) as image:
            stored = np.array(image)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error) as error:
        refuse(name, f"the pixel data cannot be decoded ({error})")
    # Where pixel data end early with every checksum right, Pillow leaves the rest black
    # without a word. Rows come in order, so one sample other than 0 in the last row proves
    # them all; only a black last row (or interlacing) needs the data inflated once more.
    if header.interlaced or not stored[-1].any():
        check_length(header, chunks, name)
    return stored


def _with_libspng(codecs: ModuleType, header: PngHeader, chunks: Chunks) -> Samples | None:
    """(H, W[, channels]) uint8; None where this is not a kind to be decoded here, or not in order."""
    if header.bit_depth != 8 or header.interlaced or header.color_type not in _FAST:
        return None
    channels = SAMPLES[header.color_type]
    row_bytes = 1 + header.width * channels
    step = max(1, STRIP_BYTES // row_bytes)
    tops = range(0, header.height, step)
    sizes = [min(step, header.height - top) * row_bytes for top in tops]
    inflate = _inflated_whole if sum(sizes) <= WHOLE_BYTES else _inflated_in_steps
    samples = np.empty((header.height, header.width, channels), np.uint8)
    try:
        # strict: the last step of the generator is the one that verifies the end.
        for top, rows in zip(tops, inflate(codecs, chunks.pixel_data, sizes), strict=True):
            above = top - 1 if top else 0
            # Filters refer to the row above: it leads the strip, unfiltered, and becomes itself again.
            if top:
                rows = b"".join([b"\0", samples[above].tobytes(), rows])
            into = samples[above : top + step]
            strip = replace(header, height=len(into), color_type=_FAST[header.color_type])
            file = _stored_file(codecs, strip, rows)
            codecs.spng_decode(file, out=into if channels > 1 else into[..., 0])
    # imagecodecs raises RuntimeErrors.
    except (RuntimeError, ValueError, EOFError, zlib.error):
        return None
    return samples if channels > 1 else samples[..., 0]


def _inflated_whole(codecs: ModuleType, pixel_data: list[memoryview], sizes: list[int]) -> Iterator[Rows]:
    """Pieces of the given sizes; ValueError, or libdeflate's error, unless they are all there is."""
    bodies = [chunk[8:-4] for chunk in pixel_data]
    stream = bodies[0] if len(bodies) == 1 else memoryview(b"".join(bodies))
    inflated = memoryview(codecs.deflate_decode(stream, out=sum(sizes)))
    if len(inflated) != sum(sizes):
        raise ValueError("too short")
    start = 0
    for size in sizes:
        yield inflated[start : start + size]
        start += size


def _inflated_in_steps(
    codecs: ModuleType, pixel_data: list[memoryview], sizes: list[int]
) -> Iterator[Rows]:
    """As `_inflated_whole`, with little more in memory than one piece."""
    inflater = zlib.decompressobj()
    steps = (
        chunk[start : min(start + STEP_BYTES, len(chunk) - 4)]
        for chunk in pixel_data
        for start in range(8, len(chunk) - 4, STEP_BYTES)
    )
    held = bytearray()

    def inflate_one_step() -> None:
        step = next(steps, None)
        if step is None or inflater.eof:
            raise EOFError
        held.extend(inflater.decompress(step))

    for size in sizes:
        while len(held) < size:
            inflate_one_step()
        yield held[:size]
        del held[:size]
    # zlib verifies the stream's own checksum with its last byte.
    while not inflater.eof and not held:
        inflate_one_step()
    if held:
        raise ValueError("too long")


def _stored_file(codecs: ModuleType, header: PngHeader, rows: Rows) -> bytes:
    """A PNG file of filtered rows, in blocks that are stored and not compressed."""
    view = memoryview(rows)
    body: list[bytes | memoryview] = [b"IDAT", b"\x78\x01"]
    for start in range(0, len(view), _STORED_BLOCK):
        block = view[start : start + _STORED_BLOCK]
        is_last = start + len(block) == len(view)
        body += [struct.pack("<BHH", is_last, len(block), len(block) ^ 0xFFFF), block]
    body.append(struct.pack(">I", codecs.deflate_adler32(view)))
    crc = 0
    for part in body:
        crc = codecs.deflate_crc32(part, crc)
    length = struct.pack(">I", sum(map(len, body)) - 4)
    return file_of(header, [length, *body, struct.pack(">I", crc)])
