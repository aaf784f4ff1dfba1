"""Training and evaluation in a project folder: store, labels and split in, a run folder out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from featstore.cohort.splits import Split, read_split, save_split
from featstore.errors import ConfigError
from featstore.process import stop_on_signal
from featstore.resident import CaseBags
from featstore.settings import leaves
from featstore.store import Store
from heads.cohort import check_unchanged, describe, load_bags, read_cohort, sizes
from heads.config import Config, resolved, unused_settings
from heads.evaluation.checkpoints import (
    identity_of,
    load_best,
    load_state,
    load_weights,
    save_state,
    unreadable,
)
from heads.evaluation.plots import plot_history
from heads.evaluation.results import (
    Evaluation,
    check_threshold,
    evaluate_heads,
    history_frame,
    write_results,
)
from heads.evaluation.runs import (
    RunFolder,
    create_run,
    find_run,
    read_about,
    read_config,
    write_config,
    write_history,
    write_json,
)
from heads.models.head import Head, build_head, load_plugin
from heads.training.loop import Progress, Training, TrainingError, is_finished

SAVE_SECONDS = 10.0  # of training that a killed process may lose
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class TrainedRun:
    """What `train_project` did.

    Attributes:
        run: The folder.
        evaluation: On the test cases; None if it was interrupted.
        interrupted: The signal that ended the training early; None if it was not.
        epochs: Epochs done.
    """

    run: RunFolder
    evaluation: Evaluation | None
    interrupted: int | None
    epochs: int

    def to_text(self) -> str:
        """The results, or how to go on."""
        if self.evaluation is not None:
            return self.evaluation.to_text()
        return (
            f"interrupted after {self.epochs} epochs\n"
            f"to go on: featstore train-head --resume {self.run.path}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        if self.evaluation is not None:
            return {**self.evaluation.to_json(), "interrupted": None}
        return {"run": str(self.run.path), "epochs": self.epochs, "interrupted": self.interrupted}


def train_project(
    config: Config,
    project: Path,
    resume: Path | None = None,
    tell: Callable[[str], None] = lambda text: None,
    observe: Callable[[Progress, int], None] = lambda progress, epochs: None,
) -> TrainedRun:
    """Train a head on the store, evaluate it on the test cases, and write a run folder.

    Args:
        config: The project's settings.
        project: The folder that relative paths start from.
        resume: A run to go on with, by its own settings.
        tell: Called with remarks.
        observe: Called after every epoch with the progress and the number of epochs.

    Raises:
        FeatstoreError: Whatever stands in the way; TrainingError if the training itself fails.
    """
    runs = project / config.runs.path
    if resume is not None:
        run = find_run(runs, _run_of(resume), finished=False)
        config, about = _here(_resumed(config, run, tell), config), read_about(run)
        split, _ = read_split(run.splits, list(about["labels"]), {}, normalize_cases=False)
        load_plugin(_plugin(config, project))
        store = Store.open(project / config.store.path)
        bags = load_bags(config, store, about["labels"], tell, about["store"]["fingerprint"])
        check_unchanged(bags, about, tell)
    else:
        config = resolved(config)
        load_plugin(_plugin(config, project))
        store = Store.open(project / config.store.path)
        names, labels, split = read_cohort(config, project, store, tell)
        check_threshold(config.runs, [labels[case] for case in split.val], names)
        for name in unused_settings(config.head, config.train):
            tell(f"warning: {name} is set, but the head {config.head.name} does not read it")
        if "bag_size" in config.train.model_fields_set and config.train.sampling == "all":
            tell("warning: train.bag_size is set, but train.sampling is all: add --sampling random")
        if config.train.class_weights != "balanced" and not config.train.use_class_weights:
            tell("warning: train.class_weights is set, but not used: add --use-class-weights")
        bags = load_bags(config, store, labels, tell)
        about = describe(bags, names, labels, split)
        run = None
    head = build_head(config.head, int(about["dim"]), len(about["class_names"]), config.train.seed)
    training = Training(head, bags, split, config.train, about["class_names"])
    if run is not None:
        state = load_state(run.last, identity_of(config, about))
        try:
            training.load_state(state)
        except Exception as error:
            raise unreadable(run.last, f"its state does not fit this training ({error})") from error
        tell(f"going on with {run.path} after epoch {training.progress.epoch}")
    else:
        run = _start(runs, config, about, split)
        tell(f"{run.path}: {config.head.name} on {sizes(split)}, {bags.device}")
    with stop_on_signal() as received:
        identity = identity_of(config, about)
        saver = _Saver(run, config, identity, observe)
        saver.save(training)  # so that a run that is killed at once can be resumed too
        try:
            training.run(saver, received)
        except TrainingError:
            saver.write_history(training)
            if training.good:  # what was good stays, and can be evaluated
                save_state(run, training.good, identity)
            raise
        saver.save(training)
    if not training.finished:
        return TrainedRun(run, None, received[0], training.progress.epoch)
    return TrainedRun(run, _evaluate(run, config, about, bags, split, tell), None, training.progress.epoch)


def evaluate_project(
    config: Config, project: Path, wanted: Path | None, part: str, tell: Callable[[str], None]
) -> Evaluation:
    """Evaluate a run's best and last epoch again, from its checkpoints alone.

    Args:
        config: The project's settings; of the run, its own are used.
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
    mine = _here(mine, config).model_copy(update={"runs": config.runs})
    load_plugin(_plugin(mine, project))
    split, _ = read_split(run.splits, list(about["labels"]), {}, normalize_cases=False)
    store = Store.open(project / mine.store.path)
    bags = load_bags(mine, store, about["labels"], tell, about["store"]["fingerprint"])
    check_unchanged(bags, about, tell)
    return _evaluate(run, mine, about, bags, split, tell, part)


def _evaluate(
    run: RunFolder,
    config: Config,
    about: dict[str, Any],
    bags: CaseBags,
    split: Split,
    tell: Callable[[str], None],
    part: str = "test",
) -> Evaluation:
    state = load_state(run.last, identity_of(config, about))
    last = build_head(config.head, int(about["dim"]), len(about["class_names"]))
    weights = state["head"] if state["ema"] is None else _averaged(state["ema"])
    heads: dict[str, Head] = {
        "best": load_best(run, config, about),
        "last": load_weights(last, weights, run.last),
    }
    cases = dict(zip(PARTS, (split.train, split.val, split.test), strict=True))
    done, attention = evaluate_heads(
        run,
        heads,
        bags,
        config,
        cases,
        about["class_names"],
        state["progress"],
        state["class_weights"],
        part,
    )
    if config.runs.analyze_attention and attention is None:
        why = "this head has no attention" if part == "test" else "it is written for the test cases alone"
        tell(f"warning: no attention table: {why}")
    if not is_finished(config.train, Progress(**state["progress"])):
        tell(
            f"warning: the training is not finished, and nothing is written; "
            f"to go on: featstore train-head --resume {run.path}"
        )
    elif config.runs.threshold != read_config(run).runs.threshold:
        tell("warning: another threshold than the run's own: shown here, nothing is written")
    elif part == "test":
        write_results(done, config, history_frame(state["progress"]["history"]), attention)
    return done


class _Saver:
    """After every epoch: the history, now and then the state, and whoever watches."""

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        identity: dict[str, Any],
        observe: Callable[[Progress, int], None],
    ) -> None:
        self._run, self._train, self._identity, self._observe = run, config.train, identity, observe
        self._saved = time.monotonic()

    def __call__(self, training: Training) -> None:
        history = self.write_history(training)
        every = self._train.plot_every
        if every and training.progress.epoch % every == 0:
            plot_history(history, self._run.path)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save(training)
        self._observe(training.progress, self._train.epochs)

    def save(self, training: Training) -> None:
        save_state(self._run, training.state(), self._identity)
        self._saved = time.monotonic()

    def write_history(self, training: Training) -> pd.DataFrame:
        """Write `history.csv`."""
        history = history_frame(training.progress.history)
        write_history(self._run, history)
        return history


def _start(runs: Path, config: Config, about: dict[str, Any], split: Split) -> RunFolder:
    run = create_run(runs, config.runs.suffix)
    write_config(run.config, config)
    save_split(run.splits, split)
    write_json(run.about, about)
    return run


def _resumed(config: Config, run: RunFolder, tell: Callable[[str], None]) -> Config:
    """The run's own config; says which of the settings given now are not used."""
    mine, given = read_config(run), resolved(config)
    ignored = [
        leaf.path
        for leaf in leaves(Config)
        if leaf.section in ("head", "train")
        and leaf.key not in ("device", "memory_gb")
        and leaf.key in getattr(config, leaf.section).model_fields_set
        and getattr(getattr(given, leaf.section), leaf.key)
        != getattr(getattr(mine, leaf.section), leaf.key)
    ]
    if ignored:
        tell(f"the run's own settings are used; given now, and not used: {', '.join(ignored)}")
    return mine


def _here(mine: Config, given: Config) -> Config:
    """The run's config on this machine: device and memory are those given now."""
    here = {"device": given.train.device, "memory_gb": given.train.memory_gb}
    return mine.model_copy(update={"train": mine.train.model_copy(update=here)})


def _run_of(path: Path) -> Path:
    """A run, also when its checkpoint is named."""
    return path.parent.parent if path.name == "last.pth" else path


def _plugin(config: Config, project: Path) -> Path | None:
    return project / config.head.plugin if config.head.plugin else None


def _averaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
