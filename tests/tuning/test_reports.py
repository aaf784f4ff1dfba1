"""What a trial reports: each epoch once, its end for those it did not need, asked again after a break."""

from __future__ import annotations

from collections.abc import Iterator

import optuna
import pytest
from optuna.pruners import HyperbandPruner, MedianPruner

from heads.tuning.config import TuneConfig
from heads.tuning.reports import Reports
from heads.tuning.storage import quiet

TUNE = TuneConfig(startup_trials=2, warmup_epochs=1)


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


def study_of(values: list[float], pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    """Finished trials that reported the same value for three epochs of six."""
    study = optuna.create_study(pruner=pruner or MedianPruner(2, 1))
    for value in values:
        handle = study.ask()
        reports = reports_of(study, handle)
        for epoch in (1, 2, 3):
            reports.report(epoch, value)
        reports.pad(3, 6, value)
        study.tell(handle, value)
    return study


def reports_of(study: optuna.Study, handle: optuna.Trial, by_epoch: bool = True) -> Reports:
    return Reports(handle, study.trials[handle.number], by_epoch, TUNE)


def test_what_stopped_early_counts_with_its_end() -> None:
    study = study_of([0.5, 0.6, 0.7])
    assert study.trials[0].intermediate_values == dict.fromkeys(range(1, 7), 0.5)
    handle = study.ask()
    reports = reports_of(study, handle)
    # Better than the median of their ends, in epochs that none of the others had.
    assert [reports.report(epoch, 0.55) for epoch in range(1, 5)] == [False] * 4
    assert reports_of(study, study.ask()).report(5, 0.65)


def test_asked_again_where_it_was_interrupted_before_the_answer() -> None:
    study = study_of([0.5, 0.6, 0.7])
    handle = study.ask()
    handle.report(0.9, 1)
    handle.report(0.9, 2)  # and killed before it asked whether that is hopeless
    again = reports_of(study, handle)
    assert not again.report(1, 0.9)  # that was answered: it went on
    assert again.report(2, 0.9)
    assert study.trials[handle.number].intermediate_values == {1: 0.9, 2: 0.9}


def test_none_is_hopeless_before_the_startup_trials_have_ended() -> None:
    for pruner in (MedianPruner(0, 0), HyperbandPruner(1, 6, 2)):
        study = study_of([0.1], pruner)
        assert not reports_of(study, study.ask()).report(2, 0.9)


def test_a_solved_head_reports_its_end_alone() -> None:
    study = study_of([0.5, 0.6, 0.7])
    handle = study.ask()
    reports = reports_of(study, handle, by_epoch=False)
    assert not any(reports.report(epoch, 9.0) for epoch in range(1, 4))
    reports.pad(3, 6, 0.4)
    assert study.trials[handle.number].intermediate_values == {6: 0.4}
