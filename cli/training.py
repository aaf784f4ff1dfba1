"""Commands about heads: split, train-head, evaluate, compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError

from cli.line import COHORT, command
from featstore.config import SplitConfig
from featstore.errors import ConfigError
from featstore.flags import Call
from heads.config import Config

if TYPE_CHECKING:
    from heads.evaluation.study_report import StudyReport
    from heads.training.loop import Progress as TrainingProgress


@command((*COHORT, "split"))
def split(call: Call[Config]) -> None:
    """Split the cases: stratified, groups together, into files that trainings share."""
    from featstore.project import split_project

    written = split_project(call.config, call.project)
    call.answer(written)


def _train_flags(own: dict[str, Any]) -> dict[str, Any]:
    """What `--gpu` and `--folds` of train-head stand for."""
    if own["folds"] is not None:
        try:
            SplitConfig(folds=own["folds"])
        except ValidationError as error:  # of split.folds, a name that nobody typed
            raise ConfigError(
                f"--folds is {own['folds']}",
                expected=error.errors()[0]["msg"].removeprefix("Input should be "),
                where="--folds",
                fix="--folds 5; or one split and many seeds: leave out --folds, --seeds 10",
            ) from error
    device = {"train": {"device": "cuda"}} if own["gpu"] else {}
    return device | ({"split": {"folds": own["folds"]}} if own["folds"] is not None else {})


@command(("head", "train", "runs"), presets=_train_flags)
def train_head(
    call: Call[Config],
    folds: int | None = typer.Option(None, help="a study of so many folds, each of them trained"),
    seeds: int | None = typer.Option(None, help="a study of so many trainings a fold: seed, seed + 1, …"),
    gpu: bool = typer.Option(False, "--gpu", help="insist on a GPU (--device cuda)"),
    resume: Path | None = typer.Option(None, help="go on with this run or study, by its own settings"),
) -> None:
    """Train a head on the store and evaluate it on the test cases, into a new run folder.

    With --folds or --seeds: a study, many trainings on the same splits in one folder.
    """
    from heads.evaluation.studies import is_study
    from heads.project import train_project

    config, project = call.config, call.project
    study = folds is not None or seeds is not None
    if resume is not None and is_study(project / config.runs.path, resume):
        from heads.study import resume_study

        if study:
            raise ConfigError(
                "--folds or --seeds with --resume",
                expected="a study is resumed with the folds and seeds that it was begun with",
                where="train-head",
                fix=f"featstore train-head --resume {resume}",
            )
        _answer_study(call, resume_study(config, project, resume, call.tell))
        return
    if study:
        from heads.study import study_project

        if resume is not None:
            raise ConfigError(
                f"--folds or --seeds with --resume, and {resume} is no study",
                expected="one or the other",
                where="train-head",
                fix="leave out --resume to begin a study",
            )
        _answer_study(call, study_project(config, project, folds, 1 if seeds is None else seeds, call.tell))
        return

    def show(progress: TrainingProgress, epochs: int) -> None:
        row = progress.history[-1]
        rate = "penalty" if "penalty" in row else "lr"  # of a head that is solved, not stepped
        call.tell(
            f"epoch {progress.epoch:3}/{epochs}  loss {row['train_loss']:.4f}  "
            f"val {row['val_cross_entropy']:.4f}  AUC {row['val_auc']:.3f}  {rate} {row[rate]:.2g}  "
            f"{row['seconds']:.2f} s{'  best' if progress.best_epoch == progress.epoch else ''}"
        )

    call.answer(train_project(config, project, resume, call.tell, show))


def _answer_study(call: Call[Config], report: StudyReport) -> None:
    """Show it; exit code 1 if a training failed."""
    call.answer(report)
    if report.failed:
        raise typer.Exit(1)


@command(("runs",))
def evaluate(
    call: Call[Config],
    run: Path | None = typer.Argument(None, help="run folder (default: the newest finished one)"),
    part: str = typer.Option("test", help="cases to evaluate: test | val | train"),
    study: Path | None = typer.Option(None, help="write the tables and pictures of this study anew"),
) -> None:
    """Evaluate a run again, its best and its last epoch, from the checkpoints alone."""
    if study is not None:
        from heads.study import evaluate_study

        if run is not None or part != "test":
            raise ConfigError(
                "--study with a run or a part",
                expected="one or the other: a study is laid together from its trainings' test cases",
                where="evaluate",
                fix=f"featstore evaluate --study {study}",
            )
        call.answer(evaluate_study(call.config, call.project, study, call.tell))
        return
    from heads.project import evaluate_project

    done = evaluate_project(call.config, call.project, run, part, call.tell)
    call.answer(done)


@command(("runs",))
def compare(
    call: Call[Config],
    a: Path = typer.Argument(..., help="a run or a study"),
    b: Path = typer.Argument(..., help="another"),
    ensemble: bool = typer.Option(
        False, "--ensemble", help="studies: by the mean probability of the seeds, not by their mean metrics"
    ),
    csv: Path | None = typer.Option(None, help="write the differences to this table"),
) -> None:
    """Compare two runs or studies on the cases that both have, by a paired bootstrap."""
    from heads.evaluation.compare import compare as compare_both
    from heads.evaluation.compare import read_contender

    given = call.config.runs
    runs = call.project / given.path
    first, second = (read_contender(runs, each, ensemble, given, call.tell) for each in (a, b))
    done = compare_both(first, second, given.resamples)
    if csv is not None:
        done.write_csv(csv)
    call.answer(done)
