"""Leave-one-environment-out evaluation of the β-VAE against plain empirical risk minimisation.

For every environment, seed and method a training on all other environments: the same encoder with the
same initial weights, the same batches, as many steps; the step is chosen by the validation images of the
training environments; the environment held out is looked at once, at the end.

Source: training-domain validation, Gulrajani and Lopez-Paz 2021 (DomainBed, arXiv 2007.01434).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore.cohort.tables import write_csv
from featstore.errors import ConfigError
from featstore.process import stop_on_signal
from heads.config import Config
from heads.evaluation.domains import METHODS, DomainTable, HeldOut, leave_one_out_table
from heads.evaluation.named import AlreadyDone, already_done, check_not_both, named_folder
from heads.evaluation.runs import RunError, held, new_folder, write_config, write_json, write_text
from heads.training.environments import ImageBatches, LabelledImages, check_environments
from heads.training.vae import Method, VaeTraining
from heads.training.vae_config import VaeConfig
from heads.training.vae_data import VaeData
from heads.vae_setup import (
    Tell,
    build_model,
    check_same,
    choose_device,
    is_begun,
    open_run,
    pixels_of,
    read_images,
    settled,
    split_images,
    tell_annealing,
)
from heads.vae_states import ABOUT, describe, line


@dataclass(frozen=True)
class Task:
    """One training: which environment is held out, with which seed, by which method."""

    environment: int
    seed: int
    method: Method

    @property
    def file(self) -> str:
        """Where its result is; environments by number, since names may be anything."""
        return f"held_out_{self.environment + 1:02}_seed_{self.seed}_{self.method}.json"


@dataclass(frozen=True)
class LeftOut:
    """What `leave_one_out_project` did.

    Attributes:
        folder: The run.
        table: The result; None if it was interrupted.
        done: Trainings finished.
        interrupted: The signal that ended it early; None if it was not.
    """

    folder: Path
    table: DomainTable | None
    done: int
    interrupted: int | None = None

    def to_text(self) -> str:
        """The table, or how to go on."""
        if self.table is None:
            command = f"featstore train-vae --leave-one-out --resume {shlex.quote(str(self.folder))}"
            return f"interrupted after {self.done} trainings\nto go on: {command}"
        return f"{self.table.to_text()}\nwritten: {self.folder}"

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        whole = {"trainings": self.done} if self.table is None else self.table.to_json()
        return {**whole, "run": str(self.folder), "interrupted": self.interrupted}


def leave_one_out_project(
    config: Config,
    project: Path,
    seeds: int = 1,
    resume: Path | None = None,
    tell: Tell = lambda text: None,
    observe: Tell = lambda text: None,
    name: str | None = None,
) -> LeftOut | AlreadyDone:
    """Hold out every environment in turn, train both methods on the others, and write the table.

    Args:
        config: The settings.
        project: The folder that relative paths start from.
        seeds: Trainings of each: with ``vae.seed`` and the numbers after it.
        resume: A run to go on with, by its own settings and seeds.
        tell: Called with remarks.
        observe: Called with every line of a training's log that has a validation.
        name: Of the run: begun if it is not there, gone on with if it is.

    Raises:
        FeatstoreError: Whatever stands in the way; TrainingError if a training fails.
    """
    check_not_both(resume, name)
    named = None if name is None else named_folder(project / config.runs.path, "vae", name)
    with ExitStack() as holding:
        if named is not None:
            named.mkdir(parents=True, exist_ok=True)
            holding.enter_context(held(named))  # looked at when nobody else is at it
            if is_begun(named, "leave_one_out"):
                if (named / "results.json").is_file():
                    return already_done(named)
                resume = named
        folder: Path | None = None
        if resume is not None:
            folder, config, known = open_run(config, project, resume, "leave_one_out")
            if named is None:
                holding.enter_context(held(folder))
            seeds = int(known["seeds"])
        else:
            config = settled(config, project)
        device = choose_device(config.vae)
        images = read_images(config, project, tell)
        _check(images)
        about = describe("leave_one_out", images, config.vae, device, seeds=seeds)
        if folder is not None:
            check_same(known, about, folder)
        batches = pixels_of(images, config.vae, device)
        if folder is None:
            build_model(config.vae, len(images.classes), project)  # refuses before anything is written
            folder = named or new_folder(project / config.runs.path, "vae", config.vae.experiment)
            if named is None:
                holding.enter_context(held(folder))
            write_config(folder / "config.yaml", config)
            write_json(folder / ABOUT, about)
            tell_annealing(config.vae, tell)
        (folder / "trainings").mkdir(exist_ok=True)
        received = holding.enter_context(stop_on_signal())
        job = _Job(config.vae, project, images, batches, device, folder, tell, observe)
        return job.run(seeds, received, config.runs.resamples)


def _check(images: LabelledImages) -> None:
    check_environments(images)
    if len(images.environments) < 2:
        raise ConfigError(
            f"there is one environment: {images.environments[0]}",
            expected="two or more, of which each is held out once",
            where="vae.data_dir, or the patches' domain",
            fix="train without --leave-one-out, or add images of another environment",
        )


@dataclass(frozen=True, eq=False)
class _Job:
    """All trainings on some images, into a folder."""

    config: VaeConfig
    base: Path
    images: LabelledImages
    batches: ImageBatches
    device: torch.device
    folder: Path
    tell: Tell
    observe: Tell

    def tasks(self, seeds: int) -> Iterator[Task]:
        for environment in range(len(self.images.environments)):
            for seed in range(self.config.seed, self.config.seed + seeds):
                for method in METHODS:
                    yield Task(environment, seed, "vae" if method == "vae" else "erm")

    def run(self, seeds: int, received: Sequence[int], resamples: int) -> LeftOut:
        tasks = list(self.tasks(seeds))
        for number, task in enumerate(tasks):
            path = self.folder / "trainings" / task.file
            if path.is_file():
                continue
            name = self.images.environments[task.environment]
            self.tell(f"{number + 1}/{len(tasks)}: {task.method}, {name} held out, seed {task.seed}")
            found = self.train(task, received)
            if found is None:
                return LeftOut(self.folder, None, number, received[0])
            write_json(path, found)
        table = leave_one_out_table(self.results(tasks), self.images.classes, resamples)
        self.write(tasks, table)
        return LeftOut(self.folder, table, len(tasks))

    def train(self, task: Task, received: Sequence[int]) -> dict[str, Any] | None:
        """What a training says of the environment that it has not seen; None if it was interrupted."""
        config = self.config.model_copy(update={"seed": task.seed})
        rest = np.flatnonzero(self.images.environment != task.environment)
        train, val = split_images(self.images.take(rest), config)
        data = VaeData(self.images, self.batches, rest[train], rest[val])
        model = build_model(config, len(self.images.classes), self.base)
        training = VaeTraining(model, data, config, self.device, task.method)

        def show(training: VaeTraining) -> None:
            progress = training.progress
            last = progress.history[-1] if progress.history else {}
            if last.get("step") == progress.step and "val_accuracy" in last:
                self.observe(line(last, config.steps))

        training.run(show, received)
        if not training.finished:
            return None
        training.model.load_state_dict(training.best)
        test = np.flatnonzero(self.images.environment == task.environment)
        judged = training.judge(test)
        return {
            "environment": self.images.environments[task.environment],
            "method": task.method,
            "seed": task.seed,
            "best_step": training.progress.best_step,
            "val_accuracy": training.progress.best_accuracy,
            "seconds": training.progress.seconds,
            "held_out": judged.terms,
            "probabilities": judged.probabilities.tolist(),
        }

    def results(self, tasks: Sequence[Task]) -> list[HeldOut]:
        """The files of all trainings, by environment."""
        found = []
        for number, name in enumerate(self.images.environments):
            labels = self.images.label[self.images.environment == number]
            mine = [task for task in tasks if task.environment == number]
            probabilities = {
                method: [self.read(task, len(labels)) for task in mine if task.method == method]
                for method in METHODS
            }
            found.append(HeldOut(name, labels, probabilities))
        return found

    def read(self, task: Task, images: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        path = self.folder / "trainings" / task.file
        try:
            p = np.asarray(json.loads(path.read_text(encoding="utf-8"))["probabilities"], np.float64)
            if p.shape != (images, len(self.images.classes)):
                raise ValueError(f"it has probabilities of shape {p.shape}")
            return p
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"the result of a training cannot be read: {error}",
                expected=f"probabilities of {images} images",
                where=str(path),
                fix="delete the file, and go on with --resume: it is trained again",
            ) from error

    def write(self, tasks: Sequence[Task], table: DomainTable) -> None:
        """The table in three forms, and every image's probabilities; `results.json` last."""
        held_out = self.results(tasks)
        columns = ["path", "environment", "class", "method", "seed"]
        columns += [f"p_{name}" for name in self.images.classes]
        rows: list[list[object]] = []
        for number, each in enumerate(held_out):
            chosen = np.flatnonzero(self.images.environment == number)
            for task in (task for task in tasks if task.environment == number):
                p = each.probabilities[task.method][task.seed - self.config.seed]
                for i, row in zip(chosen.tolist(), p.tolist(), strict=True):
                    name = self.images.classes[int(self.images.label[i])]
                    start = [self.images.paths[i], each.environment, name, task.method, task.seed]
                    rows.append([*start, *row])
        write_csv(self.folder / "predictions.csv", columns, rows)
        table.write_csv(self.folder / "leave_one_out.csv")
        write_text(self.folder / "leave_one_out.txt", table.to_text() + "\n")
        write_json(self.folder / "results.json", table.to_json())
