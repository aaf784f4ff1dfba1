"""A small project with runs to look into, and pictures read back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import heads.evaluation.results
from tests import helpers
from tests.command_line import make_project, succeeded

CASES = 15
PATCHES = 11  # patch10 stands before patch2 as text, and behind it as a number
CLASSES = ["benign", "high_grade"]
SETTINGS: dict[str, Any] = {
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["1"], "high_grade": ["3"]},
    "head": {"embed_dim": 16, "attention_hidden": 8, "hidden_dim": 16, "attention_dim": 8},
    "train": {"epochs": 2, "device": "cpu", "lr": 0.003, "amp": "off"},
    "runs": {"resamples": 20},
}


def project_with(folder: Path, *names: str) -> Path:
    """A project of 15 cases (3 to test on) of two stains of two slices, with a run of each head."""
    cohort = {"cases": CASES, "stains": ("h&e", "sox10"), "slices": 2, "patches": PATCHES}
    project = make_project(folder, SETTINGS, **cohort)
    helpers.write_labels(project, {str(i): "1133"[i % 4] for i in range(1, CASES + 1)})
    succeeded(project, "extract")
    with drawing_nothing():
        for head in names:
            succeeded(project, "train-head", "--model", head, "--suffix", head)
    return project


@contextlib.contextmanager
def drawing_nothing() -> Iterator[None]:
    """Drawing a training's curves takes far longer than the training itself."""
    with contextlib.ExitStack() as undrawn:
        for name in ("plot_history", "plot_confusion", "plot_deviation"):
            undrawn.enter_context(mock.patch.object(heads.evaluation.results, name, return_value=[]))
        yield


def run_of(project: Path, head: str) -> Path:
    """The run of a head."""
    (path,) = (project / "runs").glob(f"run_*_{head}")
    return path


def tiles_of(gallery: Path) -> list[tuple[dict[str, Any], np.ndarray]]:
    """What a gallery's PNG says of its tiles, and the pixels at their places."""
    with Image.open(gallery) as image:
        told = json.loads(image.text["featstore"])["tiles"]  # type: ignore[attr-defined]
        pixels = np.asarray(image.convert("RGB"))
    found = []
    for tile in told:
        left, top, right, bottom = tile["box"]
        found.append((tile, pixels[top:bottom, left:right]))
    return found


def pixels_of(project: Path, path: str) -> np.ndarray:
    """A patch's file, by another reader."""
    with Image.open(project / "patches" / path) as image:
        return np.asarray(image.convert("RGB"))
