"""Makes the golden store of this version of the format: `python -m tests.store.golden FOLDER`.

Done once a version, into tests/store/golden/<version>; the rows are those of every golden store,
committed as parts of both formats. What lies there stays as it is: it stands for the stores out there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from featstore.store import Slice, StoreWriter
from tests.store.builders import make_slice, make_spec

VIEWS = 3


def main(folder: Path) -> None:
    spec = make_spec().with_views(VIEWS, 0, "golden")
    zarr = StoreWriter(folder, spec, {"golden": True}, "zarr")
    hdf5 = StoreWriter(folder, spec, {"golden": True}, "hdf5")
    zarr.commit("a", [with_views(make_slice("a", "h&e", "match_1", [1, 2]))])
    hdf5.commit("a", [with_views(make_slice("a", "h&e", "match_1", [10]))])
    zarr.commit("B", [with_views(with_coords(make_slice("B", "sox10", "s", [7], version=1)))])


def with_views(item: Slice) -> Slice:
    """The slice with augmented views (since 1.3): view v is the plain one negated, plus v."""
    plain = item.columns["features"]
    views = np.stack([-plain + np.float16(v) for v in range(1, VIEWS)], axis=1)
    return replace(item, columns={**item.columns, "views": views})


def with_coords(item: Slice) -> Slice:
    """The slice, as an import would write it (since 1.2)."""
    coords = np.array([[10.5, 20.25]] * len(item.patch))
    return replace(item, columns={**item.columns, "coords": coords})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
