"""From steps and settings to jobs: their order, what each waits for, what it runs and asks for."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from featstore.errors import ConfigError
from heads.cluster.checks import check_option, check_text, check_time
from heads.cluster.config import SMALL, SlurmConfig, Step
from heads.cluster.scripts import Job
from heads.cluster.study_size import StudySize
from heads.config import Config
from heads.evaluation.named import named_folder

STEPS: tuple[Step, ...] = get_args(Step)  # in the order in which they run
# What a step needs; where that is not submitted along with it, what that needs. Tuning and a study need
# the same of the store, and nothing of each other.
_NEEDS: dict[Step, Step] = {
    "extract": "check",
    "verify": "extract",
    "tune": "verify",
    "study": "verify",
    "collect": "study",
    "finetune": "collect",
    "vae": "check",
}
_WITH_GPU_FLAG = ("extract", "tune", "study", "finetune", "vae")


@dataclass(frozen=True)
class Asked:
    """What is to be submitted, and where it runs.

    Attributes:
        config: The project's settings.
        project: The folder, absolute.
        settings: The file of the frozen settings, absolute.
        name: Of the folders in runs that the jobs make, or go on with.
        study: The study's size; None where it is no step.
        resume: The folder of the study that is gone on with; None: a new one.
        run: Where fine-tuning starts.
    """

    config: Config
    project: Path
    settings: Path
    name: str
    study: StudySize | None = None
    resume: Path | None = None
    run: Path | None = None

    @property
    def study_folder(self) -> Path:
        """Of the study that is begun or gone on with."""
        runs = self.project / self.config.runs.path
        return self.resume or named_folder(runs, "study", self.name)


@dataclass(frozen=True)
class Planned:
    """A job to be submitted.

    Attributes:
        job: What its script is made of.
        options: Of `sbatch`: all that may hold anything, a word each.
        after: The step that it waits for; None: it need not wait.
        whatever: Whether it begins even if that has failed.
    """

    job: Job
    options: tuple[str, ...]
    after: Step | None
    whatever: bool


def ordered(steps: Sequence[str]) -> list[Step]:
    """The steps in the order in which they run.

    Raises:
        ConfigError: There are none, or one is unknown or given twice.
    """
    known = ", ".join(STEPS)
    if not steps:
        raise ConfigError(
            "no step is named",
            expected=f"some of {known}",
            where="submit",
            fix="featstore submit extract verify",
        )
    for step in steps:
        if step not in STEPS:
            raise ConfigError(
                f"there is no step {step!r}", expected=f"some of {known}", where="submit", fix="choose one"
            )
        if steps.count(step) > 1:
            raise ConfigError(
                f"the step {step} is named {steps.count(step)} times",
                expected=f"some of {known}, each once",
                where="submit",
                fix="name it once",
            )
    return [step for step in STEPS if step in steps]


def plan(asked: Asked, steps: Sequence[Step]) -> list[Planned]:
    """The jobs of some steps, in order.

    Raises:
        ConfigError: A setting cannot be handed to SLURM.
    """
    return [_planned(asked, step, steps) for step in steps]


def _planned(asked: Asked, step: Step, steps: Sequence[Step]) -> Planned:
    settings = _settings(asked.config.slurm, step)
    check_time(settings, step)
    words, tasks = _words(asked, step)
    common = ("--project", str(asked.project), "--config", str(asked.settings), "--only-config")
    gpu = ("--gpu",) if settings.gpus and step in _WITH_GPU_FLAG else ()
    command, *rest = words
    job = Job(
        step=step,
        name=f"{step}-featstore",
        words=(command, *common, *gpu, *rest),
        settings=settings,
        tasks=tasks and tasks + (f"%{settings.at_once}" if settings.at_once else ""),
        launcher=launcher(settings),
    )
    for word in (*job.launcher, *job.words):
        check_text(word)
    after: Step | None = _NEEDS.get(step)
    while after is not None and after not in steps:
        after = _NEEDS.get(after)
    # A study of which some trainings failed is collected all the same: its tables name them.
    whatever = step == "collect" and after == "study"
    return Planned(job, _options(asked, step, settings, tasks), after, whatever)


def _settings(slurm: SlurmConfig, step: Step) -> SlurmConfig:
    """What a step's jobs ask for."""
    settings = slurm.of(step)
    if step not in SMALL:
        return settings
    own = slurm.steps.get(step)
    small = {name: value for name, value in (("cpus", 1), ("gpus", 0)) if getattr(own, name, None) is None}
    return settings.model_copy(update=small)


def _words(asked: Asked, step: Step) -> tuple[tuple[str, ...], str | None]:
    """A step's words of featstore, and its array."""
    slurm, named = asked.config.slurm, ("--as", asked.name)
    if step == "extract":
        return ("extract", "--shard", f"auto/{slurm.shards}"), f"0-{slurm.shards - 1}"
    if step == "tune":
        return ("tune", *named), f"0-{slurm.tuners - 1}"
    if step == "study":
        assert asked.study is not None
        return _study_words(asked, asked.study), asked.study.array
    if step == "collect":
        return ("evaluate", "--study", str(asked.study_folder)), None
    if step == "finetune":
        return ("finetune", *named, *([str(asked.run)] if asked.run else [])), None
    return ("train-vae", *named) if step == "vae" else (step,), None


def _study_words(asked: Asked, size: StudySize) -> tuple[str, ...]:
    task = ("--task", f"auto/{size.tasks}")
    if asked.resume is not None:
        return ("train-head", "--resume", str(asked.resume), *task)
    folds = ("--folds", str(len(size.folds))) if len(size.folds) > 1 else ()
    return ("train-head", "--as", asked.name, *folds, "--seeds", str(size.seeds), *task)


def launcher(settings: SlurmConfig) -> tuple[str, ...]:
    """How a job calls featstore, a word each.

    Raises:
        ConfigError: ``slurm.command`` is no command.
    """
    if settings.command == "auto":
        here = Path(sys.executable).with_name("featstore")
        return ("featstore",) if settings.setup or not here.is_file() else (str(here),)
    try:
        words = tuple(shlex.split(settings.command))
    except ValueError as error:
        words, reason = (), f" ({error})"
    else:
        reason = ""
    if not words:
        raise ConfigError(
            f"slurm.command is {settings.command!r}{reason}",
            expected="a command and its words, those with spaces in quotes",
            where="slurm.command",
            fix="slurm.command: auto, or apptainer exec lab.sif featstore",
        )
    return words


def _options(asked: Asked, step: Step, settings: SlurmConfig, tasks: str | None) -> tuple[str, ...]:
    """The options of `sbatch` that may hold anything: no shell reads them."""
    log = f"{step}-{'%A_%a' if tasks else '%j'}.log"
    folder = asked.project / asked.config.slurm.logs
    given: dict[str, Any] = {
        "chdir": str(asked.project),
        "output": f"{_pattern(folder)}/{log}",
        "account": settings.account,
        "partition": settings.partition,
        "qos": settings.qos,
        "mail-user": settings.mail_user,
        "mail-type": settings.mail_type if settings.mail_user else None,
    }
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    if settings.sbatch and not settings.sbatch[0].startswith("-"):
        raise ConfigError(
            f"the first word of slurm.sbatch is {settings.sbatch[0]!r}",
            expected="options of sbatch, a word each; sbatch would take this one for the script",
            where="slurm.sbatch",
            fix="slurm.sbatch: ['--constraint=a100']",
        )
    words += settings.sbatch
    for word in words:
        check_option(word)
    return tuple(words)


def _pattern(folder: Path) -> str:
    """A folder in a file pattern of SLURM, in which `%` means something, and a backslash cannot be.

    Raises:
        ConfigError: It holds one.
    """
    if "\\" in str(folder):
        raise ConfigError(
            f"the folder of the logs is {str(folder)!r}",
            expected="a path without a backslash: with one, SLURM puts no job's number into a file's name",
            where="slurm.logs, --project",
            fix="slurm.logs: another folder",
        )
    return str(folder).replace("%", "%%")
