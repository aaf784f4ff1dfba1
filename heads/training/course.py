"""What all trainings share: epochs judged by the validation loss, the best one kept, early stopping."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from featstore.errors import FeatstoreError
from heads.config import TrainConfig


class TrainingError(FeatstoreError):
    """A training that failed."""

    exit_code = 1


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        epoch: Epochs done.
        best_epoch: The one with the lowest validation loss, from 1; 0 before the first.
        best_val_loss: Its class-weighted, smoothed cross-entropy, without penalties.
        reference: The validation loss that early stopping compares with.
        waited: Epochs since the validation loss fell by `min_delta`.
        history: One row an epoch: everything that is logged.
    """

    epoch: int = 0
    best_epoch: int = 0
    best_val_loss: float = math.inf
    reference: float = math.inf
    waited: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def to_text(self, epochs: int) -> str:
        """The last epoch, of so many, on one line."""
        row = self.history[-1]
        rate = "penalty" if "penalty" in row else "lr"  # of a head that is solved, not stepped
        return (
            f"epoch {self.epoch:3}/{epochs}  loss {row['train_loss']:.4f}  "
            f"val {row['val_cross_entropy']:.4f}  AUC {row['val_auc']:.3f}  {rate} {row[rate]:.2g}  "
            f"{row['seconds']:.2f} s{'  best' if self.best_epoch == self.epoch else ''}"
        )


class Course:
    """The course of a training: which epoch is the best, and when it is over.

    Args:
        config: Resolved (`heads.config.resolved`).

    Attributes:
        progress: How far it is.
        best: The weights of the best epoch, on the CPU; replaced, never changed.
        remedy: What to do about a loss that is no longer a number.
    """

    remedy = "lower train.lr, clip the gradient (--grad-clip 0.5), or use standardize: train"

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}

    @property
    def finished(self) -> bool:
        """Whether all epochs are done or early stopping has spoken."""
        return is_finished(self.config, self.progress)

    def kept(self) -> Mapping[str, torch.Tensor]:
        """The weights that are validated."""
        raise NotImplementedError

    def conclude(self, row: dict[str, float]) -> None:
        """End an epoch: log it, and keep its weights if it is the best.

        Args:
            row: Everything that is logged of it.

        Raises:
            TrainingError: The loss is no longer a number.
        """
        progress, config = self.progress, self.config
        progress.history.append(row)
        if not math.isfinite(row["train_loss"] + row["val_loss"]):
            raise TrainingError(
                f"the loss is no longer a number in epoch {progress.epoch + 1}",
                expected="finite losses",
                where=f"lr {row['lr']:g}, train.amp {config.amp}, gradient norm {row['grad_norm']:.3g}",
                fix=self.remedy,
            )
        progress.epoch += 1
        val_loss = row["val_cross_entropy"]
        if val_loss < progress.best_val_loss:
            progress.best_val_loss, progress.best_epoch = val_loss, progress.epoch
            self.best = {name: value.cpu().clone() for name, value in self.kept().items()}
        if val_loss < progress.reference - config.min_delta:
            progress.reference, progress.waited = val_loss, 0
        else:
            progress.waited += 1


def is_finished(config: TrainConfig, progress: Progress) -> bool:
    """Whether all epochs are done or early stopping has spoken."""
    stopped = config.patience is not None and progress.waited >= config.patience
    return progress.epoch >= config.epochs or (stopped and progress.epoch >= config.min_epochs)


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Chance from a seed, on this device alone; afterwards it is as it was."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        if on_gpu:
            torch.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield
