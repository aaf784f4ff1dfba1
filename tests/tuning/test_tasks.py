"""Who does which trial: one worker each, whatever the others do at the same moment."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from heads.evaluation.runs import RunError, held
from heads.tuning.folder import TuneFolder
from heads.tuning.storage import quiet
from heads.tuning.tasks import Tasks, TrialTask
from tests.tuning.test_storage import tuning_in

TRIALS, WORKERS = 30, 6


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    with quiet():
        yield


def test_trials_that_end_while_others_look_for_work(tmp_path: Path) -> None:
    done, errors = list[int](), list[BaseException]()
    tuning, space = tuning_in(tmp_path, trials=TRIALS, sampler="random")
    together = threading.Barrier(WORKERS)

    def work() -> None:
        try:
            tasks = Tasks(tuning, space, lambda text: None)
            together.wait()
            while (task := tasks.next()) is not None:
                assert isinstance(task, TrialTask)
                folder, number = tuning.folder.trial(0, task.trial.number), task.trial.number
                with task.holding:  # as a worker ends a trial
                    (folder / "fold_0.pth").write_bytes(b"state")
                    done.append(number)
                    tasks.studies[0].tell(number, state=TrialState.PRUNED)
                    shutil.rmtree(folder)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(WORKERS)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not errors
    assert Counter(done) == Counter(range(TRIALS))
    assert list((tmp_path / "trials").iterdir()) == []
    assert not list(tmp_path.glob("trials/**/*.lock"))


def test_one_at_a_time_holds_a_trial_whose_folder_comes_and_goes(tmp_path: Path) -> None:
    folder, errors, at_it = TuneFolder(tmp_path), list[BaseException](), list[int]()
    together, held_by = threading.Barrier(4), Counter[int]()

    def work(number: int) -> None:
        try:
            together.wait()
            for _ in range(400):
                try:
                    with folder.trial_held(0, 0):
                        at_it.append(number)
                        folder.trial(0, 0).mkdir(parents=True, exist_ok=True)
                        (folder.trial(0, 0) / "fold_0.pth").write_bytes(b"state")
                        shutil.rmtree(folder.trial(0, 0))
                        assert at_it == [number]
                        held_by[number] += 1
                        at_it.clear()
                except RunError:
                    continue
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert not errors
    assert held_by


def test_a_folder_that_is_removed_lets_go_of_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between seeing that a trial is at work and trying to hold it, its worker ends it."""
    tuning, space = tuning_in(tmp_path, trials=1)
    tasks, other = (Tasks(tuning, space, lambda text: None) for _ in range(2))
    task = tasks.next()
    assert isinstance(task, TrialTask)

    def end_it(*args: Any, **named: Any) -> Any:
        tasks.studies[0].tell(0, state=TrialState.PRUNED)
        shutil.rmtree(tuning.folder.trial(0, 0))
        task.holding.close()
        return held(*args, **named)

    monkeypatch.setattr("heads.evaluation.studies.held", end_it)
    assert other.next() is None
    assert not tuning.folder.trial(0, 0).exists()
    tuning.folder.drop_trials()
    assert list(tuning.folder.locks.iterdir()) == []
    assert not (tmp_path / "trials").exists()
