"""Every test of the store runs on both file formats of parts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from featstore.store import StoreWriter
from tests.store.builders import make_spec
from tests.store.damage import fill


@pytest.fixture(params=["hdf5", "zarr"])
def file_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def writer(tmp_path: Path, file_format: str) -> StoreWriter:
    return StoreWriter(tmp_path / "store", make_spec(), {"test": True}, file_format)


@pytest.fixture(scope="session")
def small_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By file format, the store that `damage.fill` makes, of four patches a slice; nobody changes it."""
    folder = tmp_path_factory.mktemp("small")
    for file_format in ("hdf5", "zarr"):
        fill(folder / file_format, patches=4, file_format=file_format)
    return {name: folder / name for name in ("hdf5", "zarr")}


@pytest.fixture
def small_store(small_stores: dict[str, Path], file_format: str, tmp_path: Path) -> Path:
    """A copy of one of `small_stores`, to be damaged."""
    return Path(shutil.copytree(small_stores[file_format], tmp_path / "store"))


@pytest.fixture(scope="session")
def whole_stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By file format, the store that `damage.fill` makes; nobody changes it."""
    folder = tmp_path_factory.mktemp("whole")
    for file_format in ("hdf5", "zarr"):
        fill(folder / file_format, file_format=file_format)
    return {name: folder / name for name in ("hdf5", "zarr")}


@pytest.fixture
def whole(whole_stores: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """One of `whole_stores`, in HDF5 unless a test says otherwise."""
    return whole_stores[getattr(request, "param", "hdf5")]


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A copy of `whole`, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "store"))


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of many commits that are no tests of crashes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
