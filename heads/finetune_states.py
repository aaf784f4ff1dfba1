"""What is written while a backbone is fine-tuned: the state to resume from, curves, steps' losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from featstore.files import replacing
from heads.evaluation.checkpoints import check_progress
from heads.evaluation.runs import RunError, RunFolder, history_frame, write_history, write_text
from heads.training.course import Progress
from heads.training.finetune import FineTuning
from heads.training.finetune_config import FinetuneConfig
from heads.training.ranks import Ranks

STEPS = "steps.csv"
_COLUMNS = ["epoch", "step", "loss", "lr"]


class Saver:
    """After every epoch, and now and then between steps: the state; and whoever watches is told.

    Args:
        run: The folder.
        path: Of the state.
        identity: What the state belongs to.
        settings: The section ``finetune``.
        ranks: The processes that train together; the first one writes.
        observe: Called after every epoch with the progress and the number of epochs.
        watch: Called after every step with its number and the number of steps in an epoch.
    """

    def __init__(
        self,
        run: RunFolder,
        path: Path,
        identity: Mapping[str, Any],
        settings: FinetuneConfig,
        ranks: Ranks,
        observe: Callable[[Progress, int], None],
        watch: Callable[[int, int], None],
    ) -> None:
        self._run, self._path, self._identity, self._settings = run, path, dict(identity), settings
        self._ranks, self._observe, self._watch = ranks, observe, watch
        self._saved = time.monotonic()

    def after_epoch(self, training: FineTuning) -> None:
        """Save, and tell of the epoch."""
        self.save(training)
        self._observe(training.progress, training.config.epochs)

    def after_step(self, training: FineTuning) -> None:
        """Save, if that is due by the first process's clock."""
        self._watch(training.step, training.steps_an_epoch)
        due = self._ranks.first and time.monotonic() - self._saved >= self._settings.save_seconds
        if self._ranks.any(due)[0]:
            self.save(training)

    def save(self, training: FineTuning) -> None:
        """Write the state and the curves; to be called in all processes at once.

        Raises:
            TrainingError: The loss is no longer a number: what was saved before stays.
            RunError: `steps.csv` is not what was written.
        """
        training.check_finite()
        state, taken = training.state(), training.take_steps()
        self._saved = time.monotonic()
        if not self._ranks.first:
            return
        self._write_steps(taken, training.steps_done)
        if training.progress.history:
            write_history(self._run, history_frame(training.progress.history))
        with replacing(self._path) as aside:
            torch.save({"identity": self._identity, **state}, aside)

    def _write_steps(self, taken: Sequence[tuple[int, int, Any, float]], done: int) -> None:
        """`steps.csv`: what is known, without what a process that was killed did after its last state."""
        path = self._run.path / STEPS
        rows = pd.DataFrame([(e + 1, s + 1, float(loss), lr) for e, s, loss, lr in taken], columns=_COLUMNS)
        before = _read_steps(path) if path.is_file() else rows.iloc[:0]
        if taken or not done:
            first = (taken[0][0] + 1, taken[0][1] + 1) if taken else (1, 1)
            before = before[[(e, s) < first for e, s in zip(before["epoch"], before["step"], strict=True)]]
        parts = [part for part in (before, rows) if len(part)]
        write_text(path, (pd.concat(parts) if parts else rows).to_csv(index=False))


def _read_steps(path: Path) -> pd.DataFrame:
    try:
        found = pd.read_csv(path)
        found[["epoch", "step"]] = found[["epoch", "step"]].astype("int64")
        return found[_COLUMNS]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"the losses of the steps so far cannot be read: {type(error).__name__}: {error}",
            expected=f"the columns {', '.join(_COLUMNS)}, as they were written",
            where=str(path),
            fix="move the file away: a new one is begun",
        ) from error


def check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError unless it is a fine-tuning's state."""
    names = ("model", "optimizer", "scheduler", "scaler", "progress", "best", "log")
    parts: dict[str, type] = {**dict.fromkeys(names, dict), "norms": list, "rates": list}
    parts |= dict.fromkeys(("step", "chunk", "cases_a_step"), int)
    for name, kind in parts.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"its {name!r} is {type(state.get(name)).__name__}")
    if missing := {"ema", "class_weights", "seconds"} - set(state):
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    check_progress(state["progress"])
