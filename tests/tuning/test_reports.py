"""What a trial reports: each epoch once, its end for those it did not need, asked again after a break."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import optuna
import pytest
from optuna.pruners import HyperbandPruner, MedianPruner
from optuna.trial import TrialState

from heads.tuning.config import TuneConfig
from heads.tuning.pruners import make_pruner
from heads.tuning.reports import Reports
from heads.tuning.storage import quiet

TUNE = TuneConfig(startup_trials=2, warmup_epochs=1)


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


def study_of(values: list[float], pruner: optuna.pruners.BasePruner | None = None) -> optuna.Study:
    """Finished trials that reported the same value for three epochs of six."""
    study = optuna.create_study(pruner=pruner or make_pruner(TUNE, 6))
    for value in values:
        handle = study.ask()
        reports = reports_of(study, handle)
        for epoch in (1, 2, 3):
            reports.report(epoch, value)
        reports.end(6, value)
        study.tell(handle, value)
    return study


def reports_of(
    study: optuna.Study, handle: optuna.Trial, by_epoch: bool = True, tune: TuneConfig = TUNE
) -> Reports:
    return Reports(handle, study.trials[handle.number], by_epoch, tune)


def test_what_stopped_early_counts_with_its_end() -> None:
    study = study_of([0.5, 0.6, 0.7])
    assert study.trials[0].intermediate_values == dict.fromkeys((1, 2, 3), 0.5)  # nothing more is written
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
    reports.end(6, 0.4)
    assert study.trials[handle.number].intermediate_values == {6: 0.4}


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_the_median_is_optunas_with_every_end_reported_to_the_last_epoch(direction: str) -> None:
    rng, answers = np.random.default_rng(0), list[bool]()
    short = optuna.create_study(pruner=make_pruner(TUNE, 9), direction=direction)
    long = optuna.create_study(pruner=MedianPruner(2, 1), direction=direction)
    for number in range(30):
        last, values = int(rng.integers(1, 10)), rng.random(9)
        handles = short.ask(), long.ask()
        said = False
        for epoch in range(1, last + 1):
            for handle in handles:
                handle.report(values[epoch - 1], epoch)
            said, expected = handles[0].should_prune(), handles[1].should_prune()
            assert said == expected, (number, epoch)
            answers.append(said)
            if said:
                break
        for study, handle in zip((short, long), handles, strict=True):
            if said:
                study.tell(handle, state=TrialState.PRUNED)
                continue
            if study is long:
                for epoch in range(last + 1, 10):
                    handle.report(values[last - 1], epoch)
            study.tell(handle, values[last - 1])
    assert 5 < sum(answers) < 25


def test_an_end_stands_in_all_of_hyperbands_rungs_for_a_report_and_some_notes() -> None:
    tune = TuneConfig(pruner="hyperband", warmup_epochs=1)
    study = optuna.create_study(pruner=make_pruner(tune, 9000), study_name="rungs")
    for value in (0.1, 0.5):  # by the second one every rung is one at which it would have been ended
        handle = study.ask()
        reports = reports_of(study, handle, tune=tune)
        reports.report(1, value)
        reports.end(9000, value)
        study.tell(handle, value)
    for trial in study.trials:
        assert set(trial.intermediate_values) == {1, 9000}
        rungs = [key for key in trial.system_attrs if key.startswith("completed_rung_")]
        bracket = study.pruner._get_bracket_id(study, trial)  # type: ignore[attr-defined]
        assert len(rungs) == 9 - bracket  # 1, 3, … 6561; the later brackets begin later
