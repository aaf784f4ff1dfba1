"""The pixels of a store's patches, decoded by threads ahead of who reads them."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.augmentation import Augmentation, augment
from featstore.config import ImagesConfig
from featstore.errors import FeatstoreError, ImageError
from featstore.extraction.loading import Raw, decoded, read
from featstore.images import Preprocessing, prepare

# What a thread is given at once, in pixels: of small patches several, as handing over has its price.
_PIXELS_A_JOB = 1 << 17


@dataclass(frozen=True)
class Chunk:
    """Patches of one size whose pixels are wanted together.

    Attributes:
        rows: (n,) rows of `Store.table`.
        augmentation: How far variants may be from the patches; None: plain.
        seed: Of whatever is drawn; a patch's draws depend on this and its row alone.
    """

    rows: NDArray[np.int64]
    augmentation: Augmentation | None = None
    seed: tuple[int, ...] = ()


class _Done(NamedTuple):
    """What a thread says of its patches: how long they took, and which are others than were embedded."""

    seconds: float
    changed: list[str]


class _Pending(NamedTuple):
    """A chunk in the making."""

    pixels: NDArray[np.uint8]
    jobs: list[Future[_Done]]


class PatchPixels:
    """The pixels of patches as their backbone sees them, plain or augmented.

    Plain ones are bit for bit those that extraction feeds the backbone.

    Args:
        table: `Store.table`, of all cases or of some.
        folder: Of the patches.
        images: How files are read.
        preprocessing: The backbone's.
        threads: That read and decode.
        ahead: Bytes of pixels that are decoded ahead at most; at least the next chunk is.
        digests: The sha256 of files as they were embedded, by path; those of other files are not looked at.

    Attributes:
        seconds: What the threads spent on the chunks that were read so far, all together.
        waited: Seconds in which the reader waited for pixels.
        changed: Paths of files that are others now than were embedded, among those read so far.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        folder: Path,
        images: ImagesConfig,
        preprocessing: Preprocessing,
        threads: int,
        ahead: int = 64 << 20,
        digests: Mapping[str, bytes] | None = None,
    ) -> None:
        self.seconds, self.waited = 0.0, 0.0
        self.changed: set[str] = set()
        self._folder, self._images, self._preprocessing = folder, images, preprocessing
        self._threads, self._ahead, self._digests = threads, ahead, dict(digests or {})
        self._index, self._paths = table.index, table["path"].tolist()
        self._sizes = self._input_sizes(table) if preprocessing.is_native else None
        # Of files that are as they were embedded: size and time, so that they are hashed once.
        self._unchanged: dict[str, tuple[int, int]] = {}
        self._pools: set[ThreadPoolExecutor] = set()
        self._closed = False

    def _input_sizes(self, table: pd.DataFrame) -> NDArray[np.int64]:
        found, number = np.unique(
            table[["height", "width"]].to_numpy(np.int64), axis=0, return_inverse=True
        )
        seen = [self._preprocessing.input_size(height, width) for height, width in found.tolist()]
        return np.array(seen, np.int64).reshape(-1, 2)[number.ravel()]

    def size_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Height and width in pixels that the backbone sees of each patch.

        Args:
            rows: (n,) rows of `Store.table`.

        Returns:
            (n, 2) height, width.

        Raises:
            IndexError: A row is not in the table.
        """
        places = self._places(rows)
        if self._sizes is not None:
            return self._sizes[places]
        return np.full((len(places), 2), self._preprocessing.size, np.int64)

    def _places(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of the store's table stand in ours."""
        places = np.asarray(self._index.get_indexer(pd.Index(rows)), np.int64)
        if (places < 0).any():
            raise IndexError(f"rows {np.asarray(rows)[places < 0][:5].tolist()} are not in the table")
        return places

    def read(self, chunks: Iterable[Chunk]) -> Generator[NDArray[np.uint8], None, None]:
        """The pixels of chunks, one after the other.

        Decoding begins with the first chunk that is asked for. Besides the chunk that is handed out, and
        what the reader keeps, at most ``ahead`` bytes of pixels are held, or one chunk. Close the
        generator to stop early: its threads end.

        Args:
            chunks: Consumed as far ahead as they are decoded, and one more.

        Yields:
            (n, H, W, 3) uint8, writable, for each chunk in order.

        Raises:
            ValueError: The patches of a chunk are not of one size, or all was closed meanwhile.
            ImageError: A file is gone, unreadable, damaged, or of another size than was embedded; when
                its chunk is asked for.
            FeatstoreError: Memory does not suffice.
        """
        source = iter(chunks)
        upcoming = next(source, None)
        pending: deque[_Pending] = deque()
        pool = ThreadPoolExecutor(self._threads, "featstore-pixels")
        self._pools.add(pool)
        try:
            while upcoming is not None or pending:
                # The first is what is waited for, those behind it are ahead.
                while upcoming is not None and (
                    len(pending) < 2
                    or sum(each.pixels.nbytes for each in islice(pending, 1, None)) + self._bytes(upcoming)
                    <= self._ahead
                ):
                    pending.append(self._begin(pool, upcoming))
                    upcoming = next(source, None)
                yield self._finished(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            self._pools.discard(pool)

    def _bytes(self, chunk: Chunk) -> int:
        return 3 * int(self.size_of(chunk.rows).prod(axis=1).sum())

    def _begin(self, pool: ThreadPoolExecutor, chunk: Chunk) -> _Pending:
        if self._closed:
            raise ValueError("these pixels were closed")
        sizes = self.size_of(chunk.rows)
        if (sizes != sizes[:1]).any():
            different = np.unique(sizes, axis=0).tolist()
            raise ValueError(f"patches of several sizes (height, width) in one chunk: {different}")
        height, width = sizes[0].tolist() if len(sizes) else (self._preprocessing.size,) * 2
        count = len(chunk.rows)
        try:
            pixels = np.empty((count, height, width, 3), np.uint8)
        except MemoryError as error:
            raise self._no_memory(f"{count} patches of {width} × {height} px") from error
        step = max(1, min(_PIXELS_A_JOB // (height * width), -(-count // self._threads)))
        jobs = [
            pool.submit(self._fill, pixels[i : i + step], chunk, slice(i, i + step))
            for i in range(0, count, step)
        ]
        return _Pending(pixels, jobs)

    def _finished(self, pending: _Pending) -> NDArray[np.uint8]:
        started = time.perf_counter()
        try:
            for job in pending.jobs:
                seconds, changed = job.result()
                self.seconds += seconds
                self.changed.update(changed)
        except CancelledError as error:
            raise ValueError("these pixels were closed") from error
        self.waited += time.perf_counter() - started
        return pending.pixels

    def _fill(self, into: NDArray[np.uint8], chunk: Chunk, part: slice) -> _Done:
        """In a thread: decode some patches of a chunk into their place."""
        started = time.perf_counter()
        rows = chunk.rows[part]
        changed = []
        for target, row, place in zip(into, rows.tolist(), self._places(rows).tolist(), strict=True):
            path = self._paths[place]
            try:
                raw = read(self._folder, path, self._images.max_pixels)
                if self._is_changed(path, raw):
                    changed.append(path)
                target[...] = self._seen(raw, path, chunk, row, target.shape)
            except ImageError as error:
                raise self._unusable(error, path) from error
            except MemoryError as error:
                raise self._no_memory(path) from error
        return _Done(time.perf_counter() - started, changed)

    def _seen(
        self, raw: Raw, path: str, chunk: Chunk, row: int, shape: tuple[int, ...]
    ) -> NDArray[np.uint8]:
        """One patch as the backbone sees it, (H, W, 3)."""
        pixels = decoded(raw, path, self._images.channel_order, self._images.max_pixels).pixels
        if chunk.augmentation is None:
            seen = prepare(pixels, self._preprocessing)
        else:
            rng = np.random.default_rng([*chunk.seed, row])
            seen = augment(pixels, self._preprocessing, chunk.augmentation, rng)
        if seen.shape != shape:
            height, width = pixels.shape[:2]
            raise ImageError(
                f"{path} is {width} × {height} px now", expected="a patch of the size that was embedded"
            )
        return seen

    def _is_changed(self, path: str, raw: Raw) -> bool:
        """Whether a file is another than was embedded."""
        known = self._digests.get(path)
        state = (len(raw.data), raw.mtime_ns)
        if known is None or self._unchanged.get(path) == state:
            return False
        if sha256(raw.data).digest() != known:
            return True
        self._unchanged[path] = state
        return False

    def _unusable(self, error: ImageError, path: str) -> ImageError:
        named = error.found if path in error.found else f"{path}: {error.found}"
        return ImageError(
            named,
            expected=error.expected or "the PNG file that was embedded",
            where=str(self._folder / path),
            fix="bring the file back; or remove it for good and leave it out: featstore extract --prune",
        )

    def _no_memory(self, what: str) -> FeatstoreError:
        return FeatstoreError(
            f"memory ran out while {what} were decoded",
            where=f"{self._threads} threads, {self._ahead >> 20} MB of pixels ahead",
            fix="use fewer --workers, look at fewer patches at once, or free memory",
        )

    def close(self) -> None:
        """End all reading; whoever reads on gets a ValueError."""
        self._closed = True
        for pool in list(self._pools):
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PatchPixels:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
