"""A lab's whole study by the clock: 5 folds × 10 seeds × 30 epochs, as typed.

    python tests/bench/bench_study.py WORK [--folds 5] [--seeds 10] [--epochs 30] [--model hierarchical] …

77 cases of three stains with five slices each, 64,526 patches, 1024 made-up features (a tenth of
the patches of class 1 lie a little apart). No early stopping: every training has all its epochs.
What is left on the line goes to `featstore train-head`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.store import Slice, StoreWriter
from heads.bench import DIM, SLICES, STAINS
from tests.store.builders import make_slice, make_spec

CASES, PATCHES = 77, 64_526
CONFIG = """\
labels: {file: labels.csv}
classes: {benign: ["0"], malignant: ["1"]}
"""


def make_project(folder: Path) -> None:
    """Store, labels and settings; a project that is there stays."""
    if (folder / "featstore.yaml").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    per_slice = PATCHES // (CASES * STAINS * SLICES)
    left = PATCHES - per_slice * CASES * STAINS * SLICES
    writer = StoreWriter(folder / "store", make_spec(dim=DIM), {})
    lines = ["Case,Class"]
    for number in range(CASES):
        label = number % 2
        slices = []
        for index in range(STAINS * SLICES):
            count = per_slice + (number * STAINS * SLICES + index < left)
            features = rng.standard_normal((count, DIM), np.float32)
            features[: label * count // 10, :40] += 0.5
            stain, name = f"stain{index // SLICES}", str(index % SLICES)
            made = make_slice(str(number), stain, name, list(range(count)))
            columns = {**made.columns, "features": features.astype(np.float16)}
            slices.append(Slice(stain, name, columns))
        writer.commit(str(number), slices)
        lines.append(f"{number},{label}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    (folder / "featstore.yaml").write_text(CONFIG)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path, help="becomes a project: kept, and used again")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=30)
    options, rest = parser.parse_known_args()
    make_project(options.work)
    command = [
        sys.executable,
        "-m",
        "cli",
        "train-head",
        "--folds",
        options.folds,
        "--seeds",
        options.seeds,
    ]
    command += ["--epochs", options.epochs, "--set", "train.patience=null", *rest]
    command += ["--project", options.work.absolute()]
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], cwd=Path(__file__).parents[2], check=False)
    seconds = time.perf_counter() - start
    count = options.folds * options.seeds
    print(f"{count} trainings of {options.epochs} epochs: {seconds:.0f} s, {seconds / count:.1f} s each")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
