"""`featstore similar`: what it finds is what it shows, for patches of the store and for other PNGs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featstore.store import Store
from tests.command_line import answer, refused
from tests.inspect.projects import pixels_of, project_with, tiles_of

PATCH = "case_7_match_1_sox10_patch10.png"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project_with(tmp_path_factory.mktemp("alike"), "abmil")


def test_the_gallery_shows_the_patch_and_then_the_nearest_with_their_numbers(project: Path) -> None:
    found = answer(project, "similar", PATCH, "--count", "4", "--other-cases")
    table = pd.read_csv(project / "similar" / "case_7_match_1_sox10_patch10.csv", dtype={"case_id": str})
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
    tiles = tiles_of(project / "similar" / "case_7_match_1_sox10_patch10.png")
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
    np.testing.assert_allclose(table.groupby("case_id")["effective_attention"].mean(), 1, rtol=1e-5)


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
