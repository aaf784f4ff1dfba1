"""Parts that someone has forged, under a record with their size and sha256: refused, told and mended.

No file outside is read for them, no code in them is run, and no memory is taken beyond their size.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from featstore.errors import StoreDamaged
from featstore.store import Store, stored_zip
from featstore.store.format import Group, Part
from featstore.store.maintenance import repair
from featstore.store.verify import verify
from tests.store.builders import DIM, make_slice
from tests.store.damage import contents, encode_as, rewrite

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("no_waiting_for_the_disk")]


@pytest.fixture
def store(small_store: Path) -> Path:
    return small_store


def plant(store: Path, data: bytes) -> Path:
    """Put bytes into case 1 as a part of three rows of x/s, under a record with their size and sha256.

    Of the rows the middle one is dead, so that readers need the patch numbers too.
    """
    record = Store.open(store).record("1")
    name = "e" * 32 + (".zarr.zip" if data[:2] == b"PK" else ".h5")
    (store / "cases" / "1" / name).write_bytes(data)
    part = Part(name, len(data), hashlib.sha256(data).hexdigest(), (Group("x", "s", 3, "1,3"),))
    rewrite(store, "1", (*record.parts, part))
    return store / "cases" / "1" / name


def read(store: Path) -> None:
    view = Store.open(store)
    view.table("1")
    view.bag("1")


def is_refused_and_mended(store: Path, part: Path, before: dict[Any, bytes]) -> None:
    """Readers and `verify` refuse the part, and `repair` moves just this one away."""
    with pytest.raises(StoreDamaged):
        read(store)
    assert {finding.file for finding in verify(store).damage} == {str(part.relative_to(store))}
    assert repair(store, apply=True, level="default").left == []
    assert not os.path.lexists(part)
    assert contents(store) == before


def hdf5_part(change: Callable[[h5py.File], object]) -> bytes:
    """A good part of three rows of the slice x/s in HDF5, changed."""
    buffer = io.BytesIO(encode_as(".h5", make_slice("1", "x", "s", [1, 2, 3])))
    with h5py.File(buffer, "r+", libver="v110") as file:
        change(file)
    return buffer.getvalue()


def exchange(name: str, make: Callable[[h5py.Group, str], object]) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file["x/s"][name]
        make(file["x/s"], name)

    return change


def secret(group: h5py.Group) -> str:
    """A file beside the store with just the values that are asked for: it must not be read."""
    path = str(SECRET["path"])
    with h5py.File(path, "w") as file:
        for place in (file, file.create_group("s")):
            for name, values in make_slice("1", "x", "s", [1, 2, 3]).columns.items():
                place.create_dataset(name, data=values, chunks=values.shape, fletcher32=True)
    return path


SECRET: dict[str, Path] = {}


def external_link(group: h5py.Group, name: str) -> None:
    group[name] = h5py.ExternalLink(secret(group), "features")


def external_storage(group: h5py.Group, name: str) -> None:
    secret(group)
    group.create_dataset(name, (3, DIM), np.float16, external=[(str(SECRET["path"]), 0, 3 * DIM * 2)])


def virtual_dataset(group: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout((3, DIM), np.float16)
    layout[:] = h5py.VirtualSource(secret(group), "features", (3, DIM))
    group.create_virtual_dataset(name, layout)


def another_file_s_group(file: h5py.File) -> None:
    del file["x/s"]
    file["x/s"] = h5py.ExternalLink(secret(file), "/s")


def soft_link(group: h5py.Group, name: str) -> None:
    values = np.ones((3, DIM), np.float16)
    group.create_dataset("elsewhere", data=values, chunks=values.shape, fletcher32=True)
    group[name] = h5py.SoftLink("/x/s/elsewhere")


def bomb_of_rows(group: h5py.Group, name: str) -> None:
    group.create_dataset(name, (10**12, DIM), np.float16, chunks=(1000, DIM), fletcher32=True)


def bomb_of_columns(group: h5py.Group, name: str) -> None:
    group.create_dataset(name, (3, 10**11), np.float16, chunks=(1, 1000), fletcher32=True)


def bomb_of_long_names(group: h5py.Group, name: str) -> None:
    group.create_dataset(name, (3,), h5py.string_dtype("ascii", 2**31 - 1), chunks=(1,), fletcher32=True)


def compressed_chunk(group: h5py.Group, name: str) -> None:
    """Three rows in a chunk of a million, which takes memory when it is unpacked."""
    shape = {"maxshape": (None, DIM), "chunks": (1 << 20, DIM), "compression": "gzip"}
    group.create_dataset(name, data=np.ones((3, DIM), np.float16), fletcher32=True, **shape)


def names_of_any_length(group: h5py.Group, name: str) -> None:
    group.create_dataset(name, (3,), h5py.string_dtype(), chunks=(3,))


def compound(group: h5py.Group, name: str) -> None:
    group.create_dataset(name, (3, DIM), [("a", "f2")], chunks=(3, DIM), fletcher32=True)


def references(group: h5py.Group, name: str) -> None:
    group.create_dataset(name, (3, DIM), h5py.ref_dtype, chunks=(3, DIM), fletcher32=True)


def deep_group(group: h5py.Group, name: str) -> None:
    for _ in range(3000):
        group = group.create_group("g")


def circle(group: h5py.Group, name: str) -> None:
    group[name] = group


def named_type(group: h5py.Group, name: str) -> None:
    group[name] = np.dtype("f2")


EVIL_HDF5 = {
    "external link": exchange("features", external_link),
    "external storage": exchange("features", external_storage),
    "virtual dataset": exchange("features", virtual_dataset),
    "group of another file": another_file_s_group,
    "soft link": exchange("features", soft_link),
    "a trillion rows": exchange("features", bomb_of_rows),
    "a hundred billion columns": exchange("features", bomb_of_columns),
    "a trillion patch numbers": exchange("patch", bomb_of_rows),
    "compressed chunk": exchange("features", compressed_chunk),
    "names of two gigabytes": exchange("source_name", bomb_of_long_names),
    "names of any length": exchange("source_name", names_of_any_length),
    "compound type": exchange("features", compound),
    "references": exchange("features", references),
    "deep group": exchange("features", deep_group),
    "circle": exchange("features", circle),
    "named type": exchange("features", named_type),
}


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Let any array of gigabytes fail, so that a bomb shows at once."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("file_format", ["hdf5"])
@pytest.mark.parametrize("evil", EVIL_HDF5.values(), ids=EVIL_HDF5.keys())
def test_an_hdf5_part_that_was_forged(store: Path, tmp_path: Path, evil: Callable[[Any], object]) -> None:
    SECRET["path"] = tmp_path / "secret.h5"
    before = contents(store)
    part = plant(store, hdf5_part(evil))
    with little_memory():
        is_refused_and_mended(store, part, before)


def test_a_part_that_was_forged_well_is_read_as_it_says(store: Path) -> None:
    """So what makes the others fail is what is evil in them, and not how they are planted."""
    plant(store, hdf5_part(lambda file: None))
    assert len(Store.open(store).bag("1")) == 3 * 4 + 2
    assert verify(store, "full").damage == []


def zip_entries() -> dict[str, bytes]:
    """The files of a good part of three rows of x/s in Zarr."""
    data = encode_as(".zarr.zip", make_slice("1", "x", "s", [1, 2, 3]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def as_ours(more: dict[str, bytes]) -> bytes:
    """A part with more files in it, packed as featstore packs."""
    files = {**zip_entries(), **more}
    return stored_zip.encode((name, [np.frombuffer(data, np.uint8)]) for name, data in files.items())


def as_others(more: dict[str, bytes], compression: int, twice: bool = False) -> bytes:
    """The same, packed by Python's own module."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in {**zip_entries(), **more}.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                archive.writestr(zipfile.ZipInfo("x/s/features/c/0/0"), b"")
    return buffer.getvalue()


CHUNK = "x/s/features/c/0/0"
EVIL_ZIP = {
    "absolute name": lambda: as_ours({"/etc/x": b"x"}),
    "parent folder": lambda: as_ours({"../../x": b"x"}),
    "parent folder inside": lambda: as_ours({"x/../../../x": b"x"}),
    "chunk of another size": lambda: as_ours({CHUNK: bytes(1000)}),
    "metadata of another shape": lambda: as_ours(
        {(name := "x/s/features/zarr.json"): zip_entries()[name].replace(b"[3,", b"[3000000000000,")}
    ),
    "bomb": lambda: as_others({CHUNK: bytes(1 << 22)}, zipfile.ZIP_DEFLATED),
    "name that is there twice": lambda: as_others({}, zipfile.ZIP_STORED, twice=True),
}


def test_an_own_zip_with_a_harmless_name_more_is_read(
    small_stores: dict[str, Path], tmp_path: Path
) -> None:
    """So what makes the others fail is what is evil in them."""
    store = Path(shutil.copytree(small_stores["zarr"], tmp_path / "store"))
    plant(store, as_ours({"x/s/note": b"x"}))
    read(store)


@pytest.mark.parametrize("file_format", ["zarr"])
@pytest.mark.parametrize("evil", EVIL_ZIP.values(), ids=EVIL_ZIP.keys())
def test_a_zip_that_was_forged(store: Path, tmp_path: Path, evil: Callable[[], bytes]) -> None:
    before = contents(store)
    is_refused_and_mended(store, plant(store, evil()), before)
    assert os.listdir(tmp_path) == ["store"]
