"""Reading a store: a consistent view of what was committed when it was opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from featstore.bags import Bag
from featstore.cohort.names import natural_key
from featstore.errors import StoreDamaged, StoreError
from featstore.lazy import cached_property
from featstore.spec import EmbeddingSpec
from featstore.store.format import CASES, COORDS_COLUMNS, GEOMETRY_COLUMNS, Record
from featstore.store.ids import component
from featstore.store.mapped import MappedRows, Recent
from featstore.store.reading import (
    Layout,
    described,
    file_states,
    layout,
    live_sizes,
    read_columns,
    read_features,
)
from featstore.store.records import newest_records, read_record, require_manifest

# A record has a few kB; of a store of 100,000 cases not all are kept.
_RECORDS, _LAYOUTS = 20_000, 2_000


class _Listed(NamedTuple):
    """All cases in natural order: their first rows in `Store.table`, their sizes; and all stains."""

    starts: dict[str, int]
    sizes: dict[str, int]
    stain_ids: dict[str, int]


class Store:
    """A read-only view of an embedding store.

    What is committed after `open` is not seen, what is superseded or removed
    after it stays readable: a reader never sees a mixture.

    Example:
        >>> store = Store.open("store")                      # doctest: +SKIP
        >>> features = store.bag(store.cases()[0]).features  # doctest: +SKIP
    """

    def __init__(self, path: Path, spec: EmbeddingSpec, newest: dict[str, int]) -> None:
        self.path = path
        self.spec = spec
        self._newest = newest
        self._records: Recent[str, Record] = Recent(_RECORDS)
        self._layouts: Recent[str, Layout] = Recent(_LAYOUTS)
        self._mapped = MappedRows(spec.stored_dtype, spec.dim)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open a store for reading.

        Raises:
            StoreError: There is no store at this path, it may not be read, or it
                is of another major version of the format.
            StoreDamaged: Its description is not what was written.
        """
        root = Path(path)
        return cls(root, require_manifest(root), newest_records(root))

    def cases(self) -> list[str]:
        """The ids of all cases that have live embeddings, in natural order."""
        return list(self._listed.starts)

    def stains(self) -> list[str]:
        """The names of all stains in the store, in natural order."""
        return list(self._listed.stain_ids)

    def bag(self, case_id: str) -> Bag:
        """One case's embeddings, in the patch table's order.

        Raises:
            StoreError: The store has no such case.
            StoreDamaged: A part is missing or is not what was written.
        """
        return replace(self.outline(case_id), features=self.features(case_id))

    def features(self, case_id: str, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """One case's embeddings alone, in the order of its bag.

        Args:
            case_id: The case.
            out: (P, D) array of the store's dtype to read into: memory that is used again is faster.

        Returns:
            (P, D) float16 or float32; ``out`` if it was given.

        Raises:
            StoreError: The store has no such case.
            StoreDamaged: A part is missing or is not what was written.
        """
        case, spec = self._live(case_id), self.spec
        shape, dtype = (len(case.patches), spec.dim), np.dtype(spec.stored_dtype)
        if out is not None and (out.shape != shape or out.dtype != dtype):
            raise ValueError(f"an array of {out.shape} {out.dtype} for embeddings of {shape} {dtype}")
        return read_features(self.folder(case_id), case, spec.stored_dtype, (spec.dim,), out)

    def views(self, case_id: str) -> NDArray[Any]:
        """One case's augmented views, in the order of its bag.

        Returns:
            (P, V − 1, D) float16 or float32; V − 1 is 0 where the store has no views.

        Raises:
            StoreError: The store has no such case.
            StoreDamaged: A part is missing or is not what was written.
        """
        case, spec = self._live(case_id), self.spec
        row = (spec.views - 1, spec.dim)
        if spec.views == 1:
            return np.empty((len(case.patches), *row), spec.stored_dtype)
        return read_features(self.folder(case_id), case, spec.stored_dtype, row, column="views")

    def take(self, case_id: str, index: ArrayLike) -> NDArray[Any]:
        """Some of a case's embeddings: ``bag(case_id).features[index]``, without reading the others.

        The first rows that are taken from a stretch of a part (about 1 MiB) read all of it and check
        it, once in a process. Safe in threads, in processes that were forked, and after pickling.

        Args:
            case_id: The case.
            index: (n,) integers, positions in the bag in any order; negative ones count from its end.

        Returns:
            (n, D) float16 or float32.

        Raises:
            IndexError: A position is not in the bag.
            StoreError: The store has no such case.
            StoreDamaged: A part that they lie in is missing or is not what was written.
        """
        if case_id not in self._listed.sizes:
            self._live(case_id)  # raises for a case the store never had
        size, wanted = self._listed.sizes[case_id], np.asarray(index)
        if wanted.ndim != 1 or (wanted.dtype.kind not in "iu" and len(wanted)):
            raise IndexError(f"{wanted.dtype} of shape {wanted.shape} for a row of positions")
        if len(wanted) and not (-size <= wanted.min() and wanted.max() < size):
            raise IndexError(f"positions {wanted.min()} to {wanted.max()} of {size} patches")
        wanted = np.where(wanted < 0, wanted + size, wanted).astype(np.int64)
        folder = self.folder(case_id)
        rows = self._mapped.take(folder, case_id, lambda: self.layout(case_id), wanted)
        return self.features(case_id)[wanted] if rows is None else rows

    def outline(self, case_id: str) -> Bag:
        """A case's bag without its embeddings: ``features`` is (P, 0). Reads no part.

        Raises:
            StoreError: The store has no such case.
        """
        case, listed = self._live(case_id), self._listed
        start = listed.starts[case_id]
        return Bag(
            case_id=case_id,
            features=np.empty((len(case.patches), 0), self.spec.stored_dtype),
            rows=np.arange(start, start + len(case.patches)),
            patches=case.patches,
            slices=case.slices,
            slice_sizes=case.slice_sizes,
            stains=case.stains,
            stain_sizes=case.stain_sizes,
            stain_ids=np.array([listed.stain_ids[name] for name in case.stains], np.int64),
        )

    def table(self, case_id: str | None = None) -> pd.DataFrame:
        """One row a live patch: where it comes from, and its quality columns.

        Row i belongs to the embedding with ``Bag.rows == i``; the index says so
        also when the table is limited to one case.

        Args:
            case_id: Only this case; all cases by default.

        Returns:
            ``case_id, stain, slice_id, patch, path`` (below the patches folder),
            the columns of `quality.QUALITY_COLUMNS`, and where known ``x0 … y3`` (level-0 pixels) and
            ``coord_x, coord_y`` (as an imported file has them).
        """
        frame = self._frame(case_id, ["source_name", "quality", "geometry", "coords"], described)
        for columns in (GEOMETRY_COLUMNS, COORDS_COLUMNS):
            if not frame[list(columns)].notna().any().any():
                frame = frame.drop(columns=list(columns))
        return frame

    def sources(self, case_id: str | None = None) -> pd.DataFrame:
        """One row a live patch, with its file as it was read.

        Returns:
            ``case_id, stain, slice_id, patch, path, size`` (bytes), ``mtime_ns, sha256`` (32 bytes),
            ``x0 … y3`` and ``coord_x, coord_y``, NaN where not known.
        """
        columns = ["source_name", "source_stat", "source_sha256", "geometry", "coords"]
        return self._frame(case_id, columns, file_states)

    def record(self, case_id: str) -> Record:
        """The commit record that this view shows of a case.

        Raises:
            StoreError: The store has no such case.
            StoreDamaged: The record is not what was written.
        """
        return self._records.get(case_id, lambda: self._find(case_id))

    def _find(self, case_id: str) -> Record:
        name = component(case_id)
        if name not in self._newest:
            raise self._no_case(case_id)
        record = self._read(name)
        if record.case_id != case_id:
            raise StoreDamaged(
                f"the record of case {case_id!r} speaks of {record.case_id!r}",
                where=str(self.folder(case_id)),
            )
        return record

    def _no_case(self, case_id: str) -> StoreError:
        return StoreError(
            f"the store has no case {case_id!r}",
            expected=f"one of its {len(self._newest)} cases",
            where=str(self.path),
            fix="run `featstore extract` (or `import`), or choose another case (Store.cases() lists them)",
        )

    def digest(self, case_ids: Iterable[str]) -> str:
        """The sha256 of what these cases hold, in this order: equal digests, equal embeddings."""
        found = hashlib.sha256(self.spec.fingerprint.encode())
        for case in case_ids:
            parts = self.record(case).parts
            live = [[p.sha256, [[g.stain, g.slice_id, g.live] for g in p.groups]] for p in parts]
            found.update(json.dumps([case, live]).encode())
        return found.hexdigest()

    def layout(self, case_id: str) -> Layout:
        """Where a case's live rows lie, in bag order."""
        return self._layouts.get(case_id, lambda: self._layout(case_id))

    def _layout(self, case_id: str) -> Layout:
        record = self.record(case_id)
        return layout(record, str(self.folder(case_id) / record.name))

    def _live(self, case_id: str) -> Layout:
        """The layout of a case that has embeddings."""
        case = self.layout(case_id)
        if not len(case.patches):
            raise self._no_case(case_id)
        return case

    def folder(self, case_id: str) -> Path:
        """The folder of a case's records and parts."""
        return self.path / CASES / component(case_id)

    @cached_property
    def _listed(self) -> _Listed:
        """What has to be known of all cases; every record is read, and few are kept."""
        sizes: dict[str, int] = {}
        stains: set[str] = set()
        for name in self._newest:
            record = self._read(name)
            live = live_sizes(record, f"{self.path}/{CASES}/{name}/{record.name}")
            if live:
                sizes[record.case_id] = sum(live.values())
                stains.update(live)
        starts, row = {}, 0
        for case_id in sorted(sizes, key=natural_key):
            starts[case_id] = row
            row += sizes[case_id]
        return _Listed(starts, sizes, {name: i for i, name in enumerate(sorted(stains, key=natural_key))})

    def _read(self, name: str) -> Record:
        record = read_record(self.path, name, self._newest[name], self.spec)
        return self._records.put(record.case_id, record)

    def _frame(self, case_id: str | None, columns: list[str], unpack: Any) -> pd.DataFrame:
        starts = self._listed.starts
        if case_id is not None and case_id not in starts:
            self.record(case_id)  # raises for a case the store never had
        cases = list(starts) if case_id is None else [case_id]
        frames = []
        for case in cases:
            found = self.layout(case)
            arrays = read_columns(self.folder(case), found, columns)
            stain_of_slice = np.repeat(np.array(found.stains, dtype=object), found.stain_sizes)
            names = [name.decode("utf-8") for name in arrays["source_name"].tolist()]
            identity = {
                "case_id": case,
                "stain": np.repeat(stain_of_slice, found.slice_sizes),
                "slice_id": np.repeat(np.array(found.slices, dtype=object), found.slice_sizes),
                "patch": found.patches,
                "path": pd.array(names, dtype=object),
            }
            index = pd.RangeIndex(starts.get(case, 0), starts.get(case, 0) + len(names))
            frames.append(pd.DataFrame({**identity, **unpack(arrays)}, index=index))
        if not frames:
            empty = read_columns(self.path, _NOTHING, columns)
            nothing = pd.DataFrame(columns=["case_id", "stain", "slice_id", "patch", "path"])
            return nothing.assign(**unpack(empty))
        return pd.concat(frames)


_NOTHING = layout(Record("", 0, "", "", "", ()), "")
