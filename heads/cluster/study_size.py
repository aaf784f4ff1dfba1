"""How many trainings a study has, how many of them one task does, and which tasks are still to do."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from featstore.errors import ConfigError, FeatstoreError
from featstore.extraction.shards import Shard
from featstore.store import Store
from heads.config import Config
from heads.evaluation.studies import Status, Study, counted, open_study
from heads.evaluation.study_results import left
from heads.splits import study_files, with_folds
from heads.study_tasks import Asked, share_of

_MOST = 100_000  # trainings of a study: far more is a slip of the keyboard
_TASK_SECONDS = 600.0  # of a task: far more than it takes to start it
# A study of 50 trainings, 30 epochs, 64,526 patches of 1024 features took 711 s on two cores
# (BENCHMARKS.md, bench_study.py): 7e7 numbers a core and second, evaluation and pictures included.
_NUMBERS_PER_CORE_SECOND = 7e7
_AT_LEAST_SECONDS = 4.0  # of a training, however small: its pictures
_UNKNOWN = 5  # trainings a task, where there is no store yet


@dataclass(frozen=True)
class StudySize:
    """The trainings of a study, and how tasks share them.

    Attributes:
        folds: Which ones, from 0.
        seeds: How many trainings a fold.
        tasks: How many tasks: the N of ``--task I/N``.
        todo: The numbers of those that have something to do.
        why: How it was decided how many there are.
    """

    folds: tuple[int, ...]
    seeds: int
    tasks: int
    todo: tuple[int, ...]
    why: str

    @property
    def array(self) -> str:
        """As ``--array`` takes it: all of them as a range, else one by one."""
        if self.todo == tuple(range(self.tasks)):
            return f"0-{self.tasks - 1}"
        return ",".join(map(str, self.todo))


def new_study(config: Config, project: Path, folds: int | None, seeds: int | None) -> StudySize:
    """The size of a study that is to be begun.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        folds: How many are asked for; None: of the split files, else of the settings.
        seeds: How many trainings a fold; None: one.

    Raises:
        ConfigError: There is no such study.
    """
    count = Asked(folds, seeds).count_seeds(config.train.seed)
    found = _folds(config, project, folds)
    total = len(found) * count
    if total > _MOST:
        raise ConfigError(
            f"{len(found)} folds × {count} seeds are {total:,} trainings",
            expected=f"at most {_MOST:,}",
            where="--folds, --seeds",
            fix="--folds 5 --seeds 10",
        )
    each, why = _per_task(config, project, total)
    tasks = -(-total // each)
    return StudySize(found, count, tasks, tuple(range(tasks)), why)


def resumed_study(config: Config, project: Path, wanted: Path) -> tuple[Study, StudySize, list[str]]:
    """A study that was begun, and the tasks of it that have something to do.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        wanted: The study.

    Returns:
        The study, its size, and a line for each training that is not finished.

    Raises:
        FeatstoreError: It is none.
    """
    study = open_study(project / config.runs.path, wanted)
    missing = left(study)
    each, why = _per_task(config, project, len(study.trainings))
    tasks = -(-len(study.trainings) // each)
    shares = (set(share_of(study, Shard(task, tasks))) for task in range(tasks))
    todo = tuple(task for task, share in enumerate(shares) if share & set(missing))
    size = StudySize(tuple(study.folds), len(study.seeds), tasks, todo, why)
    return study, size, [_line(*each, status) for each, status in missing.items()]


def _line(fold: int, seed: int, status: Status) -> str:
    return f"fold {fold} seed {seed}: {status}"


def _folds(config: Config, project: Path, folds: int | None) -> tuple[int, ...]:
    """The folds of the split files, if there are any; else as many as are asked for."""
    wanted = with_folds(config, folds)
    files = study_files(config, project, folds)
    return tuple(files) if files else tuple(range(wanted.split.folds or 1))


def _per_task(config: Config, project: Path, total: int) -> tuple[int, str]:
    """Trainings a task, and why."""
    wanted = config.slurm.trainings_per_task
    if wanted != "auto":
        return min(wanted, total), "as slurm.trainings_per_task says"
    numbers = _numbers(config, project)
    if numbers is None:
        return min(_UNKNOWN, total), "there is no store yet to tell how long one takes"
    cores = config.slurm.of("study").cpus
    seconds = max(_AT_LEAST_SECONDS, numbers / (_NUMBERS_PER_CORE_SECOND * cores))
    each = max(1, min(total, round(_TASK_SECONDS / seconds)))
    return each, f"at about {seconds:.0f} s a training"


def _numbers(config: Config, project: Path) -> float | None:
    """Numbers that a training reads in all its epochs; None where there is no store."""
    with suppress(FeatstoreError, OSError):
        store = Store.open(project / config.store.path)
        patches = sum(len(store.layout(case).patches) for case in store.cases())
        if patches:
            return float(patches) * store.spec.dim * config.train.epochs
    return None


def sizes_text(size: StudySize) -> str:
    """`3 folds × 2 seeds, 6 trainings in 2 tasks`, for a person."""
    trainings = len(size.folds) * size.seeds
    folds = "1 split" if len(size.folds) == 1 else f"{len(size.folds)} folds"
    return (
        f"{folds} × {counted(size.seeds, 'seed')}: {counted(trainings, 'training')} "
        f"in {counted(size.tasks, 'task')}, {size.why}"
    )
