"""From a file to what a forward pass and the store need of it; runs in threads."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.extraction.views import make_views
from featstore.images import Preprocessing, check_size, decode
from featstore.quality import quality


@dataclass(frozen=True, slots=True)
class Loaded:
    """One patch, read once.

    Attributes:
        pixels: (V, H, W, 3) uint8, the views as the backbone wants them; empty once they are used.
        quality: (8,) float32, `quality.QUALITY_COLUMNS`.
        stat: (2,) int64: size in bytes and modification time in ns of the file as it was read.
        sha256: (32,) uint8, of the file's bytes.
        converted: How the pixels became 8-bit RGB; empty if they were.
        seconds: How long decoding and all that goes with it took.
    """

    pixels: NDArray[np.uint8]
    quality: NDArray[np.float32]
    stat: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    converted: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Raw:
    """A file's bytes and its modification time in ns, from one opening of it; and how long that took."""

    data: bytes
    mtime_ns: int
    seconds: float = 0.0


@dataclass(frozen=True)
class Views:
    """How many views a patch has, and the seed of the augmented ones."""

    count: int = 1
    seed: int = 0


_PLAIN = Views()


def read(folder: Path, path: str, max_pixels: int) -> Raw:
    """Read one file.

    Raises:
        ImageError: The file is gone, unreadable, or larger than any image of ``max_pixels``.
    """
    started = time.perf_counter()
    try:
        with open(folder / path, "rb") as file:
            state = os.fstat(file.fileno())
            check_size(state.st_size, max_pixels, path)
            return Raw(file.read(), state.st_mtime_ns, time.perf_counter() - started)
    except OSError as error:
        raise ImageError(
            f"a patch cannot be read ({error.strerror})",
            where=str(folder / path),
            fix="check that the folder is still there and nobody is moving its files",
        ) from error


def load(
    raw: Raw,
    path: str,
    preprocessing: Preprocessing,
    channel_order: str,
    max_pixels: int,
    views: Views = _PLAIN,
    key: str = "",
) -> Loaded:
    """Decode and resize one patch, and make its views.

    Args:
        raw: The file.
        path: For messages.
        preprocessing: The backbone's.
        channel_order: ``rgb`` or ``bgr``.
        max_pixels: Larger images are refused.
        views: How many, and their seed.
        key: What tells this patch from all others.

    Raises:
        ImageError: The file is no image that can be used.
    """
    started = time.perf_counter()
    decoded = decode(raw.data, path, channel_order, max_pixels)
    return Loaded(
        pixels=make_views(decoded.pixels, preprocessing, views.count, views.seed, key),
        quality=quality(decoded.pixels),
        stat=np.array([len(raw.data), raw.mtime_ns], np.int64),
        sha256=np.frombuffer(hashlib.sha256(raw.data).digest(), np.uint8),
        converted=decoded.converted,
        seconds=time.perf_counter() - started,
    )
