"""Training of a β-VAE into a run folder, on a folder of environments or on a project's patches."""

from __future__ import annotations

import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featstore.backbones.exported import export_backbone
from featstore.backbones.vae import KIND, description_of
from featstore.process import stop_on_signal
from heads.config import Config
from heads.evaluation.metrics import evaluate
from heads.evaluation.named import AlreadyDone, already_done, check_not_both, named_folder
from heads.evaluation.runs import held, new_folder, write_config, write_json
from heads.evaluation.vae_pictures import plot_vae_history, write_pictures
from heads.training.course import TrainingError
from heads.training.environments import check_environments
from heads.training.vae import VaeTraining
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
    sized,
    split_images,
    tell_annealing,
)
from heads.vae_states import ABOUT, counts, describe, line, restore, save_state, write_log

RESULTS = "results.json"  # written last: with it the run is finished
_LOG_SECONDS = 2.0  # between two writings of the log


@dataclass(frozen=True)
class TrainedVae:
    """What `train_vae_project` did.

    Attributes:
        folder: The run.
        results: As in `results.json`; None if it was interrupted.
        steps: Steps done.
        interrupted: The signal that ended the training early; None if it was not.
    """

    folder: Path
    results: dict[str, Any] | None
    steps: int
    interrupted: int | None = None

    def to_text(self) -> str:
        """The results, or how to go on."""
        if self.results is None:
            command = f"featstore train-vae --resume {shlex.quote(str(self.folder))}"
            return f"interrupted after {self.steps} steps\nto go on: {command}"
        lines = []
        for name in ("best", "last"):
            part = self.results[name]
            terms = "  ".join(f"{key} {value:.4f}" for key, value in part["terms"].items())
            lines.append(f"{name}, step {part['step']}, validation images: {terms}")
        lines.append(f"{self.results['steps_per_second']:.2f} steps/s in {self.results['seconds']:.0f} s")
        lines.append(f"written: {self.folder}")
        export, store = shlex.quote(str(self.folder / "backbone")), f"store_{self.folder.name}"
        lines.append(f"use it: featstore extract --backbone {export} --store {store}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as JSON types."""
        whole = self.results or {"steps": self.steps}
        return {**whole, "run": str(self.folder), "interrupted": self.interrupted}


def train_vae_project(
    config: Config,
    project: Path,
    resume: Path | None = None,
    tell: Tell = lambda text: None,
    observe: Tell = lambda text: None,
    name: str | None = None,
) -> TrainedVae | AlreadyDone:
    """Train a β-VAE and write a run folder, with its encoder as a backbone for `extract`.

    Args:
        config: The settings.
        project: The folder that relative paths start from; `featstore.yaml` is needed in it only where
            ``vae.data_dir`` is not given.
        resume: A run to go on with, by its own settings.
        tell: Called with remarks.
        observe: Called with every line of the log.
        name: Of the run: begun if it is not there, gone on with if it is.

    Raises:
        FeatstoreError: Whatever stands in the way; TrainingError if the training itself fails.
    """
    check_not_both(resume, name)
    named = None if name is None else named_folder(project / config.runs.path, "vae", name)
    with ExitStack() as holding:
        if named is not None:
            named.mkdir(parents=True, exist_ok=True)
            holding.enter_context(held(named))  # looked at when nobody else is at it
            if is_begun(named, "train"):
                if (named / RESULTS).is_file():
                    return already_done(named)
                resume = named
        folder: Path | None = None
        if resume is not None:
            folder, config, known = open_run(config, project, resume, "train")
            if named is None:
                holding.enter_context(held(folder))
        else:
            config = settled(config, project)
        vae = config.vae
        device = choose_device(vae)
        images = read_images(config, project, tell)
        check_environments(images)
        about = describe("train", images, vae, device)
        if folder is not None:
            check_same(known, about, folder)
        train, val = split_images(images, vae)
        data = VaeData(images, pixels_of(images, vae, device), train, val)
        weights = None if folder is None else "random:0"  # the checkpoint has them
        training = VaeTraining(build_model(vae, len(images.classes), project, weights), data, vae, device)
        if folder is None:
            folder = named or new_folder(project / config.runs.path, "vae", vae.experiment)
            if named is None:
                holding.enter_context(held(folder))
            write_config(folder / "config.yaml", config)
            write_json(folder / ABOUT, about)
            tell(f"{folder}: {sized(data)}, {device}")
            tell_annealing(vae, tell)
        else:
            restore(folder, training, about)
            tell(f"going on with {folder} after step {training.progress.step}")
        received = holding.enter_context(stop_on_signal())
        return _train(folder, training, config, about, received, observe)


def _train(
    folder: Path,
    training: VaeTraining,
    config: Config,
    about: dict[str, Any],
    received: list[int],
    observe: Tell,
) -> TrainedVae:
    writer = _Writer(folder, training, about, observe)
    writer.save()  # so that a run that is killed at once can be resumed too
    try:
        training.run(writer, received)
    except TrainingError:
        writer.write()
        raise
    writer.write()
    writer.save()
    if not training.finished:
        return TrainedVae(folder, None, training.progress.step, received[0])
    return TrainedVae(folder, _finish(folder, training, config, about), training.progress.step)


class _Writer:
    """After every step: the log, now and then pictures and the state."""

    def __init__(self, folder: Path, training: VaeTraining, about: dict[str, Any], observe: Tell) -> None:
        self._folder, self._training, self._about, self._observe = folder, training, about, observe
        self._rows = len(training.progress.history)
        self._saved = self._written = time.monotonic()

    def __call__(self, training: VaeTraining) -> None:
        progress, config = training.progress, training.config
        if len(progress.history) > self._rows:
            self._rows = len(progress.history)
            self._observe(line(progress.history[-1], config.steps))
            if time.monotonic() - self._written > _LOG_SECONDS:
                self.write()
        if config.picture_every and progress.step % config.picture_every == 0:
            write_pictures(training, self._folder / f"recon_step_{progress.step}")
        if time.monotonic() - self._saved > config.save_seconds:
            self.save()

    def write(self) -> None:
        if self._training.progress.history:
            write_log(self._folder, self._training.progress.history, self._training.config.steps)
        self._written = time.monotonic()

    def save(self) -> None:
        save_state(self._folder, self._training, self._about)
        self._saved = time.monotonic()


def _finish(folder: Path, training: VaeTraining, config: Config, about: dict[str, Any]) -> dict[str, Any]:
    """Pictures of the last step, the export of the best, and `results.json` last."""
    progress, vae = training.progress, config.vae
    plot_vae_history(progress.history, folder / "history.png")
    write_pictures(training, folder / "recon_final")
    last = {"step": progress.step, **_validated(training, config)}
    training.model.load_state_dict(training.best)
    best = {"step": progress.best_step, **_validated(training, config)}
    description = description_of(vae.encoder, vae.size, vae.hidden, vae.latent)
    made_by = {
        "run": folder.name,
        "step": progress.best_step,
        **{k: about[k] for k in ("versions", "settings")},
    }
    export_backbone(folder / "backbone", KIND, training.model.encoder, description, made_by)
    results = {
        "best": best,
        "last": last,
        "steps": progress.step,
        "seconds": progress.seconds,
        "steps_per_second": progress.step / progress.seconds,
        "images": counts(training.data.images),
        "train_images": len(training.data.train),
        "val_images": len(training.data.val),
        "backbone": "backbone",
    }
    write_json(folder / RESULTS, results)
    return results


def _validated(training: VaeTraining, config: Config) -> dict[str, Any]:
    """The validation images' losses and metrics; their best step was chosen on these very images."""
    val, images = training.data.val, training.data.images
    judged = training.judge(val)
    true = images.label[val]
    metrics = evaluate(true, judged.probabilities, images.classes, resamples=config.runs.resamples)
    return {"terms": judged.terms, "metrics": metrics.to_json()}
