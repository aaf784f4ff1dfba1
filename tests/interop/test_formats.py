"""What each foreign layout becomes: numbers, geometry, names, and what is told of it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featstore.store import Store
from tests.interop.builders import (
    SLIDES,
    Arrays,
    corners_of,
    features_of,
    save_pt,
    square,
    write_clam,
    write_h5,
    write_slideflow,
    write_stamp,
    write_torchmil,
    write_trident,
)
from tests.interop.projects import (
    alone,
    assert_same,
    coords_of,
    geometry_of,
    imported,
    refused,
    rows_of,
    table_of,
)

FOLDERS: dict[str, Any] = {
    "clam": write_clam,
    "trident": write_trident,
    "stamp": write_stamp,
    "slideflow": write_slideflow,
    "torchmil": write_torchmil,
}
PATHS = {
    "clam": "h5_files/{}.h5",
    "trident": "{}.h5",
    "stamp": "{}.h5",
    "slideflow": "{}.pt",
    "torchmil": "features/{}.npy",
}
BACKBONES = {
    "clam": "imported:clam",
    "trident": "imported:trident:uni_v1",
    "stamp": "imported:stamp:uni2",
    "slideflow": "imported:slideflow:UNIFeatures",
    "torchmil": "imported:torchmil",
}
every_folder = pytest.mark.parametrize("name", FOLDERS)


def folder(name: str, path: Path, dtype: str = "float32") -> Arrays:
    features = features_of(dtype=dtype)
    path.mkdir()
    FOLDERS[name](path, features)
    return features


def assert_sources_are_the_files(project: Path, root: Path) -> None:
    """Size, time and digest of every row's file."""
    for row in Store.open(project / "store").sources().itertuples():
        file = root / row.path
        assert (row.size, row.mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert row.sha256 == hashlib.sha256(file.read_bytes()).digest()


@every_folder
@pytest.mark.parametrize("given", ["auto", "named"])
def test_a_folder_of_bags_imports_with_its_numbers_and_names(tmp_path: Path, name: str, given: str) -> None:
    features = folder(name, tmp_path / "in")
    report = imported(
        tmp_path / "project", tmp_path / "in", source_format="auto" if given == "auto" else name
    )
    assert (report.format, report.bags, report.patches) == (name, 3, sum(SLIDES.values()))
    assert (report.already, report.skipped, report.interrupted) == (0, [], None)
    assert_same(rows_of(tmp_path / "project"), alone(features), "float32")
    table = table_of(tmp_path / "project")
    assert table["case_id"].tolist() == [s for s, n in SLIDES.items() for _ in range(n)]
    assert table["slice_id"].tolist() == table["case_id"].tolist()
    assert set(table["stain"]) == {"h&e"}
    assert table["patch"].tolist() == [i for n in SLIDES.values() for i in range(n)]
    assert table["path"].tolist() == [PATHS[name].format(case) for case in table["case_id"]]
    assert table["entropy"].isna().all()
    assert_sources_are_the_files(
        tmp_path / "project", next((tmp_path / "in").glob("features_*"), tmp_path / "in")
    )
    assert Store.open(tmp_path / "project" / "store").spec.backbone == BACKBONES[name]
    assert report.spec.is_imported


@every_folder
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("float16", "float16"),
        ("float32", "float32"),
        ("float64", "float32"),
        ("int32", "float32"),
        ("uint8", "float32"),
    ],
)
def test_the_dtype_is_kept_or_the_change_is_told(
    tmp_path: Path, name: str, dtype: str, stored: str
) -> None:
    features = folder(name, tmp_path / "in", dtype)
    report = imported(tmp_path / "project", tmp_path / "in")
    assert report.spec.stored_dtype == stored
    assert_same(rows_of(tmp_path / "project"), alone(features), stored)
    told = f"{dtype} features are stored as float32"
    assert (told in report.notes) is (dtype != stored)
    assert (told in report.to_text()) is (dtype != stored)


@every_folder
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_a_precision_that_is_asked_for_is_what_is_stored(tmp_path: Path, name: str, precision: str) -> None:
    features = folder(name, tmp_path / "in")
    imported(tmp_path / "project", tmp_path / "in", precision=precision)
    assert_same(rows_of(tmp_path / "project"), alone(features), precision)


@every_folder
def test_numbers_that_float16_cannot_hold_are_refused_by_file(tmp_path: Path, name: str) -> None:
    features = features_of()
    features["s2"][0, 1] = 70_000
    (tmp_path / "in").mkdir()
    FOLDERS[name](tmp_path / "in", features)
    where = PATHS[name].format("s2")
    with pytest.raises(Exception, match="beyond the range of float16") as error:
        imported(tmp_path / "project", tmp_path / "in", precision="float16")
    assert error.value.where.endswith(where)
    assert "--precision float32" in error.value.fix
    with pytest.raises(Exception, match="another make"):
        imported(tmp_path / "project", tmp_path / "in", precision="float32")
    imported(tmp_path / "other", tmp_path / "in", precision="float32")
    assert_same(rows_of(tmp_path / "other"), alone(features), "float32")


@every_folder
def test_a_refused_first_bag_leaves_the_way_open_for_what_the_message_says(
    tmp_path: Path, name: str
) -> None:
    features = features_of()
    features["s1"][0, 1] = -70_000
    (tmp_path / "in").mkdir()
    FOLDERS[name](tmp_path / "in", features)
    refused(tmp_path / "p", tmp_path / "in", PATHS[name].format("s1"), precision="float16")
    imported(tmp_path / "p", tmp_path / "in", precision="float32")
    assert_same(rows_of(tmp_path / "p"), alone(features), "float32")


# Geometry


@pytest.mark.parametrize("flag", [None, 256.0])
def test_clam_has_corners_and_with_a_patch_size_squares(tmp_path: Path, flag: float | None) -> None:
    features = folder("clam", tmp_path / "in")
    report = imported(tmp_path / "p", tmp_path / "in", patch_size=flag)
    for slide, corners in corners_of(features).items():
        found = geometry_of(tmp_path / "p", slide)
        wanted = square(corners, flag or np.nan)
        wanted[:, :2] = corners
        np.testing.assert_array_equal(found, wanted)
        assert coords_of(tmp_path / "p", slide) is None
    assert any("--patch-size" in note for note in report.notes) is (flag is None)


@pytest.mark.parametrize("inner", ["", "h5_files", "pt_files"])
def test_clam_may_have_one_kind_of_file_or_be_named_by_an_inner_folder(tmp_path: Path, inner: str) -> None:
    features = features_of()
    write_clam(tmp_path / "in", {"s1": features["s1"]}, ("h5",))
    write_clam(tmp_path / "in", {"s2": features["s2"]}, ("pt",))
    report = imported(tmp_path / "p", tmp_path / "in" / inner)
    there = {"": ("s1", "s2"), "h5_files": ("s1",), "pt_files": ("s2",)}[inner]
    assert_same(rows_of(tmp_path / "p"), alone({s: features[s] for s in there}), "float32")
    table = table_of(tmp_path / "p")
    for slide in there:
        known = table.loc[table["case_id"] == slide, "x0"].notna() if "x0" in table else np.array(False)
        assert known.all() == (slide == "s1")
    assert any("come without coordinates" in note for note in report.notes) is ("s2" in there)


def test_a_folder_may_be_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = folder("clam", tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in" / "h5_files")
    imported(tmp_path / "p", Path("."))
    assert_same(rows_of(tmp_path / "p"), alone(features), "float32")


@pytest.mark.parametrize(
    ("attributes", "flag", "size"),
    [
        ({}, None, 512),
        ({}, 100.0, 512),  # the file knows better
        ({"patch_size_level0": 300.5}, None, 300.5),
        ({"patch_size_level0": None}, None, 512),  # 256 px at 20 of 40
        ({"patch_size_level0": None, "target_magnification": 10}, None, 1024),
        ({"patch_size_level0": None, "level0_magnification": None}, None, np.nan),
        ({"patch_size_level0": None, "level0_magnification": None}, 640.0, 640),
        ({"patch_size_level0": None, "patch_size": None, "overlap": None}, None, np.nan),
    ],
)
def test_trident_says_how_large_a_patch_is_in_one_way_or_another(
    tmp_path: Path, attributes: dict[str, Any], flag: float | None, size: float
) -> None:
    features = features_of()
    write_trident(tmp_path / "in", features, **attributes)
    imported(tmp_path / "p", tmp_path / "in", patch_size=flag)
    for slide, corners in corners_of(features).items():
        wanted = square(corners, size)
        wanted[:, :2] = corners
        np.testing.assert_array_equal(geometry_of(tmp_path / "p", slide), wanted)


def test_trident_takes_the_encoders_folder_itself_and_the_encoder_may_be_named(tmp_path: Path) -> None:
    features = features_of()
    write_trident(tmp_path / "in", features, "conch_v15")
    report = imported(tmp_path / "p", tmp_path / "in" / "features_conch_v15")
    assert report.spec.backbone == "imported:trident:conch_v15"
    assert (
        imported(tmp_path / "q", tmp_path / "in", encoder="mine").spec.backbone == "imported:trident:mine"
    )
    assert report.spec.fingerprint != Store.open(tmp_path / "q" / "store").spec.fingerprint


@pytest.mark.parametrize(
    ("mpp", "tile", "size"), [(0.5, 256.0, 512), (0.25, 128.0, 512), (0.5, None, np.nan)]
)
def test_stamp_keeps_micrometres_and_with_mpp_knows_pixels(
    tmp_path: Path, mpp: float, tile: float | None, size: float
) -> None:
    features = features_of(dtype="float16")
    (tmp_path / "in").mkdir()
    write_stamp(tmp_path / "in", features, tile_size_um="None" if tile is None else tile)
    without = imported(tmp_path / "p", tmp_path / "in")
    assert any("--mpp" in note for note in without.notes)
    imported(tmp_path / "q", tmp_path / "in", mpp=mpp)
    for slide, corners in corners_of(features).items():
        um = corners * 0.5
        for project in ("p", "q"):
            np.testing.assert_array_equal(coords_of(tmp_path / project, slide), um)
        assert geometry_of(tmp_path / "p", slide) is None
        wanted = square(um / mpp, size)
        wanted[:, :2] = um / mpp
        np.testing.assert_array_equal(geometry_of(tmp_path / "q", slide), wanted)
    assert without.spec.backbone == "imported:stamp:uni2"


@pytest.mark.parametrize(
    ("flags", "config", "known"),
    [
        ({}, {}, False),
        ({"mpp": 0.5}, {}, True),
        ({"patch_size": 512.0}, {}, True),
        ({"patch_size": 512.0, "mpp": 99.0}, {}, True),
        ({"mpp": 0.5}, {"tile_um": "20x"}, False),
    ],
)
def test_slideflow_has_centres_of_tiles(
    tmp_path: Path, flags: dict[str, float], config: dict[str, Any], known: bool
) -> None:
    features = features_of()
    (tmp_path / "in").mkdir()
    write_slideflow(tmp_path / "in", features, **config)
    report = imported(tmp_path / "p", tmp_path / "in", **flags)
    for slide, corners in corners_of(features).items():
        np.testing.assert_array_equal(coords_of(tmp_path / "p", slide), corners + 256)
        geometry = geometry_of(tmp_path / "p", slide)
        if known:
            np.testing.assert_array_equal(geometry, square(corners, 512))
        else:
            assert geometry is None
    assert any("its centre alone" in note for note in report.notes) is not known


def test_slideflow_bags_without_an_index_and_indices_without_a_bag_are_told(tmp_path: Path) -> None:
    features = folder("slideflow", tmp_path / "in")
    (tmp_path / "in" / "s1.index.npz").unlink()
    (tmp_path / "in" / "s2.pt").unlink()
    report = imported(tmp_path / "p", tmp_path / "in")
    assert set(rows_of(tmp_path / "p")) == set(alone({s: features[s] for s in ("s1", "s10")}))
    assert any("1 slides have no index" in note for note in report.notes)
    assert any("1 indices have no bag (s2)" in note for note in report.notes)


@pytest.mark.parametrize("flag", [None, 512.0])
def test_torchmil_coordinates_are_kept_and_count_as_corners_with_a_patch_size(
    tmp_path: Path, flag: float | None
) -> None:
    features = folder("torchmil", tmp_path / "in")
    imported(tmp_path / "p", tmp_path / "in", patch_size=flag)
    for slide, corners in corners_of(features).items():
        np.testing.assert_array_equal(coords_of(tmp_path / "p", slide), corners)
        geometry = geometry_of(tmp_path / "p", slide)
        if flag is None:
            assert geometry is None
        else:
            np.testing.assert_array_equal(geometry, square(corners, flag))


def test_torchmil_notes_files_that_have_no_counterpart(tmp_path: Path) -> None:
    features = features_of()
    write_torchmil(tmp_path / "in", features, {"s1": 0, "s2": 1, "s10": 1})
    (tmp_path / "in" / "labels" / "s1.npy").unlink()
    (tmp_path / "in" / "features" / "s2.npy").unlink()
    report = imported(tmp_path / "p", tmp_path / "in")
    assert report.labels == {"s10": "1"}
    assert "1 bags have no file in labels (s1)" in report.notes
    assert "1 files in coords belong to no bag (s2)" in report.notes


def test_bfloat16_becomes_float32_and_is_told(tmp_path: Path) -> None:
    x = torch.arange(12).reshape(2, 6).to(torch.bfloat16) / 7
    save_pt(tmp_path / "in" / "pt_files" / "a.pt", x)
    report = imported(tmp_path / "p", tmp_path / "in")
    assert_same(rows_of(tmp_path / "p"), alone({"a": x.float().numpy()}), "float32")
    assert "bfloat16 features are stored as float32" in report.notes


def test_float16_among_float32_is_told_and_loses_nothing(tmp_path: Path) -> None:
    features = features_of()
    mixed = {**features, "s2": features["s2"].astype(np.float16)}
    write_clam(tmp_path / "in", mixed)
    report = imported(tmp_path / "p", tmp_path / "in")
    assert_same(rows_of(tmp_path / "p"), alone(features), "float32")
    assert "float16 features are stored as float32" in report.notes


def test_big_endian_and_compressed_arrays_are_the_same_numbers(tmp_path: Path) -> None:
    import h5py

    features = features_of()
    with h5py.File(write_h5(tmp_path / "in" / "h5_files" / "a.h5", {}), "w") as file:
        file.create_dataset("features", data=features["s1"].astype(">f4"))
        file.create_dataset("coords", data=corners_of(features)["s1"], chunks=(2, 2), compression="gzip")
    imported(tmp_path / "p", tmp_path / "in")
    assert_same(rows_of(tmp_path / "p"), alone({"a": features["s1"]}), "float32")
    assert geometry_of(tmp_path / "p", "a")[:, :2].tolist() == corners_of(features)["s1"].tolist()  # type: ignore[index]
