"""The PNG container: header, chunks, checksums, and whether the pixel data are all there."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from featstore.errors import ImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER_BYTES = 33  # signature 8, chunk length 4, "IHDR" 4, fields 13, CRC 4
MAX_SIDE = 2**31 - 1  # the PNG specification's
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6
_DEPTHS = {
    GREY: (1, 2, 4, 8, 16),
    RGB: (8, 16),
    PALETTE: (1, 2, 4, 8),
    GREY_ALPHA: (8, 16),
    RGB_ALPHA: (8, 16),
}
SAMPLES = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}
_KINDS = (
    (b"\xff\xd8\xff", "a JPEG"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"II+\0", "a BigTIFF"),
    (b"GIF8", "a GIF"),
    (b"BM", "a BMP"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"%PDF", "a PDF"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000"),
    (b"version https://git-lfs", "a Git LFS pointer (its content was never fetched)"),
    (b"\x89PNG", "a PNG whose line ends a text-mode transfer changed"),
)
_SIZE_ALLOWANCE = 64 << 20  # bytes; metadata (profiles, thumbnails, text) have no limit of their own
_BYTES_PER_PIXEL = 8  # the most that PNG has: four samples of 16 bits
# A few hundred kilobytes can inflate to gigabytes: as much goes in, and comes out, in one step.
_STEP_IN, _STEP_OUT = 1 << 16, 1 << 20
_REPAIR = "copy the file again from its source, or remove it; images.on_bad_image: skip leaves it out"


@dataclass(frozen=True)
class PngHeader:
    """What a PNG says of itself in its first 33 bytes.

    Attributes:
        width: Pixels.
        height: Pixels.
        bit_depth: Bits a sample: 1, 2, 4, 8 or 16.
        color_type: 0 grey, 2 RGB, 3 palette, 4 grey + alpha, 6 RGB + alpha.
        interlaced: Stored in Adam7 order.
    """

    width: int
    height: int
    bit_depth: int
    color_type: int
    interlaced: bool


def read_header(data: bytes, name: str, max_pixels: int) -> PngHeader:
    """Reads and validates the header from a file's first bytes (33 suffice).

    Args:
        data: The file, or its beginning.
        name: Named in errors.
        max_pixels: Larger images (width × height) are refused.

    Raises:
        ImageError: Empty, not a PNG, cut off, damaged, of no size, or too large.
    """
    if not data:
        refuse(name, "the file is empty (0 bytes)")
    if not data.startswith(SIGNATURE):
        if SIGNATURE.startswith(data):
            refuse(name, f"the file ends after {len(data)} bytes, inside its header")
        raise ImageError(
            f"{name} is {_looks_like(data)}, named .png"
            if name.lower().endswith(".png")
            else f"{name} is {_looks_like(data)}",
            expected="a PNG file",
            where=name,
            fix="convert it to PNG (renaming does not), or remove it",
        )
    if len(data) < HEADER_BYTES:
        refuse(name, f"the file ends after {len(data)} bytes, inside its header")
    length, kind = struct.unpack(">I4s", data[8:16])
    (crc,) = struct.unpack(">I", data[29:33])
    if length != 13 or kind != b"IHDR" or zlib.crc32(data[12:29]) != crc:
        refuse(name, "the header (IHDR) is damaged")
    width, height, bit_depth, color_type = struct.unpack(">IIBB", data[16:26])
    header = PngHeader(width, height, bit_depth, color_type, interlaced=data[28] == 1)
    if not 0 < header.width <= MAX_SIDE or not 0 < header.height <= MAX_SIDE:
        refuse(name, f"the header gives a size of {header.width} × {header.height} px")
    if header.bit_depth not in _DEPTHS.get(header.color_type, ()) or data[26:28] != b"\0\0" or data[28] > 1:
        kinds = f"colour type {header.color_type}, bit depth {header.bit_depth}"
        refuse(name, f"the header gives a combination that PNG does not have ({kinds})")
    if header.width * header.height > max_pixels:
        raise ImageError(
            f"{name} has {header.width:,} × {header.height:,} = {header.width * header.height:,} pixels",
            expected=f"at most {max_pixels:,} pixels",
            where=name,
            fix="is it a whole slide? if it is meant to be a patch, raise --max-pixels",
        )
    return header


def check_header(path: Path, name: str, max_pixels: int) -> PngHeader:
    """`read_header` of a file, of which 64 bytes are read whatever its size.

    Raises:
        ImageError: As `read_header`; also if the file cannot be opened or is no regular file.
    """
    try:
        with open(path, "rb", buffering=0, opener=open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError(
                    f"{name} is not a regular file (a pipe or a device?)",
                    expected="a PNG file",
                    where=str(path),
                    fix="remove it from the folder of patches",
                )
            return read_header(file.read(64), name, max_pixels)
    except OSError as error:
        raise ImageError(
            f"{name} cannot be read: {error.strerror or error}",
            expected="a readable PNG file",
            where=str(path),
            fix="has it been moved, or is its disk not mounted? check its permissions",
        ) from error


def check_size(size: int, max_pixels: int, name: str) -> None:
    """Refuses a file too big to be a patch, before it is read into memory.

    Args:
        size: Of the file in bytes.
        max_pixels: Larger images (width × height) are refused anyway.
        name: Named in errors.

    Raises:
        ImageError: More than 64 MiB and 8 bytes a pixel.
    """
    limit = _SIZE_ALLOWANCE + _BYTES_PER_PIXEL * max_pixels
    if size > limit:
        most = f"64 MiB, and {_BYTES_PER_PIXEL} for each of {max_pixels:,} pixels"
        raise ImageError(
            f"{name} has {size:,} bytes",
            expected=f"at most {limit:,} bytes ({most})",
            where=name,
            fix="save it again without its metadata; if it is meant to be that large, raise --max-pixels",
        )


def open_at_once(path: str, flags: int) -> int:
    """Opens without waiting, for `open`: a pipe that nobody writes to would hold the opener for ever."""
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except BlockingIOError:  # a file server is taking back the right to keep a file to itself
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, flags)


@dataclass(frozen=True)
class Chunks:
    """The parts of a file that make its pixels.

    Attributes:
        palette: R, G, B bytes of each colour (PLTE).
        transparency: Alpha of the palette, or the one transparent colour (tRNS).
        pixel_data: The IDAT chunks, whole.
        animated: The file is an animated PNG.
    """

    palette: bytes
    transparency: bytes
    pixel_data: list[memoryview]
    animated: bool


def checked_chunks(data: bytes, name: str) -> Chunks:
    """Verifies every chunk's CRC up to the end chunk and keeps those that make the pixels."""
    found: dict[bytes, bytes] = {}
    pixel_data: list[memoryview] = []
    view = memoryview(data)
    position, end = len(SIGNATURE), len(data)
    while True:
        if end - position < 12:
            refuse(name, f"the file is cut off: it ends after {end:,} bytes without its end chunk (IEND)")
        length = int.from_bytes(view[position : position + 4], "big")
        stop = position + 12 + length
        if stop > end:
            refuse(name, f"the file is cut off (or damaged) in or after byte {position:,} of {end:,}")
        kind = bytes(view[position + 4 : position + 8])
        if zlib.crc32(view[position + 4 : stop - 4]) != int.from_bytes(view[stop - 4 : stop], "big"):
            refuse(name, f"the file is damaged: wrong checksum of the chunk at byte {position:,}")
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            pixel_data.append(view[position:stop])
        elif kind in (b"PLTE", b"tRNS", b"acTL"):
            found[kind] = data[position + 8 : stop - 4]
        position = stop
    if not pixel_data:
        refuse(name, "the file holds no pixel data (IDAT)")
    return Chunks(found.get(b"PLTE", b""), found.get(b"tRNS", b""), pixel_data, b"acTL" in found)


def bare_file(header: PngHeader, chunks: Chunks) -> bytes:
    """The same picture as a file of header, palette and pixel data, and nothing else."""
    palette = [_chunk(b"PLTE", chunks.palette)] if header.color_type == PALETTE else []
    return file_of(header, [*palette, *chunks.pixel_data])


def file_of(header: PngHeader, parts: Iterable[bytes | memoryview]) -> bytes:
    """A file of a header, what is given (chunks, whole or in pieces), and the end chunk."""
    fields = struct.pack(
        ">IIBBBBB",
        header.width,
        header.height,
        header.bit_depth,
        header.color_type,
        0,
        0,
        header.interlaced,
    )
    return b"".join([SIGNATURE, _chunk(b"IHDR", fields), *parts, _chunk(b"IEND", b"")])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def check_length(header: PngHeader, chunks: Chunks, name: str) -> None:
    """Raises ImageError unless the pixel data inflate to every byte that the header promises."""
    expected = 0
    for x0, y0, dx, dy in _passes(header.interlaced):
        width, height = -((x0 - header.width) // dx), -((y0 - header.height) // dy)
        if width > 0 and height > 0:
            expected += height * (1 + (width * SAMPLES[header.color_type] * header.bit_depth + 7) // 8)
    try:
        found = _inflated_length(chunks.pixel_data, expected)
    except zlib.error as error:
        refuse(name, f"the pixel data cannot be decoded ({error})")
    if found < expected:
        refuse(name, f"the pixel data end early: {found:,} of {expected:,} bytes")


def _inflated_length(pixel_data: Iterable[memoryview], enough: int) -> int:
    """How many bytes the IDAT chunks inflate to, counted until there are more than enough."""
    inflater = zlib.decompressobj()
    found = 0
    for chunk in pixel_data:
        body = chunk[8:-4]
        for start in range(0, len(body), _STEP_IN):
            rest: bytes | memoryview = body[start : start + _STEP_IN]
            full = True
            while rest or full:  # a full step may have left output behind with no input to show for it
                piece = inflater.decompress(rest, _STEP_OUT)
                found += len(piece)
                if inflater.eof or found > enough:
                    return found
                rest, full = inflater.unconsumed_tail, len(piece) == _STEP_OUT
    return found


def _passes(interlaced: bool) -> tuple[tuple[int, int, int, int], ...]:
    """(x0, y0, dx, dy) of each pass over the image (Adam7, PNG specification section 8.2)."""
    if not interlaced:
        return ((0, 0, 1, 1),)
    return (
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
    )  # fmt: skip


def _looks_like(data: bytes) -> str:
    """What a file that isn't a PNG seems to be, from its first bytes."""
    for magic, kind in _KINDS:
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "a WebP"
    if data[4:8] == b"ftyp":
        return "a HEIF/AVIF or video file"
    if not any(data):
        return "a run of zero bytes (a hole that a crash or a broken copy left)"
    start = data[:64].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head")):
        return "an HTML page (an error page of a download?)"
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "a text file"
    return "no PNG (its first bytes are " + data[:8].hex(" ") + ")"


def refuse(name: str, found: str) -> NoReturn:
    """Raises ImageError for a file that is damaged or incomplete."""
    raise ImageError(f"{name}: {found}", expected="a complete PNG file", where=name, fix=_REPAIR)
