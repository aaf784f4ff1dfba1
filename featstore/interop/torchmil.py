"""torchmil: ``features/<bag>.npy``, and beside it ``labels/`` and ``coords/`` with the same names.

torchmil gives coordinates no unit, so they are kept as they are; with ``--patch-size`` they count
as top left corners in level-0 pixels.
Source: torchmil, `ProcessedMILDataset`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from featstore.cohort.names import integral
from featstore.interop.source import Contents, Entry, ImportProblem, Options, Source, boxes, files_named

_FEATURES, _LABELS, _COORDS = "features", "labels", "coords"


def load_numpy(path: Path, member: str | None = None, mapped: bool = False) -> NDArray[Any]:
    """An array from a .npy file, or a member of a .npz file; never a pickle.

    Raises:
        ImportProblem: The file cannot be read, or holds Python objects.
    """
    try:
        if mapped:
            return np.lib.format.open_memmap(path, mode="r")
        with open(path, "rb") as raw:
            found = np.load(raw, allow_pickle=False)
            if isinstance(found, NpzFile):
                if member is None:
                    raise ValueError("it is an .npz file, not an .npy file")
                found = found[member]
            elif member is not None:
                raise ValueError("it is an .npy file, not an .npz file")
        if not isinstance(found, np.ndarray):
            raise ValueError("it holds no array")
        return found
    except Exception as error:  # what numpy raises depends on where the bytes stop making sense
        raise ImportProblem(
            f"the file cannot be read as an array ({error})",
            expected="an array of numbers, as NumPy saves it without pickle",
            where=str(path),
            fix="save it again, or leave it out with --on-bad skip",
        ) from error


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

    def read(self, entry: Entry) -> Contents:
        """A bag's features and coordinates."""
        features = load_numpy(self.root / entry.path)
        coords = self._coords(entry.name, entry.rows)
        size = self.options.patch_size
        corners = None if coords is None or size is None else boxes(coords, size)
        return self.one_file(entry, features, corners, coords)

    def _coords(self, name: str, rows: int) -> NDArray[np.float64] | None:
        path = self.root / _COORDS / f"{name}.npy"
        if not path.is_file():
            return None
        found = load_numpy(path)
        if found.shape != (rows, 2) or found.dtype.kind not in "fiu":
            raise self.problem(path, f"{found.dtype} of the shape {found.shape}", f"({rows}, 2) numbers")
        coords: NDArray[np.float64] = found.astype(np.float64)
        return coords
