"""HDF5 files that are wrong, damaged, hostile or another tool's, in all the layouts that have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.interop.builders import Arrays, corners_of, write_clam, write_h5, write_stamp, write_trident
from tests.interop.projects import refused
from tests.interop.refusals import BAD, FEATURES, everywhere, is_refused_or_skipped, made_by

CORNERS = corners_of(FEATURES)["s2"]
HERE = {"s2": BAD}

# HDF5: how a file may be bad in all the layouts that use it

H5: dict[str, tuple[Callable[[Path, Arrays], Path], str, str]] = {
    "clam": (write_clam, "h5_files/s2.h5", "features"),
    "trident": (write_trident, "s2.h5", "features"),
    "stamp": (write_stamp, "s2.h5", "feats"),
}


def other_file(path: Path) -> Path:
    return write_h5(path.parent.parent / "secret.h5", {"x": BAD})


def as_external_link(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink(str(other_file(path)), "/x")


def as_soft_link(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        file["there"] = BAD
        del file[name]
        file[name] = h5py.SoftLink("/there")


def as_dangling_link(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = h5py.SoftLink("/nowhere")


def as_external_storage(path: Path, name: str) -> None:
    raw = path.parent.parent / "raw.bin"
    raw.write_bytes(BAD.tobytes())
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, BAD.shape, BAD.dtype, external=[(str(raw), 0, BAD.nbytes)])


def as_virtual(path: Path, name: str) -> None:
    layout = h5py.VirtualLayout(BAD.shape, BAD.dtype)
    layout[:] = h5py.VirtualSource(str(other_file(path)), "x", BAD.shape)
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_virtual_dataset(name, layout)


def replaced(path: Path, name: str, **made: Any) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_dataset(name, **made)


def without_a_chunk(path: Path, name: str) -> None:
    replaced(path, name, shape=(8, 6), dtype="f4", chunks=(4, 6))
    with h5py.File(path, "a") as file:
        file[name][:4] = 1


def as_a_bomb(path: Path, name: str) -> None:
    replaced(path, name, shape=(10**9, 10**6), dtype="f4")


def as_a_packed_bomb(path: Path, name: str) -> None:
    replaced(path, name, shape=(2**24, 6), dtype="f4", chunks=(2**24, 6), compression="gzip")
    with h5py.File(path, "a") as file:
        # A chunk that is there, but far too small for what it stands for.
        file[name].id.write_direct_chunk((0, 0), b"x\x9c" + bytes(20))


H5_DAMAGE: dict[str, tuple[Callable[[Path, str], Any], str]] = {
    "external link": (as_external_link, "is a link"),
    "soft link": (as_soft_link, "is a link"),
    "dangling link": (as_dangling_link, "is a link"),
    "external storage": (as_external_storage, "in another file"),
    "virtual": (as_virtual, "in another file"),
    "group": (lambda path, name: h5_group(path, name), "no array"),
    "missing chunk": (without_a_chunk, "lacks 1 of its 2 chunks"),
    "bomb": (as_a_bomb, "claims"),
    "packed bomb": (as_a_packed_bomb, "claims"),
    "text": (lambda path, name: replaced(path, name, data=[[b"a", b"b"]]), "not numbers"),
    "complex": (lambda path, name: replaced(path, name, data=BAD * 1j), "not numbers"),
    "one vector": (lambda path, name: replaced(path, name, data=BAD[0]), "shape (6,)"),
    "three dimensions": (lambda path, name: replaced(path, name, data=BAD[None]), "shape (1, 1, 6)"),
    "no rows": (lambda path, name: replaced(path, name, data=BAD[:0]), "shape (0, 6)"),
    "scalar": (lambda path, name: replaced(path, name, data=1.0), "shape ()"),
    "more rows": (lambda path, name: replaced(path, name, data=np.ones((9, 6), "f4")), "coordinates"),
    "other width": (
        lambda path, name: replaced(path, name, data=np.ones((1, 5), "f4")),
        "5 features here, 6 in",
    ),
    "missing": (lambda path, name: replaced(path, name, data=BAD) or renamed(path, name), "no array"),
    "truncated": (lambda path, name: path.write_bytes(path.read_bytes()[:-200]), "cannot be read as HDF5"),
    "cut in half": (lambda path, name: path.write_bytes(path.read_bytes()[:900]), "cannot be read as HDF5"),
    "empty file": (lambda path, name: path.write_bytes(b""), "cannot be read as HDF5"),
    "no HDF5": (lambda path, name: path.write_text("hello"), "cannot be read as HDF5"),
    "NaN": (lambda path, name: replaced(path, name, data=BAD * np.nan), "NaN or infinity in 1 of 1"),
    "infinity": (lambda path, name: replaced(path, name, data=BAD / 0), "NaN or infinity in 1 of 1"),
}


def h5_group(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        file.create_group(name)


def renamed(path: Path, name: str) -> None:
    with h5py.File(path, "a") as file:
        file["embeddings"] = file.pop(name)[()]


@pytest.mark.parametrize(
    ("name", "damage"),
    everywhere(
        H5_DAMAGE,
        "trident",
        ("clam", "stamp"),
        ("external link", "virtual", "missing chunk", "one vector", "other width", "truncated", "NaN"),
    ),
)
def test_a_bad_hdf5_file(tmp_path: Path, name: str, damage: str) -> None:
    write, bad, array = H5[name]
    # The first bag is the bad one: NaN shows only when it is read.
    source = made_by(write, tmp_path / "in", {"s0": BAD, **FEATURES})
    bad = bad.replace("s2", "s0")
    change, says = H5_DAMAGE[damage]
    with np.errstate(all="ignore"):
        change(next(source.glob("features_*"), source) / bad, array)
    is_refused_or_skipped(tmp_path, source, bad, says, FEATURES, source_format=name)


@pytest.mark.parametrize("name", H5)
@pytest.mark.parametrize(
    ("coords", "says"),
    [
        (CORNERS[:0], "coordinates of the shape (0, 2)"),
        (np.repeat(CORNERS, 2, axis=0), "coordinates of the shape (2, 2)"),
        (np.zeros((1, 3)), "coordinates of the shape (1, 3)"),
        (np.array([[b"x", b"y"]]), "not numbers"),
    ],
)
def test_coordinates_that_do_not_fit(tmp_path: Path, name: str, coords: np.ndarray, says: str) -> None:
    write, bad, _ = H5[name]
    source = made_by(write, tmp_path / "in")
    replaced(next(source.glob("features_*"), source) / bad, "coords", data=coords)
    is_refused_or_skipped(tmp_path, source, bad, says)


@pytest.mark.parametrize("kind", ["soft", "external", "dangling"])
def test_linked_coordinates_are_never_followed(tmp_path: Path, kind: str) -> None:
    """Also not by the look that recognises the format, which comes upon the first file first."""
    change = {"soft": as_soft_link, "external": as_external_link, "dangling": as_dangling_link}[kind]
    source = made_by(write_trident, tmp_path / "in")
    change(source / "features_uni_v1" / "s1.h5", "coords")
    refused(tmp_path / "p", source, "s1.h5", "'coords' is a link", source_format="trident")


@pytest.mark.parametrize(
    ("name", "stranger", "bad", "says"),
    [
        ("trident", write_stamp, "s2.h5", "no array 'features' (the file has coords, feats)"),
        ("stamp", lambda path, x: write_trident(path, x), "s2.h5", "no array 'feats'"),
        ("trident", lambda path, x: write_clam(path, x), "s2.h5", "no attribute patch_size_level0"),
        ("clam", lambda path, x: write_trident(path, x), "h5_files/s2.h5", "a file of TRIDENT's"),
        ("clam", write_stamp, "h5_files/s2.h5", "no array 'features'"),
    ],
)
def test_a_file_of_another_tool(
    tmp_path: Path, name: str, stranger: Callable[[Path, Arrays], Path], bad: str, says: str
) -> None:
    source = made_by(H5[name][0], tmp_path / "in")
    (tmp_path / "other").mkdir()
    stranger(tmp_path / "other", HERE)
    (file,) = (tmp_path / "other").rglob("s2.h5")
    file.rename(next(source.glob("features_*"), source) / bad)
    is_refused_or_skipped(tmp_path, source, bad, says)


@pytest.mark.parametrize(
    ("name", "attributes", "says"),
    [
        ("stamp", {"feat_type": "slide"}, "features of a slide, not of tiles"),
        ("stamp", {"unit": "px"}, "coordinates in the unit px"),
        ("stamp", {"unit": "None"}, "coordinates in the unit None"),
        ("stamp", {"extractor": "gigapath"}, "extractor is gigapath"),
        ("stamp", {"tile_size_um": 128.0}, "tile_size_um is 128.0"),
        ("trident", {"name": "s3"}, "the file says that it is slide 's3'"),
    ],
)
def test_a_file_made_otherwise(tmp_path: Path, name: str, attributes: dict[str, Any], says: str) -> None:
    write, bad, _ = H5[name]
    source = made_by(write, tmp_path / "in")
    write(source, HERE, **attributes)  # type: ignore[call-arg]
    is_refused_or_skipped(tmp_path, source, bad, says)


def test_whole_slides_features_of_trident_are_no_bags(tmp_path: Path) -> None:
    folder = tmp_path / "slide_features_titan"
    write_h5(folder / "s1.h5", {"features": BAD[0], "coords": CORNERS}, coords={"patch_size_level0": 512})
    refused(tmp_path / "p", folder, "s1.h5", "shape (6,)", source_format="trident")
