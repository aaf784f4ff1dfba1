"""Batches of labelled images: decoded by threads, kept in memory, every environment equally often."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featstore.errors import ImageError
from featstore.extraction.loading import decoded, read
from featstore.images import resize
from featstore.png import SIGNATURE
from heads.training.labelled_images import Ints, LabelledImages

_NAMED = 5


class ImageBatches:
    """The pixels of images, all of one size; close it, or use it as a context, to end its threads.

    Args:
        images: Which.
        size: Side in pixels of the square that each whole image is resized to.
        threads: That read and decode.
        memory: Bytes of decoded images that are kept; further images are decoded whenever they are
            asked for.
        interpolation: As `featstore.images.resize`.
    """

    def __init__(
        self, images: LabelledImages, size: int, threads: int, memory: int, interpolation: str = "bilinear"
    ) -> None:
        self.images, self.size = images, size
        self._interpolation = interpolation
        self._threads = threads
        # Pages that are not written to take no memory.
        self._held = np.empty((min(len(images), memory // (3 * size**2)), size, size, 3), np.uint8)
        self._used = 0
        self._place = np.full(len(images), -1, np.int64)
        self._lock = threading.Lock()

    def batch(self, indices: Ints) -> torch.Tensor:
        """The pixels of some images; may be called by several threads at once.

        Args:
            indices: (n,) integers.

        Returns:
            (n, 3, size, size) uint8 RGB, channels_last, in memory of its own.

        Raises:
            ImageError: A file is gone, or no image that can be used; it names all such of the batch.
        """
        pixels = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        places = self._place[indices]
        held = np.flatnonzero(places >= 0)
        pixels[held] = self._held[places[held]]
        missing = np.flatnonzero(places < 0)
        if len(missing):
            self._decode(pixels, indices, missing)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _decode(self, pixels: NDArray[np.uint8], indices: Ints, missing: Ints) -> None:
        """Fill in the missing rows of ``pixels``, and keep them where there is room."""
        failed: dict[Path, str] = {}

        def fill(row: int) -> None:
            path = self.images.paths[indices[row]]
            try:
                pixels[row] = self._load(path)
            except ImageError as error:
                failed[path] = error.reason(str(path))

        # Threads of its own, gone with the batch: whoever keeps images in memory needs them but once.
        with ThreadPoolExecutor(self._threads, "featstore-images") as pool:
            list(pool.map(fill, missing.tolist()))
        if failed:
            raise _unusable(failed)
        with self._lock:
            for row in missing.tolist():
                index = indices[row]
                if self._used < len(self._held) and self._place[index] < 0:
                    self._held[self._used] = pixels[row]
                    self._place[index] = self._used  # last: another thread may look for it already
                    self._used += 1

    def _load(self, path: Path) -> NDArray[np.uint8]:
        """One image at its size in the batch, (size, size, 3)."""
        images, name = self.images, str(path)
        raw = read(path.parent, path.name, images.max_pixels)
        if raw.data.startswith(SIGNATURE):
            pixels = decoded(raw, name, images.channel_order, images.max_pixels).pixels
        else:
            pixels = _jpeg(raw.data, images.max_pixels)
            if images.channel_order == "bgr":
                pixels = np.ascontiguousarray(pixels[..., ::-1])
        return resize(pixels, (self.size, self.size), self._interpolation)

    def endless(
        self, indices: Ints, batch_size: int, seed: int, start_step: int = 0
    ) -> Iterator[NDArray[np.int64]]:
        """Batches of indices without end, every environment equally often.

        In every batch the environments' shares differ by one image at most, and over as many batches as
        there are environments not at all. An environment is gone through in a fresh order each time, a
        small one more often than a large one.

        Args:
            indices: Of the images to be drawn from.
            batch_size: Images a batch.
            seed: Of the order.
            start_step: The batch to begin with: a batch depends on the seed and its number alone.

        Yields:
            (batch_size,) indices, by environment.

        Raises:
            ValueError: There are no indices.
        """
        if not len(indices):
            raise ValueError("no images to draw from")
        environment = self.images.environment[indices]
        pools = [indices[environment == each] for each in np.unique(environment)]
        count, (base, extra) = len(pools), divmod(batch_size, len(pools))
        orders: list[tuple[int, Ints]] = [(-1, pool) for pool in pools]

        def drawn(number: int, place: int) -> int:
            """The image at a place of an environment's endless row."""
            turn, at = divmod(place, len(pools[number]))
            if orders[number][0] != turn:
                rng = np.random.default_rng([seed, number, turn])
                orders[number] = turn, rng.permutation(pools[number])
            return int(orders[number][1][at])

        def places(number: int, step: int) -> int:
            """An environment's images before a step; of what is beyond equal shares each has its turn."""
            return step * base + (step * extra - number + count - 1) // count

        for step in itertools.count(start_step):
            yield np.array(
                [
                    drawn(number, place)
                    for number in range(count)
                    for place in range(places(number, step), places(number, step + 1))
                ],
                np.int64,
            )

    def close(self) -> None:
        """Let the images go; those asked for afterwards are decoded anew."""
        with self._lock:
            self._place[:] = -1
            self._held, self._used = self._held[:0], 0

    def __enter__(self) -> ImageBatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _unusable(failed: dict[Path, str]) -> ImageError:
    """One error for all images of a batch that cannot be used, and what is wrong with each."""
    found = sorted(f"{path}: {reason}" for path, reason in failed.items())
    more = f"\n    … and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    listed = f"{len(found)} images cannot be used:\n    " + "\n    ".join(found[:_NAMED]) + more
    return ImageError(
        found[0] if len(found) == 1 else listed,
        expected="whole PNG or JPEG files, not larger than images.max_pixels",
        where=str(min(failed)),
        fix="copy what is damaged again from its source, or remove it",
    )


def _jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """The pixels of a JPEG as they are stored, RGB; its orientation by EXIF is not heeded."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            width, height = image.size
            if width * height <= max_pixels:
                return np.array(image.convert("RGB"))
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError("neither a PNG nor a JPEG") from error
    except Exception as error:  # Pillow's decoders raise of all kinds
        raise ImageError(f"the JPEG cannot be decoded ({error or type(error).__name__})") from error
    raise ImageError(f"{width:,} × {height:,} pixels; at most {max_pixels:,} are allowed")
