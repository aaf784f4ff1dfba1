"""Small images by environment and class."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from PIL import Image

from heads.training.environments import LabelledImages
from tests import helpers

SIZE = 24
ENVIRONMENTS, CLASSES = ("lab 2", "lab 10"), ("benign", "melanoma")


def picture(seed: int, size: int = 30) -> Image.Image:
    return helpers.noise_patch(np.random.default_rng(seed), size)


def make_environments(root: Path) -> Path:
    """ROOT/ENVIRONMENT/CLASS with 3, 5, 7 and 9 images, PNG and JPEG."""
    for n, (environment, label) in enumerate(itertools.product(ENVIRONMENTS, CLASSES)):
        folder = root / environment / label
        folder.mkdir(parents=True)
        for i in range(3 + 2 * n):
            picture(100 * n + i).save(folder / f"i{i}{('.png', '.JPG', '.jpeg')[i % 3]}")
    return root


def small(environment: list[int], label: list[int], group: list[int] | None = None) -> LabelledImages:
    return LabelledImages(
        tuple(Path(f"{i}.png") for i in range(len(environment))),
        np.array(environment, np.int64),
        np.array(label, np.int64),
        tuple(f"e{i}" for i in range(max(environment, default=0) + 1)),
        tuple(f"c{i}" for i in range(max(label, default=0) + 1)),
        group=None if group is None else np.array(group, np.int64),
    )
