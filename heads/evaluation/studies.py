"""A study's folder: many trainings on the same splits, each in a run folder of its own."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from featstore.cohort.splits import Split, read_split, save_split
from featstore.errors import FeatstoreError, first_line
from heads.config import Config
from heads.evaluation.named import made_at_once
from heads.evaluation.runs import (
    STUDY,
    RunError,
    RunFolder,
    held,
    new_folder,
    read_config,
    read_description,
    write_config,
    write_json,
)

Status = Literal["finished", "failed", "interrupted", "missing", "damaged"]


@dataclass(frozen=True)
class StudyFolder:
    """The paths of a study."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole config, resolved; its seed is the first training's."""
        return self.path / "config.yaml"

    @property
    def about(self) -> Path:
        """What is trained on what, and which folds and seeds there are."""
        return self.path / STUDY

    @property
    def splits(self) -> Path:
        """The folder of ``data_splits_01.npz`` …, that every training reads."""
        return self.path / "splits"

    def split(self, fold: int) -> Path:
        """The split of a fold, counted from 0."""
        return self.splits / f"data_splits_{fold + 1:02d}.npz"

    def training(self, fold: int, seed: int) -> RunFolder:
        """The run folder of one training."""
        return RunFolder(self.path / "trainings" / f"fold_{fold}_seed_{seed}")

    @contextmanager
    def training_held(self, fold: int, seed: int) -> Iterator[None]:
        """Keep other processes from this training; raises RunError if one is at it."""
        with self.locked(f"fold_{fold}_seed_{seed}", "training here"):
            yield

    @property
    def locks(self) -> Path:
        """The files that are locked while something is at work."""
        return self.path / "locks"

    @contextmanager
    def locked(self, name: str, doing: str) -> Iterator[None]:
        """Hold a lock of this folder: not one in the folder of what is done, which may be removed."""
        self.locks.mkdir(exist_ok=True)
        with held(self.locks, doing, name=name):
            yield

    def failure(self, fold: int, seed: int) -> Path:
        """What went wrong in a training; there only if something did."""
        return self.training(fold, seed).path / "failed.json"

    def status(self, fold: int, seed: int) -> Status:
        """How far a training is, by which files there are; `study_results.checked_status` reads them."""
        run = self.training(fold, seed)
        if self.failure(fold, seed).is_file():
            return "failed"
        if run.finished:
            return "finished"
        return "interrupted" if run.last.is_file() and run.about.is_file() else "missing"

    def error(self, fold: int, seed: int) -> str:
        """The first line of what went wrong in a training that failed."""
        try:
            found = json.loads(self.failure(fold, seed).read_text(encoding="utf-8"))
            return str(found["error"])
        except (OSError, ValueError, KeyError, TypeError):
            return "failed.json cannot be read"


@dataclass(frozen=True)
class Study:
    """A study as it was begun.

    Attributes:
        folder: Its paths.
        config: Resolved (`heads.config.resolved`).
        about: Classes, labels, store, as of a run; ``folds`` and ``seeds``.
    """

    folder: StudyFolder
    config: Config
    about: dict[str, Any]

    @property
    def folds(self) -> list[int]:
        """From 0, as the files of the splits are numbered."""
        return list(self.about["folds"])

    @property
    def seeds(self) -> list[int]:
        """One after the other."""
        return list(self.about["seeds"])

    @property
    def size(self) -> str:
        """`3 folds × 2 seeds`."""
        folds, seeds = len(self.folds), len(self.seeds)
        return f"{'1 split' if folds == 1 else f'{folds} folds'} × {counted(seeds, 'seed')}"

    @property
    def trainings(self) -> list[tuple[int, int]]:
        """Fold and seed of every training, in the order of their turn: seed by seed."""
        return [(fold, seed) for seed in self.seeds for fold in self.folds]

    def config_of(self, fold: int, seed: int) -> Config:
        """The config of one training: with it, the training can be had on its own."""
        mine = {"fold": fold, "seed": seed, "load_splits": str(self.folder.splits.absolute())}
        return self.config.model_copy(update={"train": self.config.train.model_copy(update=mine)})

    def split_of(self, fold: int) -> Split:
        """The split of a fold."""
        split, _ = read_split(
            self.folder.split(fold), list(self.about["labels"]), {}, normalize_cases=False
        )
        return split


def counted(number: int, what: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def create_study(
    runs: Path, config: Config, about: Mapping[str, Any], splits: Mapping[int, Split]
) -> Study:
    """Make ``study_YYYYMMDD_HHMMSS[_suffix]``, which no other process can have made, and begin it.

    Args:
        runs: The folder of runs.
        config: Resolved; ``runs.suffix`` ends the name.
        about: As of a run, with ``folds`` and ``seeds``.
        splits: By fold, from 0.
    """
    folder = StudyFolder(new_folder(runs, "study", config.runs.suffix))
    _fill(folder, config, about, splits)
    return Study(folder, config, dict(about))


def begin_study(path: Path, config: Config, about: Mapping[str, Any], splits: Mapping[int, Split]) -> Study:
    """A study in a folder of this name; if another process was faster, its study.

    Args:
        path: The folder, which is not there.
        config: As of `create_study`.
        about: As of `create_study`.
        splits: As of `create_study`.
    """
    with made_at_once(path) as aside:
        _fill(StudyFolder(aside), config, about, splits)
    return open_study(path.parent, path)


def _fill(
    folder: StudyFolder, config: Config, about: Mapping[str, Any], splits: Mapping[int, Split]
) -> None:
    folder.splits.mkdir()
    for fold, split in splits.items():
        save_split(folder.split(fold), split)
    write_config(folder.config, config)
    write_json(folder.about, about)  # last: with it the folder is a study


def is_study(runs: Path, wanted: Path) -> bool:
    """Whether this path, or folder of runs, is a study."""
    return any((path / STUDY).is_file() for path in (wanted, runs / wanted))


def open_study(runs: Path, wanted: Path) -> Study:
    """A study that was begun.

    Args:
        runs: The folder of runs.
        wanted: A path, or the name of a folder in ``runs``.

    Raises:
        RunError, ConfigError: There is none, or its description is damaged.
    """
    found = [path for path in (wanted, runs / wanted) if (path / STUDY).is_file()]
    if not found:
        run = any((path / "run.json").is_file() for path in (wanted, runs / wanted))
        raise RunError(
            f"{wanted} is {'a single run, and no study' if run else 'no study'}",
            expected=f"a folder that holds {STUDY}",
            where=str(wanted),
            fix=f"featstore evaluate {wanted}" if run else f"choose one of the folders study_… in {runs}",
        )
    folder = StudyFolder(found[0])
    about = read_description(folder.about)
    lists = [about.get(name) for name in ("folds", "seeds")]
    if not all(isinstance(found, list) and found and set(map(type, found)) == {int} for found in lists):
        raise RunError(
            "the study's description lacks its folds or seeds",
            expected=f"{STUDY} as `featstore train-head --seeds` wrote it",
            where=str(folder.about),
            fix="bring the file back, or train again",
        )
    return Study(folder, read_config(RunFolder(folder.path)), about)


def record_failure(folder: StudyFolder, fold: int, seed: int, error: BaseException) -> str:
    """Write ``failed.json`` into a training's folder.

    Returns:
        The error's first line.
    """
    line = first_line(error)
    if not isinstance(error, FeatstoreError):  # a plugin's, or torch's: the kind is half the message
        line = f"{type(error).__name__}: {line}"
    path = folder.failure(fold, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = "" if isinstance(error, FeatstoreError) else "".join(traceback.format_exception(error))
    write_json(path, {"error": line, "message": str(error), "traceback": shown})
    return line


def clear_training(folder: StudyFolder, fold: int, seed: int) -> RunFolder:
    """An empty run folder in place of what a failed or hardly begun training left."""
    run = folder.training(fold, seed)
    if run.path.exists():
        shutil.rmtree(run.path)
    (run.path / "checkpoints").mkdir(parents=True)
    return run
