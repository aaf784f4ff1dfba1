"""Rows whose embedding is right but whose description is old, and rows whose patch is gone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featstore.cohort import Scan
from featstore.errors import StoreError
from featstore.extraction.geometry import corners
from featstore.store import Slice, Store, StoreWriter
from featstore.store.reading import read_columns, read_features

KEY = ["case_id", "stain", "slice_id", "patch"]


def refresh(writer: StoreWriter, store: Store, stale: pd.DataFrame) -> int:
    """Write embeddings anew with the path, time stamp and geometry that their patches have now.

    Nothing is computed: the numbers are read from the store.

    Args:
        writer: The store.
        store: The view that ``stale`` was found in.
        stale: Rows of the patch table with ``size`` and ``mtime_ns``, sorted by case.

    Returns:
        How many rows were written.
    """
    for case_id, rows in stale.groupby("case_id", sort=False, observed=True):
        case = str(case_id)
        layout, folder = store.layout(case), store.folder(case)
        held = store.sources(case).reset_index(drop=True).reset_index(names="row")
        wanted = rows.astype({"case_id": object, "stain": object, "slice_id": object})
        at = wanted[KEY].merge(held[["row", *KEY]], on=KEY, how="left")["row"].to_numpy(np.int64)
        columns = read_columns(folder, layout, ["quality", "source_sha256"])
        held_views = {
            name: read_features(folder, layout, store.spec.stored_dtype, row, column=name)
            for name, row in store.spec.rows().items()
        }
        known: dict[str, NDArray[Any]] = {
            **{name: values[at] for name, values in held_views.items()},
            "patch": rows["patch"].to_numpy(np.int64),
            "quality": columns["quality"][at],
            "source_name": np.array([path.encode("utf-8") for path in rows["path"]]),
            "source_stat": rows[["size", "mtime_ns"]].to_numpy(np.int64),
            "source_sha256": columns["source_sha256"][at],
        }
        geometry = corners(rows)
        if geometry is not None:
            known["geometry"] = geometry
        groups: dict[Any, Any] = rows.groupby(["stain", "slice_id"], sort=False, observed=True).indices
        slices = [
            Slice(str(stain), str(slice_id), {name: values[index] for name, values in known.items()})
            for (stain, slice_id), index in groups.items()
        ]
        writer.commit(case, slices)
    return len(stale)


def check_prune(vanished: pd.DataFrame, scan: Scan, total: int) -> None:
    """Refuse to prune where so much is gone that it looks like a mishap.

    Args:
        vanished: Rows of `Store.sources` whose patch is not in the folder.
        scan: The folder as it was read.
        total: Live embeddings in the store.

    Raises:
        StoreError: There are broken links in the folder, or more than half of the store would go.
    """
    broken = scan.broken_links
    if len(vanished) and (broken or len(vanished) > total / 2):
        raise StoreError(
            f"{len(vanished):,} of {total:,} embeddings would be dropped"
            + (f", and {len(broken):,} links lead nowhere ({broken[0]}, …)" if broken else ""),
            expected="at most half of the store, and every link to lead somewhere",
            where=str(scan.folder),
            fix="check that all disks are mounted and patches.folder is the whole folder; if these patches "
            "are really gone, remove the broken links, or make a new store of the rest (--store FOLDER)",
        )


def prune(writer: StoreWriter, vanished: pd.DataFrame, scan: Scan) -> int:
    """Drop embeddings whose patch is gone.

    Args:
        writer: The store.
        vanished: Rows of `Store.sources` whose patch is not in the folder.
        scan: The folder as it was read.

    Returns:
        How many were dropped. A row whose file is back, or that was made anew meanwhile, stays.
    """
    dropped = 0
    for case_id, rows in vanished.groupby("case_id", sort=False):
        gone = rows[[not (scan.folder / path).exists() for path in rows["path"]]]
        keys = zip(gone["stain"], gone["slice_id"], gone["patch"].tolist(), strict=True)
        doomed = dict(zip(keys, gone["sha256"], strict=True))
        dropped += writer.drop(str(case_id), doomed)
    return dropped
