"""What is next: the trials that are begun, new ones, and the winner's trainings, each for one worker.

One worker at a time decides. Who holds a trial's lock is at work on it; a trial that is at work and that
nobody holds was left by a worker that ended, and the next one goes on with it under its number.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import optuna
from optuna.trial import FrozenTrial, TrialState

from heads.evaluation.runs import RunError, held
from heads.evaluation.study_results import checked_status
from heads.training.course import TrainingError
from heads.tuning.folder import Tuning
from heads.tuning.locks import exclusive
from heads.tuning.space import Space
from heads.tuning.storage import ADOPTED, ERROR, noted, open_storage, open_study, propose

_BROKEN = 10  # so many failures before any success are not the fault of some unlucky settings


@dataclass(frozen=True)
class TrialTask:
    """A trial to do or to go on with; ``holding`` is closed when that is done."""

    fold: int
    trial: FrozenTrial
    holding: ExitStack


@dataclass(frozen=True)
class FinalTask:
    """A training of an outer fold's winner; ``holding`` is closed when that is done."""

    fold: int
    seed: int
    holding: ExitStack


@dataclass
class Tasks:
    """The tasks of a tuning, as one worker sees them.

    Args:
        tuning: What is tuned.
        space: What is searched over.
        tell: Called with remarks.

    Attributes:
        studies: The trials by outer fold.
    """

    tuning: Tuning
    space: Space
    tell: Callable[[str], None]
    studies: dict[int, optuna.Study] = field(init=False)
    _tried: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        with exclusive(self.tuning.folder.turn):
            storage = open_storage(self.tuning)
            self.studies = {
                fold: open_study(self.tuning, storage, fold, self.space) for fold in self.tuning.folds
            }

    def trials(self, fold: int, *states: TrialState) -> list[FrozenTrial]:
        """The trials of an outer fold, by number; of some states only, if any are named."""
        return self.studies[fold].get_trials(deepcopy=False, states=states or None)

    def ended(self, fold: int) -> bool:
        """Whether all trials of an outer fold have."""
        ends = sum(trial.state.is_finished() for trial in self.trials(fold))
        return ends >= self.tuning.config.tune.trials

    def finals_left(self, fold: int) -> list[int]:
        """The seeds with which the winner is still to be trained; none where nothing has won."""
        if not self.ended(fold) or not self.trials(fold, TrialState.COMPLETE):
            return []
        study = self.tuning.study()
        return [seed for seed in study.seeds if checked_status(study, fold, seed) != "finished"]

    def left(self) -> bool:
        """Whether there is anything to do, for this worker or for another."""
        return any(not self.ended(fold) or self.finals_left(fold) for fold in self.tuning.folds)

    def next(self) -> TrialTask | FinalTask | None:
        """What this worker does next, and holds; None: nothing is left, or others are at it.

        Raises:
            TrainingError: All trials so far have failed.
        """
        with exclusive(self.tuning.folder.turn):
            for fold in self.tuning.folds:
                if (trial := self._begun(fold) or self._new(fold)) is not None:
                    return trial
            for fold in self.tuning.folds:
                for seed in self.finals_left(fold):
                    if (final := self._final(fold, seed)) is not None:
                        return final
        return None

    def name(self, fold: int, number: int) -> str:
        """`trial 7`."""
        outer = f"outer fold {fold}, " if len(self.tuning.folds) > 1 else ""
        return f"{outer}trial {number}"

    def _begun(self, fold: int) -> TrialTask | None:
        """A trial that another worker began, and that nobody is at."""
        for trial in self.trials(fold, TrialState.RUNNING):
            holding = self._hold(fold, trial.number)
            if holding is None:
                continue
            if self.trials(fold)[trial.number].state != TrialState.RUNNING:  # it has just ended
                shutil.rmtree(self.tuning.folder.trial(fold, trial.number), ignore_errors=True)
                holding.close()
                continue
            self._make_folder(fold, trial.number)
            handle = optuna.Trial(self.studies[fold], trial._trial_id)
            handle.set_user_attr(ADOPTED, noted(trial, ADOPTED, 0) + 1)
            self.tell(f"{self.name(fold, trial.number)} was left by another worker: going on with it")
            return TrialTask(fold, trial, holding)
        return None

    def _new(self, fold: int) -> TrialTask | None:
        """The next trial, if there is to be one more."""
        number = len(self.trials(fold))
        if number >= self.tuning.config.tune.trials:
            return None
        self._check_sound(fold)
        holding = self._hold(fold, number)
        if holding is None:
            raise RunError(
                f"another process holds trial {number}, which there is not yet",
                where=str(self.tuning.folder.locks),
                fix="see that no other tuning writes to this folder",
            )
        self._make_folder(fold, number)
        self.studies[fold].add_trial(propose(self.studies[fold], self.space, self.tuning.config.tune, fold))
        return TrialTask(fold, self.trials(fold)[number], holding)

    def _hold(self, fold: int, number: int) -> ExitStack | None:
        """The trial, held; None: another worker holds it."""
        holding = ExitStack()
        try:
            holding.enter_context(self.tuning.folder.trial_held(fold, number))
        except RunError:
            return None
        return holding

    def _make_folder(self, fold: int, number: int) -> None:
        self.tuning.folder.trial(fold, number).mkdir(parents=True, exist_ok=True)

    def _final(self, fold: int, seed: int) -> FinalTask | None:
        """A training of the winner, if this worker has not failed at it and nobody is at it."""
        if (fold, seed) in self._tried:
            return None
        holding, lock = ExitStack(), f".final_{seed}.lock"
        try:
            holding.enter_context(held(self.tuning.folder.outer(fold), "training the winner", name=lock))
        except RunError:
            return None
        self._tried.add((fold, seed))
        if checked_status(self.tuning.study(), fold, seed) == "finished":  # it has just ended
            holding.close()
            return None
        return FinalTask(fold, seed, holding)

    def _check_sound(self, fold: int) -> None:
        """Raises TrainingError if nothing but failures has come of the first trials."""
        trials = self.trials(fold)
        failed = [trial for trial in trials if trial.state == TrialState.FAIL]
        good = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        if len(failed) >= _BROKEN and not good:
            raise TrainingError(
                f"{len(failed)} trials have failed and none has succeeded; the last: "
                f"{noted(failed[-1], ERROR, 'for no reason that was noted')}",
                expected="settings by which a head can be trained",
                where=str(self.tuning.folder.path),
                fix="mend the settings or tune.space, and tune again under another name",
            )
