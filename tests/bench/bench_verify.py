"""Seconds and peak memory of `verify --quick` on N cases: `python -m tests.bench.bench_verify [N]`.

The records are written directly and without fsync, five slices of three stains a case in two parts of
nothing but a hole: a quick look opens no part. Read with a warm cache, as the files have just been written.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

from featstore.store.format import CASES, MANIFEST, Group, Part, Record, encode_manifest, encode_record
from featstore.store.ids import component
from featstore.store.verify import verify
from tests.store.builders import make_spec

PART_BYTES = 10 * 500 * 1024 * 2 + 50_000


def make_store(root: Path, count: int) -> None:
    """Write ``count`` cases whose ids are like a biobank's: upper case, so with a hash in the name."""
    spec = make_spec(dim=1024)
    (root / CASES).mkdir()
    (root / MANIFEST).write_bytes(encode_manifest(spec))
    for n in range(count):
        case = f"TCGA-{n:06d}"
        folder = root / CASES / component(case)
        folder.mkdir()
        parts = []
        for half, stains in enumerate((("h&e", "melan"), ("sox10",))):
            name = hashlib.md5(f"{n} {half}".encode()).hexdigest() + ".h5"
            (folder / name).touch()
            os.truncate(folder / name, PART_BYTES)
            groups = tuple(Group(s, f"match_{i}", 500, "0-499") for s in stains for i in range(1, 6))
            parts.append(Part(name, PART_BYTES, hashlib.sha256(b"x").hexdigest(), groups))
        record = Record(case, 1, spec.fingerprint, "2026-01-01T00:00:00.000+00:00", "b:1", tuple(parts))
        (folder / record.name).write_bytes(encode_record(record))


def main(count: int) -> None:
    """Make the store, then time one quick look."""
    root = Path(tempfile.mkdtemp(prefix="bench-verify-"))
    try:
        make_store(root, count)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        start = time.perf_counter()
        report = verify(root, "quick")
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        assert not report.findings, json.dumps(report.to_json())[:500]
        print(
            f"{report.cases:,} cases, {report.parts:,} parts in {seconds:.1f} s; peak {peak:.0f} MiB, "
            f"{before:.0f} MiB of it before"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
