"""STAMP: ``<slide>.h5`` with ``feats`` and ``coords``, which are in micrometres.

How many micrometres a level-0 pixel has stands in the slide only, so ``--mpp`` says it; the
coordinates are kept as they are in any case.
Source: github.com/KatherLab/STAMP, `stamp.preprocessing`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from featstore.interop import hdf5_files
from featstore.interop.source import Entry, Options, Places, Source, boxes, files_named, number, text


class Stamp(Source):
    """A folder of features of tiles that STAMP wrote."""

    format = "stamp"
    layout = "SLIDE.h5 with feats (N, D), coords (N, 2) in µm, and the attributes unit and extractor"

    def __init__(self, root: Path, options: Options) -> None:
        super().__init__(root, options)
        self.coords_meaning = "top left corners, in micrometres"

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether the first HDF5 file that can be read has STAMP's array."""
        first = hdf5_files.first_readable(files_named(path, ".h5"))
        if first is None:
            return False
        with hdf5_files.opened(first) as file:
            return "feats" in hdf5_files.names(file)

    def bags(self) -> list[tuple[str, str]]:
        """Every slide."""
        if self.options.mpp is None:
            self.notes.append(
                "STAMP's coordinates are in micrometres; for level-0 pixels say how many one has (--mpp)"
            )
        return [(path.stem, path.name) for path in files_named(self.root, ".h5")]

    def look(self, name: str, path: str) -> Entry:
        """Shape and dtype of a slide's features."""
        file = self.root / path
        with hdf5_files.opened(file) as opened:
            data = hdf5_files.matrix(opened, "feats", file)
            kind = text(opened.attrs.get("feat_type"))
            if kind not in (None, "tile"):
                raise self.problem(file, f"features of a {kind}, not of tiles", "feat_type tile")
            unit = text(opened.attrs.get("unit"))
            if unit != "um":
                raise self.problem(file, f"coordinates in the unit {unit}", "unit um (micrometres)")
            coords = hdf5_files.coordinates(opened, file)
            if coords is not None:
                self.checked_coords(file, coords, data.shape[0])
            names = ("extractor", "stamp_version", "code_hash", "tile_size_um", "tile_size_px")
            made = {key: text(opened.attrs.get(key)) for key in names}
            self.details = self.details or made
            for key in ("extractor", "tile_size_um"):
                if made[key] != self.details[key]:
                    raise self.problem(
                        file, f"{key} is {made[key]}", f"{self.details[key]}, as in the files before"
                    )
            self.encoder = made["extractor"]
            return self.entry(name, path, data.shape, data.dtype.name)

    def features(self, entry: Entry) -> NDArray[Any]:
        """A slide's features."""
        with hdf5_files.opened(self.root / entry.path) as opened:
            found: NDArray[Any] = hdf5_files.matrix(opened, "feats", self.root / entry.path)[()]
        return found

    def places(self, entry: Entry) -> Places:
        """A slide's coordinates, and its corners where the size of a pixel is known."""
        file, mpp = self.root / entry.path, self.options.mpp
        with hdf5_files.opened(file) as opened:
            found = hdf5_files.coordinates(opened, file)
            size = number(opened.attrs.get("tile_size_um"))
        if found is None:
            return Places()
        coords = self.checked_coords(file, found, entry.rows)
        if mpp is None:
            return Places(None, coords)
        return Places(boxes(coords / mpp, None if size is None else size / mpp), coords)
