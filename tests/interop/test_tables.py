"""Tables of bags, and folders with one vector a patch: numbers, order, names and labels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.store import Store
from tests.interop.builders import DIM, features_of, save_pt, table_rows, write_table, write_vectors
from tests.interop.projects import alone, assert_same, imported, refused, rows_of, table_of

# Tables of bags

LABELS = {"s1": 0, "s2": 1, "s10": 1}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_csv_of_bags_keeps_the_order_of_each_bags_rows(tmp_path: Path, bom: str) -> None:
    features = features_of()
    file = write_table(tmp_path / "bags.csv", features, LABELS)
    file.write_text(bom + file.read_text())
    report = imported(tmp_path / "p", file)
    assert (report.format, report.labels) == ("table", {"s1": "0", "s2": "1", "s10": "1"})
    assert_same(rows_of(tmp_path / "p"), alone(features), "float32")
    assert set(table_of(tmp_path / "p")["path"]) == {"bags.csv"}
    assert "x0" not in table_of(tmp_path / "p")


def test_numeric_ids_of_a_table_stay_text_until_they_are_normalised(tmp_path: Path) -> None:
    features = {"038": np.ones((1, 2), np.float32), "1e3": np.zeros((1, 2), np.float32)}
    write_table(tmp_path / "bags.csv", features, {"038": "1.0", "1e3": "x"})
    report = imported(tmp_path / "p", tmp_path / "bags.csv")
    assert set(rows_of(tmp_path / "p")) == {("38", "h&e", "038"), ("1e3", "h&e", "1e3")}
    assert report.labels == {"38": "1", "1e3": "x"}


def test_columns_of_a_table_go_by_their_numbers_and_others_are_told(tmp_path: Path) -> None:
    columns = {"note": ["a"], "f10": [10]} | {f"f{i}": [i] for i in range(10)} | {"bag_id": ["b"]}
    pd.DataFrame(columns).to_csv(tmp_path / "bags.csv", index=False)
    report = imported(tmp_path / "p", tmp_path / "bags.csv")
    assert rows_of(tmp_path / "p")["b", "h&e", "b"].tolist() == [list(range(11))]
    assert "1 columns are not read: note" in report.notes
    assert report.labels == {}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_has_one_array_a_bag(tmp_path: Path, save: Any) -> None:
    features = features_of(dtype="float16")
    save(tmp_path / "bags.npz", **features)
    imported(tmp_path / "p", tmp_path / "bags.npz")
    assert_same(rows_of(tmp_path / "p"), alone(features), "float16")


def test_a_parquet_of_bags(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    features = features_of()
    pd.DataFrame(table_rows(features, LABELS)).to_parquet(tmp_path / "bags.parquet")
    report = imported(tmp_path / "p", tmp_path / "bags.parquet")
    assert_same(rows_of(tmp_path / "p"), alone(features), "float32")
    assert report.labels == {"s1": "0", "s2": "1", "s10": "1"}


def test_without_pyarrow_a_parquet_is_refused_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: object, **more: object) -> None:
        raise ImportError("Missing optional dependency 'pyarrow'")

    monkeypatch.setattr(pd, "read_parquet", missing)
    (tmp_path / "bags.parquet").write_bytes(b"PAR1")
    refused(tmp_path / "p", tmp_path / "bags.parquet", "bags.parquet", "pyarrow", "featstore[parquet]")


def test_a_table_is_hashed_once_not_once_a_bag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featstore.interop import source

    hashed = []
    real = source.file_sha256
    monkeypatch.setattr(source, "file_sha256", lambda path: hashed.append(path) or real(path))
    imported(tmp_path / "p", write_table(tmp_path / "bags.csv", features_of(), LABELS))
    assert len(hashed) == 1


# One vector a patch

KEYS = {("1", "h&e", "match_1"): 3, ("1", "h&e", "unmatched_2"): 2, ("038", "sox10", "match_1"): 12}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_vectors_named_like_patches_are_read_by_their_names(tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    features = {key: rng.normal(size=(n, DIM)).astype(dtype) for key, n in KEYS.items()}
    write_vectors(tmp_path / "in" / "deep", features)
    report = imported(tmp_path / "p", tmp_path / "in")
    assert (report.format, report.bags, report.patches) == ("vectors", 3, 17)
    wanted = {("38" if case == "038" else case, *rest): x for (case, *rest), x in features.items()}
    assert_same(rows_of(tmp_path / "p"), wanted, dtype)
    for row in Store.open(tmp_path / "p" / "store").sources().itertuples():
        file = tmp_path / "in" / row.path
        assert (row.size, row.mtime_ns) == (file.stat().st_size, file.stat().st_mtime_ns)
        assert row.sha256 == hashlib.sha256(file.read_bytes()).digest()
    table = table_of(tmp_path / "p", "38")
    assert table["patch"].tolist() == list(range(1, 13))  # patch2 before patch10
    assert table["path"].tolist() == [f"deep/case_038_match_1_sox10_patch{i}.pt" for i in range(1, 13)]
    assert "x0" not in table


def test_vectors_may_have_names_of_any_pattern_and_positions(tmp_path: Path) -> None:
    save_pt(tmp_path / "in" / "A-3-HE-7-100-200.pt", np.arange(3, dtype=np.float32))
    pattern = r"(?P<case>\w+)-(?P<slice>\w+)-(?P<stain>\w+)-(?P<patch>\d+)-(?P<x>\d+)-(?P<y>\d+)\.pt"
    settings = {"patches": {"pattern": pattern}}
    imported(tmp_path / "p", tmp_path / "in", settings, source_format="vectors")
    assert_same(rows_of(tmp_path / "p"), {("A", "h&e", "3"): np.array([[0, 1, 2]])}, "float32")
    row = table_of(tmp_path / "p").iloc[0]
    assert (row["patch"], row["x0"], row["y0"]) == (7, 100, 200)


@pytest.mark.parametrize(("precision", "stored"), [("float16", "float16"), ("float32", "float32")])
def test_vectors_of_two_dtypes_must_be_told_what_to_become(
    tmp_path: Path, precision: str, stored: str
) -> None:
    exact = np.array([[1.0, 2.0], [3.0, 1.0001]], np.float32)
    write_vectors(tmp_path / "in", {("1", "h&e", "a"): exact})
    save_pt(tmp_path / "in" / "case_1_a_h&e_patch1.pt", exact[0].astype(np.float16))
    refused(tmp_path / "p", tmp_path / "in", "case_1_a_h&e_patch2.pt", "float32 here", "--precision")
    imported(tmp_path / "p", tmp_path / "in", precision=precision)
    assert_same(rows_of(tmp_path / "p"), {("1", "h&e", "a"): exact}, stored)
