"""Seconds and peak memory of reading N patch names: `python tests/bench/bench_scan.py [N]`."""

from __future__ import annotations

import random
import resource
import sys
import time
from collections.abc import Iterator

from featstore.cohort.patches import build_table
from featstore.config import PatchesConfig


def names(count: int) -> Iterator[str]:
    """`count` distinct relative paths, 500 patches a slice, 5 slices a stain, 3 stains a case."""
    for i in range(count):
        slice_number, patch = divmod(i, 500)
        case, rest = divmod(slice_number, 15)
        stain = ("h&e", "melan", "sox10")[rest // 5]
        yield f"{case:03d}/{stain}/case_{case:03d}_match_{rest % 5 + 1}_{stain}_patch{patch}.png"


def main(count: int) -> None:
    """Time `build_table` on shuffled names."""
    paths = list(names(count))
    random.Random(0).shuffle(paths)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    start = time.perf_counter()
    table = build_table(paths, PatchesConfig()).table
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{len(table):,} patches in {seconds:.2f} s; peak {peak:.0f} MiB, {before:.0f} MiB of it before")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64_000)
