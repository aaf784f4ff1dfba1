"""`featstore submit`: the steps of a project as jobs of a SLURM cluster, each waiting for what it needs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from featstore.errors import ConfigError
from featstore.project import REPORTS
from heads.cluster.checks import check_logs, check_name
from heads.cluster.config import Step
from heads.cluster.plan import Asked, Planned, ordered, plan
from heads.cluster.sbatch import check_sbatch, sbatch, why_dry
from heads.cluster.scripts import script
from heads.cluster.study_size import new_study, resumed_study, sizes_text
from heads.cluster.submission import Submission, Submitted
from heads.config import Config
from heads.evaluation.config_file import config_text
from heads.evaluation.named import check_not_both, named_folder
from heads.evaluation.runs import find_run, write_json, write_text
from heads.evaluation.studies import is_study, open_study
from heads.study_tasks import Asked as StudyAsked

_FOLDER = Path(REPORTS) / "submit"


def submit_project(
    config: Config,
    project: Path,
    steps: Sequence[str],
    *,
    name: str | None = None,
    folds: int | None = None,
    seeds: int | None = None,
    run: Path | None = None,
    resume: Path | None = None,
    dry_run: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Submission:
    """Submit steps of a project to SLURM.

    Args:
        config: The project's settings, which the jobs are given as they are now.
        project: The folder that relative paths start from.
        steps: Of `heads.cluster.plan.STEPS`, in any order.
        name: Of what the jobs make in runs (``--as`` of their commands), gone on with where it is there;
            by default the time of the submission.
        folds: As of `train-head`.
        seeds: As of `train-head`.
        run: Where fine-tuning starts; by default at the study's first training, else at the newest run.
        resume: A study that was begun: only those of its tasks that have something to do.
        dry_run: Submit and write nothing, and show all.
        tell: Called with remarks, and every command before it is called.

    Raises:
        FeatstoreError: The steps or settings cannot be used; SubmitError if SLURM refuses a job.
    """
    wanted, project = ordered(steps), project.absolute()
    check_not_both(resume, name)
    check_name(name, wanted, project / config.runs.path)
    _check_options(wanted, folds, seeds, run, resume)
    if not dry_run:
        check_sbatch()
    stamp = f"{datetime.now():%Y%m%d_%H%M%S}" + (f"_{name}" if name else "")
    asked = _placed(Asked(config, project, Path(), ""), project / _FOLDER / stamp, name)
    logs = project / config.slurm.logs
    check_logs(logs)
    asked = _with_study(asked, wanted, folds, seeds, resume or _begun(asked, wanted, name), tell)
    if asked.study is not None and not asked.study.todo:
        finished = f"nothing to submit: all trainings of {asked.resume} are finished"
        wanted.remove("study")
        if not wanted:
            tables = shlex.join(["featstore", "evaluate", "--study", str(asked.resume)])
            return Submission(project, None, logs, (), f"{finished}\nfor its tables: {tables}")
        tell(f"study: {finished}")
    asked = replace(asked, run=_start(asked, wanted, run, tell))
    jobs = _jobs(asked, wanted)  # what cannot be submitted is refused before anything is written
    if dry_run:
        folder = asked.settings.parent
        return Submission(project, folder, logs, _shown(jobs, folder), why_dry(folder))
    return _write_and_submit(asked, wanted, run, name, tell)


def _write_and_submit(
    asked: Asked, steps: Sequence[Step], run: Path | None, name: str | None, tell: Callable[[str], None]
) -> Submission:
    """Make the submission's folder, write scripts and settings into it, and hand the jobs to SLURM."""
    folder = _new_folder(asked.settings.parent)
    asked = _placed(asked, folder, name)
    jobs = _jobs(replace(asked, run=_start(asked, steps, run, lambda text: None)), steps)
    logs = asked.project / asked.config.slurm.logs
    logs.mkdir(parents=True, exist_ok=True)
    write_text(asked.settings, config_text(asked.config, only_given=True))
    for planned, text in jobs:
        write_text(folder / f"{planned.job.step}.sbatch", text)
    return _submit(Submission(asked.project, folder, logs, ()), folder, jobs, tell)


def _placed(asked: Asked, folder: Path, name: str | None) -> Asked:
    """With this submission's folder, whose name is that of all that its jobs make, if they have none."""
    return replace(asked, settings=folder / "settings.yaml", name=name or folder.name)


def _begun(asked: Asked, steps: Sequence[Step], name: str | None) -> Path | None:
    """The study of this name, if it was begun."""
    if name is None or "study" not in steps:
        return None
    study = named_folder(asked.project / asked.config.runs.path, "study", name)
    return study if is_study(study.parent, study) else None


def _new_folder(wanted: Path) -> Path:
    """A folder of this name; of two submissions in one second the other one's ends with -2."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            continue
        return path


def _check_options(
    steps: Sequence[Step], folds: int | None, seeds: int | None, run: Path | None, resume: Path | None
) -> None:
    """Raises ConfigError for an option that no step would read."""
    given = {"--folds": folds, "--seeds": seeds, "--resume": resume}
    for flag, value in given.items():
        if value is not None and "study" not in steps:
            raise ConfigError(
                f"{flag} {value} without the step study", where=flag, fix="add the step study"
            )
    if run is not None and "finetune" not in steps:
        raise ConfigError(
            f"--run {run} without the step finetune", where="--run", fix="add the step finetune"
        )
    if resume is not None and (folds is not None or seeds is not None):
        raise ConfigError(
            "--folds or --seeds with --resume",
            expected="a study is resumed with the folds and seeds that it was begun with",
            where="submit",
            fix=f"featstore submit study collect --resume {resume}",
        )
    if "collect" in steps and "study" not in steps:
        raise ConfigError(
            "the step collect without the step study",
            expected="study collect, with --resume STUDY for one that was begun",
            where="submit",
            fix="for its tables alone: featstore evaluate --study STUDY",
        )


def _with_study(
    asked: Asked,
    steps: Sequence[Step],
    folds: int | None,
    seeds: int | None,
    resume: Path | None,
    tell: Callable[[str], None],
) -> Asked:
    """With the study's size, if it is a step."""
    if "study" not in steps:
        return asked
    if resume is None:
        size = new_study(asked.config, asked.project, folds, seeds)
        tell(f"study: {sizes_text(size)}")
        return replace(asked, study=size)
    study, size, missing = resumed_study(asked.config, asked.project, resume)
    StudyAsked(folds, seeds).check_same(study)
    for line in missing:
        tell(line)
    tell(f"{study.folder.path}: {len(missing)} of {len(study.trainings)} trainings to do")
    return replace(asked, study=size, resume=study.folder.path.absolute())


def _start(
    asked: Asked, steps: Sequence[Step], run: Path | None, tell: Callable[[str], None]
) -> Path | None:
    """Where fine-tuning starts: the run that is named, a training of the study, or the newest run."""
    if "finetune" not in steps:
        return None
    runs = asked.project / asked.config.runs.path
    if run is None and asked.study is not None:
        seed = asked.config.train.seed
        if asked.resume is not None:
            seed = open_study(runs, asked.resume).seeds[0]
        start = asked.study_folder / "trainings" / f"fold_{asked.study.folds[0]}_seed_{seed}"
    else:
        start = find_run(runs, run).path.absolute()
    tell(f"finetune: from {start}")
    return start


def _jobs(asked: Asked, steps: Sequence[Step]) -> list[tuple[Planned, str]]:
    return [(each, script(each.job)) for each in plan(asked, steps)]


def _command(planned: Planned, folder: Path, numbers: Mapping[Step, str]) -> tuple[str, ...]:
    """The words of `sbatch` for a job."""
    wait: tuple[str, ...] = ()
    if planned.after is not None:
        kind = "afterany" if planned.whatever else "afterok"
        wait = (f"--dependency={kind}:{numbers[planned.after]}", "--kill-on-invalid-dep=yes")
    return ("sbatch", "--parsable", *planned.options, *wait, str(folder / f"{planned.job.step}.sbatch"))


def _shown(jobs: Sequence[tuple[Planned, str]], folder: Path) -> tuple[Submitted, ...]:
    """The jobs with words in place of the numbers that SLURM would give them."""
    numbers: dict[Step, str] = {each.job.step: f"<id of {each.job.step}>" for each, _ in jobs}
    return tuple(
        Submitted(each.job.step, _command(each, folder, numbers), text, each.job.tasks)
        for each, text in jobs
    )


def _submit(
    submission: Submission,
    folder: Path,
    jobs: Sequence[tuple[Planned, str]],
    tell: Callable[[str], None],
) -> Submission:
    """Hand the jobs to SLURM, and write down each as soon as it is taken."""
    numbers: dict[Step, str] = {}
    for planned, text in jobs:
        command = _command(planned, folder, numbers)
        tell(shlex.join(command))
        number = sbatch(command, list(numbers.values()))
        numbers[planned.job.step] = number
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        done = Submitted(planned.job.step, command, text, planned.job.tasks, number, time)
        submission = replace(submission, jobs=(*submission.jobs, done))
        written = submission.to_json()
        for each in written["jobs"]:
            del each["script"]  # which lies beside it
        write_json(folder / "submission.json", written)
    return submission
