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


def main(folder: Path) -> None:
    zarr = StoreWriter(folder, make_spec(), {"golden": True}, "zarr")
    hdf5 = StoreWriter(folder, make_spec(), {"golden": True}, "hdf5")
    zarr.commit("a", [make_slice("a", "h&e", "match_1", [1, 2])])
    hdf5.commit("a", [make_slice("a", "h&e", "match_1", [10])])
    zarr.commit("B", [with_coords(make_slice("B", "sox10", "s", [7], version=1))])


def with_coords(item: Slice) -> Slice:
    """The slice, as an import would write it (since 1.2)."""
    coords = np.array([[10.5, 20.25]] * len(item.patch))
    return replace(item, columns={**item.columns, "coords": coords})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
