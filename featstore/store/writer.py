"""Writing to a store: parts first, then the record that makes them visible."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.errors import FingerprintMismatch, StoreError
from featstore.spec import EmbeddingSpec
from featstore.store import files
from featstore.store.commit import now, publish_next
from featstore.store.format import (
    CASES,
    FORMAT,
    GEOMETRY_COLUMNS,
    MANIFEST,
    QUARANTINE,
    VERSION,
    Group,
    Part,
    Record,
    Slice,
    encode_manifest,
)
from featstore.store.ids import component
from featstore.store.parts import encode as encode_part
from featstore.store.ranges import encode_ranges
from featstore.store.records import highest_record, read_manifest, read_record, require_own_folder
from featstore.store.store import Store

_NOTHING = np.empty(0)
Patches = Mapping[tuple[str, str], NDArray[np.int64]]


class StoreWriter:
    """Adds embeddings to a store; any number of writers may work at once.

    Args:
        path: The store's folder; made if it does not exist.
        spec: What the embeddings are made with.
        provenance: Recorded in every part: library versions, batch size, source folder, machine.
        file_format: Of new parts: ``hdf5`` or ``zarr``; those that are there may have another.

    Raises:
        FingerprintMismatch: The store holds embeddings made otherwise.
        StoreError: The folder cannot be used: another thing, no permission, no hard links.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: EmbeddingSpec,
        provenance: Mapping[str, Any],
        file_format: str = "hdf5",
    ) -> None:
        self.path = Path(path)
        self.spec = spec
        self._file_format = file_format
        self._provenance = json.dumps(dict(provenance), sort_keys=True)
        check_writable(self.path, spec)
        if read_manifest(self.path) is None:
            for folder in (self.path, self.path / CASES, self.path / QUARANTINE):
                files.make_folder(folder)
            files.publish(self.path / MANIFEST, encode_manifest(spec))
            # Another writer may have come first, with another backbone.
            check_writable(self.path, spec)

    def commit(self, case_id: str, slices: Sequence[Slice], whole: bool = False) -> int:
        """Make rows of one case durable and visible, all or nothing.

        A row whose (stain, slice, patch) is live already is replaced, unless all that is known of
        its file is the same: then another writer has done this row, and the first one stays.

        Args:
            case_id: The case.
            slices: Its new rows; every (stain, slice) once, ascending in patch.
            whole: These slices have no other rows from now on.

        Returns:
            How many rows that were live are replaced or gone.

        Raises:
            StoreError: Something could not be written. Nothing has become visible, unless the
                last fsync failed: then it may have.
        """
        folder = self.path / CASES / component(case_id)
        require_own_folder(folder)
        files.make_folder(folder)
        part = self._write_part(case_id, folder, slices)
        while True:
            current = self._current(folder)
            merged = self._merge(folder, current, part, slices, whole)
            gone = (0 if current is None else _live(current.parts)) - _live(merged[:-1])
            kept = merged if merged[-1].groups else merged[:-1]
            if (not gone and kept is not merged) or self._publish(case_id, folder, current, kept):
                if kept is not merged:  # all of it was there
                    files.remove(folder / part.name)
                return gone

    def drop(self, case_id: str, doomed: Mapping[tuple[str, str, int], bytes]) -> int:
        """Make rows of one case invisible (their bytes stay until `gc`).

        Args:
            case_id: The case.
            doomed: (stain, slice, patch) and the sha256 of the file that the row was made from. A row
                that is not live, or was made anew from other bytes meanwhile, is passed over.

        Returns:
            How many rows are gone.
        """
        folder = self.path / CASES / component(case_id)
        require_own_folder(folder)
        while (current := self._current(folder)) is not None:
            rows = self._sources(current)
            patches: dict[tuple[str, str], list[int]] = {}
            keys = zip(rows["stain"], rows["slice_id"], rows["patch"].tolist(), strict=True)
            for (stain, slice_id, patch), digest in zip(keys, rows["sha256"], strict=True):
                if doomed.get((stain, slice_id, patch)) == digest:
                    patches.setdefault((stain, slice_id), []).append(patch)
            count = sum(map(len, patches.values()))
            without = {key: np.array(sorted(numbers), np.int64) for key, numbers in patches.items()}
            parts = _without(current.parts, without, str(folder))
            if not count or self._publish(case_id, folder, current, parts):
                return count
        return 0

    def _sources(self, current: Record) -> pd.DataFrame:
        view = Store(self.path, self.spec, {component(current.case_id): current.sequence})
        return view.sources(current.case_id)

    def _write_part(self, case_id: str, folder: Path, slices: Sequence[Slice]) -> Part:
        attributes = {
            "format": f"{FORMAT} {VERSION[0]}.{VERSION[1]}",
            "case_id": case_id,
            "fingerprint": self.spec.fingerprint,
            "spec": json.dumps(self.spec.to_json(), sort_keys=True),
            "provenance": self._provenance,
            "created": now(),
        }
        for item in slices:
            for name, row in self.spec.rows().items():
                found = item.columns.get(name, _NOTHING)
                if found.shape != (len(item.patch), *row) or found.dtype != self.spec.stored_dtype:
                    raise StoreError(
                        f"{name} of the shape {found.shape} and dtype {found.dtype}",
                        expected=f"{(len(item.patch), *row)} of {self.spec.stored_dtype}",
                        where=f"case {case_id}, {item.stain}/{item.slice_id}",
                    )
            if len(item.patch) == 0 or item.patch[0] < 0 or (np.diff(item.patch) <= 0).any():
                raise StoreError(
                    "rows that are not in strictly ascending order of their patch numbers",
                    where=f"case {case_id}, {item.stain}/{item.slice_id}",
                )
        data, suffix = encode_part(self._file_format, slices, attributes)
        name = files.unique_name() + suffix
        files.write_new(folder / name, data)
        groups = tuple(
            Group(item.stain, item.slice_id, len(item.patch), encode_ranges(item.patch)) for item in slices
        )
        return Part(name, len(data), hashlib.sha256(data).hexdigest(), groups)

    def _current(self, folder: Path) -> Record | None:
        sequence = highest_record(folder)
        return None if sequence is None else read_record(self.path, folder.name, sequence, self.spec)

    def _merge(
        self, folder: Path, current: Record | None, part: Part, slices: Sequence[Slice], whole: bool
    ) -> tuple[Part, ...]:
        """The parts of the next record; the last one is ours, without the rows already done."""
        if current is None:
            return (part,)
        done = self._done(current, slices)
        mine: dict[tuple[str, str], NDArray[np.int64]] = {}
        groups = []
        for group, item in zip(part.groups, slices, strict=True):
            key = (item.stain, item.slice_id)
            mine[key] = np.setdiff1d(item.patch, done.get(key, np.empty(0, np.int64)), assume_unique=True)
            if len(mine[key]):
                groups.append(replace(group, live=encode_ranges(mine[key])))
        if whole:
            held = ((g, g.patches(str(folder))) for p in current.parts for g in p.groups)
            for group, live in held:
                key = (group.stain, group.slice_id)
                if key in mine:
                    mine[key] = np.union1d(mine[key], np.setdiff1d(live, done.get(key, live[:0])))
        others = _without(current.parts, mine, str(folder))
        return (*others, replace(part, groups=tuple(groups)))

    def _done(self, current: Record, slices: Sequence[Slice]) -> Patches:
        """Those of our patches that are live already, made from the same file at the same place."""
        mine = {(item.stain, item.slice_id): item for item in slices}
        keys = {(g.stain, g.slice_id) for part in current.parts for g in part.groups} & set(mine)
        where = str(self.path)
        if not any(
            np.isin(g.patches(where), mine[g.stain, g.slice_id].patch).any()
            for part in current.parts
            for g in part.groups
            if (g.stain, g.slice_id) in keys
        ):
            return {}
        theirs = {
            (row.stain, row.slice_id, row.patch): row
            for row in self._sources(current).itertuples(index=False)
        }
        done = {}
        for key in keys:
            item = mine[key]
            same = [
                (row := theirs.get((*key, number))) is not None and _same_file(item, i, row)
                for i, number in enumerate(item.patch.tolist())
            ]
            done[key] = item.patch[np.array(same, bool)]
        return done

    def _publish(self, case_id: str, folder: Path, current: Record | None, parts: tuple[Part, ...]) -> bool:
        return publish_next(
            folder, case_id, self.spec.fingerprint, current.sequence if current else 0, parts
        )


def _same_file(item: Slice, i: int, row: Any) -> bool:
    """Whether row ``i`` of a slice and a row of `Store.sources` come from the same state of a file."""
    columns = item.columns
    here = columns["geometry"][i] if "geometry" in columns else np.full(8, np.nan)
    there = [getattr(row, name) for name in GEOMETRY_COLUMNS]
    coords = columns["coords"][i] if "coords" in columns else np.full(2, np.nan)
    return bool(
        columns["source_sha256"][i].tobytes() == row.sha256
        and columns["source_name"][i].decode("utf-8") == row.path
        and columns["source_stat"][i].tolist() == [row.size, row.mtime_ns]
        and np.array_equal(here, np.array(there, np.float64), equal_nan=True)
        and np.array_equal(coords, [row.coord_x, row.coord_y], equal_nan=True)
    )


def check_writable(path: Path, spec: EmbeddingSpec) -> None:
    """See, leaving nothing behind, whether embeddings of this make may go into this store.

    Raises:
        FingerprintMismatch: The store holds embeddings made otherwise.
        StoreError: The path is something else than a store or an empty folder, not writable, or
            on a file system without hard links.
    """
    found = read_manifest(path)
    if found is not None and found.fingerprint != spec.fingerprint:
        raise FingerprintMismatch(
            "the store holds embeddings of another make: " + "; ".join(spec.differences(found)),
            expected="the same backbone, weights, preprocessing and dtypes ('there' is the store)",
            where=str(path),
            fix="use the settings of the store, or another store: --store-path FOLDER",
        )
    if path.exists() and not path.is_dir():
        raise StoreError(
            "the store's path is a file", where=str(path), fix="choose another: --store-path FOLDER"
        )
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise StoreError(
            "no permission to write here",
            where=str(parent),
            fix="give yourself write permission, or choose another folder: --store-path FOLDER",
        )
    if found is None and path.is_dir():
        strangers = _strangers(path)
        if CASES in strangers and read_manifest(path) is None:
            raise StoreError(
                f"the store's description {MANIFEST} is missing, its cases are there",
                where=str(path),
                fix="`featstore repair --apply` makes it anew from the parts",
            )
        if strangers and read_manifest(path) is None:  # else another writer has just made the store
            raise StoreError(
                f"the folder holds other things than a store ({', '.join(sorted(strangers)[:5])})",
                expected=f"an empty or missing folder, or a store with its {MANIFEST}",
                where=str(path),
                fix="choose another: --store-path FOLDER",
            )
    files.check_links(parent)


def _strangers(path: Path) -> set[str]:
    """What lies in a folder besides what a writer killed while it made a store leaves behind."""
    names = set(os.listdir(path)) - {QUARANTINE}
    if CASES in names and not os.listdir(path / CASES):
        names.discard(CASES)
    return {name for name in names if not name.endswith(files.TEMPORARY_SUFFIX)}


def _live(parts: Sequence[Part]) -> int:
    """How many rows of these parts are live."""
    return sum(len(group.patches("")) for part in parts for group in part.groups)


def _without(parts: Sequence[Part], patches: Patches, where: str) -> tuple[Part, ...]:
    """The parts less some rows; parts and groups that have none left are gone."""
    kept = []
    for part in parts:
        groups = []
        for group in part.groups:
            key = (group.stain, group.slice_id)
            live = group.patches(where)
            rest = np.setdiff1d(live, patches[key], assume_unique=True) if key in patches else live
            if len(rest):
                groups.append(group if len(rest) == len(live) else replace(group, live=encode_ranges(rest)))
        if groups:
            kept.append(part if tuple(groups) == part.groups else replace(part, groups=tuple(groups)))
    return tuple(kept)
