"""Whole tunings: what they leave behind, gone on with to the bit, nested, failing, finished twice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featstore.cohort.splits import read_split
from featstore.resident import CaseBags
from featstore.strict_yaml import read_file
from heads.config import Config, resolved
from heads.training.loop import Training
from heads.tuning.project import tune_project
from heads.tuning.report import TuneReport
from heads.tuning.trial import Trainings
from tests.command_line import succeeded
from tests.heads.planted import CASES, LABELS, make_store
from tests.tuning.projects import adopted, config_of, make_project, trials_of, tune, without_pictures


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch.setattr)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuneReport]:
    """A project with one finished tuning, `runs/tune_a`; not to be changed."""
    folder = make_project(tmp_path_factory.mktemp("whole") / "project")
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch.setattr)
        return folder, tune(folder)


def test_what_a_tuning_leaves_behind(whole: tuple[Path, TuneReport]) -> None:
    folder, report = whole
    path, trials = folder / "runs" / "tune_a", trials_of(folder)
    assert list(trials["number"]) == list(range(7))
    assert set(trials["state"]) == {"finished", "pruned"}
    assert trials["value"].notna().all()
    done = trials[trials["state"] == "finished"]
    best = done.loc[done["value"].idxmin()]
    assert best["number"] == report.outer[0].best
    said = json.loads((path / "tuning.json").read_text())
    assert said["outer"][0]["best"]["settings"]["train.lr"] == best["train.lr"]
    assert said["looks_at_validation_cases"] == trials["inner_epochs"].sum()
    assert said["looks_at_test_cases"] == 1
    assert said["finished"] is True
    text = (path / "tuning.txt").read_text()
    for part in (
        f"best: trial {best['number']}, val_loss {best['value']:.4f}",
        "7 trials:",
        f"looks at validation cases to choose: {trials['inner_epochs'].sum()}",
        "looks at test cases: 1",
        "the luckiest of many",
        "test, all: 4 cases",
        "train-head --config",
    ):
        assert part in text, part
    assert report.exit_code == 0
    assert not (path / "trials").exists()
    assert (path / "best.yaml").read_bytes() == (path / "outer_0" / "best.yaml").read_bytes()


def test_the_epochs_that_pruning_saved_are_counted(whole: tuple[Path, TuneReport]) -> None:
    folder, report = whole
    trials, found = trials_of(folder), report.outer[0]
    pruned, done = (trials[trials["state"] == state] for state in ("pruned", "finished"))
    assert (pruned["epochs"] >= 2).all()  # the warm-up
    assert (pruned["number"] >= 3).all()  # the trials at the start
    usual = done["inner_epochs"].mean()
    assert found.saved == pytest.approx((usual - pruned["inner_epochs"]).clip(lower=0).sum())
    assert found.saved > 0


def test_the_winner_can_be_had_again_by_its_file(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", tune={"trials": 3})
    # What flags said is in the file too: without them, train-head has but featstore.yaml and the file.
    tune(folder, train={"epochs": 4, "label_smoothing": 0.1, "batch_size": 2}, head={"embed_dim": 10})
    best = folder / "runs" / "tune_a" / "best.yaml"
    succeeded(folder, "train-head", "--config", best, "--runs-path", folder / "again")
    (again,) = (folder / "again").iterdir()
    own = folder / "runs" / "tune_a" / "outer_0" / "final_seed_42"
    for name in ("predictions.csv", "metrics.json"):
        assert (again / name).read_bytes() == (own / name).read_bytes()
    mine, theirs = (pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (again, own))
    pd.testing.assert_frame_equal(mine, theirs, check_exact=True)
    weights = [(run / "checkpoints" / "best.safetensors").read_bytes() for run in (again, own)]
    assert weights[0] == weights[1]


def test_run_again_it_says_what_was_found_and_changes_nothing(
    whole: tuple[Path, TuneReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, report = whole
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(Training, "run", None)
    said: list[str] = []
    again = tune(folder, "a", said.append, tune={"trials": 99})
    assert again.to_text() == report.to_text()
    assert any("nothing is done again" in line for line in said)
    assert any("not used: tune.trials" in line for line in said)
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}
    assert {p.name for p in after if after[p] != before.get(p)} == set()


def test_what_was_given_of_the_data_is_given_to_the_winner(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", tune={"trials": 1, "inner_folds": 1})
    make_store(folder / "other", offset=2.0)
    (folder / "mine.csv").write_text((folder / "labels.csv").read_text().replace("Case,", "Patient,"))
    given = (
        "--set",
        "store.path=other",
        "--set",
        "labels.file=mine.csv",
        "--set",
        "labels.case_column=Patient",
    )
    succeeded(folder, "tune", "--as", "a", *given, "--exclude", "[1, 2]", "--load-splits", "null")
    best = folder / "runs" / "tune_a" / "best.yaml"
    said = read_file(best)
    assert said["store"] == {"path": "other"}
    assert said["labels"] == {"file": "mine.csv", "case_column": "Patient"}
    assert said["exclude"] == ["1", "2"]
    assert said["classes"] == {"benign": ["0"], "malignant": ["1"]}
    assert set(said) == {"head", "train", "runs", "store", "labels", "exclude", "classes"}
    succeeded(folder, "train-head", "--config", best, "--runs-path", folder / "again")
    (again,) = (folder / "again").iterdir()
    own = folder / "runs" / "tune_a" / "outer_0" / "final_seed_42"
    assert (again / "predictions.csv").read_bytes() == (own / "predictions.csv").read_bytes()


def test_every_worker_but_the_first_is_as_the_first(whole: tuple[Path, TuneReport], tmp_path: Path) -> None:
    """Every setting given twice, the same: nothing is told, and what was not given then is not now."""
    space = {"train.lr": {"low": 1e-7, "high": 1e-2, "log": True}, "head.dropout": {"choices": [0.1, 0.3]}}
    folder = make_project(tmp_path / "project", tune={"trials": 1, "inner_folds": 1, "space": space})
    config = config_of(folder)
    first = tune_project(config, folder, "a")
    said: list[str] = []
    every = Config.model_validate(config.model_dump())  # `auto` too
    second = tune_project(every, folder, "a", said.append)
    assert not [line for line in said if "not used" in line]
    for section in ("head", "train"):
        sets = [getattr(each.tuning.config, section).model_fields_set for each in (first, second)]
        assert sets[0] == sets[1]
    assert "min_lr" not in second.tuning.config.train.model_fields_set
    # What a head has of itself, and the machine for `auto`, is no other setting when it is named.
    named = resolved(every).train.model_copy(update={"amp": "off"})
    tune_project(every.model_copy(update={"train": named}), folder, "a", said.append)
    assert not [line for line in said if "not used" in line]
    tune(folder, "a", said.append, train={"weight_decay": 0.5})
    assert any("not used: train.weight_decay" in line and "train.lr" not in line for line in said)


@pytest.mark.slow
def test_the_same_search_twice_is_the_same_to_the_bit(whole: tuple[Path, TuneReport]) -> None:
    folder, _ = whole
    tune(folder, "b")
    pd.testing.assert_frame_equal(trials_of(folder, "b"), trials_of(folder), check_exact=True)
    tune(folder, "c", tune={"search_seed": 1, "trials": 2})
    assert (trials_of(folder, "c")["train.lr"] != trials_of(folder)["train.lr"][:2]).all()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_interrupted_and_gone_on_with_it_equals_one_that_was_not(
    whole: tuple[Path, TuneReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder, advance = make_project(tmp_path / "project"), Trainings.advance
    calls, said = [0], list[str]()

    def interrupted(self: Trainings, epoch: int, received: Any) -> None:
        calls[0] += 1
        if calls[0] % 9 == 0:
            self.trainings[0].run(lambda training: os.kill(os.getpid(), number), received)
        advance(self, epoch, received)

    with monkeypatch.context() as patch:
        patch.setattr(Trainings, "advance", interrupted)
        first = tune(folder, "a", said.append)
    assert first.interrupted == number
    assert first.left
    assert "to go on: featstore tune --as a" in first.to_text()
    states = sorted(path.name for path in (folder / "runs" / "tune_a" / "trials").glob("*/*.pth"))
    assert states == ["fold_0.pth", "fold_1.pth"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainings, "advance", interrupted)
        while tune(folder, "a", said.append).interrupted is not None:
            pass
    pd.testing.assert_frame_equal(trials_of(folder), trials_of(whole[0]), check_exact=True)
    assert adopted(folder) > 1
    mine, theirs = (f / "runs" / "tune_a" / "outer_0" for f in (folder, whole[0]))
    assert (mine / "best.yaml").read_bytes() == (theirs / "best.yaml").read_bytes()
    found = [(run / "final_seed_42" / "predictions.csv").read_bytes() for run in (mine, theirs)]
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_damaged_state_is_told_and_the_trial_begins_anew(
    whole: tuple[Path, TuneReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, advance = make_project(tmp_path / "project"), Trainings.advance

    def interrupted(self: Trainings, epoch: int, received: Any) -> None:
        if epoch == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        advance(self, epoch, received)

    with monkeypatch.context() as patch:
        patch.setattr(Trainings, "advance", interrupted)
        tune(folder)
    for path in (folder / "runs" / "tune_a" / "trials").glob("*/*.pth"):
        path.write_bytes(path.read_bytes()[:100])
    said: list[str] = []
    tune(folder, "a", said.append)
    assert sum("begins anew" in line for line in said) == 2
    pd.testing.assert_frame_equal(trials_of(folder), trials_of(whole[0]), check_exact=True)


NESTED = {
    "split": {"folds": 3},
    "train": {"load_splits": None, "epochs": 3},
    "tune": {"trials": 3, "final_seeds": 2, "inner_folds": 2},
}


def test_nested_no_trial_ever_sees_a_test_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_project(tmp_path / "project", **NESTED)
    seen: dict[int, set[str]] = {}
    now: list[int] = []
    batch, init, winner = CaseBags.batch, Trainings.__init__, None

    def watch(self: CaseBags, bags: Any) -> Any:
        if now:
            seen.setdefault(now[0], set()).update(bag.case_id for bag in bags)
        return batch(self, bags)

    def begun(self: Trainings, config: Any, about: Any, bags: Any, folds: Any, objective: str) -> None:
        tested = set(CASES) - {case for split in folds for case in (*split.train, *split.val)}
        now[:] = [min(map(int, tested))]
        init(self, config, about, bags, folds, objective)

    def final(self: Any, task: Any) -> None:
        now.clear()
        winner(self, task)  # type: ignore[misc]

    from heads.tuning.workers import Worker

    winner = Worker._train_winner
    monkeypatch.setattr(CaseBags, "batch", watch)
    monkeypatch.setattr(Trainings, "__init__", begun)
    monkeypatch.setattr(Worker, "_train_winner", final)
    report = tune(folder)
    path = folder / "runs" / "tune_a"
    assert report.tuning.folds == [0, 1, 2]
    tests = []
    for fold in range(3):
        file = path / "splits" / f"data_splits_{fold + 1:02d}.npz"
        split, _ = read_split(file, list(CASES), {})
        tests += split.test
        mine = seen[min(map(int, split.test))]
        assert mine == set(split.train) | set(split.val)
        assert "fold: " + str(fold) in (path / f"outer_{fold}" / "best.yaml").read_text()
    assert sorted(tests) == sorted(CASES)
    assert not (path / "best.yaml").exists()  # which of the three?
    trials = trials_of(folder)
    assert trials.groupby("outer")["number"].apply(list).to_list() == [[0, 1, 2]] * 3
    said = json.loads((path / "tuning.json").read_text())
    assert said["looks_at_test_cases"] == 6
    assert said["pooled"]["n"] == len(CASES)
    _check_pooled(path, said)


def _check_pooled(path: Path, said: dict[str, Any]) -> None:
    """The AUC of the mean probability over the seeds, of all folds' test cases together."""
    tables = [pd.read_csv(file) for file in sorted(path.glob("outer_*/final_seed_*/predictions.csv"))]
    assert len(tables) == 6
    mean = pd.concat(tables).groupby("case_id")["prob_malignant"].mean()
    p, label = mean.to_numpy(), np.array([LABELS[str(case)] for case in mean.index])
    above = p[label == 1][:, None] - p[label == 0]
    assert said["pooled"]["auc"]["value"] == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())
    accuracies = [each["test"]["accuracy"]["value"] for each in said["final"]]
    text = (path / "tuning.txt").read_text()
    assert f"accuracy {np.mean(accuracies):.3f} ± {np.std(accuracies, ddof=1):.3f}" in text


def test_one_outer_fold_alone(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", **{**NESTED, "tune": {"trials": 1, "inner_folds": 1}})
    report = tune(folder, "b", train={"fold": 2})
    assert report.tuning.folds == [2]
    assert "fold: 2" in (folder / "runs" / "tune_b" / "best.yaml").read_text()
    assert (folder / "runs" / "tune_b" / "outer_2" / "final_seed_42" / "results.json").is_file()


def test_a_database_does_as_well(whole: tuple[Path, TuneReport], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    tune(whole[0], "database", tune={"storage": url})
    assert not (whole[0] / "runs" / "tune_database" / "journal.log").exists()
    pd.testing.assert_frame_equal(trials_of(whole[0], "database"), trials_of(whole[0]), check_exact=True)
    assert tune(whole[0], "database").exit_code == 0


def test_several_heads_and_one_that_is_solved(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", tune={"trials": 9, "heads": ["mean", "linear"]})
    report = tune(folder, tune={"pruner": "hyperband", "warmup_epochs": 1})
    trials = trials_of(folder)
    assert set(trials["head.name"]) == {"mean", "linear"}
    linear = trials[trials["head.name"] == "linear"]
    assert set(linear["state"]) == {"finished"}  # its epochs are no one's measure
    assert linear["train.lr"].isna().all()
    assert linear["head.l1_ratio"].notna().all()
    study = report.tuning.folder.journal.read_text()
    assert '"intermediate_value"' in study
    best = (folder / "runs" / "tune_a" / "best.yaml").read_text()
    assert ("name: linear" in best) == ("l1_ratio" in best)
