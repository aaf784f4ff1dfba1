"""One trial: the inner trainings of a setting, epoch by epoch side by side, judged by their mean."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featstore.cohort.splits import Split
from featstore.files import replacing
from featstore.resident import CaseBags
from heads.config import Config
from heads.evaluation.checkpoints import identity_of, load_state, unreadable
from heads.evaluation.runs import RunError
from heads.run import prepare
from heads.training.loop import Training

COLUMNS = {"val_loss": "val_log_loss", "val_auc": "val_auc"}


class Trainings:
    """The trainings of one setting on K inner folds.

    Each stops early by its own validation loss; the others go on, and the stopped one counts with what
    it has kept.

    Args:
        config: Of the trial, resolved (`heads.config.resolved`).
        about: ``dim``, ``class_names`` and ``store``, as `heads.cohort.describe` says.
        bags: The cohort, shared by all.
        folds: K splits; no case of their ``test`` is looked at.
        objective: ``val_loss`` or ``val_auc``.

    Raises:
        ConfigError: The settings do not suit the head, the cases or the device.
    """

    def __init__(
        self,
        config: Config,
        about: Mapping[str, Any],
        bags: CaseBags,
        folds: Sequence[Split],
        objective: str,
    ) -> None:
        self._column = COLUMNS[objective]
        # Each training may keep the cohort standardised: together they take no more than one might.
        shared = copy.copy(bags)
        shared.memory = bags.bytes + max(0, bags.memory - bags.bytes) // len(folds)
        self._identity = identity_of(config, about)
        self._start = [partial(prepare, config, dict(about), shared, split) for split in folds]
        self.trainings: list[Training] = [start() for start in self._start]

    @property
    def finished(self) -> bool:
        """Whether every training is."""
        return all(each.finished for each in self.trainings)

    @property
    def epoch(self) -> int:
        """Epochs of the training that is furthest."""
        return max(each.progress.epoch for each in self.trainings)

    def advance(self, epoch: int, received: Sequence[int]) -> None:
        """Train until every training is finished or has done so many epochs.

        Args:
            epoch: From 1.
            received: Signals, looked at between epochs.

        Raises:
            TrainingError: A loss is no longer a number.
        """
        for each in self.trainings:
            while each.progress.epoch < epoch and not each.finished and not received:
                once: list[int] = []
                each.run(lambda training, once=once: once.append(0), once)  # type: ignore[misc]

    def values(self, epoch: int) -> list[float]:
        """Of each fold what its best epoch is worth, of the first ``epoch``: that which it would keep."""
        return [float(best_row(each.progress.history[:epoch])[self._column]) for each in self.trainings]

    def value(self, epoch: int) -> float:
        """The mean over the folds."""
        return statistics.fmean(self.values(epoch))

    def result(self) -> dict[str, Any]:
        """What is noted of a trial that has ended, of JSON types: a value a fold."""
        progress = [each.progress for each in self.trainings]
        return {
            "values": self.values(self.epoch) if all(each.history for each in progress) else [],
            "epochs": [each.epoch for each in progress],
            "best_epochs": [each.best_epoch for each in progress],
            "seconds": sum(row["seconds"] for each in progress for row in each.history),
        }

    def save(self, folder: Path, params: Mapping[str, Any]) -> None:
        """Write ``fold_K.pth`` for every training, each aside and then moved.

        Args:
            folder: Of the trial; it is there.
            params: Of the trial, so that no other trial goes on from it.
        """
        identity = {**self._identity, "params": dict(params)}
        for number, each in enumerate(self.trainings):
            with replacing(folder / f"fold_{number}.pth") as aside:
                torch.save({"identity": identity, **each.state()}, aside)

    def restore(self, folder: Path, params: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """Go on from what was saved, as far as it can be read; a training without begins anew.

        Args:
            folder: Of the trial.
            params: As of `save`.
            tell: Called with a remark on a file that cannot be used.
        """
        identity = {**self._identity, "params": dict(params)}
        for number, start in enumerate(self._start):
            path = folder / f"fold_{number}.pth"
            if not path.exists():
                continue
            try:
                state = load_state(path, identity)
                try:
                    self.trainings[number].load_state(state)
                except Exception as error:  # whatever torch makes of shapes that differ
                    raise unreadable(path, f"its state does not fit ({error})") from error
            except RunError as error:
                tell(f"warning: {path} cannot be used, and fold {number} begins anew: {error.found}")
                self.trainings[number] = start()


def best_row(history: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """The row of the epoch that a training keeps: the first of the least validation loss."""
    return min(history, key=lambda row: row["val_cross_entropy"])
