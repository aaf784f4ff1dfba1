"""What a trial reports of its epochs, and when it is hopeless."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from heads.tuning.config import TuneConfig

_PADDED = 1000  # steps at most that are reported after early stopping


class Reports:
    """The reports of one trial, each made once, however often the trial is gone on with.

    Args:
        handle: Of the trial.
        trial: As it was when this worker took it.
        by_epoch: Whether its epochs are like those of others. A head that is solved has a path of
            penalties in their place: it reports its end alone, and is never hopeless.
        tune: Who ends hopeless trials, and from when on.
    """

    def __init__(self, handle: optuna.Trial, trial: FrozenTrial, by_epoch: bool, tune: TuneConfig) -> None:
        self._handle, self._by_epoch, self._tune = handle, by_epoch, tune
        self._known = set(trial.intermediate_values)
        self._last = max(self._known, default=0)

    def report(self, epoch: int, value: float) -> bool:
        """Report an epoch.

        Args:
            epoch: From 1.
            value: Of the objective, of what the trainings would keep by then.

        Returns:
            Whether the trial is hopeless.
        """
        if not self._by_epoch:
            return False
        self._once(epoch, value)
        if epoch < self._last:  # asked before it was interrupted
            return False
        hopeless = self._handle.should_prune()
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        ended = self._handle.study.get_trials(deepcopy=False, states=states)
        return hopeless and len(ended) >= self._tune.startup_trials

    def pad(self, epoch: int, epochs: int, value: float) -> None:
        """Report the end for the epochs that early stopping has saved.

        Trials that go on are then held against all that had come to an end by that epoch; else they would
        be held against the slow ones alone.

        Args:
            epoch: The last one.
            epochs: As many as there might have been.
            value: Of the objective.
        """
        first = epoch + 1 if self._by_epoch else epochs
        for step in range(first, min(epochs, first + _PADDED) + 1):
            self._once(step, value)
            if self._tune.pruner == "hyperband":  # its rungs know of those alone that were asked about
                self._handle.should_prune()

    def _once(self, step: int, value: float) -> None:
        if step not in self._known:
            self._handle.report(value, step)
            self._known.add(step)
