"""`featstore drift`: what it says, writes and refuses, in a project of two small stores."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.cohort.splits import Split, save_split
from featstore.store import Slice, Store, StoreWriter
from heads.drift_heads import restricted
from heads.evaluation.drift import compare_stores
from tests import helpers
from tests.command_line import answer, featstore, listing, refused, succeeded
from tests.inspect.projects import drawing_nothing
from tests.store.builders import make_slice, make_spec

DIM, CASES = 8, 20
SETTINGS: dict[str, Any] = {
    "patches": {"folder": "patches"},
    "labels": {"file": "labels.csv"},
    "classes": {"benign": ["1"], "high_grade": ["3"]},
    "head": {"embed_dim": 8, "attention_hidden": 4},
    "train": {"epochs": 3, "device": "cpu", "lr": 0.01, "amp": "off"},
    "runs": {"resamples": 50},
}
PICTURES = ["measures.png", "cosine_by_stain.png", "cosine_by_case.png", "pairs.png", "norms.png"]
FILES = ["drift.txt", "groups.csv", "patches.csv", *PICTURES, "drift.json"]


def fill(path: Path, signal: float, seed: int, dim: int = DIM, cases: int = CASES) -> None:
    """A store in which every second case is shifted by `signal`."""
    writer = StoreWriter(path, make_spec(dim=dim, weights_sha256=str(seed) * 64), {"test": True})
    for case in range(1, cases + 1):
        slices = []
        for stain in ("h&e", "sox10"):
            rng = np.random.default_rng([case, len(stain)])
            features = 5 + rng.normal(0, 1, (6, 12))[:, :dim] + signal * (case % 2)
            features += np.random.default_rng([seed, case]).normal(0, 0.3, features.shape)
            like = make_slice(str(case), stain, "match_1", list(range(1, 7)))
            slices.append(
                Slice(stain, "match_1", {**like.columns, "features": features.astype(np.float16)})
            )
        writer.commit(str(case), slices)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose second store knows more about the classes; one that is wider, one of fewer cases."""
    project = tmp_path_factory.mktemp("drift") / "project"
    project.mkdir()
    fill(project / "store", 0.1, 1)
    fill(project / "tuned", 1.5, 2)
    fill(project / "wide", 0.1, 3, dim=12)
    fill(project / "fewer", 0.1, 4, cases=CASES - 2)
    helpers.write_labels(project, {str(case): "13"[case % 2] for case in range(1, CASES + 1)})
    (project / "featstore.yaml").write_text(json.dumps(SETTINGS))
    return project


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr("heads.drift.plot_drift", lambda *_: [])


@pytest.fixture(scope="module")
def compared(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A project in which the two stores were compared, and what was said."""
    project = Path(shutil.copytree(made, tmp_path_factory.mktemp("compared") / "project"))
    before = set(listing(project))
    found = answer(
        project, "drift", "store", "tuned", "--seeds", "2", "--neighbours", "3", "--sample", "100"
    )
    new = set(listing(project)) - before
    assert all(name == "drift" or name.startswith("drift/") for name in new)
    return project, found


def test_the_answer_the_files_and_the_library_agree(compared: tuple[Path, dict[str, Any]]) -> None:
    project, found = compared
    folder = project / "drift" / "store_tuned"
    assert [Path(file) for file in found["files"]] == [folder / name for name in FILES]
    assert all((folder / name).stat().st_size for name in FILES)
    assert json.loads((folder / "drift.json").read_text()) == found
    labels = {str(case): ("benign", "high_grade")[case % 2] for case in range(1, CASES + 1)}
    wanted = compare_stores(
        Store.open(project / "store"), Store.open(project / "tuned"), 3, 100, seed=42, labels=labels
    )
    assert found["patches"] == 12 * CASES == len(wanted.pairing)
    assert found["cka"] == [vars(each) for each in wanted.alignment]
    assert found["neighbours"] == {name: vars(each) for name, each in wanted.neighbours.items()}
    assert found["medians"] == {name: wanted.median(name) for name in wanted.patches}
    assert found["variance"]["classes"] == {
        name: wanted.variance[i]["classes"] for i, name in enumerate("ab")
    }
    assert found["variance"]["classes"]["b"] > found["variance"]["classes"]["a"]
    table = pd.read_csv(folder / "patches.csv", dtype={"case_id": str})
    whole = pd.concat(wanted.tables(), ignore_index=True)
    assert table.columns.tolist() == whole.columns.tolist()
    assert table["path"].tolist() == whole["path"].tolist()
    np.testing.assert_allclose(table["cosine_centred"], whole["cosine_centred"], rtol=1e-5)
    groups = pd.read_csv(folder / "groups.csv", dtype=str, keep_default_na=False)
    assert len(groups) == 2 + 2 + CASES + 2 * CASES == len(found["groups"])
    assert any(line.startswith("weights_sha256") for line in found["differences"])


def test_the_heads_are_those_that_train_head_trains(compared: tuple[Path, dict[str, Any]]) -> None:
    project, found = compared
    down = found["downstream"]
    assert down["seeds"] == [42, 43]
    with drawing_nothing():
        for letter, store in (("a", "store"), ("b", "tuned")):
            for i, seed in enumerate(down["seeds"]):
                run = answer(project, "train-head", "--store-path", store, "--train-seed", seed)["run"]
                results = json.loads((Path(run) / "results.json").read_text())
                metrics = json.loads((Path(run) / "metrics.json").read_text())
                assert down[letter]["val_loss"][i] == pytest.approx(results["train"]["best_val_loss"])
                assert down[letter]["test_auc"][i] == pytest.approx(metrics["test"]["auc"]["value"])
    auc = down["metrics"]["auc"]
    assert auc["a"] == pytest.approx(np.mean(down["a"]["test_auc"]))
    assert auc["difference"]["value"] == pytest.approx(auc["b"] - auc["a"])
    assert down["b"]["mean_val_loss"] < down["a"]["mean_val_loss"]


@pytest.mark.usefixtures("undrawn")
def test_what_is_said_names_stores_numbers_and_meaning(project: Path) -> None:
    said = succeeded(project, "drift", "store", "tuned", "--out", "here").output
    assert (project / "here" / "drift.txt").read_text() in said
    for part in (
        "A  store: test, weights 111111111111, 8 features",
        "240 patches of 20 cases are in both",
        "stain sox10",
        "class benign",
        "linear CKA",
        "hierarchical trained on A and on B, 12 train, 4 val, 4 test cases, seed 42",
        "test AUC",
        "None of this says by itself which embeddings are better.",
    ):
        assert part in said
    assert not (project / "drift").exists()


@pytest.mark.usefixtures("undrawn")
def test_without_labels_or_on_request_no_head_is_trained(project: Path) -> None:
    found = answer(project, "drift", "store", "tuned", "--no-downstream")
    assert found["downstream"] is None
    assert found["notes"] == []
    (project / "labels.csv").unlink()
    found = answer(project, "drift", "store", "tuned")
    assert found["downstream"] is None
    assert any("nothing by class" in note for note in found["notes"])
    assert "no head was trained: it needs labels" in found["notes"]
    assert not [row for row in found["groups"] if row["class"]]
    assert "classes" not in found["variance"]


@pytest.mark.usefixtures("undrawn")
def test_a_split_that_cannot_be_used_is_a_note(project: Path) -> None:
    cases = [str(case) for case in range(1, CASES + 1)]
    save_split(project / "split.npz", Split(tuple(cases[:12]), tuple(cases[12:16]), tuple(cases[16:])))
    found = answer(project, "drift", "store", "tuned", "--load-splits", project / "split.npz")
    assert found["downstream"]["cases"] == {"train": 12, "val": 4, "test": 4}
    found = answer(project, "drift", "store", "fewer", "--load-splits", project / "split.npz")
    assert found["downstream"] is None
    assert any("no head was compared: the splits cannot be used" in note for note in found["notes"])


@pytest.mark.usefixtures("undrawn")
def test_cases_of_one_store_alone_take_no_part(project: Path) -> None:
    found = answer(project, "drift", "store", "fewer")
    assert sum(found["downstream"]["cases"].values()) == CASES - 2
    assert found["a"]["only_here"]["cases"] == {"19": 12, "20": 12}
    assert found["notes"] == []
    store = restricted(Store.open(project / "store"), ["3", "10"])
    assert store.cases() == ["3", "10"]
    np.testing.assert_array_equal(store.features("10"), Store.open(project / "store").features("10"))


def test_stores_of_different_dims_are_compared_by_what_is_defined(project: Path) -> None:
    folder = project / "drift" / "store_wide"
    folder.mkdir(parents=True)
    (folder / "cosine_by_case.png").touch()  # of an earlier comparison
    found = answer(project, "drift", "store", "wide")
    assert found["medians"]["cosine"] is None
    assert found["cka"][0]["linear"] > 0.5
    assert found["downstream"]["a"]["test_auc"] != [None]
    names = [Path(file).name for file in found["files"]]
    assert names == [name for name in FILES if not name.startswith("cosine")]
    assert not (folder / "cosine_by_case.png").exists()
    assert pd.read_csv(folder / "patches.csv")["cosine"].isna().all()


@pytest.mark.usefixtures("undrawn")
def test_a_store_beside_itself_is_allowed_and_told(project: Path) -> None:
    found = answer(project, "drift", "store", project / "store", "--no-downstream")
    assert found["same_store"]
    assert found["medians"]["cosine_centred"] == pytest.approx(1)
    assert found["neighbours"]["all"]["overlap"] == 1
    assert "the same store" in found["reading"]


@pytest.mark.usefixtures("undrawn")
def test_stores_of_one_name_get_a_folder_with_their_parents(project: Path) -> None:
    (project / "old").mkdir()
    (project / "new").mkdir()
    os.rename(project / "store", project / "old" / "store")
    os.rename(project / "tuned", project / "new" / "store")
    found = answer(project, "drift", "old/store", "new/store", "--no-downstream")
    assert Path(found["files"][0]).parent == project / "drift" / "old-store_new-store"


@pytest.mark.usefixtures("undrawn")
def test_paths_are_those_of_the_folder_in_which_it_is_typed(project: Path) -> None:
    inside = project / "sub"
    inside.mkdir()
    found = answer(inside, "drift", "../store", "../tuned", "--no-downstream", "--out", "mine")
    assert (inside / "mine" / "drift.json").is_file()
    assert found["patches"] == 240


def test_the_result_is_gone_while_its_files_are_written_anew(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(project, "drift", "store", "tuned", "--no-downstream")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heads.drift.plot_drift", fail)
    result = featstore(project, "drift", "store", "tuned", "--no-downstream")
    assert result.exit_code == 2
    assert "No space left" in result.stderr
    assert not (project / "drift" / "store_tuned" / "drift.json").exists()


def test_what_cannot_be_compared_is_refused(project: Path) -> None:
    refused(project, "drift", "store", "nothing", says=("nothing",))
    (project / "empty").mkdir()
    refused(project, "drift", "empty", "store", says=("empty",))
    refused(project, "drift", "store", "tuned", "--out", "tuned/here", says=("written into a store",))
    refused(project, "drift", "store", "tuned", "--model", "nosuch", says=("no head 'nosuch'",))
    refused(project, "drift", "store", "tuned", "--neighbours", "0", to_do=False)
    refused(project, "drift", "store", "tuned", "--sample", "1", says=("sample is 1",))
    refused(project, "drift", "store", "tuned", "--device", "cuda:99", says=("train.device",))
    other = make_spec(dim=DIM)
    StoreWriter(project / "other", other, {}).commit(
        "99",
        [
            Slice(
                "h&e",
                "s",
                {**make_slice("99", "h&e", "s", [1]).columns, "features": np.ones((1, DIM), np.float16)},
            )
        ],
    )
    refused(project, "drift", "store", "other", says=("no patch in common",))


def test_a_damaged_part_is_told(project: Path) -> None:
    (part, *_) = Store.open(project / "tuned").folder("10").glob("*.h5")
    part.unlink()
    result = featstore(project, "drift", "store", "tuned")
    assert result.exit_code == 1
    assert "10" in result.stderr
    assert not (project / "drift").exists()
