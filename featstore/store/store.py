"""Reading a store: a consistent view of what was committed when it was opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.bags import Bag
from featstore.cohort.names import natural_key
from featstore.errors import StoreDamaged, StoreError
from featstore.quality import QUALITY_COLUMNS
from featstore.spec import EmbeddingSpec
from featstore.store.format import CASES, GEOMETRY_COLUMNS, Record
from featstore.store.ids import component
from featstore.store.reading import Layout, layout, read_columns, read_features
from featstore.store.records import newest_records, read_record, require_manifest


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
        self._records: dict[str, Record] = {}
        self._layouts: dict[str, Layout] = {}

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
        return list(self._starts)

    def stains(self) -> list[str]:
        """The names of all stains in the store, in natural order."""
        names = {stain for case in self.cases() for stain in self.layout(case).stains}
        return sorted(names, key=natural_key)

    def bag(self, case_id: str) -> Bag:
        """One case's embeddings, in the patch table's order.

        Raises:
            StoreError: The store has no such case.
            StoreDamaged: A part is missing or is not what was written.
        """
        outline = self.outline(case_id)
        case, folder = self.layout(case_id), self.folder(case_id)
        return replace(outline, features=read_features(folder, case, self.spec.stored_dtype, self.spec.dim))

    def outline(self, case_id: str) -> Bag:
        """A case's bag without its embeddings: ``features`` is (P, 0). Reads no part.

        Raises:
            StoreError: The store has no such case.
        """
        case = self.layout(case_id)
        if not len(case.patches):
            raise self._no_case(case_id)
        start = self._starts[case_id]
        stain_ids = {name: i for i, name in enumerate(self._stain_names)}
        return Bag(
            case_id=case_id,
            features=np.empty((len(case.patches), 0), self.spec.stored_dtype),
            rows=np.arange(start, start + len(case.patches)),
            patches=case.patches,
            slices=case.slices,
            slice_sizes=case.slice_sizes,
            stains=case.stains,
            stain_sizes=case.stain_sizes,
            stain_ids=np.array([stain_ids[name] for name in case.stains], np.int64),
        )

    def table(self, case_id: str | None = None) -> pd.DataFrame:
        """One row a live patch: where it comes from, and its quality columns.

        Row i belongs to the embedding with ``Bag.rows == i``; the index says so
        also when the table is limited to one case.

        Args:
            case_id: Only this case; all cases by default.

        Returns:
            ``case_id, stain, slice_id, patch, path`` (below the patches folder),
            the columns of `quality.QUALITY_COLUMNS`, and ``x0 … y3`` where known.
        """
        columns = ["source_name", "quality", "geometry"]
        frame = self._frame(case_id, columns, lambda arrays: _quality_and_geometry(arrays))
        known = frame[list(GEOMETRY_COLUMNS)].notna().any().any()
        return frame if known else frame.drop(columns=list(GEOMETRY_COLUMNS))

    def sources(self, case_id: str | None = None) -> pd.DataFrame:
        """One row a live patch, with its file as it was read.

        Returns:
            ``case_id, stain, slice_id, patch, path, size`` (bytes), ``mtime_ns, sha256`` (32 bytes),
            and ``x0 … y3``, NaN where not known.
        """
        columns = ["source_name", "source_stat", "source_sha256", "geometry"]
        return self._frame(case_id, columns, _file_states)

    def record(self, case_id: str) -> Record:
        """The commit record that this view shows of a case.

        Raises:
            StoreError: The store has no such case.
            StoreDamaged: The record is not what was written.
        """
        if case_id in self._records:
            return self._records[case_id]
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
            fix="run `featstore extract`, or choose another case (Store.cases() lists them)",
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
        if case_id not in self._layouts:
            record = self.record(case_id)
            self._layouts[case_id] = layout(record, str(self.folder(case_id) / record.name))
        return self._layouts[case_id]

    def folder(self, case_id: str) -> Path:
        """The folder of a case's records and parts."""
        return self.path / CASES / component(case_id)

    @cached_property
    def _starts(self) -> dict[str, int]:
        """The first row of every case in `table`, in natural order of the cases."""
        ids = (self._id(name) for name in self._newest)
        starts, row = {}, 0
        for case_id in sorted(ids, key=natural_key):
            size = len(self.layout(case_id).patches)
            if size:
                starts[case_id] = row
                row += size
        return starts

    @cached_property
    def _stain_names(self) -> list[str]:
        return self.stains()

    def _id(self, name: str) -> str:
        """The case id behind a folder name: in the name if it is invertible, else in the record."""
        plain = unquote(name)
        return plain if "~" not in name and component(plain) == name else self._read(name).case_id

    def _read(self, name: str) -> Record:
        record = read_record(self.path, name, self._newest[name], self.spec)
        self._records[record.case_id] = record
        return record

    def _frame(self, case_id: str | None, columns: list[str], unpack: Any) -> pd.DataFrame:
        starts = self._starts
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


def _quality_and_geometry(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    quality = {name: arrays["quality"][:, i] for i, name in enumerate(QUALITY_COLUMNS)}
    return {**quality, **{name: arrays["geometry"][:, i] for i, name in enumerate(GEOMETRY_COLUMNS)}}


def _file_states(arrays: dict[str, NDArray[Any]]) -> dict[str, Any]:
    digests = arrays["source_sha256"]
    return {
        "size": arrays["source_stat"][:, 0],
        "mtime_ns": arrays["source_stat"][:, 1],
        "sha256": pd.array([row.tobytes() for row in digests], dtype=object),
        **{name: arrays["geometry"][:, i] for i, name in enumerate(GEOMETRY_COLUMNS)},
    }
