"""Tunings in which something fails: trials, final trainings, the machine, settings, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from featstore.errors import ConfigError, FeatstoreError
from heads.evaluation.runs import RunError
from heads.training.course import TrainingError
from heads.training.loop import Training
from heads.tuning.trial import Trainings
from tests.tuning.projects import adopted, make_project, trials_of, tune, without_pictures


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch.setattr)


def test_a_trial_that_diverges_is_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, learn = make_project(tmp_path / "project"), Training.learn

    def diverging(self: Training, epoch: Any, schedule: Any) -> Any:
        if self.config.lr < 1e-4 and self.progress.epoch == 1:
            with torch.no_grad():
                next(self.head.parameters()).fill_(torch.inf)
        return learn(self, epoch, schedule)

    monkeypatch.setattr(Training, "learn", diverging)
    said: list[str] = []
    report = tune(folder, "a", said.append)
    trials = trials_of(folder)
    low = trials["train.lr"] < 1e-4
    assert set(trials["state"][low]) == {"failed"}
    assert (trials["state"][~low] != "failed").all()
    assert trials["value"][low].isna().all()
    assert trials["error"][low].str.contains("no longer a number in epoch 2").all()
    assert low.sum() == report.outer[0].counts["failed"] > 0
    assert "a failure, trial" in report.to_text()
    assert any("failed: the loss is no longer a number" in line for line in said)
    assert report.exit_code == 0
    assert len(trials) == 7


def test_where_every_trial_fails_it_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_project(tmp_path / "project", tune={"trials": 40})

    def broken(self: Trainings, epoch: int, received: Any) -> None:
        raise RuntimeError("CUDA error: the device is on fire")

    monkeypatch.setattr(Trainings, "advance", broken)
    with pytest.raises(TrainingError, match="10 trials have failed and none has succeeded") as raised:
        tune(folder)
    assert "RuntimeError: CUDA error" in str(raised.value)
    report = tune(make_project(tmp_path / "few", tune={"trials": 2}))
    assert report.exit_code == 1
    assert report.outer[0].winner is None
    assert "RuntimeError" in (tmp_path / "few" / "runs" / "tune_a" / "tuning.txt").read_text()


def test_what_is_no_fault_of_the_settings_fails_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, advance = make_project(tmp_path / "project", tune={"trials": 2}), Trainings.advance

    def full(self: Trainings, epoch: int, received: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Trainings, "advance", full)
        with pytest.raises(OSError, match="No space"):
            tune(folder)
    assert Trainings.advance is advance
    report = tune(folder)
    assert report.outer[0].counts["failed"] == 0
    assert adopted(folder) == 1
    assert len(trials_of(folder)) == 2


def test_a_final_training_that_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project(tmp_path / "project", tune={"trials": 2, "inner_folds": 1})

    def broken(*args: Any) -> None:
        raise RuntimeError("the disk is away")

    with monkeypatch.context() as patch:
        patch.setattr("heads.study_trainings.train_run", broken)
        report = tune(folder)
    assert report.exit_code == 1
    assert "the disk is away" in report.to_text()
    report = tune(folder)
    assert report.exit_code == 0
    assert "test, seed 42" in (folder / "runs" / "tune_a" / "tuning.txt").read_text()


@pytest.mark.parametrize(
    ("sections", "error", "says"),
    [
        ({"tune": {"inner_folds": 9}}, ConfigError, ("tune with", "--inner-folds 8")),
        ({"tune": {"space": {"train.l": {"low": 1, "high": 2}}}}, ConfigError, ("tune.space.train.l",)),
        ({"tune": {"storage": "nothing"}}, ConfigError, ("tune.storage",)),
        ({"train": {"load_splits": "nowhere.npz"}}, ConfigError, ("train.load_splits",)),
        ({"train": {"fold": 1}}, ConfigError, ("train.fold",)),
        ({"train": {"seed": 2**32 - 1}, "tune": {"final_seeds": 2}}, ConfigError, ("final_seeds",)),
        ({"train": {"reg_weight_entropy": {"stain": 1.0}}}, ConfigError, ("reg_weight_entropy", "stain")),
    ],
)
def test_what_is_refused_before_any_trial(
    tmp_path: Path, sections: Any, error: type[FeatstoreError], says: tuple[str, ...]
) -> None:
    folder = make_project(tmp_path / "project")
    with pytest.raises(error) as raised:
        tune(folder, "refused", **sections)
    for part in says:
        assert part in str(raised.value)
    assert not (folder / "runs" / "tune_refused").exists()


def test_a_damaged_description_is_told(tmp_path: Path) -> None:
    folder = make_project(tmp_path / "project", tune={"trials": 1, "inner_folds": 1})
    tune(folder)
    about = folder / "runs" / "tune_a" / "tune.json"
    content = json.loads(about.read_text())
    for change in ({"inner": {}}, {"folds": None}, {"seeds": 3}, {"labels": {"1": 9}}):
        about.write_text(json.dumps({**content, **change}))
        with pytest.raises(RunError, match="description"):
            tune(folder)
