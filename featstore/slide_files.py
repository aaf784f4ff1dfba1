"""One image of a slice: its file → a small RGB picture.

Never more is decoded than is needed: large JPEGs at a fraction of their size, whole-slide files at
the level that suffices.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featstore.cohort.tables import printable
from featstore.errors import FeatstoreError, first_line

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
# Those of them that may be pyramids, and what only OpenSlide reads.
_PERHAPS_SLIDES = frozenset({".tif", ".tiff"})
WHOLE_SLIDES = frozenset({".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide"})
# Pixels that are decoded of one image: 20,000 × 20,000, 1.2 GB as RGB.
MOST_PIXELS = 400_000_000
# A vendor's name for files that are no scanner's own: what their first level is, nobody says.
_GENERIC = "generic-tiff"
_GLOBAL = threading.Lock()


class SlideError(FeatstoreError):
    """An image of a slice that is not there or cannot be read."""


@dataclass(frozen=True, eq=False)
class ReadSlide:
    """What was read of a file.

    Attributes:
        pixels: RGB, scaled down.
        file_size: Width and height in the file, at full resolution.
        knows_scale: Whether the full resolution is level 0, as in a scanner's own file.
    """

    pixels: Image.Image
    file_size: tuple[int, int]
    knows_scale: bool


def read_slide(path: Path, max_side: int, max_pixels: int = MOST_PIXELS) -> ReadSlide:
    """Read a slice's image so that it fits a square; it is never scaled up.

    Transparency is laid over white; of 16-bit samples the high byte is taken; EXIF orientation and
    colour profiles are ignored, as they are in patches.

    Args:
        path: A picture or a whole-slide file.
        max_side: Side of the square in pixels.
        max_pixels: More are not decoded.

    Raises:
        SlideError: It is missing, damaged, too large, or needs OpenSlide.
    """
    suffix = path.suffix.lower()
    name = printable(path.name)
    try:
        if not path.is_file():
            raise SlideError(
                f"{name} is not there", expected="a file", where=str(path), fix="check images.slides"
            )
        with _own_limit():
            if suffix in WHOLE_SLIDES:
                return _with_openslide(_openslide(name), path, max_side, max_pixels)
            if suffix in _PERHAPS_SLIDES:
                openslide = _openslide(None)
                if openslide is not None and openslide.OpenSlide.detect_format(str(path)):
                    return _with_openslide(openslide, path, max_side, max_pixels)
            if suffix in PICTURES:
                return _with_pillow(path, max_side, max_pixels)
    except FeatstoreError:
        raise
    # Decoders raise errors of any kind on damaged files.
    except Exception as error:
        what = "memory does not suffice" if isinstance(error, MemoryError) else first_line(error)
        raise SlideError(
            f"{name} cannot be read: {what}",
            expected="an intact image",
            where=str(path),
            fix="open it in another program, and save or copy it again",
        ) from error
    raise SlideError(
        f"{name} is of no known kind",
        expected=" ".join(sorted(PICTURES | WHOLE_SLIDES)),
        where=str(path),
        fix="save it as one of these",
    )


def _fitted(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """The size that fits a square, in proportion; never larger."""
    factor = min(1.0, max_side / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _check_pixels(pixels: int, max_pixels: int, path: Path) -> None:
    if pixels > max_pixels:
        raise SlideError(
            f"{printable(path.name)} has {pixels:,} pixels to decode",
            expected=f"at most {max_pixels:,}",
            where=str(path),
            fix="save it smaller and say so (images.slides_downsample), save it as a pyramid (for which "
            "`pip install 'featstore[slides]'`), or raise images.max_pixels",
        )


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's limit on pixels, which is the whole process's, off: `_check_pixels` has ours."""
    with _GLOBAL:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _with_pillow(path: Path, max_side: int, max_pixels: int) -> ReadSlide:
    with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
        full = image.size
        fitted = _fitted(full, max_side)
        # A progressive JPEG is held whole, whatever fraction of it is wanted.
        held = image.size if image.info.get("progressive") or image.info.get("progression") else None
        # The box is what of the decoded fraction the image takes: its last row may be less than a pixel.
        drafted = image.draft(None, fitted) if image.format == "JPEG" else None
        _check_pixels(int(np.prod(held or image.size, dtype=np.int64)), max_pixels, path)
        box = drafted[1] if drafted else (0, 0, *image.size)
        image.load()
        rgb = _to_rgb(image)
    small = rgb if rgb.size == fitted else rgb.resize(fitted, Image.Resampling.LANCZOS, box, reducing_gap=2)
    return ReadSlide(small, full, knows_scale=False)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are {'integers' if image.mode == 'I' else 'fractions'} of 32 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _openslide(name: str | None) -> Any:
    """The module; where it cannot be had, None, or an error if a file's name is given."""
    try:
        return importlib.import_module("openslide")
    except (ImportError, OSError) as error:  # OSError: the package is there, its library is not
        if name is None:
            return None
        raise SlideError(
            f"{name} is a whole-slide file, and OpenSlide is not installed",
            expected="the packages openslide-python and openslide-bin",
            where="images.slides",
            fix="pip install 'featstore[slides]', or save the image as JPEG",
        ) from error


def _with_openslide(openslide: Any, path: Path, max_side: int, max_pixels: int) -> ReadSlide:
    with openslide.OpenSlide(str(path)) as slide:
        full: tuple[int, int] = slide.dimensions
        fitted = _fitted(full, max_side)
        level = slide.get_best_level_for_downsample(max(full) / max(fitted))
        size: tuple[int, int] = slide.level_dimensions[level]
        _check_pixels(size[0] * size[1], max_pixels, path)
        knows = slide.properties.get(openslide.PROPERTY_NAME_VENDOR) != _GENERIC
        rgb = _to_rgb(slide.read_region((0, 0), level, size))
    small = rgb if size == fitted else rgb.resize(fitted, Image.Resampling.LANCZOS, reducing_gap=2)
    return ReadSlide(small, full, knows)
