"""`featstore drift` on N patches of 1024 features, beside the matrix products that CKA needs.

    OMP_NUM_THREADS=1 python tests/bench/bench_drift.py [--patches 100000 1000000] [--at FOLDER]

Two stores of random float16 features lie in a temporary folder below FOLDER (4 GB a million patches),
three stains, 400 patches a case. Read with a warm cache, each figure that of a fresh process: the
comparison alone (`compare_stores`, without heads, tables and pictures), then the command's files; the
products are XᵀX, YᵀY and XᵀY of the same numbers of rows in float32, 16,384 at a time, nothing else.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
DIM, STAINS, OF_STAIN, ROWS = 1024, ("h&e", "melan", "sox10"), (134, 133, 133), 16_384


def make_stores(root: Path, patches: int) -> None:
    """Two stores of the same patches, the second what the first is and as much noise."""
    from featstore.store import Slice, StoreWriter
    from tests.store.builders import make_spec

    writers = [StoreWriter(root / name, make_spec(dim=DIM), {}) for name in ("a", "b")]
    rng, digest = np.random.default_rng(0), np.zeros(32, np.uint8)
    for case in range(patches // sum(OF_STAIN)):
        of_case = rng.standard_normal(DIM, np.float32)
        both: tuple[list[Slice], list[Slice]] = ([], [])
        for stain, count in zip(STAINS, OF_STAIN, strict=True):
            first = 3 + of_case + rng.standard_normal((count, DIM), np.float32)
            second = first + rng.standard_normal((count, DIM), np.float32)
            columns = {
                "patch": np.arange(1, count + 1),
                "quality": np.zeros((count, 8), np.float32),
                "source_name": np.array(
                    [f"case_{case}_s1_{stain}_patch{n}.png".encode() for n in range(count)]
                ),
                "source_stat": np.zeros((count, 2), np.int64),
                "source_sha256": np.broadcast_to(digest, (count, 32)).copy(),
            }
            for slices, features in zip(both, (first, second), strict=True):
                slices.append(Slice(stain, "s1", {**columns, "features": features.astype(np.float16)}))
        for writer, slices in zip(writers, both, strict=True):
            writer.commit(str(case + 1), slices)


def products(patches: int) -> None:
    """The matrix products alone."""
    import torch

    x, y = torch.randn(ROWS, DIM), torch.randn(ROWS, DIM)
    started = clock()
    for start in range(0, patches, ROWS):
        one, other = x[: patches - start], y[: patches - start]
        for left, right in ((one, one), (other, other), (one, other)):
            torch.mm(left.T, right)
    show("matrix products", started)


def measure(root: Path) -> None:
    """The comparison, then its tables and pictures."""
    from featstore.process import keep_freed_memory
    from featstore.store import Store
    from heads.drift import DriftReport, _written
    from heads.evaluation.drift import compare_stores

    keep_freed_memory()
    started = clock()
    found = compare_stores(Store.open(root / "a"), Store.open(root / "b"))
    show("comparison", started)
    started = clock()
    _written(DriftReport(found, None, (), ()), root / "out")
    show("tables and pictures", started)


def clock() -> tuple[float, float]:
    """Seconds by the wall, and of this process's CPU."""
    return time.perf_counter(), time.process_time()


def show(what: str, started: tuple[float, float]) -> None:
    """Seconds since then, and the process's peak memory so far."""
    wall, cpu = (now - then for now, then in zip(clock(), started, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"  {what:<20}{wall:8.1f} s, {cpu:6.1f} s of CPU   peak {peak:6.0f} MiB", flush=True)


def main() -> None:
    """Make the stores, then every task in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--patches", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--at", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER")
    parser.add_argument("--task", choices=("products", "drift"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task == "products":
        products(given.patches[0])
        return
    if given.task == "drift":
        measure(given.at)
        return
    for patches in given.patches:
        with tempfile.TemporaryDirectory(prefix="featstore-drift-", dir=given.at) as folder:
            started = time.perf_counter()
            make_stores(Path(folder), patches)
            print(
                f"{patches:,} patches x {DIM}, made in {time.perf_counter() - started:.0f} s:", flush=True
            )
            for task in ("products", "drift"):
                command = [
                    sys.executable,
                    __file__,
                    "--task",
                    task,
                    "--at",
                    folder,
                    "--patches",
                    str(patches),
                ]
                subprocess.run(command, check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
