"""What every foreign format gives: a list of bags, then one bag at a time."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import natural_key
from featstore.config import FeatstoreConfig
from featstore.errors import FeatstoreError

_BLOCK = 1 << 22


class ImportProblem(FeatstoreError):
    """A foreign file that is not what its layout promises."""


@dataclass(frozen=True)
class Options:
    """What a user may know about a foreign folder and its files do not say.

    Attributes:
        config: The project's settings: the grammar of names, stains, normalisation of ids.
        base: The folder that relative paths of the config start from.
        patch_size: Side of a patch in level-0 pixels.
        mpp: Micrometres a level-0 pixel.
    """

    config: FeatstoreConfig
    base: Path
    patch_size: float | None = None
    mpp: float | None = None


@dataclass(frozen=True)
class Key:
    """Where rows go: case, stain, slice."""

    case: str
    stain: str
    slice_id: str


@dataclass(frozen=True)
class Entry:
    """One bag as its folder lists it; its embeddings have not been read.

    Attributes:
        name: The bag's name there, such as a slide's.
        path: Its file, relative to the source's root (POSIX).
        rows: Number of embeddings N.
        dim: Number of features D.
        dtype: NumPy's name of their dtype, as it is stored.
        key: Where its rows go, where names say so; else the import decides.
    """

    name: str
    path: str
    rows: int
    dim: int
    dtype: str
    key: Key | None = None


@dataclass(frozen=True)
class Places:
    """Where the patches of a bag lie (N patches).

    Attributes:
        corners: (N, 8) float64 in level-0 pixels; NaN where not known, None if none is.
        coords: (N, 2) float64, what the file says, where `corners` does not hold all of it.
    """

    corners: NDArray[np.float64] | None = None
    coords: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Contents:
    """One bag that has been read (N patches, D features).

    Attributes:
        features: (N, D) as they were stored.
        patch: (N,) int64 patch numbers, ascending; the row numbers where a format has none.
        names: N names of the files that the rows come from, relative to the root.
        stat: (N, 2) int64, their sizes in bytes and modification times in ns.
        sha256: (N, 32) uint8, of their bytes.
        places: Where they lie.
    """

    features: NDArray[Any]
    patch: NDArray[np.int64]
    names: Sequence[str]
    stat: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    places: Places


class Source(ABC):
    """A folder or file in a foreign format.

    Attributes:
        format: Its name on the command line.
        layout: What such a folder looks like, for messages.
        root: The folder that names of files start from.
        encoder: What made the features, as far as the source says.
        labels: Raw class by the bag's name, where the source holds classes.
        notes: What a person should know about this source.
        coords_meaning: Unit and origin of ``coords``; empty where there are none.
        details: What else the source says about how the features were made.
    """

    format: ClassVar[str]
    layout: ClassVar[str]
    # Whether a bag is all that there is of its slice, so that rows it had before are gone.
    holds_whole_slices: ClassVar[bool] = True
    # Whether one file holds all bags.
    is_one_file: ClassVar[bool] = False

    def __init__(self, root: Path, options: Options) -> None:
        self.root = root
        self.options = options
        self.encoder: str | None = None
        self.labels: dict[str, str] = {}
        self.notes: list[str] = []
        self.coords_meaning = ""
        self.details: dict[str, Any] = {}
        # Of the last file: a table holds thousands of bags, and is hashed once.
        self._hashed: tuple[Path, tuple[int, int], bytes] | None = None

    @classmethod
    @abstractmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether this path seems to be in this format; a look, not a check."""

    @abstractmethod
    def bags(self) -> list[tuple[str, str]]:
        """Name of every bag and its file relative to the root, in natural order; opens no bag.

        Raises:
            FeatstoreError: The folder is not in this layout.
        """

    @abstractmethod
    def look(self, name: str, path: str) -> Entry:
        """What a bag's file says of itself, without its embeddings.

        Raises:
            FeatstoreError: The file is not what the layout promises.
        """

    @abstractmethod
    def features(self, entry: Entry) -> NDArray[Any]:
        """(N, D) features of one bag.

        Raises:
            FeatstoreError: The file cannot be read.
        """

    def places(self, entry: Entry) -> Places:
        """Where a bag's patches lie, without its features.

        Raises:
            FeatstoreError: The file cannot be read, or has something else than one pair a patch.
        """
        return Places()

    def read(self, entry: Entry) -> Contents:
        """One bag; here of a format in which all its rows come from one file.

        Raises:
            FeatstoreError: The file cannot be read, or is not what it was when it was listed.
        """
        path = self.root / entry.path
        state = self.states(entry)[entry.path]
        features, places = self.features(entry), self.places(entry)
        if features.shape != (entry.rows, entry.dim):
            expected = f"{(entry.rows, entry.dim)}, as when it was listed"
            raise self.problem(path, f"features of the shape {features.shape}", expected)
        hashed = self._hashed
        if hashed is None or hashed[:2] != (path, state):
            hashed = self._hashed = (path, state, file_sha256(path))
        if file_state(path) != state:
            raise self.problem(path, "the file changes while it is being read", "a file that is finished")
        rows = len(features)
        return Contents(
            features=features,
            patch=np.arange(rows, dtype=np.int64),
            names=[entry.path] * rows,
            stat=np.broadcast_to(np.array(state, np.int64), (rows, 2)),
            sha256=np.broadcast_to(np.frombuffer(hashed[2], np.uint8), (rows, 32)),
            places=places,
        )

    def entry(self, name: str, path: str, shape: Sequence[int], dtype: str) -> Entry:
        """A bag by the shape of its features, which must be (N, D), and their dtype.

        Raises:
            ImportProblem: They are no matrix of numbers, or an empty one.
        """
        if len(shape) != 2 or 0 in shape or not dtype.startswith(("float", "bfloat", "int", "uint")):
            raise self.problem(
                self.root / path,
                f"{dtype} features of the shape {tuple(shape)}",
                "(number of patches, number of features) numbers",
            )
        return Entry(name, path, int(shape[0]), int(shape[1]), dtype)

    def states(self, entry: Entry) -> Mapping[str, tuple[int, int]]:
        """Size in bytes and modification time in ns of the bag's files, by name; reads none."""
        return {entry.path: file_state(self.root / entry.path)}

    def problem(self, path: Path, found: str, expected: str = "") -> ImportProblem:
        """An error about one file of this source."""
        return ImportProblem(
            found,
            expected=expected or self.layout,
            where=str(path),
            fix="mend or remove this file, or leave it out with --on-bad skip; "
            "another layout: --from FORMAT",
        )

    def checked_coords(self, path: Path, found: NDArray[Any], rows: int) -> NDArray[np.float64]:
        """Coordinates as numbers.

        Raises:
            ImportProblem: They are not one finite pair a patch.
        """
        if found.shape != (rows, 2) or found.dtype.kind not in "fiu":
            what = f"coordinates of the shape {found.shape} of {found.dtype}"
            raise self.problem(path, what, f"({rows}, 2): x, y of every patch")
        coords: NDArray[np.float64] = found.astype(np.float64)
        if not np.isfinite(coords).all():
            row = int(np.flatnonzero(~np.isfinite(coords).all(axis=1))[0])
            raise self.problem(path, f"coordinates {coords[row].tolist()} in row {row}", "finite numbers")
        return coords


def file_state(path: Path) -> tuple[int, int]:
    """Size in bytes and modification time in ns."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def file_sha256(path: Path) -> bytes:
    """The digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.digest()


def boxes(top_left: NDArray[Any], size: float | NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Corners, clockwise from the top left, of squares that lie along the axes.

    Args:
        top_left: (N, 2) x, y in level-0 pixels.
        size: Their side; None where it is not known.

    Returns:
        (N, 8) float64: x0, y0, …, x3, y3; without a size all but the first corner is NaN.
    """
    x, y = np.asarray(top_left, np.float64).T
    side = np.nan if size is None else size
    return np.column_stack([x, y, x + side, y, x + side, y + side, x, y + side])


def files_named(folder: Path, suffix: str) -> list[Path]:
    """The plain files in a folder with this suffix, in natural order; hidden ones are litter."""
    with os.scandir(folder) as entries:
        names = [
            entry.name
            for entry in entries
            if entry.name.endswith(suffix) and not entry.name.startswith(".") and entry.is_file()
        ]
    return [folder / name for name in sorted(names, key=natural_key)]


def text(value: Any) -> str | None:
    """An attribute as text; None where it is missing or stands for nothing."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    found = None if value is None else str(value)
    return None if found in (None, "", "None") else found


def number(value: Any) -> float | None:
    """An attribute as a positive number; None where it is missing or stands for nothing."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found > 0 else None
