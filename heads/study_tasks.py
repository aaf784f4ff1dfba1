"""What `train-head` is asked for, and the share of a study that one task of an array does."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.errors import ConfigError
from featstore.extraction.shards import Shard, parse_shard
from heads.evaluation.named import check_not_both, named_folder
from heads.evaluation.studies import Study, counted, is_study
from heads.study_trainings import Outcome

_SEEDS = 2**32


@dataclass(frozen=True)
class Asked:
    """What `train-head` is asked for besides its settings.

    Attributes:
        folds: A study of so many folds; None: of those that there are.
        seeds: A study of so many trainings a fold.
        resume: A run or a study to go on with.
        name: Of the folder (``--as``): begun if it is not there, gone on with if it is.
        task: ``I/N`` or ``auto/N``: only this share of a study's trainings.
    """

    folds: int | None = None
    seeds: int | None = None
    resume: Path | None = None
    name: str | None = None
    task: str | None = None

    @property
    def of_a_study(self) -> bool:
        """Whether a new folder would be a study's."""
        return self.folds is not None or self.seeds is not None or self.task is not None

    def count_seeds(self, first: int) -> int:
        """How many trainings each fold gets.

        Args:
            first: The first seed.

        Raises:
            ConfigError: There are none, or not so many seeds.
        """
        seeds = 1 if self.seeds is None else self.seeds
        if not 1 <= seeds <= _SEEDS - first:
            raise ConfigError(
                f"--seeds is {seeds}",
                expected="how many trainings each fold gets, 1 or more; seeds lie below 2**32",
                where="--seeds, train.seed",
                fix="--seeds 10",
            )
        return seeds

    @property
    def shard(self) -> Shard | None:
        """This task's share; None: the whole study.

        Raises:
            ConfigError: It is none.
        """
        return None if self.task is None else parse_shard(self.task, "--task", "--task")

    def existing_study(self, runs: Path) -> Path | None:
        """The study that is gone on with; None if there is none yet, or it is a single run.

        Args:
            runs: The folder of runs.

        Raises:
            ConfigError: These do not go together.
        """
        check_not_both(self.resume, self.name)
        if self.resume is None and self.name is None and self.task is not None:
            raise ConfigError(
                f"--task {self.task} without a study's name",
                expected="a name that all tasks share",
                where="--task, --as",
                fix=f"--as first --task {self.task}; or --resume STUDY --task {self.task}",
            )
        if self.name is not None:
            path = named_folder(runs, "study", self.name)
            return path if self.of_a_study and is_study(runs, path) else None
        if self.resume is None:
            return None
        begun = is_study(runs, self.resume)
        if self.of_a_study and not (begun and self.folds is None and self.seeds is None):
            raise ConfigError(
                "--folds, --seeds or --task with --resume"
                + ("" if begun else f", and {self.resume} is no study"),
                expected="a study is resumed with the folds and seeds that it was begun with"
                if begun
                else "one or the other",
                where="train-head",
                fix=f"featstore train-head --resume {self.resume}"
                if begun
                else "leave out --resume to begin a study",
            )
        return self.resume if begun else None

    def check_same(self, study: Study) -> None:
        """Raises ConfigError if other folds or seeds are asked for than the study was begun with."""
        for flag, asked, there in (
            ("--folds", self.folds, len(study.folds)),
            ("--seeds", self.seeds, len(study.seeds)),
        ):
            if asked not in (None, there):
                raise ConfigError(
                    f"{flag} is {asked}, but {study.folder.path.name} was begun with {there}",
                    expected=f"{study.size}, as it was begun",
                    where=str(study.folder.path),
                    fix=f"leave out {flag}, or begin another study under another name",
                )


def share_of(study: Study, shard: Shard | None) -> list[tuple[int, int]]:
    """Fold and seed of the trainings of a task, every ``count``-th: the same whoever asks, whenever."""
    return study.trainings if shard is None else study.trainings[shard.index :: shard.count]


@dataclass(frozen=True)
class TaskReport:
    """What one task of an array did.

    Attributes:
        study: The study.
        shard: The task's share.
        size: How many trainings that is.
        todo: How many of them were still to do.
        outcomes: Of those that were begun.
        interrupted: The signal that ended the task early; None if none did.
    """

    study: Study
    shard: Shard
    size: int
    todo: int
    outcomes: Sequence[Outcome]
    interrupted: int | None = None

    @property
    def exit_code(self) -> int:
        """1 if a training failed, or is another process's."""
        return int(any(each.status != "finished" for each in self.outcomes))

    def to_text(self) -> str:
        """How many trainings ended how, and what comes next."""
        counts = Counter(each.status for each in self.outcomes)
        done = self.size - len(self.outcomes) + counts["finished"]
        others = "".join(
            f", {count} {name}" for name, count in sorted(counts.items()) if name != "finished"
        )
        path = self.study.folder.path
        lines = [
            f"task {self.shard.index}/{self.shard.count} of {path}: "
            f"{done} of {counted(self.size, 'training')} finished{others}"
        ]
        if self.interrupted is not None:
            lines.append("to go on: the same command")
        lines.append(f"when all tasks have ended: featstore evaluate --study {shlex.quote(str(path))}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        return {
            "study": str(self.study.folder.path),
            "task": [self.shard.index, self.shard.count],
            "trainings": [
                {"fold": each.fold, "seed": each.seed, "status": each.status, "text": each.text}
                for each in self.outcomes
            ],
            "interrupted": self.interrupted,
        }
