"""Backbone and head as one model, its optimiser and the course of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from featstore.errors import ConfigError, FeatstoreError
from heads.config import TrainConfig
from heads.models.head import Head
from heads.models.standardize import Standardize, usable_deviation
from heads.training.finetune_config import FinetuneConfig
from heads.training.optimizer import learning_rate

# Settings of fine-tuning that are those of a training too, by the same names.
_SAME = (
    "epochs",
    "patience",
    "min_delta",
    "min_epochs",
    "grad_clip",
    "amp",
    "ema_decay",
    "device",
    "weight_decay",
    "seed",
    "gradient_accumulation_steps",
)


class Model(nn.Module):
    """Backbone and head, so that one state holds both.

    Args:
        backbone: Normalised patches to features.
        head: On these features.
    """

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head


def training_config(train: TrainConfig, settings: FinetuneConfig) -> TrainConfig:
    """A run's settings of training with those of fine-tuning in their place.

    Loss, class weights, penalties, sub-cases and balanced sampling stay the run's.

    Args:
        train: The run's, resolved.
        settings: The section ``finetune``.
    """
    changes = {name: getattr(settings, name) for name in _SAME}
    if settings.head_lr != "auto":
        changes["lr"] = settings.head_lr
    if settings.batch_size != "auto":
        changes["batch_size"] = settings.batch_size
    # Patches are drawn by finetune.patches_per_case, out of all; the mean and deviation are the run's.
    changes |= {"sampling": "all", "per_slice_cap": None, "views": False, "standardize": "none"}
    changes |= {"optimizer": "adamw", "weight_decay_mode": "constant", "scheduler": "none"}
    return train.model_copy(update=changes)


def make_optimizer(model: Model, train: TrainConfig, settings: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with a rate of its own for what learns of the backbone and of the head.

    Raises:
        ConfigError: Nothing learns.
    """
    rates = ((model.backbone, settings.backbone_lr), (model.head, learning_rate(train)))
    found = [([p for p in part.parameters() if p.requires_grad], lr) for part, lr in rates]
    groups = [{"params": params, "lr": lr} for params, lr in found if params]
    if not groups:
        raise ConfigError(
            "nothing is to learn: the backbone is frozen, and the head too",
            expected="blocks that are unfrozen, or a head that learns",
            where="finetune.unfreeze, finetune.freeze_head",
            fix="--unfreeze last:1, or leave out --freeze-head",
        )
    return torch.optim.AdamW(groups, weight_decay=train.weight_decay, fused=True)


class Following:
    """Keeps a head's standardisation with its backbone: moving averages of the features' moments.

    After step n (from 0), mean ← mean + m (mean of the step's features − mean), likewise the variance,
    with m = max(0.1, 1 / (n + 1)): at the first step all of it is new. In BatchNorm's manner, but what
    is learned from is standardised by the averages, as in evaluation, and no gradient passes.

    Args:
        standardize: The head's; its buffers are changed.
    """

    def __init__(self, standardize: Standardize) -> None:
        self._standardize = standardize
        self._steps: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """Note (P, D) features of the step."""
        x = features.detach().double()
        count = x.new_full((1,), len(x))
        self._steps.append(torch.cat((count, x.sum(0), x.square().sum(0))))

    def sums(self) -> torch.Tensor:
        """(1 + 2 D,) number, sum and sum of squares of what was noted; to be summed over processes."""
        size = 1 + 2 * len(self._standardize.mean)
        none = torch.zeros(size, dtype=torch.float64, device=self._standardize.mean.device)
        found, self._steps = sum(self._steps, start=none), []
        return found

    @torch.no_grad()
    def update(self, sums: torch.Tensor, step: int) -> None:
        """Move the averages by what `sums` gave.

        Args:
            sums: Of all processes.
            step: Of the whole training, from 0.
        """
        held, momentum = self._standardize, max(0.1, 1 / (step + 1))
        count, (total, square) = sums[0], sums[1:].view(2, -1)
        mean = total / count
        variance = (square / count - mean.square()).clamp_min(0)
        moved = held.std.double().square().lerp(variance, momentum).sqrt()
        held.mean.lerp_(mean.to(held.mean.dtype), momentum)
        held.std.copy_(usable_deviation(moved))


def follows(settings: FinetuneConfig) -> bool:
    """Whether the head's standardisation follows its backbone."""
    auto = settings.standardize == "auto" and settings.batch_norm == "train"
    return auto or settings.standardize == "follow"


def rate_course(settings: FinetuneConfig, total: int) -> Callable[[int], float]:
    """What both rates are multiplied by in each step, from 0, of ``total``.

    It rises linearly over the warm-up, to 1; then it stays, or falls as a half cosine to 0.
    """
    rising = settings.warmup * total if settings.warmup < 1 else settings.warmup

    def rate(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        if settings.scheduler == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1.0, total - rising))))

    return rate


def no_memory(device: torch.device) -> FeatstoreError:
    """The error where not even one patch can be learned from."""
    return FeatstoreError(
        f"{device} has too little memory for the gradient of one patch",
        expected="memory for a forward and a backward pass of one patch",
        where="finetune.chunk, finetune.unfreeze, backbone.resize",
        fix="unfreeze less (--unfreeze last:1), use smaller patches, another --device, or free the memory",
    )
