"""Pictures of trials: what cannot be drawn is told, and is no reason to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import create_trial

from heads.tuning.plots import importances
from heads.tuning.storage import quiet
from tests.tuning.projects import make_project, tune

HEAD, LR = CategoricalDistribution(("mean", "abmil")), FloatDistribution(0.0, 1.0)


def study_of(trials: list[dict[str, Any]]) -> optuna.Study:
    """Finished trials, each of the value of its number."""
    known: dict[str, BaseDistribution] = {"head.name": HEAD, "train.lr": LR}
    with quiet():
        study = optuna.create_study()
        for number, params in enumerate(trials):
            own = {name: known[name] for name in params}
            study.add_trial(create_trial(value=float(number), params=params, distributions=own))
    return study


def test_importances_of_settings_that_all_trials_have() -> None:
    rates = [{"head.name": "mean", "train.lr": number / 12} for number in range(12)]
    found = importances(study_of(rates))
    assert found["train.lr"] > 0.99
    assert found["head.name"] < 0.01


def test_where_all_have_but_one_value_in_common_there_are_no_importances() -> None:
    some = [{"head.name": "mean", **({"train.lr": n / 12} if n % 2 else {})} for n in range(12)]
    study = study_of(some)
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    with pytest.raises(RuntimeError, match="zero total variance"):  # else this shows nothing
        optuna.importance.get_param_importances(study, evaluator=evaluator)
    assert importances(study) == {}
    assert importances(study_of([{"train.lr": 0.5}])) == {}


def test_a_picture_that_cannot_be_drawn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("history", "confusion", "deviation"):
        monkeypatch.setattr(f"heads.evaluation.results.plot_{name}", lambda *args: [])

    def without(*args: Any, **named: Any) -> None:
        raise RuntimeError("Encountered zero total variance in all trees.")

    space = {"train.lr": {"low": 1e-4, "high": 1e-1, "log": True}}
    folder = make_project(
        tmp_path / "project",
        head={"name": "mean"},
        train={"epochs": 1},
        tune={"trials": 10, "inner_folds": 1, "space": space},
    )
    with monkeypatch.context() as patch:
        patch.setattr(optuna.importance, "get_param_importances", without)
        report = tune(folder)
    path = folder / "runs" / "tune_a"
    assert "importance.png is not drawn: no setting" in report.to_text()
    assert (path / "tuning.txt").read_text() == report.to_text() + "\n"
    assert len(json.loads((path / "tuning.json").read_text())["remarks"]) == 1
    assert sorted(file.name for file in path.glob("*.png")) == ["history.png", "parallel.png", "slices.png"]
    assert tune(folder).to_text() == report.to_text()  # asked again, it says so again
