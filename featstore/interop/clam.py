"""CLAM: ``h5_files/<slide>.h5`` with ``features`` and ``coords``, ``pt_files/<slide>.pt``.

Coordinates are the top left corners of the patches in level-0 pixels; how large a patch is stands
in another file of CLAM's, so ``--patch-size`` says it.
Source: github.com/mahmoodlab/CLAM, `extract_features_fp.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from featstore.interop import hdf5_files
from featstore.interop.source import Entry, Options, Places, Source, boxes, files_named
from featstore.interop.tensors import read_tensor, tensor_shape

H5, PT = "h5_files", "pt_files"


class Clam(Source):
    """A folder that CLAM's feature extraction wrote, or its ``h5_files`` or ``pt_files`` alone."""

    format = "clam"
    layout = f"{H5}/SLIDE.h5 with features (N, D) and coords (N, 2), or {PT}/SLIDE.pt"

    def __init__(self, root: Path, options: Options) -> None:
        alone = root.name in (H5, PT) or not self.looks_right(root)
        super().__init__(root.parent if alone else root, options)
        self._given = root
        self._folders = [(root.name, ".h5"), (root.name, ".pt")] if alone else [(H5, ".h5"), (PT, ".pt")]

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether there are CLAM's folders."""
        return path.name in (H5, PT) or (path / H5).is_dir() or (path / PT).is_dir()

    def bags(self) -> list[tuple[str, str]]:
        """Every slide, from its HDF5 file where there is one."""
        found: dict[str, str] = {}
        for folder, suffix in self._folders:
            if (self.root / folder).is_dir():
                for path in files_named(self.root / folder, suffix):
                    found.setdefault(path.stem, f"{folder}/{path.name}")
        if not found:
            raise self.problem(self._given, "there are no bags here")
        alone = sum(path.endswith(".pt") for path in found.values())
        if alone:
            self.notes.append(f"{alone:,} slides have no .h5 file: they come without coordinates")
        if self.options.patch_size is None and alone < len(found):
            self.notes.append(
                "the files do not say how large a patch is: only top left corners are known (--patch-size)"
            )
        return list(found.items())

    def look(self, name: str, path: str) -> Entry:
        """Shape and dtype of a slide's features."""
        file = self.root / path
        if not path.endswith(".h5"):
            return self.entry(name, path, *tensor_shape(file))
        with hdf5_files.opened(file) as opened:
            data = hdf5_files.matrix(opened, "features", file)
            found = self.entry(name, path, data.shape, data.dtype.name)
            coords = hdf5_files.coordinates(opened, file)
            if coords is not None and "patch_size_level0" in opened["coords"].attrs:
                raise self.problem(file, "a file of TRIDENT's stands among CLAM's")
        if coords is not None:
            self.checked_coords(file, coords, found.rows)
        return found

    def features(self, entry: Entry) -> NDArray[Any]:
        """A slide's features."""
        file = self.root / entry.path
        if entry.path.endswith(".pt"):
            return read_tensor(file)
        with hdf5_files.opened(file) as opened:
            found: NDArray[Any] = hdf5_files.matrix(opened, "features", file)[()]
        return found

    def places(self, entry: Entry) -> Places:
        """A slide's coordinates, where it has any."""
        file = self.root / entry.path
        if entry.path.endswith(".pt"):
            return Places()
        with hdf5_files.opened(file) as opened:
            coords = hdf5_files.coordinates(opened, file)
        if coords is None:
            return Places()
        return Places(boxes(self.checked_coords(file, coords, entry.rows), self.options.patch_size))
