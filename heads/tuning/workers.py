"""A worker: does one trial after the other until all are there, and then trains the winner.

Any number of processes may do so in one folder, on any number of machines.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import optuna
from optuna.trial import TrialState

from featstore.errors import ConfigError, FeatstoreError, first_line
from featstore.resident import CaseBags
from heads.evaluation.studies import Study
from heads.run import SAVE_SECONDS
from heads.study_trainings import train_one
from heads.training.course import TrainingError
from heads.tuning.folder import Tuning
from heads.tuning.reports import Reports
from heads.tuning.storage import ERROR, RESULT
from heads.tuning.tasks import FinalTask, Tasks, TrialTask
from heads.tuning.trial import Trainings


class _Failed(Exception):
    """A trial failed by its settings; the cause says how."""


@dataclass
class Worker:
    """One process at work on a tuning.

    Args:
        tasks: What is to do.
        bags: The cases of all folds.
        winner: The final trainings of an outer fold, as a study.
        received: Signals, looked at between epochs.
        tell: Called with remarks.

    Attributes:
        done: Tasks that this worker has ended.
    """

    tasks: Tasks
    bags: CaseBags
    winner: Callable[[int], Study]
    received: Sequence[int]
    tell: Callable[[str], None]
    done: int = 0

    @property
    def _tuning(self) -> Tuning:
        return self.tasks.tuning

    def work(self) -> None:
        """Do what there is to do, until there is no more of it, or a signal is received.

        Raises:
            FeatstoreError: Whatever is no fault of a trial's settings.
        """
        while not self.received and (task := self.tasks.next()) is not None:
            with task.holding:
                if isinstance(task, FinalTask):
                    self._train_winner(task)
                else:
                    self._do(task)

    def _train_winner(self, task: FinalTask) -> None:
        """Train the winner on an outer split, and look at its test cases."""
        outcome = train_one(self.winner(task.fold), self.bags, task.fold, task.seed, self.received)
        for remark in outcome.remarks:
            self.tell(remark)
        self.tell(f"the winner, {outcome.to_text()}")
        self.done += outcome.status != "interrupted"

    def _do(self, task: TrialTask) -> None:
        """Do a trial, or go on with it; a failure that its settings are to blame for is noted of it."""
        study, number = self.tasks.studies[task.fold], task.trial.number
        handle = optuna.Trial(study, task.trial._trial_id)
        try:
            text = self._train(task, handle)
        except _Failed as failed:
            text = f"failed: {_line(failed.__cause__)}"
            handle.set_user_attr(ERROR, _line(failed.__cause__))
            study.tell(number, state=TrialState.FAIL)
        if not text:
            self.tell(f"{self.tasks.name(task.fold, number)}: saved, to be gone on with")
            return
        shutil.rmtree(self._tuning.folder.trial(task.fold, number), ignore_errors=True)
        self.done += 1
        count = sum(trial.state.is_finished() for trial in self.tasks.trials(task.fold))
        total = self._tuning.config.tune.trials
        self.tell(f"[{count:{len(str(total))}}/{total}] {self.tasks.name(task.fold, number)}: {text}")

    def _train(self, task: TrialTask, handle: optuna.Trial) -> str:
        """The trial's epochs, to its end or its saving; how it ended, empty if it has not."""
        tune, params = self._tuning.config.tune, task.trial.params
        folder = self._tuning.folder.trial(task.fold, task.trial.number)
        with _blaming_settings():
            config = self.tasks.space.config(params)
            inner = self._tuning.inner(task.fold)
            trainings = Trainings(config, self._tuning.about, self.bags, inner, tune.objective)
        trainings.restore(folder, params, self.tell)
        by_epoch = config.head.name not in self.tasks.space.solved
        reports = Reports(handle, task.trial, by_epoch, tune)
        epoch, saved, done = 0, time.monotonic(), False
        while not done:
            epoch += 1
            with _blaming_settings():
                trainings.advance(epoch, self.received)
            if self.received or time.monotonic() - saved > SAVE_SECONDS:
                trainings.save(folder, params)
                saved = time.monotonic()
            if self.received:
                return ""
            value = trainings.value(epoch)
            hopeless = reports.report(epoch, value)
            done = trainings.finished and epoch >= trainings.epoch
            if hopeless and not done:
                handle.set_user_attr(RESULT, trainings.result())
                self.tasks.studies[task.fold].tell(task.trial.number, state=TrialState.PRUNED)
                return f"{value:.4f}, pruned after epoch {epoch}"
        reports.end(config.train.epochs, value)
        result = trainings.result()
        handle.set_user_attr(RESULT, result)
        self.tasks.studies[task.fold].tell(task.trial.number, value)
        folds = ", ".join(f"{each:.4f}" for each in result["values"])
        return f"{value:.4f} ({folds}), {epoch} epochs, {result['seconds']:.1f} s"


@contextmanager
def _blaming_settings() -> Iterator[None]:
    """Tell what a trial's settings make fail from what would fail with any: disk, store, memory."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except FeatstoreError as error:
        if not isinstance(error, ConfigError | TrainingError):
            raise
        raise _Failed from error
    except Exception as error:  # a plugin's, or torch's: the other trials go on
        raise _Failed from error


def _line(error: BaseException | None) -> str:
    """What is noted of a failure; the kind of a foreign error is half the message."""
    if error is None:
        return "unknown"
    line = first_line(error)
    return line if isinstance(error, FeatstoreError) else f"{type(error).__name__}: {line}"
