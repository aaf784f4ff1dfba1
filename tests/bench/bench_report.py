"""Attention analysis, probing and report of 100 cases with 64,000 patches, as typed.

    python -m tests.bench.bench_report --work WORK_FOLDER

Patches are crops of 224 px of real tissue, stains h&e, melan and sox10, two slices each; embeddings
(1024-d) are random with a planted signal, as extraction is no part of this. `hierarchical` is trained
for two epochs on six further cases, so that all 100 are test cases. Each command is a process of its own,
timed from its start to its end; the wanted limit is 5 minutes for `attention` and `report` together, on
two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.cohort.splits import Split, save_split
from featstore.store import Slice, StoreWriter
from tests.bench.tissue_tiles import sources
from tests.helpers import patch_name
from tests.store.builders import make_slice, make_spec

DIM, SIDE, OTHERS = 1024, 224, 6
STAINS, SLICES = ("h&e", "melan", "sox10"), ("match_1", "unmatched_1")


def main() -> None:
    """Make what is not there yet, run the commands, print their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="project folder, kept (5 GB)")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--patches", type=int, default=640, help="a case")
    given = parser.parse_args()
    prepare(given.work, given.cases, given.patches)
    (run,) = (given.work / "runs").glob("run_*_bench")
    total = 0.0
    for command in ("attention", "probe", "report"):
        seconds = timed(given.work, command, str(run.absolute()))
        total += seconds if command != "probe" else 0
        print(f"featstore {command:10} {seconds:7.1f} s")
    size = (run / "report.html").stat().st_size
    print(f"attention and report: {total:.0f} s of 300; report.html {size / 1e6:.1f} MB of 25")


def prepare(work: Path, cases: int, patches: int) -> None:
    """Patches, store, settings, split and a run."""
    if (work / "prepared").exists():
        return
    ids = [str(i) for i in range(1, cases + OTHERS + 1)]
    per_slice = np.diff(np.linspace(0, patches, len(STAINS) * len(SLICES) + 1).round().astype(int)).tolist()
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_case, ids, [work / "patches"] * len(ids), [per_slice] * len(ids)))
    writer = StoreWriter(work / "store", make_spec(dim=DIM), {})
    for case in ids:
        writer.commit(case, [embedded(work / "patches", case, *each) for each in keys(per_slice)])
    labels = "".join(f"{case},{int(case) % 2}\n" for case in ids)
    (work / "labels.csv").write_text("Case,Class\n" + labels)
    settings = {
        "patches": {"folder": "patches"},
        "labels": {"file": "labels.csv"},
        "classes": {"benign": ["0"], "malignant": ["1"]},
        "train": {"epochs": 2, "load_splits": "split.npz"},
        "runs": {"suffix": "bench"},
    }
    (work / "featstore.yaml").write_text(json.dumps(settings))
    rest = ids[cases:]
    save_split(work / "split.npz", Split(tuple(rest[:4]), tuple(rest[4:]), tuple(ids[:cases])))
    timed(work, "train-head")
    (work / "prepared").touch()


def keys(per_slice: list[int]) -> list[tuple[str, str, int]]:
    """Stain, slice and number of patches."""
    names = [(stain, name) for stain in STAINS for name in SLICES]
    return [(*name, count) for name, count in zip(names, per_slice, strict=True)]


def write_case(case: str, folder: Path, per_slice: list[int]) -> None:
    """Write a case's patches."""
    images, rng = sources(), np.random.default_rng(int(case))
    place = folder / case
    place.mkdir(parents=True, exist_ok=True)
    for stain, name, count in keys(per_slice):
        for patch in range(1, count + 1):
            image = images[int(rng.integers(len(images)))]
            y, x = (int(rng.integers(length - SIDE + 1)) for length in image.shape[:2])
            crop = Image.fromarray(image[y : y + SIDE, x : x + SIDE])
            crop.save(place / patch_name(case, name, stain, patch), compress_level=1)


def embedded(folder: Path, case: str, stain: str, name: str, count: int) -> Slice:
    """A slice's embeddings; of odd cases every tenth patch stands out."""
    made = make_slice(case, stain, name, list(range(1, count + 1)))
    rng = np.random.default_rng([int(case), STAINS.index(stain), SLICES.index(name)])
    x = rng.normal(size=(count, DIM)).astype(np.float16)
    x[:: 10 if int(case) % 2 else count + 1, :32] += 2
    paths = [f"{case}/{patch_name(case, name, stain, patch)}" for patch in range(1, count + 1)]
    digests = [sha256((folder / path).read_bytes()).digest() for path in paths]
    known = {
        "source_name": np.array([path.encode() for path in paths]),
        "source_sha256": np.stack([np.frombuffer(digest, np.uint8) for digest in digests]),
    }
    return Slice(stain, name, {**made.columns, "features": x, **known})


def timed(work: Path, *command: str) -> float:
    """Seconds of a featstore command in the project."""
    featstore = Path(sys.executable).with_name("featstore")
    begin = time.perf_counter()
    subprocess.run([featstore, *command], cwd=work, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
