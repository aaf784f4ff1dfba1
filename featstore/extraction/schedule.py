"""In which order patches are computed: those of one size together, where sizes differ.

With one size for all the order is that of the patch table. With native sizes a forward pass takes
patches of one size only, so those of equal size are gathered, within a window that bounds what
waits for its turn in the store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.config import ImagesConfig
from featstore.errors import ImageError
from featstore.extraction.forward import BYTES_A_PIXEL
from featstore.images import NATIVE_SMALLEST, Preprocessing
from featstore.png import check_header

# Patches among which equal sizes are looked for.
WINDOW = 8_192
# Calls that wait for a (network) file system overlap in threads.
_IO_THREADS = 16

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """What is computed, in which order.

    Attributes:
        sizes: (P, 2) height and width in pixels that the backbone sees of every patch.
        rows: (R,) the rows of the pending table that are computed, ascending.
        skipped: (path, reason) of the others.
    """

    sizes: NDArray[np.int64]
    rows: Rows
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def batches(self, forward_size: Callable[[int, int], int], views: int = 1) -> Iterator[Rows]:
        """Rows of one size, as many as one forward pass takes.

        Args:
            forward_size: Patches of this height and width in one forward pass.
            views: Images that each patch becomes.

        Yields:
            (n,) rows; all rows of a window before those of the next.
        """
        if not len(self.rows):
            return
        one_size = bool((self.sizes[self.rows] == self.sizes[self.rows[0]]).all())
        window = len(self.rows) if one_size else WINDOW
        for start in range(0, len(self.rows), window):
            mine = self.rows[start : start + window]
            _, first, kind = np.unique(self.sizes[mine], axis=0, return_index=True, return_inverse=True)
            for bucket in np.argsort(first):
                rows = mine[kind.reshape(-1) == bucket]
                height, width = self.sizes[rows[0]].tolist()
                size = max(1, forward_size(height, width) // views)
                yield from (rows[at : at + size] for at in range(0, len(rows), size))


def plan_schedule(
    paths: Sequence[str],
    folder: Path,
    preprocessing: Preprocessing,
    images: ImagesConfig,
    most_pixels: int,
) -> Schedule:
    """Look at the sizes of all patches, where they matter.

    Args:
        paths: Of the pending patches, below the folder.
        folder: The patches folder.
        preprocessing: What the backbone wants.
        images: What to do about files that cannot be used.
        most_pixels: Patches of more pixels than this are refused with native sizes.

    Raises:
        ImageError: A patch is too large, and ``on_bad_image`` is ``stop``.
    """
    if not preprocessing.is_native:
        size = np.array(preprocessing.input_size(0, 0), np.int64)
        return Schedule(np.broadcast_to(size, (len(paths), 2)), np.arange(len(paths)))

    def look(path: str) -> tuple[int, int, str]:
        try:
            header = check_header(folder / path, path, images.max_pixels)
        except ImageError as error:
            return 0, 0, error.reason(path)
        return header.height, header.width, ""

    with ThreadPoolExecutor(_IO_THREADS) as pool:
        found = list(pool.map(look, paths, chunksize=256))
    sizes = np.zeros((len(paths), 2), np.int64)
    skipped, giants, keep = [], [], np.ones(len(paths), bool)
    for row, (path, (height, width, reason)) in enumerate(zip(paths, found, strict=True)):
        if not reason:
            sizes[row] = preprocessing.input_size(height, width)
            if int(sizes[row].min()) < NATIVE_SMALLEST:
                reason = f"{width} × {height} px: a side is below {NATIVE_SMALLEST} px"
            elif int(sizes[row].prod()) > most_pixels:
                reason = f"{width} × {height} px are more than {most_pixels:,} pixels"
                giants.append((path, reason))
        if reason:
            keep[row] = False
            skipped.append((path, reason))
    if giants and images.on_bad_image == "stop":
        shown = "\n".join(f"    {path}: {reason}" for path, reason in giants[:10])
        raise ImageError(
            f"{len(giants):,} patches are too large for a forward pass at their own size:\n{shown}",
            expected=f"at most {most_pixels:,} pixels (extract.native_pixels)",
            where=str(folder),
            fix="raise --native-pixels where there is memory, resize all patches (--resize 224), "
            "or leave these out with --on-bad-image skip (they are listed)",
        )
    return Schedule(sizes, np.flatnonzero(keep), skipped)


def affordable_pixels(native_pixels: int | str, free_bytes: int, compute_dtype: str) -> int:
    """The largest patch that is computed at its own size.

    Args:
        native_pixels: The setting; ``auto``: what half of the free memory allows.
        free_bytes: Of the device.
        compute_dtype: Of the forward pass.
    """
    if native_pixels != "auto":
        return int(native_pixels)
    return free_bytes // 2 // BYTES_A_PIXEL[compute_dtype]
