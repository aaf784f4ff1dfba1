"""Every test of the store runs on both file formats of parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.store import StoreWriter
from tests.store.builders import make_spec


@pytest.fixture(params=["hdf5", "zarr"])
def file_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def writer(tmp_path: Path, file_format: str) -> StoreWriter:
    return StoreWriter(tmp_path / "store", make_spec(), {"test": True}, file_format)
