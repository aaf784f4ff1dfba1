"""From a file to what a forward pass and the store need of it; runs in threads."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.errors import FeatstoreError, ImageError
from featstore.extraction.views import make_views
from featstore.images import Decoded, Preprocessing, check_size, decode
from featstore.png import open_at_once, refuse
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
    """Read one file: as much as it has when it is opened, though it may grow meanwhile.

    Raises:
        ImageError: The file is gone, unreadable, no file any more, or larger than any image of
            ``max_pixels``.
        FeatstoreError: Memory does not suffice.
    """
    started = time.perf_counter()
    try:
        with _memory_for(path), open(folder / path, "rb", opener=open_at_once) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise ImageError(
                    f"{path} is not a regular file any more (a pipe or a device?)",
                    expected="a PNG file, as at the start of the run",
                    where=str(folder / path),
                    fix="remove it from the folder of patches",
                )
            check_size(state.st_size, max_pixels, path)
            return Raw(file.read(state.st_size), state.st_mtime_ns, time.perf_counter() - started)
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
        FeatstoreError: Memory does not suffice, or the decoder would end the process.
    """
    started = time.perf_counter()
    with _memory_for(path):
        found = decoded(raw, path, channel_order, max_pixels)
        return Loaded(
            pixels=make_views(found.pixels, preprocessing, views.count, views.seed, key),
            quality=quality(found.pixels),
            stat=np.array([len(raw.data), raw.mtime_ns], np.int64),
            sha256=np.frombuffer(hashlib.sha256(raw.data).digest(), np.uint8),
            converted=found.converted,
            seconds=time.perf_counter() - started,
        )


def decoded(raw: Raw, path: str, channel_order: str, max_pixels: int) -> Decoded:
    """The pixels of one patch at its own size.

    Args:
        raw: The file.
        path: For messages.
        channel_order: ``rgb`` or ``bgr``.
        max_pixels: Larger images are refused.

    Raises:
        ImageError: The file is no image that can be used.
        FeatstoreError: The decoder would end the process.
        MemoryError: As it says.
    """
    with _decoder_errors(path):
        return decode(raw.data, path, channel_order, max_pixels)


@contextmanager
def _memory_for(path: str) -> Iterator[None]:
    """No fault of the file: the run ends, whatever is to be done about bad images."""
    try:
        yield
    except MemoryError as error:
        raise FeatstoreError(
            f"memory ran out while {path} was read and decoded",
            where="extract.workers, extract.batch_size",
            fix="use fewer --workers or a smaller --batch-size, or free memory; then run the same command "
            "again: what was committed is safe",
        ) from error


@contextmanager
def _decoder_errors(path: str) -> Iterator[None]:
    """What a decoding library raises beside the errors that are known of it, with the file's name."""
    try:
        yield
    except (FeatstoreError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        refuse(path, f"the decoder failed ({type(error).__name__}: {error})")
    except BaseException as error:
        # From a thread SystemExit would end the run without a word, perhaps with exit code 0.
        raise FeatstoreError(
            f"the decoder gave up on {path} ({type(error).__name__})",
            where=path,
            fix="remove the file and run the same command again: what was committed is safe",
        ) from error
