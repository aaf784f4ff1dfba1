"""In which order patches are computed: those of one size together, where sizes differ.

With one size for all the order is that of the patch table. With native sizes a forward pass takes
patches of one size only, so those of equal size are gathered, within a window that bounds what
waits for its turn in the store.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featstore.backbones import Backbone
from featstore.config import ImagesConfig
from featstore.errors import ImageError
from featstore.extraction.forward import BYTES_A_PIXEL
from featstore.images import NATIVE_SMALLEST
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
        coarse: How many have a feature map of fewer rows or columns than the backbone's grid, whose
            cells then share some.
    """

    sizes: NDArray[np.int64]
    rows: Rows
    skipped: list[tuple[str, str]] = field(default_factory=list)
    coarse: int = 0

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
    backbone: Backbone,
    images: ImagesConfig,
    most_pixels: int,
) -> Schedule:
    """Look at the sizes of all patches, where they matter.

    Args:
        paths: Of the pending patches, below the folder.
        folder: The patches folder.
        backbone: What it wants; with native sizes, whose feature maps must be large enough for its grid.
        images: What to do about files that cannot be used.
        most_pixels: Patches of more pixels than this are refused with native sizes.

    Raises:
        ImageError: A patch is too large, or its feature map too small, and ``on_bad_image`` is ``stop``.
    """
    preprocessing = backbone.preprocessing
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
    maps = _Maps(backbone, sizes)
    small, least = maps.below(1, np.flatnonzero(keep))
    reason = f"a side is below {least} px, too small for {backbone.name}"
    if len(small) and images.on_bad_image == "stop":
        raise _too_small(small, least, paths, found, backbone, folder)
    keep[small] = False
    for row in np.sort(small).tolist():
        skipped.append((paths[row], f"{found[row][1]} × {found[row][0]} px: {reason}"))
    coarse = len(maps.below(backbone.pool, np.flatnonzero(keep))[0]) if backbone.pool > 1 else 0
    return Schedule(sizes, np.flatnonzero(keep), skipped, coarse)


def _too_small(
    rows: Rows,
    least: int,
    paths: Sequence[str],
    found: Sequence[tuple[int, int, str]],
    backbone: Backbone,
    folder: Path,
) -> ImageError:
    shown = "\n".join(
        f"    {paths[row]}: {found[row][1]} × {found[row][0]} px" for row in rows[:10].tolist()
    )
    return ImageError(
        f"{len(rows):,} patches are too small for {backbone.name} at their own size:\n{shown}",
        expected=f"sides of at least {least} px: of smaller patches its feature maps vanish",
        where=str(folder),
        fix=f"resize all patches (--resize {max(32, -(-least // 32) * 32)}), or leave these out with "
        "--on-bad-image skip (they are listed)",
    )


class _Maps:
    """Which patches have small feature maps, found with few trials.

    A trial takes a tenth of a second, so that not every size gets one. A map's rows follow from the
    patch's height alone, as its columns from the width, and a longer side never has fewer.

    Args:
        backbone: Whose maps are meant.
        sizes: (P, 2) heights and widths in px that it sees.
    """

    def __init__(self, backbone: Backbone, sizes: NDArray[np.int64]) -> None:
        self._backbone, self._sizes = backbone, sizes
        self._shorter = sizes.min(axis=1)

    def below(self, cells: int, among: Rows) -> tuple[Rows, int]:
        """Those among these rows whose maps have fewer rows or columns, the smallest first.

        Returns:
            The rows, and the shortest side in px that suffices.
        """
        order = among[np.lexsort((self._sizes[among].max(axis=1), self._shorter[among]))]
        if not len(order):
            return order, 0
        height, width = self._sizes[order[0]].tolist()
        if self._fits(height, width, cells):
            return order[:0], 0
        low, high = self._shorter[order[[0, -1]]].tolist()
        beyond = 64 * cells
        while beyond <= high and not self._fits(beyond, beyond, cells):
            beyond *= 2
        sides = range(low + 1, beyond)
        least = low + 1 + bisect_left(sides, True, key=lambda side: self._fits(side, side, cells))
        small: Rows = order[self._shorter[order] < least]
        return small, least

    def _fits(self, height: int, width: int, cells: int) -> bool:
        return min(self._backbone.map_size(height, width)) >= cells


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
