"""`featstore tune`: begin a tuning or go on with it, as one of its workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from featstore.cohort.splits import Split
from featstore.errors import ConfigError
from featstore.process import stop_on_signal
from featstore.resident import CaseBags
from featstore.store import Store
from heads.cohort import check_unchanged, describe, labelled_cases, labels_of, load_bags
from heads.config import Config, resolved
from heads.evaluation.named import named_folder
from heads.evaluation.results import check_threshold
from heads.evaluation.runs import RunFolder
from heads.evaluation.studies import Study, counted
from heads.models.head import load_plugin
from heads.project import on_this_machine, own_config, plugin_of, tell_unused
from heads.run import prepare, settled
from heads.splits import Cohort, choose_split, read_folds
from heads.training.course import TrainingError
from heads.tuning.findings import findings_of, winner_of
from heads.tuning.folder import Tuning, create_tuning, is_tuning, open_tuning
from heads.tuning.folds import check_folds, inner_folds
from heads.tuning.given import given_settings, laid_over
from heads.tuning.locks import exclusive
from heads.tuning.report import TuneReport, best_head, make_report, write_findings
from heads.tuning.space import HEAD, make_space
from heads.tuning.storage import open_database, quiet
from heads.tuning.tasks import Tasks
from heads.tuning.workers import Worker

_SEEDS = 2**32


def tune_project(
    config: Config,
    project: Path,
    name: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> TuneReport:
    """Work on a tuning until nothing of it is left, or others are at the rest.

    Args:
        config: The project's settings; of a tuning that was begun, its own are used.
        project: The folder that relative paths start from.
        name: Of the folder: begun if it is not there, gone on with if it is. None: a new one.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Whatever stands in the way of all trials; one that fails is in the report.
    """
    runs = project / config.runs.path
    path = None if name is None else named_folder(runs, "tune", name)
    if path is not None and is_tuning(path):
        tuning, bags = open_tuning(path), None
        own_config(config, RunFolder(path), tell, ("head", "train", "runs", "tune"))  # tells what differs
        tuning = replace(tuning, config=on_this_machine(tuning.config, config))
        load_plugin(plugin_of(tuning.config, project))
    else:
        tuning, bags = _begin(config, project, path, tell)
    names = tuning.about["class_names"]
    space = make_space(tuning.config, int(tuning.about["dim"]), names)
    with quiet(), stop_on_signal() as received:
        tasks = Tasks(tuning, space, tell)
        if not tasks.left() and tuning.folder.summary.is_file():
            tell(f"{tuning.folder.path} is finished; nothing is done again")
            return make_report(tasks)
        if bags is None:
            bags = _load(tuning, project, tell)
        worker = Worker(tasks, bags, lambda fold: _winner(tasks, fold, project), received, tell)
        worker.work()
        return _finish(tasks, worker, received[0] if received else None)


def _begin(
    config: Config, project: Path, path: Path | None, tell: Callable[[str], None]
) -> tuple[Tuning, CaseBags]:
    """A new tuning, and its cohort; what no trial could do is refused before there is a folder."""
    tune, seed = config.tune, config.train.seed
    if tune.final_seeds > _SEEDS - seed:
        raise ConfigError(
            f"tune.final_seeds is {tune.final_seeds}, from train.seed {seed} on",
            expected="seeds below 2**32",
            where="tune.final_seeds, train.seed",
            fix="a smaller seed",
        )
    if tune.storage is not None:
        with quiet():
            open_database(tune.storage)
    load_plugin(plugin_of(config, project))
    store = Store.open(project / config.store.path)
    cohort = labelled_cases(config, project, store, tell)
    outer = _outer_folds(config, project, cohort, tell)
    inner = {fold: _inner_folds(config, split, cohort) for fold, split in outer.items()}
    space = make_space(config, store.spec.dim, cohort.class_names)
    labels = {k: v for split in outer.values() for k, v in labels_of(split, cohort.labels).items()}
    tell_unused(resolved(config), tell)
    bags = load_bags(config, store, labels, tell)
    given = given_settings(config)
    config = settled(config, bags.device)
    about: dict[str, Any] = describe(bags, cohort.class_names, labels, next(iter(outer.values())))
    del about["cases"]  # which differ by fold
    for head in space.heads:
        prepare(laid_over(config, {HEAD: head}), about, bags, next(iter(inner.values()))[0])
    about |= {"folds": list(outer), "given": given}
    about |= {"seeds": list(range(seed, seed + tune.final_seeds))}
    tuning = create_tuning(project / config.runs.path, path, config, about, outer, inner)
    folds = f", {counted(len(outer), 'outer fold')}" if len(outer) > 1 else ""
    tell(
        f"{tuning.folder.path}: {' | '.join(space.heads)}{folds}, {tune.trials} trials of "
        f"{counted(tune.inner_folds, 'inner fold')}, {bags.device}; searched: {', '.join(space.paths)}"
    )
    return replace(tuning, config=on_this_machine(tuning.config, config)), bags


def _outer_folds(
    config: Config, project: Path, cohort: Cohort, tell: Callable[[str], None]
) -> dict[int, Split]:
    """The splits whose test cases judge the winners: all of the project, or that of ``train.fold``."""
    fold = config.train.fold
    if fold is not None:
        return {fold: choose_split(config, project, cohort, tell)}
    return read_folds(config, project, cohort, None, tell)


def _inner_folds(config: Config, split: Split, cohort: Cohort) -> list[Split]:
    """What trials are judged on; checked."""
    labels, names, tune = cohort.labels, cohort.class_names, config.tune
    check_threshold(config.runs, [labels[case] for case in split.val], names)
    folds = inner_folds(split, labels, cohort.groups, tune.inner_folds, config.split.seed, names)
    check_folds(folds, labels, tune.objective, names)
    return folds


def _load(tuning: Tuning, project: Path, tell: Callable[[str], None]) -> CaseBags:
    """The cohort of a tuning that was begun."""
    about, config = tuning.about, tuning.config
    store = Store.open(project / config.store.path)
    bags = load_bags(config, store, about["labels"], tell, about["store"]["fingerprint"])
    check_unchanged(bags, about, tell)
    return bags


def _winner(tasks: Tasks, fold: int, project: Path) -> Study:
    """The final trainings of an outer fold; its ``best.yaml`` is written first."""
    found = findings_of(tasks, fold)
    winner = winner_of(tasks, found)
    if winner is None:
        raise TrainingError(
            "no trial has finished, and none has won",
            where=str(tasks.tuning.folder.outer(fold)),
            fix="see trials.csv for what failed",
        )
    winner.write(project, best_head(found, tasks.tuning))
    return winner.study()


def _finish(tasks: Tasks, worker: Worker, interrupted: int | None) -> TuneReport:
    """The report; of a tuning of which nothing is left it is written, by one worker at a time."""
    folder, report = tasks.tuning.folder, make_report(tasks, interrupted)
    over = all(tasks.ended(fold) for fold in tasks.tuning.folds)
    waiting = report.left and not report.failed
    if not over or waiting or (worker.done == 0 and folder.summary.is_file()):
        return report
    with exclusive(folder.writing):
        report = write_findings(tasks, make_report(tasks, interrupted))
    with exclusive(folder.turn):  # nobody is about to hold a trial that has just ended
        folder.drop_trials()
    return report
