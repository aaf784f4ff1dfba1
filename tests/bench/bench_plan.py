"""What a cohort of any size takes, planned and simulated: `python -m tests.bench.bench_plan [TASK …]`.

`tables` prints the plan (docs/scale.md) from the figures in BENCHMARKS.md and those measured here. The
other tasks run the real code on simulated cohorts, each in a process of its own: `shares` (dealing out
1,500,000 slices), `parts` (bytes a patch), `scan` (1,000,000 names), `plan` (what is left to do,
1,000,000 rows), `outlines` (100,000 cases without their embeddings), `read` (epochs out of a store
that does not fit, of a few large and of many small slices a case).

Slices are drawn so: patches a case log-normal (σ = 1), slices a case and stain 1 + geometric (mean 5),
a case's patches among its slices in exponential shares, PNG bytes a patch as those of the lab's sizes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from tests.bench.plan_model import PNG_BYTES, PNG_SPREAD, all_tables

if TYPE_CHECKING:
    from featstore.store import Store

STAINS = ("h&e", "melan", "sox10")
SHARES = 256


@dataclass(frozen=True)
class Slices:
    """Slices by (S,) case, stain, patches and PNG bytes."""

    case: np.ndarray
    stain: np.ndarray
    patches: np.ndarray
    png_bytes: np.ndarray


def draw(cases: int, patches: int, seed: int = 0) -> Slices:
    """A cohort's slices, with a few large cases and slices and many small ones."""
    rng = np.random.default_rng(seed)
    of_case = rng.lognormal(0, 1, cases)
    number = rng.geometric(1 / 5, (cases, len(STAINS)))
    case = np.repeat(np.arange(cases), number.sum(1))
    stain = np.repeat(np.tile(np.arange(len(STAINS)), cases), number.ravel())
    share = rng.exponential(1, len(case))
    share *= of_case[case] / np.bincount(case, share)[case]
    count = np.maximum(1, np.round(share * patches / of_case.sum())).astype(np.int64)
    noise = 1 + PNG_SPREAD / np.sqrt(count) * rng.standard_normal(len(case))
    return Slices(
        case, stain, count, np.maximum(100, count * PNG_BYTES * np.clip(noise, 0.3, 4)).astype(int)
    )


@contextmanager
def measured(what: str) -> Iterator[Callable[[str], None]]:
    """Print seconds, CPU seconds and the peak of this process; the yielded function adds a remark."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    remarks, started, used = list[str](), time.perf_counter(), time.process_time()
    yield remarks.append
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    text = f"{seconds:.1f} s ({cpu:.1f} s CPU), peak {peak:,.0f} MiB ({before:,.0f} before)"
    print(f"  {what:<46} {text}{''.join(f'; {remark}' for remark in remarks)}", flush=True)


def shares() -> None:
    """Deal out slices as `extract --shard` does: balanced, published, and read by the other shares."""
    from featstore.extraction.shards import balance, share_of_patches

    for cases, patches in ((300, 83_630), (1_000, 1_000_000), (100_000, 1_000_000_000)):
        slices = draw(cases, patches)
        names = pd.Categorical.from_codes(slices.case, [str(n) for n in range(cases)])
        number = (
            pd.Series(slices.case * 3 + slices.stain).groupby(slices.case * 3 + slices.stain).cumcount()
        )
        table = pd.DataFrame(
            {
                "case_id": names,
                "stain": pd.Categorical.from_codes(slices.stain, STAINS),
                "slice_id": "match_" + (number + 1).astype(str),
            }
        )
        print(f"{cases:,} cases, {slices.patches.sum():,} patches, {len(table):,} slices,", end=" ")
        print(f"the largest of {slices.patches.max():,}; {slices.png_bytes.sum() / 1e12:.2f} TB of PNG")
        for count in (8, 32, SHARES):
            with tempfile.TemporaryDirectory() as folder:
                reports, work = Path(folder), slices.png_bytes
                with measured(f"{count} shares, balanced and published") as remark:
                    mine = share_of_patches(table, count, reports, lambda work=work: work)  # type: ignore[misc]
                    loads = np.bincount(mine, slices.png_bytes, count)
                    counts = np.bincount(mine, slices.patches, count)
                    size = sum(file.stat().st_size for file in reports.rglob("*.json"))
                    remark(f"table {size / 1e6:.1f} MB")
                    remark(f"bytes max/mean {loads.max() / loads.mean():.4f}")
                    remark(f"patches max/mean {counts.max() / counts.mean():.4f}")
                with measured("  … read by another share"):
                    again = share_of_patches(table, count, reports, lambda: np.zeros(0, np.int64))
                assert np.array_equal(mine, again)

        whole = np.bincount(slices.case, slices.png_bytes).astype(int)
        with measured(f"{SHARES} shares of whole cases, balanced") as remark:
            work = {(str(n), "", ""): int(each) for n, each in enumerate(whole)}
            homes = balance(work, SHARES, {})
            loads = np.bincount([homes[key].share for key in work], whole, SHARES)
            remark(f"bytes max/mean {loads.max() / loads.mean():.4f}")


def parts() -> None:
    """Bytes a patch takes in a part, bookkeeping and padding included, of slices as they are drawn."""
    from featstore.store.parts import encode
    from tests.bench.bench_store import DIM, make

    patches = draw(1_000, 10_000_000).patches
    for file_format in ("hdf5", "zarr"):
        with measured(f"200 slices encoded one by one, {file_format}") as remark:
            counts = np.random.default_rng(0).choice(patches, 200).tolist()
            size = sum(len(encode(file_format, make(1, count), {})[0]) for count in counts)
            remark(f"{size / sum(counts):.0f} B a patch, {2 * DIM} of it the embedding")


def scan() -> None:
    """Read names into a patch table, and what the table then takes."""
    from featstore.cohort.patches import build_table
    from featstore.config import PatchesConfig
    from tests.bench.bench_scan import names

    with measured("1,000,000 names as a walk gives them"):
        paths = list(names(1_000_000))
    with measured("… read into a patch table") as remark:
        table = build_table(paths, PatchesConfig()).table
        remark(f"the table alone {table.memory_usage(deep=True).sum() / len(table):.0f} B a row")


def plan() -> None:
    """Hold a patch table against what a store says of the files: as `extract` does to see what is left."""
    from featstore.extraction.plan import _merge
    from featstore.store.format import COORDS_COLUMNS, GEOMETRY_COLUMNS
    from tests.bench.bench_scan import names

    rows = 1_000_000
    with measured("a table and a store's sources of 1,000,000 rows"):
        path = pd.array(list(names(rows)), dtype=object)
        number = np.arange(rows) // 500
        keys = {
            "case_id": pd.Categorical.from_codes(number // 15, [str(n) for n in range(rows // 7500 + 1)]),
            "stain": pd.Categorical.from_codes(number % 15 // 5, STAINS),
            "slice_id": pd.Categorical.from_codes(number % 5, [f"match_{n + 1}" for n in range(5)]),
            "patch": np.arange(rows) % 500,
        }
        state = {"size": np.arange(rows), "mtime_ns": np.arange(rows)}
        table = pd.DataFrame({**keys, "path": path, **state})
        sources = table.astype({"case_id": object, "stain": object, "slice_id": object})
        sources["sha256"] = pd.array([number.tobytes() * 4 for number in np.arange(rows)], dtype=object)
        for name in (*GEOMETRY_COLUMNS, *COORDS_COLUMNS):
            sources[name] = np.nan
    with measured("… held against one another") as remark:
        merged = _merge(table, sources)
        frames = sum(frame.memory_usage(deep=True).sum() for frame in (table, sources, merged))
        assert merged["_merge"].eq("both").all()
        remark(f"the three frames {frames / rows:.0f} B a row")


def outlines() -> None:
    """What training holds of every case besides embeddings: 100,000 cases of 500 patches."""
    from featstore.store import Store
    from tests.bench import bench_scale

    with tempfile.TemporaryDirectory() as folder:
        root, count = Path(folder) / "store", 100_000
        with measured(f"{count:,} records written, without fsync"):
            bench_scale.make_store(root, count)
        with measured("opened and listed"):
            store = Store.open(root)
            cases = store.cases()
        with measured("all outlines") as remark:
            held = [store.outline(case) for case in cases]
            size = sum(bag.rows.nbytes + bag.patches.nbytes for bag in held)
            remark(f"{size / sum(map(len, held)):.0f} B a patch in arrays")
        with measured("… their digest"):
            store.digest(cases)


def read(cases: int = 1000, dim: int = 1024) -> None:
    """Epochs out of a store that does not fit: whole cases, and 64 rows of each; verify; copy."""
    from featstore.resident import CaseBags
    from featstore.sampling import sample_bag
    from featstore.store.scratch import copy_to_scratch
    from featstore.store.verify import verify

    for slices, patches in ((3, 167), (15, 7)):
        with tempfile.TemporaryDirectory() as folder:
            store = make_store(Path(folder) / "store", cases, slices, patches, dim)
            forget(store)
            with measured("read once, as a training begins (cold)"):
                bags = CaseBags(store, dict.fromkeys(store.cases(), 0), 0)
            held = list(bags.outlines.values())
            np.random.default_rng(0).shuffle(held)  # type: ignore[arg-type]
            for heat in ("cold", "warm"):
                if heat == "cold":
                    forget(store)
                with measured(f"epoch of whole cases, four a batch ({heat})"):
                    for i in range(0, cases, 4):
                        bags.batch(held[i : i + 4])
            for epoch in ("first", "second"):
                rng = np.random.default_rng(0)
                with measured(f"epoch of 64 rows a case, four a batch ({epoch}, warm)"):
                    for i in range(0, cases, 4):
                        bags.batch([sample_bag(bag, 64, "random", rng) for bag in held[i : i + 4]])
            for level in ("quick", "default", "full"):
                with measured(f"verify, {level} (warm)"):
                    assert not verify(store.path, level).findings
            with measured("copied to scratch (warm)"):
                copy = copy_to_scratch(store, store.cases(), Path(folder) / "scratch")
            assert np.array_equal(copy.features("7"), store.features("7"))


def make_store(path: Path, cases: int, slices: int, patches: int, dim: int) -> Store:
    """A store of noise, not synced: neither is measured here."""
    from featstore.store import Slice, Store, StoreWriter, files
    from tests.store.builders import make_slice, make_spec

    files.sync_folder, os.fsync = (lambda folder: None), (lambda handle: None)
    writer = StoreWriter(path, make_spec(dim=dim), {})
    noise = np.random.default_rng(0).standard_normal((slices * patches, dim), np.float32)
    features = np.split(noise.astype(np.float16), slices)
    for case in map(str, range(cases)):
        made = [make_slice(case, "h&e", f"s{n}", list(range(patches))) for n in range(slices)]
        columns = [{**item.columns, "features": x} for item, x in zip(made, features, strict=True)]
        writer.commit(case, [Slice("h&e", f"s{n}", each) for n, each in enumerate(columns)])
    store = Store.open(writer.path)
    size = sum(part.size for case in store.cases() for part in store.record(case).parts)
    rows = cases * slices * patches
    print(f"{cases:,} cases of {slices} × {patches} patches, {size / 1e9:.2f} GB", end="")
    print(f" ({size / rows:.0f} B a patch)", flush=True)
    return store


def forget(store: Store) -> None:
    """Let the kernel drop what it holds of a store's parts."""
    for part in store.path.rglob("*.h5"):
        with part.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


TASKS: dict[str, Callable[[], None]] = {
    "shares": shares,
    "parts": parts,
    "scan": scan,
    "plan": plan,
    "outlines": outlines,
    "read": read,
}


def main() -> None:
    """The tables, then every task in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"tables, {', '.join(TASKS)}; all if none")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for task in given.tasks or ("tables", *TASKS):
        if task == "tables":
            print(all_tables())
        elif given.here:
            TASKS[task]()
        elif task in TASKS:
            print(f"{task}:", flush=True)
            subprocess.run([sys.executable, "-m", "tests.bench.bench_plan", "--here", task], check=True)
        else:
            parser.error(f"no task {task!r}")


if __name__ == "__main__":
    main()
