"""Who ends hopeless trials: Optuna's pruners, and its median held against trials that stopped early."""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass
from typing import cast

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from heads.tuning.config import TuneConfig


def make_pruner(tune: TuneConfig, epochs: int) -> BasePruner:
    """Who ends hopeless trials.

    Args:
        tune: Which, and from when on.
        epochs: The longest that a training can be.
    """
    if tune.pruner == "none" or tune.warmup_epochs >= epochs:
        return NopPruner()
    if tune.pruner == "hyperband":
        return HyperbandPruner(min_resource=max(1, tune.warmup_epochs), max_resource=epochs)
    return MedianOfEnds(n_startup_trials=tune.startup_trials, n_warmup_steps=tune.warmup_epochs)


class MedianOfEnds(MedianPruner):
    """The median, in which a finished trial counts with its end in every epoch that it did not need.

    Else trials that go on would be held against the slow ones alone. Nothing is written for that: a report
    for every epoch saved would cost a lock and a write to the shared file system each.
    """

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is hopeless.

        Args:
            study: Of the trial.
            trial: With its reports so far.
        """
        if trial.last_step is None:
            return False
        return super().prune(cast(optuna.Study, _Prolonged(study, trial.last_step)), trial)


@dataclass(frozen=True)
class _Prolonged:
    """What the median looks at of a study: every trial reported something in this epoch."""

    study: optuna.Study
    epoch: int

    @property
    def direction(self) -> StudyDirection:
        return self.study.direction

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [self._prolonged(trial) for trial in self.study.get_trials(deepcopy=deepcopy, states=states)]

    def _prolonged(self, trial: FrozenTrial) -> FrozenTrial:
        if trial.last_step is None or trial.last_step >= self.epoch:
            return trial
        longer = copy.copy(trial)
        end = trial.intermediate_values[trial.last_step]
        longer.intermediate_values = {**trial.intermediate_values, self.epoch: end}
        return longer
