"""Folders, names and tables that cannot be used: told with code 2, and nothing written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests import helpers
from tests.command_line import (
    all_refuse,
    answer,
    make_project,
    refused,
    succeeded,
    write_config,
)

# What real folders hold besides names in order, and what is said of each.
ODD_NAMES = {
    "case_1_match_1_h&e-labels_patch53.png": "unknown stain 'h&e-labels'",
    "case_1_match_1_sox10._patch24.png": "unknown stain 'sox10.'",
    "case_1_match_1_h&e_patch66(1).png": "copy mark after the patch number",
    "case_1_match_1_h&e_patch123 2.png": "copy mark after the patch number",
    "case_1_match_1_h&e_patch71 (3).png": "copy mark after the patch number",
    "case_1_match_1_h&e_patch.png": "no patch number",
    "case_1_match_1_h&e.png": "no patch number",
    "case_1_h&e_patch1.png": "no slice id",
    "case_1_match_1_h&e_melan_patch1.png": "two stains",
    "case_1_2_match_1_h&e_patch1.png": "underscore in the case id",
    "case_.._match_1_h&e_patch1.png": "'..'",
    "case_1_.._h&e_patch1.png": "'..'",
    "IMG_0001.png": "does not start with 'case_'",
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    helpers.write_labels(tmp_path, {"1": "1", "2": "3"})
    return make_project(tmp_path, {"labels": {"file": "labels.csv"}})


@pytest.fixture
def odd(project: Path) -> Path:
    source = next((project / "patches").iterdir())
    for name in ODD_NAMES:
        shutil.copy(source, project / "patches" / name)
    return project


def test_no_patches(tmp_path: Path) -> None:
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "slide.svs").touch()
    write_config(tmp_path)
    all_refuse(tmp_path, says=("no PNG files below", str(tmp_path / "patches"), "1 .svs"))


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_the_folder_of_patches_is_none(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "patches").touch()
    write_config(tmp_path)
    says = "is not a folder" if kind == "file" else "cannot be read"
    all_refuse(tmp_path, says=(f"{tmp_path / 'patches'} {says}", "patches.folder"))


@pytest.mark.parametrize(("name", "reason"), ODD_NAMES.items())
def test_a_name_that_cannot_be_read(project: Path, name: str, reason: str) -> None:
    shutil.copy(next((project / "patches").iterdir()), project / "patches" / name)
    message = refused(project, "extract", says=("1 of 11 file names cannot be read", name, reason))
    assert "--on-unparsed skip" in message


def test_all_odd_names_are_counted_and_can_be_left_out(odd: Path) -> None:
    all_refuse(odd, says=("13 of 23 file names cannot be read", "3  copy mark", "--pattern REGEX"))
    found = answer(odd, "extract", "--on-unparsed", "skip")
    assert found["committed"] == 10
    listed = (odd / "reports" / "check" / "unparsed.csv").read_text(encoding="utf-8")
    assert all(name in listed for name in ODD_NAMES)


def test_a_pattern_that_lets_dots_through(odd: Path) -> None:
    pattern = r"case_(?P<case>[^_]+)_(?P<slice>.+)_(?P<stain>[^_]+?)_patch(?P<patch>\d+)\.png"
    message = refused(odd, "extract", "--pattern", pattern, says=("case id contains '..'",))
    assert "slice id contains '..'" in message
    assert succeeded(odd, "check", "--pattern", pattern, "--on-unparsed", "skip")
    assert not (odd.parent / "store").exists()


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("(", "not a regular expression"),
        ("(?P<case>.)(?P<slice>.)(?P<stain>.)", "lacks the groups patch"),
        ("(?P<case>.)(?P<slice>.)(?P<stain>.)(?P<patch>.)(?P<z>.)", "unknown groups z"),
        ("(?P<case>.)(?P<slice>.)(?P<stain>.)(?P<patch>.)(?P<x>.)", "lacks the groups y"),
    ],
)
def test_patterns_of_no_use(project: Path, pattern: str, says: str) -> None:
    all_refuse(project, "--pattern", pattern, says=(says, "patches.pattern"))


def test_two_files_for_one_patch(project: Path) -> None:
    first = project / "patches" / helpers.patch_name("1", "match_1", "h&e", 3)
    zero = shutil.copy(first, project / "patches" / helpers.patch_name("01", "match_1", "h&e", 3))
    all_refuse(project, says=("1 patch has two files", f"{zero.name} and {first.name}"))
    assert answer(project, "check", "--no-normalize-cases")["cases"] == 3
    zero.unlink()
    (project / "patches" / "sub").mkdir()
    shutil.copy(first, project / "patches" / "sub")
    all_refuse(project, says=("1 patch has two files", f"{first.name} and sub/{first.name}"))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (None, "cannot be read: No such file"),
        (b"Patient,Class\n1,1\n", "has no column 'Case'"),
        (b"Case,Klass\n1,1\n", "no column 'Class' (nearest: 'Klass')"),
        (b"Case,Case,Class\n1,1,1\n", "two columns named 'Case'"),
        (b"Case,Class\n", "no rows"),
        (b"", "is empty"),
        (b"Case,Class\n1,1\n1,3\n", "two different classes"),
        (b"Case,Class\n038,1\n38,3\n", "two different classes"),
        (b"Case,Class\n1,\n", "rows without case id or class, in line 2"),
        (b"Case,Class\n1,1,1\n", "3 cells in line 2"),
        (b"Case,Class\n../1,1\n", "case id '../1' contains '..'"),
        (b"Case,Class\n..,1\n", "case id '..' contains '..'"),
        (b"Case,Class\n1\x00,1\n", "is binary"),
        (b"Case,Class\nJos\xe9,1\n", "is not UTF-8: byte 0xe9 in line 2"),
        (b'Case,Class\n"1,1\n', "not a readable CSV"),
    ],
)
def test_tables_of_labels(project: Path, table: bytes | None, says: str) -> None:
    file = project / "labels.csv"
    file.unlink()
    if table is not None:
        file.write_bytes(table)
    all_refuse(project, says=(says, str(file)))


def test_columns_that_are_named_otherwise_are_given_by_flags(project: Path) -> None:
    (project / "labels.csv").write_text("case_id,label\n1,0\n2,1\n")
    message = refused(project, "check", says=("case_id, label", "--case-column"))
    assert "labels.file" in message
    found = answer(project, "check", "--case-column", "case_id", "--class-column", "label")
    assert list(found["classes"]) == ["0", "1"]


def test_the_project_lies_in_the_folder_of_patches(tmp_path: Path) -> None:
    helpers.make_cohort(tmp_path, cases=1, stains=("h&e",), slices=1)
    refused(tmp_path, "init", ".", says=("lies in the folder of patches", str(tmp_path)))


def test_a_folder_of_patches_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    name = os.fsdecode(b"p\xff\xc2\x85")
    helpers.make_cohort(tmp_path / name, cases=1, stains=("h&e",), slices=1)
    succeeded(tmp_path, "init", name, "--backbone", "timm:test_resnet", "--weights", "random:0")
    assert answer(tmp_path, "check")["patches"] == 5
    assert answer(tmp_path, "extract", "--resize", "32")["committed"] == 5
