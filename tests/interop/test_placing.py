"""Whose a bag is: ids, the map, exclusions, labels, and which embeddings may share a store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featstore.errors import FeatstoreError, FingerprintMismatch
from tests.interop.builders import (
    features_of,
    write_clam,
    write_rows,
    write_stamp,
    write_table,
    write_torchmil,
    write_trident,
    write_vectors,
)
from tests.interop.projects import assert_same, imported, refused, rows_of

FEATURES = features_of()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_clam(tmp_path / "in", FEATURES)


def with_map(folder: Path, source: Path, rows: Sequence[Sequence[object]], **more: Any) -> Any:
    write_rows(folder / "map.csv", rows)
    return imported(folder / "p", source, map=str(folder / "map.csv"), **more)


MAPPED = {("A", "h&e", "s1"): "s1", ("A", "h&e", "s2"): "s2", ("B", "h&e", "s10"): "s10"}


@pytest.mark.parametrize(
    ("bag", "case", "suffix"),
    [
        ("slide_id", "case_id", ""),
        ("slide", "Case", ".h5"),
        ("bag_id", "patient_id", ".pt"),
        ("Bag", "patient", ".npy"),
        ("filename", "PATIENT", ".h5"),
        ("file", "case", ""),
    ],
)
def test_a_map_puts_several_slides_into_a_case(
    tmp_path: Path, source: Path, bag: str, case: str, suffix: str
) -> None:
    rows = [[case, bag], *[[key[0], name + suffix] for key, name in MAPPED.items()]]
    report = with_map(tmp_path, source, rows)
    assert_same(rows_of(tmp_path / "p"), {key: FEATURES[s] for key, s in MAPPED.items()}, "float32")
    assert not any("the map names" in note for note in report.notes)


def test_a_map_names_stains_and_slices_too_where_it_does(tmp_path: Path, source: Path) -> None:
    rows = [
        ["slide_id", "case_id", "stain", "slice"],
        ["s1", "007", "HE", "unmatched02"],
        ["s2", "7.0", "Melan-A", ""],
        ["s10", "7", "", "x"],
    ]
    with_map(tmp_path, source, rows, default_stain="sox-10")
    wanted = {
        ("7", "h&e", "unmatched_2"): "s1",
        ("7", "melan", "s2"): "s2",
        ("7", "sox10", "x"): "s10",
    }
    assert_same(rows_of(tmp_path / "p"), {key: FEATURES[s] for key, s in wanted.items()}, "float32")


def test_a_bag_that_the_map_does_not_name(tmp_path: Path, source: Path) -> None:
    file = write_rows(tmp_path / "map.csv", [["slide_id", "case_id"], ["s1", "A"], ["s2", "A"]])
    says = "does not name the bag 's10'"
    refused(tmp_path / "p", source, "h5_files/s10.h5", says, "map.csv", map=str(file))
    report = imported(tmp_path / "p", source, map=str(file), on_bad="skip")
    assert set(rows_of(tmp_path / "p")) == {("A", "h&e", "s1"), ("A", "h&e", "s2")}
    assert report.skipped == [("h5_files/s10.h5", "the map does not name the bag 's10' (nearest: 's1')")]


def test_rows_of_the_map_without_a_bag_are_told(tmp_path: Path, source: Path) -> None:
    rows = [["slide_id", "case_id"], *[[s, "A"] for s in (*FEATURES, "s11", "s9")]]
    assert "the map names 2 bags that are not there (s9, s11)" in with_map(tmp_path, source, rows).notes


def test_a_row_said_twice_alike_is_no_contradiction(tmp_path: Path, source: Path) -> None:
    rows = [["slide_id", "case_id"], *[[s, "A"] for s in (*FEATURES, *FEATURES)]]
    with_map(tmp_path, source, rows)
    assert len(rows_of(tmp_path / "p")) == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [["slide_id", "case_id"], ["s1", "A"], ["s1", "B"]],
            "two things of the bag 's1', the second in line 3",
        ),
        ([["slide_id", "who"], ["s1", "A"]], "no column for the case"),
        ([["x", "case_id"], ["s1", "A"]], "no column for the bag"),
        ([["slide_id", "case_id"], ["s1", "../A"]], "'../A' contains"),
        ([["slide_id", "case_id"], ["s1", ""]], "is empty"),
        ([["slide_id", "case_id", "slice"], ["s1", "A", "a/b"]], "'a/b' contains a slash"),
        (
            [["slide_id", "case_id", "slice"], ["s1", "A", "x"], ["s2", "A", "x"], ["s10", "A", "y"]],
            "two bags are slice x of stain h&e in case A",
        ),
        ([["slide_id", "case_id"], ["s1"]], "1 cells in line 2"),
    ],
)
def test_a_map_that_cannot_be_used(tmp_path: Path, source: Path, rows: Any, says: str) -> None:
    file = write_rows(tmp_path / "map.csv", rows)
    refused(tmp_path / "p", source, "", says, map=str(file))


def test_a_map_that_is_not_there(tmp_path: Path, source: Path) -> None:
    refused(tmp_path / "p", source, "", "gone.csv", map=str(tmp_path / "gone.csv"))


# Ids and exclusions


def test_ids_are_normalised_as_those_of_labels_are(tmp_path: Path) -> None:
    features = {"038": FEATURES["s1"], "unmatched2": FEATURES["s2"]}
    imported(tmp_path / "p", write_clam(tmp_path / "in", features))
    assert set(rows_of(tmp_path / "p")) == {("38", "h&e", "038"), ("unmatched2", "h&e", "unmatched_2")}
    off = {"patches": {"normalize_cases": False, "normalize_slices": False}}
    imported(tmp_path / "q", tmp_path / "in", off)
    assert set(rows_of(tmp_path / "q")) == {("038", "h&e", "038"), ("unmatched2", "h&e", "unmatched2")}


def test_two_bags_of_one_id_are_not_silently_one_case(tmp_path: Path) -> None:
    source = write_clam(tmp_path / "in", {"38": FEATURES["s1"], "038": FEATURES["s2"]})
    error = refused(tmp_path / "p", source, "h5_files/38.h5", "two bags are case 38", "--map")
    assert "h5_files/038.h5" in error.where
    with_map(tmp_path, source, [["slide_id", "case_id"], ["38", "38"], ["038", "38"]])
    assert set(rows_of(tmp_path / "p")) == {("38", "h&e", "38"), ("38", "h&e", "038")}


def test_slides_come_in_natural_order_of_cases(tmp_path: Path, source: Path) -> None:
    imported(tmp_path / "p", source)
    assert [key[0] for key in rows_of(tmp_path / "p")] == ["s1", "s2", "s10"]


@pytest.mark.parametrize("kind", ["clam", "vectors"])
def test_excluded_cases_are_left_out_however_their_ids_are_spelt(tmp_path: Path, kind: str) -> None:
    if kind == "clam":
        write_clam(tmp_path / "in", {"007": FEATURES["s1"], "8": FEATURES["s2"]})
    else:
        keys = {("007", "h&e", "a"): FEATURES["s1"], ("8", "h&e", "a"): FEATURES["s2"]}
        write_vectors(tmp_path / "in", keys)
    report = imported(tmp_path / "p", tmp_path / "in", {"exclude": ["07"]})
    assert [key[0] for key in rows_of(tmp_path / "p")] == ["8"]
    assert "excluded cases" in report.to_text()
    with pytest.raises(FeatstoreError, match=r"no bag is left|no patches are left"):
        imported(tmp_path / "q", tmp_path / "in", {"exclude": ["7", "8"]})
    assert not (tmp_path / "q" / "store").exists()


# Labels


def test_labels_of_bags_become_those_of_cases(tmp_path: Path) -> None:
    source = write_torchmil(tmp_path / "in", FEATURES, {"s1": 1, "s2": 1.0, "s10": [0]})
    rows = [["bag", "case"], ["s1", "A"], ["s2", "A"], ["s10", "B"]]
    assert with_map(tmp_path, source, rows).labels == {"A": "1", "B": "0"}


def test_a_case_of_two_classes_is_refused(tmp_path: Path) -> None:
    source = write_torchmil(tmp_path / "in", FEATURES, {"s1": 1, "s2": 0, "s10": 0})
    file = write_rows(tmp_path / "map.csv", [["bag", "case"], *[[s, "A"] for s in FEATURES]])
    says = "the bags of case A have two classes, '1' and '0'"
    refused(tmp_path / "p", source, "features/s2.npy", says, map=str(file))


# Which embeddings may share a store


def clam(folder: Path, **how: Any) -> Path:
    return write_clam(folder, features_of(**how))


def trident(folder: Path, encoder: str) -> Path:
    return write_trident(folder, FEATURES, encoder)


def stamp(folder: Path, extractor: str) -> Path:
    folder.mkdir()
    return write_stamp(folder, FEATURES, extractor=extractor)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (partial(trident, encoder="uni_v1"), partial(trident, encoder="virchow")),
        (partial(stamp, extractor="uni2"), partial(stamp, extractor="gigapath")),
        (clam, partial(trident, encoder="uni_v1")),
        (clam, partial(clam, dim=9)),
    ],
)
def test_embeddings_of_two_makes_never_share_a_store(tmp_path: Path, first: Any, second: Any) -> None:
    first(tmp_path / "a")
    second(tmp_path / "b")
    imported(tmp_path / "p", tmp_path / "a")
    before = rows_of(tmp_path / "p")
    with pytest.raises(FingerprintMismatch, match="another make") as error:
        imported(tmp_path / "p", tmp_path / "b")
    assert error.value.where == str(tmp_path / "p" / "store")
    assert_same(rows_of(tmp_path / "p"), before, "float32")


def test_float16_goes_into_a_store_of_float32_and_not_the_other_way_round(tmp_path: Path) -> None:
    full, half = tmp_path / "full", tmp_path / "half"
    write_clam(full, {"s1": FEATURES["s1"].astype(np.float32)})
    write_clam(half, {"s2": FEATURES["s2"].astype(np.float16)})
    imported(tmp_path / "p", full)
    assert "float16 features are stored as float32" in imported(tmp_path / "p", half).notes
    assert {key[0] for key in rows_of(tmp_path / "p")} == {"s1", "s2"}
    imported(tmp_path / "q", half)
    with pytest.raises(FingerprintMismatch, match="stored_dtype: float32 here, float16 there"):
        imported(tmp_path / "q", full)


def test_the_same_encoder_named_twice_may_share_a_store(tmp_path: Path) -> None:
    imported(tmp_path / "p", write_clam(tmp_path / "a", {"s1": FEATURES["s1"]}), encoder="uni")
    imported(tmp_path / "p", write_clam(tmp_path / "b", {"s2": FEATURES["s2"]}), encoder="uni")
    assert {key[0] for key in rows_of(tmp_path / "p")} == {"s1", "s2"}
    with pytest.raises(FingerprintMismatch, match="imported:clam:uni there"):
        imported(tmp_path / "p", tmp_path / "a", encoder="virchow")


def test_a_table_says_where_an_unusable_id_stands(tmp_path: Path) -> None:
    file = write_table(tmp_path / "bags.csv", {"a/b": np.ones((1, 2))}, {"a/b": 1})
    refused(tmp_path / "p", file, file, "contains a slash")
