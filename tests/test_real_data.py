"""Real tissue from the folder to bags: 48 colon cases, and serial sections in six stains."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from featstore.store import Store
from tests import helpers
from tests.command_line import TINY, answer, succeeded, write_config

CASES = 48
PATCHES = 10_624
SUBSET = 6


def number(name: str) -> int:
    found = re.search(r"_patch(\d+)\.png$", name)
    assert found
    return int(found[1])


def crchisto_project(shared_data: Path, project: Path, patches: Path) -> Path:
    write_config(
        project,
        {
            "patches": {"folder": str(patches)},
            "labels": {
                "file": str(shared_data / "crchisto" / "labels.csv"),
                "case_column": "case_id",
                "class_column": "label",
            },
            "extract": {"batch_size": 16},
        },
    )
    return project


def assert_bags_are_the_folder(store: Store, folder: Path) -> None:
    """Every case's bag has its folder's files, by number."""
    table = store.table()
    counts = Counter(path.parent.name for path in folder.rglob("*.png"))
    # Ids are normalised, files are found as they are called.
    assert store.cases() == sorted((case.lstrip("0") for case in counts), key=int)
    for case in store.cases():
        bag = store.bag(case)
        rows = table.loc[bag.rows]
        assert len(bag) == counts[case.zfill(3)]
        assert bag.features.shape[0] == len(rows)
        names = rows["path"].tolist()
        assert names == sorted(names, key=number)
        assert rows["patch"].tolist() == bag.patches.tolist() == [number(name) for name in names]
        assert all((folder / name).is_file() for name in names)
        assert {Path(name).parent.name.lstrip("0") for name in names} == {case}
        assert np.isfinite(bag.features).all()


def test_crchisto_is_scanned_and_checked_in_full(shared_data: Path, tmp_path: Path) -> None:
    project = crchisto_project(shared_data, tmp_path, shared_data / "crchisto" / "patches")
    found = answer(project, "check", "--sample", "32")
    assert (found["cases"], found["patches"], list(found["stains"])) == (CASES, PATCHES, ["h&e"])
    with (shared_data / "crchisto" / "labels.csv").open() as file:
        labels = Counter(row["label"] for row in csv.DictReader(file))
    assert {name: entry["cases"] for name, entry in found["classes"].items()} == labels
    left = found["left_out"]
    assert (left["cases_without_label"], left["labels_without_patches"], left["unmapped"]) == ([], [], {})
    assert found["unparsed"]["count"] == 0
    assert found["normalized"]["case"]["001"] == "1"
    assert (found["sizes"]["min_side"], found["sizes"]["max_side"]) == (27, 27)
    assert found["colors"]["h&e"]["verdict"] != "swapped"
    assert any("below 32 px" in warning for warning in found["warnings"])
    assert "swapped" not in json.dumps(found["warnings"])


def test_crchisto_cases_become_bags_in_natural_order(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "crchisto" / "patches"
    chosen = sorted(source.iterdir(), key=lambda case: len(list(case.iterdir())))[:: CASES // SUBSET][
        :SUBSET
    ]
    for case in chosen:
        copy = tmp_path / "patches" / case.name
        copy.mkdir(parents=True)
        for file in case.iterdir():
            (copy / file.name).symlink_to(file)
    project = crchisto_project(shared_data, tmp_path, tmp_path / "patches")
    report = answer(project, "extract")
    assert report["committed"] == len(list((tmp_path / "patches").rglob("*.png"))) > 100
    assert (report["skipped"], report["converted"]) == ([], {})
    assert_bags_are_the_folder(Store.open(project / "store"), tmp_path / "patches")
    assert answer(project, "extract")["committed"] == 0


@pytest.mark.slow
def test_crchisto_goes_through_whole(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "crchisto" / "patches"
    project = crchisto_project(shared_data, tmp_path, source)
    assert answer(project, "extract")["committed"] == PATCHES
    store = Store.open(project / "store")
    assert len(store.cases()) == CASES
    assert_bags_are_the_folder(store, source)


def test_six_stains_of_three_cases_of_which_two_lack_most(shared_data: Path, tmp_path: Path) -> None:
    files = helpers.tile_multistain(shared_data / "multistain", tmp_path / "patches", stride=170)
    write_config(tmp_path, {"stains": helpers.MULTISTAIN_STAINS, "extract": TINY["extract"]})
    report = answer(tmp_path, "extract")
    assert report["committed"] == len(files)
    assert 100 < len(files) < 400
    store = Store.open(tmp_path / "store")
    assert store.cases() == ["kidney", "les3", "w35"]
    assert store.stains() == ["cc10", "cd31", "h&e", "ki67", "pancytokeratin", "prospc"]
    table = store.table()
    for case in store.cases():
        bag = store.bag(case)
        mine = [name for name in helpers.MULTISTAIN_FILES.values() if name[0] == case]
        assert list(bag.stains) == sorted(stain for _, stain in mine)
        assert bag.slice_sizes.sum() == len(bag)
        rows = table.loc[bag.rows]
        for stain, found in rows.groupby("stain", observed=True)["path"]:
            names = [f.name for f in files if f.name.startswith(f"case_{case}_match_1_{stain}_")]
            assert found.tolist() == sorted(names, key=number)
    found = answer(tmp_path, "check")
    everything = set(store.stains())
    assert {case: set(stains) for case, stains in found["missing_stains"].items()} == {
        "kidney": everything - {"h&e", "pancytokeratin"},
        "les3": {"pancytokeratin"},
        "w35": everything - {"h&e", "prospc"},
    }
    shown = succeeded(tmp_path, "check").stdout
    assert re.search(r"cases that lack a stain: .*kidney", shown)
    assert answer(tmp_path, "info")["stains"]["pancytokeratin"]["cases"] == 1
