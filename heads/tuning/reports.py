"""What a trial reports of its epochs, and when it is hopeless."""

from __future__ import annotations

import optuna
from optuna.trial import FrozenTrial, TrialState

from heads.tuning.config import TuneConfig


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
        if not self._handle.should_prune():
            return False
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        ended = self._handle.study.get_trials(deepcopy=False, states=states)
        return len(ended) >= self._tune.startup_trials

    def end(self, epochs: int, value: float) -> None:
        """Report the end where others are going to look for it.

        The median takes what was reported last (`heads.tuning.pruners.MedianOfEnds`). Hyperband's rungs
        know of those trials alone that were asked about there; a head that is solved has reported nothing.

        Args:
            epochs: As many as there might have been.
            value: Of the objective.
        """
        rungs = self._tune.pruner == "hyperband"
        if rungs or not self._by_epoch:
            self._once(epochs, value)
        # Every question is answered up to a rung at which others would be ended: as many as rungs at most.
        for _ in range(epochs.bit_length() if rungs else 0):
            if not self._handle.should_prune():
                break

    def _once(self, step: int, value: float) -> None:
        if step not in self._known:
            self._handle.report(value, step)
            self._known.add(step)
