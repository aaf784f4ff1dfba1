"""Opening, listing and a quick look at N cases: `python tests/bench/bench_scale.py [N] [--at FOLDER]`.

The store lies in a temporary folder below FOLDER: records written directly and without fsync, one slice
and one part a case, a hole of 1 MB, since neither listing nor a quick look opens a part. Each figure is
that of a fresh process, with a warm cache, as the files have just been written.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PART_BYTES = 500 * 1024 * 2 + 50_000
TASKS = ("import", "open and list", "verify --quick")


def make_store(root: Path, count: int) -> None:
    """Write ``count`` cases; half of their ids are lower case, half have a hash in the folder's name."""
    from featstore.store.format import CASES, MANIFEST, Group, Part, Record, encode_manifest, encode_record
    from featstore.store.ids import component
    from tests.store.builders import make_spec

    spec = make_spec(dim=1024)
    (root / CASES).mkdir(parents=True)
    (root / MANIFEST).write_bytes(encode_manifest(spec))
    digest = hashlib.sha256(b"x").hexdigest()
    for n in range(count):
        case = f"TCGA-{n:06d}" if n % 2 else str(n)
        folder = root / CASES / component(case)
        folder.mkdir()
        name = hashlib.md5(str(n).encode()).hexdigest() + ".h5"
        (folder / name).touch()
        os.truncate(folder / name, PART_BYTES)
        part = Part(name, PART_BYTES, digest, (Group("h&e", "match_1", 500, "1-500"),))
        record = Record(case, 1, spec.fingerprint, "2026-01-01T00:00:00.000+00:00", "b:1", (part,))
        (folder / record.name).write_bytes(encode_record(record))


def measure(task: str, root: Path) -> None:
    """Do one task in this process, and print its seconds and the process's peak memory."""
    from featstore.store.store import Store
    from featstore.store.verify import verify

    started, used = time.perf_counter(), time.process_time()
    found = 0
    if task == "open and list":
        found = len(Store.open(root).cases())
    elif task == "verify --quick":
        report = verify(root, "quick")
        assert not report.findings, report.findings[:3]
        found = report.cases
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"  {task:<16}{found:>9,} cases{seconds:8.1f} s, {cpu:.1f} s of it CPU   peak {peak:5.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Make the store, then every task in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=100_000)
    parser.add_argument("--at", type=Path, default=Path(tempfile.gettempdir()), metavar="FOLDER")
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.task:
        measure(given.task, given.at)
        return
    with tempfile.TemporaryDirectory(prefix="featstore-scale-", dir=given.at) as folder:
        root = Path(folder) / "store"
        started = time.perf_counter()
        make_store(root, given.count)
        print(f"{given.count:,} cases below {given.at}, made in {time.perf_counter() - started:.0f} s:")
        for task in TASKS:
            again = [sys.executable, __file__, "--at", str(root), "--task", task]
            subprocess.run(again, check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
