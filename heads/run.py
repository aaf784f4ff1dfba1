"""One training into a run folder, and its evaluation: the same for a single run and within a study."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from featstore.cohort.splits import Split, save_split
from featstore.resident import CaseBags
from heads.config import Config, RunsConfig
from heads.evaluation.checkpoints import (
    identity_of,
    load_best_of,
    load_state,
    load_weights,
    save_state,
    unreadable,
)
from heads.evaluation.imported import ImportedEvaluation
from heads.evaluation.plots import plot_history
from heads.evaluation.results import (
    Evaluation,
    check_threshold,
    evaluate_heads,
    write_results,
)
from heads.evaluation.runs import (
    RunError,
    RunFolder,
    history_frame,
    read_config,
    write_config,
    write_history,
    write_json,
)
from heads.models.head import Head, build_head
from heads.training.course import Progress, TrainingError, is_finished
from heads.training.loop import Training
from heads.training.optimizer import choose_amp

SAVE_SECONDS = 10.0  # of training that a killed process may lose
_HISTORY_SECONDS = 2.0  # between two writings: epochs may be of milliseconds, and a file system shared
PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class TrainedRun:
    """What a training did.

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
            f"to go on: featstore train-head --resume {shlex.quote(str(self.run.path))}"
        )

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        if self.evaluation is not None:
            return {**self.evaluation.to_json(), "interrupted": None}
        return {"run": str(self.run.path), "epochs": self.epochs, "interrupted": self.interrupted}


def settled(config: Config, device: torch.device) -> Config:
    """The config with what ``auto`` stands for on a device: what was trained in is part of the run."""
    amp = choose_amp(config.train.amp, device)
    return config.model_copy(update={"train": config.train.model_copy(update={"amp": amp})})


def prepare(config: Config, about: dict[str, Any], bags: CaseBags, split: Split) -> Training:
    """A training that has not begun; nothing is written.

    Args:
        config: Resolved (`heads.config.resolved`).
        about: What `heads.cohort.describe` says.
        bags: The cohort, or a larger one.
        split: Which case is for what.

    Raises:
        ConfigError: The settings do not suit the head, the cases or the device.
    """
    head = build_head(config.head, int(about["dim"]), len(about["class_names"]), config.train.seed)
    return Training(head, bags, split, config.train, about["class_names"])


def begin(run: RunFolder, config: Config, about: dict[str, Any], split: Split) -> None:
    """Write into a new run folder what is trained on what."""
    write_config(run.config, config)
    save_split(run.splits, split)
    write_json(run.about, about)


def restore(training: Training, run: RunFolder, config: Config, about: dict[str, Any]) -> None:
    """Put a training where the run's last state was.

    Raises:
        RunError: The checkpoint is damaged, or of another training.
    """
    state = load_state(run.last, identity_of(config, about))
    try:
        training.load_state(state)
    except Exception as error:
        raise unreadable(run.last, f"its state does not fit this training ({error})") from error


def train_run(
    run: RunFolder,
    training: Training,
    config: Config,
    about: dict[str, Any],
    received: Sequence[int],
    tell: Callable[[str], None],
    observe: Callable[[Progress, int], None],
) -> TrainedRun:
    """Train to the end, or until a signal is received, and evaluate on the test cases.

    Args:
        run: The folder, begun.
        training: Prepared, and restored if it goes on.
        config: Resolved.
        about: What `run.json` says.
        received: Signals (`featstore.process.stop_on_signal`), looked at between epochs.
        tell: Called with remarks.
        observe: Called after every epoch with the progress and the number of epochs.

    Raises:
        TrainingError: The loss is no longer a number; the last good epoch is saved.
    """
    identity = identity_of(config, about)
    saver = _Saver(run, config, identity, observe)
    saver.save(training)  # so that a run that is killed at once can be resumed too
    try:
        training.run(saver, received)
    except Exception as error:  # a plugin's or torch's too: the epochs that there were are told
        saver.write_history(training)
        if isinstance(error, TrainingError):  # what was good stays, and can be evaluated
            save_state(run, training.good, identity)
        raise
    saver.save(training)
    if received:  # also if it is finished: what goes on with it then evaluates, however long that takes
        return TrainedRun(run, None, received[0], training.progress.epoch)
    done = evaluate_run(run, config, about, training.bags, training.split, tell)
    return TrainedRun(run, done, None, training.progress.epoch)


def evaluate_run(
    run: RunFolder,
    config: Config,
    about: dict[str, Any],
    bags: CaseBags,
    split: Split,
    tell: Callable[[str], None],
    part: str = "test",
) -> Evaluation:
    """Evaluate the best and the last epoch from the checkpoints; of the test cases, write the files.

    Raises:
        RunError: A checkpoint is missing, damaged, or of another training; or there are no such cases.
        ConfigError: No threshold can be chosen from the validation cases.
    """
    cases = dict(zip(PARTS, (split.train, split.val, split.test), strict=True))
    _check_cases(run, config, about, cases, part)
    state = load_state(run.last, identity_of(config, about))
    last = build_head(config.head, int(about["dim"]), len(about["class_names"]))
    weights = state["head"] if state["ema"] is None else _averaged(state["ema"])
    heads: dict[str, Head] = {
        "best": load_best_of(run, config, about, state, tell),
        "last": load_weights(last, weights, run.last),
    }
    done, attention = evaluate_heads(
        run,
        heads,
        dict.fromkeys(heads, bags),
        config,
        cases,
        about["class_names"],
        state["progress"],
        state["class_weights"],
        part,
    )
    if part == "val" and (fitted := _fitted(config.runs)):
        tell(f"warning: the {fitted} fitted to the validation cases, and judged on the same cases here")
    if config.runs.analyze_attention and attention is None:
        why = "this head has no attention" if part == "test" else "it is written for the test cases alone"
        tell(f"warning: no attention table: {why}")
    if not is_finished(config.train, Progress(**state["progress"])):
        tell(
            f"warning: the training is not finished, and nothing is written; "
            f"to go on: featstore train-head --resume {shlex.quote(str(run.path))}"
        )
    elif "finetuned" in about:
        done = replace(done, last=done.best)  # the cache is of the best epoch's backbone
        tell(
            "the cached embeddings are of the best epoch; nothing is written: the run's results are those "
            "of the fine-tuned model itself"
        )
    elif others := _others(config.runs, read_config(run).runs):
        tell(f"warning: another {others} than the run's own: shown here, nothing is written")
    elif part == "test":
        rows = state["progress"]["history"]
        history = history_frame(rows) if rows else pd.DataFrame({"epoch": []})  # imported: no training
        write_results(done, config, history, attention)
    return ImportedEvaluation.of(done, about["imported"]) if "imported" in about else done


def _others(asked: RunsConfig, own: RunsConfig) -> str:
    """The settings that decide the test cases' results and are not the run's own."""
    names = ("threshold", "calibration")
    return " and ".join(name for name in names if getattr(asked, name) != getattr(own, name))


def _fitted(runs: RunsConfig) -> str:
    """What is fitted to the validation cases, and its verb; empty if nothing is."""
    names = ["threshold"] * (runs.threshold != "argmax") + ["calibration"] * (runs.calibration != "none")
    return " and ".join(names) + (" are" if len(names) > 1 else " is") if names else ""


def _check_cases(
    run: RunFolder, config: Config, about: dict[str, Any], cases: dict[str, tuple[str, ...]], part: str
) -> None:
    """Raises unless there are cases of this part, and of validation where something is fitted to them."""
    for name in [part] + ["val"] * bool(_fitted(config.runs)):
        if not cases[name]:
            raise RunError(
                f"the run has no {name} cases",
                expected="cases to evaluate"
                if name == part
                else "validation cases for the threshold or the calibration",
                where=str(run.path),
                fix="--part test --threshold argmax --calibration none, or import the checkpoint with its "
                "--load-splits",
            )
    check_threshold(config.runs, [about["labels"][case] for case in cases["val"]], about["class_names"])


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
        self._saved = self._written = time.monotonic()

    def __call__(self, training: Training) -> None:
        every = self._train.plot_every
        if every and training.progress.epoch % every == 0:
            plot_history(history_frame(training.progress.history), self._run.path)
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save(training)
        elif time.monotonic() - self._written > _HISTORY_SECONDS:
            self.write_history(training)
        self._observe(training.progress, self._train.epochs)

    def save(self, training: Training) -> None:
        save_state(self._run, training.state(), self._identity)
        self.write_history(training)
        self._saved = time.monotonic()

    def write_history(self, training: Training) -> None:
        """Write `history.csv`, once there is an epoch."""
        if training.progress.history:
            write_history(self._run, history_frame(training.progress.history))
        self._written = time.monotonic()


def _averaged(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix = "module."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
