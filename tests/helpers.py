"""Cohorts for tests: noise that is quick to write, and real multi-stain tissue cut into patches."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
STAIN_COLOURS = {"h&e": (200, 130, 180), "melan": (190, 90, 90), "sox10": (170, 140, 110)}

# Further stains of the multi-stain images, for the config's `stains`.
MULTISTAIN_STAINS: dict[str, list[str]] = {
    "cc10": ["cc10"],
    "cd31": ["cd31"],
    "ki67": ["ki67"],
    "pancytokeratin": ["pancytokeratin"],
    "prospc": ["prospc"],
}
MULTISTAIN_FILES = {
    "29-041-Izd2-w35-He-les3.jpg": ("les3", "h&e"),
    "29-041-Izd2-w35-CD31-3-les3.jpg": ("les3", "cd31"),
    "29-041-Izd2-w35-Cc10-5-les3.jpg": ("les3", "cc10"),
    "29-041-Izd2-w35-Ki67-7-les3.jpg": ("les3", "ki67"),
    "29-041-Izd2-w35-proSPC-4-les3.jpg": ("les3", "prospc"),
    "Izd2-29-041-w35_HE.jpg": ("w35", "h&e"),
    "Izd2-29-041-w35_proSPC.jpg": ("w35", "prospc"),
    "Rat-Kidney_HE.jpg": ("kidney", "h&e"),
    "Rat-Kidney_PanCytokeratin.jpg": ("kidney", "pancytokeratin"),
}


def shared_data() -> Path | None:
    """The folder of shared real data (FEATSTORE_SHARED_DATA), or None where there is none."""
    folder = Path(os.environ.get("FEATSTORE_SHARED_DATA") or ROOT.parent / "shared" / "data")
    return folder if folder.is_dir() else None


def patch_name(case: str, slice_id: str, stain: str, patch: int) -> str:
    return f"case_{case}_{slice_id}_{stain}_patch{patch}.png"


def make_cohort(
    folder: Path,
    cases: int | Sequence[str] = 3,
    stains: Sequence[str] = ("h&e", "melan", "sox10"),
    slices: int = 2,
    patches: int = 5,
    size: int = 40,
    seed: int = 0,
) -> list[Path]:
    """Write patches of textured noise, all different, into one flat folder.

    Args:
        folder: Made where missing.
        cases: Number of cases, called 1, 2, …; or their ids.
        stains: Stain names, as in the file names.
        slices: Slices a stain: match_1, unmatched_1, match_2, …
        patches: Patches a slice, numbered from 1.
        size: Side in px.
        seed: Source of chance.

    Returns:
        The files, by case, stain, slice and patch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    ids = [str(n + 1) for n in range(cases)] if isinstance(cases, int) else list(cases)
    slice_ids = sorted(f"{'unmatched' if n % 2 else 'match'}_{n // 2 + 1}" for n in range(slices))
    written = []
    for case in ids:
        for stain in stains:
            for slice_id in slice_ids:
                for patch in range(1, patches + 1):
                    file = folder / patch_name(case, slice_id, stain, patch)
                    noise_patch(rng, size, STAIN_COLOURS.get(stain, (170, 150, 170))).save(
                        file, compress_level=1
                    )
                    written.append(file)
    return written


def noise_patch(
    rng: np.random.Generator, size: int, colour: tuple[int, int, int] = (200, 130, 180)
) -> Image.Image:
    """A square of coarse and fine noise around a colour."""
    cells = rng.normal(0, 30, (size // 8 + 1, size // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:size, :size]
    pixels = np.asarray(colour) + cells + rng.normal(0, 8, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_labels(folder: Path, mapping: Mapping[str, str | int]) -> Path:
    """Write folder/labels.csv with columns Case,Class."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "labels.csv"
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("Case", "Class"))
        writer.writerows(mapping.items())
    return file


def tile_multistain(source: Path, folder: Path, size: int = 224, stride: int | None = None) -> list[Path]:
    """Cut the multi-stain images into patches: three cases, six stains, one slice match_1 each.

    Args:
        source: The folder multistain/ of the shared data.
        folder: For the patches, flat; made where missing.
        size: Side of a patch in px; what is left over at the right and the bottom is not used.
        stride: Step from patch to patch in px; size where not given.

    Returns:
        The files; patches are numbered from 1, row by row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    step = stride or size
    written = []
    for name, (case, stain) in MULTISTAIN_FILES.items():
        image = Image.open(source / name).convert("RGB")
        corners = [
            (x, y)
            for y in range(0, image.height - size + 1, step)
            for x in range(0, image.width - size + 1, step)
        ]
        for patch, (x, y) in enumerate(corners, start=1):
            file = folder / patch_name(case, "match_1", stain, patch)
            image.crop((x, y, x + size, y + size)).save(file, compress_level=1)
            written.append(file)
    return written
