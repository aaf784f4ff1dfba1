"""The files of a β-VAE's run: what was trained on what, its log, its checkpoints."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from featstore import __version__
from heads.evaluation import checkpoints
from heads.evaluation.runs import RunError, RunFolder, make_run, write_text
from heads.training.environments import LabelledImages
from heads.training.vae import TERMS, VaeProgress, VaeTraining
from heads.training.vae_config import VaeConfig

ABOUT = "vae.json"  # what makes a folder a run of train-vae
# Settings of a place, or of what is shown: a training that goes on may have others.
_FREE = ("data_dir", "experiment", "device", "workers", "memory_gb", "save_seconds", "picture_every")


def describe(
    kind: str, images: LabelledImages, config: VaeConfig, device: torch.device, **more: Any
) -> dict[str, Any]:
    """`vae.json`: what is trained on what, and by which versions.

    Args:
        kind: ``train`` or ``leave_one_out``.
        images: All of them.
        config: The section ``vae``.
        device: Where it runs.
        more: Further entries.
    """
    return {
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environments": list(images.environments),
        "classes": list(images.classes),
        "images": counts(images),
        "digest": digest(images),
        "versions": {
            "featstore": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "machine": {"device": str(device), "threads": torch.get_num_threads()},
        "settings": {key: value for key, value in config.model_dump().items() if key not in _FREE},
        **more,
    }


def counts(images: LabelledImages) -> dict[str, dict[str, int]]:
    """Number of images by environment and class."""
    return {
        environment: {
            name: int(((images.environment == e) & (images.label == c)).sum())
            for c, name in enumerate(images.classes)
        }
        for e, environment in enumerate(images.environments)
    }


def digest(images: LabelledImages) -> str:
    """Of which images there are: names, sizes in bytes, environments, classes."""
    found = hashlib.sha256()
    rows = zip(images.paths, images.environment.tolist(), images.label.tolist(), strict=True)
    for path, environment, label in rows:
        size = path.stat().st_size if path.exists() else -1
        name = f"{images.environments[environment]}/{images.classes[label]}/{path.name} {size}\n"
        found.update(name.encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def read_about(folder: Path) -> dict[str, Any]:
    """What `vae.json` of a run says.

    Raises:
        RunError: It is missing or damaged.
    """
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if {"kind", "environments", "classes", "digest", "settings"} <= set(about):
            return dict(about)
        found = "it lacks what such a description holds"
    except (OSError, ValueError, TypeError) as error:
        found = f"{type(error).__name__}: {error}"
    raise RunError(
        f"{folder} is no run of train-vae: {found}",
        expected=f"a folder with {ABOUT}, as `featstore train-vae` wrote it",
        where=str(path),
        fix="name another folder, or train anew",
    )


def state_path(folder: Path) -> Path:
    """Of the state to resume from."""
    return RunFolder(folder).last


def save_state(folder: Path, training: VaeTraining, about: Mapping[str, Any]) -> None:
    """Write ``checkpoints/last.pth``, and the best weights beside it."""
    checkpoints.save_state(make_run(RunFolder(folder)), training.state(), _identity(about))


def restore(folder: Path, training: VaeTraining, about: Mapping[str, Any]) -> None:
    """Put a training where the run's last state was.

    Raises:
        RunError: The checkpoint is damaged, or of another training.
    """
    path = state_path(folder)
    state = checkpoints.load_state(path, _identity(about), _check_state)
    try:
        training.load_state(state)
    except Exception as error:  # what loading raises depends on what does not fit
        raise checkpoints.unreadable(path, f"its state does not fit this training ({error})") from error


def _check_state(state: Mapping[str, Any]) -> None:
    """Raises ValueError unless it is a state of a β-VAE's training."""
    progress, best = state.get("progress"), state.get("best")
    if not isinstance(progress, dict) or set(progress) != set(asdict(VaeProgress())):
        raise ValueError("its progress is not that of a training")
    if not all(isinstance(row, dict) and "step" in row for row in progress["history"]):
        raise ValueError("its history is not that of a training")
    if not isinstance(best, dict) or not all(isinstance(value, torch.Tensor) for value in best.values()):
        raise ValueError("its best weights are none")


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: about[name] for name in ("settings", "environments", "classes", "digest")}


def write_log(folder: Path, history: list[dict[str, float]], steps: int) -> None:
    """Write ``log.txt`` and ``history.csv``."""
    write_text(folder / "log.txt", "".join(f"{line(row, steps)}\n" for row in history))
    write_text(folder / "history.csv", pd.DataFrame(history).to_csv(index=False))


def line(row: Mapping[str, float], steps: int) -> str:
    """A row of the history as a line of the log."""
    names = [name for name in TERMS if row[name] == row[name]]  # plain training has no reconstruction
    text = f"step {row['step']:.0f}/{steps}  " + "  ".join(f"{name} {row[name]:.5f}" for name in names)
    if "KLD_loss" in names:
        text += f"  w {row['w']:.4f}"
    text += f"  {row['seconds']:.1f} s"
    if "val_accuracy" in row:
        shown = [name for name in names if name != "total_loss"]
        text += "  | val " + "  ".join(f"{name} {row[f'val_{name}']:.5f}" for name in shown)
    return text
