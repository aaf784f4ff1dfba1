"""`featstore similar`: what it finds is what it shows, for patches of the store and for other PNGs."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featstore.store import Store
from tests.command_line import answer, make_project, refused, succeeded
from tests.inspect.projects import pixels_of, project_with, tiles_of

PATCH = "case_7_match_1_sox10_patch10.png"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project_with(tmp_path_factory.mktemp("alike"), "abmil")


def test_the_gallery_shows_the_patch_and_then_the_nearest_with_their_numbers(project: Path) -> None:
    found = answer(project, "similar", PATCH, "--count", "4", "--other-cases")
    table = pd.read_csv(
        project / "similar" / "nearest_case_7_match_1_sox10_patch10.csv", dtype={"case_id": str}
    )
    assert table["path"].tolist() == [row["path"] for row in found["patches"]]
    assert "7" not in set(table["case_id"])
    store = Store.open(project / "store")
    features = np.concatenate([store.features(case) for case in store.cases()]).astype(np.float64)
    features -= features.mean(axis=0)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    whole = store.table().reset_index(drop=True)
    cosine = features @ features[whole.index[whole["path"] == PATCH][0]]
    others = np.where(whole["case_id"] == "7", -2, cosine)
    assert table["path"].tolist() == whole["path"].iloc[np.argsort(-others, kind="stable")[:4]].tolist()
    tiles = tiles_of(project / "similar" / "nearest_case_7_match_1_sox10_patch10.png")
    assert [tile["path"] for tile, _ in tiles] == [PATCH, *table["path"]]
    for tile, pixels in tiles:
        np.testing.assert_array_equal(pixels, pixels_of(project, tile["path"]))
    assert [tile["values"]["similarity"] for tile, _ in tiles[1:]] == pytest.approx(table["similarity"])


def test_a_png_from_elsewhere_goes_through_the_stores_own_backbone(project: Path, tmp_path: Path) -> None:
    shutil.copy(project / "patches" / PATCH, tmp_path / "unknown.png")
    found = answer(project, "similar", tmp_path / "unknown.png", "--count", "2")
    assert found["patches"][0]["path"] == PATCH  # the same pixels: nearest to itself
    assert found["patches"][0]["similarity"] == pytest.approx(1, abs=1e-3)
    inside = answer(project, "similar", project / "patches" / PATCH, "--count", "2")
    assert PATCH not in [row["path"] for row in inside["patches"]]


def test_the_map_has_every_patch_and_a_picture_a_colour(project: Path) -> None:
    found = answer(project, "similar", "--map")
    assert found["patches"] == 660
    assert [Path(file).name for file in found["files"]] == [
        "map.csv", "map_by_stain.png", "map_by_class.png", "map_by_attention.png"
    ]  # fmt: skip
    table = pd.read_csv(project / "similar" / "map.csv", dtype={"case_id": str})
    np.testing.assert_allclose(table.groupby("case_id")["times_equal"].mean(), 1, rtol=1e-5)
    assert "effective_attention" not in table
    assert found["notes"] == []


def times_equal(project: Path) -> pd.Series:
    table = pd.read_csv(project / "similar" / "map.csv", dtype={"case_id": str})
    return table.set_index("path")["times_equal"]


def test_on_the_map_of_another_store_attention_stays_with_its_patches(
    project: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy"))
    answer(copy, "similar", "--map")
    before = times_equal(copy)
    dropped = [*(copy / "patches").glob("case_1_*"), copy / "patches" / PATCH]
    for file in dropped:
        file.unlink()
    succeeded(copy, "extract", "--store-path", "fewer")
    notes = answer(copy, "similar", "--map", "--store-path", "fewer")["notes"]
    after = times_equal(copy)
    assert sorted(after.index) == sorted(set(before.index) - {file.name for file in dropped})
    assert after.to_dict() == before[after.index].to_dict()
    assert f"the attention is of a run on another store: {copy / 'store'}" in notes
    assert "45 of the run's 660 patches are not on the map by attention" in notes


def test_a_patch_in_a_linked_folder_is_the_stores_and_one_not_extracted_is_embedded(tmp_path: Path) -> None:
    project, disk = make_project(tmp_path / "p", cases=2, patches=3), tmp_path / "disk"
    (project / "patches").rename(disk)
    (project / "patches").mkdir()
    (project / "patches" / "linked").symlink_to(disk)
    succeeded(project, "extract")
    named = "case_1_match_1_h&e_patch2.png"
    for query in (f"patches/linked/{named}", project / "patches" / "linked" / named):
        found = answer(project, "similar", query, "--count", "6", "--other-cases")["patches"]
        assert [row["case_id"] for row in found] == ["2"] * 3
    shutil.copy(disk / named, project / "patches" / named)  # of the same name, but no patch of the store
    found = answer(project, "similar", f"patches/{named}", "--count", "1")
    assert found["patches"][0]["path"] == f"linked/{named}"
    assert found["patches"][0]["similarity"] == pytest.approx(1, abs=1e-3)


def test_a_patch_of_a_project_that_a_link_leads_to_is_the_stores(project: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project)
    found = answer(project, "similar", tmp_path / "link" / "patches" / PATCH, "--other-cases")["patches"]
    assert "7" not in [row["case_id"] for row in found]


def test_different_queries_have_different_files(project: Path, tmp_path: Path) -> None:
    written: list[str] = []
    for folder, name in (("a", "map.png"), ("b", "map.png"), ("a", PATCH)):
        (tmp_path / folder).mkdir(exist_ok=True)
        shutil.copy(project / "patches" / PATCH, tmp_path / folder / name)
        written += answer(project, "similar", tmp_path / folder / name, "--count", "1")["files"]
    written += answer(project, "similar", PATCH, "--count", "1")["files"]
    written += answer(project, "similar", "--map")["files"]
    assert len(written) == len(set(written)) == 4 * 2 + 4
    first = hashlib.sha256(str(tmp_path / "a" / "map.png").encode()).hexdigest()[:8]
    assert Path(written[0]).name == f"nearest_map~{first}.csv"


def test_of_a_patch_and_a_file_of_one_name_the_patch_is_taken_and_that_is_told(project: Path) -> None:
    file = project / PATCH
    shutil.copy(project / "patches" / "case_8_match_1_sox10_patch1.png", file)
    try:
        patch = answer(project, "similar", PATCH, "--count", "1", "--other-cases")
        assert any(f"for the file, ./{PATCH}" in note for note in patch["notes"])
        other = answer(project, "similar", f"./{PATCH}", "--count", "1")
    finally:
        file.unlink()
    assert other["patches"][0]["path"] == "case_8_match_1_sox10_patch1.png"
    assert other["notes"] == []


def test_a_map_without_runs_or_labels_says_what_it_lacks(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "copy", ignore=shutil.ignore_patterns("runs")))
    (copy / "labels.csv").unlink()
    found = answer(copy, "similar", "--map")
    assert [Path(file).name for file in found["files"]] == ["map.csv", "map_by_stain.png"]
    assert any("no map by class" in note for note in found["notes"])
    assert any("no map by attention" in note for note in found["notes"])


def test_what_cannot_be_looked_for_is_refused(project: Path, tmp_path: Path) -> None:
    refused(project, "similar", says=("no patch is named",), to_do=False)
    refused(project, "similar", PATCH, "--map", says=("at once",), to_do=False)
    refused(project, "similar", "nothing.png", says=("nothing.png",))
    refused(project, "similar", PATCH, "--stain", "melan", says=("no stain 'melan'",))
    refused(project, "similar", PATCH, "--metric", "manhattan", says=("'manhattan'",))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    refused(project, "similar", tmp_path / "broken.png", says=("broken.png",))
