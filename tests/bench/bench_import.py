"""Vectors a second that `featstore import` takes from one .pt file a patch, and what loading costs alone.

`python -m tests.bench.bench_import [N]`: writes N vectors (float16, 1,024 numbers) as `torch.save`
does, reads them all once so that they are in the page cache, then measures an import into a new
store, and `torch.load` of every file with `np.stack`, which is what a script would do.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from featstore.interop.project import import_project
from heads.config import Config

DIM, PER_SLICE, REPEATS = 1024, 250, 3


def write(folder: Path, count: int) -> list[Path]:
    """Vectors of cases of two stains."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    paths = []
    for i in range(count):
        slide, patch = divmod(i, PER_SLICE)
        name = f"case_{slide // 2}_match_1_{('h&e', 'sox10')[slide % 2]}_patch{patch + 1}.pt"
        torch.save(torch.from_numpy(rng.normal(size=DIM).astype(np.float16)), folder / name)
        paths.append(folder / name)
    return paths


def seconds(work: Callable[[int], object]) -> list[float]:
    """Of every repetition."""
    found = []
    for i in range(REPEATS):
        started = time.perf_counter()
        work(i)
        found.append(time.perf_counter() - started)
    return found


def main(count: int) -> None:
    """Print both, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        paths = write(root / "vectors", count)
        for path in paths:
            path.read_bytes()

        def by_import(i: int) -> None:
            project = root / f"project{i}"
            project.mkdir()
            assert import_project(Config(), project, root / "vectors").patches == count

        def by_script(i: int) -> None:
            assert np.stack([torch.load(path).numpy() for path in paths]).shape == (count, DIM)

        load = os.getloadavg()[0]
        times = {"featstore import": seconds(by_import), "torch.load and np.stack": seconds(by_script)}
        print(f"{count:,} vectors of {DIM:,} float16; {os.cpu_count()} cores, load before {load:.1f}")
        for what, found in times.items():
            best, median = min(found), statistics.median(found)
            print(f"  {what:<24} {count / median:>8,.0f} a second (best of {REPEATS}: {count / best:,.0f})")
        ratio = statistics.median(times["torch.load and np.stack"]) / statistics.median(
            times["featstore import"]
        )
        print(f"  ratio {ratio:.1f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
