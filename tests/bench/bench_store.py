"""Reading and writing parts, held against h5py and zarr themselves: `python -m tests.bench.bench_store`.

Each figure is the median of several rounds in which the ways take turns, with a warm page cache.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr

from featstore.store import Slice, StoreWriter, parts
from featstore.store.store import Store
from tests.store.builders import make_spec

DIM = 1024


def make(slices: int, rows: int) -> list[Slice]:
    """Slices of noise."""
    rng = np.random.default_rng(0)
    names = np.array([f"case_1_match_1_h&e_patch{row}.png".encode() for row in range(rows)])
    return [
        Slice(
            "h&e",
            f"match_{i}",
            {
                "features": rng.standard_normal((rows, DIM), np.float32).astype(np.float16),
                "patch": np.arange(rows),
                "quality": rng.random((rows, 8), np.float32),
                "source_name": names,
                "source_stat": np.ones((rows, 2), np.int64),
                "source_sha256": rng.integers(0, 256, (rows, 32)).astype(np.uint8),
            },
        )
        for i in range(slices)
    ]


def read_part(path: Path, items: list[Slice], out: np.ndarray) -> None:
    """Ours: the features of all slices into one array."""
    rows = len(out) // len(items)
    with parts.open_part(path, path.stat().st_size) as reader:
        for i, item in enumerate(items):
            into = out[i * rows : (i + 1) * rows]
            reader.read(item.stain, item.slice_id, "features", rows, into=into)


def read_h5py(path: Path, items: list[Slice], out: np.ndarray) -> None:
    """h5py alone, the same file."""
    rows = len(out) // len(items)
    with h5py.File(path, "r", locking=False) as file:
        for i, item in enumerate(items):
            data = file[f"{item.stain}/{item.slice_id}/features"]
            data.read_direct(out[i * rows : (i + 1) * rows])


def read_zarr(path: Path, items: list[Slice], out: np.ndarray) -> None:
    """zarr alone, the same file."""
    rows = len(out) // len(items)
    with zarr.storage.ZipStore(path, mode="r") as store:
        for i, item in enumerate(items):
            array = zarr.open_array(store, path=f"{item.stain}/{item.slice_id}/features", mode="r")
            out[i * rows : (i + 1) * rows] = array[:]


def take_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each way; the first round, which warms everything, does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(folder: Path, slices: int, rows: int, rounds: int) -> None:
    """One table: `slices` slices of `rows` × DIM float16."""
    items = make(slices, rows)
    source = np.concatenate([item.columns["features"] for item in items])
    out = np.empty_like(source)
    ways: dict[str, Callable[[], Any]] = {"memcpy": lambda: np.copyto(out, source)}
    paths = {}
    for file_format, read in (("hdf5", read_h5py), ("zarr", read_zarr)):
        data, suffix = parts.encode(file_format, items, {})
        path = paths[file_format] = folder / f"{slices}{suffix}"
        path.write_bytes(data)
        alone = "h5py" if file_format == "hdf5" else "zarr"
        ways[f"ours, {file_format}"] = lambda path=path: read_part(path, items, out)
        ways[f"{alone} alone"] = lambda path=path, read=read: read(path, items, out)
    for way in ways.values():
        out[:] = 0
        way()
        assert np.array_equal(out, source)
    for file_format in paths:
        writer = StoreWriter(folder / f"{file_format}{slices}", make_spec(dim=DIM), {}, file_format)
        writer.commit("1", items)
        store = Store.open(writer.path)
        assert np.array_equal(np.sort(store.bag("1").features[:, 0]), np.sort(source[:, 0]))
        ways[f"Store.bag, {file_format}"] = lambda store=store: store.bag("1")
    for file_format in paths:
        ways[f"encode, {file_format}"] = lambda f=file_format: parts.encode(f, items, {})
    print(f"{slices} × ({rows}, {DIM}) float16, {source.nbytes / 1e6:.0f} MB:")
    for name, seconds in take_turns(ways, rounds).items():
        print(f"  {name:<16}{seconds * 1e3:9.2f} ms{source.nbytes / seconds / 1e9:8.2f} GB/s")


def main(rounds: int) -> None:
    """One large slice, and many of usual size."""
    with tempfile.TemporaryDirectory(prefix="featstore-bench-") as folder:
        compare(Path(folder), 1, 10_000, rounds)
        compare(Path(folder), 300, 500, rounds)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
