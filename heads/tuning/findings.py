"""What a tuning has found so far: its trials as rows, its epochs, its looks at validation cases."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from heads.tuning.folder import Tuning
from heads.tuning.space import Space
from heads.tuning.storage import ADOPTED, ERROR, RESULT, noted
from heads.tuning.tasks import Tasks
from heads.tuning.winner import Winner

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "at work",
    TrialState.WAITING: "at work",
}


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        outer: The outer fold.
        number: From 0.
        state: ``finished``, ``pruned``, ``failed`` or ``at work``.
        value: Of the objective; of a pruned trial when it was; None: none.
        values: The same of every inner fold.
        epochs: Trained, of every inner fold.
        seconds: What they took.
        adopted: How often another worker went on with it.
        error: Why it failed.
        settings: Tuned ones by their path.
    """

    outer: int
    number: int
    state: str
    value: float | None
    values: tuple[float, ...]
    epochs: tuple[int, ...]
    seconds: float
    adopted: int
    error: str
    settings: Mapping[str, Any]

    @property
    def sd(self) -> float | None:
        """Standard deviation over the inner folds; None of fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        own = ("outer", "number", "state", "value", "sd", "seconds", "adopted", "error")
        return {name: getattr(self, name) for name in own} | {
            "values": list(self.values),
            "epochs": list(self.epochs),
            "settings": dict(self.settings),
        }


def trial_row(fold: int, trial: FrozenTrial, inner: int, space: Space) -> TrialRow:
    """A trial as a row; of one that failed the epochs are those it reported, in all ``inner`` folds."""
    found = noted(trial, RESULT, {})
    reported = trial.last_step or 0
    return TrialRow(
        fold,
        trial.number,
        STATES[trial.state],
        trial.value if trial.state.is_finished() else None,
        tuple(found.get("values", ())),
        tuple(found.get("epochs", [reported] * inner)),
        float(found.get("seconds", 0.0)),
        int(noted(trial, ADOPTED, 0)),
        str(noted(trial, ERROR, "")),
        space.settings(trial.params),
    )


@dataclass(frozen=True)
class OuterFindings:
    """What was found for one outer fold.

    Attributes:
        fold: Its number.
        trials: In order.
        best: The number of the best; None where none has finished.
    """

    fold: int
    trials: Sequence[TrialRow]
    best: int | None

    @property
    def counts(self) -> Counter[str]:
        """Trials by state."""
        return Counter(row.state for row in self.trials)

    @property
    def adopted(self) -> int:
        """Trials that another worker went on with."""
        return sum(row.adopted > 0 for row in self.trials)

    @property
    def epochs(self) -> int:
        """Trained, over all inner folds: so often were validation cases looked at."""
        return sum(sum(row.epochs) for row in self.trials)

    @property
    def saved(self) -> float:
        """Epochs that pruning saved: each pruned trial would have had as many as the mean finished one."""
        done = [sum(row.epochs) for row in self.trials if row.state == "finished"]
        if not done:
            return 0.0
        usual = statistics.fmean(done)
        return sum(max(0.0, usual - sum(row.epochs)) for row in self.trials if row.state == "pruned")

    @property
    def share_saved(self) -> float:
        """`saved`, of what would have been trained without pruning."""
        return self.saved / (self.epochs + self.saved) if self.saved else 0.0

    @property
    def winner(self) -> TrialRow | None:
        """The best trial."""
        return None if self.best is None else self.trials[self.best]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "fold": self.fold,
            "finished": self.counts["finished"],
            "pruned": self.counts["pruned"],
            "failed": self.counts["failed"],
            "at_work": self.counts["at work"],
            "adopted": self.adopted,
            "epochs": self.epochs,
            "epochs_saved_by_pruning": self.saved,
            "share_saved_by_pruning": self.share_saved,
            "looks_at_validation_cases": self.epochs,
            "best": None if self.winner is None else self.winner.to_json(),
        }


def findings_of(tasks: Tasks, fold: int) -> OuterFindings:
    """What the trials of an outer fold say so far."""
    tuning, trials = tasks.tuning, tasks.trials(fold)
    inner = len(tuning.about["inner"][str(fold)])
    rows = [trial_row(fold, trial, inner, tasks.space) for trial in trials]
    won = [row for row in rows if row.state == "finished" and row.value is not None]
    sign = 1 if tuning.direction == "minimize" else -1
    best = min(won, key=lambda row: sign * (row.value or 0.0)).number if won else None
    return OuterFindings(fold, rows, best)


def winner_of(tasks: Tasks, found: OuterFindings) -> Winner | None:
    """The best trial of an outer fold, of equals the first; None where none has finished."""
    if found.best is None:
        return None
    return Winner(tasks.tuning, tasks.space, found.fold, tasks.trials(found.fold)[found.best])


def shown_value(row: TrialRow, tuning: Tuning) -> str:
    """`val_loss 0.4123 ± 0.0310 over 3 inner folds`."""
    spread = "" if row.sd is None else f" ± {row.sd:.4f}"
    folds = len(row.values)
    over = f"{folds} inner folds" if folds > 1 else "its validation cases"
    return f"{tuning.config.tune.objective} {row.value:.4f}{spread} over {over}"
