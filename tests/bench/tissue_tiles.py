"""Patches of real tissue for the benchmarks, of one size or of sizes as in a lab's cohort."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from featstore.demo_tissue import tissue_pixels
from tests.helpers import MULTISTAIN_FILES, patch_name, shared_data

# Side in px of a patch in a cohort of 84,000: log-normal, clipped.
MEDIAN, SIGMA, SMALLEST, LARGEST = 195, 0.85, 50, 2053


def sides(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Sides in px: ``lab``, evenly over its distribution and shuffled; or a number, the same for all."""
    if kind != "lab":
        return np.full(count, int(kind))
    # Quantiles instead of draws: a hundred patches are as large on average as a hundred thousand.
    from statistics import NormalDist

    normal = NormalDist(math.log(MEDIAN), SIGMA)
    drawn = [math.exp(normal.inv_cdf((n + 0.5) / count)) for n in range(count)]
    return np.random.default_rng(seed).permutation(np.clip(drawn, SMALLEST, LARGEST)).round().astype(int)


def sources() -> list[np.ndarray]:
    """The multi-stain images of the shared data where they are, else the one of scikit-image."""
    folder = shared_data()
    files = [folder / "multistain" / name for name in MULTISTAIN_FILES] if folder else []
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files if file.is_file()]
    return images or [tissue_pixels()]


def make_tiles(folder: Path, kind: str, count: int) -> list[Path]:
    """Write square crops of tissue, all different; larger ones than an image continue in its mirror.

    Returns:
        The files, from the smallest patch to the largest.
    """
    folder.mkdir(parents=True)
    images, rng = sources(), np.random.default_rng(0)
    made = []
    for n, side in enumerate(sides(kind, count)):
        image = images[n % len(images)]
        more = [(0, max(0, side + 64 - length)) for length in image.shape[:2]]
        image = np.pad(image, (*more, (0, 0)), mode="symmetric")
        y, x = (int(rng.integers(length - side + 1)) for length in image.shape[:2])
        file = folder / patch_name(str(n // 64 + 1), "match_1", "h&e", n % 64)
        Image.fromarray(image[y : y + side, x : x + side]).save(file)
        made.append((int(side), file))
    return [file for _, file in sorted(made)]
