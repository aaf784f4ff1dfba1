"""The winner of an outer fold: its settings, as a file that `train-head --config` takes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from heads.config import Config
from heads.evaluation.config_file import config_text
from heads.evaluation.runs import write_text
from heads.evaluation.studies import Study
from heads.tuning.folder import Tuning
from heads.tuning.given import value_of
from heads.tuning.space import HEAD, Space

BEST = "best.yaml"


@dataclass(frozen=True)
class Winner:
    """The best trial of an outer fold.

    Args:
        tuning: What was tuned.
        space: What was searched over.
        fold: The outer fold.
        trial: The best one.
    """

    tuning: Tuning
    space: Space
    fold: int
    trial: FrozenTrial

    @property
    def settings(self) -> dict[str, Any]:
        """The tuned settings by their path, the head included."""
        return self.space.settings(self.trial.params)

    def study(self) -> Study:
        """Its final trainings: on the outer split, with every seed."""
        return self.tuning.study(self.space.config(self.trial.params))

    def write(self, project: Path, head: str) -> None:
        """Write ``best.yaml`` of the outer fold, and beside the folds where this is the only one.

        Args:
            project: The folder that relative paths start from.
            head: Lines that say where the settings come from.
        """
        text = "".join(f"# {line}\n" for line in head.splitlines()) + "\n" + self._yaml(project)
        folders = [self.tuning.folder.outer(self.fold)]
        if len(self.tuning.folds) == 1:
            folders.append(self.tuning.folder.path)
        for folder in folders:
            if not (folder / BEST).is_file() or (folder / BEST).read_text(encoding="utf-8") != text:
                write_text(folder / BEST, text)

    def _yaml(self, project: Path) -> str:
        """What was tuned, what was given when the tuning began, and the split; nothing else."""
        config = self.space.config(self.trial.params)
        splits = self.tuning.folder.splits.absolute()
        inside = splits.is_relative_to(project.absolute())
        values: dict[str, Any] = {"head": {}, "train": {}}
        # What `auto` stood for on the first machine is a setting like any other.
        wanted = [HEAD, *self.settings, *self.tuning.about["given"], "train.amp"]
        for path in dict.fromkeys(wanted):
            section, _, key = path.rpartition(".")
            held = values.setdefault(section, {}) if section else values
            held[key] = value_of(config, path)
        values["train"] |= {
            "load_splits": os.path.relpath(splits, project.absolute()) if inside else str(splits),
            "fold": self.fold,
        }
        return config_text(Config.model_validate(values), only_given=True)
