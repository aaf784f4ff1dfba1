"""Training and evaluation in a project folder: store, labels and split in, a run folder out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from featstore.errors import ConfigError, FeatstoreError
from featstore.process import stop_on_signal
from featstore.settings import leaves
from featstore.store import Store
from heads.cohort import check_unchanged, describe, load_bags, read_cohort, sizes
from heads.config import Config, resolved, unused_settings
from heads.evaluation.named import named_folder
from heads.evaluation.results import Evaluation, check_threshold
from heads.evaluation.runs import (
    RunError,
    RunFolder,
    create_run,
    find_run,
    held,
    make_run,
    read_about,
    read_config,
    read_own_split,
)
from heads.models.head import load_plugin
from heads.run import PARTS, TrainedRun, begin, evaluate_run, prepare, restore, settled, train_run
from heads.training.course import Progress

# Settings of a place, not of a training.
MACHINE = ("device", "memory_gb", "processes", "workers", "pixel_mb", "save_seconds", "scratch")
_LOCATES = ("path", "suffix")  # settings of `runs` that say where a run is, not what it is


def train_project(
    config: Config,
    project: Path,
    resume: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
    observe: Callable[[Progress, int], None] = lambda progress, epochs: None,
    name: str | None = None,
) -> TrainedRun:
    """Train a head on the store, evaluate it on the test cases, and write a run folder.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        resume: A run to go on with, by its own settings.
        tell: Called with remarks.
        observe: Called after every epoch with the progress and the number of epochs.
        name: Of the run: begun if it is not there, gone on with if it is.

    Raises:
        FeatstoreError: Whatever stands in the way; TrainingError if the training itself fails.
    """
    runs = project / config.runs.path
    named = None if name is None else RunFolder(named_folder(runs, "run", name))
    with ExitStack() as holding:
        if named is not None:  # looked at when nobody else is at it
            holding.enter_context(held(make_run(named).path))
            resume = named.path if named.last.is_file() and named.about.is_file() else None
        if resume is not None:
            run = find_run(runs, _run_of(resume), finished=False, or_study=True)
            about = read_about(run)
            refuse_imported(run, about)
            if named is None:
                holding.enter_context(held(run.locked))
            config = on_this_machine(own_config(config, run, tell), config)
            split = read_own_split(run, about)
            load_plugin(plugin_of(config, project))
            store = Store.open(project / config.store.path)
            bags = load_bags(config, store, about["labels"], tell, about["store"]["fingerprint"])
            check_unchanged(bags, about, tell)
        else:
            config = resolved(config)
            load_plugin(plugin_of(config, project))
            store = Store.open(project / config.store.path)
            names, labels, split = read_cohort(config, project, store, tell)
            check_threshold(config.runs, [labels[case] for case in split.val], names)
            tell_unused(config, tell)
            bags = load_bags(config, store, labels, tell)
            config = settled(config, bags.device)
            about = describe(bags, names, labels, split)
            run = None
        training = prepare(config, about, bags, split)
        if run is not None:
            restore(training, run, config, about)
            tell(f"going on with {run.path} after epoch {training.progress.epoch}")
        else:
            run = named or create_run(runs, config.runs.suffix)
            if named is None:
                holding.enter_context(held(run.path))
            begin(run, config, about, split)
            tell(f"{run.path}: {config.head.name} on {sizes(split)}, {bags.device}")
        received = holding.enter_context(stop_on_signal())
        return train_run(run, training, config, about, received, tell, observe)


def refuse_imported(run: RunFolder, about: dict[str, Any]) -> None:
    """Raises RunError if the run is an imported checkpoint, which has no training to go on with."""
    if "imported" in about:
        raise RunError(
            "this run is an imported checkpoint, and has no training to go on with",
            expected="a run that featstore trained",
            where=str(run.path),
            fix=f"featstore evaluate {run.path}; or train anew: featstore train-head",
        )


def evaluate_project(
    config: Config, project: Path, wanted: Path | None, part: str, tell: Callable[[str], None]
) -> Evaluation:
    """Evaluate a run's best and last epoch again, from its checkpoints alone.

    Args:
        config: The project's settings; of the run its own are used, but for what ``runs`` says here.
        project: The folder that relative paths start from.
        wanted: The run; the newest finished one by default.
        part: ``test`` (whose files in the run folder are written anew), ``val`` or ``train``.
        tell: Called with remarks.

    Raises:
        FeatstoreError: Run, checkpoint or store cannot be used.
    """
    if part not in PARTS:
        raise ConfigError(f"--part is {part!r}", expected=" | ".join(PARTS), fix="--part test")
    run = find_run(project / config.runs.path, wanted)
    mine, about = read_config(run), read_about(run)
    asked = {name: getattr(config.runs, name) for name in config.runs.model_fields_set}
    mine = on_this_machine(mine, config)
    mine = mine.model_copy(update={"runs": mine.runs.model_copy(update=asked)})
    load_plugin(plugin_of(mine, project))
    split = read_own_split(run, about)
    store = store_of(config, mine, about, project)
    bags = load_bags(mine, store, about["labels"], tell, about["store"]["fingerprint"])
    check_unchanged(bags, about, tell)
    return evaluate_run(run, mine, about, bags, split, tell, part)


def store_of(config: Config, mine: Config, about: dict[str, Any], project: Path) -> Store:
    """The store of a run: its own, or if that is gone or holds others, that of the settings of now.

    Args:
        config: The project's settings.
        mine: The run's.
        about: What its `run.json` says.
        project: The folder that relative paths start from.

    Raises:
        StoreError: There is none.
    """
    for path in (mine.store.path, config.store.path):
        with suppress(FeatstoreError):
            store = Store.open(project / path)
            if store.spec.plain.fingerprint == about["store"]["fingerprint"]:
                return store
    return Store.open(project / mine.store.path)


def tell_unused(config: Config, tell: Callable[[str], None]) -> None:
    """Tell of settings that are given and do nothing.

    Args:
        config: Resolved.
        tell: Called with remarks.
    """
    for name in unused_settings(config.head, config.train):
        tell(f"warning: {name} is set, but the head {config.head.name} does not read it")
    if "bag_size" in config.train.model_fields_set and config.train.sampling == "all":
        tell("warning: train.bag_size is set, but train.sampling is all: add --sampling random")
    if config.train.class_weights != "balanced" and not config.train.use_class_weights:
        tell("warning: train.class_weights is set, but not used: add --use-class-weights")


def own_config(
    config: Config,
    run: RunFolder,
    tell: Callable[[str], None],
    sections: Sequence[str] = ("head", "train", "runs"),
) -> Config:
    """The run's own config; says which of the settings given now, in its sections, are not used."""
    mine = read_config(run)
    then, now = resolved(mine), resolved(config)
    ignored = [
        leaf.path
        for leaf in leaves(Config)
        if leaf.section in sections
        and leaf.key not in MACHINE
        and not (leaf.section == "runs" and leaf.key in _LOCATES)
        and leaf.key in getattr(config, leaf.section).model_fields_set
        and getattr(getattr(config, leaf.section), leaf.key) != "auto"  # whatever it was then
        and getattr(getattr(now, leaf.section), leaf.key) != getattr(getattr(then, leaf.section), leaf.key)
    ]
    if ignored:
        tell(f"the run's own settings are used; given now, and not used: {', '.join(ignored)}")
    return mine


def on_this_machine(mine: Config, given: Config) -> Config:
    """The run's config on this machine: device, memory, processes and scratch are those given now."""
    here = {name: getattr(given.train, name) for name in MACHINE if hasattr(given.train, name)}
    store = mine.store.model_copy(update={"scratch": given.store.scratch})
    return mine.model_copy(update={"train": mine.train.model_copy(update=here), "store": store})


def _run_of(path: Path) -> Path:
    """A run, also when its checkpoint is named."""
    return path.parent.parent if path.name == "last.pth" else path


def plugin_of(config: Config, project: Path) -> Path | None:
    """The file that registers a head or loss of one's own, if there is one."""
    return project / config.head.plugin if config.head.plugin else None
