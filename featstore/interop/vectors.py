"""A folder with one .pt vector a patch, named like the patch's PNG: what many labs have."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featstore.cohort.patches import scan
from featstore.errors import CohortError
from featstore.extraction.geometry import corners
from featstore.interop.source import (
    Contents,
    Entry,
    ImportProblem,
    Key,
    Options,
    Places,
    Source,
    file_state,
)
from featstore.interop.tensors import SmallTensors

_SUFFIX = ".pt"
# Threads hide a network's latency; a task of a few files costs less than a task a file.
_WORKERS, _RUN = 4, 16


@dataclass(frozen=True)
class _Vector:
    name: str
    values: NDArray[Any]
    stat: tuple[int, int]
    sha256: bytes


class Vectors(Source):
    """Vectors below a folder; case, stain, slice and patch number come from their names."""

    format = "vectors"
    layout = "case_ID_SLICE_STAIN_patchN.pt, each a vector of the same length"
    holds_whole_slices = False

    def __init__(self, root: Path, options: Options) -> None:
        super().__init__(root, options)
        self._tensors = SmallTensors()
        self._rows: dict[str, tuple[Key, NDArray[np.int64], list[str], NDArray[np.float64] | None]] = {}

    @classmethod
    def looks_right(cls, path: Path) -> bool:
        """Whether there are patches' vectors in the first folder that has any .pt file."""
        for _, _, names in os.walk(path):
            found = [name for name in names if name.lower().endswith(_SUFFIX) and name[0] != "."]
            if found:
                return any("_patch" in name for name in found)
        return False

    def bags(self) -> list[tuple[str, str]]:
        """Every slice; its name is case, stain and slice."""
        config, base = self.options.config, self.options.base
        try:
            found = scan(
                self.root, config.patches, config.stains, config.exclude, base=base, suffix=_SUFFIX
            )
        except CohortError as error:
            if error.where == "patches.folder":
                error.where = str(self.root)
                error.fix = error.fix.replace(" (they are listed in unparsed.csv)", "")
            raise
        if found.unparsed:
            count = f"{len(found.unparsed):,} names cannot be read and are left out"
            self.notes.append(f"{count}, e.g. {found.unparsed[0].path}")
        if found.excluded_patches:
            self.notes.append(f"{found.excluded_patches:,} vectors of excluded cases are left out")
        grouped = found.table.groupby(["case_id", "stain", "slice_id"], observed=True, sort=False)
        for (case, stain, slice_id), rows in grouped:
            key = Key(str(case), str(stain), str(slice_id))
            name = f"{key.case} {key.stain} {key.slice_id}"
            patches = rows["patch"].to_numpy(np.int64)
            self._rows[name] = (key, patches, rows["path"].tolist(), corners(rows))
        return [(name, paths[0]) for name, (_, _, paths, _) in self._rows.items()]

    def look(self, name: str, path: str) -> Entry:
        """As many rows as there are files; length and dtype are those of the slice's first vector."""
        key, patches, _, _ = self._rows[name]
        values = self._read_file(path).values
        return Entry(name, path, len(patches), len(values), values.dtype.name, key)

    def read(self, entry: Entry) -> Contents:
        """A slice's vectors."""
        _, patches, paths, places = self._rows[entry.name]
        runs = [paths[i : i + _RUN] for i in range(0, len(paths), _RUN)]
        with ThreadPoolExecutor(_WORKERS) as pool:
            vectors = list(chain.from_iterable(pool.map(self._read_files, runs)))
        keep = self.options.config.imports.precision == "keep"
        for vector in vectors:
            values = vector.values
            if len(values) != entry.dim:
                found = f"a vector of {len(values)} numbers"
                raise self.problem(self.root / vector.name, found, f"{entry.dim} numbers")
            # The store's dtype was chosen by the first vector: others must not silently lose digits.
            if keep and entry.dtype == "float16" and values.dtype != np.float16:
                raise ImportProblem(
                    f"{values.dtype} here, {entry.dtype} in the slice's first vector",
                    expected="vectors of one dtype",
                    where=str(self.root / vector.name),
                    fix="say which the store is to have: --precision float32, or float16",
                )
        return Contents(
            features=np.stack([vector.values for vector in vectors]),
            patch=patches,
            names=paths,
            stat=np.array([vector.stat for vector in vectors], np.int64),
            sha256=np.stack([np.frombuffer(vector.sha256, np.uint8) for vector in vectors]),
            places=Places(places),
        )

    def places(self, entry: Entry) -> Places:
        """The slice's corners, from names or from a table."""
        return Places(self._rows[entry.name][3])

    def features(self, entry: Entry) -> NDArray[Any]:
        """A slice's vectors, one under the other."""
        return self.read(entry).features

    def states(self, entry: Entry) -> Mapping[str, tuple[int, int]]:
        """Size in bytes and modification time in ns of the slice's files, by name."""
        return {path: file_state(self.root / path) for path in self._rows[entry.name][2]}

    def _read_files(self, names: Sequence[str]) -> list[_Vector]:
        return [self._read_file(name) for name in names]

    def _read_file(self, name: str) -> _Vector:
        path = self.root / name
        with open(path, "rb", buffering=0) as file:
            data = file.read()
            state = os.fstat(file.fileno())
        values = self._tensors.read(data, path)
        if values.ndim != 1 or not len(values) or values.dtype.kind not in "fiu":
            raise self.problem(path, f"{values.dtype} of the shape {values.shape}", "a vector of numbers")
        return _Vector(name, values, (state.st_size, state.st_mtime_ns), hashlib.sha256(data).digest())
