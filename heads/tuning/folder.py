"""A tuning's folder: its paths, what it was begun with, and its beginning."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featstore.cohort.names import natural_sorted
from featstore.cohort.splits import Split, save_split
from heads.config import Config
from heads.evaluation.named import made_at_once
from heads.evaluation.runs import (
    RunError,
    RunFolder,
    new_folder,
    read_config,
    read_description,
    write_config,
    write_json,
)
from heads.evaluation.studies import Study, StudyFolder
from heads.tuning.given import with_given

ABOUT = "tune.json"  # what makes a folder a tuning
_TRIAL = "trial_"  # how the names of the trials' locks begin


@dataclass(frozen=True)
class TuneFolder(StudyFolder):
    """The paths of a tuning; its final trainings are those of a study."""

    @property
    def about(self) -> Path:
        """What is tuned on what: classes, labels, store, outer and inner folds."""
        return self.path / ABOUT

    @property
    def journal(self) -> Path:
        """Every trial and every value, unless a database holds them."""
        return self.path / "journal.log"

    @property
    def turn(self) -> Path:
        """Held by the worker that takes its next task."""
        return self.path / ".turn.lock"

    @property
    def writing(self) -> Path:
        """Held by the worker that writes the report."""
        return self.path / ".writing.lock"

    @property
    def summary(self) -> Path:
        """Written last: with it the tuning is finished."""
        return self.path / "tuning.json"

    def outer(self, fold: int) -> Path:
        """What is found for an outer fold."""
        return self.path / f"outer_{fold}"

    def trial(self, fold: int, number: int) -> Path:
        """The state of a trial that is at work; only who holds the trial makes and removes it."""
        return self.path / "trials" / f"{fold}_{number}"

    @contextmanager
    def trial_held(self, fold: int, number: int) -> Iterator[None]:
        """Keep other workers from this trial; raises RunError if one is at it."""
        with self.locked(f"{_TRIAL}{fold}_{number}", "at this trial"):
            yield

    def drop_trials(self) -> None:
        """Remove what trials needed while they were at work; for who holds `turn`, when all have ended."""
        shutil.rmtree(self.path / "trials", ignore_errors=True)
        for lock in self.locks.glob(f"{_TRIAL}*"):
            lock.unlink(missing_ok=True)

    def training(self, fold: int, seed: int) -> RunFolder:
        """The run folder of one training of the winner."""
        return RunFolder(self.outer(fold) / f"final_seed_{seed}")


@dataclass(frozen=True)
class Tuning:
    """A tuning as it was begun.

    Attributes:
        folder: Its paths.
        config: The project's settings then, with ``auto`` where it is left to the head.
        about: As of a study; ``inner``: by outer fold the validation cases of every inner fold; ``id``;
            ``given``: the settings that somebody gave.
    """

    folder: TuneFolder
    config: Config
    about: dict[str, Any]

    @property
    def folds(self) -> list[int]:
        """The outer folds, from 0."""
        return list(self.about["folds"])

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Whether less or more is better."""
        return "minimize" if self.config.tune.objective == "val_loss" else "maximize"

    def study(self, config: Config | None = None) -> Study:
        """The final trainings as a study, of the winner's settings or, to be read, of any."""
        return Study(self.folder, config or self.config, self.about)

    def inner(self, fold: int) -> list[Split]:
        """The inner folds of an outer one; their test part is empty."""
        outer = self.study().split_of(fold)
        pool = natural_sorted([*outer.train, *outer.val])
        return [
            Split(tuple(case for case in pool if case not in set(val)), tuple(val), ())
            for val in self.about["inner"][str(fold)]
        ]


def create_tuning(
    runs: Path,
    path: Path | None,
    config: Config,
    about: Mapping[str, Any],
    outer: Mapping[int, Split],
    inner: Mapping[int, Sequence[Split]],
) -> Tuning:
    """Make a tuning's folder and begin it; if another process was faster, open that one's.

    Args:
        runs: The folder of runs.
        path: The folder; None: ``tune_YYYYMMDD_HHMMSS[_suffix]``.
        config: The project's settings, not resolved.
        about: As of a run, with ``folds``, ``seeds`` and ``given``.
        outer: Outer splits by fold.
        inner: Inner splits by outer fold.
    """
    whole = {
        **about,
        "id": secrets.token_hex(6),
        "inner": {str(fold): [list(split.val) for split in splits] for fold, splits in inner.items()},
    }
    if path is None:
        path = new_folder(runs, "tune", config.runs.suffix)
        _fill(TuneFolder(path), config, whole, outer)
    else:
        with made_at_once(path) as aside:
            _fill(TuneFolder(aside), config, whole, outer)
    return open_tuning(path)


def _fill(folder: TuneFolder, config: Config, about: Mapping[str, Any], outer: Mapping[int, Split]) -> None:
    folder.splits.mkdir()
    (folder.path / "trials").mkdir()
    folder.locks.mkdir()
    for fold, split in outer.items():
        save_split(folder.split(fold), split)
        folder.outer(fold).mkdir()
    write_config(folder.config, config)
    write_json(folder.about, about)  # last: with it the folder is a tuning


def is_tuning(path: Path) -> bool:
    """Whether a tuning was begun in this folder."""
    return (path / ABOUT).is_file()


def open_tuning(path: Path) -> Tuning:
    """A tuning that was begun.

    Raises:
        RunError, ConfigError: Its description or settings are damaged.
    """
    folder = TuneFolder(path)
    about = read_description(folder.about)
    kinds = {"folds": list, "seeds": list, "inner": dict, "given": list, "id": str}
    whole = all(isinstance(about.get(name), kind) for name, kind in kinds.items())
    if not whole or {str(fold) for fold in about["folds"]} != set(about["inner"]):
        raise RunError(
            "the tuning's description lacks its folds",
            expected=f"{ABOUT} as `featstore tune` wrote it",
            where=str(folder.about),
            fix="bring the file back, or tune again",
        )
    return Tuning(folder, with_given(read_config(RunFolder(path)), about["given"]), about)
