"""PNG bytes → RGB pixels: what is accepted, how it is converted, and how it is resized.

No torch, so that checking a folder starts at once; the decoders release the GIL while
they work, so that threads suffice.

Decoders by themselves neither verify the checksums of the pixel data nor all mind an
image that ends early without a word, and they have limits on metadata that raise on
good pixels. So the file is walked here, chunk by chunk: every CRC is verified, the
end chunk must be there, and a decoder (`featstore.decoders`) sees the header, the
palette and the pixel data alone. Gamma, ICC profiles, EXIF orientation and text are
thereby ignored: pixel values are taken as stored. Of an animated PNG the default
image (the one that any viewer shows) is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featstore.decoders import decode_samples, decoder_name
from featstore.errors import ConfigError, ImageError
from featstore.png import (
    GREY,
    GREY_ALPHA,
    PALETTE,
    RGB,
    RGB_ALPHA,
    SAMPLES,
    Chunks,
    PngHeader,
    check_header,
    check_size,
    checked_chunks,
    read_header,
    refuse,
)

__all__ = [
    "COLOR_POLICY",
    "NATIVE_SMALLEST",
    "RESIZE_IMPLEMENTATION",
    "Decoded",
    "PngHeader",
    "check_header",
    "check_size",
    "decode",
    "decoder_name",
    "prepare",
    "read_header",
    "resize",
    "resize_and_crop",
]

Pixels = NDArray[np.uint8]

# Both texts are part of the fingerprint: change them with what they describe.
COLOR_POLICY = "grey to rgb, palette to rgb, alpha over white, 16-bit high byte, gamma and ICC ignored; v1"
RESIZE_IMPLEMENTATION = "pillow-uint8-antialias"

# With native sizes: what a backbone is tried with, and the side below which its maps vanish.
NATIVE_TYPICAL, NATIVE_SMALLEST = 224, 32

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Decoded:
    """One decoded patch.

    Attributes:
        pixels: (H, W, 3) uint8 RGB, contiguous and writable.
        header: Of the file.
        converted: What was done to arrive at RGB, e.g. ``grey, 16-bit to 8-bit``; empty if nothing.
    """

    pixels: Pixels
    header: PngHeader
    converted: str


def decode(data: bytes, name: str, channel_order: str, max_pixels: int) -> Decoded:
    """Decodes a whole PNG file to RGB.

    Grey becomes R = G = B (1, 2 and 4 bits stretched to 0…255); palettes are looked up;
    transparency of any kind is laid over white, (a·c + (255 − a)·255) / 255 rounded;
    of 16-bit samples the high byte is taken.

    Args:
        data: The file's bytes.
        name: Named in errors.
        channel_order: ``rgb``, or ``bgr`` if the file holds red and blue swapped; the result is RGB.
        max_pixels: Larger images are refused before anything is allocated.

    Raises:
        ImageError: As `read_header`; also for any damage, a missing end included.
    """
    if channel_order not in ("rgb", "bgr"):
        raise ConfigError(
            f"unknown channel order {channel_order!r}", expected="rgb or bgr", where="images.channel_order"
        )
    header = read_header(data, name, max_pixels)
    chunks = checked_chunks(data, name)
    if header.color_type == PALETTE and not 3 <= len(chunks.palette) <= 768:
        refuse(name, "the palette is missing or of a wrong size")
    stored = decode_samples(header, chunks, name)
    done: list[str] = []
    if header.color_type == PALETTE:
        pixels = _apply_palette(stored, chunks, name, done)
    else:
        pixels = _to_rgb(stored, header, chunks.transparency, name, done)
    if chunks.animated:
        done.append("first image of an animation")
    if channel_order == "bgr":
        pixels = pixels[..., ::-1]
    return Decoded(np.ascontiguousarray(pixels), header, ", ".join(done))


def resize(pixels: Pixels, size: tuple[int, int], interpolation: str) -> Pixels:
    """Resizes with Pillow, antialiased when it shrinks.

    Args:
        pixels: (H, W, 3) uint8.
        size: (height, width) of the result in pixels.
        interpolation: ``nearest | box | bilinear | hamming | bicubic | lanczos``.

    Returns:
        (height, width, 3) uint8; the input itself if it has this size already.

    Raises:
        ConfigError: Unknown interpolation.
    """
    if interpolation not in _FILTERS:
        raise ConfigError(
            f"unknown interpolation {interpolation!r}",
            expected=" | ".join(_FILTERS),
            where="the backbone's preprocessing",
        )
    if pixels.shape[:2] == tuple(size):
        return pixels
    return np.array(Image.fromarray(pixels).resize((size[1], size[0]), _FILTERS[interpolation]))


def resize_and_crop(pixels: Pixels, resize_to: int, crop: int, interpolation: str) -> Pixels:
    """Resizes the shorter side to ``resize_to`` and cuts a square from the centre.

    Source: ``Resize(resize_to)`` and ``CenterCrop(crop)`` of torchvision, rounding included.

    Args:
        pixels: (H, W, 3) uint8.
        resize_to: Pixels.
        crop: Side in pixels, at most ``resize_to``.
        interpolation: As `resize`.

    Returns:
        (crop, crop, 3) uint8.
    """
    if crop > resize_to:
        raise ConfigError(f"a crop of {crop} px does not fit an image of {resize_to} px")
    height, width = pixels.shape[:2]
    if height <= width:
        size = (resize_to, int(resize_to * width / height))
    else:
        size = (int(resize_to * height / width), resize_to)
    resized = resize(pixels, size, interpolation)
    top, left = round((size[0] - crop) / 2), round((size[1] - crop) / 2)
    return np.ascontiguousarray(resized[top : top + crop, left : left + crop])


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded patch to what a backbone takes; `prepare` and `backbones.normalize` apply it.

    Attributes:
        resize: Side in pixels of the square that the whole patch is resized to; with a crop, of the
            shorter side before it. ``native``: each patch keeps its size; ``native32``: its sides
            are rounded to multiples of 32.
        crop: Side of the centre crop in pixels; None for none.
        interpolation: ``bilinear``, ``bicubic``, …
        mean: Per channel (R, G, B), on a 0 to 1 scale.
        std: Per channel.
    """

    resize: int | str
    crop: int | None
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def is_native(self) -> bool:
        """Whether patches of different sizes stay different."""
        return isinstance(self.resize, str)

    @property
    def size(self) -> int:
        """Side of the backbone's input in pixels; with native sizes that of a usual one."""
        if self.crop is not None:
            return self.crop
        return self.resize if isinstance(self.resize, int) else NATIVE_TYPICAL

    def input_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels that the backbone sees of a patch of this size."""
        if self.resize == "native":
            return height, width
        if self.resize == "native32":
            return _rounded(height), _rounded(width)
        return self.size, self.size


def prepare(pixels: Pixels, preprocessing: Preprocessing) -> Pixels:
    """Brings a patch to the size that the backbone takes.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        preprocessing: The backbone's.

    Returns:
        (H, W, 3) uint8 RGB of `Preprocessing.input_size`: the whole patch, or its centre where there
        is a crop.
    """
    if preprocessing.crop is None or isinstance(preprocessing.resize, str):
        size = preprocessing.input_size(*pixels.shape[:2])
        return resize(pixels, size, preprocessing.interpolation)
    return resize_and_crop(pixels, preprocessing.resize, preprocessing.crop, preprocessing.interpolation)


def _rounded(side: int) -> int:
    """To the nearest multiple of 32, at least 32; a side half-way is rounded up."""
    return max(32, (side + 16) // 32 * 32)


def _apply_palette(stored: NDArray[np.generic], chunks: Chunks, name: str, done: list[str]) -> Pixels:
    colors = np.frombuffer(chunks.palette[: len(chunks.palette) // 3 * 3], np.uint8).reshape(-1, 3)
    used = np.bincount(stored.ravel(), minlength=256) > 0
    if used[len(colors) :].any():
        refuse(name, f"a pixel refers to colour {np.flatnonzero(used)[-1]} of {len(colors)} in the palette")
    alpha = np.full(len(colors), 255, np.uint8)
    given = np.frombuffer(chunks.transparency, np.uint8)[: len(colors)]
    alpha[: len(given)] = given
    see_through = bool((used[: len(colors)] & (alpha < 255)).any())
    done.append("palette with transparency over white" if see_through else "palette")
    pixels: Pixels = _over_white(colors, alpha)[stored]
    return pixels


def _to_rgb(
    stored: NDArray[np.generic], header: PngHeader, transparency: bytes, name: str, done: list[str]
) -> Pixels:
    """Grey or RGB samples, with or without alpha, to RGB; appends to `done` what it did."""
    grey = header.color_type in (GREY, GREY_ALPHA)
    if grey:
        done.append("grey")
    alpha: Pixels | None = None
    if header.color_type in (GREY_ALPHA, RGB_ALPHA):
        alpha = stored[..., -1].astype(np.uint8)  # Pillow widens grey + alpha to RGBA where it is 16-bit
    elif transparency:
        alpha = _key_alpha(stored, header, transparency, name)
    samples: Pixels
    if stored.dtype == np.bool_:
        samples = stored.astype(np.uint8) * np.uint8(255)
    elif stored.dtype == np.uint8:
        samples = stored.astype(np.uint8, copy=False)
    else:
        samples = (stored >> 8).astype(np.uint8)  # type: ignore[operator]
    if grey:
        one = samples if samples.ndim == 2 else samples[..., 0]
        samples = np.repeat(one[..., None], 3, axis=2)
    elif samples.shape[2] == 4:
        samples = samples[..., :3]
    if alpha is not None and (alpha < 255).any():
        done.append("alpha over white")
        samples = _over_white(samples, alpha)
    if header.bit_depth == 16:
        done.append("16-bit to 8-bit")
    return samples


def _key_alpha(stored: NDArray[np.generic], header: PngHeader, transparency: bytes, name: str) -> Pixels:
    """Alpha (0 or 255) of a file in which one colour stands for transparent (tRNS of grey and RGB)."""
    if len(transparency) != 2 * SAMPLES[header.color_type]:
        refuse(name, "the transparent colour (tRNS) is damaged")
    key = np.frombuffer(transparency, ">u2")
    if header.color_type == RGB:
        if header.bit_depth == 16:
            # Pillow keeps the high bytes only, and two colours may differ in the low ones.
            raise ImageError(
                f"{name} is 16-bit RGB with one transparent colour",
                expected="8-bit RGB, or an alpha channel",
                where=name,
                fix="save it again without transparency",
            )
        hit = (stored == key).all(axis=2)
    else:
        # Pillow has stretched 1, 2 and 4 bits to 0…255 already, 1 bit to booleans.
        scale = {1: 1, 2: 85, 4: 17}.get(header.bit_depth, 1)
        hit = stored == int(key[0]) * scale
    return np.where(hit, np.uint8(0), np.uint8(255))


def _over_white(color: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> Pixels:
    """(…, 3) colours and (…) alpha to (…, 3); n/255 is never half-way, so (n + 127) // 255 rounds it."""
    a = alpha[..., None].astype(np.uint16)
    return ((a * color + (255 - a) * 255 + 127) // 255).astype(np.uint8)
