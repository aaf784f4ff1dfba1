"""The layout that CLAM reads, checked as CLAM reads it, and back into a store."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import torch

from featstore.errors import FeatstoreError, StoreError
from featstore.interop.clam_export import ExportReport, export_clam
from featstore.interop.project import export_project
from featstore.store import Slice, Store, StoreWriter
from heads.config import Config
from tests import helpers
from tests.command_line import listing
from tests.interop.builders import square
from tests.interop.projects import imported, rows_of
from tests.store.builders import make_slice, make_spec

CASES = [str(i) for i in range(1, 13)]
LABELS = {case: "benign" if int(case) % 2 else "high" for case in CASES}


def placed(case: str, stain: str, slice_id: str, count: int, angle: float = 0.0) -> Slice:
    """A slice whose patches are squares of 10 px in a row, turned about their first corner."""
    made = make_slice(case, stain, slice_id, list(range(3, 3 + count)))
    top_left = np.stack([np.arange(count) * 20 + 100, np.full(count, 50)], axis=1)
    corners = square(np.zeros((count, 2)), 10).reshape(count, 4, 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    geometry = (corners @ turn + top_left[:, None]).reshape(count, 8)
    return Slice(stain, slice_id, {**made.columns, "geometry": geometry})


def make_project(folder: Path, slices: dict[str, list[Slice]]) -> Path:
    writer = StoreWriter(folder / "store", make_spec(), {})
    for case, held in slices.items():
        writer.commit(case, held)
    return folder


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """Twelve cases of one slice, labelled."""
    cases = {case: [placed(case, "h&e", "match_1", 1 + int(case) % 3)] for case in CASES}
    helpers.write_labels(tmp_path, LABELS)
    return make_project(tmp_path, cases)


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Two cases of three slices of two stains."""
    keys = [("h&e", "match_1", 2), ("h&e", "match_2", 1), ("sox10", "match_1", 3)]
    return make_project(tmp_path, {case: [placed(case, *key) for key in keys] for case in ("1", "B")})


def exported(
    project: Path, by: str = "slice", settings: dict[str, Any] | None = None, labels: bool = True
) -> ExportReport:
    """Into ``clam`` below the project."""
    given: dict[str, Any] = {"labels": {"file": "labels.csv"}} if labels else {}
    config = Config.model_validate({**given, **(settings or {})})
    return export_project(config, project, project / "clam", by)


def read_as_clam(path: Path) -> pd.DataFrame:
    """As `return_splits` does: text ids, the index in the first column."""
    return pd.read_csv(path, dtype=str)


def test_every_bag_is_there_twice_in_float32_with_its_corners(single: Path) -> None:
    report = exported(single)
    store = Store.open(single / "store")
    assert (report.slides, report.patches) == (12, len(store.table()))
    for case in CASES:
        bag = store.bag(case)
        with h5py.File(single / "clam" / "h5_files" / f"{case}.h5") as file:
            assert set(file) == {"features", "coords"}
            assert file["features"].dtype == np.float32
            assert file["coords"].dtype == np.int32
            np.testing.assert_array_equal(file["features"][()], bag.features.astype(np.float32))
            wanted = [[100 + 20 * i, 50] for i in range(len(bag))]
            assert file["coords"][()].tolist() == wanted
        tensor = torch.load(single / "clam" / "pt_files" / f"{case}.pt", weights_only=True)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(tensor.numpy(), bag.features.astype(np.float32))


def test_the_tables_are_those_that_clam_reads(single: Path) -> None:
    report = exported(single, settings={"split": {"folds": 3}})
    assert (report.labelled, report.splits) == (12, 3)
    dataset = read_as_clam(single / "clam" / "dataset.csv")
    assert list(dataset.columns) == ["case_id", "slide_id", "label"]
    assert dict(zip(dataset["slide_id"], dataset["label"], strict=True)) == LABELS
    assert dataset["case_id"].tolist() == dataset["slide_id"].tolist()
    tested: list[str] = []
    for k in range(3):
        split = read_as_clam(single / "clam" / "splits" / f"splits_{k}.csv")
        assert list(split.columns[1:]) == ["train", "val", "test"]
        assert split.iloc[:, 0].tolist() == [str(i) for i in range(len(split))]
        parts = {name: split[name].dropna().tolist() for name in ("train", "val", "test")}
        assert sorted(chain(*parts.values())) == sorted(CASES)
        assert len(split) == max(map(len, parts.values()))  # shorter columns end in blanks
        assert split["test"].notna().tolist() == sorted(split["test"].notna(), reverse=True)
        tested += parts["test"]
        flags = pd.read_csv(
            single / "clam" / "splits" / f"splits_{k}_bool.csv", index_col=0, dtype={0: str}
        )
        flags.index = flags.index.astype(str)
        for name, slides in parts.items():
            assert flags.index[flags[name]].tolist() == slides
        counts = pd.read_csv(single / "clam" / "splits" / f"splits_{k}_descriptor.csv", index_col=0)
        for name, slides in parts.items():
            for label in ("benign", "high"):
                assert counts.loc[label, name] == sum(LABELS[slide] == label for slide in slides)
    assert sorted(tested) == sorted(CASES)


def test_splits_that_are_there_are_the_ones_exported(single: Path) -> None:
    from featstore.cohort.splits import Split, write_splits

    write_splits([Split(tuple(CASES[:5]), tuple(CASES[5:7]), tuple(CASES[7:]))], single / "splits")
    assert exported(single).splits == 1
    split = read_as_clam(single / "clam" / "splits" / "splits_0.csv")
    assert split["val"].dropna().tolist() == CASES[5:7]
    assert split["test"].dropna().tolist() == CASES[7:]


@pytest.mark.parametrize("which", ["single", "several"])
def test_an_export_reads_back_equal(which: str, request: pytest.FixtureRequest) -> None:
    project: Path = request.getfixturevalue(which)
    exported(project, labels=which == "single")
    back = project / "back"
    table = str(project / "clam" / "bags.csv")
    imported(back, project / "clam", map=table, patch_size=10.0, precision="float16")
    found, wanted = rows_of(back), rows_of(project)
    assert list(found) == list(wanted)
    for key, features in wanted.items():
        assert found[key].dtype == features.dtype
        np.testing.assert_array_equal(found[key], features)
    columns = ["case_id", "stain", "slice_id", *(f"{axis}{i}" for i in range(4) for axis in "xy")]
    here, there = (Store.open(folder / "store").table()[columns] for folder in (back, project))
    pd.testing.assert_frame_equal(here, there)


def test_slices_of_a_case_become_slides_that_go_together(several: Path) -> None:
    helpers.write_labels(several, {"1": "x"})
    report = exported(several)
    names = [
        f"{case}_{rest}" for case in ("1", "B") for rest in ("match_1_h&e", "match_2_h&e", "match_1_sox10")
    ]
    found = read_as_clam(several / "clam" / "bags.csv")
    assert found["slide_id"].tolist() == names
    assert found["case_id"].tolist() == ["1"] * 3 + ["B"] * 3
    assert found["stain"].tolist() == ["h&e", "h&e", "sox10"] * 2
    assert found["slice"].tolist() == ["match_1", "match_2", "match_1"] * 2
    assert sorted(path.stem for path in (several / "clam" / "h5_files").iterdir()) == sorted(names)
    assert (report.slides, report.labelled, report.splits) == (6, 3, 0)
    assert "3 bags have no label: not in dataset.csv" in report.notes
    assert any("no splits were written" in note for note in report.notes)
    assert read_as_clam(several / "clam" / "dataset.csv")["slide_id"].tolist() == names[:3]


def test_by_case_all_patches_of_a_case_are_one_slide(several: Path) -> None:
    report = exported(several, "case", labels=False)
    assert (report.slides, report.patches) == (2, 12)
    store = Store.open(several / "store")
    for case in ("1", "B"):
        tensor = torch.load(several / "clam" / "pt_files" / f"{case}.pt", weights_only=True)
        np.testing.assert_array_equal(tensor.numpy(), store.bag(case).features.astype(np.float32))
    imported(several / "back", several / "clam", map=str(several / "clam" / "bags.csv"))
    assert set(rows_of(several / "back")) == {("1", "h&e", "1"), ("B", "h&e", "B")}


def test_without_labels_the_features_alone_are_written_and_that_is_told(single: Path) -> None:
    report = exported(single, labels=False)
    assert (report.slides, report.labelled, report.splits) == (12, 0, 0)
    assert any("no labels are named" in note for note in report.notes)
    assert read_as_clam(single / "clam" / "dataset.csv").empty
    assert list((single / "clam" / "splits").iterdir()) == []


def test_excluded_cases_are_left_out(single: Path) -> None:
    report = exported(single, settings={"exclude": ["03"]})
    assert (report.slides, report.labelled) == (11, 11)
    assert not (single / "clam" / "h5_files" / "3.h5").exists()
    assert "3" not in read_as_clam(single / "clam" / "bags.csv")["slide_id"].tolist()


@pytest.mark.parametrize("turned", [0.3, -0.3, 2.0])
def test_of_rotated_patches_the_upright_box_is_kept(tmp_path: Path, turned: float) -> None:
    item = placed("1", "h&e", "a", 2, turned)
    make_project(tmp_path, {"1": [item]})
    report = exported(tmp_path, labels=False)
    corners = item.columns["geometry"].reshape(2, 4, 2)
    with h5py.File(tmp_path / "clam" / "h5_files" / "1.h5") as file:
        assert file["coords"][()].tolist() == np.round(corners.min(axis=1)).astype(int).tolist()
    assert any("rotated" in note for note in report.notes)
    assert any("rounded" in note for note in report.notes)


@pytest.mark.parametrize("known", [0, 1])
def test_a_slice_without_all_positions_has_no_coords(tmp_path: Path, known: int) -> None:
    item = placed("1", "h&e", "a", 2)
    item.columns["geometry"][known:] = np.nan
    make_project(tmp_path, {"1": [item], "2": [placed("2", "h&e", "a", 1)]})
    report = exported(tmp_path, labels=False)
    with h5py.File(tmp_path / "clam" / "h5_files" / "1.h5") as file:
        assert set(file) == {"features"}
    with h5py.File(tmp_path / "clam" / "h5_files" / "2.h5") as file:
        assert set(file) == {"features", "coords"}
    assert any("no coords" in note for note in report.notes)


def test_two_bags_of_one_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    cases = {
        "a": [placed("a", "h&e", "b_c", 1), placed("a", "h&e", "x", 1)],
        "a_b": [placed("a_b", "h&e", "c", 1)],
    }
    make_project(tmp_path, cases)
    with pytest.raises(FeatstoreError, match="slice b_c of case a and slice c of case a_b") as error:
        exported(tmp_path, labels=False)
    assert "--by case" in error.value.fix
    assert not (tmp_path / "clam").exists()


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    make_project(tmp_path, {case: [placed(case, "h&e", "x", 1)] for case in ("a", "A")})
    with pytest.raises(FeatstoreError, match="upper and lower case"):
        exported(tmp_path, labels=False)


@pytest.mark.parametrize("kind", ["a file in it", "a file"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(single: Path, kind: str) -> None:
    if kind == "a file":
        (single / "clam").write_text("mine")
    else:
        (single / "clam").mkdir()
        (single / "clam" / "mine").touch()
    before = listing(single)
    with pytest.raises(FeatstoreError, match="not empty") as error:
        exported(single)
    assert error.value.where == str(single / "clam")
    assert listing(single) == before


def test_an_empty_folder_is_taken(single: Path) -> None:
    (single / "clam").mkdir()
    assert exported(single).slides == 12


@pytest.mark.parametrize(
    ("case", "says"), [("../../escaped", "contains"), ("a" * 190 + "é" * 10, "longer than")]
)
def test_a_case_whose_id_is_no_name_of_a_file_is_refused(tmp_path: Path, case: str, says: str) -> None:
    writer = StoreWriter(tmp_path / "store", make_spec(), {})
    for slice_id in ("s1", "s" * 60):
        writer.commit(case, [make_slice(case, "h&e", slice_id, [1, 2])])
    inside = tmp_path / "deep" / "deeper"
    with pytest.raises(StoreError, match=says):
        export_clam(Store.open(writer.path), inside / "out", "slice", {}, [])
    assert not (tmp_path / "deep").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
