"""From a file to what a forward pass and the store need of it; runs in threads."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import ImageError
from featstore.images import Preprocessing, check_size, decode, prepare
from featstore.quality import quality


@dataclass(frozen=True, slots=True)
class Loaded:
    """One patch, read once.

    Attributes:
        pixels: (H, W, 3) uint8, as the backbone wants them; empty once they are used.
        quality: (8,) float32, `quality.QUALITY_COLUMNS`.
        stat: (2,) int64: size in bytes and modification time in ns of the file as it was read.
        sha256: (32,) uint8, of the file's bytes.
        converted: How the pixels became 8-bit RGB; empty if they were.
    """

    pixels: NDArray[np.uint8]
    quality: NDArray[np.float32]
    stat: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    converted: str


@dataclass(frozen=True, slots=True)
class Raw:
    """A file's bytes and its modification time in ns, from one opening of it."""

    data: bytes
    mtime_ns: int


def read(folder: Path, path: str, max_pixels: int) -> Raw:
    """Read one file.

    Raises:
        ImageError: The file is gone, unreadable, or larger than any image of ``max_pixels``.
    """
    try:
        with open(folder / path, "rb") as file:
            state = os.fstat(file.fileno())
            check_size(state.st_size, max_pixels, path)
            return Raw(file.read(), state.st_mtime_ns)
    except OSError as error:
        raise ImageError(
            f"a patch cannot be read ({error.strerror})",
            where=str(folder / path),
            fix="check that the folder is still there and nobody is moving its files",
        ) from error


def load(raw: Raw, path: str, preprocessing: Preprocessing, channel_order: str, max_pixels: int) -> Loaded:
    """Decode and resize one patch.

    Raises:
        ImageError: The file is no image that can be used.
    """
    decoded = decode(raw.data, path, channel_order, max_pixels)
    return Loaded(
        pixels=prepare(decoded.pixels, preprocessing),
        quality=quality(decoded.pixels),
        stat=np.array([len(raw.data), raw.mtime_ns], np.int64),
        sha256=np.frombuffer(hashlib.sha256(raw.data).digest(), np.uint8),
        converted=decoded.converted,
    )
