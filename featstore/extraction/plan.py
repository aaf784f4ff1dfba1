"""What is left to do: the patch table held against what the store has committed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort.patches import Scan
from featstore.config import ImagesConfig
from featstore.errors import ImageError
from featstore.extraction.geometry import corners
from featstore.extraction.shards import Shard, share_of_patches, slices_of
from featstore.images import check_header
from featstore.store import Store
from featstore.store.format import GEOMETRY_COLUMNS
from featstore.store.records import read_manifest

KEY = ["case_id", "stain", "slice_id", "patch"]
# Calls that wait for a (network) file system overlap in threads.
_IO_THREADS = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What an extraction will do.

    Attributes:
        pending: Rows of the patch table to be computed, in its order.
        new: How many of them the store does not have.
        changed: How many of them the store has from other bytes.
        done: Patches of this share that need nothing.
        stale: Rows of the patch table, with ``size`` and ``mtime_ns``, of those among them whose
            path, time stamp or geometry is not what the store says, but whose bytes are.
        stored: Live embeddings in the store.
        vanished: Rows of `Store.sources` whose patch is no longer in the table.
        skipped: Files that cannot be used, with the reason (``on_bad_image: skip``).
        shares: (P,) the share that each row of the whole patch table belongs to.
    """

    pending: pd.DataFrame
    new: int
    changed: int
    done: int
    stale: pd.DataFrame
    stored: int
    vanished: pd.DataFrame
    skipped: list[tuple[str, str]]
    shares: NDArray[np.int64]

    def to_text(self, total: int) -> str:
        """What will be done, in a few lines for a person."""
        lines = [
            f"{total:,} patches in the folder: {self.new:,} new, {self.changed:,} changed, "
            f"{self.done:,} done already"
        ]
        if self.skipped:
            lines.append(f"{len(self.skipped):,} of them cannot be used and are skipped")
        if len(self.stale):
            lines.append(
                f"{len(self.stale):,} of these have another path, time stamp or position, but the same "
                "bytes: only that is noted anew"
            )
        if len(self.vanished):
            shown = ", ".join(self.vanished["path"].head(3)) + (", …" if len(self.vanished) > 3 else "")
            lines.append(
                f"{len(self.vanished):,} embeddings are of patches that have vanished ({shown}); "
                "`featstore extract --prune` drops them"
            )
        return "\n".join(lines)


def make_plan(
    scan: Scan,
    store: Store | None,
    shard: Shard,
    images: ImagesConfig,
    reports: Path,
    forward_bytes: int = 0,
) -> Plan:
    """Compare the folder with the store, and look at the header of every pending file.

    A file counts as unchanged if its size and modification time are those recorded,
    or else if its bytes have the recorded sha256.

    Args:
        scan: The patch table.
        store: The store as it is; None if there is none yet.
        shard: This process's share.
        images: Limits, and what to do about files that cannot be used.
        reports: Folder of the table of shares; only several shares have one.
        forward_bytes: What a patch costs besides its own bytes (`shards.forward_bytes`).

    Raises:
        ImageError: Files cannot be used and ``on_bad_image`` is ``stop``; names them.
        FeatstoreError: The table of shares is damaged or cannot be written.
    """
    stats = _Stats(scan)
    shares = share_of_patches(
        scan.table,
        shard.count,
        reports,
        lambda: stats.of(np.ones(len(scan.table), bool))[0] + forward_bytes,
    )
    mine = shares == shard.index
    sizes, times = stats.of(mine)
    table = scan.table.assign(size=sizes, mtime_ns=times)
    sources = _no_sources() if store is None else store.sources()
    merged = _merge(table, sources)
    both = merged["_merge"].eq("both").to_numpy() & mine
    same_stat = merged["size"].eq(merged["size_stored"]) & merged["mtime_ns"].eq(merged["mtime_ns_stored"])
    same_path = merged["path"].eq(merged["path_stored"]).to_numpy()
    suspects = np.flatnonzero(both & ~(same_stat.to_numpy() & same_path))
    same_bytes = _same_bytes(scan.folder, merged, suspects)
    changed = np.zeros(len(merged), bool)
    changed[suspects[~same_bytes]] = True
    new = merged["_merge"].eq("left_only").to_numpy() & mine
    done = both & ~changed
    stale = done & (~same_path | ~same_stat.to_numpy() | ~_same_geometry(scan.table, merged))
    pending = table[new | changed]
    bad = check_headers(scan.folder, pending["path"].tolist(), images)
    return Plan(
        pending=pending[~pending["path"].isin([path for path, _ in bad])],
        new=int(new.sum()),
        changed=int(changed.sum()),
        done=int(done.sum()),
        stale=table[stale],
        stored=len(sources),
        vanished=_vanished(scan, table, sources),
        skipped=bad,
        shares=shares,
    )


def not_in_store(table: pd.DataFrame, shares: NDArray[np.int64], path: Path) -> dict[int, int]:
    """How many patches of each share the store lacks now; shares that lack none are left out.

    Args:
        table: The whole patch table, P rows.
        shares: (P,) the share of each.
        path: The store's folder; nothing need be there.
    """
    held: dict[tuple[str, str, str], list[NDArray[np.int64]]] = {}
    store = Store.open(path) if read_manifest(path) is not None else None
    for case in store.cases() if store is not None else ():
        for part in store.record(case).parts if store is not None else ():
            for group in part.groups:
                held.setdefault((case, group.stain, group.slice_id), []).append(group.patches(str(path)))
    slice_of_patch, keys = slices_of(table)
    order = np.argsort(slice_of_patch, kind="stable")
    edges = np.searchsorted(slice_of_patch[order], np.arange(1, len(keys)))
    patch = table["patch"].to_numpy(np.int64)
    lacking = np.ones(len(table), bool)
    for key, rows in zip(keys, np.split(order, edges), strict=True):
        if key in held:
            lacking[rows] = ~np.isin(patch[rows], np.concatenate(held[key]))
    found, counts = np.unique(shares[lacking], return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def check_headers(folder: Path, paths: Sequence[str], images: ImagesConfig) -> list[tuple[str, str]]:
    """Look at the first bytes of files, so that hopeless ones are told before any work.

    Returns:
        (path, reason) of each file that cannot be used.

    Raises:
        ImageError: There are such files and ``on_bad_image`` is ``stop``.
    """

    def check(path: str) -> str:
        try:
            check_header(folder / path, path, images.max_pixels)
        except ImageError as error:
            return error.reason(path)
        return ""

    bad = [(path, reason) for path, reason in zip(paths, _map(check, paths), strict=True) if reason]
    if bad and images.on_bad_image == "stop":
        shown = "\n".join(f"    {path}: {reason}" for path, reason in bad[:10])
        more = f"\n    … and {len(bad) - 10:,} more" if len(bad) > 10 else ""
        raise ImageError(
            f"{len(bad):,} of {len(paths):,} files cannot be used:\n{shown}{more}",
            expected="PNG images",
            where=str(folder),
            fix="mend or remove these files, or leave them out with --on-bad-image skip (they are listed)",
        )
    return bad


class _Stats:
    """Sizes and modification times of patches, asked for once each: that takes long on a network."""

    def __init__(self, scan: Scan) -> None:
        self._folder = scan.folder
        self._paths = scan.table["path"].to_numpy(object)
        self._known = np.zeros(len(scan.table), bool)
        self._found = np.full((len(scan.table), 2), -1, np.int64)

    def of(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(P,) sizes in bytes and (P,) modification times in ns; -1 where they were not asked for."""
        asked = np.flatnonzero(rows & ~self._known)
        self._found[asked] = np.array(_map(self._stat, self._paths[asked].tolist()), np.int64).reshape(
            -1, 2
        )
        self._known[asked] = True
        return self._found[:, 0], self._found[:, 1]

    def _stat(self, path: str) -> tuple[int, int]:
        try:
            found = os.stat(self._folder / path)
        except OSError as error:
            raise ImageError(
                f"a patch cannot be read ({error.strerror})",
                where=str(self._folder / path),
                fix="check that nothing else is moving these files, then run the command again",
            ) from error
        return found.st_size, found.st_mtime_ns


def _same_geometry(table: pd.DataFrame, merged: pd.DataFrame) -> NDArray[np.bool_]:
    """(P,) whether the store has the corners that the table gives; a table without any is no news."""
    here = corners(table)
    if here is None:
        return np.ones(len(merged), bool)
    there = merged[list(GEOMETRY_COLUMNS)].to_numpy(np.float64)
    same: NDArray[np.bool_] = ((here == there) | (np.isnan(here) & np.isnan(there))).all(axis=1)
    return same


def _same_bytes(folder: Path, merged: pd.DataFrame, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
    paths = merged["path"].to_numpy()
    digests = merged["sha256"].to_numpy()

    def same(row: int) -> bool:
        with open(folder / paths[row], "rb") as file:
            return bool(hashlib.file_digest(file, "sha256").digest() == digests[row])

    return np.array(_map(same, rows.tolist()), bool)


def _merge(table: pd.DataFrame, sources: pd.DataFrame) -> pd.DataFrame:
    left = table[[*KEY, "path", "size", "mtime_ns"]].astype(
        {"case_id": object, "stain": object, "slice_id": object}
    )
    return left.merge(sources, on=KEY, how="left", suffixes=("", "_stored"), indicator=True)


def _vanished(scan: Scan, table: pd.DataFrame, sources: pd.DataFrame) -> pd.DataFrame:
    here = table[KEY].astype({"case_id": object, "stain": object, "slice_id": object})
    found = sources.merge(here, on=KEY, how="left", indicator=True)["_merge"].eq("both").to_numpy()
    # An excluded case's patches are still there; they are only not looked at.
    excluded = sources["case_id"].isin([*scan.excluded, *scan.unknown_exclusions]).to_numpy()
    return sources[~found & ~excluded]


def _no_sources() -> pd.DataFrame:
    empty = pd.DataFrame(
        columns=[*KEY, "path", "size", "mtime_ns", "sha256", *GEOMETRY_COLUMNS], dtype=object
    )
    return empty.astype({"patch": np.int64})


def _map(function: Callable[..., T], items: Sequence[object]) -> list[T]:
    if not items:
        return []
    # One task a file costs more than the call itself; a few hundred files a task do not.
    chunks = [items[i : i + 256] for i in range(0, len(items), 256)]
    with ThreadPoolExecutor(_IO_THREADS) as pool:
        return [
            result
            for part in pool.map(lambda chunk: [function(x) for x in chunk], chunks)
            for result in part
        ]
