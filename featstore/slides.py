"""Images of whole slices, on which their patches lie.

Pictures (PNG, JPEG, TIFF) are read by Pillow, whole-slide files by OpenSlide, which is optional. What
is returned is small, and says how many level-0 pixels one of its pixels stands for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featstore.cohort.names import id_problem, normalize_case, normalize_slice, split_stem, stain_lookup
from featstore.cohort.tables import Table, printable
from featstore.config import FeatstoreConfig
from featstore.errors import CohortError
from featstore.slide_files import MOST_PIXELS, PICTURES, WHOLE_SLIDES, SlideError, read_slide

__all__ = ["SlideError", "SlideImage", "SlideImages", "misfit"]

KEY = "images.slides"
Key = tuple[str, str, str]

# How far patches may reach beyond the image before its scale is taken to be wrong: corners are
# rounded, and scanners crop.
_BEYOND_SHARE, _BEYOND_PIXELS = 0.01, 2.0
_EXAMPLES = 3  # of images that a remark names


@dataclass(frozen=True, eq=False)
class SlideImage:
    """A slice's image, scaled down.

    Attributes:
        pixels: RGB.
        scale: Level-0 pixels a pixel of ``pixels``, in x and in y: rounding can make them differ.
        file: Where it comes from.
        file_size: Width and height of the image in the file, at full resolution.
        downsample: Level-0 pixels a pixel of the file's image.
    """

    pixels: Image.Image
    scale: tuple[float, float]
    file: Path
    file_size: tuple[int, int]
    downsample: float

    def to_pixels(self, corners: NDArray[np.float64]) -> NDArray[np.float64]:
        """Where points lie in ``pixels``; 0, 0 is the outer corner of the first pixel.

        Args:
            corners: (…, 2) x and y in level-0 pixels.
        """
        return np.asarray(corners / np.array(self.scale))


@dataclass(frozen=True)
class SlideFile:
    """A file and what is known of its scale.

    Attributes:
        path: The file.
        downsample: Level-0 pixels a pixel; None: the project's, or what a whole-slide file says.
        named: Where it is named, for messages.
    """

    path: Path
    downsample: float | None
    named: str


@dataclass(frozen=True)
class SlideImages:
    """The images of a project's slices.

    Attributes:
        files: By case, stain and slice id, normalised as those of patches are.
        downsample: Level-0 pixels a pixel of images that do not say it.
        max_pixels: Larger images are not decoded.
        unread: Images in the folder whose names say no slice, and why.
        named: Whether the project names any.
    """

    files: dict[Key, SlideFile] = field(default_factory=dict)
    downsample: float = 1.0
    max_pixels: int = MOST_PIXELS
    unread: tuple[tuple[str, str], ...] = ()
    named: bool = True

    @classmethod
    def of_project(cls, config: FeatstoreConfig, project: Path) -> SlideImages:
        """The images that ``images.slides`` names; none where it is not set. No image is opened.

        Args:
            config: The project's settings.
            project: The folder that relative paths start from.

        Raises:
            CohortError: The folder or table cannot be read, or names two images for one slice.
        """
        settings = config.images
        most = max(MOST_PIXELS, settings.max_pixels)
        if settings.slides is None:
            return cls({}, settings.slides_downsample, most, named=False)
        source = project / settings.slides
        if source.is_dir():
            found, unread = _in_folder(source, config)
        else:
            found, unread = _in_table(source, config), []
        return cls(found, settings.slides_downsample, most, tuple(unread))

    def remark(self, slices: Collection[Key]) -> str | None:
        """A line about images that are not used, with examples; None if there are none.

        Args:
            slices: Case, stain and slice id of all that images are wanted of.
        """
        wanted = set(slices)
        others = [(file.named, " · ".join(key)) for key, file in self.files.items() if key not in wanted]
        parts = []
        for found, what in ((self.unread, "whose names say no slice"), (others, "of no slice looked at")):
            if found:
                some = ", ".join(f"{name} ({printable(why)})" for name, why in found[:_EXAMPLES])
                parts.append(f"{len(found):,} {what}: {some}{', …' if len(found) > _EXAMPLES else ''}")
        return f"images of slices that are not used ({KEY}): {'; '.join(parts)}" if parts else None

    def find(self, case_id: str, stain: str, slice_id: str) -> Path | None:
        """The file of a slice's image, or None."""
        file = self.files.get((case_id, stain, slice_id))
        return None if file is None else file.path

    def read(self, case_id: str, stain: str, slice_id: str, max_side: int = 1000) -> SlideImage:
        """A slice's image, scaled down to fit a square; never up.

        Args:
            case_id: The case.
            stain: Name of the stain.
            slice_id: The slice.
            max_side: Side of the square in pixels.

        Raises:
            SlideError: There is no image of this slice, or it cannot be read.
        """
        file = self.files.get((case_id, stain, slice_id))
        if file is None:
            raise SlideError(
                f"no image of slice {slice_id} of case {case_id}, {stain}"
                if self.named
                else "no images of slices are named",
                expected="a file case_ID_SLICE_STAIN.jpg, or a row of the table",
                where=KEY,
                fix="add it, or name a folder or table of such images: --slides PATH",
            )
        given = self.downsample if file.downsample is None else file.downsample
        read = read_slide(file.path, max_side, self.max_pixels)
        # A scanner's file knows its own level 0; a row of the table that says otherwise was meant.
        downsample = 1.0 if read.knows_scale and file.downsample is None else given
        width, height = read.pixels.size
        scale = (read.file_size[0] * downsample / width, read.file_size[1] * downsample / height)
        return SlideImage(read.pixels, scale, file.path, read.file_size, downsample)

    def read_or_why(
        self, case_id: str, stain: str, slice_id: str, max_side: int = 1000
    ) -> tuple[SlideImage | None, str]:
        """As `read`; where there is none, None and the reason in a line."""
        try:
            return self.read(case_id, stain, slice_id, max_side), ""
        except SlideError as error:
            return None, f"{error.found}; to do: {error.fix}" if error.fix else error.found


def misfit(slide: SlideImage, corners: NDArray[np.float64]) -> str | None:
    """Why a slice's image cannot be the one on which its patches lie; None if it can.

    Args:
        slide: The image.
        corners: (P, 4, 2) x and y in level-0 pixels; NaN where not known.

    Returns:
        A text that names the image's size, how far the patches reach, and what would fit.
    """
    known = corners[np.isfinite(corners).all(axis=(1, 2))]
    if not len(known):
        return None
    size = np.array(slide.file_size, np.float64)
    low, high = known.min(axis=(0, 1)), known.max(axis=(0, 1))
    spare = np.maximum(_BEYOND_SHARE * size, _BEYOND_PIXELS) * slide.downsample
    if (low >= -spare).all() and (high <= size * slide.downsample + spare).all():
        return None
    (width, height), (right, bottom) = slide.file_size, (math.ceil(side) for side in high)
    covered = " × ".join(f"{side * slide.downsample:,.0f}" for side in slide.file_size)
    text = (
        f"{printable(slide.file.name)} has {width:,} × {height:,} px, at downsample {slide.downsample:g} "
        f"{covered} level-0 px, but the patches reach to x = {right:,}, y = {bottom:,}"
    )
    if (low < -spare).any():
        return f"{text} and begin at x = {low[0]:,.0f}, y = {low[1]:,.0f}: is it another slice's image?"
    fitting = float((high / (size + np.maximum(_BEYOND_SHARE * size, _BEYOND_PIXELS))).max())
    advised, usual = _rounded_up(fitting), 2 ** math.ceil(math.log2(fitting))
    return f"{text}: they fit from a downsample of {advised:g} on (the next usual one: {usual:g})"


def _rounded_up(value: float) -> float:
    """To three digits, never down: the number shall fit."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return round(math.ceil(value / unit) * unit, 12)


def _key(case: str, stain: str, slice_id: str, config: FeatstoreConfig) -> Key:
    """As the patches' ids are normalised."""
    return (
        normalize_case(case) if config.patches.normalize_cases else case,
        stain,
        normalize_slice(slice_id) if config.patches.normalize_slices else slice_id,
    )


def _add(found: dict[Key, SlideFile], key: Key, file: SlideFile) -> None:
    other = found.setdefault(key, file)
    if other is not file:
        case, stain, slice_id = key
        raise CohortError(
            f"two images of slice {slice_id} of case {case}, {stain}: {other.named} and {file.named}",
            expected="one image a slice",
            where=KEY,
            fix="remove one of them",
        )


def _files(folder: Path) -> Iterator[str]:
    """Paths below a folder, sorted, without hidden ones."""

    def refuse(error: OSError) -> None:
        raise CohortError(
            f"{error.filename} cannot be read: {error.strerror}",
            expected="a folder of images of slices",
            where=KEY,
            fix="check its permissions",
        ) from error

    for at, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = Path(at).relative_to(folder)
        yield from (str(inside / name) for name in sorted(names) if not name.startswith("."))


def _in_folder(folder: Path, config: FeatstoreConfig) -> tuple[dict[Key, SlideFile], list[tuple[str, str]]]:
    lookup = stain_lookup(config.stains)
    found: dict[Key, SlideFile] = {}
    unread = []
    for path in _files(folder):
        stem, suffix = os.path.splitext(os.path.basename(path))
        # Patches may lie in the same folder.
        if suffix.lower() not in PICTURES | WHOLE_SLIDES or "_patch" in stem:
            continue
        parts = split_stem(stem, lookup)
        if isinstance(parts, str):
            unread.append((printable(path), printable(parts)))
            continue
        key = _key(parts.case, parts.stain, parts.slice, config)
        _add(found, key, SlideFile(folder / path, None, printable(path)))
    return found, unread


def _in_table(file: Path, config: FeatstoreConfig) -> dict[Key, SlideFile]:
    table = Table(file, KEY)
    lookup = stain_lookup(config.stains)
    case, slice_id, stain, path = (
        table.column(name, ignore_case=True, fix=f"add '{name}'")
        for name in ("case_id", "slice_id", "stain", "path")
    )
    has_downsample = "downsample" in {name.casefold() for name in table.columns}
    downsample = table.column("downsample", ignore_case=True, fix="") if has_downsample else None
    found: dict[Key, SlideFile] = {}
    for line, cells in table.rows():
        name = lookup.get(cells[stain].casefold())
        problems = [
            f"{kind} id {cells[at]!a} {problem}"
            for kind, at in (("case", case), ("slice", slice_id))
            if (problem := id_problem(cells[at])) is not None
        ]
        if name is None:
            problems.append(f"unknown stain {cells[stain]!a}")
        if not cells[path] or "\0" in cells[path]:
            problems.append("no path")
        if problems or name is None:
            raise CohortError(
                f"{file} has in line {line}: {'; '.join(problems)}",
                expected="case, slice and stain as in the patches' names, and the path of an image",
                where=KEY,
                fix="mend that line; further stains are named under `stains:` in featstore.yaml",
            )
        given = None if downsample is None else _number(cells[downsample], file, line)
        image = SlideFile(file.parent / cells[path], given, f"{printable(cells[path])} (line {line})")
        _add(found, _key(cells[case], name, cells[slice_id], config), image)
    return found


def _number(cell: str, file: Path, line: int) -> float | None:
    """A positive number, or None of an empty cell."""
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise CohortError(
            f"{file} has downsample = '{cell}' in line {line}",
            expected="a positive number: level-0 pixels a pixel of the image",
            where=KEY,
            fix="mend that cell, or leave it empty",
        )
    return value
