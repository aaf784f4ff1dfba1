"""What a training of the β-VAE begins with: settings, images, device, model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featstore.backbones.vae import build_encoder
from featstore.errors import BackboneError, ConfigError
from featstore.process import keep_freed_memory, usable_cores
from featstore.resident import memory_budget
from featstore.settings import PROJECT_FILE
from heads.config import Config
from heads.evaluation.runs import RunError, RunFolder, read_config
from heads.models.vae import BetaVae
from heads.training.course import seeded
from heads.training.environments import (
    ImageBatches,
    LabelledImages,
    project_environments,
    read_environments,
    split_each,
)
from heads.training.optimizer import choose_amp
from heads.training.vae_config import VaeConfig, annealing_of
from heads.training.vae_data import Ints, VaeData
from heads.vae_states import ABOUT, read_about, state_path

MACHINE = ("device", "workers", "memory_gb")  # settings of a place, not of a training
_AT_ONCE = 256  # images decoded at once
Tell = Callable[[str], None]


def open_run(config: Config, project: Path, resume: Path, kind: str) -> tuple[Path, Config, dict[str, Any]]:
    """A run to go on with: its folder, its own settings on this machine, what `vae.json` says.

    Raises:
        RunError: It is none, or of the other kind.
    """
    found = [path for path in (resume, project / config.runs.path / resume) if (path / ABOUT).is_file()]
    folder = found[0] if found else resume
    about = _about_of_kind(folder, kind)
    mine = read_config(RunFolder(folder))
    here = {name: getattr(config.vae, name) for name in MACHINE}
    return folder, mine.model_copy(update={"vae": mine.vae.model_copy(update=here)}), about


def _about_of_kind(folder: Path, kind: str) -> dict[str, Any]:
    about = read_about(folder)
    if about["kind"] != kind:
        raise RunError(
            f"{folder} is of another kind of training: {about['kind']}",
            expected=kind,
            where=str(folder / ABOUT),
            fix="leave out --leave-one-out" if kind == "leave_one_out" else "add --leave-one-out",
        )
    return about


def is_begun(folder: Path, kind: str) -> bool:
    """Whether there is a run of this kind that can be gone on with.

    Args:
        folder: Of a run, whether it is there or not.
        kind: ``train`` or ``leave_one_out``.

    Raises:
        RunError: It is of the other kind.
    """
    if not (folder / ABOUT).is_file():
        return False
    _about_of_kind(folder, kind)
    return kind == "leave_one_out" or state_path(folder).is_file()


def check_same(known: dict[str, Any], about: dict[str, Any], folder: Path) -> None:
    """Raises RunError if the images are no longer those that a run began with."""
    if known["digest"] != about["digest"]:
        raise RunError(
            "the images are no longer those that the run began with",
            expected=f"{known['images']}, of the same names and sizes",
            where=f"{folder}; now {about['images']}",
            fix="bring them back as they were, or train anew",
        )


def settled(config: Config, project: Path) -> Config:
    """The settings with what depends on the place: an absolute folder of images, the precision."""
    vae = config.vae
    annealing_of(vae)
    update: dict[str, Any] = {"amp": choose_amp(vae.amp, choose_device(vae))}
    if vae.data_dir is not None:
        update["data_dir"] = str((project / Path(vae.data_dir).expanduser()).absolute())
    return config.model_copy(update={"vae": vae.model_copy(update=update)})


def read_images(config: Config, project: Path, tell: Tell) -> LabelledImages:
    """The images of ``vae.data_dir``, or else those of the project.

    Raises:
        FeatstoreError: There is neither, or they cannot be used.
    """
    vae = config.vae
    if vae.data_dir is not None:
        return read_environments(project / vae.data_dir, vae.subset_size, vae.seed, tell)
    if not (project / PROJECT_FILE).is_file():
        raise ConfigError(
            f"no folder of images is named, and there is no {PROJECT_FILE} in {project}",
            expected="ROOT/ENVIRONMENT/CLASS/*.png|jpg, or a project whose patches have a domain",
            where="vae.data_dir",
            fix="featstore train-vae --data-dir ROOT",
        )
    return project_environments(config, project, vae.subset_size, vae.seed, tell)


def pixels_of(images: LabelledImages, vae: VaeConfig, device: torch.device) -> ImageBatches:
    """The images' pixels; where ``vae.memory_gb`` lets them all stay in memory, they are decoded now.

    Raises:
        ConfigError: There is not as much memory.
        ImageError: Images that cannot be used.
    """
    threads = usable_cores() if vae.workers == "auto" else vae.workers
    memory = memory_budget(vae.memory_gb, torch.device("cpu"))
    if device.type == "cpu":
        keep_freed_memory()
    try:
        batches = ImageBatches(images, vae.size, threads, memory)
    except MemoryError as error:
        raise ConfigError(
            f"there is no memory for {memory / 1e9:.3g} GB of decoded images",
            expected="memory that this machine has; images beyond it are read in every pass",
            where="vae.memory_gb",
            fix="--vae-memory-gb 1, or fewer images: --subset-size 100",
        ) from error
    if 3 * vae.size**2 * len(images) <= memory:
        # They stay decoded, and a damaged one is told before anything is trained or written.
        for first in range(0, len(images), _AT_ONCE):
            batches.batch(np.arange(first, min(first + _AT_ONCE, len(images))))
    return batches


def split_images(images: LabelledImages, vae: VaeConfig) -> tuple[Ints, Ints]:
    """Indices of the images that are learned from, and of those that choose the step.

    Raises:
        ConfigError: There are too few images for both.
    """
    train, val = split_each(images, vae.val_share, vae.seed)
    if len(val) and len(np.unique(images.label[train])) > 1:
        return train, val
    raise ConfigError(
        f"{len(images)} images are too few to keep some for validation",
        expected="two or more of every class in an environment, of different cases where there are cases",
        where="vae.data_dir, vae.val_share",
        fix="add images",
    )


def build_model(
    vae: VaeConfig, classes: int, base: Path, weights: str | None = None, seed: int | None = None
) -> BetaVae:
    """The model as drawn from the seed, its encoder with the weights that the settings name.

    Args:
        vae: The settings.
        classes: Number of classes.
        base: Folder that a relative path starts from.
        weights: In place of the settings'.
        seed: In place of the settings'.

    Raises:
        BackboneError: The encoder or its weights cannot be had.
    """
    chosen = vae.encoder_weights if weights is None else weights
    try:
        with seeded(torch.device("cpu"), vae.seed if seed is None else seed):
            encoder = build_encoder(vae.encoder, chosen, vae.size, base, vae.hidden, vae.latent)
            return BetaVae(encoder, classes, vae.size, vae.hidden, vae.latent)
    except BackboneError as error:
        raise BackboneError(
            error.found, expected=error.expected, where=_renamed(error.where), fix=_renamed(error.fix)
        ) from error


def _renamed(text: str) -> str:
    """The backbone's settings under the names that they have here."""
    names = {"backbone.name": "vae.encoder", "backbone.weights": "vae.encoder_weights"}
    names |= {"backbone.resize": "vae.size", "--weights": "--encoder-weights"}
    for old, new in names.items():
        text = text.replace(old, new)
    return text


def choose_device(vae: VaeConfig) -> torch.device:
    """Where it runs.

    Raises:
        ConfigError: A GPU is asked for, and there is none.
    """
    if vae.device != "cpu" and torch.cuda.is_available():
        return torch.device("cuda" if vae.device == "auto" else vae.device)
    if vae.device in ("auto", "cpu"):
        return torch.device("cpu")
    raise ConfigError(
        f"vae.device is {vae.device}, but PyTorch sees no GPU",
        expected="cpu or auto here",
        where="vae.device",
        fix="--vae-device cpu, or run where there is a GPU",
    )


def sized(data: VaeData) -> str:
    """`120 training and 30 validation images of 2 environments, 3 classes`."""
    parts = f"{len(data.train)} training and {len(data.val)} validation images"
    environments = len(np.unique(data.images.environment[data.train]))
    plural = "s" * (environments != 1)
    return f"{parts} of {environments} environment{plural}, {len(data.images.classes)} classes"


def tell_annealing(vae: VaeConfig, tell: Tell) -> None:
    """Tell if the weight of the KL term never comes to 1."""
    annealing = annealing_of(vae)
    if annealing.end > vae.steps:
        tell(
            f"warning: w(step) only comes to {annealing(vae.steps - 1):.3g} in {vae.steps} steps; it would "
            f"be 1 at step {annealing.end:g} (--kl-anneal-end 50% ends halfway)"
        )
