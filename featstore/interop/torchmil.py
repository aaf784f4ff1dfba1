"""torchmil: ``features/<bag>.npy``, and beside it ``labels/`` and ``coords/`` with the same names.

torchmil gives coordinates no unit, so they are kept as they are; with ``--patch-size`` they count
as top left corners in level-0 pixels.
Source: torchmil, `ProcessedMILDataset`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.names import integral
from featstore.interop.arrays import load_numpy
from featstore.interop.source import Entry, Options, Places, Source, boxes, files_named

_FEATURES, _LABELS, _COORDS = "features", "labels", "coords"


class Torchmil(Source):
    """A folder in the layout of torchmil's processed data sets."""

    format = "torchmil"
    layout = "features/BAG.npy (N, D), and labels/BAG.npy, coords/BAG.npy (N, 2)"

    def __init__(self, root: Path, options: Options) -> None:
        super().__init__(root, options)
        self.coords_meaning = "as torchmil has them"

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether there is a folder of features in NumPy's format."""
        return (path / _FEATURES).is_dir() and any((path / _FEATURES).glob("*.npy"))

    def bags(self) -> list[tuple[str, str]]:
        """Every bag."""
        if not (self.root / _FEATURES).is_dir():
            raise self.problem(self.root, f"no folder {_FEATURES}")
        files = files_named(self.root / _FEATURES, ".npy")
        found = [(path.stem, f"{_FEATURES}/{path.name}") for path in files]
        names = {name for name, _ in found}
        for folder in (_LABELS, _COORDS):
            if not (self.root / folder).is_dir():
                continue
            there = {path.stem for path in files_named(self.root / folder, ".npy")}
            for odd, what in (
                (names - there, f"bags have no file in {folder}"),
                (there - names, f"files in {folder} belong to no bag"),
            ):
                if odd:
                    self.notes.append(f"{len(odd)} {what} ({', '.join(sorted(odd)[:5])})")
        return found

    def _label(self, path: Path) -> str:
        found = load_numpy(path)
        if found.size != 1 or found.dtype.kind not in "fiubU":
            raise self.problem(path, f"{found.dtype} of the shape {found.shape}", "one class")
        return integral(str(found.reshape(-1)[0]))

    def look(self, name: str, path: str) -> Entry:
        """Shape and dtype of a bag's features; reads its label."""
        file = self.root / path
        label = self.root / _LABELS / f"{name}.npy"
        if label.is_file():
            self.labels[name] = self._label(label)
        array = load_numpy(file, mapped=True)
        found = self.entry(name, path, array.shape, array.dtype.name)
        self._coords(name, found.rows)
        return found

    def features(self, entry: Entry) -> NDArray[Any]:
        """A bag's features."""
        return load_numpy(self.root / entry.path)

    def places(self, entry: Entry) -> Places:
        """A bag's coordinates, and its corners where the size of a patch is known."""
        coords, size = self._coords(entry.name, entry.rows), self.options.patch_size
        return Places(None if coords is None or size is None else boxes(coords, size), coords)

    def _coords(self, name: str, rows: int) -> NDArray[np.float64] | None:
        path = self.root / _COORDS / f"{name}.npy"
        return self.checked_coords(path, load_numpy(path), rows) if path.is_file() else None
