"""A study in a project folder: every fold with several seeds, in one folder with its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from featstore.errors import ConfigError
from featstore.extraction.shards import Shard
from featstore.process import stop_on_signal
from featstore.resident import CaseBags, memory_budget
from featstore.store import Store
from heads.cohort import check_unchanged, describe, labelled_cases, labels_of, load_bags, sizes
from heads.config import Config, resolved
from heads.evaluation.compare import Comparison, compare, read_contender
from heads.evaluation.named import named_folder
from heads.evaluation.results import Evaluation, check_threshold
from heads.evaluation.runs import RunFolder, held
from heads.evaluation.studies import Study, begin_study, create_study, open_study
from heads.evaluation.study_report import StudyReport, write_report
from heads.evaluation.study_results import left, tell_not_used
from heads.models.head import load_plugin
from heads.project import (
    evaluate_project,
    on_this_machine,
    own_config,
    plugin_of,
    tell_unused,
    train_project,
)
from heads.run import TrainedRun, prepare, settled
from heads.splits import read_folds, with_folds
from heads.study_tasks import Asked, TaskReport, share_of
from heads.study_trainings import Outcome, process_count, train_in_processes, train_in_turn
from heads.training.course import Progress


def train(
    config: Config,
    project: Path,
    asked: Asked,
    tell: Callable[[str], None] = lambda text: None,
    observe: Callable[[Progress, int], None] = lambda progress, epochs: None,
) -> TrainedRun | StudyReport | TaskReport:
    """One training, or a study, or a task of one; begun or gone on with.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        asked: Which of these.
        tell: Called with remarks.
        observe: Called after every epoch of a training that is none of a study's.

    Raises:
        FeatstoreError: These do not go together, or whatever `study_project` and `train_project` raise.
    """
    existing = asked.existing_study(project / config.runs.path)
    if existing is not None:
        return resume_study(config, project, existing, asked, tell)
    if asked.of_a_study:
        return study_project(config, project, asked, tell)
    return train_project(config, project, asked.resume, tell, observe, asked.name)


def evaluate(
    config: Config,
    project: Path,
    run: Path | None,
    part: str,
    study: Path | None,
    tell: Callable[[str], None] = lambda text: None,
) -> Evaluation | StudyReport:
    """Evaluate a run again (`evaluate_project`), or a study (`evaluate_study`).

    Raises:
        FeatstoreError: Both are named, or whatever these two raise.
    """
    if study is None:
        return evaluate_project(config, project, run, part, tell)
    if run is not None or part != "test":
        raise ConfigError(
            "--study with a run or a part",
            expected="one or the other: a study is laid together from its trainings' test cases",
            where="evaluate",
            fix=f"featstore evaluate --study {study}",
        )
    return evaluate_study(config, project, study, tell)


def compare_project(
    config: Config, project: Path, a: Path, b: Path, ensemble: bool, tell: Callable[[str], None]
) -> Comparison:
    """Two runs or studies of a project, compared on the cases that both have.

    Raises:
        FeatstoreError: One is none, or they have no case in common.
    """
    runs = project / config.runs.path
    first, second = (read_contender(runs, each, ensemble, config.runs, tell) for each in (a, b))
    return compare(first, second, config.runs.resamples)


def study_project(
    config: Config, project: Path, asked: Asked, tell: Callable[[str], None] = lambda text: None
) -> StudyReport | TaskReport:
    """Begin a study, and train every fold with several seeds, or a task's share of that.

    Args:
        config: The project's settings; ``train.seed`` is the first seed, the others follow it.
        project: The folder that relative paths start from.
        asked: How many folds (None: the splits that are given, else what the settings say) and seeds, the
            study's name, if it is to have a certain one, and which task this is.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Whatever stands in the way of all trainings; one that fails is in the report.
    """
    shard, folds, seeds = asked.shard, asked.folds, asked.count_seeds(config.train.seed)
    config = resolved(with_folds(config, folds))
    load_plugin(plugin_of(config, project))
    store = Store.open(project / config.store.path)
    cohort = labelled_cases(config, project, store, tell)
    splits = read_folds(config, project, cohort, folds, tell)
    labels = {k: v for split in splits.values() for k, v in labels_of(split, cohort.labels).items()}
    for split in splits.values():
        check_threshold(config.runs, [labels[case] for case in split.val], cohort.class_names)
    tell_unused(config, tell)
    fold, first = next(iter(splits.items()))
    bags = [load_bags(config, store, labels, tell)]
    config = settled(config, bags[0].device)
    about = describe(bags[0], cohort.class_names, labels, first) | {
        "folds": list(splits),
        "seeds": list(range(config.train.seed, config.train.seed + seeds)),
    }
    del about["cases"]  # which differ by fold
    prepare(config, about, bags[0], first)  # what no training can do is refused before there is a folder
    runs = project / config.runs.path
    if asked.name is None:
        study = create_study(runs, config, about, splits)
    else:
        study = begin_study(named_folder(runs, "study", asked.name), config, about, splits)
        asked.check_same(study)  # another process may have been faster
        mine = own_config(config, RunFolder(study.folder.path), tell)
        study = replace(study, config=on_this_machine(mine, config))
    about_first = f"fold {fold}: {sizes(first)}, {bags[0].device}"
    tell(f"{study.folder.path}: {config.head.name}, {study.size}, {about_first}")
    with held(study.folder.path, shared=shard is not None):
        todo = list(left(study, share_of(study, shard)))
        return _train(study, project, bags, todo, shard, tell)


def resume_study(
    config: Config,
    project: Path,
    wanted: Path,
    asked: Asked,
    tell: Callable[[str], None] = lambda text: None,
) -> StudyReport | TaskReport:
    """Go on with a study: all that is not finished, or is damaged, is trained.

    Args:
        config: The project's settings; of the study, its own are used.
        project: The folder that relative paths start from.
        wanted: The study.
        asked: Which task this is; folds and seeds must be the study's.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Study or store cannot be used.
    """
    study, shard = open_study(project / config.runs.path, wanted), asked.shard
    asked.check_same(study)
    with held(study.folder.path, shared=shard is not None):
        mine = on_this_machine(own_config(config, RunFolder(study.folder.path), tell), config)
        study, about = replace(study, config=mine), study.about
        share = share_of(study, shard)
        todo = list(left(study, share))
        tell(f"going on with {study.folder.path}: {len(todo)} of {len(share)} trainings to do")
        if not todo:
            return _report(study, shard, share, todo, [], None)
        load_plugin(plugin_of(mine, project))
        store = Store.open(project / mine.store.path)
        bags = [load_bags(mine, store, about["labels"], tell, about["store"]["fingerprint"])]
        check_unchanged(bags[0], about, tell)
        return _train(study, project, bags, todo, shard, tell)


def evaluate_study(
    config: Config, project: Path, wanted: Path, tell: Callable[[str], None] = lambda text: None
) -> StudyReport:
    """Write a study's tables and pictures anew, from the files of its trainings alone.

    Args:
        config: The project's settings; ``runs.resamples`` is used where it is set.
        project: The folder that relative paths start from.
        wanted: The study.
        tell: Called with remarks.

    Raises:
        FeatstoreError: It is none, or a file of it is damaged.
    """
    study = open_study(project / config.runs.path, wanted)
    names = ("threshold", "calibration", "analyze_attention")
    tell_not_used(config.runs, study.config.runs, study.folder.path, tell, names)
    given = "resamples" in config.runs.model_fields_set
    return write_report(study, (config if given else study.config).runs.resamples)


def _train(
    study: Study,
    project: Path,
    bags: list[CaseBags],
    todo: list[tuple[int, int]],
    shard: Shard | None,
    tell: Callable[[str], None],
) -> StudyReport | TaskReport:
    """Train what is to do, and report; ``bags`` is the cohort, let go of where others load it."""
    train, share = study.config.train, share_of(study, shard)
    number, total = len(share) - len(todo), len(share)
    memory = memory_budget(train.memory_gb, bags[0].device)
    if train.memory_gb == "auto":
        memory += bags[0].bytes // 2  # half of what was free before
    count = process_count(study.config, bags[0], len(todo), memory)

    told, outcomes = set[str](), list[Outcome]()

    def show(outcome: Outcome) -> None:
        nonlocal number
        outcomes.append(outcome)
        for remark in outcome.remarks:  # of fifty trainings alike, once
            if remark not in told:
                tell(remark)
        told.update(outcome.remarks)
        number += outcome.status != "interrupted"
        tell(f"[{number:{len(str(total))}}/{total}] {outcome.to_text()}")

    with stop_on_signal() as received:
        if count == 1:
            train_in_turn(study, bags[0], todo, received, show)
        else:
            bags.clear()
            tell(f"{count} trainings at once")
            train_in_processes(study, project, count, memory // count, todo, received, show)
    return _report(study, shard, share, todo, outcomes, received[0] if received else None)


def _report(
    study: Study,
    shard: Shard | None,
    share: list[tuple[int, int]],
    todo: list[tuple[int, int]],
    outcomes: list[Outcome],
    interrupted: int | None,
) -> StudyReport | TaskReport:
    """Of the whole study its tables and pictures; of a task what it did, since others are at work."""
    if shard is None:
        return write_report(study, study.config.runs.resamples, interrupted)
    return TaskReport(study, shard, len(share), len(todo), outcomes, interrupted)
