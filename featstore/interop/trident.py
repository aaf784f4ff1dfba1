"""TRIDENT: ``features_<encoder>/<slide>.h5`` with ``features`` and ``coords``.

Coordinates are top left corners in level-0 pixels; the attributes of ``coords`` say how large a
patch is there. An attribute that TRIDENT did not know stands as the text 'None'.
Source: github.com/mahmoodlab/TRIDENT, `WSI.extract_patch_features`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from featstore.interop import hdf5_files
from featstore.interop.source import (
    Entry,
    ImportProblem,
    Options,
    Places,
    Source,
    boxes,
    files_named,
    number,
    text,
)

_PREFIX = "features_"
_SIZE = "patch_size_level0"


class Trident(Source):
    """A folder ``features_<encoder>`` that TRIDENT wrote, or a folder that holds just one of these."""

    format = "trident"
    layout = (
        f"{_PREFIX}ENCODER/SLIDE.h5 with features (N, D) and coords (N, 2), whose attributes name {_SIZE}"
    )

    def __init__(self, root: Path, options: Options) -> None:
        inner = _inner(root)
        if len(inner) > 1:
            raise ImportProblem(
                f"the folder holds the features of {len(inner)} encoders",
                expected="one encoder an import, as a store holds embeddings of one make",
                where=str(root),
                fix=f"name one of them: {', '.join(str(folder) for folder in inner)}",
            )
        super().__init__(inner[0] if inner else root, options)
        if self.root.name.startswith(_PREFIX):
            self.encoder = self.root.name.removeprefix(_PREFIX)

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether the first HDF5 file that can be read has TRIDENT's attributes."""
        inner = _inner(path)
        first = hdf5_files.first_readable(files_named(inner[0] if inner else path, ".h5"))
        if first is None:
            return bool(inner)
        with hdf5_files.opened(first) as file:
            found: bool = hdf5_files.is_array(file, "coords") and _SIZE in file["coords"].attrs
        return found

    def bags(self) -> list[tuple[str, str]]:
        """Every slide."""
        return [(path.stem, path.name) for path in files_named(self.root, ".h5")]

    def look(self, name: str, path: str) -> Entry:
        """Shape and dtype of a slide's features."""
        file = self.root / path
        with hdf5_files.opened(file) as opened:
            data = hdf5_files.matrix(opened, "features", file)
            self.checked_coords(file, hdf5_files.array(opened, "coords", file)[()], data.shape[0])
            attributes = opened["coords"].attrs
            if _SIZE not in attributes:
                raise self.problem(file, f"'coords' has no attribute {_SIZE}: a file of another tool")
            # 'name' is the slide's: a renamed file would give the bag another name than its slide has.
            own = text(attributes.get("name"))
            if own not in (None, name):
                raise self.problem(file, f"the file says that it is slide {own!r}", f"{name}.h5")
            return self.entry(name, path, data.shape, data.dtype.name)

    def features(self, entry: Entry) -> NDArray[Any]:
        """A slide's features."""
        with hdf5_files.opened(self.root / entry.path) as opened:
            found: NDArray[Any] = hdf5_files.matrix(opened, "features", self.root / entry.path)[()]
        return found

    def places(self, entry: Entry) -> Places:
        """A slide's corners."""
        file = self.root / entry.path
        with hdf5_files.opened(file) as opened:
            coords = hdf5_files.array(opened, "coords", file)[()]
            size = _level0_size(opened["coords"].attrs) or self.options.patch_size
        return Places(boxes(self.checked_coords(file, coords, entry.rows), size))


def _inner(path: Path) -> list[Path]:
    return sorted(folder for folder in path.glob(f"{_PREFIX}*") if folder.is_dir())


def _level0_size(attributes: Any) -> float | None:
    """Side of a patch in level-0 pixels: as it stands there, or by the two magnifications."""
    size = number(attributes.get(_SIZE))
    if size is not None:
        return size
    values = [
        number(attributes.get(name))
        for name in ("patch_size", "level0_magnification", "target_magnification")
    ]
    patch, level0, target = values
    return patch * level0 / target if patch and level0 and target else None
