"""Folders that are in no layout, in several, or empty; and one bad file among many."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.interop.builders import save_npy, write_clam, write_h5, write_rows, write_stamp, write_trident
from tests.interop.projects import alone, imported, refused, rows_of
from tests.interop.refusals import BAD, FEATURES, is_refused_or_skipped, made_by


def test_features_of_two_encoders_must_be_named_apart(tmp_path: Path) -> None:
    write_trident(tmp_path / "in", FEATURES, "uni_v1")
    write_trident(tmp_path / "in", FEATURES, "virchow")
    refused(tmp_path / "p", tmp_path / "in", tmp_path / "in", "2 encoders", "features_virchow")


@pytest.mark.parametrize("name", ["clam", "trident", "stamp", "slideflow", "torchmil", "vectors"])
def test_a_folder_without_bags(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ".s1.h5").write_bytes(b"litter")
    refused(tmp_path / "p", tmp_path / "in", tmp_path / "in", source_format=name)


def test_an_unknown_folder_gets_the_list_of_layouts(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    says = ("no layout that is known", "clam: h5_files", "vectors: case_ID", "--from FORMAT")
    refused(tmp_path / "p", tmp_path / "in", tmp_path / "in", *says)


def test_a_folder_in_two_layouts_must_be_told_apart(tmp_path: Path) -> None:
    write_clam(tmp_path / "in", FEATURES)
    write_stamp(tmp_path / "in", FEATURES)
    refused(tmp_path / "p", tmp_path / "in", tmp_path / "in", "clam and stamp", "--from")
    assert imported(tmp_path / "p", tmp_path / "in", source_format="stamp").format == "stamp"


@pytest.mark.parametrize("name", ["clam", "trident", "vectors", "table"])
def test_a_file_where_a_folder_is_expected_and_the_reverse(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" if name == "table" else save_npy(tmp_path / "x.npy", BAD)
    what = "folder" if name == "table" else "file"
    refused(tmp_path / "p", path, path, f"this is a {what}", source_format=name)


def test_a_path_that_is_not_there_or_is_a_stray_file(tmp_path: Path) -> None:
    refused(tmp_path / "p", tmp_path / "gone", tmp_path / "gone", "nothing at this path")
    refused(tmp_path / "p", write_rows(tmp_path / "x.txt", [[1]]), "x.txt", "no layout that is known")


def test_where_no_hdf5_file_can_be_read_the_first_is_named(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        (tmp_path / f"{name}.h5").write_text("broken")
    refused(tmp_path / "p", tmp_path, "s1.h5", "cannot be read as HDF5")


def test_a_broken_first_file_does_not_hide_the_format(tmp_path: Path) -> None:
    source = made_by(write_stamp, tmp_path / "in")
    (source / "s0.h5").write_text("broken")
    is_refused_or_skipped(tmp_path, source, "s0.h5", "cannot be read as HDF5", FEATURES)


def test_many_bad_files_are_counted_in_one_message(tmp_path: Path) -> None:
    source = made_by(write_clam, tmp_path / "in")
    for name in ("s1", "s10"):
        (source / "h5_files" / f"{name}.h5").write_text("broken")
    refused(tmp_path / "p", source, "s1.h5", "(and 1 more of 3 bags cannot be used)")


def test_nothing_left_is_an_error_also_with_skipping(tmp_path: Path) -> None:
    write_h5(tmp_path / "in" / "h5_files" / "s1.h5", {"x": BAD})
    refused(tmp_path / "p", tmp_path / "in", tmp_path / "in", "no bag is left", on_bad="skip")


def test_the_width_that_most_bags_have_is_the_right_one(tmp_path: Path) -> None:
    source = write_clam(tmp_path / "in", {**FEATURES, "a1": np.ones((2, 9), np.float32)}, ("pt",))
    is_refused_or_skipped(tmp_path, source, "pt_files/a1.pt", "9 features here, 6 in", FEATURES)


def test_a_name_that_is_no_text_is_skipped_and_listed(tmp_path: Path) -> None:
    source = made_by(write_stamp, tmp_path / "in")
    try:
        os.rename(source / "s2.h5", os.fsencode(source) + b"/s\xff.h5")
    except OSError:
        pytest.skip("this file system takes no such name")
    report = imported(tmp_path / "p", source, on_bad="skip")
    assert [path for path, _ in report.skipped] == ["s\\udcff.h5"]
    assert set(rows_of(tmp_path / "p")) == set(alone(dict.fromkeys(("s1", "s10"), BAD)))
