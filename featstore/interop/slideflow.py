"""slideflow: ``<slide>.pt``, ``<slide>.index.npz`` with ``arr_0``, and ``bags_config.json``.

The index holds the centres of the tiles in level-0 pixels. How large a tile is there follows from
``tile_um`` and ``--mpp``, or is said by ``--patch-size``.
Source: github.com/slideflow/slideflow, `DatasetFeatures.to_torch`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.interop.arrays import load_numpy
from featstore.interop.source import (
    Entry,
    ImportProblem,
    Options,
    Places,
    Source,
    boxes,
    files_named,
    number,
)
from featstore.interop.tensors import read_tensor, tensor_shape

_CONFIG, _INDEX = "bags_config.json", ".index.npz"


class Slideflow(Source):
    """A folder of bags that slideflow wrote."""

    format = "slideflow"
    layout = f"SLIDE.pt (N, D), SLIDE{_INDEX} with arr_0 (N, 2), and {_CONFIG}"

    def __init__(self, root: Path, options: Options) -> None:
        super().__init__(root, options)
        self.coords_meaning = "centres of the tiles, in level-0 pixels"
        self._size = options.patch_size
        if (root / _CONFIG).is_file():
            self._read_config(root / _CONFIG)

    def _read_config(self, path: Path) -> None:
        try:
            found = json.loads(path.read_bytes())
            extractor = found.get("extractor") or {}
            self.encoder = str(extractor["class"]).rpartition(".")[2] if "class" in extractor else None
            micrometres = number(found.get("tile_um"))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ImportProblem(
                f"the file is not what slideflow writes ({error})",
                expected="JSON with extractor, tile_px and tile_um",
                where=str(path),
                fix="restore it, or remove it",
            ) from error
        self.details = {name: found.get(name) for name in ("extractor", "normalizer", "tile_px", "tile_um")}
        if self._size is None and micrometres and self.options.mpp:
            self._size = micrometres / self.options.mpp

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether there is slideflow's description, or an index."""
        return (path / _CONFIG).is_file() or any(path.glob(f"*{_INDEX}"))

    def bags(self) -> list[tuple[str, str]]:
        """Every slide."""
        found = [(path.stem, path.name) for path in files_named(self.root, ".pt")]
        indexed = {path.name.removesuffix(_INDEX) for path in files_named(self.root, _INDEX)}
        if lost := sorted(indexed - {name for name, _ in found}):
            self.notes.append(f"{len(lost)} indices have no bag ({', '.join(lost[:5])})")
        if bare := [name for name, _ in found if name not in indexed]:
            self.notes.append(f"{len(bare)} slides have no index: they come without coordinates")
        if self._size is None and indexed:
            self.notes.append(
                "how large a tile is in level-0 pixels is not known: its centre alone is kept "
                "(--mpp or --patch-size)"
            )
        return found

    def look(self, name: str, path: str) -> Entry:
        """Shape and dtype of a slide's features."""
        file = self.root / path
        found = self.entry(name, path, *tensor_shape(file))
        self._index(name, found.rows)
        return found

    def features(self, entry: Entry) -> NDArray[Any]:
        """A slide's features."""
        return read_tensor(self.root / entry.path)

    def places(self, entry: Entry) -> Places:
        """The centres of a slide's tiles, and their corners where their size is known."""
        coords = self._index(entry.name, entry.rows)
        if coords is None or self._size is None:
            return Places(None, coords)
        return Places(boxes(coords - self._size / 2, self._size), coords)

    def _index(self, name: str, rows: int) -> NDArray[np.float64] | None:
        path = self.root / f"{name}{_INDEX}"
        return self.checked_coords(path, load_numpy(path, "arr_0"), rows) if path.is_file() else None
