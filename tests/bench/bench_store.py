"""Reading and writing parts, held against h5py and zarr themselves: `python -m tests.bench.bench_store`.

Each figure is the median of several rounds in which the ways take turns, with a warm page cache.
`python -m tests.bench.bench_store ratios [ROUNDS]` only reads one case, and says how far from the limits.
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

from featstore.process import keep_freed_memory
from featstore.resident import CaseBags
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
        ways[f"  kept, {file_format}"] = lambda store=store: store.features("1", out)
    for file_format in paths:
        ways[f"encode, {file_format}"] = lambda f=file_format: parts.encode(f, items, {})
    print(f"{slices} × ({rows}, {DIM}) float16, {source.nbytes / 1e6:.0f} MB:")
    for name, seconds in take_turns(ways, rounds).items():
        print(f"  {name:<16}{seconds * 1e3:9.2f} ms{source.nbytes / seconds / 1e9:8.2f} GB/s")


def ratios(folder: Path, rounds: int, rows: int = 10_000, some: int = 1000, few: int = 64) -> None:
    """One case of ROWS × DIM float16, whole and some rows of it, over what h5py and memory can do.

    All ways but those "into kept memory" give arrays of their own, so that all pay for new memory.
    """
    items = make(1, rows)
    source = items[0].columns["features"]
    rng, kept = np.random.default_rng(0), np.empty_like(source)
    chosen = {count: np.sort(rng.choice(rows, count, replace=False)) for count in (some, few)}
    ways: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: source.copy(),
        "memcpy into kept memory": lambda: np.copyto(kept, source),
    }
    for file_format in ("hdf5", "zarr"):
        writer = StoreWriter(folder / file_format, make_spec(dim=DIM), {}, file_format)
        writer.commit("1", items)
        store = Store.open(writer.path)
        path = store.folder("1") / store.record("1").parts[0].name
        read = CaseBags(store, {"1": 0}, 0)
        outline = read.outlines["1"]
        bags = {count: outline.take(np.isin(np.arange(rows), chosen[count])) for count in chosen}
        # Each bag of a batch of two is copied, the only one of a batch is not.
        halves = [outline.take(np.arange(rows) % 2 == i) for i in range(2)]
        if file_format == "hdf5":
            resident = CaseBags(store, {"1": 0}, 10**12)
            ways["h5py, whole"] = lambda path=path: h5py_rows(path, ...)
            for count, index in chosen.items():
                ways[f"h5py, {count} rows"] = lambda path=path, index=index: h5py_rows(path, index)
            ways["resident, whole"] = lambda r=resident, o=outline: r.batch([o])
            ways["resident, both halves"] = lambda r=resident, h=halves: r.batch(h)
            for count, bag in bags.items():
                ways[f"resident, {count} rows"] = lambda r=resident, b=bag: r.batch([b])
        ways[f"Store.bag, {file_format}"] = lambda store=store: store.bag("1")
        ways[f"Store.features, {file_format}, into kept memory"] = lambda s=store: s.features("1", kept)
        for count, index in chosen.items():
            ways[f"Store.take, {file_format}, {count} rows"] = lambda s=store, i=index: s.take("1", i)
            ways[f"bag and index, {file_format}, {count} rows"] = lambda s=store, i=index: s.bag(
                "1"
            ).features[i]
            ways[f"batch from the store, {file_format}, {count} rows"] = lambda r=read, b=bags[count]: (
                r.batch([b])
            )
            assert np.array_equal(store.take("1", index), source[index])
            assert np.array_equal(read.batch([bags[count]]).features.numpy(), source[index])
    seconds = take_turns(ways, rounds)
    print(f"({rows}, {DIM}) float16, {source.nbytes / 1e6:.0f} MB:")
    for name, value in seconds.items():
        print(f"  {name:<44}{value * 1e3:9.3f} ms")
    asked = [
        ("speed of Store.bag / h5py, the same file", "h5py, whole", "Store.bag, hdf5", "≥ 0.9"),
        ("… Zarr / h5py", "h5py, whole", "Store.bag, zarr", ""),
        ("speed of all resident rows / memcpy", "memcpy", "resident, whole", "≥ 0.7"),
        ("… of two interleaved halves / memcpy", "memcpy", "resident, both halves", ""),
        (f"speed of {some} resident rows / h5py", f"h5py, {some} rows", f"resident, {some} rows", "≥ 10"),
        ("… Store.take, HDF5 / h5py", f"h5py, {some} rows", f"Store.take, hdf5, {some} rows", ""),
        ("… Store.take, Zarr / h5py", f"h5py, {some} rows", f"Store.take, zarr, {some} rows", ""),
    ]
    for text, over, under, limit in asked:
        print(f"  {text:<44}{seconds[over] / seconds[under]:9.2f}" + (f"   asked {limit}" if limit else ""))


def h5py_rows(path: Path, index: Any) -> Any:
    """What h5py alone does to give the rows as an array; it checks the same checksums."""
    with h5py.File(path, "r", locking=False) as file:
        return file["h&e/match_0/features"][index]


def main(only_ratios: bool, rounds: int) -> None:
    """One large slice, and many of usual size; then the ratios."""
    # As every command that reads much does: in a virtual machine, memory that was given back to the host
    # takes longer to get again (0.7 to 1 s for 300 MB were seen) than it takes to read a file into it.
    keep_freed_memory()
    with tempfile.TemporaryDirectory(prefix="featstore-bench-") as folder:
        if not only_ratios:
            compare(Path(folder), 1, 10_000, rounds)
            compare(Path(folder), 300, 500, rounds)
        ratios(Path(folder), rounds)


if __name__ == "__main__":
    given = sys.argv[1:]
    only = given[:1] == ["ratios"]
    main(only, int(given[only]) if len(given) > only else 7)
